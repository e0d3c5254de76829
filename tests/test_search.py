"""Who breeds, what is tried, and what a run may start from."""

import collections
import dataclasses
import itertools
import json
import math
import random
import statistics
import types
import typing

import numpy as np
import pytest
from helpers import genes_have

import evolve
import genome as g
from evolve import Belief, Candidate, Evidence, Result, Settings, Task
from genome import Gene, Genome, mutate, transformer

VOCAB = 300
S = Settings(survivors=2, population_size=6, prescreen=1, immigrants=0, max_params=10**9)


@pytest.fixture(autouse=True)
def free_params(monkeypatch):
    monkeypatch.setattr(g, "block_params", genes_have(1_000))


def net(*ops: str, dim: int = 64) -> Genome:
    return Genome([Gene(op, None if g.OPS[op].keeps_width else dim) for op in ops], embed_dim=dim)


def row(id: str, genome: Genome, val_bpb: float | None, parents: str = "", **values) -> Result:
    generation = int(id[1 : id.index(".")])
    task = Task(
        "search", id, genome, values.pop("seed", 0), 0, generation, tuple(parents.split(",")) if parents else ()
    )
    task = dataclasses.replace(task, operator=values.pop("operator", "change_op" if parents else "random"))
    thirds = dict(zip(("bpb_first", "bpb_middle", "bpb_last"), values.pop("thirds", ()), strict=False))
    status = values.pop("status", "ok")
    return Result.of(task, status, val_bpb=val_bpb, **thirds, **{"params": 1_000, "tokens_per_s": 1_000, **values})


def drawn(strategy: str, rows: list[Result], settings: Settings = S, times: int = 400) -> collections.Counter:
    """How often each becomes a parent."""
    draw, rng = evolve.SELECTION[strategy](evolve.searched(rows), settings), random.Random(0)
    return collections.Counter(draw(rng).id for _ in range(times))


def some(n: int) -> list[Genome]:
    """Networks that differ in their width and depth."""
    sizes = itertools.product(range(1, 9), g.WIDTHS)
    return [transformer(n_layer, dim) for n_layer, dim in itertools.islice(sizes, n)]


# ----------------------------------------------------------------------------------------------------------------------
# Who breeds.


def test_the_table_holds_what_strategy_may_name():
    assert {*evolve.SELECTION, "random"} == set(typing.get_args(evolve.Strategy))


def test_elites_are_the_best_alone():
    rows = [row(f"g0.{i:02d}", genome, 2 - i / 10) for i, genome in enumerate(some(6))]
    assert set(drawn("elites", rows)) == {"g0.05", "g0.04"}


def test_aging_forgets_all_but_the_young_and_the_best(monkeypatch):
    monkeypatch.setattr(evolve, "AGE", 4)
    monkeypatch.setattr(evolve, "TOURNAMENT", 2)
    rows = [row(f"g{i}.01", genome, 1 + i / 10) for i, genome in enumerate(some(12))]  # the older the better
    times = drawn("aging", rows, times=2_000)
    assert set(times) <= {"g0.01", "g1.01", "g8.01", "g9.01", "g10.01", "g11.01"}
    assert times["g0.01"] > times["g1.01"] > times["g8.01"] > 0, "the better of a tournament"
    monkeypatch.setattr(evolve, "PROTECTED", 0)
    assert set(drawn("aging", rows)) <= {"g8.01", "g9.01", "g10.01", "g11.01"}


def test_lineages_have_one_parent_for_each_root_and_each_sequence_of_ops(monkeypatch):
    monkeypatch.setattr(evolve, "TOURNAMENT", 1)
    a, b, c = (net(*ops) for ops in (("attention", "gate"), ("ssm", "gate"), ("conv1d",)))
    rows = [
        row("g0.01", a, 1.30),
        row("g0.02", b, 1.50),
        row("g0.03", c, 1.60),
        row("g1.01", net("attention", "gate", "gate"), 1.20, "g0.01"),  # the best of the first root
        row("g1.02", net("shift", "conv1d"), 1.40, "g0.02,g0.01"),  # of two parents the first counts
        row("g1.03", dataclasses.replace(c, lr_factor=2.0), 1.55, "g1.02"),  # of that root too, and with the ops of c
        row("g1.04", net("shift", "conv1d", dim=128), 1.1, operator="random"),  # a stranger with the ops of g1.02
    ]
    assert evolve.roots(rows) == {"g0.01": "g0.01", "g0.02": "g0.02", "g0.03": "g0.03", "g1.01": "g0.01",
                                  "g1.02": "g0.02", "g1.03": "g0.02", "g1.04": "g1.04"}  # fmt: skip
    assert set(drawn("lineages", rows)) == {"g1.04", "g1.01", "g0.02", "g0.03"}
    monkeypatch.setattr(evolve, "TOURNAMENT", 4)
    assert set(drawn("lineages", rows)) == {"g1.04", "g1.01", "g0.02"}, "the last of four never wins against one"


def test_roots_of_a_record_whose_parents_go_in_circles():
    rows = [row("g1.01", net("attention"), 1.0, "g2.01"), row("g2.01", net("ssm"), 1.0, "g1.01")]
    assert set(evolve.roots(rows)) == {"g1.01", "g2.01"}


def test_novelty_draws_what_is_unlike_the_others_and_not_far_behind(monkeypatch):
    alike = [transformer(3, 64, lr_factor=lr) for lr in (0.5, 0.7, 1.0, 1.4)]
    rows = [row(f"g0.{i:02d}", genome, 1.30 + i / 1000) for i, genome in enumerate(alike)]
    rows += [row("g0.10", net("ssm", "conv1d", "shift", "memory"), 1.34), row("g0.11", net("retention"), 1.40)]
    times = drawn("novelty", rows, times=1_000)
    assert times.most_common(1)[0][0] == "g0.10" and times["g0.10"] > 500, "three of five are drawn"
    assert "g0.11" not in times, "as unlike, but beyond MARGIN"
    assert set(drawn("novelty", rows[:1])) == {"g0.00"}, "alone it is its own parent"


def test_distance_of_genes():
    a, b = transformer(2, 64), transformer(2, 64, heads=4)
    assert evolve.gene_distance(a, a) == 0 == evolve.gene_distance(a, dataclasses.replace(a, lr_factor=2.0))
    assert evolve.gene_distance(a, b) == pytest.approx(1 - 6 / 8), "two of eight genes differ"
    assert evolve.gene_distance(net("ssm"), net("attention")) == 1


def test_fronts_and_crowding_by_hand():
    points = [(1, 5), (2, 3), (4, 1), (2, 4), (5, 5), (1, 5), (3, 3)]
    assert evolve.fronts(points) == [0, 0, 0, 1, 2, 0, 1], "twins do not beat each other"
    line = [(0.0, 8.0), (1.0, 4.0), (4.0, 2.0), (8.0, 0.0)]
    apart = evolve.crowding(line, [0, 0, 0, 0])
    assert apart[0] == apart[3] == math.inf and apart[1:3] == [4 / 8 + 6 / 8, 7 / 8 + 4 / 8]
    assert evolve.fronts([]) == [] and evolve.crowding([(1.0,)], [0]) == [math.inf]


def test_pareto_draws_what_nothing_beats():
    a, b, c, d = some(4)
    rows = [
        row("g0.01", a, 1.30, params=9, tokens_per_s=10, memory_mb=900),
        row("g0.02", b, 1.32, params=5, tokens_per_s=20, memory_mb=500),
        row("g0.03", c, 1.33, params=6, tokens_per_s=15, memory_mb=600),  # beaten by the second in everything
        row("g0.04", d, 1.60, params=1, tokens_per_s=99, memory_mb=1),  # tiny, fast, and far behind
    ]
    times = drawn("pareto", rows)
    assert set(times) == {"g0.01", "g0.02"}
    assert evolve.objectives(evolve.searched(rows)[0]) == (1.30, 9, -10, 900)


def test_lexicase_draws_specialists():
    nets = some(5)
    thirds = [(1.0, 1.9, 1.9), (1.9, 1.0, 1.9), (1.9, 1.9, 1.0), (1.5, 1.5, 1.5), (2.0, 2.0, 2.0)]
    rows = [row(f"g0.0{i}", nets[i], sum(t) / 3, thirds=t) for i, t in enumerate(thirds)]
    times = drawn("lexicase", rows, times=600)
    assert set(times) == {"g0.00", "g0.01", "g0.02"}, "a tenth is the median distance, and the fourth is half behind"
    assert min(times.values()) > 100, "each case comes first as often"
    without = [dataclasses.replace(r, bpb_first=None, bpb_middle=None, bpb_last=None) for r in rows]
    assert "g0.04" not in drawn("lexicase", without), "a record without thirds: by the whole"
    no_third = [dataclasses.replace(r, bpb_last=math.nan) for r in rows]  # of windows of two tokens
    assert "g0.04" not in drawn("lexicase", no_third)


def test_map_elites_draws_the_best_of_each_cell():
    rows = [
        row("g0.01", net("attention", "gate"), 1.3, params=1_000_000),
        row("g0.02", net("attention", "linear"), 1.4, params=1_100_000),  # the same mixer and size
        row("g0.03", net("attention", "gate", dim=128), 1.5, params=4_000_000),
        row("g0.04", net("ssm", "ssm", "attention"), 1.9, params=1_000_000),
    ]
    assert set(drawn("map_elites", rows)) == {"g0.01", "g0.03", "g0.04"}
    assert evolve.cell(evolve.searched(rows)[0]) == ("attention", 20)


def test_drift_draws_any():
    rows = [row(f"g0.{i:02d}", genome, 1 + i) for i, genome in enumerate(some(6))]
    assert len(drawn("drift", rows)) == 6


def test_who_was_stopped_is_no_parent():
    nets = some(4)
    rows = [row(f"g0.0{i}", nets[i], 1.3 + i / 100) for i in range(3)]
    rows.append(row("g0.03", nets[3], None, status="stopped", losses="3,2.9,2.8,2.7" + ",nan" * 6))
    for strategy in evolve.SELECTION:
        assert "g0.03" not in drawn(strategy, rows)


# ----------------------------------------------------------------------------------------------------------------------
# Operators.


def test_only_what_changed_the_network_is_named(monkeypatch):
    nothing = g.Mutation(lambda genome, rng: genome, 1000.0)
    monkeypatch.setitem(g.MUTATIONS, "nothing", nothing)
    dead = g.Mutation(lambda genome, rng: g.spliced(genome, 0, 0, [Gene("identity")]), 1000.0)
    monkeypatch.setitem(g.MUTATIONS, "dead", dead)
    rng, parent = random.Random(0), transformer(2, 64)
    for _ in range(20):
        child, operator = mutate(parent, rng, 0.5)
        assert child.key != parent.key and not {"nothing", "dead"} & set(operator.split("+"))


def test_there_and_back_is_no_change(monkeypatch):
    """Of two operators that undo each other the second is drawn again."""
    flip = g.Mutation(lambda genome, rng: dataclasses.replace(genome, tied=not genome.tied), 1.0)
    rate = g.Mutation(lambda genome, rng: dataclasses.replace(genome, lr_factor=2.0), 1.0)
    monkeypatch.setattr(g, "MUTATIONS", {"flip": flip, "rate": rate})
    made = [mutate(transformer(1, 64), random.Random(seed), 1e-9) for seed in range(20)]
    assert {child.operator for child in made} == {"flip", "rate"}
    monkeypatch.setattr(g, "MUTATIONS", {"flip": flip})
    child, operator = mutate(transformer(1, 64), random.Random(0), 0.0)
    assert child.tied and operator == "flip"


def test_long_genomes_grow_less_often():
    def shares(genome) -> float:
        rng, growths = random.Random(0), collections.Counter()
        for _ in range(300):
            growths[g.MUTATIONS[mutate(genome, rng, 0.0).operator].growth] += 1
        return growths[1] / growths[-1]

    short, long = shares(transformer(2, 64)), shares(transformer(12, 64))
    assert short > 2.5 * long


def test_without_selection_genomes_stay_readable():
    lengths = []
    for seed in range(8):
        rng = random.Random(seed)
        genome = g.random_genome(rng)
        for _ in range(100):
            genome = mutate(genome, rng, 0.3).genome
        lengths.append(len(genome.genes))
    assert statistics.fmean(lengths) < 40


def test_a_trait_changes_everywhere():
    parent = transformer(3, 64)
    for seed in range(40):
        child = g.change_trait_everywhere(parent, random.Random(seed))
        changed = [(a, b) for a, b in zip(parent.genes, child.genes, strict=True) if a != b]
        assert len({b.op for _, b in changed}) == 1 and len(changed) in (3, 6)  # six norms, three of the others
        assert len({b for _, b in changed}) == 1, "alike in all"
    bare = Genome([Gene("linear", 64), Gene("identity")], embed_dim=64)
    assert g.change_trait_everywhere(bare, random.Random(0)) == bare


# ----------------------------------------------------------------------------------------------------------------------
# What is tried.


def test_parts_by_hand():
    genome = Genome(
        [
            Gene("ngram", 64, n=3),
            Gene("norm"),
            Gene("attention", 64, skip=2, conv=2),
            Gene("norm"),
            Gene("attention", 64, skip=2),
        ],
        embed_dim=128,
        lr_factor=2.0,
        tied=True,
    )
    found = evolve.parts(genome, VOCAB)
    assert found["attention",] == 1 and found["attention", "times"] == pytest.approx(0.7)
    assert found["attention", "conv", 2] == 0.5 + 0.5 / 2 and ("attention", "conv", 3) not in found
    assert found["ngram", "n", 3] == 1.0 and found["before attention", "ngram"] == 0.5
    pairs = [name[1:] for name in found if name[0] == "pair"]
    assert pairs == [("", "ngram"), ("ngram", "attention"), ("attention", "attention"), ("attention", "")]
    assert found["rate",] == 1 and found["rate", "squared"] == 0.5 and found["tied",] == 1
    assert found["depth",] == 2 / 4 and found["width",] == -4 and found["embedding",] == -1
    assert found["size",] == pytest.approx(math.log2(genome.num_params(VOCAB) / 5e6))
    assert (found["no residual",], found["narrowest",], found["strided",]) == (1, -2, 0), "that is the ngram"


def test_pieces_and_likeness():
    """Of five pieces each (two genes, two pairs, what the genome has itself) these share three, of seven in all."""
    a, b = (Genome([Gene("gate", dim), Gene("gate", dim)], embed_dim=64) for dim in (64, 128))
    assert [n for _, n in evolve.pieces(a)] == [1, 2, 1, 1, 1], "the second gate is another piece than the first"
    belief = Belief([Evidence("g0.01", a, 1.5, 0.0025), Evidence("g0.02", b, 1.4, 0.0025)], VOCAB)
    assert belief.likeness(a) == pytest.approx([1, 3 / 7]) and belief.likeness(b) == pytest.approx([3 / 7, 1])
    assert belief.likeness(dataclasses.replace(a, lr_factor=2.0)) == pytest.approx([4 / 6, 2 / 8])
    assert belief.likeness(transformer(1, 256)) == pytest.approx([0, 0])


def test_parts_of_nothing():
    assert evolve.parts(Genome([Gene("identity")], embed_dim=64), VOCAB)["pair", "", ""] == 0.35


@pytest.fixture
def made_of(monkeypatch):
    """Networks whose parts are said: made_of(1, 0.5) has 1 of a and half of b."""
    known = {}

    def made(*amounts: float) -> Genome:
        genome = some(len(known) + 1)[-1]
        known[genome.key] = {(name,): x for name, x in zip("abc", amounts, strict=False) if x}
        return genome

    monkeypatch.setattr(evolve, "parts", lambda genome, vocab_size: known[genome.key])
    return made


def test_draws_come_from_the_posterior(made_of, monkeypatch):
    """Their mean and spread against the textbook: a Gaussian in which weights, level, misfits and scores are joint."""
    monkeypatch.setattr(evolve, "LIKENESS", 0.0)
    genomes = [made_of(1, 0), made_of(1, 1), made_of(0, 1), made_of(0.5, 0, 1)]
    y = np.array([1.50, 1.47, 1.475, 1.49, 1.52])  # the second was evaluated twice
    noise = np.array([0.0025, 0.0025, 0.0025, 0.0025, 0.02])
    which = [0, 1, 1, 2, 3]
    X = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 1, 0], [0.5, 0, 1]])
    A = np.hstack([X, np.ones((5, 1)), np.eye(4)[which]])  # scores are A @ (weights, level, misfits) and noise
    prior = np.diag([evolve.WEIGHT**2] * 3 + [evolve.LEVEL**2] + [evolve.MISFIT**2] * 4)
    posterior = np.linalg.inv(np.linalg.inv(prior) + A.T @ np.diag(noise**-2) @ A)
    mean = posterior @ A.T @ np.diag(noise**-2) @ (y - y.mean())

    alone = [made_of(1), made_of(0, 1), made_of(0, 0, 1)]
    seen = [Evidence(f"g0.0{i}", genomes[i], score, sd) for i, score, sd in zip(which, y, noise, strict=True)]
    belief, rng = Belief(seen, VOCAB), np.random.default_rng(0)
    scores = [belief.draw(rng) for _ in range(4_000)]
    draws = np.array([[score(genome) for genome in alone] for score in scores])
    spread = np.sqrt(np.diag(posterior)[:3])
    assert draws.mean(0) == pytest.approx(mean[:3], abs=4 * spread.max() / 4_000**0.5)
    assert np.cov(draws.T) == pytest.approx(posterior[:3, :3], rel=0.15, abs=0.05 * spread.max() ** 2)
    narrow = np.array([[score(genome) for genome in alone] for score in (belief.draw(rng, 0.5) for _ in range(4_000))])
    assert narrow.mean(0) == pytest.approx(mean[:3], abs=4 * spread.max() / 4_000**0.5)
    assert narrow.std(0) == pytest.approx(spread / 2, rel=0.1)
    expected = belief.draw(rng, 0.0)
    assert [expected(genome) for genome in alone] == pytest.approx(mean[:3])


def test_what_is_no_sum_is_expected_by_likeness(monkeypatch):
    """The mean against a Gaussian process with Tanimoto's kernel, written out."""
    monkeypatch.setattr(evolve, "parts", lambda genome, vocab_size: {})
    nets = [net("ssm", "gate"), net("ssm", "attention", "gate"), net("gru", "linear"), net("ssm", "gate", "gate")]

    def alike(a: Genome, b: Genome) -> float:
        a, b = set(evolve.pieces(a)), set(evolve.pieces(b))
        return len(a & b) / len(a | b)

    y, like = np.array([1.5, 1.4, 1.6]), [[alike(a, b) for b in nets[:3]] for a in nets]
    cov = evolve.LEVEL**2 + evolve.LIKENESS**2 * np.array(like[:3]) + np.eye(3) * (evolve.MISFIT**2 + 0.0025**2)
    expected = evolve.LIKENESS**2 * np.array(like) @ np.linalg.inv(cov) @ (y - y.mean())
    evidence = [Evidence(f"g0.0{i}", nets[i], score, 0.0025) for i, score in enumerate(y)]
    score = Belief(evidence, VOCAB).draw(np.random.default_rng(0))
    assert [score(genome) for genome in nets] == pytest.approx(expected)
    assert score(nets[1]) < score(nets[3]) < score(nets[2])


def test_what_the_record_lacks_varies_as_widely_as_before(made_of, monkeypatch):
    monkeypatch.setattr(evolve, "LIKENESS", 0.0)
    seen = [Evidence("g0.01", made_of(1), 1.5, 0.0025), Evidence("g0.02", made_of(0, 1), 1.4, 0.0025)]
    belief, rng, new = Belief(seen, VOCAB), np.random.default_rng(1), made_of(0, 0, 2)
    draws = [belief.draw(rng) for _ in range(2_000)]
    found = [score(new) for score in draws]
    assert statistics.stdev(found) == pytest.approx(2 * evolve.WEIGHT, rel=0.1) and abs(statistics.fmean(found)) < 0.004
    assert draws[0](new) == draws[0](new), "one draw knows one weight of it"
    assert belief.draw(rng, 0.0)(new) == 0


def test_a_draw_is_a_function_of_the_record_and_the_seed(made_of):
    seen = [Evidence("g0.01", made_of(1, 0.5), 1.5, 0.0025), Evidence("g0.02", made_of(0, 1), 1.4, 0.0025)]
    one, two = (Belief(seen, VOCAB).draw(np.random.default_rng(3)) for _ in range(2))
    assert one(seen[0].genome) == two(seen[0].genome)


def losses(*tenths: float) -> str:
    return ",".join([*map(str, tenths), *["nan"] * (evolve.CURVE - len(tenths))])


def test_evidence_of_all_that_trained_or_failed():
    nets = some(9)
    whole = [row(f"g0.0{i}", nets[i], 1.2 + i / 100, losses=losses(*[3 + i / 10] * 10)) for i in range(5)]
    again = row("g0.01", nets[1], 1.25, seed=1, operator="repeat", losses=losses(*[3.1] * 10))
    stopped = row("g0.05", nets[5], None, status="stopped", losses=losses(*[3.25] * 4))
    diverged = row("g0.06", nets[6], None, status="diverged", losses=losses(9.0))
    crashed = row("g0.07", nets[7], None, status="crash")
    stalled = row("g0.08", nets[8], None, status="stalled")  # says nothing of the genome
    rows = [*whole, again, stopped, diverged, crashed, stalled]
    found = evolve.evidence(rows, S)
    assert [e.id for e in found] == ["g0.00", "g0.01", "g0.01", *(f"g0.0{i}" for i in range(2, 8))]
    scores = [1.2, 1.21, 1.25, 1.22, 1.23, 1.24, 2.2, 2.2]  # what failed counts as one more than the best
    squeezed = [evolve.squeezed(score, 1.2) for score in scores]
    assert [e.score for e in found if e.id != "g0.05"] == pytest.approx(squeezed)
    at, reached = [3.0, 3.1, 3.2, 3.3, 3.4, 3.1], [*squeezed[:2], *squeezed[3:6], squeezed[2]]
    by_line = np.polyfit(at, reached, 1)
    (of_stopped,) = [e for e in found if e.id == "g0.05"]
    assert of_stopped.score == pytest.approx(np.polyval(by_line, 3.25))
    assert of_stopped.noise == pytest.approx(np.sqrt(np.mean((np.polyval(by_line, at) - reached) ** 2)))
    assert {e.noise for e in found if e.id in ("g0.00", "g0.01")} == {evolve.NOISE}
    shuffled = random.Random(0).sample(rows, len(rows))
    assert evolve.evidence(shuffled, S) == found, "whoever ended first"
    assert evolve.evidence([stopped, diverged], S) == [], "without a score there is nothing to go by"
    assert [e.id for e in evolve.evidence([*whole[:2], stopped], S)] == ["g0.00", "g0.01"], "no line through two"


def test_a_stopped_newcomer_is_taken_at_its_last_whole_tenth_and_never_as_the_best():
    nets = some(6)
    whole = [row(f"g0.0{i}", nets[i], 1.2 + i / 100, losses=losses(*[3 - i / 10] * 10)) for i in range(4)]  # it falls
    late = row("g0.04", nets[4], None, status="stopped", losses="3.9,nan,3.5,nan,nan,3.3" + ",nan" * 4)  # a slow step
    short = row("g0.05", nets[5], None, status="stopped", losses=losses(9.0))
    assert (late.whole_tenth, short.whole_tenth, whole[0].whole_tenth) == (3, 0, 9)
    found = {e.id: e.score for e in evolve.evidence([*whole, late, short], S)}
    assert found["g0.04"] == 1.2 and "g0.05" not in found


def test_scores_are_squeezed():
    """As they are near the best; what is far above counts, but not for all that it is above."""
    assert [evolve.squeezed(score, 1.3) for score in (1.2, 1.3)] == [1.3, 1.3]
    near, far = evolve.squeezed(1.301, 1.3), [evolve.squeezed(score, 1.3) for score in (1.4, 1.5, 2.3)]
    assert near == pytest.approx(1.301, abs=1e-5) and far[0] < far[1] < far[2] < 1.5


def bred(settings: Settings, rows: list[Result]) -> list[Task]:
    return [t for t in evolve.breed(rows, 1, settings, VOCAB) if t.operator != "repeat"]


def first_generation(n: int = 6) -> list[Result]:
    return [row(f"g0.{i:02d}", genome, 1.3 + i / 100) for i, genome in enumerate(some(n))]


@pytest.fixture
def litters(monkeypatch) -> list[list[Genome]]:
    """What each draw was asked about; draws like attention."""
    asked = []

    def likes_attention(belief, rng, spread):
        asked.append([])
        return lambda genome: asked[-1].append(genome) or -genome.ops.count("attention")

    monkeypatch.setattr(Belief, "draw", likes_attention)
    return asked


def test_the_child_that_the_draw_likes_best_is_trained(litters):
    tasks = bred(dataclasses.replace(S, prescreen=20, repeats=1), first_generation())
    assert [len(litter) for litter in litters] == [20] * 6, "each place has a draw of its own"
    for task, litter in zip(tasks, litters, strict=True):
        assert task.genome in litter
        assert task.genome.ops.count("attention") == max(genome.ops.count("attention") for genome in litter)


@pytest.mark.parametrize("settings", [dict(strategy="random"), dict(strategy="drift"), dict(prescreen=1)])
def test_controls_choose_nothing(monkeypatch, settings):
    monkeypatch.setattr(Belief, "__init__", lambda *_: pytest.fail("asked"))
    assert len(bred(dataclasses.replace(S, **{"prescreen": 20, "repeats": 1} | settings), first_generation())) == 6


def test_immigrants_are_chosen_too(litters):
    """Of as many random genomes."""
    tasks = bred(dataclasses.replace(S, prescreen=20, repeats=1, immigrants=2), first_generation())
    assert [t.operator == "random" for t in tasks] == [False] * 4 + [True] * 2
    for task, litter in zip(tasks[4:], litters[4:], strict=True):
        assert len(litter) == 20 and task.genome in litter
        assert task.genome.ops.count("attention") == max(genome.ops.count("attention") for genome in litter) > 0


HELPFUL = {"conv": (2, 3), "values": ("embedding",), "exclusive": (True,), "gating": ("output",), "heads": (4,)}


def shares(genome: Genome, traits: dict[str, tuple]) -> list[float]:
    """For each trait the share of the attentions that have one of those choices."""
    attention = [node.gene for node in genome.network if node.gene.op == "attention"]
    return [sum(getattr(gene, t) in good for gene in attention) / max(1, len(attention)) for t, good in traits.items()]


def helpful(genome: Genome) -> float:
    """Five traits of attention help."""
    return 1.4 - 0.02 * sum(shares(genome, HELPFUL)) + 0.002 * random.Random(genome.key).random()


def deceptive(genome: Genome) -> float:
    """One trait helps a little; two others harm alone, and together are worth six times as much."""
    decoy, a, b = shares(genome, {"exclusive": (True,), "conv": (2, 3, 4), "gating": ("output",)})
    return 1.4 - 0.01 * decoy + 0.006 * a + 0.006 * b - 0.06 * a * b + 0.002 * random.Random(genome.key).random()


def found_by(prescreen: int, score, seeds: int, generations: int) -> list[float]:
    """The best scores of searches by elites that begin with the same transformers."""
    best = []
    for seed in range(seeds):
        settings = dataclasses.replace(S, population_size=12, survivors=3, repeats=1, prescreen=prescreen, seed=seed)
        rows = [row(f"g0.{i:02d}", genome, score(genome)) for i, genome in enumerate(some(12))]
        for generation in range(1, generations + 1):
            for t in evolve.breed(rows, generation, settings, VOCAB):
                rows.append(row(t.id, t.genome, score(t.genome), ",".join(t.parents), operator=t.operator))
        best.append(evolve.searched(rows)[0].mean)
    return best


def test_parts_that_help_are_found_sooner():
    with_draw, without = (found_by(n, helpful, seeds=8, generations=5) for n in (30, 1))
    assert statistics.fmean(with_draw) < statistics.fmean(without) - 0.01


def test_a_trap_is_left_sometimes():
    """Where two changes that harm have to come together: not by elites alone, but by the draw, which tries both."""
    with_draw, without = (found_by(n, deceptive, seeds=16, generations=6) for n in (20, 1))
    assert min(without) > 1.38 and min(with_draw) < 1.37


# ----------------------------------------------------------------------------------------------------------------------
# Start from what is known.


def test_generation_0_begins_with_what_is_given():
    known = (transformer(2, 64), net("ssm", "gate"))
    tasks = evolve.breed([], 0, dataclasses.replace(S, start=known), VOCAB)
    assert [t.operator for t in tasks] == ["start"] * 2 + ["random"] * 4
    assert [t.genome for t in tasks[:2]] == list(known) and [t.id for t in tasks[:2]] == ["g0.01", "g0.02"]
    assert [t.hurdle for t in tasks] == [()] * 6
    rows = [row(t.id, t.genome, 1.5, operator=t.operator) for t in tasks]
    assert not {t.genome.key for t in bred(S, rows)} & {t.genome.key for t in tasks}


def test_the_header_and_best_genome_say_what_a_run_started_from():
    class data:
        source, fingerprint, vocab_size = "text", "abc", VOCAB

    plain = evolve.describe_run(S, data, "cpu")
    started = evolve.describe_run(dataclasses.replace(S, start=(transformer(2, 64),)), data, "cpu")
    assert "start" not in plain and started["start"] == [f"{transformer(2, 64).key} (norm→attention→norm→gate)×2"]
    assert json.loads(json.dumps(started)) == started
    rows = [row("g0.01", transformer(2, 64), 1.5, operator="start"), row("g0.02", net("ssm"), 1.6)]
    rows += [row("g1.01", transformer(3, 64), 1.4, "g0.01"), row("g1.02", net("ssm", "gate"), 1.3, "g0.02")]
    for best, origin in (("g1.02", []), ("g1.01", ["g0.01"])):
        kept = [r for r in rows if r.id != "g1.02" or best == "g1.02"]
        content = evolve.best_genome(kept, plain, S, evolve.outcome(kept, S, VOCAB))
        assert (content["id"], content["descends_from"]) == (best, origin)


def candidate(id: str) -> Candidate:
    genome = transformer(1, 64)
    return Candidate(id, (1.0,), 1, 0, genome, row(id, genome, 1.0), id)


def test_a_tournament_smaller_than_its_size():
    assert evolve.tournament([candidate("g0.01")])(random.Random(0)).id == "g0.01"


def test_start_refuses_what_cannot_be_bred(tmp_path):
    def file(name, genome):
        (tmp_path / name).write_text(genome.to_json())
        return str(tmp_path / name)

    a, b = file("a", transformer(1, 64)), file("b", transformer(2, 64))
    assert evolve.read_start([a, b], S) == [transformer(1, 64), transformer(2, 64)]
    for files, message in (
        ([file("still", Genome([Gene("gate", 64)], embed_dim=64))], "no token of it sees another"),
        ([a, a], "the same network"),
        ([file(f"n{n}", transformer(n, 64)) for n in range(1, 8)], "7 genomes, over POPULATION_SIZE = 6"),
        ([str(tmp_path / "none")], "Cannot read"),
    ):
        with pytest.raises(evolve.Stop, match=message):
            evolve.read_start(files, S)


def test_a_run_is_not_started_from_a_file_that_it_will_write(tmp_path, capsys, monkeypatch):
    (tmp_path / "best_genome.json").write_text(transformer(1, 64).to_json())
    monkeypatch.setattr(evolve, "check_ops", lambda: None)
    split = range(10_000)
    data = types.SimpleNamespace(train=split, val=split, test=split, vocab_size=VOCAB, source="text", fingerprint="f")
    monkeypatch.setattr(evolve.prepare, "open_source", lambda **_: data)
    flags = ["--token-budget=1024", "--out", str(tmp_path), "--seq-len=128", "--batch-tokens=256"]
    assert evolve.main([*flags, "--start", str(tmp_path / "best_genome.json")]) == 1
    assert "this run will write that file; copy it first" in capsys.readouterr().err
