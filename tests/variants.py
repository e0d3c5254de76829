"""Networks near the one that evolution found, made by hand: is there anything better near it? For `bench.py variants`.

The name says what a network is: residual branches, each behind a norm, or the winner with something changed.
"""

from dataclasses import replace

from genome import Gene, Genome

SHORT = {  # genes as the winner has them, and others with traits that are not the usual ones
    "ssm": Gene("ssm", 256, gating="none"),
    "shift": Gene("shift", activation="tanh", skip=1),
    "plain-shift": Gene("shift"),
    "moe": Gene("moe_router", 256),
    "conv2": Gene("conv1d", 256, kernel=2),
    "conv": Gene("conv1d", 256),
    "x0": Gene("linear", 256),  # the embedding, through a matrix, is added to the stream
    **{op: Gene(op, 256) for op in ("attention", "retention", "gate")},
}
START = "ssm, shift moe, attention, moe"  # of the winner
FOUND = f"{START}, ssm, moe"  # the winner, but for the wiring of its last two ops
BRANCHES = [
    FOUND,
    # shorter and longer
    START,
    f"{FOUND}, ssm, moe",
    f"{FOUND}, attention, moe",
    # which ops mix tokens, and in which order
    "ssm, shift moe, ssm, moe, attention, moe",
    "attention, shift moe, ssm, moe, ssm, moe",
    "ssm, shift moe, ssm, moe, ssm, moe",
    "ssm, shift moe, attention, moe, attention, moe",
    "ssm, shift moe, attention, moe, attention, moe, attention, moe",
    "attention, shift moe, attention, moe, attention, moe",
    "attention, shift moe, attention, moe, attention, moe, attention, moe",
    "attention, shift gate, attention, gate, attention, gate",
    "retention, shift moe, attention, moe, retention, moe",
    # gated MLPs for mixtures
    "ssm, shift gate, attention, gate, ssm, gate",
    "ssm, shift gate, attention, shift gate, ssm, shift gate",
    "ssm, plain-shift gate, attention, plain-shift gate, ssm, plain-shift gate",
    # shifts, convolutions and the embedding elsewhere
    "ssm, shift moe, attention, shift moe, ssm, shift moe",
    "ssm, shift moe, shift attention, moe, ssm, moe",
    "ssm, shift moe, conv attention, moe, ssm, moe",
    "conv ssm, shift moe, attention, moe, conv ssm, moe",
    "conv ssm, shift moe, conv attention, shift moe, conv ssm, shift moe",
    "ssm, shift moe, x0, attention, moe, ssm, moe",
    "ssm, shift moe, x0, attention, moe, x0, ssm, moe",
]
TRAITS = {  # each in turn for all genes of an op of the winner
    "ssm": {"gating": ["output"]},
    "attention": {
        "heads": [1, 4],
        "gating": ["output"],
        "window": [256],
        "kv_heads": ["one"],
        "position": ["none"],
        "temperature": ["learned"],
    },
    "moe_router": {"experts": [2, 8], "shared": [True]},
}


def network(text: str) -> Genome:
    """Residual branches, each behind a norm: "ssm, shift moe" is norm→ssm (skip 2), norm→shift→moe_router (skip 3)."""
    genes = []
    for branch in text.split(", "):
        if branch == "x0":
            genes.append(SHORT["x0"].change(input=len(genes) + 1, skip=1))
        else:
            ops = [SHORT[name] for name in branch.split()]
            genes += [Gene("norm"), *ops[:-1], ops[-1].change(skip=len(ops) + 1)]
    return Genome(tuple(genes), embed_dim=256)


def changed(genome: Genome, op: str, **traits) -> Genome:
    """The genome with other traits of all genes of one op."""
    return replace(genome, genes=tuple(g.change(**traits) if g.op == op else g for g in genome.genes))


def resized(genome: Genome, dim: int, **traits) -> Genome:
    genes = (g.change(dim=dim) if g.dim else g for g in genome.genes)
    return replace(genome, genes=tuple(genes), embed_dim=dim, **traits)


def winner(start: str = START) -> Genome:
    """The published best_genome.json, or one with other branches before the last."""
    last = (Gene("norm"), Gene("norm"), SHORT["ssm"].change(skip=2), SHORT["moe"].change(skip=4))
    return Genome((*network(start).genes, *last, Gene("norm", kind="layer")), embed_dim=256)


def near_the_winner() -> dict[str, Genome]:
    """Each with its name; the winner is the first."""
    won = winner()
    found = {"winner": won} | {text: network(text) for text in BRANCHES}
    found[f"{START} at width 384"] = resized(network(START), 384)
    found[f"{FOUND}, layer norm"] = replace(network(FOUND), genes=(*network(FOUND).genes, Gene("norm", kind="layer")))
    side_by_side = (Gene("norm"), SHORT["attention"].change(skip=2), SHORT["ssm"].change(input=2, skip=1))
    genes = (*side_by_side, *network("shift moe").genes, *side_by_side, *network("moe").genes)
    found["attention beside ssm, shift moe, attention beside ssm, moe"] = Genome(genes, embed_dim=256)
    found["winner, conv2 for the shift"] = winner("ssm, conv2 moe, attention, moe")
    found |= {f"winner, learning rate {lr}": replace(won, lr_factor=lr) for lr in (1.4, 2.0)}
    found |= {f"winner, width {dim}": resized(won, dim) for dim in (192, 320, 384)}
    found["winner, width 320, learning rate 1.4"] = resized(won, 320, lr_factor=1.4)
    found |= {f"winner, embedding {dim}": replace(won, embed_dim=dim) for dim in (128, 384, 512)}
    found["winner, tied head"] = replace(won, tied=True)
    found["winner, learned gains"] = replace(won, genes=tuple(g.change(scale=g.skip > 0) for g in won.genes))
    for op, traits in TRAITS.items():
        for name, choices in traits.items():
            found |= {f"winner, {op} {name} {choice}": changed(won, op, **{name: choice}) for choice in choices}
    return found
