"""Breeding and the plan, on toys: evolution finds what random and drift do not, and a plan goes on from anywhere."""

import collections
import dataclasses
import itertools
import math
import random

import pytest
from helpers import ALL_STAGES, BIG, NET, narrow_genomes, planned, rounds, search, task, tiny, toy_result, tuned

import evolve
import genome
from evolve import Result, Stop, Task
from genome import Genome, transformer

# ----------------------------------------------------------------------------------------------------------------------
# Selection and breeding. A toy fitness, whose best is known: genes of one kind, six of them are best.


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_what_random_and_drift_do_not(free_params, seed):
    """Six attention genes within 20 generations of 12."""
    best, most = {}, {}
    for strategy in ("elites", "random", "drift"):
        rows = search(tiny(**BIG, seed=seed, strategy=strategy), 20)
        assert len(rows) == 240
        genomes = [Genome.from_json(r.genome) for r in rows]
        most[strategy] = max(sum(node.gene.op == "attention" for node in net.network) for net in genomes)
        best[strategy] = evolve.searched(rows)[0].mean
    assert most["elites"] >= 6 > max(most["random"], most["drift"])
    assert best["elites"] + 0.05 < min(best["random"], best["drift"])


@pytest.mark.parametrize("strategy", [*evolve.SELECTION, "random"])
def test_breeding(free_params, strategy):
    s = tiny(**BIG, strategy=strategy)
    rows = search(s, 6)
    by_generation = [[r for r in rows if r.generation == g] for g in range(6)]
    assert all(len(mine) == 12 for mine in by_generation)
    assert {r.operator for r in by_generation[0]} == {"random"}
    for g, mine in enumerate(by_generation[1:], start=1):
        earlier = [r for r in rows if r.generation < g]
        survivors, newcomers = mine[:3], mine[3:]
        assert {r.operator for r in survivors} == {"repeat"} and "repeat" not in {r.operator for r in newcomers}
        for r in survivors:  # a new seed for the same genome
            before = [e for e in earlier if e.id == r.id]
            assert before and {e.genome for e in before} == {r.genome} and r.seed not in {e.seed for e in before}
            assert r.order == len(before)  # and other batches, the same as all genomes meet with as many evaluations
        assert len({r.seed for r in mine}) == 1
        assert {r.order for r in newcomers} == {0}  # all meet the same batches, those of other generations too
        assert not {r.key for r in newcomers} & {r.key for r in earlier}
        assert len({r.key for r in newcomers}) == 9
        assert all(Genome.from_json(r.genome).mixes_tokens for r in newcomers)
        parents = {p for r in newcomers for p in r.parents.split(",") if p}
        assert parents <= ({r.id for r in survivors} if strategy == "elites" else {r.id for r in earlier})
        strangers = [r for r in newcomers if r.operator == "random"]
        assert all(not r.parents for r in strangers)
        assert len(strangers) == (9 if strategy == "random" else 1)
        assert [r.id for r in survivors] == [c.id for c in evolve.searched(earlier)[:3]], "the best, whoever breeds"
    if strategy != "random":
        assert any("," in r.parents for r in rows) and any(r.operator.startswith("crossover") for r in rows)
    assert len({r.id for r in rows if r.operator != "repeat"}) == 72 - 15


def test_a_survivor_is_evaluated_so_often_and_no_more(free_params):
    s = tiny(**BIG | dict(repeats=2))
    rows = search(s, 8)
    evaluations = collections.Counter(r.id for r in rows)
    assert set(evaluations.values()) == {1, 2}
    for g in range(1, 8):
        earlier = [r for r in rows if r.generation < g]
        survivors = evolve.searched(earlier)[:3]
        again = [r.id for r in rows if r.generation == g and r.operator == "repeat"]
        assert again == [c.id for c in survivors if len(c.scores) < 2]
        parents = {p for r in rows if r.generation == g for p in r.parents.split(",") if p}
        assert parents <= {c.id for c in survivors}  # they breed on all the same
    assert min(collections.Counter(r.generation for r in rows).values()) == 12


def test_breeding_is_a_function_of_the_record(free_params):
    s = tiny(**BIG)
    rows = search(s, 4)
    assert [r.id for r in search(s, 4)] == [r.id for r in rows]
    born = evolve.breed(rows, 3, s, 300)
    shuffled = list(rows)
    random.shuffle(shuffled)  # as several workers would have left them
    random.seed(1)
    assert evolve.breed(shuffled, 3, s, 300) == born
    assert evolve.breed([r for r in rows if r.generation < 3], 3, s, 300) == born  # what comes later does not matter
    assert [evolve.to_line(toy_result(t)).split("\t")[-1] for t in born] == [
        evolve.to_line(r).split("\t")[-1] for r in rows if r.generation == 3
    ]
    assert evolve.breed(rows, 3, tiny(**BIG, seed=1), 300)[3:] != born[3:]


def test_children_are_small_enough(monkeypatch):
    bred = []
    for name in ("random_genome", "mutate", "crossover"):
        real = getattr(evolve, name)

        def noted(*args, real=real):
            made = real(*args)
            bred.append(made if isinstance(made, Genome) else made.genome)
            return made

        monkeypatch.setattr(evolve, name, noted)
    s = tiny(max_params=90_000)
    rows = search(s, 3)
    genomes = [Genome.from_json(r.genome) for r in rows]
    assert all(net.num_params(300) <= 90_000 and net.mixes_tokens for net in genomes)
    assert any(net.num_params(300) > 90_000 for net in bred) and any(not net.mixes_tokens for net in bred)
    assert len(evolve.breed(rows, 2, s, 300)) == 4  # two newcomers beside the survivors


def test_siblings_differ(free_params, monkeypatch):
    pool = [
        transformer(1, 64, 1, window=w, qk_norm=q, latent=d)
        for w in (0, 64)
        for q in (True, False)
        for d in (0, 32, 64)
    ]
    drawn = []
    monkeypatch.setattr(evolve, "random_genome", lambda rng: drawn.append(1) or rng.choice(pool))
    born = evolve.breed([], 0, tiny(**BIG), 300)
    assert len({t.genome.key for t in born}) == len(pool) == 12 and len(drawn) > 12


def test_nothing_new_to_breed_stops_the_run(free_params, monkeypatch):
    monkeypatch.setattr(evolve, "random_genome", lambda rng: NET)
    monkeypatch.setattr(Genome, "num_params", lambda net, vocab_size: 2)
    with pytest.raises(Stop, match="MAX_PARAMS"):
        evolve.breed([], 0, tiny(max_params=1), 300)


FAILURES = tuple(status for status in evolve.STATUSES if status != "ok")


@pytest.mark.parametrize("status", FAILURES)
def test_failures_never_survive(free_params, status):
    rows = search(tiny(**BIG), 4, status=lambda t: status if int(t.id[-2:]) % 3 == 0 else "ok")
    failed = {r.id for r in rows if r.status == status}
    assert failed and not failed & {p for r in rows for p in r.parents.split(",")}
    assert not failed & {r.id for r in rows if r.operator == "repeat"}
    assert not failed & {c.id for c in evolve.searched(rows)}
    assert all(r.val_bpb is None for r in rows if r.id in failed)


def test_a_generation_of_failures_begins_anew(free_params):
    rows = search(tiny(**BIG), 2, status=lambda t: "diverged")
    assert {r.operator for r in rows} == {"random"} and len({r.key for r in rows}) == 24


def test_baselines_are_never_parents(free_params):
    s = tiny(**BIG | dict(baseline_trials=8, repeats=3))
    baselines = tuned(s, val_bpb=0.1)
    tried = collections.Counter(evolve.family_of(id) for id in {r.id for r in baselines})
    assert tried == {"transformer": 8, "modern": 4, None: len(genome.LEVELS)}
    assert {r.generation for r in baselines} == {None}
    rows = search(s, 2)
    assert evolve.breed(baselines + rows, 2, s, 300) == evolve.breed(rows, 2, s, 300)
    assert evolve.noise_floor(baselines + rows) == evolve.noise_floor(rows)
    final = evolve.STAGES["final"](baselines + rows, s, 300)
    ids = sorted({r.id for r in baselines}, key=evolve.in_order)  # they are all as good
    rivals = [next(id for id in ids if id.startswith(family)) for family in genome.FAMILIES]
    assert [t.id for t in final] == [evolve.searched(rows)[0].id, *rivals] * 2
    line = {  # a block has 4 x 1,000 parameters here; those that are too large are left out
        100_000: ["transformer-1x64", "transformer-2x128", "transformer-5x128"],
        40_000: ["transformer-1x64-tied", "transformer-5x64-tied"],
        20_000: [],
    }
    for most, names in line.items():
        small = evolve.baseline_tasks([], tiny(max_params=most, baseline_trials=8), 300)
        assert [t.id for t in small] == names and all(t.genome.num_params(300) <= most for t in small)


def test_baselines_and_genomes_meet_the_same_batches(free_params):
    """In their first evaluations, whenever these are, and in the k-th repeat, which has batches of its own."""
    s = tiny(**BIG | dict(baseline_trials=8, repeats=3, seed=7))
    baselines, rows = tuned(s), search(s, 8)
    base, orders = 7 * evolve.SEEDS, {}
    for group in (baselines, rows):
        by_id = collections.defaultdict(list)
        for r in group:
            by_id[r.id].append(r)
        for own in by_id.values():
            assert [r.order for r in own] == [base + k for k in range(len(own))]
            assert len({r.seed for r in own}) == len(own)
        orders[len(orders)] = {r.order for r in group}
    assert orders[0] == orders[1] == {base, base + 1, base + 2}
    repeated = {r.id for r in baselines if r.order == base + 2}
    for family in genome.FAMILIES:
        best = [c.id for c in evolve.candidates(baselines) if c.id.startswith(family)][:3]
        assert len(best) == 3 and repeated >= set(best), "the best of a family are evaluated as often as survivors"
    assert {r.order for r in baselines if r.id in genome.LEVELS} == {base}


def test_hurdle_is_what_the_best_of_all_newcomers_had(free_params):
    s = tiny(**BIG, hurdle=0.25)
    rows = search(s, 3)
    newcomers = [r for r in rows if r.generation < 2 and r.operator != "repeat"]
    tasks = evolve.breed(rows, 2, s, 300)
    assert [t.hurdle for t in tasks[:3]] == [()] * 3 and len(newcomers) == 12 + 9
    assert tasks[-1].operator == "random" and tasks[-1].hurdle == ()  # an immigrant
    (hurdle,) = {t.hurdle for t in tasks[3:-1]}
    for (tenth, _), limit, best in zip(evolve.RUNGS, hurdle, (11, 6), strict=True):  # of 21 a half and a quarter
        losses = [r.curve[tenth - 1] for r in newcomers]
        assert limit == sorted(losses)[best - 1]
    stopped = [dataclasses.replace(r, status="stopped", val_bpb=None) for r in newcomers]
    assert evolve.hurdle_after(stopped, s) == hurdle, "who was stopped counts"
    assert {t.hurdle for t in evolve.breed([], 0, s, 300)} == {()}
    assert {t.hurdle for t in evolve.breed(rows, 2, tiny(**BIG, hurdle=1.0), 300)} == {()}
    assert {t.hurdle for t in evolve.breed(rows, 2, tiny(**BIG, hurdle=0.25, strategy="drift"), 300)} == {()}
    strangers = evolve.breed(rows, 2, tiny(**BIG, hurdle=0.25, strategy="random"), 300)[3:]
    assert {t.hurdle for t in strangers} == {hurdle}, "in a random search nobody is an immigrant"
    spared = [t.spared for g in range(30) for t in evolve.breed(rows, 3 + g, tiny(**BIG, hurdle_sample=0.5), 300)]
    assert 0.25 < sum(spared) / len(spared) < 0.5  # survivors, a quarter, meet no hurdle
    assert not any(t.spared for t in evolve.breed(rows, 2, tiny(**BIG, hurdle_sample=0.0), 300))


def test_what_the_hurdle_saved():
    def row(generation, id, hurdle, val_bpb, operator="change_op"):
        status = "stopped" if hurdle == "stopped" else "ok"
        made = task(id=id, generation=generation, operator=operator)
        seen = 4 if id == "g1.01" else 6 if hurdle == "stopped" else 10  # tenths that it trained in
        losses = ",".join(["3.0000"] * seen + ["nan"] * (10 - seen))
        return toy_result(made, status=status, val_bpb=val_bpb, hurdle=hurdle, losses=losses)

    rows = [row(0, "g0.01", "", 2.0), row(0, "g0.02", "", 3.0)]
    rows += [row(1, "g0.01", "", 2.0, "repeat"), row(1, "g1.01", "stopped", None), row(1, "g1.02", "spared", 2.5)]
    rows += [row(2, "g2.01", "spared", 2.8), row(2, "g2.02", "passed", 1.0), row(2, "g2.03", "stopped", None)]
    rows += [row(2, "g1.02", "", 2.5, "repeat"), row(2, "g0.01", "", 2.0, "repeat")]
    text = evolve.hurdle_section(rows, tiny(), evolve.leaders_by_generation(rows, 2))[0]
    assert text == ("The hurdle stopped 2 of 7 newcomers and saved 12% of the training in the search; 2 that missed it "
                    "ran on, 1 of them into the best.")  # fmt: skip


def test_noise_floor():
    rows = [toy_result(task(id=id, seed=i), val_bpb=v) for i, (id, v) in enumerate(
        [("a", 1.0), ("a", 1.2), ("b", 2.0), ("b", 2.0), ("b", 2.3), ("c", 9.0)])]  # fmt: skip
    # a: squares 0.02 on 1 degree of freedom; b: 0.06 on 2
    assert evolve.noise_floor(rows) == pytest.approx(math.sqrt(0.08 / 3))
    assert evolve.noise_floor(rows[-1:]) is None
    assert [(c.id, c.mean) for c in evolve.searched(rows)] == [("a", 1.1), ("b", pytest.approx(2.1)), ("c", 9.0)]


def test_failed_repeats_count_and_a_second_failure_ends_it(free_params):
    """A survivor that fails in every repeat is not tried for ever, and does not breed for ever."""
    s = tiny(**BIG | dict(repeats=3))
    best = toy_result(task(transformer(1, 64, 1), id="g0.01"), val_bpb=0.5)
    nets = itertools.islice(narrow_genomes(3), 3)
    others = [toy_result(task(net, id=f"g0.{i:02d}"), val_bpb=1.0 + i) for i, net in enumerate(nets, start=2)]

    def tried(*statuses: str) -> evolve.Candidate | None:
        rows = [best, *others]
        for n, status in enumerate(statuses, start=1):
            again = task(transformer(1, 64, 1), id="g0.01", seed=5 + n, generation=n, operator="repeat")
            rows.append(toy_result(again, status))
        repeats = [t.id for t in evolve.breed(rows, 9, s, 300) if t.operator == "repeat"]
        found = next((c for c in evolve.searched(rows) if c.id == "g0.01"), None)
        assert ("g0.01" in repeats) == (found is not None and found.tried < 3)
        return found

    assert tried() == evolve.Candidate("g0.01", (0.5,), 1, 0, transformer(1, 64, 1), best, "g0.01")
    for status in ("oom", "timeout", "crash", "stalled"):
        assert (tried(status).tried, tried(status).scores) == (2, (0.5,))
        assert tried(status, "ok").tried == 3
        assert tried(status, status) is None
    for status in ("diverged", "leak", "dead"):
        assert tried(status) is None


def test_ties_break_by_number(free_params):
    rows = [toy_result(task(net, id=id), val_bpb=1.0)
            for id, net in zip(("g10.01", "g2.10", "g2.02", "g1.01"), narrow_genomes(1), strict=False)]  # fmt: skip
    for order in itertools.permutations(rows):
        assert [c.id for c in evolve.searched(list(order))] == ["g1.01", "g2.02", "g2.10", "g10.01"]


# ----------------------------------------------------------------------------------------------------------------------
# The plan: what comes next, from the rows alone


def as_evaluations(rows: list[Result]) -> list[tuple]:
    """All of them but what depends on the clock."""
    return [dataclasses.astuple(dataclasses.replace(r, finished="")) for r in rows]


@pytest.mark.parametrize("strategy", [*evolve.SELECTION, "random"])
def test_a_plan_goes_on_from_anywhere(free_params, strategy):
    """Whatever part of a stage or generation is done, in whatever order, the run ends with the same evaluations."""
    s, rng = tiny(strategy=strategy, prescreen=3, **ALL_STAGES), random.Random(0)

    def result(t: Task) -> Result:
        """Short designs are better, so that the best have room to grow."""
        found = toy_result(t)
        return dataclasses.replace(found, val_bpb=found.val_bpb + 0.1 * len(t.genome.genes))

    whole = list(rounds([], s, result))
    rows = list(itertools.chain(*whole))
    assert evolve.next_tasks(rows, s, 300) == []
    stages = [stage for stage, _ in itertools.groupby(r.stage for r in rows)]
    assert stages == list(evolve.STAGES)
    sizes = collections.Counter((r.stage, r.generation) for r in rows)
    tried = {r.id for r in rows if r.stage == "baseline"}
    assert len(tried) == 7 + 4 + len(genome.LEVELS)
    assert sizes["baseline", None] == len(tried) + 2 * 2 * 2  # two survivors of each family, twice more
    assert [sizes["search", g] for g in range(4)] == [4, 4, 4, 0]
    assert sizes["final", None] == 2 * 3 and sizes["target", None] == 2 * 4  # one finalist, two families; two seeds
    assert sizes["grow", None] >= 3 * 2 and sizes["long", None] == 2 * 4 and sizes["passes", None] == 2 * 3
    for done in range(0, len(rows), 2 if strategy == "elites" else 12):
        shuffled = [rng.sample(found, len(found)) for found in whole]  # several workers finish in any order
        part = list(itertools.chain(*shuffled))[:done]
        again = planned(part, s, result=result)
        assert sorted(as_evaluations(again), key=str) == sorted(as_evaluations(rows), key=str)
        assert len(again) == len(rows), "nothing is evaluated twice"


def test_the_plan_is_a_pure_function(free_params):
    s = tiny(max_params=10**9)
    rows = planned([], s, 13)
    before = list(rows)
    random.seed(1)
    first = evolve.next_tasks(rows, s, 300)
    random.seed(2)
    assert evolve.next_tasks(rows, s, 300) == first and rows == before
    assert {t.stage for t in first} == {"search"} and len({t.generation for t in first}) == 1


def test_more_generations_are_asked_for_when_there_shall_be_more(free_params):
    s, more = (tiny(max_params=10**9, max_generations=n) for n in (3, 4))
    rows = planned([], s)
    asked = evolve.next_tasks(rows, more, 300)
    assert {(t.stage, t.generation) for t in asked} == {("search", 3)} and len(asked) == 4
    extended = planned(rows, more)
    assert extended[: len(rows)] == rows and evolve.next_tasks(extended, more, 300) == []
    until_final = [[r for r in found if r.stage in ("baseline", "search")] for found in (extended, planned([], more))]
    assert as_evaluations(until_final[0]) == as_evaluations(until_final[1])
    finalists = {t.id for t in evolve.final_evaluations(extended, more, 300)}
    assert {r.id for r in extended if r.stage == "final"} >= finalists
    assert evolve.next_tasks(rows, tiny(max_params=10**9, max_generations=0), 300) == []
    none = planned([], tiny(max_params=10**9, max_generations=0))
    assert {r.stage for r in none} == {"baseline"}, "without a finalist there is no final"


def test_test_is_read_by_the_final_and_what_follows_alone(free_params):
    rows, s = [], tiny(**ALL_STAGES)
    budgets = dict(target=set(evolve.TARGET_AT), grow={2.0}, long={2.0})
    while tasks := evolve.next_tasks(rows, s, 300):
        (stage,) = {t.stage for t in tasks}
        assert {t.budget for t in tasks} == budgets.get(stage, {1.0})
        assert {t.text for t in tasks} == ({0.5} if stage == "passes" else {1.0})
        assert {t.test for t in tasks} == {stage in ("final", "target", "long", "passes")}
        assert {t.hurdle for t in tasks if t.stage != "search"} <= {()}
        rows += map(toy_result, tasks)
    assert all((r.test_bpb is not None) == (r.stage in ("final", "target", "long", "passes")) for r in rows)
    chosen_by = {"final": ("baseline", "search"), "long": ("baseline", "search", "final", "grow")}
    for stage, before in chosen_by.items():  # who is chosen is not scored with the seeds that chose it
        for what in ("seed", "order"):
            own = {getattr(r, what) for r in rows if r.stage == stage}
            assert own and not own & {getattr(r, what) for r in rows if r.stage in before}


def test_seeds_of_runs_are_apart(free_params):
    """Two values of SEED share no evaluation seed, and the finals share none with a long search."""
    seeds = []
    for seed in range(3):
        rows = planned([], tiny(**ALL_STAGES, seed=seed))
        seeds.append({s for r in rows for s in (r.seed, r.order)})
        first = {stage: min(r.seed for r in rows if r.stage == stage) - min(seeds[-1]) for stage in evolve.STAGES}
        assert first["final"] == evolve.SEEDS // 2 and first["long"] == first["grow"] + 1 > evolve.SEEDS * 3 // 4
        assert max(seeds[-1]) - min(seeds[-1]) < evolve.SEEDS
    assert not (seeds[0] & seeds[1] or seeds[1] & seeds[2] or seeds[0] & seeds[2])


@pytest.mark.parametrize("status", [status for status in evolve.STATUSES if status != "ok"])
def test_what_failed_in_the_final_is_asked_for_once_more(free_params, status):
    s = tiny(**ALL_STAGES)
    whole = planned([], s)
    for stage in ("final", "target", "grow", "long", "passes"):
        start = next(n for n, r in enumerate(whole) if r.stage == stage)
        before, own = whole[:start], [r for r in whole if r.stage == stage]
        failed = dataclasses.replace(own[1], status=status, val_bpb=None, test_bpb=None)
        rows = [*before, own[0], failed, *own[2:]]
        (task,) = evolve.next_tasks(rows, s, 300)
        assert (task.stage, task.evaluation, task.order) == (stage, failed.evaluation, failed.order)
        for again in (failed, own[1]):
            more = evolve.next_tasks([*rows, again], s, 300)
            assert failed.evaluation not in {t.evaluation for t in more}, "there is no third attempt"
    searched = next(r for r in whole if r.stage == "search")
    before = [r for r in whole if r.stage in ("baseline", "search")]
    rows = [dataclasses.replace(r, status=status, val_bpb=None) if r is searched else r for r in before]
    assert searched.evaluation not in {t.evaluation for t in evolve.next_tasks(rows, s, 300)}
