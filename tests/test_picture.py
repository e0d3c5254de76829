"""The picture shows what the rows say."""

import dataclasses
import itertools
import math
import random
import re

import pytest
from helpers import ALL_STAGES, BIG, narrow_genomes, planned, png_size, search, task, tiny, toy_result, tuned

import evolve
from evolve import Result, Stop
from genome import Gene, Genome


def picture(rows: list[Result], title: str = "a title", controls: dict | None = None, settings=None) -> bytes | None:
    settings = settings or tiny(**BIG)
    return evolve.picture(rows, title, controls or {}, evolve.outcome(rows, settings, 300), settings)


def test_the_picture(free_params):
    s = tiny(**BIG)
    rows = search(s, 5)
    baselines = tuned(s)
    first = [r for r in rows if r.generation == 0]
    odd = [dataclasses.replace(r, val_bpb=1.0, params=0, tokens_per_s=0) for r in first]
    unknown = [dataclasses.replace(r, params=None, tokens_per_s=None) for r in first]
    sizes = set()
    for name, drawn in {
        "many generations": baselines + rows,
        "one generation, no noise known, no baselines": first,
        "one row": first[:1],
        "failures among them": [*first[:2], *search(s, 3, status=lambda t: "diverged"), *baselines[:1]],
        "all the same": odd,
        "what was not measured": unknown,
        "one far off": [*rows, dataclasses.replace(rows[0], id="far", val_bpb=1e6)],
        "5 $ a trial, \\frac{ and $x^{2": first,
        "a title " * 60: first,
    }.items():
        sizes.add(png_size(picture(drawn, f"a title: {name}")))
    assert len(sizes) == 1 and min(next(iter(sizes))) > 500
    for drawn in ([], baselines, search(s, 2, status=lambda t: "crash")):
        assert picture(drawn, "nothing was scored") is None
    controls = {("strategy", "random"): search(s, 2), ("strategy", "drift"): [], ("seed", 1): rows}
    assert picture(rows) == picture(rows) != picture(rows, controls=controls)


def test_the_picture_shows_how_the_lead_lasts(free_params):
    """Once there is a winner: a panel more, of which each final is a part as soon as it is done."""
    s, drawn = tiny(**ALL_STAGES), {}
    rows = planned([], s)
    for stage, after in itertools.pairwise([*evolve.STAGES, "the end"]):
        part = list(itertools.takewhile(lambda r, after=after: r.stage != after, rows))
        drawn[stage] = picture(part, settings=s)
    heights = {stage: png_size(content)[1] for stage, content in drawn.items() if content}
    assert drawn["baseline"] is None and heights["search"] < heights["final"]
    assert {heights[stage] for stage in ("final", "target", "grow", "long", "passes")} == {heights["final"]}
    assert len({drawn[stage] for stage in ("final", "target", "long", "passes")}) == 4
    assert drawn["target"] == drawn["grow"]


def test_a_picture_that_dies_is_a_line(free_params, tmp_path, monkeypatch, capsys):
    """Whatever it dies of; best_genome.json is there, and what a full disk says is not swallowed."""
    rows, header = search(tiny(**BIG), 1), {"data": "text", "device": "cpu", "vocab_size": 300}

    def dies(axis, *_):
        raise ZeroDivisionError("no room for a legend")

    with monkeypatch.context() as patch:
        patch.setattr(evolve, "draw_costs", dies)
        evolve.write_reports(tmp_path, rows, header, tiny(**BIG), {})
    told = r"progress.png was not made: ZeroDivisionError: no room for a legend \(evolve.py:\d+ in picture\)\n"
    assert re.fullmatch(told, capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"best_genome.json", "report.md"}
    evolve.write_reports(tmp_path, rows, header, tiny(**BIG), {})
    assert png_size((tmp_path / "progress.png").read_bytes())
    (tmp_path / "progress.png").unlink()
    (tmp_path / "progress.png").mkdir()
    with pytest.raises(Stop, match="progress"):
        evolve.write_reports(tmp_path, rows, header, tiny(**BIG), {})


def axis_of(draw, *args):
    """An axis that something was drawn on, of no picture of pyplot."""
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    draw(axis, *args)
    return axis


def test_best_so_far_never_rises(free_params):
    """The mean of all evaluations of the best that was new by then: what later looks worse was never the best."""
    nets = list(itertools.islice(narrow_genomes(2), 4))

    def row(id: str, generation: int, score: float) -> Result:
        return toy_result(task(nets[int(id[-1])], id=id, generation=generation, seed=generation), val_bpb=score)

    rows = [row("g0.1", 0, 1.0), row("g0.2", 0, 1.3), row("g0.1", 1, 1.6), row("g1.1", 1, 1.35), row("g3.3", 3, 1.1)]
    assert evolve.best_so_far(rows, [0, 1, 2, 3]) == pytest.approx([1.3, 1.3, 1.3, 1.1])
    assert evolve.best_so_far(rows, [1, 3, 4]) == pytest.approx([1.3, 1.1, math.nan], nan_ok=True)
    late = [dataclasses.replace(r, generation=r.generation + 2) for r in rows]
    assert evolve.best_so_far(late, [0, 1, 2]) == pytest.approx([math.nan, math.nan, 1.3], nan_ok=True)
    assert evolve.best_so_far([], [0]) == pytest.approx([math.nan], nan_ok=True)
    for seed in range(5):
        rows = search(tiny(**BIG, seed=seed), 8, score=lambda net, seed: random.Random(f"{net.key}{seed}").random())
        line = evolve.best_so_far(rows, list(range(8)))
        assert all(a >= b for a, b in itertools.pairwise(line)) and line[-1] == evolve.searched(rows)[0].mean


def test_one_generation_can_be_seen(free_params):
    rows = search(tiny(**BIG), 3)
    first = [r for r in rows if r.generation == 0]
    for drawn, last in ((first, 0), (rows, 2)):
        axis = axis_of(evolve.draw_scores, drawn, drawn, list(range(last + 1)), last, {})
        lines = {line.get_label(): line for line in axis.lines}
        for label in ("median of those with a score", "best so far, mean of its evaluations"):
            assert (lines[label].get_marker() == "o") == (last == 0)


def test_the_picture_shows_controls_as_far_as_they_went(free_params):
    rows, short = (
        [dataclasses.replace(r, seconds=1.0) for r in search(tiny(**BIG, seed=seed), n)] for seed, n in ((0, 4), (1, 2))
    )
    better = [dataclasses.replace(r, val_bpb=r.val_bpb - 0.5) for r in short]
    controls = {("strategy", "random"): rows, ("seed", 10): short, ("seed", 2): better, ("seed", 3): []}
    axis = axis_of(evolve.draw_scores, rows, rows, [0, 1, 2, 3], 3, controls)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert drawn["best so far, random search for as long"] == drawn["best so far, mean of its evaluations"]
    ours = drawn["best so far, other seeds"]  # of seed 2, the first
    assert ours[:2] == evolve.best_so_far(better, [0, 1]) and all(map(math.isnan, ours[2:]))
    assert [text.get_text() for text in axis.texts][:2] == [" seed 2", " seed 10"]
    assert axis.get_ylim()[0] < min(ours[:2]), "a seed that is better is in the picture"
    axis = axis_of(evolve.draw_scores, rows, rows, [0, 1, 2, 3], 3, {("strategy", "drift"): short})
    assert "best so far, drift search, stopped after 0 minutes" in [line.get_label() for line in axis.lines]


def test_another_run_is_shown_where_this_one_had_taken_as_long(free_params):
    """A control whose evaluations take half as long is two generations further at the end of each."""
    rows = [dataclasses.replace(r, seconds=1.5, outside=0.5) for r in search(tiny(**BIG), 2)]
    fast = [dataclasses.replace(r, seconds=1.0) for r in search(tiny(**BIG, seed=1), 5)]
    moved = evolve.as_long(rows, fast)
    assert len(moved) == 2 * len(rows) and [r.id for r in moved] == [r.id for r in fast[: len(moved)]]
    assert [r.generation for r in moved] == [r.generation // 2 for r in fast[: len(moved)]]
    assert evolve.as_long(rows, []) == evolve.as_long([], fast) == []


def test_the_picture_is_about_the_better_evaluations(free_params):
    s = tiny(**BIG)
    rows = search(s, 4)
    baseline = tuned(s)[0]
    rows += [baseline, dataclasses.replace(baseline, id="far-1", val_bpb=1e5)]
    rows += [dataclasses.replace(rows[0], id="far", val_bpb=1e6)]
    rows += [
        dataclasses.replace(rows[0], id="lucky", val_bpb=0.5),
        dataclasses.replace(rows[0], id="lucky", val_bpb=5.0),
    ]
    best = evolve.best_so_far(rows, [0, 1, 2, 3])
    axis = axis_of(evolve.draw_scores, rows, evolve.of_stage(rows, "search"), [0, 1, 2, 3], 3, {})
    low, high = axis.get_ylim()
    assert low < 0.5 and max(best) < high < 1e5, "the best evaluation is seen, even of a genome that is not good"
    assert any("far 100000" in text.get_text() for text in axis.texts), "what lies above is named"


def test_what_became_of_every_op(free_params):
    s = tiny(**BIG)
    linear, both = (Genome((Gene("linear", 64), *more)) for more in ((), (Gene("attention", 64), Gene("norm"))))
    rows = []
    for generation, (name, net, score) in enumerate(
        [("a", both, 3.0), ("b", linear, 2.0), ("c", linear, 1.5), ("d", linear, 1.0)]
    ):
        for seed, operator in enumerate(("random", "repeat")):
            made = task(net, seed, name, generation=generation, operator=operator)
            rows.append(toy_result(made, val_bpb=score))
    losses, leaders = evolve.halfway_losses(rows, s), evolve.leaders_by_generation(rows, s.survivors)
    lines = evolve.features_section(rows, losses, evolve.steps(rows, losses), leaders, linear)
    told = {line.split(" | ")[0]: line.split(" | ")[1:4] for line in lines if line.startswith("| ")}
    assert told["| linear"] == ["4", "the end", "1"] and told["| attention"] == ["1", "generation 2", "—"]
    assert "| gru" not in told and "in nats per token. Above zero a part helps" in lines[0]


def test_lineage(free_params):
    """The first evaluations of all ancestors, oldest first; g10 after g9."""
    nets = narrow_genomes(4)

    def row(id: str, parents: str = "", operator: str = "change_op", seed: int = 0) -> Result:
        generation = int(id[1:].partition(".")[0])
        return toy_result(
            task(next(nets), seed, id, generation=generation, parents=tuple(parents.split()), operator=operator)
        )

    rows = [row("g0.01", operator="random"), row("g0.02", operator="random"), row("g0.03", operator="random")]
    rows += [row("g9.01", "g0.01 g0.03", "crossover"), row("g0.01", operator="repeat", seed=9), row("g9.02", "g0.02")]
    rows += [row("g10.01", "g9.01"), row("g11.01", "g10.01 g0.03", "crossover+change_op")]
    found = evolve.lineage(rows, "g11.01")
    assert found == [rows[0], rows[2], rows[3], rows[6], rows[7]] and evolve.lineage(rows, "no such") == []
