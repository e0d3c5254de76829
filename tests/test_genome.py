"""genome.py: every genome is valid, leak-free and trainable, and computes what the papers say.

reference.py holds the independent implementations. Widths are small wherever width does not matter.
"""

import copy
import csv
import json
import math
import pickle
import random
import re
import string
import tracemalloc
import zlib
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import reference
import torch
import torch.nn.functional as F
from designs import NAMED_DESIGNS

import genome as g
from genome import OPS, Block, Frame, Gene, Genome, GenomeError, Model, NgramTable, Op

VOCAB = 256
LONG = 2 * g.CHUNK + 22  # tokens: three chunks, the last one not full
BEYOND_WINDOWS = 130  # tokens: more than two windows
SCALES = (*g.WIRING["scale"], *g.WIRING_RETIRED["scale"])
HERE = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are done sooner by one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gene(op: str, dim: int = 64, **fields) -> Gene:
    return Gene(op, None if OPS[op].keeps_width else dim, **fields)


def one(op: str, dim: int = 64, **fields) -> Genome:
    """The genome of a single gene on an embedding of 64 channels."""
    return Genome((gene(op, dim, **fields),), embed_dim=64)


def narrow(genome: Genome) -> Genome:
    """The same wiring at 64 channels (128 in place of 512), so that hundreds can be run."""

    def width(dim):
        return 128 if dim == 512 else 64

    genes = [x.change(dim=width(x.dim)) if x.dim else x for x in genome.genes]
    return replace(genome, genes=tuple(genes), embed_dim=width(genome.embed_dim))


def build(genome: Genome) -> Model:
    """A model whose every weight is random, whatever it starts as, and depends on its name and shape alone."""
    model = Model(genome, VOCAB)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name}{p.shape}".encode())))
        p.data = noise / math.sqrt(p.size(-1)) if p.dim() > 1 else p.data + 0.3 * noise
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def unused(model: Model) -> list[str]:
    """The parameters that no gradient reaches, but for an embedding that nothing reads."""
    network, tied = model.genome.network, model.genome.tied
    read = any(0 in (node.source, node.skip) or "embedding" in node.gene.reads for node in network)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return [
        name
        for name, p in model.named_parameters()
        if (p.grad is None or not p.grad.any()) and (name != "embed.table" or read or tied or not network)
    ]


def leaks(genome: Genome, length: int = LONG, at=(1, 40, 63, 64, 65, 127, 128, LONG - 1)) -> list[int] | None:
    """The tokens whose change shows in a logit before them; None where a change shows nowhere, so nothing is tested.

    Each is changed in a row of its own, and the rows are seen together, so that a leak from row to row shows as well.
    It has to show at the token itself; where a gene has a stride, there or later.
    """
    model, idx = build(genome), tokens(len(at), length)
    changed = idx.clone()
    for row, t in enumerate(at):
        changed[row, t] = (changed[row, t] + 7) % VOCAB
    with torch.no_grad():
        before, after = model(idx), model(changed)
    until = {t: t + 1 for t in at} if all(x.stride == 1 for x in genome.genes) else dict.fromkeys(at)
    if any(torch.equal(before[row, t : until[t]], after[row, t : until[t]]) for row, t in enumerate(at)):
        return None
    return [t for row, t in enumerate(at) if not torch.equal(before[row, :t], after[row, :t])]


def random_trait_gene(rng: random.Random, op: str, **fields) -> Gene:
    traits = {name: rng.choice(choices) for name, choices in OPS[op].traits.items()}
    skip, scale = rng.choice((0, 1)), rng.choice(SCALES)
    return gene(
        op, rng.choice((64, 128)), **{"repeat": rng.choice((1, 1, 2)), "skip": skip, "scale": scale} | fields | traits
    )


def lineage(seed: int, generations: int) -> list[Genome]:
    """Random genomes and what comes of breeding them."""
    rng = random.Random(seed)
    family = [g.random_genome(rng) for _ in range(4)]
    for _ in range(generations):
        family.append(g.mutate(rng.choice(family), rng, 0.3).genome)
        family.append(g.crossover(rng.choice(family), rng.choice(family), rng).genome)
    return family


TRAITS = [(op, {name: choice}) for op in OPS for name, choices in OPS[op].traits.items() for choice in choices]
CASES = [(op, {}) for op in OPS if not OPS[op].traits] + TRAITS
# The fewest genes of which every trait choice is part, for what is too slow to do with each alone.
COVER = [
    (op, {name: choices[n % len(choices)] for name, choices in OPS[op].traits.items()})
    for op in OPS
    for n in range(max(map(len, OPS[op].traits.values()), default=1))
]


def label(value):
    """The traits of a case, for the name of its test."""
    if isinstance(value, dict):
        return "-".join(f"{name}={choice}" for name, choice in value.items()) or "plain"


# ------------------------------------------------------------------------------------------------------------------
# Breeding: valid, immutable, different.


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_genomes_are_valid_and_new(seed):
    rng = random.Random(seed)
    family = [g.random_genome(rng) for _ in range(500)]
    for n in range(1200):
        parents = [rng.choice(family) for _ in range(1 + n % 2)]
        written = [parent.to_json() for parent in parents]
        child, operator = g.crossover(*parents, rng) if len(parents) == 2 else g.mutate(*parents, rng, 0.3)
        assert [parent.to_json() for parent in parents] == written
        assert child.key not in [parent.key for parent in parents]
        assert all(name in g.MUTATIONS or name == "crossover" for name in operator.split("+"))
        again = Genome.from_json(child.to_json())
        assert again == child and again.to_json() == child.to_json()
        assert again.key == child.key and again.network == child.network
        family[rng.randrange(len(family))] = child


def test_a_child_of_near_twins_is_neither():
    rng, a, b = random.Random(0), one("linear"), one("linear", activation="relu")
    assert all(g.crossover(a, b, rng).genome.key not in (a.key, b.key) for _ in range(1000))


def test_breeding_repeats_with_the_same_rng():
    assert [x.to_json() for x in lineage(3, 50)] == [x.to_json() for x in lineage(3, 50)]


@pytest.mark.parametrize("seed", range(10))
def test_random_genomes_train_and_do_not_leak(seed):
    family, reached, leaking = [narrow(genome) for genome in lineage(seed, 10)], [], []
    for genome in family:
        torch.manual_seed(seed)
        model, idx = Model(genome, VOCAB), tokens(1, 72)
        assert sum(p.numel() for p in model.parameters()) == genome.num_params(VOCAB)
        for p in model.parameters():  # a gain of zero would stop the gradient of its branch
            p.data += 0.05 * torch.randn_like(p)
        model(idx, idx.roll(-1, 1)).backward()
        reached.append(unused(model) == [])
        leaking.append(leaks(genome, 72, (1, 63, 64, 71)))
    assert not any(leaking), [genome.to_json() for genome, leak in zip(family, leaking, strict=True) if leak]
    # relu squared over and over, with no norm between, underflows: rare, and such a genome cannot win
    assert min(reached.count(True), leaking.count([])) >= 0.85 * len(family)


def test_every_operator_is_drawn_and_acts():
    rng, start, drawn = random.Random(0), one("linear"), set()
    for name, (change, *_) in g.MUTATIONS.items():
        assert any(change(parent, rng).key != parent.key for parent in lineage(1, 20)), name
    for _ in range(2000):
        drawn |= set(g.mutate(start, rng, 0.3).operator.split("+"))
    assert drawn == set(g.MUTATIONS)


# What only two changes in a row reach (pairs of heads share keys, but not where there are two heads) is rare among all
# that mutate can do: each kind of change is made alone, so often that missing a value by chance is out of the question.


@pytest.mark.parametrize("op", OPS)
def test_mutation_reaches_every_trait(op, seed=0):
    rng, genome, seen = random.Random(seed), Genome((gene(op),) * 3), set()
    for _ in range(1000):
        genome = g.change_trait(genome, rng)
        seen |= {(op, *trait) for x in genome.genes for trait in x.traits}
    assert seen == {(op, name, choice) for name, choices in OPS[op].traits.items() for choice in choices}


def test_mutation_reaches_every_op_distance_and_width(seed=0):
    rng, genome, seen = random.Random(seed), Genome((gene("linear"),) * 10), set()
    for n in range(8000):
        what = ("op", "width", "activation", "input", "skip", "repeat", "scale", "stride", "training")[n % 9]
        genome = g.MUTATIONS[f"change_{what}"][0](genome, rng)
        seen |= {(name, getattr(genome, name)) for name in g.GENOME_TRAITS}
        seen |= {("to the embedding", name) for name in ("input", "skip") if getattr(genome.genes[-1], name) == 10}
        seen |= {(name, getattr(x, name)) for x in genome.genes for name in ("op", "dim", "input", "skip", *g.WIRING)}
    expected = {("op", op) for op in OPS} | {("dim", dim) for dim in g.WIDTHS}
    expected |= {("input", d) for d in range(1, g.MAX_DISTANCE + 1)} | {("skip", d) for d in range(g.MAX_DISTANCE + 1)}
    expected |= {("to the embedding", name) for name in ("input", "skip")}
    expected |= {(name, c) for name, choices in (g.WIRING | g.GENOME_TRAITS).items() for c in choices}
    assert not expected - seen


def test_a_residual_survives_insertion_and_removal():
    block = g.transformer(1, 64, 4)
    longer = g.spliced(block, 1, 1, [Gene("linear", 64)])
    assert [x.skip for x in longer.genes] == [0, 0, 3, 0, 2] and longer.network[2].skip == 0
    assert g.spliced(longer, 1, 2, []) == block
    assert g.spliced(block, 0, 4, []) == block  # nothing would be left
    assert [g.branch_start(longer, i) for i in range(5)] == [0, 1, 0, 3, 3]


LAYER = (Gene("norm"), Gene("attention", 64, skip=2), Gene("norm"), Gene("gate", 64, skip=2))
LINK = Gene("identity", activation="tanh", skip=1)  # none that breeding adds looks like this


def linked(layers: int = 3, layer=LAYER) -> Genome:
    """Layers, with the embedding added before each but the first."""
    genes = [*layer]
    for _ in range(layers - 1):
        genes += [LINK.change(input=len(genes) + 1), *layer]
    return Genome(genes, embed_dim=64)


def ends_of_links(genome: Genome) -> set[int]:
    """The states that such links read; 0 is the embedding."""
    found = [
        (state, x) for state, x in enumerate(genome.genes, start=1) if (x.op, x.activation) == ("identity", "tanh")
    ]
    return {state - x.input for state, x in found}


def test_links_to_the_embedding_do_not_tie_blocks_together():
    assert g.clean_cuts(linked()) == [0, 2, 4, 5, 7, 9, 10, 12, 14]
    assert g.clean_cuts(Genome(LAYER * 2)) == [0, 2, 4, 6, 8]
    other = (*linked().genes[:9], LINK.change(input=6), *LAYER)  # a link to elsewhere does
    assert g.clean_cuts(Genome(other, embed_dim=64)) == [0, 2, 4, 10, 12, 14]


def test_a_moved_link_still_reaches_the_embedding():
    genome = linked()
    for start, stop, to in ((4, 9, 9), (4, 9, 14), (9, 14, 4), (9, 10, 2)):
        genes = g.moved(genome, start, stop, to)
        assert [x.change(input=1) for x in genes] == [x.change(input=1) for x in genome.genes[start:stop]]
        assert [x.input for x in genes] == [to + k if x.op == "identity" else 1 for k, x in enumerate(genes, start=1)]
    assert g.moved(genome, 0, 4, to=9) == list(LAYER)  # a residual around the first genes reads the embedding as well


@pytest.mark.parametrize("name", ["swap_runs", "duplicate_run", "remove_run", "add_block", "crossover"])
def test_links_to_the_embedding_survive(name):
    genome, seen = linked(), set()
    for seed in range(150):
        rng = random.Random(seed)
        child = g.crossover(genome, linked(2), rng).genome if name == "crossover" else g.MUTATIONS[name][0](genome, rng)
        seen |= {child.key}
        assert ends_of_links(child) <= {0}, (seed, child)
    assert len(seen) > 5


def test_what_is_added_before_all_is_not_added_to_links_to_the_embedding():
    child = g.spliced(linked(), 0, 0, [Gene("shift")])
    assert child.genes[0].op == "shift" and [x.skip for x in child.genes[1:5]] == [0, 2, 0, 2]
    assert ends_of_links(child) == {0}


def test_add_link_adds_an_earlier_state():
    genome, ends = Genome(LAYER * 3, embed_dim=64), []
    for seed in range(300):
        child = g.add_link(genome, random.Random(seed))
        (i,) = [i for i, x in enumerate(child.genes) if x.op == "identity"]
        link = child.genes[i]
        assert link.skip == 1 and link.scale == "small" and i in g.clean_cuts(genome)
        assert [*child.genes[:i], *child.genes[i + 1 :]] == [*genome.genes]
        ends.append(i + 1 - link.input)
    assert 0.4 < ends.count(0) / len(ends) < 0.75 and len(set(ends)) > 8


def test_add_block_mixes_tokens_and_channels():
    genome, kinds = Genome((gene("linear", 192, repeat=3, skip=1),), embed_dim=192), set()  # nothing new has repeat=3
    for seed in range(100):
        added = [x for x in g.add_block(genome, random.Random(seed)).genes if x.repeat < 3]
        first, *_, last = ops = [x.op for x in added if x.op != "norm"]
        assert {x.dim for x in added if x.op not in ("norm", "ngram")} == {192}
        assert OPS[first].mixes_tokens and not OPS[last].mixes_tokens, ops
        kinds |= {(first, last)}
    assert len(kinds) > 15


def test_growth_copies_no_table():
    layer = (
        Gene("norm"),
        Gene("attention", 64, skip=2, values="bigram"),
        Gene("ngram", 64, skip=1, gated=False),
        Gene("ngram", 64, n=1),
        Gene("linear", 128, skip=2),
        Gene("attention", 128, skip=1, values="embedding"),
        Gene("linear", 64),
    )
    small, large = (g.grown(Genome(layer * 2, embed_dim=64), n) for n in (0, 2))
    counts = [[sum(x.op == op for x in genome.genes) for op in OPS] for genome in (small, large)]
    assert counts[1] == [n if op == "ngram" else 2 * n for op, n in zip(OPS, counts[0], strict=True)]
    values = [x.values for x in large.genes if x.op == "attention"]
    assert values == ["bigram", "embedding"] * 2 + ["plain", "embedding"] * 2
    sizes = [large.num_params(vocab) - small.num_params(vocab) for vocab in (100, 10_000)]
    assert sizes[0] == sizes[1] < 400_000  # no row more
    build(large)(tokens(1, 9))


def test_growth_carries_links_to_the_embedding():
    larger = g.grown(linked(), 2)
    assert ends_of_links(larger) == {0} and larger == linked(5)


def test_growth_is_by_a_layer_where_a_table_stands_behind_the_layers():
    """The network runs the table first, as it reads none of them; written so, it would tie all layers together."""
    table = (Gene("ngram", 64, gated=False), Gene("linear", 192, skip=2))

    def genome(layers: int) -> Genome:
        return Genome((*g.transformer(layers, 192).genes, *table), embed_dim=192)

    assert genome(5).ops[0] == "ngram" and len(g.clean_cuts(genome(5))) == 12
    assert g.pruned(genome(5)) == genome(5) and g.grown(genome(5), 1) == genome(6)


def test_growth_that_changes_nothing_is_refused():
    table = gene("ngram", gated=False)
    for genes in ((table, table), (Gene("norm"),), (Gene("identity"),)):
        genome = Genome(genes, embed_dim=64)
        assert g.grown(genome, 0).key == genome.key
        for times in (1, 2):
            with pytest.raises(GenomeError, match=f"{genes[0].op} once more computes nothing new"):
                g.grown(genome, times)


def test_tables_alone_are_no_run_to_grow_by():
    """Two of one width in a row, in front of what computes."""
    tables, layer = (gene("ngram"), gene("ngram", n=3)), g.transformer(1, 64).genes
    assert g.grown(Genome((*tables, *layer, *layer), embed_dim=64), 1) == Genome((*tables, *layer * 3), embed_dim=64)
    genome = Genome((*tables, *layer), embed_dim=64)
    assert g.repeated_run(genome) == (0, 6) and g.grown(genome, 1).ops.count("attention") == 2


def unplaced(network: tuple[g.Node, ...]) -> list[g.Node]:
    """The nodes without what only says where in the genome their genes stand."""
    return [node._replace(gene=node.gene.bare, at=0) for node in network]


@pytest.mark.parametrize("seed", range(3))
def test_pruning_keeps_the_network_and_the_order(seed):
    rng, less, reordered = random.Random(seed), 0, 0
    for genome in map(narrow, lineage(seed, 30)):
        for _ in range(3):  # genes that nothing reads, and others that do not run in their order
            genome = g.change_input(genome, rng)
        pruned = g.pruned(genome)
        if not genome.network:
            continue
        assert pruned.key == genome.key and pruned.num_params(VOCAB) == genome.num_params(VOCAB)
        assert unplaced(pruned.network) == unplaced(genome.network)
        ran = [node.at for node in genome.network]
        assert [x.bare for x in pruned.genes] == [genome.genes[at - 1].bare for at in sorted(ran)]
        assert g.pruned(pruned) == pruned
        less += len(ran) < len(genome.genes)
        reordered += ran != sorted(ran)
    assert less > 15 and reordered > 5


# ------------------------------------------------------------------------------------------------------------------
# The key: equal where the network is equal, and only there.


def test_key_ignores_what_computes_nothing():
    idle = Gene("identity", repeat=3)
    plain = Genome((Gene("linear", 64, "relu"), Gene("attention", 64, skip=1, heads=2, kv_heads="one"), Gene("norm")))
    same = [
        Genome((Gene("linear", 64, "relu"), idle, plain.genes[1], idle, Gene("norm"), idle)),
        Genome((Gene("gate", 512), plain.genes[0].change(input=2), *plain.genes[1:])),  # nothing reads the gate
    ]
    torch.manual_seed(0)
    expected, idx = Model(plain, VOCAB)(tokens(1, 20)), tokens(1, 20)
    for other in same:
        torch.manual_seed(0)
        assert other.key == plain.key and other.num_params(VOCAB) == plain.num_params(VOCAB)
        assert torch.equal(Model(other, VOCAB)(idx), expected)
    for fields in ({"skip": 1}, {"activation": "relu"}):  # to repeat these changes nothing
        assert one("identity", repeat=3, **fields).key == one("identity", **fields).key
    assert one("identity", repeat=3, activation="tanh").key != one("identity", activation="tanh").key


def test_key_ignores_norms_of_what_is_normed():
    norm, mix = Gene("norm"), Gene("attention", 64, skip=1, heads=2)
    plain = Genome((mix,), embed_dim=64)
    for genes in (norm, mix), (mix, norm), (norm, norm, mix, norm), (Gene("norm", repeat=3), mix.change(skip=2)):
        other = Genome(genes, embed_dim=64)
        assert other.key == plain.key and len(other.network) > 1
        logits = []
        for genome in (plain, other):
            torch.manual_seed(0)
            logits.append(Model(genome, VOCAB)(tokens(1, 20)))
        assert torch.allclose(*logits, atol=1e-3)  # a gain of one, and the head is all that was drawn
    for genes in (mix, norm, mix), (Gene("norm", activation="relu"), mix), (Gene("norm", kind="layer"), mix):
        assert Genome(genes, embed_dim=64).key not in (plain.key, Genome((mix, mix), embed_dim=64).key)


def test_key_ignores_the_order_of_unrelated_genes():
    a, b, add = Gene("linear", 64), Gene("ssm", 64), Gene("identity", input=1, skip=2)
    there = Genome((a, b.change(input=2), add))
    back = Genome((b, a.change(input=2), Gene("identity", input=2, skip=1)))
    assert there.key == back.key
    assert torch.equal(build(there)(tokens(1, 20)), build(back)(tokens(1, 20)))


def test_equal_keys_are_equal_networks():
    def network(genome):
        return unplaced(genome._network(up_to_gains=True)), genome.embed_dim, genome.lr_factor, genome.tied

    by_key = {}
    for seed in range(30):
        for genome in lineage(seed, 50):
            assert network(by_key.setdefault(genome.key, genome)) == network(genome)
    keys = {str(network(genome)): key for key, genome in by_key.items()}
    assert len(keys) == len(by_key) > 2000


def test_what_a_table_does_not_read_is_no_part_of_the_network():
    table, last = Gene("ngram", 64, gated=False), gene("linear")
    plain = Genome((table, last), embed_dim=64)
    for genes in (
        (gene("gate", 512), Gene("norm"), table, last),
        (gene("gate", 512), table.change(input=2, repeat=3), last),  # nor does it matter what it would read, or again
    ):
        genome = Genome(genes, embed_dim=64)
        assert genome.key == plain.key and len(genome.network) == 2
        assert genome.network[0].source is genome.network[0].d_in is None
        assert genome.num_params(VOCAB) == plain.num_params(VOCAB)
        assert torch.equal(build(genome)(tokens(1, 20)), build(plain)(tokens(1, 20)))
    assert len(Genome((gene("gate"), table.change(skip=1), last), embed_dim=64).network) == 3  # what it is added to is
    assert len(Genome((gene("gate"), table.change(gated=True), last), embed_dim=64).network) == 3  # and what gates it
    gated = Genome((gene("gate"), table.change(gated=True, repeat=2)), embed_dim=64)
    assert gated.network[1].gene.repeat == 2 and gated.network[1].source == 1


def test_traits_that_do_nothing_are_settled():
    def attention(**traits):
        return Gene("attention", 64, **traits)

    for settled, traits in (
        ({"position": "none"}, {"position": "none", "rope_base": 1_000, "rope_share": 0.25}),
        ({"position": "alibi"}, {"position": "alibi", "rope_base": 100_000}),
        ({"heads": 1}, {"heads": 1, "kv_heads": "half"}),
        ({"heads": 4, "kv_heads": "half"}, {"heads": 2, "kv_heads": "half"}),
        ({"similarity": "cosine"}, {"similarity": "cosine", "qk_norm": False}),
    ):
        assert attention(**settled) == attention(**traits)
    assert gene("ngram", n=1) == gene("ngram", n=1, slots=32_768)
    assert gene("gate", scale="small") == gene("gate") != gene("gate", scale="small", skip=1)
    assert gene("ngram", gated=False, repeat=2, input=5) == gene("ngram", gated=False)


CHANGES = [(op, name, choice) for op in OPS for name, choices in OPS[op].traits.items() for choice in choices[1:]]
CHANGES += [("gate", name, choice) for name, choices in g.WIRING.items() for choice in choices[1:]]
CHANGES += [("gate", name, choice) for name, choices in g.WIRING_RETIRED.items() for choice in choices]


@pytest.mark.parametrize("op, name, choice", CHANGES)
def test_a_trait_changes_what_is_computed(op, name, choice):
    plain = one(op, skip=int(name == "scale"))
    idx = tokens(1, BEYOND_WINDOWS if name == "window" else 40)
    changed = Genome((plain.genes[0].change(**{name: choice}),), embed_dim=64)
    assert changed.key != plain.key
    assert not torch.allclose(build(plain)(idx), build(changed)(idx), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------
# Causality: on the CPU a changed token leaves every logit before it as it was, to the last bit.


@pytest.mark.parametrize("op, traits", CASES, ids=label)
def test_no_op_sees_the_future(op, traits):
    if traits.get("window"):
        assert leaks(one(op, **traits), BEYOND_WINDOWS, (1, 63, 64, 65, 128, BEYOND_WINDOWS - 1)) == []
    else:
        assert leaks(one(op, **traits)) == []


@pytest.mark.parametrize("stride", g.WIRING["stride"])
@pytest.mark.parametrize("op", OPS)
def test_no_wiring_sees_the_future(op, stride):
    assert leaks(one(op, stride=stride, activation="gelu"), 80, (1, 2, 63, 64, 79)) == []
    assert leaks(one(op, stride=stride, repeat=3), 80, (3, 31, 63, 79)) == []
    for scale in SCALES:
        assert leaks(one(op, 128, stride=stride, skip=1, scale=scale), 79, (1, 63, 64, 78)) == []  # one token too many


@pytest.mark.parametrize(
    "op, count", [("attention", 60), ("retention", 40), ("conv1d", 15), ("moe_router", 15), ("ngram", 30), ("gate", 15)]
)
def test_no_combination_of_traits_sees_the_future(op, count):
    rng, genomes = random.Random(op), []
    for n in range(count):
        x = random_trait_gene(rng, op, stride=rng.choice((1, 1, 2, 4)))
        again = x.change(stride=rng.choice(g.WIRING["stride"]), skip=rng.choice((0, 1)), scale="small")
        genomes.append(Genome((x, again) if n % 4 == 0 else (x,), embed_dim=64))
    leaking = [leaks(genome, 80, (1, 63, 64, 79)) for genome in genomes]
    assert not any(leaking), [x for x, leak in zip(genomes, leaking, strict=True) if leak]
    # relu attention may attend to nothing, a norm undo what changed, and a strided table reads one token of a group
    assert leaking.count([]) >= (0.75 if op == "ngram" else 0.9) * count


def peek(x):
    return torch.cat([x[:, 1:], x[:, :1]], dim=1)


def mean_over_time(x):
    return x - x.mean(1, keepdim=True)


def mix_rows(x):
    return x - x.mean(0, keepdim=True)


def rounding(x):
    return (x + x.mean(1, keepdim=True)) - x.mean(1, keepdim=True)


def best_half_of_the_tokens(x):
    return x * (x[..., :1] >= x[..., :1].median(1, keepdim=True).values)


@pytest.fixture
def plant():
    """Define an op `planted` that keeps its width and with size=2 is built by build(d_in) and computes forward(x)."""

    def define(forward=lambda x: x, build=lambda d_in: None):
        class Planted(Op, name="planted", mixes_tokens=True, keeps_width=True):
            traits = {"size": (1, 2)}

            def __init__(self, d_in, d_out, size):
                super().__init__()
                self.size = size
                self.idle = build(d_in) if size == 2 else None

            def forward(self, x):
                return forward(x) if self.size == 2 else x

    yield define
    del OPS["planted"]
    g.block_params.cache_clear()  # it has counted the parameters of an op of that name


@pytest.mark.parametrize("leak", [peek, mean_over_time, mix_rows, rounding, best_half_of_the_tokens])
def test_a_planted_leak_is_found(leak, plant):
    plant(lambda x: x + leak(x))
    assert leaks(one("planted", size=2))
    between = g.transformer(1, 64, 4).genes
    assert leaks(Genome((*between, Gene("planted", size=2), *between)))
    assert leaks(one("planted", size=2, stride=4, skip=1))


def test_a_stride_is_seen_from_the_end_of_its_group_on():
    assert one("gate", stride=2).mixes_tokens and not one("gate", repeat=2).mixes_tokens
    model, idx = build(one("linear", stride=4)), tokens(1, 16)
    for t in range(16):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 7) % VOCAB
        seen = (model(idx) != model(changed)).any(-1)[0].nonzero().flatten().tolist()
        end = t // 4 * 4 + 3
        assert seen == list(range(end, min(end + 4, 16)))


# ------------------------------------------------------------------------------------------------------------------
# Ops of one's own: what is wrong with them is said before anything trains.


@pytest.mark.parametrize("base", [Op, OPS["norm"]])
def test_an_op_cannot_take_the_name_of_another(base):
    norm = OPS["norm"]
    with pytest.raises(ValueError, match=r"MyNorm and Norm .*'norm'"):

        class MyNorm(base, name="norm"):
            pass

    assert OPS["norm"] is norm


@pytest.mark.parametrize("trait", sorted({*g.RESERVED, "op", "dim", "input", "skip", "frame", *g.WIRING}))
def test_a_trait_cannot_take_the_name_of_something_else(trait):
    with pytest.raises(ValueError, match=f"Clash: {trait} "):

        class Clash(Op, name="clash"):
            traits = {trait: (1, 2)}

    assert "clash" not in OPS


@pytest.mark.parametrize(
    "choices",
    [(), (1,), (1, 1), (1, True), (1, 2.0, 2), (1, None), ((1,), (2,)), ([], {}), (1, float("nan")), "ab", [1, 2]],
)
def test_a_trait_has_two_or_more_plain_choices(choices):
    with pytest.raises(ValueError, match="size: its choices"):

        class Odd(Op, name="odd"):
            traits = {"size": choices}

    assert "odd" not in OPS


def test_the_ops_keep_their_rules():
    tried = []
    assert g.op_problem(tried.append) == ""
    cases = len(OPS) + sum(len(choices) - 1 for op in OPS.values() for choices in op.traits.values())
    assert len(tried) == len(set(tried)) == cases


@pytest.fixture
def reader():
    """An op `reader` that adds up matrices of what its trait names, in that order, and keeps what it was given."""
    given = []

    class Reader(Op, name="reader"):
        traits = {"of": ("stream ids embedding", "stream", "ids", "embedding", "embedding stream", "ids embedding")}

        @staticmethod
        def reads(traits):
            return tuple(traits["of"].split())

        def __init__(self, d_in, d_out, of, frame=None):
            super().__init__()
            assert (frame is None) == (of == "stream") and (d_in is None) == ("stream" not in of)
            self.reads, self.dtype = of.split(), frame and frame.dtype
            widths = {"stream": d_in, "ids": 1, "embedding": frame and frame.embed_dim}
            self.matrices = torch.nn.ModuleList(g.Linear(widths[name], d_out) for name in self.reads)

        def forward(self, *inputs):
            if not torch.compiler.is_compiling():
                given.append(dict(zip(self.reads, inputs, strict=True)))
            inputs = [x if x.dim() == 3 else (x / VOCAB).to(self.dtype)[..., None] for x in inputs]
            return sum(matrix(x) for matrix, x in zip(self.matrices, inputs, strict=True))

    yield given
    del OPS["reader"]
    g.block_params.cache_clear()


def test_an_op_is_given_what_it_reads(reader):
    for of, stride in product(OPS["reader"].traits["of"], g.WIRING["stride"]):
        genome = Genome(
            (gene("linear", 128), gene("reader", of=of, stride=stride, skip=1, scale="small")), embed_dim=64
        )
        assert len(genome.network) == 2 and genome.network[1].source == (1 if "stream" in of else None)
        model, idx = build(genome), tokens(2, 12)
        reader.clear()
        loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        embedding = model.embed(idx)
        expected = {"ids": idx, "embedding": embedding, "stream": model.blocks[0](embedding)}
        assert list(reader[0]) == of.split() and unused(model) == []
        for name, x in reader[0].items():
            torch.testing.assert_close(x, torch.stack([reference.grouped(row, stride) for row in expected[name]]))
        assert genome.num_params(VOCAB) == sum(p.numel() for p in model.parameters())
        assert leaks(genome, 32, (1, 30, 31)) == []


def test_the_rules_hold_for_what_an_op_reads(reader, monkeypatch):
    monkeypatch.setattr(g, "OPS", {"reader": OPS["reader"]})
    tried = []
    assert g.op_problem(tried.append) == "" and len(tried) == len(OPS["reader"].traits["of"])


def test_a_retired_choice_is_read_and_never_drawn(plant):
    plant()
    OPS["planted"].retired = {"size": (3,)}
    old = Gene("planted", size=3)
    assert Genome.from_json(Genome((old,)).to_json()).genes == (old,) and old.size == 3
    with pytest.raises(GenomeError, match=r"planted\.size: 4"):
        Gene("planted", size=4)
    rng = random.Random(0)
    drawn = {g.random_gene(rng, 64, ["planted"]).size for _ in range(300)}
    drawn |= {g.change_trait(Genome((old,)), rng).genes[0].size for _ in range(50)}
    assert drawn == {1, 2}
    assert build(Genome((old,)))(tokens(1, 4)).shape == (1, 4, VOCAB)


def test_gains_that_are_no_longer_drawn_are_read():
    for scale in g.WIRING_RETIRED["scale"]:
        genome = Genome((gene("gate", skip=1, scale=scale), gene("gate")), embed_dim=64)
        assert Genome.from_json(genome.to_json()) == genome and genome.genes[0].scale == scale
        rng = random.Random(0)
        assert {g.change_scale(genome, rng).genes[0].scale for _ in range(20)} == {"none", "small"}


def fail(*args, **kwargs):
    raise RuntimeError("no luck")


BROKEN = {  # what is said of an op that is built and runs like this
    "built: RuntimeError: no luck": dict(build=fail),
    "counted, .*: RuntimeError: no luck": dict(build=lambda d_in: d_in == 192 and fail()),
    "counted, .* meta": dict(build=lambda d_in: torch.ones(d_in).sum().item()),
    "run in torch.float32: RuntimeError: no luck": dict(forward=fail),
    "run in torch.bfloat16: ": dict(forward=lambda x: x @ torch.eye(x.size(-1))),
    r"\(B, T, 64\), .* not to \(2, 8, 1\)": dict(forward=lambda x: x[..., :1]),
    r"\(B, T, 64\), .* not to \(2, 1, 64\)": dict(forward=lambda x: x[:, :1]),
    r"\(B, T, 64\), .* not to a tuple": dict(forward=lambda x: (x, x)),
    "makes torch.float32 of torch.bfloat16": dict(forward=lambda x: x.float()),
    "not finite": dict(forward=lambda x: x * math.nan),
    "has no gradient: ": dict(forward=lambda x: x.detach()),
    "has no gradient: .*inplace": dict(forward=lambda x: x.exp().mul_(2)),
    "when another row of the batch changes": dict(forward=lambda x: x + x.flip(0)),
    "at a token when a later one changes": dict(forward=lambda x: x + x.mean(1, keepdim=True)),
    "a parameter idle that is not used": dict(build=lambda d_in: torch.nn.Parameter(torch.ones(d_in))),
}


@pytest.mark.parametrize("said", BROKEN)
def test_an_op_that_breaks_a_rule_is_named(said, plant, monkeypatch):
    plant(**BROKEN[said])
    monkeypatch.setattr(g, "OPS", {name: OPS[name] for name in ("norm", "planted")})
    tried = []
    assert re.match(f"planted, size=2: .*{said}", g.op_problem(tried.append))
    assert tried == ["norm", "norm, kind=layer", "planted", "planted, size=2"]


def test_an_op_has_to_say_that_it_mixes_tokens(plant, monkeypatch):
    plant(lambda x: x + g.delay(x, 1))
    monkeypatch.setattr(g, "OPS", {"planted": OPS["planted"]})
    assert g.op_problem() == ""
    monkeypatch.setattr(OPS["planted"], "mixes_tokens", False)
    assert g.op_problem() == "planted, size=2: has a token see others, so its class has to say so: mixes_tokens=True"


@pytest.mark.parametrize("forward", [lambda x: x[..., :1], lambda x: x[:, :1], lambda x: x[:1]])
def test_what_would_be_broadcast_does_not_train(forward, plant):
    plant(forward)
    for fields in ({}, {"skip": 1}, {"repeat": 2}):
        with pytest.raises(ValueError, match="planted put out"):
            build(one("planted", size=2, **fields))(tokens(2, 8))


def test_the_example_in_the_readme_is_an_op_like_any_other(monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code, name = re.search(r"```python\n(class .*?name=\"(\w+)\".*?)```", readme, re.DOTALL).groups()
    monkeypatch.setitem(OPS, name, None)  # put back what was there, also where the example was pasted into genome.py
    del OPS[name]
    exec(code, dict(vars(g)))
    assert g.op_problem() == ""
    for traits in ({trait: choice} for trait, choices in OPS[name].traits.items() for choice in choices):
        test_no_op_sees_the_future(name, traits)
        test_gradient_reaches_every_parameter(name, traits)
        test_finite_in_bfloat16_over_1024_tokens(name, traits)
        assert Genome.from_json(one(name, **traits).to_json()) == one(name, **traits)
    test_mutation_reaches_every_trait(name)
    test_mutation_reaches_every_op_distance_and_width()


# ------------------------------------------------------------------------------------------------------------------
# Compiling, with the graph itself in the place of what the compiler makes of it.


@pytest.fixture
def ran(monkeypatch):
    """The parts that ran compiled, as often as they did."""
    ran = []

    def compile_fx(graph, inputs, config_patches):
        def run(*args):
            ran.append(graph)
            return graph(*args)

        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    monkeypatch.setattr(g, "COMPILED", {})
    return ran


def test_a_model_is_compiled_in_parts_and_nothing_runs_meanwhile(ran):
    block = (Gene("norm"), Gene("linear", 64, skip=2))
    model, idx = Model(Genome((*block, *block, Gene("gru", 64)), embed_dim=64), VOCAB), tokens(2, 16)
    expected = model(idx, idx)
    assert model.compile(2, 16) == "eager: gru"
    assert ran == [] and [key[0] for key in g.COMPILED] == ["embed", "norm", "linear", "head"]
    assert torch.equal(model(idx, idx), expected)
    assert len(ran) == 6 and len(set(map(id, ran))) == 4  # two blocks share what was compiled for them
    model.uncompile()
    assert model(idx[:, :5]).shape == (2, 5, VOCAB) and len(ran) == 6


def test_what_reads_tokens_and_embedding_is_compiled(ran):
    genes = (
        Gene("ngram", 64, gated=False),
        Gene("ngram", 64, skip=1, n=3, scale="zero"),
        Gene("attention", 64, skip=1, values="token"),
        Gene("attention", 64, skip=1, values="embedding", window=64),
        Gene("gate", 64, skip=1, stride=2, gated=False),
        Gene("gate", 64, skip=1, stride=4, gated=False),
        Gene("gate", 64, skip=1, stride=4, gated=False, scale="small"),
        Gene("gate", 64, skip=1, stride=4, gated=False),
    )
    model, idx = build(Genome(genes, embed_dim=64)), tokens(2, 16)
    expected = model(idx, idx)
    expected.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert model.compile(2, 16) == "" and ran == []
    assert [key[0] for key in g.COMPILED] == ["embed", *["ngram"] * 2, *["attention"] * 2, *["gate"] * 3, "head"]
    loss = model(idx, idx)
    assert len(ran) == 10 and len(set(map(id, ran))) == 9
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)


def test_what_is_compiled_depends_on_which_inputs_are_one_tensor(ran, reader):
    def genes(x):
        return (
            x,  # what it reads, what it is added to and the embedding are one
            x,  # the embedding is another
            x.change(skip=2),  # all are different
            x.change(input=4),  # it reads the embedding
            x.change(skip=5),  # it is added to the embedding
            x,
            x.change(skip=3),
        )

    for of, parts in (("stream ids embedding", 5), ("stream", 2), ("ids", 1), ("ids embedding", 2)):
        g.COMPILED.clear()
        ran.clear()
        model, idx = build(Genome(genes(gene("reader", of=of, skip=1)), embed_dim=64)), tokens(2, 16)
        expected = model(idx, idx)
        assert model.compile(2, 16) == "" and ran == []
        assert [key[0] for key in g.COMPILED] == ["embed", *["reader"] * parts, "head"], of
        torch.testing.assert_close(model(idx, idx), expected)
        assert len(ran) == len(model.blocks) + 2
        assert len(set(map(id, ran))) == parts + 2  # none was compiled once more as it ran


def test_a_part_that_cannot_be_compiled_runs_eagerly(ran, monkeypatch):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fail)
    model, idx = Model(one("linear"), VOCAB), tokens(2, 16)
    expected = model(idx, idx)
    for _ in range(2):
        why = "(RuntimeError: no luck)"
        assert model.compile(2, 16) == f"eager: embed {why}, head {why}, linear {why}"
    assert torch.equal(model(idx, idx), expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OSError("disk full")])
def test_what_the_machine_lacks_is_raised_and_forgotten(ran, monkeypatch, error):
    model, idx = Model(one("linear"), VOCAB), tokens(2, 16)

    def compile_fx(graph, inputs, config_patches):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
        with pytest.raises(type(error)):
            model.compile(2, 16)
    assert model.compile(2, 16) == ""
    model(idx)
    assert len(ran) == 3


def test_every_parameter_is_in_one_group():
    tables = Genome((gene("ngram", n=1), gene("ngram"), gene("attention", values="bigram")))
    tied = replace(g.transformer(1, 64, 4), embed_dim=128, tied=True)
    for genome in (*lineage(6, 20), tied, tables):
        model = Model(genome, VOCAB)
        groups = model.parameter_groups()
        found = [*groups.matrices, *groups.vectors, *groups.tables, *([] if groups.head is None else [groups.head])]
        assert sorted(map(id, found)) == sorted(map(id, model.parameters()))
        assert (groups.head is None) == genome.tied and all(p.dim() >= 2 for p in groups.matrices)
        assert groups.tables[0] is model.embed.table and all(p.dim() == 2 for p in groups.tables)
        names = {id(p): name for name, p in model.named_parameters()}
        for group, kind in ((groups.matrices, "weight"), (groups.tables, "table")):
            assert [names[id(p)] for p in group] == [n for n in names.values() if n.endswith(f".{kind}")]
    assert len(Model(tables, VOCAB).parameter_groups().tables) == 4


# ------------------------------------------------------------------------------------------------------------------
# Gradients and bfloat16.


@pytest.mark.parametrize("op, traits", CASES, ids=label)
def test_gradient_reaches_every_parameter(op, traits):
    for wiring in (
        {},
        {"skip": 1, "scale": "channel", "repeat": 2, "activation": "gelu"},
        {"skip": 1, "scale": "small", "stride": 2},
    ):
        model, idx = build(one(op, 128, **traits, **wiring)), tokens(2, 80)
        model(idx, idx.roll(-1, 1)).backward()
        assert unused(model) == [], wiring


@pytest.mark.parametrize("op, traits", CASES, ids=label)
def test_what_starts_at_zero_is_trained_by_the_second_step(op, traits):
    torch.manual_seed(0)
    model, idx = Model(one(op, skip=1, scale="zero", **traits), VOCAB), tokens(2, 80)
    first = model(idx, idx.roll(-1, 1))
    for step in range(2):
        model.zero_grad()
        model(idx, idx.roll(-1, 1)).backward()
        assert (unused(model) == []) == (step == 1) or not list(model.blocks[0].op.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert model(idx, idx.roll(-1, 1)) < first


@pytest.mark.parametrize("op, traits", COVER, ids=label)
def test_finite_in_bfloat16_over_1024_tokens(op, traits):
    torch.manual_seed(0)
    genome = Genome((Gene("norm"), gene(op, 128, skip=2, **traits)), embed_dim=128)
    model, idx = Model(genome, VOCAB, torch.bfloat16), tokens(1, 1024)
    loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_the_same_seed_builds_the_same_model():
    for genome in (*lineage(5, 5), *NAMED_DESIGNS.values()):
        states = []
        for _ in range(2):
            torch.manual_seed(1)
            states.append(Model(genome, VOCAB).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ------------------------------------------------------------------------------------------------------------------
# Against the independent implementations.


def computes(op: Op, expected, x, *more):
    """Whether op does to x (T, C) what expected(x, weights) does, in float64 up to the float32 that op uses inside."""
    weights = {name: p.detach().double() for name, p in op.state_dict().items()}
    for part in op.modules():
        if isinstance(part, NgramTable):
            part.dtype = torch.float64
    y = op.double()(*(t[None] for t in (x, *more) if t is not None))[0]
    torch.testing.assert_close(y, expected(x, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))  # a multiple of every number of choices: together they cover each
def test_attention_in_every_form(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    covered = {name: choices[seed % len(choices)] for name, choices in OPS["attention"].traits.items()}
    for traits in (covered, *({n: rng.choice(c) for n, c in OPS["attention"].traits.items()} for _ in range(3))):
        model = build(one("attention", 64 if traits["heads"] < 8 else 128, **traits))
        op, settled = model.blocks[0].op, dict(model.genome.genes[0].traits)
        # reference.attention sees these in the weights
        values, *_ = [settled.pop(name) for name in ("values", "temperature", "latent", "memory", "conv")]
        length = BEYOND_WINDOWS if settled["window"] else 80
        x, idx = torch.randn(length, 64, dtype=torch.float64), tokens(1, length)[0]
        given = {"plain": None, "token": idx, "bigram": idx, "embedding": torch.randn(length, 64).double()}[values]
        if values == "embedding":
            settled["embedding"] = given
        elif values != "plain":
            assert op.mixed_in.n == {"token": 1, "bigram": 2}[values]
            bigrams = op.mixed_in.hash(idx[None])[0] & (g.VALUE_SLOTS - 1)
            settled["rows"] = idx if values == "token" else bigrams
        computes(op, partial(reference.attention, **{**settled, "kv_heads": op.kv}), x, given)


@pytest.mark.parametrize("memory", [0, 4])
@pytest.mark.parametrize("window", [64, 256])
def test_a_window_sees_what_it_should(window, memory):
    """With queries of zero every key that is seen has the same weight: what comes out is the mean of their values."""
    torch.manual_seed(0)
    model = build(one("attention", heads=1, window=window, memory=memory, position="none", qk_norm=False))
    op = model.blocks[0].op.double()
    op.q.weight.data.zero_()
    op.v.weight.data.copy_(torch.eye(64))
    op.out.weight.data.copy_(torch.eye(64))
    for length in (1, 15, 17, window - 1, window, window + 1, 2 * window + 1, 4 * window, 4 * window + 70):
        x = torch.randn(length, 64, dtype=torch.float64)
        seen = torch.zeros(length, length, dtype=torch.float64)
        for t in range(length):
            seen[t, reference.keys_seen(t, window)] = 1
        summed = seen @ x + (op.memory_v[0].sum(0) if memory else 0)
        torch.testing.assert_close(op(x[None])[0], summed / (seen.sum(1, keepdim=True) + memory), rtol=1e-5, atol=1e-5)
        assert (seen.sum(1) <= window).all()


def read_rows(n: int, slots: int, ids, vocab: int = VOCAB):
    """Which row of a table is read for each token."""
    table = NgramTable(n, slots, 2, Frame(vocab, 64))
    angle = (torch.arange(len(table.table)) + 0.5) * math.pi / len(table.table)
    table.table.data = torch.stack([angle.cos(), angle.sin()], dim=1)
    with torch.no_grad():
        y = table(ids)
    return (torch.atan2(y[..., 1], y[..., 0]) / math.pi * len(table.table)).long()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_row_belongs_to_the_last_n_tokens(n):
    ids = torch.randint(8, (5, 300), generator=torch.Generator().manual_seed(n))
    rows, found = read_rows(n, 32_768, ids), {}
    for b, t in product(range(5), range(300)):
        ngram = tuple(ids[b, t - back].item() if t >= back else None for back in range(n))
        found.setdefault(ngram, set()).add(rows[b, t].item())
    assert all(len(rows) == 1 for rows in found.values())  # wherever it stands
    rows_of = {row for (row,) in found.values()}
    assert len(found) > 7**n and len(rows_of) >= 0.97 * len(found)  # another one has another row
    if n == 1:
        assert torch.equal(rows, ids)
    for length in (1, 2, 17):
        assert torch.equal(read_rows(n, 32_768, ids[:, :length]), rows[:, :length])
    if n > 1:
        assert torch.equal(read_rows(n, 32_768, ids, vocab=100_000), rows)
        assert all(p.shape == (32_768, 2) for p in NgramTable(n, 32_768, 2, Frame(9, 64)).parameters())
    y = NgramTable(n, 4_096, 64, Frame(VOCAB, 64))(ids)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5, 300), rtol=1e-4, atol=0)


@pytest.mark.parametrize("slots", OPS["ngram"].traits["slots"])
@pytest.mark.parametrize("n", [2, 3])
def test_ngrams_spread_evenly_over_rows(n, slots):
    each = {2: 360, 3: 51}[n]
    all_of_them = torch.cartesian_prod(*[torch.arange(each)] * n)  # the ids that are most alike
    torch.manual_seed(0)
    for ids in (all_of_them, all_of_them * 97, torch.randint(50_000, all_of_them.shape).unique(dim=0)):
        rows = read_rows(n, slots, ids)[:, -1]
        assert rows.min() >= 0 and rows.max() < slots
        expected, count = len(ids) / slots, rows.bincount(minlength=slots)
        chi_square = ((count - expected) ** 2 / expected).sum()  # of mean slots - 1, and of variance twice that
        assert chi_square < slots + 6 * math.sqrt(2 * slots)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngram_is_a_table_gated_by_the_stream(n, gated):
    torch.manual_seed(0)
    x, idx = torch.randn(50, 128, dtype=torch.float64), tokens(1, 50)[0]
    frame, traits = Frame(VOCAB, 64), dict(gene("ngram", n=n, gated=gated).traits)
    op = OPS["ngram"](128 if gated else None, 64, frame, **traits)
    rows = idx if n == 1 else op.ngrams.hash(idx[None])[0] & (traits["slots"] - 1)
    expected = partial(reference.ngram, rows=rows)
    if gated:
        computes(op, expected, x, idx)
    else:
        computes(op, lambda _, w: expected(x, w), idx)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", OPS["gate"].traits["kind"])
def test_gate_is_an_mlp(kind, gated):
    torch.manual_seed(0)
    x = torch.randn(20, 128, dtype=torch.float64)
    for expansion in OPS["gate"].traits["expansion"]:
        op = OPS["gate"](128, 64, kind, expansion, gated)
        hidden = op.up.weight.size(0)
        assert hidden == expansion * 64 if not gated else 0 <= hidden - expansion * 64 * 2 / 3 < 64
        assert op.out.weight.shape == (64, hidden)
        computes(op, partial(reference.gate, kind=kind), x)


def test_shift_is_a_loop():
    torch.manual_seed(0)
    op = build(one("shift")).blocks[0].op
    assert op.mix.numel() == 64
    computes(op, reference.shift, torch.randn(20, 64, dtype=torch.float64))


def randomised(part):
    for p in part.parameters():
        p.data = torch.randn_like(p) / math.sqrt(p.size(-1))
    return part.double()


@pytest.mark.parametrize("stride", g.WIRING["stride"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_gene_is_its_op_in_its_wiring(scale, stride):
    torch.manual_seed(0)
    ops = {"linear": lambda y, w: y @ w["out.weight"].T, "shift": reference.shift}
    widths = [(64, 64, None), (64, 64, 64), (128, 64, 64), (64, 128, 64), (128, 128, 64)]
    lengths = (1, 2, 3, 4, 5, 7, 8, 11)
    for (d_in, d_out, d_skip), repeat, op in product(widths, (1, 2, 3), ops):
        if OPS[op].keeps_width and d_in != d_out:
            continue
        activation = random.Random(repeat).choice(g.WIRING["activation"])
        wiring = dict(activation=activation, repeat=repeat, scale=scale if d_skip else "none", stride=stride)
        block = randomised(
            Block(gene(op, d_out, skip=int(d_skip is not None), **wiring), d_in, d_skip, Frame(VOCAB, 64))
        )
        weights = block.state_dict()
        inner = {name.removeprefix("op."): p for name, p in weights.items() if name.startswith("op.")}
        assert ("resize.weight" in weights) == (repeat > 1 and d_in != d_out)
        assert ("project.weight" in weights) == (d_skip not in (None, d_out))
        for length in lengths:
            x = torch.randn(length, d_in, dtype=torch.float64)
            skip = None if d_skip is None else torch.randn(length, d_skip, dtype=torch.float64)
            y = block(x[None], None if skip is None else skip[None])[0]
            expected = reference.wired(partial(ops[op], w=inner), x, skip, weights, **wiring)
            torch.testing.assert_close(
                y, expected.view(length, d_out) if len(expected) else expected, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize(
    "op, traits",
    [
        *(("ngram", {"gated": gated, "n": n}) for gated in (True, False) for n in (1, 2)),
        *(("attention", {"values": values}) for values in OPS["attention"].traits["values"]),
    ],
    ids=label,
)
def test_a_stride_groups_tokens_and_embedding_too(op, traits, stride):
    torch.manual_seed(0)
    x = gene(op, stride=stride, **traits)
    block = Block(x, 64 if "stream" in x.reads else None, None, Frame(VOCAB, 128))
    for length in (1, stride - 1, stride, 5, 23):
        stream, idx, embedding = torch.randn(length, 64), tokens(1, length)[0], torch.randn(length, 128)
        given = {"stream": stream, "ids": idx, "embedding": embedding}
        y = (
            block(*(t[None] for t in (stream,)), None, idx[None], embedding[None])[0]
            if "stream" in x.reads
            else block(None, None, idx[None])[0]
        )
        inputs = [reference.grouped(given[name], stride)[None] for name in x.reads]
        made = block.op(*inputs)[0] if length >= stride else torch.zeros(0, 64)
        expected = reference.ungrouped(made.detach().double(), stride, length)
        torch.testing.assert_close(y.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_gains_start_where_they_should():
    torch.manual_seed(0)
    x, skip = torch.randn(1, 6, 64), torch.randn(1, 6, 64)
    frame = Frame(VOCAB, 64)
    plain = Block(gene("gate", skip=1), 64, 64, frame)
    branch = plain(x, skip) - skip
    for scale, start in {"channel": 1.0, "small": g.RESIDUAL_INIT, "zero": 0.0}.items():
        block = Block(gene("gate", skip=1, scale=scale), 64, 64, frame)
        block.op = plain.op
        torch.testing.assert_close(block(x, skip) - skip, start * branch)


@pytest.mark.parametrize("dim", [64, 128])
def test_gru_and_convolutions_are_loops(dim):
    torch.manual_seed(0)
    x = torch.randn(20, 64, dtype=torch.float64)
    computes(build(one("gru", dim)).blocks[0].op, reference.gru, x)
    for kernel in OPS["conv1d"].traits["kernel"]:
        dense = build(one("conv1d", dim, kernel=kernel, kind="dense")).blocks[0].op
        computes(dense, lambda x, w: reference.convolution(x, w["weight"]), x)
        depthwise = build(one("conv1d", dim, kernel=kernel, kind="depthwise")).blocks[0].op

        def expected(x, w):
            y = reference.convolution(x, w["taps"].diag_embed())
            return y @ w["out.weight"].T if "out.weight" in w else y

        computes(depthwise, expected, x)


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_linear_attention_is_the_recurrence(strength, length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, d, dtype=torch.float64) for d in (8, 8, 5))
    log_decay = -strength * torch.rand(2, 3, length, 8, dtype=torch.float64)
    log_decay[0] = -strength  # the strongest there is, all along
    expected = [
        [reference.linear_recurrence(q[b, h], k[b, h], v[b, h], log_decay[b, h].exp()) for h in range(3)]
        for b in range(2)
    ]
    expected = torch.stack([torch.stack(heads) for heads in expected])
    torch.testing.assert_close(g.linear_attention(q, k, v, log_decay), expected, rtol=1e-9, atol=1e-9)
    single = g.linear_attention(q.float(), k.float(), v.float(), log_decay.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", OPS["retention"].traits["decay"])
def test_retention_in_every_form(decay):
    torch.manual_seed(0)
    x = torch.randn(70, 64, dtype=torch.float64)
    for position, gating in product(("rope", "none"), ("output", "none")):
        traits = dict(heads=2, decay=decay, position=position, gating=gating)
        op = build(one("retention", **traits)).blocks[0].op
        computes(op, partial(reference.retention, heads=2, decay=decay, position=position), x)


@pytest.mark.parametrize("traits", [{"decay": d} for d in OPS["retention"].traits["decay"]], ids=label)
def test_retention_decays_as_declared(traits):
    usual = {"heads": 4, "position": "none", "gating": "none"}
    op, x = OPS["retention"](32, 32, **{**usual, **traits}), torch.randn(1, 5, 32)
    decay = op.log_decay(x).exp()
    assert decay.shape == (1, 4, 5, 8) and (decay >= math.exp(g.MIN_LOG_DECAY)).all() and (decay <= 1).all()
    fixed = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(4)])
    if traits["decay"] in ("fixed", "learned"):
        torch.testing.assert_close(decay, fixed.view(1, 4, 1, 1).expand_as(decay))
    if traits["decay"] == "data":  # sigmoid ** (1 / 16), Yang et al. 2024
        expected = torch.sigmoid(F.linear(x, op.forget.weight)) ** (1 / 16)
        torch.testing.assert_close(decay, expected.view(1, 5, 4, 8).transpose(1, 2))


@pytest.mark.parametrize("gating", OPS["ssm"].traits["gating"])
@pytest.mark.parametrize("push", [-4.0, 0.0, 4.0])  # towards remembering, or towards forgetting
def test_ssm_is_the_recurrence(gating, push):
    torch.manual_seed(0)
    op, x = OPS["ssm"](32, 64, gating=gating), torch.randn(200, 32)
    op.forget_bias.data += push
    weights = {name: p.double() for name, p in op.state_dict().items()}
    expected = reference.ssm(x.double(), weights, g.MIN_LOG_DECAY)
    torch.testing.assert_close(op(x[None])[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 0.03, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("length", [1, 7, 2048])
def test_sparsemax_is_the_projection(scale, length):
    torch.manual_seed(0)
    scores = scale * torch.randn(20, length, dtype=torch.float64)
    scores[5:10] += 1000  # shifting a row changes nothing
    scores[10:] = scores[10:].masked_fill(torch.rand(10, length) < 0.5, -math.inf)
    scores[10:, 0] = 0.0
    scores[0] = 1.0  # all equal
    ours, exact = scores.float().requires_grad_(), scores.float().double().requires_grad_()
    y, expected = g.sparsemax(ours), torch.stack([reference.sparsemax(row) for row in exact])
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    upstream = torch.randn(20, length)
    y.backward(upstream)
    expected.backward(upstream.double())
    far = ~((expected > 0) & (expected < 1e-6)).any(-1)  # rows whose support float32 can tell
    assert far.sum() >= 15
    torch.testing.assert_close(ours.grad[far].double(), exact.grad[far], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("experts, routing", [(4, "top1"), (8, "top2"), (2, "soft"), (4, "soft")])
def test_routing_is_a_loop_over_tokens(experts, routing, shared):
    torch.manual_seed(0)
    op, x = OPS["moe_router"](64, 128, experts, routing, shared), torch.randn(2, 30, 64)
    weights = {name: p.double() for name, p in op.state_dict().items()}
    expected = reference.mixture(x.flatten(0, 1).double(), weights, op.top).view(2, 30, 128)
    torch.testing.assert_close(op(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("experts, top", [(4, 1), (4, 2), (8, 2)])
def test_grouped_routing_is_masked_routing(experts, top):
    """The two ways of computing the same mixture agree, forward and backward, in bfloat16, also with idle experts."""
    torch.manual_seed(0)
    op = OPS["moe_router"](64, 128, experts, f"top{top}", False)
    op.router.weight.data[0] = -op.router.weight.data[1]
    x = torch.randn(100, 64).bfloat16()
    probs = (op.router(x).float() - 50 * F.one_hot(torch.tensor(0), experts)).softmax(-1).detach()  # 0 is idle
    results = []
    for way in (op.by_mask, op.by_groups):
        y = way(x, probs)
        op.zero_grad()
        y.float().square().mean().backward()
        results.append((y.float(), op.up.weight.grad.clone(), op.out.weight.grad.clone()))
    for masked, grouped in zip(*results, strict=True):
        assert (masked - grouped).norm() < 0.02 * masked.norm()
    assert results[1][1][0].abs().max() == 0


DESIGNS = {
    "gpt2": reference.gpt2(8, lambda x, w: reference.attention(x, w, 4, 4, qk_norm=False, position="alibi")),
    "llama": reference.llama(6, lambda x, w: reference.attention(x, w, 8, 4, qk_norm=False)),
    "retnet": reference.gpt2(7, lambda x, w: reference.retention(x, w, 4)),
    "parallel": reference.parallel(4, 4),
    "evo-attention": reference.llama(
        5, lambda x, w: reference.attention(x, w, 4, 4, qk_norm=False, normalisation="sparsemax", gating="output")
    ),
    "transformer-4x256": reference.llama(4, lambda x, w: reference.attention(x, w, 2, 2, qk_norm=True)),
}


# The design that the tuning of transformers starts from, of one size, and the levels.
BASELINES = {"transformer-4x256": g.FAMILIES["transformer"].design(4, 256), **g.LEVELS}


@pytest.mark.parametrize("name", DESIGNS)
def test_a_design_computes_what_its_paper_says(name):
    genome = {**NAMED_DESIGNS, **BASELINES}[name]
    model, idx = build(genome), tokens(1, 70)
    ops = [{key: p.double() for key, p in block.op.state_dict().items()} for block in model.blocks]
    embedding = model.embed.table.double()
    head = 0.02 * embedding if genome.tied else model.head.matrix.double()
    with torch.no_grad():
        expected = reference.language_model(idx, embedding, head, DESIGNS[name], ops)
        torch.testing.assert_close(model(idx).double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_named_designs_can_be_compared():
    assert set(NAMED_DESIGNS) == set(DESIGNS) - set(BASELINES)
    for name, genome in {**NAMED_DESIGNS, **BASELINES}.items():
        assert genome.num_params(8192) < 10_000_000, name
    assert all(genome.num_params(8192) > 6_000_000 for genome in NAMED_DESIGNS.values())


# ------------------------------------------------------------------------------------------------------------------
# Genome files of before, and hostile ones.

BEFORE = {  # the traits that genes had in the first version
    "linear": (),
    "conv1d": ("kernel", "kind"),
    "shift": (),
    "attention": (
        *("heads", "kv_heads", "position", "window", "similarity", "normalisation", "temperature", "gating", "qk_norm"),
        *("latent", "memory"),
    ),
    "retention": ("heads", "decay", "position", "gating"),
    "ssm": ("gating",),
    "gru": (),
    "gate": ("kind", "expansion"),
    "norm": ("kind",),
    "identity": (),
    "moe_router": ("experts", "routing", "shared"),
    "memory": ("slots",),
}
NONE_OF_IT = {  # what those that came later have to be where a file does not name them
    "attention": dict(rope_base=10_000, rope_share=1.0, conv=0, values="plain", exclusive=False),
    "gate": dict(gated=True),
}  # fmt: skip
PUBLISHED = sorted((HERE / "runs").glob("*/results.tsv"))


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].gone])
def test_traits_that_are_gone_are_read_where_they_did_nothing(op):
    (name, value), width = *OPS[op].gone.items(), None if OPS[op].keeps_width else 64
    written = {"op": op, "dim": width, name: value}
    assert Genome.from_json(json.dumps({"genes": [written]})).genes == (Gene(op, width),)
    with pytest.raises(GenomeError, match=f"no trait '{name}'"):
        Genome.from_json(json.dumps({"genes": [{**written, name: "another"}]}))


@pytest.mark.parametrize("op", BEFORE)
def test_a_gene_of_before_means_the_same(op):
    retired = OPS[op].retired
    choices = [{name: c} for name in BEFORE[op] for c in (*OPS[op].traits[name], *retired.get(name, ()))]
    for traits, scale in product(choices or [{}], (False, True)):
        known = {**{name: OPS[op].traits[name][0] for name in BEFORE[op]}, **traits}
        written = {"op": op, "dim": None if OPS[op].keeps_width else 64, "activation": "relu", "input": 1, "skip": 1}
        text = json.dumps({"genes": [{**written, "repeat": 2, "scale": scale, **known}]})
        (read,) = Genome.from_json(text).genes
        new = {name: value for name, value in read.traits if name not in BEFORE[op]}
        assert new == NONE_OF_IT.get(op, {}) and set(dict(read.traits)) == {*BEFORE[op], *new}
        assert read.scale == ("channel" if scale else "none") and read.stride == 1
        assert read == Gene(**{**written, "repeat": 2, "scale": "channel" if scale else "none", **known})
        assert Genome.from_json(Genome((read,)).to_json()).genes == (read,)


def test_shared_weights_are_refused():
    """A `share` of 0 had none: it stands in each gene of earlier files."""

    def written(share):
        return json.dumps({"genes": [{"op": "linear", "dim": 64}, {"op": "linear", "dim": 64, "share": share}]})

    assert Genome.from_json(written(0)).genes == (gene("linear"), gene("linear"))
    with pytest.raises(GenomeError, match=r"genes\[1\]: linear.share: shared weights are no longer part of genesis"):
        Genome.from_json(written(1))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.relative_to(HERE)))
def test_a_published_record_is_read_as_it_was_written(path, monkeypatch):
    with open(path, encoding="utf-8") as file:
        if json.loads(next(file).removeprefix("#"))["fingerprint"] not in ("42d79e2fe3e26d47", "c09075bc65c3eda1"):
            pytest.skip("a run of one's own")
        limit = csv.field_size_limit(g.MAX_JSON)
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        csv.field_size_limit(limit)
    counted = {row["id"]: Genome.from_json(row["genome"]).num_params(8192) for row in rows}
    assert len(rows) > 90 and counted == {row["id"]: int(row["params"]) for row in rows}
    assert all(Genome.from_json(row["genome"]).summary == row["summary"] for row in rows)


def test_the_published_winner_is_read():
    data = json.loads((HERE / "runs/seed0-5s/best_genome.json").read_text(encoding="utf-8"))
    genome = Genome.from_dict(data["genome"])
    assert genome.summary == data["summary"] and not any(x.stride > 1 for x in genome.genes)


GOOD = {"genes": [{"op": "attention", "dim": 256, "heads": 4}]}


def with_gene(**fields) -> str:
    return json.dumps({"genes": [{**GOOD["genes"][0], **fields}]})


HOSTILE = {  # what the message has to name: the text
    "op": [with_gene(op="no_such"), with_gene(op=None), with_gene(op=["linear"]), '{"genes": [{"dim": 64}]}'],
    "dim": [with_gene(dim=x) for x in (10**9, 256.0, True, "256", None, -64, 0, [256], {}, 10**400, math.nan)],
    "norm.dim": [json.dumps({"genes": [{"op": "norm", "dim": 256}]})],
    "heads": [with_gene(heads=x) for x in (3, 4.0, "4", None, True, math.inf, 10**4000)],
    "kernel": [with_gene(kernel=4)],
    "skip": [with_gene(skip=x) for x in (-1, 2, 49, 10**30, 1.0, True, None, "1")],
    "input": [with_gene(input=x) for x in (0, -1, 2, 10**30, 1.0, None)],
    "activation": [with_gene(activation=x) for x in ("swish", None, 0, ["relu"])],
    "repeat": [with_gene(repeat=x) for x in (0, 4, 10**9, True, "2")],
    "scale": [with_gene(scale=x) for x in (0, 1, None, "true")],
    "stride": [with_gene(stride=x) for x in (0, 3, -1, 10**9, True, None, "2", 2.0)],
    "share": [with_gene(share=x) for x in (-1, 1, 49, 10**30, 1.0, True, None, "1")],
    "rope_base": [with_gene(rope_base=x) for x in (10_000.0, "10000", 0, None)],
    "rope_share": [with_gene(rope_share=x) for x in (1, 2.0, math.nan, True)],
    "exclusive": [with_gene(exclusive=x) for x in (0, 1, "false", None)],
    "values": [with_gene(values=x) for x in ("all", None, True, ["token"])],
    "traits": [with_gene(traits=[["heads", 4]])],
    "self": [with_gene(self=1)],
    "unknown": [with_gene(unknown=1), json.dumps({**GOOD, "unknown": 1})],
    "embed_dim": [json.dumps({**GOOD, "embed_dim": x}) for x in (10**9, 256.0, None, "256", math.nan, [[256]])],
    "lr_factor": [json.dumps({**GOOD, "lr_factor": x}) for x in (1, 3.0, math.nan, math.inf, "1.0", None)],
    "tied": [json.dumps({**GOOD, "tied": x}) for x in (0, 1, None, "false", [])],
    "network": [json.dumps({**GOOD, "network": []})],
    "genes": [
        *("{}", "[]", "null", "3", '"genes"', '{"genes": {}}', '{"genes": null}', '{"genes": []}'),
        json.dumps({"genes": GOOD["genes"] * (g.MAX_GENES + 1)}),
        json.dumps({"genes": [None]}),
        json.dumps({"genes": [[]]}),
        '{"genes": [' + "[" * 800 + "]" * 800 + "]}",
    ],
    "^the field .* twice": ['{"genes": [], "genes": []}', '{"genes": [{"op": "gru", "op": "linear", "dim": 64}]}'],
    "JSON": ["", "{", "nul", "[" * 100_000, '{"genes": ' + "9" * 5000 + "}", "\x00", '{"a": "\ud800'],
    "characters": [json.dumps({"genes": GOOD["genes"] * 10_000}), None, 3, b"{}"],
    r"\\x1b|\\ud800": ['{"genes": [], "\\u001b[31m": 1}', '{"genes": [], "\\ud800": 1}'],  # printable, always
}


@pytest.mark.parametrize("named", HOSTILE)
def test_a_hostile_file_is_refused_by_name(named):
    for text in HOSTILE[named]:
        tracemalloc.start()
        with pytest.raises(GenomeError, match=named) as caught:
            Genome.from_json(text)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
        assert peak < 20e6  # bytes: nothing is built of what the file asks for


def test_a_huge_file_is_refused_unread():
    with pytest.raises(GenomeError, match="characters"):
        Genome.from_json("[" * 100_000_000)


def test_parameters_are_counted_without_allocating_them():
    genome, vocab = g.transformer(12, 512, 8), 10**12
    assert genome.num_params(vocab) == genome.num_params(0) + 2 * 512 * vocab
    tables = Genome((gene("attention", 512, values="token"), gene("ngram", 512, n=1), gene("ngram", 512, n=2)))
    assert tables.num_params(vocab) == tables.num_params(0) + (256 + 3 * 512) * vocab


@pytest.mark.parametrize(
    "data",
    [
        *({"genes": [{1: 2, "op": "norm"}]}, {"genes": [], 3: 4}, {"genes": [{"op": "norm", "kind": 10**9999}]}),
        *({"id": "g1.01", "val_bpb": math.nan}, {"id": "g1.01", "genome": {"genes": []}}, None, math.nan, [], "genes"),
        *({"genes": [10**9999]}, {"genes": [math.nan]}, {"genes": [{}]}, {"genes": [{"op": 10**9999}]}),
        *({"genes": [{"op": "norm"}], "embed_dim": 10**9999}, {"genes": [{"op": "norm"}] * 10**6}),
    ],
)
def test_hostile_data_is_refused(data):
    with pytest.raises(GenomeError, match=r"gene|embed_dim") as caught:
        Genome.from_dict(data)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def damaged(data, rng: random.Random):
    """A copy of JSON data with something in it replaced, removed, doubled or renamed."""
    junk = [None, True, -1, 0, 3, 2**70, 1.5, math.nan, -math.inf, "", "relu", "attention", [], {}, [[]], {"op": "gru"}]
    data = copy.deepcopy(data)
    spot = data
    while True:
        if not isinstance(spot, (dict, list)) or not spot:
            return rng.choice(junk)
        key = rng.choice(list(spot)) if isinstance(spot, dict) else rng.randrange(len(spot))
        if isinstance(spot[key], (dict, list)) and spot[key] and rng.random() < 0.8:
            spot = spot[key]
            continue
        action = rng.random()
        if action < 0.5:
            spot[key] = rng.choice(junk)
        elif action < 0.7:
            del spot[key]
        elif isinstance(spot, list):
            spot.extend(spot[: rng.choice((1, 60))])
        else:
            spot[rng.choice(["op", "dim", "heads", "extra", "skip", "input", "share", "stride"])] = spot.pop(key)
        return data


def test_damage_makes_an_error_or_a_genome():
    rng, outcomes = random.Random(0), {"refused": 0, "read": 0}
    originals = [json.loads(genome.to_json()) for genome in lineage(0, 50)]
    for _ in range(4000):
        data = rng.choice(originals)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = damaged(data, rng)
        text = json.dumps(data)
        if rng.random() < 0.2:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(string.printable) * rng.choice((0, 1, 5)) + text[at + 1 :]
        try:
            genome = Genome.from_json(text)
        except GenomeError:
            outcomes["refused"] += 1
        else:
            assert Genome.from_json(genome.to_json()) == genome and genome.num_params(VOCAB) > 0
            outcomes["read"] += 1
    assert min(outcomes.values()) > 200, outcomes


def test_a_genome_that_was_read_is_not_read_again():
    frames = [dict(zip(g.GENOME_TRAITS, choices, strict=True)) for choices in product(*g.GENOME_TRAITS.values())]
    wirings = [dict(activation=a, repeat=r) for a, r in product(g.WIRING["activation"], g.WIRING["repeat"])]
    genes = [Gene("linear", dim, **wiring) for dim in g.WIDTHS for wiring in wirings]
    texts = [Genome((x,), **frame).to_json() for frame, x in product(frames, genes)]
    assert len(texts) > 15_000  # more than a night's run
    first = [Genome.from_json(text) for text in texts]
    assert all(Genome.from_json(text) is genome for text, genome in zip(texts, first, strict=True))
    Genome.from_json.cache_clear()


def test_a_genome_can_be_pickled_and_cannot_be_changed():
    genome = g.transformer(1, 64, 4)
    assert pickle.loads(pickle.dumps(genome)) == copy.deepcopy(genome) == genome
    with pytest.raises(AttributeError):
        genome.embed_dim = 64
    with pytest.raises(AttributeError):
        genome.genes[0].dim = 64
    with pytest.raises(AttributeError):
        _ = genome.genes[0].heads  # a norm has none
    assert genome.genes[1].heads == 4
