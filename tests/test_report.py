"""evolve.py: report.md, what it says of made-up records whose answers are known, and --report and --ablate."""

import contextlib
import dataclasses
import html
import itertools
import json
import math
import pickle
import random
import re
import shutil
import statistics
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import evolve
from evolve import Result, Settings, Stop, Task
from genome import Gene, Genome, grown, random_genome, transformer, without_a_part

ROOT = Path(__file__).parent.parent
HEADER = {"data": "text", "device": "cpu", "vocab_size": 300, "code": "abc", "torch": "2"}
PLAIN = Genome((Gene("norm"), Gene("conv1d", 64, skip=2)), embed_dim=64)
DEEP = transformer(2, 64, 1)
PART = ("shift",)
TOKENS = Settings(token_budget=1)  # no loss has to be put right for speed


def with_part(n: int) -> Genome:
    """Two genomes of one number differ in a shift alone."""
    return dataclasses.replace(without_part(n), genes=(Gene("shift", skip=1), *without_part(n).genes))


def without_part(n: int) -> Genome:
    return Genome((Gene("norm"), *[Gene("linear", 64)] * (1 + n % 9), Gene("conv1d", 64)), embed_dim=64 + 64 * (n // 9))


def row(id: str, net: Genome = PLAIN, loss: float = 3.0, parents: str = "", operator: str = "add_gene", **values):
    """An evaluation of the search. loss: that of the fifth tenth; those before are 0.1 each above the next."""
    generation = values.pop("generation", int(id[1:].partition(".")[0]))
    made = Task("search", id, net, values.pop("seed", 0), 0, generation, tuple(parents.split()), operator)
    losses = [f"{loss + 0.1 * (4 - tenth):.6f}" for tenth in range(evolve.CURVE)]
    trained = values.pop("trained", evolve.CURVE)
    losses = ",".join(losses[:trained] + ["nan"] * (evolve.CURVE - trained))
    status = values.pop("status", "ok")
    known = dict(val_bpb=loss / 2 if status == "ok" else None, params=1_000, tokens_per_s=1_000, losses=losses)
    return Result.of(made, status, **{**known, **values})


def steps_of(rows: list[Result]) -> list[evolve.Step]:
    return evolve.steps(rows, evolve.halfway_losses(rows, TOKENS))


def cells_of(lines: list[str]) -> dict[str, list[str]]:
    """The lines of tables by their first cell."""
    split = [re.split(r" \| ", line.strip("| ")) for line in lines if line.startswith("| ")]
    return {first: rest for first, *rest in split}


# ----------------------------------------------------------------------------------------------------------------------
# What a part is worth


def lineage_of(worth: float, generations: int = 10) -> list[Result]:
    """A record in which all get better by 0.1 a generation, and a part stands there late and is worth so much.

    The first half of the generations is a line without the part; then one with it begins anew, and has more children.
    In each generation one child of the line gains or loses the part, and nothing else happens to it.
    """
    rows, half = [row("g0.00", without_part(0), 4.0, operator="random")], generations // 2
    for g in range(1, generations + 1):
        had, has, parent = g - 1 > half, g > half, f"g{g - 1}.00"
        before, loss = (4.0 - 0.1 * n + worth * on for n, on in ((g - 1, had), (g, has)))
        line = with_part if has else without_part
        new = dict(operator="random") if had != has else dict(parents=parent)
        rows += [row(f"g{g}.00", line(g), loss, **new)]
        rows += [
            row(f"g{g}.01", (without_part if had else with_part)(g - 1), before + (-worth if had else worth), parent)
        ]
        rows += [row(f"g{g}.0{n}", with_part(20 * n + g), loss, **new) for n in (2, 3, 4) if has]
    return rows


@pytest.mark.parametrize("worth", [0.0, -0.25, 0.4])
def test_importance_is_what_a_part_does_whatever_its_age(worth):
    rows = lineage_of(worth)
    with_it, others = ([r for r in rows if (PART in evolve.features(Genome.from_json(r.genome))) == has]
                       for has in (True, False))  # fmt: skip
    ages = [statistics.fmean(r.generation for r in those) for those in (with_it, others)]
    plain = statistics.fmean(r.halfway_loss for r in with_it) - statistics.fmean(r.halfway_loss for r in others)
    assert ages[0] > ages[1] + 1.5 and plain < worth - 0.1, "plain means credit the part with its age"
    found = evolve.importance(steps_of(rows), None)[PART]
    assert found.mean == pytest.approx(worth, abs=1e-6) and found.half == pytest.approx(0, abs=1e-6)
    assert len(found.values) == 10


def test_the_parent_counts_by_its_mean_and_noise_is_in_the_interval():
    rng = random.Random(0)
    rows = lineage_of(0.0)
    again = dict(operator="repeat", seed=9, generation=99)
    line = [r for r in rows if r.id.endswith(".00")]
    rows += [row(r.id, Genome.from_json(r.genome), r.halfway_loss + 0.2, **again) for r in line]
    found = evolve.importance(steps_of(rows), None)[PART]
    signs = [1] * 6 + [-1] * 4  # six gained it, four lost it; each parent is 0.1 worse than at first
    assert sorted(found.values) == pytest.approx(sorted(-0.1 * sign for sign in signs))
    noisy = [dataclasses.replace(r, losses=",".join(f"{x + e:.6f}" for x in r.curve))
             for r in lineage_of(0.0, 60) for e in [rng.gauss(0, 0.02)]]  # fmt: skip
    found = evolve.importance(steps_of(noisy), None)[PART]
    assert len(found.values) == 60 and found.half == pytest.approx(1.96 * 0.02 * math.sqrt(2 / 60), rel=0.35)
    assert abs(found.mean) < 2 * found.half


def test_an_interval_is_no_narrower_than_the_noise_of_child_and_parent():
    """Three children, two of a parent that was evaluated twice: the noise times sqrt(3 + 4/2 + 1/1) / 3."""
    a, b = without_part(1), without_part(2)
    rows = [row("g0.01", a, 3.0), row("g0.01", a, 3.2, operator="repeat", seed=1), row("g0.02", b, 4.0)]
    more = dataclasses.replace(with_part(1), lr_factor=2.0)
    rows += [row("g1.01", with_part(1), 3.0, "g0.01"), row("g1.02", more, 3.0, "g0.01")]
    rows += [row("g1.03", with_part(2), 3.9, "g0.02")]
    noise = evolve.halfway_noise(rows, evolve.halfway_losses(rows, TOKENS))
    assert noise == pytest.approx(0.2 / math.sqrt(2))
    found = evolve.importance(steps_of(rows), noise)[PART]
    assert found.values == pytest.approx((-0.1, -0.1, -0.1))
    assert found.half == pytest.approx(1.96 * noise * math.sqrt(3 + 4 / 2 + 1) / 3)
    alone = evolve.importance(steps_of(rows), noise)["genome", "lr_factor", 2.0]
    assert alone.half == pytest.approx(1.96 * noise * math.sqrt(1 + 1 / 2)), "of one child, too"


def test_an_interval_over_groups_is_that_of_their_means():
    groups = [[1.0, 1.2], [1.4, 1.4], [0.9, 0.7], [1.1, 1.5], [1.3, 1.3]]
    by_means = evolve.estimate(map(statistics.fmean, groups))
    found = evolve.clustered(groups)
    assert found.mean == pytest.approx(by_means.mean) and found.half == pytest.approx(by_means.half, rel=0.05)
    assert evolve.clustered([[1.0, 2.0]]).half is None
    uneven = [[1.0] * 10, [2.0], [2.2], [1.9]]
    drawn = [list(itertools.chain(*random.Random(n).choices(uneven, k=4))) for n in range(4_000)]
    deviation = statistics.pstdev(map(statistics.fmean, drawn))
    assert evolve.clustered(uneven).half == pytest.approx(3.182 * deviation * math.sqrt(4 / 3), rel=0.06)


def test_of_two_parents_the_more_alike_is_compared():
    net = transformer(2, 64, 1)
    near = dataclasses.replace(net, genes=(*net.genes, Gene("shift", skip=1)))
    rows = [row("g0.00", PLAIN, 9.0), row("g0.01", net, 3.0), row("g1.00", near, 2.5, "g0.00 g0.01", "crossover")]
    (step,) = steps_of(rows)
    assert (step.parent, step.change, step.gained, step.lost) == ("g0.01", pytest.approx(-0.5), {PART}, frozenset())


def test_association_is_within_generations():
    rows = [row(f"g0.0{n}", net(n), loss) for n, (net, loss) in enumerate(
        [(with_part, 3.0), (without_part, 3.4), (without_part, 3.6), (without_part, 3.5)])]  # fmt: skip
    rows += [row(f"g1.0{n}", net(n), loss) for n, (net, loss) in enumerate(
        [(with_part, 1.0), (with_part, 1.2), (without_part, 1.3)])]  # fmt: skip
    rows += [row("g2.00", with_part(5), 0.1), row("g3.00", without_part(5), 9.0)]  # nothing to compare with
    by_hand = ((3.0 - 3.5) * 3 / 4 + (1.1 - 1.3) * 2 / 3) / (3 / 4 + 2 / 3)
    assert evolve.association(rows, evolve.halfway_losses(rows, TOKENS))[PART] == pytest.approx(by_hand)


def test_who_was_stopped_is_put_forward_to_the_middle():
    rows = [row("g0.00", loss=3.0), row("g0.01", loss=2.0)]  # both fall by 0.2 from the third tenth to the fifth
    rows += [row("g1.00", loss=2.5, status="stopped", trained=4), row("g1.01", loss=2.6, status="stopped", trained=6)]
    rows += [row("g1.02", status="diverged"), row("g1.03", loss=2.7, status="stopped", trained=1)]
    losses = evolve.halfway_losses(rows, TOKENS)
    assert {key[1]: loss for key, loss in losses.items()} == pytest.approx(
        {"g0.00": 3.0, "g0.01": 2.0, "g1.00": 2.5, "g1.01": 2.6})  # fmt: skip
    assert evolve.halfway_losses([dataclasses.replace(r, losses="") for r in rows], TOKENS) == {}


def test_features_are_ops_and_what_is_not_usual():
    net = Genome((Gene("attention", 64, heads=8, skip=1), Gene("norm", activation="relu")), embed_dim=128, tied=True)
    assert evolve.features(net) == {("attention",), ("norm",), ("attention", "heads", 8), ("any", "activation", "relu"),
                                    ("genome", "embed_dim", 128), ("genome", "tied", True)}  # fmt: skip
    texts = sorted(map(evolve.feature_text, evolve.features(net)))
    assert texts == ["activation=relu", "attention", "attention heads=8", "embed_dim=128", "norm", "tied=True"]


MADE_BY_HAND = {
    "attention": (5, 7, 8),
    "a convolution or shift before attention": (2, 5),
    "recurrence (or linear attention)": (3, 6, 10),
    "recurrence and attention in turn": (5, 6, 7, 10),
    "a table of n-grams": (1, 8),
    "the token in the values of attention": (7,),
    "an MLP, gated or plain": (11,),
    "learned keys and values, as an MLP": (),
    "experts": (12, 13),
}


def test_what_people_build_by_hand_is_known_again():
    net = Genome(
        (
            Gene("ngram", 64), Gene("shift"), Gene("ssm", 64), Gene("norm"), Gene("attention", 64, conv=2),
            Gene("retention", 64), Gene("attention", 64, values="token"), Gene("attention", 64, values="bigram"),
            Gene("conv1d", 64), Gene("gru", 64), Gene("gate", 64), Gene("moe_router", 64), Gene("moe_router", 64),
        ),
        embed_dim=64,
    )  # fmt: skip
    assert evolve.built_by_hand(net) == MADE_BY_HAND, "a convolution behind the last attention is before none"
    assert set(evolve.built_by_hand(PLAIN).values()) == {()}


def test_what_became_of_what_people_build_by_hand():
    plain, shifted, tabled = (
        Genome((*genes, Gene("attention", 64), Gene("gate", 64)), embed_dim=64)
        for genes in ((), [Gene("shift")], [Gene("ngram", 64)])
    )
    rows = [row("g0.00", tabled, 2.6, operator="random"), row("g0.01", PLAIN, 3.0, operator="random")]
    rows += [row("g1.00", plain, 2.4, "g0.00"), row("g2.00", shifted, 2.2, "g1.00"), row("g2.01", plain, 2.8, "g0.01")]
    leaders = evolve.leaders_by_generation(rows, 2)
    told = cells_of(evolve.by_hand_section(rows, leaders, shifted))
    assert told["part"] == ["in the winner", "of 5 newcomers", "of them anew", "among the survivors until"]
    assert told["attention"] == ["1", "4", "2", "the end"], "drawn once, and once by a child whose parent had none"
    assert told["a convolution or shift before attention"] == ["1", "1", "1", "the end"]
    assert told["a table of n-grams"] == ["—", "1", "1", "generation 1"]
    assert told["experts"] == ["—", "0", "0", "—"]

    worth = {less.key: 0.5 for less in without_a_part(shifted).values()} | {plain.key: 0.125}
    own = ablated(shifted, Settings(**SMALL), rows, lambda t: worth.get(t.id, 0.0))
    told = cells_of(evolve.by_hand_section(rows + own, leaders, shifted))
    assert told["part"][1] == "what each is worth there"
    assert told["a convolution or shift before attention"][1] == "+0.1250 ± 0.0000", "not what the attention is worth"
    assert told["attention"][1] == "+0.5000 ± 0.0000" and told["experts"][1] == "—"
    assert evolve.by_hand_section(rows, leaders, None) == []


def test_each_occurrence_has_the_worth_of_the_change_that_takes_out_least_else():
    """An attention with the token in its values, behind a recurrence in one branch, and another one."""
    net = Genome(
        (
            Gene("ssm", 64), Gene("attention", 64, skip=2, values="token"), Gene("norm"),
            Gene("attention", 64, skip=2, heads=4), Gene("gate", 64, skip=1),
        ),
        embed_dim=64,
    )  # fmt: skip
    worth = {"gene 2: without ssm→attention": 0.9, "gene 2: identity, not attention": 0.4, "gene 1: without ssm": 0.3}
    worth |= {"gene 2: attention values plain, not token": 0.1, "gene 4: without norm→attention": -0.2}
    by_key = {less.key: worth.get(what, 0.0) for what, less in without_a_part(net).items()}
    assert set(worth) <= set(without_a_part(net))
    rows = [row("g0.00", net, operator="random")]
    own = ablated(net, Settings(**SMALL), rows, lambda t: by_key.get(t.id, 0.0))
    told = cells_of(evolve.by_hand_section(rows + own, evolve.leaders_by_generation(rows, 1), net))
    worth_of = {part: cells[1].replace(" ± 0.0000", "") for part, cells in told.items()}
    assert worth_of["attention"] == "+0.4000, -0.2000" and worth_of["recurrence (or linear attention)"] == "+0.3000"
    assert worth_of["the token in the values of attention"] == "+0.1000" and worth_of[evolve.TURNS] == "—"


def test_of_traits_that_few_had_only_the_winners_are_shown():
    """What one or two newcomers had says little of a trait."""
    often, once, here = (Genome((Gene("attention", 64, heads=n),), embed_dim=64) for n in (1, 4, 8))
    nets = [often] * evolve.FEW + [once, here]
    rows = [row(f"g0.0{n}", net, 3 - 0.1 * n, operator="random") for n, net in enumerate(nets)]
    lines = evolve.features_section(
        rows, evolve.halfway_losses(rows, TOKENS), [], evolve.leaders_by_generation(rows, 2), here
    )
    assert {"attention heads=1", "attention heads=8"} <= set(cells_of(lines)) and "heads=4" not in "\n".join(lines)
    assert (
        "<summary>3 traits that are not the usual ones; left out, as fewer than 3 newcomers had them: 1</summary>"
        in lines
    )


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, operators, generations, the front, the hurdle


def test_rank_correlation():
    rng = random.Random(1)
    x = [rng.randrange(6) for _ in range(40)]
    y = [a + rng.randrange(4) for a in x]

    def mean_ranks(values):
        return [statistics.fmean(i for i, v in enumerate(sorted(values)) if v == value) for value in values]

    by_hand = statistics.correlation(mean_ranks(x), mean_ranks(y))
    assert evolve.rank_correlation(x, y) == pytest.approx(by_hand)
    weights = [1 + n % 3 for n in range(40)]
    more = [list(itertools.chain(*([v] * w for v, w in zip(z, weights, strict=True)))) for z in (x, y)]
    assert evolve.rank_correlation(x, y, weights) == pytest.approx(evolve.rank_correlation(*more)), "a weight is a copy"
    assert evolve.rank_correlation([1, 2, 3], [5, 6, 9]) == pytest.approx(1)
    assert evolve.rank_correlation([1, 2], [1, 2]) is evolve.rank_correlation([1, 1, 1], [1, 2, 3]) is None


def operators_of(rows: list[Result]) -> dict[str, list[str]]:
    return cells_of(evolve.operators_section(rows, evolve.halfway_losses(rows, TOKENS), steps_of(rows)))


def test_which_operators_earned_it():
    nets = iter(random_genome(random.Random(n)) for n in range(99))
    parent = next(nets)
    rows = [row("g0.00", parent, 3.0, operator="random"), row("g0.00", parent, 3.1, operator="repeat", seed=1)]
    rows += [row("g0.01", next(nets), 4.0, operator="random")]
    # noise 0.0707, of a child's difference from g0.00 that times sqrt(1.5), 0.0866; 1.96 of them are 0.170 below 3.05
    rows += [row(f"g1.0{n}", next(nets), loss, "g0.00", operator) for n, (loss, operator) in enumerate(
        [(2.87, "add_gene"), (2.89, "add_gene"), (3.25, "add_gene+swap_runs")])]  # fmt: skip
    rows += [row("g1.04", next(nets), 3.5, "g0.01", "add_gene", status="stopped", trained=6)]
    rows += [row("g1.05", next(nets), 3.5, "g0.01", "swap_runs", status="oom")]
    told = operators_of(rows)
    assert list(told) == ["operator", "---", "add_gene", "swap_runs"]
    # gains 0.18, 0.16, -0.20 of the one parent and 0.5 of the other; the noise with one evaluation, 0.1, is no hurdle
    gain = evolve.clustered([[0.18, 0.16, -0.20], [0.5]])
    assert told["add_gene"] == ["4", "2 (50%)", "1", "0", f"+{gain}"] and gain.mean == pytest.approx(0.16)
    assert told["swap_runs"] == ["2", "0 (0%)", "0", "1", "-0.2000 ± 0.1697"], "by the noise alone"
    assert operators_of(rows[2:])["add_gene"][1] == "—", "without noise nobody can say"
    assert operators_of(rows[:3]) == {}


def test_generations_roots_and_convergence():
    nets = [random_genome(random.Random(n)) for n in range(9)]
    of_time = dict(seconds=50.0, outside=10.0)
    rows = [row("g0.00", nets[0], 3.0, **of_time), row("g0.01", nets[1], 4.0, **of_time)]
    rows += [row("g1.00", nets[2], 2.0, "g0.00", **of_time), row("g1.01", nets[3], 5.0, operator="random", **of_time)]
    rows += [row("g1.00", nets[2], 2.04, operator="repeat", seed=1, generation=2, **of_time)]
    rows += [row("g2.00", nets[4], 2.008, "g1.00", **of_time), row("g2.01", nets[5], 6.0, "g1.01", **of_time)]
    # of g1.00 the mean is 1.01, noise 0.0141; g2.00 has 1.004
    assert evolve.noise_floor(rows) == pytest.approx(0.02 / math.sqrt(2))
    assert evolve.converged(rows) == (1, pytest.approx(4.0), pytest.approx(7.0))
    assert evolve.converged(rows[:4]) is None
    leaders = evolve.leaders_by_generation(rows, 1)
    assert leaders == [{"g0.00"}, {"g1.00"}, {"g2.00"}]
    told = cells_of(evolve.generations_section(rows, evolve.halfway_losses(rows, TOKENS), leaders))
    best = [told[str(g)][3] for g in range(3)]
    assert best == ["1.5000", "1.0100", "1.0040"] and {told[str(g)][0] for g in range(3)} == {"2"}
    assert [told[str(g)][4] for g in range(3)] == ["1", "1", "1"], "immigrants are no survivors"
    apart = statistics.fmean(
        evolve.gene_distance(a, b) for a, b in itertools.combinations([nets[n] for n in (2, 4, 5)], 2)
    )
    assert told["2"][5] == f"{apart:.2f}"
    failed = [row("g3.00", nets[6], status=status, seed=n) for n, status in enumerate(["stopped", "stopped", "oom"])]
    told = cells_of(evolve.generations_section(rows + failed, {}, [*leaders, {"g2.00", "g1.01"}]))
    assert told["3"][1:3] == ["2", "1"] and told["3"][4] == "2"


def test_rank_correlations_by_generation():
    def sized(g, n, loss, params):
        net = Genome([Gene("linear", 64)] * (1 + n) + [Gene("conv1d", 64 * (5 - n))], embed_dim=64)
        return row(f"g{g}.0{n}", net, loss, params=params, tokens_per_s=1_000 - n)

    rows = [sized(0, n, 3.0 + n, 7) for n in range(4)] + [sized(1, n, (2, 1, 4, 3)[n], n) for n in range(4)]
    # +1.00, -1.00, none and -1.00 in the first, +0.60, -0.60, +0.60 and -0.60 in the second
    losses = evolve.halfway_losses(rows, TOKENS)
    (told,) = [line for line in evolve.generations_section(rows, losses, evolve.leaders_by_generation(rows, 2))
               if line.startswith("Within a generation")]  # fmt: skip
    assert "depth +0.80, width -0.80, parameters +0.60, tokens/s -0.80 (rank correlation" in told


def test_leaders_are_those_of_the_record_so_far():
    """Also where a genome fails later, or gets worse."""
    rng, statuses, rows = random.Random(3), ["ok"] * 8 + ["diverged", "oom"], []
    for g in range(12):
        for n in range(4):
            id = f"g{rng.randrange(g + 1)}.0{n}"
            rows.append(row(id, loss=2 + rng.random(), generation=g, seed=len(rows), status=rng.choice(statuses)))
    for n in (1, 3):
        far = [{c.id for c in evolve.candidates([r for r in rows if r.generation <= g])[:n]} for g in range(12)]
        assert evolve.leaders_by_generation(rows, n) == far


def test_the_front_has_what_nothing_beats():
    rng = random.Random(2)
    rows = []
    for n in range(60):
        costs = {name: rng.randrange(1, 30) for name in ("params", "tokens_per_s", "memory_mb")}
        rows.append(row(f"g0.{n:02d}", random_genome(random.Random(n)), loss=2 + 0.1 * rng.random(), **costs))
    rows += [
        row("g0.98", loss=2.09, params=10**6, tokens_per_s=1, memory_mb=10**6),
        row("g0.99", loss=3.0, params=0, memory_mb=1),
    ]
    points = {r.id: (r.val_bpb, r.params, -r.tokens_per_s, r.memory_mb) for r in rows}
    best = min(p[0] for p in points.values())
    beaten = {a for a, p in points.items() for q in points.values() if p != q and all(np.array(q) <= np.array(p))}
    by_hand = {id for id, p in points.items() if id not in beaten and p[0] <= best + evolve.MARGIN}
    assert {c.id for c in evolve.unbeaten(rows)} == by_hand and "g0.98" in beaten and 3 < len(by_hand) < 60
    assert set(cells_of(evolve.front_section(rows))) - {"design", "---"} == by_hand
    assert evolve.unbeaten([]) == evolve.front_section([]) == []


def test_how_well_the_halfway_loss_ranked():
    """Those of generation 0 and the spared, who stand for ten each; not those that passed."""
    s = Settings(token_budget=1, hurdle_sample=0.1)
    seen = [(3.0, 1.6), (3.2, 1.5), (3.4, 1.8)]
    spared = [(4.0, 1.9), (4.1, 2.2), (4.2, 2.1)]
    rows = [row(f"g0.0{n}", loss=loss, val_bpb=score) for n, (loss, score) in enumerate(seen)]
    rows += [row(f"g1.0{n}", loss=a, val_bpb=b, hurdle="spared") for n, (a, b) in enumerate(spared)]
    rows += [row("g1.05", loss=1.0, val_bpb=9.0, hurdle="passed")]
    rows += [row("g1.06", status="oom", note="memory"), row("g1.07", status="stopped", hurdle="stopped", trained=6)]
    rows += [row("g1.08", note="-9% tokens/s against its first evaluation")]
    losses, scores = zip(*seen, *spared * 10, strict=True)
    expected = evolve.rank_correlation(losses, scores)
    text = "\n".join(evolve.hurdle_section(rows, s, evolve.leaders_by_generation(rows, 2)))
    assert f"ranks {expected:.2f} with the score" in text and "6 newcomers" in text
    assert f"| oom | 1 | {evolve.STATUSES['oom']} | memory (1) |" in text
    assert f"| stopped | 1 | {evolve.STATUSES['stopped']} | — |" in text
    assert "1 repeats trained at another speed than at first: g1.08 -9% tokens/s against" in text


# ----------------------------------------------------------------------------------------------------------------------
# Where it comes from


def test_descent_is_one_line_by_first_parents():
    nets = iter(random_genome(random.Random(n)) for n in range(9))
    rows = [row("g0.00", next(nets)), row("g0.01", next(nets)), row("g1.00", next(nets), parents="g0.01 g0.00")]
    rows += [row("g2.00", next(nets), parents="g1.00"), row("g2.01", next(nets), parents="g2.01")]
    assert [r.id for r in evolve.descent(rows, "g2.00")] == ["g0.01", "g1.00", "g2.00"]
    assert [r.id for r in evolve.descent(rows, "g2.01")] == ["g2.01"] and evolve.descent(rows, "no such") == []


def test_the_picture_shows_the_line_of_descent_and_the_front(run):
    from matplotlib.figure import Figure

    s, rows = run
    search = [r for r in evolve.of_stage(rows, "search") if r.status == "ok"]
    line = evolve.descent(rows, evolve.leader(rows, evolve.outcome(rows, s, 300)).id)
    axis = Figure().subplots()
    evolve.draw_scores(axis, rows, search, [0, 1, 2], 2, {}, line)
    (drawn,) = [drawn for drawn in axis.lines if drawn.get_label() == "the winner's line of descent"]
    means = {c.id: c.mean for c in evolve.searched(rows)}
    assert list(drawn.get_xdata()) == [r.generation for r in line if r.id in means]
    assert list(drawn.get_ydata()) == [means[r.id] for r in line if r.id in means]
    axis = Figure().subplots()
    evolve.draw_costs(axis, rows, search, (0.0, 9.0))
    (rings,) = [dots for dots in axis.collections if dots.get_label().startswith("on the front")]
    assert sorted(y for _, y in rings.get_offsets()) == sorted(c.mean for c in evolve.unbeaten(rows))


def test_changes_between_genomes():
    a = Genome((Gene("norm"), Gene("attention", 64, skip=2), Gene("norm"), Gene("gate", 64, skip=2)), embed_dim=64)
    more = Gene("shift", skip=1)
    b = dataclasses.replace(
        a, genes=(a.genes[0], more, Gene("attention", 64, skip=3, heads=8), *a.genes[2:]), tied=True
    )
    assert evolve.gene_changes(a, b) == ["+ shift skip=1", "attention: skip=2 → heads=8 skip=3", "tied: False → True"]
    assert evolve.gene_changes(b, a) == ["- shift skip=1", "attention: heads=8 skip=3 → skip=2", "tied: True → False"]
    assert evolve.gene_changes(a, a) == []
    c = dataclasses.replace(a, genes=a.genes[:2])
    assert evolve.gene_changes(a, c) == ["- norm", "- gate 64 skip=2"]
    read = dataclasses.replace(a, genes=(*a.genes[:3], Gene("gate", 64, input=2, skip=2)))
    assert (
        evolve.gene_changes(a, read) == ["gate: default → input=2", "- norm"] or len(evolve.gene_changes(a, read)) == 2
    )


def test_a_lineage_has_operators_scores_and_changes():
    a = transformer(1, 64, 1)
    b, c = (dataclasses.replace(a, genes=(*a.genes, *[Gene("shift", skip=1)] * n)) for n in (1, 2))
    rows = [row("g0.00", a, 3.0, operator="random"), row("g0.01", PLAIN, 4.0, operator="random")]
    rows += [row("g1.00", b, 2.0, "g0.01 g0.00", "crossover"), row("g1.00", b, 2.2, operator="repeat", seed=1)]
    rows += [row("g2.00", c, 1.8, "g1.00", "add_gene")]
    assert evolve.lineage_graph(rows, "g2.00") == [
        "```mermaid",
        "flowchart TD",
        f'  n0["g0.00 random: 1.5000 (1)<br/>{a.summary}"]',
        f'  n1["g0.01 random: 2.0000 (1)<br/>{PLAIN.summary}"]',
        '  n2["g1.00 crossover: 1.0500 (2)<br/>+ shift skip=1"]',
        '  n3["g2.00 add_gene: 0.9000 (1)<br/>+ shift skip=1"]',
        "  n1 --> n2",
        "  n0 --> n2",
        "  n2 --> n3",
        "```",
        "",
    ]
    long = [row(f"g{n}.00", with_part(n % 9 + 9 * (n % 4)), parents=f"g{n - 1}.00" * (n > 0)) for n in range(60)]
    assert sum("-->" in line for line in evolve.lineage_graph(long, "g59.00")) == evolve.ENOUGH - 1


@pytest.mark.parametrize("n", range(40))
def test_a_drawn_network_has_the_edges_of_the_genome(n):
    """Unfolded, the drawing is the network: of the genes that stand once each edge, of those folded the first time."""
    net = random_genome(random.Random(n)) if n else transformer(6, 64, 1)
    net = grown(net, 2) if n % 2 else net
    lines = evolve.network_graph(net)
    drawn = set(re.findall(r"^  (s\d+) --> (s\d+)$|^  (s\d+) -. \+ .-> (s\d+)$", "\n".join(lines), re.M))
    boxes = re.findall(r'^  s(\d+)\["(.+)"\]$', "\n".join(lines), re.M)
    assert len(boxes) <= len(net.network) and (len(boxes) == 4 or n)
    for state, text in boxes:
        node = net.network[int(state) - 1]
        assert text.split() == [f"{node.at}:", *net.words[int(state) - 1].split()], "with the number of its gene"
        assert any(f"s{state}" in edge for edge in drawn) or node.source is None
    times = [int(t) for t in re.findall(r'"(\d+) times"', "\n".join(lines))]
    assert sum(line == "  end" for line in lines) == len(times) and (times == [6] or n)
    if not times:
        edges = {
            (f"s{node.source}", f"s{i}", "", "") for i, node in enumerate(net.network, 1) if node.source is not None
        }
        edges |= {("", "", f"s{node.skip}", f"s{i}") for i, node in enumerate(net.network, 1) if node.skip is not None}
        assert drawn == edges


# ----------------------------------------------------------------------------------------------------------------------
# The whole report


SMALL = dict(population_size=4, survivors=2, repeats=2, immigrants=1, max_generations=3, baseline_trials=2, workers=1)
SMALL |= dict(token_budget=1_024, max_params=10**6, batch_tokens=256, seq_len=64, eval_tokens=1_024, prescreen=2)
SMALL |= dict(finalists=2, final_seeds=2, long_factor=4.0, long_seeds=2, ablation_seeds=2)


def fake(t: Task) -> Result:
    noise = random.Random(f"{t.genome.key}/{t.seed}/{t.budget}").random()
    losses = ",".join(f"{3 - 0.1 * i + 0.1 * noise:.4f}" for i in range(evolve.CURVE))
    score = 1 + 0.2 * random.Random(t.genome.key).random() + 0.01 * noise + 0.5 * (evolve.family_of(t.id) is not None)
    thirds = dict(bpb_first=score + 0.1, bpb_middle=score, bpb_last=score - 0.1)
    probes = dict(induction=-2 - noise, recall_near=-1.0, recall_middle=-0.5, recall_far=-0.25) if t.test else {}
    values = dict(
        val_bpb=score, test_bpb=score + 0.02 if t.test else None, passes=0.6 * t.budget / t.text, losses=losses
    )
    return Result.of(t, params=1_000, tokens_per_s=1_000, memory_mb=5, seconds=1.0, **values, **thirds, **probes)


def played(s: Settings) -> list[Result]:
    rows = []
    while tasks := evolve.next_tasks(rows, s, 300):
        rows += map(fake, tasks)
    return rows


@pytest.fixture
def run(free_params) -> tuple[Settings, list[Result]]:
    s = Settings(**SMALL)
    return s, played(s)


def test_the_report_of_a_run_at_every_stage(run):
    """It can be made from the first row to the last, and says how far the run is."""
    s, rows = run
    ends = [
        i
        for i, (a, b) in enumerate(itertools.pairwise(rows), start=1)
        if (a.stage, a.generation) != (b.stage, b.generation)
    ]
    texts = [evolve.report(rows[:n], HEADER, s, {}) for n in (0, 1, *ends, len(rows))]
    assert "The search has not begun." in texts[0] and "The search has not begun." in texts[1]
    first = next(i for i, n in enumerate(ends, start=2) if rows[n - 1].stage == "search")
    assert (
        "not finished: its record ends in the search, with generation 0. It lacks final, target, grow" in texts[first]
    )
    assert "## The best so far, drawn" in texts[first] and "## The winner, drawn" in texts[-1]
    last = [line for line in texts[-1].splitlines() if line.startswith("## ")]
    assert last == ["## The final", "## The winner, drawn", "## How it came to be", "## What people found by hand",
                    "## What became of the parts", "## Which operators earned it", "## Diversity and convergence",
                    "## Score, size, speed and memory", "## Long context",
                    "## The hurdle, and what went wrong"]  # fmt: skip
    assert texts[-1] == evolve.report(rows, HEADER, s, {}) and "nan" not in texts[-1].replace("nan]", "")


def test_the_tables_of_a_final_say_each_thing_once(run):
    s, rows = run
    text = evolve.report(rows, HEADER, s, {})
    final = text.partition("## The winner, drawn")[0].partition("## The final")[2]
    heads = [line for line in final.splitlines() if line.startswith("| design")]
    assert ["val before" in head for head in heads] == [True, False, False], "scores of the search beside the first"
    o = evolve.outcome(rows, s, 300)
    named = re.findall(r"^- (\S+): ", final, re.M)
    assert sorted(named) == sorted({x.id for x in (*o.final, *o.long, *o.passes)}), "each design once"


def test_how_much_was_tried(run):
    """What evolution and what people had: so many designs in so many minutes on the device."""
    s, rows = run
    text, search = evolve.report(rows, HEADER, s, {}), evolve.of_stage(rows, "search")
    new, n = len({r.id for r in search}), len(search)
    assert (
        f"; search {n} of {new} designs, {n / 60:.0f} min; " in text
        and "Evaluations and minutes on the device: baseline " in text
    )
    alone = [dataclasses.replace(r, seconds=60.0, outside=3.0) for r in search]
    assert f"device: search {n} of {new} designs, {1.05 * n:.0f} min." in evolve.report(alone, HEADER, s, {})
    assert "Evaluations and minutes" not in evolve.report([], HEADER, s, {})


def test_the_answer_against_controls(run):
    s, rows = run
    search = evolve.of_stage(rows, "search")
    other = [dataclasses.replace(r, val_bpb=r.val_bpb + 0.3) for r in search if r.generation < 2]
    o = evolve.outcome(rows, s, 300)
    text = evolve.answer(rows, s, {("strategy", "random"): other, ("seed", 7): search, ("seed", 8): []}, o)[-2]
    early = [r for r in search if r.generation < 2]
    best, theirs = evolve.searched(early)[0], evolve.searched(other)[0]
    half = 1.96 * math.sqrt(sum(evolve.noise_floor(those) ** 2 / len(c.scores) for those, c in
                                ((search, best), (other, theirs))))  # fmt: skip
    minutes = sum(r.spent for r in other) / 60
    told = (
        f"{theirs.mean - best.mean:.4f} ± {half:.4f} better than the control random after {minutes:.1f} minutes of each"
    )
    assert told in text
    assert re.search(r"no better than seed 7 after \d+\.\d minutes", text), "where both have the same best"
    assert "seed 8" not in text
    worse = evolve.lead_text(evolve.estimate([-0.2, -0.3]), "x")
    assert worse == "0.2500 ± 0.6353 worse than x (which may be chance)"


def test_before_the_final_the_best_baseline_is_that_of_all_families(run):
    s, rows = run
    begun = [r for r in rows if r.stage in ("baseline", "search")]
    for best in ("transformer", "modern"):
        seen = [dataclasses.replace(r, val_bpb=r.val_bpb - 0.3 * r.id.startswith(best)) for r in begun]
        rival = min(evolve.best_baselines(seen), key=lambda c: c.mean)
        o = evolve.outcome(seen, s, 300)
        assert rival.id.startswith(best) and o.winner is None
        assert evolve.best_genome(seen, HEADER, s, o)["rival"]["id"] == rival.id
        told = evolve.answer(seen, s, {}, o)
        assert f"the best baseline, {rival.id}, has {rival.mean:.4f}" in told[1] and rival.id in told[-1]


def test_the_time_to_target_is_told_when_it_is_known(run):
    s, rows = run
    o = evolve.outcome(rows, s, 300)
    whole, first = (
        evolve.answer(part, s, {}, evolve.outcome(part, s, 300)) for part in (rows, rows_until(rows, "grow", 1))
    )
    assert o.target[1] == s.final_seeds and evolve.target_text(o, s) + "." in whole
    assert any("needs" in line for line in first)
    for part in (rows_until(rows, "target", 0), rows_until(rows, "target", 3)):
        o = evolve.outcome(part, s, 300)
        assert o.winner and o.target is None and evolve.target_text(o, s) == ""
        assert not any(word in line for line in evolve.answer(part, s, {}, o) for word in ("needs", "does not reach"))
        assert evolve.best_genome(part, HEADER, s, o)["time_to_target"]["seeds_that_reach_it"] is None


def rows_until(rows: list[Result], stage: str, n: int) -> list[Result]:
    """The rows before a stage, and the first n of that."""
    first = next(i for i, r in enumerate(rows) if r.stage == stage)
    return rows[: first + n]


def test_a_winner_that_was_given_or_built_by_hand_is_named(run):
    s, rows = run
    o = evolve.outcome(rows, s, 300)
    texts = {
        "not found": "was not found by this run: it is one of the designs of --start",
        "by hand": "which people built",
    }
    for what, changed in {
        "": rows,
        "not found": [dataclasses.replace(r, operator="start") if r.key == o.winner.genome.key else r for r in rows],
        "by hand": [*rows, dataclasses.replace(rows[0], key=o.winner.genome.key)],
    }.items():
        told = "\n".join(evolve.answer(changed, s, {}, o))
        assert [text in told for text in texts.values()] == [name == what for name in texts]


def test_few_steps_are_told_first(run):
    s, rows = run
    o = evolve.outcome(rows, s, 300)
    for steps, few in ((evolve.FEW_STEPS - 1, True), (evolve.FEW_STEPS, False)):
        seen = [dataclasses.replace(r, tokens=steps * s.batch_tokens + 1) for r in rows]
        told = evolve.answer(seen, s, {}, o)[0]
        assert told.startswith(f"Half of the trials had {steps} optimizer steps or fewer") == few


def test_long_context_is_told_of_finals_alone(run):
    s, rows = run
    lines = evolve.context_section(rows, s)
    told = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert told[0][3:7] == ["induction", "recall, 2 back", "recall, 8 back", "recall, 32 back"]
    kept = {(r.id, r.stage, r.budget) for r in rows if r.test_bpb is not None and r.stage != "target"}
    assert len(told) - 2 == len(kept) and {line[1] for line in told[2:]} == {"final", "long", "passes"}
    one = next(line for line in told if line[1] == "final")
    own = [r for r in rows if r.stage == "final" and r.id == one[0]]
    assert one[3] == str(evolve.estimate(r.induction for r in own)) and one[4] == "-1.0000 ± 0.0000"
    assert one[7] == f"{statistics.fmean(r.bpb_first for r in own):.4f}"
    assert evolve.context_section(evolve.of_stage(rows, "search"), s) == []


HOSTILE = [
    "a|b", "<img src=x onerror=alert(1)>", "](http://x.y)", "`code`", "**b** _i_", "x\n# title\n\n| a |", "]\n--> x",
    '"]; click n0 call', "%%{init: {}}%%", "$x^2$", "\x1b[31m\u202e", "&amp;", "end", "```", "ok~~no~~", "<!-- ", "\\",
    "a" * 9_999,
]  # fmt: skip
LABEL = r'"[^"\[\]{}|`<>&]*(<br/>[^"\[\]{}|`<>&]*)*"'
GRAPH = "|".join([
    rf"  [ns]\d+\[{LABEL}\]", rf"  (s0|head)\(\[{LABEL}\]\)|  head\({LABEL}\)|  head\(\[{LABEL}\]\)",
    rf"  subgraph r\d+\[{LABEL}\]", "  end", r"  s\d+ --> (s\d+|head)", r"  s\d+ -\. (\+|tokens) \.-> s\d+",
    r"  n\d+ --> n\d+",
])  # fmt: skip


def hostile(rows: list[Result]) -> list[Result]:
    """The rows with such texts wherever a record has texts."""
    texts, names = itertools.cycle(HOSTILE), {}
    for r in evolve.of_stage(rows, "search"):
        names.setdefault(r.id, f"{r.id} {next(texts)}")
    bad = []
    for r in rows:
        lost = r.generation == 1 and r.operator == "random"
        own = dict(note=next(texts), operator=r.operator and r.operator + next(texts), id=names.get(r.id, r.id))
        own |= dict(parents=",".join(names.get(parent, parent) for parent in r.parents.split(",")))
        bad.append(dataclasses.replace(r, **own, **(dict(status="oom", val_bpb=None) if lost else {})))
    return bad


def test_hostile_text_in_a_record_breaks_nothing(run):
    """Every table keeps its columns, nothing is markup, and no line but ours begins a block."""
    s, rows = run
    header = {**HEADER, "data": "|".join(HOSTILE), "device": "<b>\n# x"}
    clean = evolve.report(rows, HEADER, s, {})
    text = evolve.report(hostile(rows), header, dataclasses.replace(s, strategy="<i>|"), {("seed", "|<b>"): rows})
    prose, graphs = (text.split("```")[n::2] for n in (0, 1))
    assert len(graphs) == 2 and len(prose) == 3
    for graph in graphs:
        first, second, *lines = graph.strip("\n").splitlines()
        assert (first, second) == ("mermaid", "flowchart TD")
        for line in lines:
            assert re.fullmatch(GRAPH, line), line
    prose = "".join(prose)
    assert set(re.findall(r"<[^>]*>", prose)) == {"<details>", "</details>", "<summary>", "</summary>"}
    width = 0
    for line in prose.splitlines():
        assert line[:1] in ("", "|", "#", "-", "<") or line[0].isalnum(), line
        width = (width or line.count("|")) if line.startswith("|") else 0
        assert line.count("|") == width, line
        assert not re.search(r"[\[\]`\\$~{}]|\*\*|\b_|_\b|://", line), line
    titles = [[line for line in those.splitlines() if line.startswith("#")] for those in (text, clean)]
    assert titles[0] == titles[1]
    for told in HOSTILE[:4]:
        assert told in html.unescape(text), "what was said can be read"


def test_a_genome_can_be_sent_while_a_report_is_made_of_it():
    """Reports are written by a thread, and what they look up is remembered in the genomes that are sent to workers."""
    for n in range(30):
        net = random_genome(random.Random(n))
        sent = pickle.dumps(Task("search", "x", net, 0, 0))
        assert net.words and net.key and pickle.dumps(Task("search", "x", net, 0, 0)) == sent
        assert pickle.loads(sent).genome == net and pickle.loads(sent).genome.key == net.key


def test_harmless_text():
    assert (
        evolve.harmless("add_gene+swap_runs g5.01 transformer-3x256 (1.4)")
        == "add_gene+swap_runs g5.01 transformer-3x256 (1.4)"
    )
    assert evolve.harmless("+4% tokens/s") == "+4% tokens/s"
    assert (
        evolve.harmless("a\n\n b\t|") == "a b &#124;"
        and evolve.harmless("_x_ https://y") == "&#95;x&#95; https&#58;//y"
    )
    assert len(evolve.harmless("x" * 999)) == 201 and html.unescape(evolve.harmless("<a> [b]")) == "<a> [b]"


def test_a_table_is_as_wide_as_its_head():
    assert evolve.as_table(["a", "b"], [["x", 1], [None, "+0.5 ± 0.1"]]) == [
        "| a | b |", "| --- | ---: |", "| x | 1 |", "| — | +0.5 ± 0.1 |", ""]  # fmt: skip
    assert evolve.as_table(["a"], []) == []
    assert evolve.as_table(["words", "dashes"], [["x", None]])[1] == "| --- | --- |"


# ----------------------------------------------------------------------------------------------------------------------
# --report: any record


def test_of_many_operators_the_first_two_are_shown():
    texts = {"": "", "repeat": "repeat", "a+b": "a+b", "a+b+c": "a+b+1 more", "a+b+c+d": "a+b+2 more"}
    assert {name: evolve.made_by_text(row("g1.01", operator=name)) for name in texts} == texts


def test_the_report_of_the_published_run(tmp_path, capsys):
    """Without data and with another code; its figures are those of README.md."""
    shutil.copy(ROOT / "runs/seed0-5s/results.tsv", tmp_path)
    for name in ("random-5s", "seed1-5s"):
        shutil.copytree(ROOT / "runs" / name, tmp_path / "runs" / name)
    assert evolve.main(["--report", str(tmp_path)]) == 0 and "of 307 evaluations" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.tsv", "runs", "report.md"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        "- g17.08, norm→ssm→" in text
        and "1.4151 ± 0.0018 bits per byte on test after 10 s, 0.0149 ± 0.0039 better" in text
    )
    assert (
        re.search(r"better than the control random after 19\.\d minutes of each", text) and "an earlier version" in text
    )
    assert "| g17.08 | 1.4151 ± 0.0018 | 1.4307 ± 0.0013 | 1.4886 | 5 |" in text and "progress.png" not in text
    for op, newcomers, until, times in (
        ("shift", 133, "the end", 1),
        ("linear", 45, "generation 16", "—"),
        ("ssm", 174, "the end", 2),
    ):
        assert f"| {op} | {newcomers} | {until} | {times} |" in text
    (tmp_path / "progress.png").write_bytes(b"a picture")
    with open(tmp_path / "results.tsv", "a") as file:
        file.write("torn by a cra")
    assert evolve.main(["--report", str(tmp_path)]) == 0
    assert "![progress.png](progress.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["drift-5s", "random-5s", "seed1-5s", "seed2-5s"])
def test_the_reports_of_the_other_published_runs(name):
    header, _, rows = evolve.read_results((ROOT / "runs" / name / "results.tsv").read_bytes())
    text = evolve.report(rows, header, evolve.settings_of(header, rows), {})
    reached = {
        "drift-5s": "1.4568 ± 0.0016",
        "random-5s": "1.4648 ± 0.0039",
        "seed1-5s": "1.4232 ± 0.0010",
        "seed2-5s": "1.4245 ± 0.0015",
    }
    assert f"{reached[name]} bits per byte on test after 10 s" in text


def test_a_folder_without_a_record_is_named(tmp_path, capsys):
    assert evolve.main(["--report", str(tmp_path)]) == 1 and "results.tsv: No such file" in capsys.readouterr().err
    (tmp_path / "results.tsv").write_text("some text\nand more\n")
    assert (
        evolve.main(["--report", str(tmp_path)]) == 1 and "is no results.tsv of this program" in capsys.readouterr().err
    )
    assert (
        evolve.main(["--report", str(tmp_path), "--train", "x"]) == 1 and "give one of them" in capsys.readouterr().err
    )


def test_settings_of_a_record(run):
    s, rows = run
    data = types.SimpleNamespace(source="text", fingerprint="f", vocab_size=300)
    header = json.loads(json.dumps(evolve.describe_run(s, data, "cpu")))
    found = evolve.settings_of(header, rows)
    same = {name: (getattr(s, name), getattr(found, name)) for name in SMALL}
    unknown = {"max_generations", "baseline_trials", "workers", "ablation_seeds"}
    assert {name for name, (a, b) in same.items() if a != b} <= unknown
    assert evolve.report(rows, header, found, {}) == evolve.report(rows, header, s, {})
    odd = {"survivors": "three", "seed": True, "time_budget": 7, "seq_len": None, "strategy": 5, "hurdle": [1]}
    assert evolve.settings_of(odd, []) == Settings(time_budget=7)


# ----------------------------------------------------------------------------------------------------------------------
# --ablate


def ablated(net: Genome, s: Settings, rows: list[Result], worth=lambda t: 0.0) -> list[Result]:
    return [
        dataclasses.replace(fake(t), val_bpb=1 + 0.1 * (t.seed % 10) + worth(t))
        for t in evolve.ablation_tasks(rows, net, s)
    ]


def test_an_ablation_is_a_stage_beside_the_plan(run):
    s, rows = run
    net = Genome.from_json(rows[-1].genome)
    own = ablated(net, s, rows)
    parts = without_a_part(net)
    assert {r.key for r in own} == {net.key, *(less.key for less in parts.values())}
    assert {r.stage for r in own} == {"ablate"} and len(own) == 2 * (1 + len(parts)) == len({r.evaluation for r in own})
    assert not {r.seed for r in own} & {r.seed for r in rows} and {r.seed for r in own} <= set(range(evolve.SEEDS))
    assert evolve.ablation_tasks(rows + own, net, s) == []
    left = evolve.ablation_tasks(rows + own[:5], net, s)
    assert [(t.id, t.seed) for t in left] == [(r.id, r.seed) for r in own[5:]], "it goes on where it stopped"
    for n in (0, len(rows) // 3, len(rows) - 1, len(rows)):
        assert evolve.next_tasks(rows[:n] + own, s, 300) == evolve.next_tasks(rows[:n], s, 300)
    failed = [dataclasses.replace(own[0], status="oom", val_bpb=None)]
    assert len(evolve.ablation_tasks(failed, net, s)) == len(own) > len(evolve.ablation_tasks(failed * 2, net, s))


def test_what_a_part_is_worth_seed_by_seed(run):
    s, rows = run
    net = evolve.searched(rows)[0].genome
    parts = without_a_part(net)
    worth = {less.key: 0.01 * n for n, less in enumerate(parts.values())}
    own = ablated(net, s, rows, lambda t: worth.get(t.id, 0) * (1 + 0.5 * (t.seed % 2)))
    lines = evolve.ablation_section(rows + own, s)
    assert lines[0].startswith(f"{evolve.searched(rows)[0].id}, {net.summary}: ")
    told = cells_of(lines)
    assert list(told)[2:] == list(parts)[::-1], "the dearest first"
    for n, name in enumerate(parts):
        mean, half = map(float, told[name][1].split(" ± "))
        values = [0.01 * n * (1 + 0.5 * (seed % 2)) for seed in {r.seed for r in own}]
        assert mean == pytest.approx(statistics.fmean(values), abs=1e-4)
        # of all changes together; two values that differ by 0.005 n have a variance of half its square
        pooled = math.sqrt(statistics.fmean((0.005 * k) ** 2 / 2 for k in range(len(parts))))
        assert half == pytest.approx(evolve.student(1 + len(parts)) * pooled / math.sqrt(2), abs=2e-4)
    assert "What it is worth without a part" in evolve.report(rows + own, HEADER, s, {})
    lone = evolve.ablation_section(ablated(PLAIN, s, []), s)
    assert lone[0].startswith(f"{PLAIN.key}, {PLAIN.summary}: "), "a design of another run has its key"
    lost = [dataclasses.replace(r, status="oom", val_bpb=None) if r.parents else r for r in own]
    assert {cells[0] for cells in cells_of(evolve.ablation_section(lost, s)).values()} == {
        "val_bpb",
        "---:",
        "oom",
        "---",
    } - {"---:"}


@pytest.fixture
def trained(free_params, monkeypatch):
    """What is evaluated by the command, on no data; nothing is trained."""
    done = []

    def under_a_bar(pool, tasks, most, first):
        for t in tasks:
            if len(done) == 7:
                done.append(None)
                raise KeyboardInterrupt
            done.append(t)
            yield fake(t)

    splits = dict.fromkeys(("train", "val", "test"), torch.zeros(9_999, dtype=torch.int16))
    data = types.SimpleNamespace(source="text", fingerprint="f", vocab_size=300, **splits)
    monkeypatch.setattr(evolve.prepare, "open_source", lambda **_: data)
    monkeypatch.setattr(evolve, "check_ops", lambda: None)
    monkeypatch.setattr(evolve, "under_a_bar", under_a_bar)
    monkeypatch.setattr(
        evolve, "Pool", lambda *_: contextlib.nullcontext(types.SimpleNamespace(gpus=1, gpu_seconds=0.0))
    )
    monkeypatch.setattr(evolve, "picture", lambda *_: b"a picture")
    return done


def test_the_command_ablates_goes_on_and_leaves_a_run_as_it_is(trained, tmp_path, capsys):
    file = tmp_path / "best_genome.json"
    file.write_text(json.dumps({"id": "g1.01", "genome": json.loads(DEEP.to_json())}))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()] + ["--out", str(tmp_path / "out")]
    command = [*flags, "--ablate", str(file)]
    assert evolve.main(command) == 130 and evolve.main(command) == 0
    whole = 2 * (1 + len(without_a_part(DEEP)))
    with evolve.Record(tmp_path / "out") as record:
        assert len(record.rows) == whole == len({r.evaluation for r in record.rows}) and trained.count(None) == 1
    capsys.readouterr()
    assert evolve.main(command) == 0 and "a trial on" not in capsys.readouterr().out, "it is done"
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "## What it is worth without a part" in text and "The search has not begun." in text
    assert evolve.main([*command, "--token-budget=2048"]) == 1
    assert "which differs in TOKEN_BUDGET (1024, here 2048)" in capsys.readouterr().err
    assert evolve.main(flags) == 0, "a run of the same settings goes on in that record"
    with evolve.Record(tmp_path / "out") as record:
        rows = record.rows
    alone = played(Settings(**SMALL))
    assert [r.evaluation for r in rows if r.stage != "ablate"] == [r.evaluation for r in alone]
    assert (
        evolve.main([*command, "--start", str(file)]) == 1 and "no meaning beside --ablate" in capsys.readouterr().err
    )


def test_a_run_with_start_can_be_ablated(trained, tmp_path):
    s = Settings(**SMALL, start=(PLAIN,))
    data = types.SimpleNamespace(source="text", fingerprint="f", vocab_size=300)
    header = evolve.describe_run(s, data, "cpu")
    with evolve.Record(tmp_path) as record:
        record.begin(header)
        evolve.begin_or_join(record, evolve.describe_run(Settings(**SMALL), data, "cpu"))
        assert record.header == header
        with pytest.raises(Stop, match="DEVICE"):
            evolve.begin_or_join(record, evolve.describe_run(Settings(**SMALL), data, "a GPU"))


# ----------------------------------------------------------------------------------------------------------------------
# The probes


def probe(model, seq_len: int, rows: int = 4, micro_steps: int = 2) -> list[float | None]:
    """Trial.probe of a function from tokens (rows, T) and targets to losses."""
    trial = evolve.Trial.__new__(evolve.Trial)
    trial.settings = Settings(seq_len=seq_len, batch_tokens=rows * micro_steps * seq_len)
    trial.task, trial.rows, trial.micro_steps = types.SimpleNamespace(seed=3), rows, micro_steps
    val = torch.randint(5_000, (4_000,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    trial.data = types.SimpleNamespace(val=val, vocab_size=5_000)
    shapes = []

    def losses(idx, targets):
        assert idx.is_contiguous() and targets.is_contiguous() and torch.equal(idx[:, 1:], targets[:, :-1])
        shapes.append(tuple(idx.shape))
        return model(idx, targets)

    trial.scored_losses = losses
    found = trial.probe()
    assert set(shapes) <= {(rows, seq_len)} and len(shapes) in (0, micro_steps * 4)
    return found


def copies(reach: int):
    """1 nat where the same two tokens stood there up to so far back, else 5: what a perfect induction head does."""

    def model(idx, targets):
        losses = torch.full(idx.shape, 5.0)
        for r, (tokens, after) in enumerate(zip(idx.tolist(), targets.tolist(), strict=True)):
            last = {}
            for t, pair in enumerate(zip(tokens, after, strict=True)):
                if t - last.get(pair, -math.inf) <= reach:
                    losses[r, t] = 1.0
                last[pair] = t
        return losses

    return model


@pytest.mark.parametrize("seq_len", [256, 64, 63, 31, 16])
def test_probes_of_a_model_that_copies(seq_len):
    assert probe(copies(seq_len), seq_len) == pytest.approx([-4.0] * 4, abs=0.05)
    apart = [max(2, seq_len // n) for n in (32, 8, 2)]
    short = probe(copies(apart[1]), seq_len)
    assert short == pytest.approx([0.0, -4.0, -4.0, 0.0], abs=0.05), "as far as it remembers"


@pytest.mark.parametrize("seq_len", [256, 5, 4])
def test_probes_of_a_model_that_does_not(seq_len):
    assert probe(lambda idx, targets: targets % 7 + 1.0, seq_len) == [0.0] * 4


def test_windows_too_short_for_probes():
    assert probe(copies(9), 3) == [None] * 4


def test_a_search_alone_says_so():
    s = Settings(**{**SMALL, "baseline_trials": 0, "finalists": 0})
    rows = played(s)
    text = evolve.report(rows, {"vocab_size": 300}, s, {})
    assert "a search alone, without a final (FINALISTS = 0), up to generation 2." in text and "not finished" not in text


def test_a_run_without_a_score_is_none_of_an_earlier_version():
    s = Settings(**SMALL)
    crashed = [Result.of(task, "crash", note="no") for task in evolve.next_tasks([], s, 300)]
    assert "an earlier version" not in evolve.made_by({}, crashed, s)


def test_what_a_run_began_with_is_listed():
    s = Settings(**SMALL)
    text = evolve.report(played(s), {"start": [f"{n:012d} norm→ssm" for n in range(3)], "vocab_size": 300}, s, {})
    assert "Generation 0 began with what was known: 000000000000 norm→ssm&#59; 000000000001 norm→ssm" in text


def test_features_by_hand():
    assert evolve.features(Genome((Gene("gate", 64, kind="gelu", stride=2),), embed_dim=64, tied=True)) == {
        ("gate",), ("gate", "kind", "gelu"), ("any", "stride", 2), ("genome", "tied", True),
        ("genome", "embed_dim", 64),
    }  # fmt: skip
