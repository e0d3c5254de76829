"""genome.py: every genome is valid, leak-free and trainable, and computes what the papers say.

reference.py holds the independent implementations. Widths are small wherever width does not matter.
"""

import copy
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
import variants
from designs import NAMED_DESIGNS

import genome as g
from genome import OPS, Gene, Genome, GenomeError, Model, Op

VOCAB = 256
LONG = 2 * g.CHUNK + 22  # tokens: three chunks, the last one not full
BEYOND_WINDOWS = 330  # tokens: more than the widest attention window


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


def leaks(genome: Genome, length: int = LONG, at=(1, 40, 63, 64, 65, 127, 128, LONG - 1)) -> list[int] | None:
    """The tokens whose change shows in a logit before them; None where a change shows nowhere, so nothing is tested.

    Each is changed in a row of its own, and the rows are seen together, so that a leak from row to row shows as well.
    """
    model, idx = build(genome), tokens(len(at), length)
    changed = idx.clone()
    for row, t in enumerate(at):
        changed[row, t] = (changed[row, t] + 7) % VOCAB
    with torch.no_grad():
        before, after = model(idx), model(changed)
    if any(torch.equal(before[row, t], after[row, t]) for row, t in enumerate(at)):
        return None
    return [t for row, t in enumerate(at) if not torch.equal(before[row, :t], after[row, :t])]


def random_trait_gene(rng: random.Random, op: str) -> Gene:
    traits = {name: rng.choice(choices) for name, choices in OPS[op].traits.items()}
    return gene(op, rng.choice((64, 128)), repeat=rng.choice((1, 1, 2)), skip=rng.choice((0, 1)), **traits)


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
def test_ten_thousand_genomes_are_valid_and_new(seed):
    rng = random.Random(seed)
    family = [g.random_genome(rng) for _ in range(500)]
    for n in range(2000):
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
    family, reached, leaking = [narrow(genome) for genome in lineage(seed, 14)], [], []
    for genome in family:
        torch.manual_seed(seed)
        model, idx = Model(genome, VOCAB), tokens(1, 70)
        assert sum(p.numel() for p in model.parameters()) == genome.num_params(VOCAB)
        model(idx, idx.roll(-1, 1)).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters()), genome
        reached.append(all(p.grad.abs().max() > 0 for p in model.parameters()))
        leaking.append(leaks(genome, 70, (1, 63, 64, 69)))
    assert not any(leaking), [genome.to_json() for genome, leak in zip(family, leaking, strict=True) if leak]
    # relu squared over and over, with no norm between, underflows: rare, and such a genome cannot win
    assert min(reached.count(True), leaking.count([])) >= 0.85 * len(family)


def test_every_operator_is_drawn_and_acts():
    rng, start, drawn = random.Random(0), one("linear"), set()
    for name, (change, _) in g.MUTATIONS.items():
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
        what = ("op", "width", "activation", "input", "skip", "repeat", "scale", "training")[n % 8]
        genome = g.MUTATIONS[f"change_{what}"][0](genome, rng)
        seen |= {(name, getattr(genome, name)) for name in g.GENOME_TRAITS}
        seen |= {(name, getattr(x, name)) for x in genome.genes for name in ("op", "dim", "input", "skip", *g.WIRING)}
    expected = {("op", op) for op in OPS} | {("dim", dim) for dim in g.WIDTHS}
    expected |= {("input", d) for d in range(1, g.MAX_DISTANCE + 1)} | {("skip", d) for d in range(g.MAX_DISTANCE + 1)}
    expected |= {(name, c) for name, choices in (g.WIRING | g.GENOME_TRAITS).items() for c in choices}
    assert not expected - seen


def test_a_residual_survives_insertion_and_removal():
    block = g.transformer(1, 64, 4)
    longer = g.spliced(block, 1, 1, [Gene("linear", 64)])
    assert [x.skip for x in longer.genes] == [0, 0, 3, 0, 2] and longer.network[2].skip == 0
    assert g.spliced(longer, 1, 2, []) == block
    assert g.spliced(block, 0, 4, []) == block  # nothing would be left
    assert [g.branch_start(longer, i) for i in range(5)] == [0, 1, 0, 3, 3]


# ------------------------------------------------------------------------------------------------------------------
# The key: equal where the network is equal, and only there.


def test_key_ignores_what_computes_nothing():
    idle = Gene("identity", repeat=3)
    plain = Genome((Gene("linear", 64, "relu"), Gene("attention", 64, skip=1, heads=2, kv_heads="one"), Gene("norm")))
    same = [
        Genome((Gene("linear", 64, "relu"), idle, plain.genes[1], idle, Gene("norm"), idle)),
        Genome((Gene("gate", 512), plain.genes[0].change(input=2), *plain.genes[1:])),  # nothing reads the gate
        Genome((plain.genes[0], plain.genes[1].change(kv_heads="half"), plain.genes[2])),  # 2 heads: half is one
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
        nodes = [(n.gene.bare, n.source, n.skip, n.d_in, n.d_skip, n.d_out) for n in genome._network(up_to_gains=True)]
        return nodes, genome.embed_dim, genome.lr_factor, genome.tied

    by_key = {}
    for seed in range(30):
        for genome in lineage(seed, 50):
            assert network(by_key.setdefault(genome.key, genome)) == network(genome)
    keys = {str(network(genome)): key for key, genome in by_key.items()}
    assert len(keys) == len(by_key) > 2000


CHANGES = [(op, name, choice) for op in OPS for name, choices in OPS[op].traits.items() for choice in choices[1:]]
CHANGES += [("gate", name, choice) for name, choices in g.WIRING.items() for choice in choices[1:]]


@pytest.mark.parametrize("op, name, choice", CHANGES)
def test_a_trait_changes_what_is_computed(op, name, choice):
    plain, idx = one(op, skip=int(name == "scale")), tokens(1, BEYOND_WINDOWS if name == "window" else 40)
    changed = Genome((plain.genes[0].change(**{name: choice}),), embed_dim=64)
    assert changed.key != plain.key
    assert not torch.allclose(build(plain)(idx), build(changed)(idx), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------
# Causality: on the CPU a changed token leaves every logit before it as it was, to the last bit.


@pytest.mark.parametrize("op, traits", CASES, ids=label)
def test_no_op_sees_the_future(op, traits):
    if traits.get("window"):
        assert leaks(one(op, **traits), BEYOND_WINDOWS, (1, 64, 65, 256, 257, BEYOND_WINDOWS - 1)) == []
    else:
        assert leaks(one(op, **traits)) == []


@pytest.mark.parametrize("op, count", [("attention", 120), ("retention", 50), ("conv1d", 15), ("moe_router", 15)])
def test_no_combination_of_traits_sees_the_future(op, count):
    rng = random.Random(op)
    genes = [random_trait_gene(rng, op) for _ in range(count)]
    leaking = [leaks(Genome((x,), embed_dim=64), 80, (1, 63, 64, 79)) for x in genes]
    assert not any(leaking), [x for x, leak in zip(genes, leaking, strict=True) if leak]
    assert leaking.count([]) >= 0.95 * count  # relu attention may attend to nothing


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


# ------------------------------------------------------------------------------------------------------------------
# Ops of one's own: what is wrong with them is said before anything trains.


@pytest.mark.parametrize("base", [Op, OPS["norm"]])
def test_an_op_cannot_take_the_name_of_another(base):
    norm = OPS["norm"]
    with pytest.raises(ValueError, match=r"MyNorm and Norm .*'norm'"):

        class MyNorm(base, name="norm"):
            pass

    assert OPS["norm"] is norm


@pytest.mark.parametrize("trait", ["op", "dim", "input", "skip", "traits", "self", "d_in", "d_out", *g.WIRING])
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
    "a parameter idle that is not used": dict(build=lambda d_in: torch.nn.Parameter(torch.ones(d_in))),
}


@pytest.mark.parametrize("said", BROKEN)
def test_an_op_that_breaks_a_rule_is_named(said, plant, monkeypatch):
    plant(**BROKEN[said])
    monkeypatch.setattr(g, "OPS", {name: OPS[name] for name in ("norm", "planted")})
    tried = []
    assert re.match(f"planted, size=2: .*{said}", g.op_problem(tried.append))
    assert tried == ["norm", "norm, kind=layer", "planted", "planted, size=2"]


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
        test_finite_in_bfloat16_at_full_size(name, traits)
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
    for genome in (*lineage(6, 20), replace(g.transformer(1, 64, 4), embed_dim=128, tied=True)):
        model = Model(genome, VOCAB)
        matrices, vectors, embedding, head = model.parameter_groups()
        found = [*matrices, *vectors, embedding, *([] if head is None else [head])]
        assert sorted(map(id, found)) == sorted(map(id, model.parameters()))
        assert (head is None) == genome.tied and all(p.dim() >= 2 for p in matrices)
        names = {id(p): name for name, p in model.named_parameters()}
        assert [names[id(p)] for p in matrices] == [n for n, p in model.named_parameters() if n.endswith(".weight")]


# ------------------------------------------------------------------------------------------------------------------
# Gradients and bfloat16.


@pytest.mark.parametrize("op, traits", CASES, ids=label)
def test_gradient_reaches_every_parameter(op, traits):
    for wiring in ({}, {"skip": 1, "scale": True, "repeat": 2, "activation": "gelu"}):
        model, idx = build(one(op, 128, **traits, **wiring)), tokens(2, 80)
        model(idx, idx.roll(-1, 1)).backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("op, traits", COVER, ids=label)
def test_finite_in_bfloat16_at_full_size(op, traits):
    torch.manual_seed(0)
    genome = Genome((Gene("norm"), gene(op, 512, skip=2, **traits)), embed_dim=512)
    model, idx = Model(genome, VOCAB, torch.bfloat16), tokens(1, 2048)
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


def computes(op: Op, expected, x):
    """Whether op does to x (T, C) what expected(x, weights) does, in float64 up to the float32 that op uses inside."""
    weights = {name: p.detach().double() for name, p in op.state_dict().items()}
    torch.testing.assert_close(op.double()(x[None])[0], expected(x, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(12))  # a multiple of every number of choices: together they cover each
def test_attention_in_every_form(seed):
    torch.manual_seed(seed)
    rng, x = random.Random(seed), torch.randn(80, 64, dtype=torch.float64)
    covered = {name: choices[seed % len(choices)] for name, choices in OPS["attention"].traits.items()}
    for traits in (covered, *({n: rng.choice(c) for n, c in OPS["attention"].traits.items()} for _ in range(4))):
        model = build(one("attention", 64 if traits["heads"] < 8 else 128, **traits))
        op, settled = model.blocks[0].op, dict(model.genome.genes[0].traits)
        for name in ("temperature", "latent", "memory"):  # reference.attention sees them in the weights
            del settled[name]
        computes(op, partial(reference.attention, **{**settled, "kv_heads": op.kv}), x)


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


@pytest.mark.parametrize("traits", [{"decay": d} for d in OPS["retention"].traits["decay"]], ids=label)
def test_retention_decays_as_declared(traits):
    op, x = (
        OPS["retention"](32, 32, **{"heads": 4, "position": "none", "gating": "none", **traits}),
        torch.randn(1, 5, 32),
    )
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
# Hostile genome files.

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
    "traits": [with_gene(traits=[["heads", 4]])],
    "self": [with_gene(self=1)],
    "unknown": [with_gene(unknown=1), json.dumps({**GOOD, "unknown": 1})],
    "embed_dim": [json.dumps({**GOOD, "embed_dim": x}) for x in (10**9, 256.0, None, "256", math.nan, [[256]])],
    "lr_factor": [json.dumps({**GOOD, "lr_factor": x}) for x in (1, 3.0, math.nan, math.inf, "1.0", None)],
    "tied": [json.dumps({**GOOD, "tied": x}) for x in (0, 1, None, "false", [])],
    "network": [json.dumps({**GOOD, "network": []})],
    "genes": [
        *("{}", "[]", "null", "3", '"genes"', '{"genes": {}}', '{"genes": null}', '{"genes": []}'),
        json.dumps({"genes": GOOD["genes"] * 49}),
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
            spot[rng.choice(["op", "dim", "heads", "extra", "skip", "input"])] = spot.pop(key)
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


def test_the_variants_of_the_winner_are_fifty():
    found = variants.near_the_winner()
    assert len({net.key for net in found.values()}) == len(found) == 50
    assert found["winner"].summary == (
        "norm→ssm→norm→shift→moe_router→norm→attention→norm→moe_router→norm×2→ssm→moe_router→norm"
    )
