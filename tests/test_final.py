"""The final adds up, and best_genome.json says what it was."""

import dataclasses
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALL_STAGES, planned, task, tiny, toy_result

import evolve
from evolve import Record, Result
from genome import Genome, transformer


def test_intervals_by_hand():
    two = evolve.estimate([1.0, 2.0])
    assert (two.mean, two.half) == (1.5, pytest.approx(12.706 * 0.70711 / 1.41421, rel=1e-4))
    five = evolve.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (five.mean, five.half) == (3.0, pytest.approx(2.776 * 1.58114 / 2.23607, rel=1e-4))
    assert f"{five}" == "3.0000 ± 1.9629"
    assert evolve.estimate([1.5]) == evolve.Estimate(1.5, None, (1.5,))
    assert f"{evolve.estimate([1.5])}" == "1.5000 ± ?"


@pytest.mark.parametrize("n", [2, 3, 5, 12, 31, 32, 60])
def test_student_t(n):
    """95 % of Student's distribution lies within: its density, summed up numerically."""
    spread = evolve.estimate([0.0] * (n - 1) + [1.0])
    t, df = spread.half * math.sqrt(n) / statistics.stdev(spread.values), n - 1
    x = np.linspace(-t, t, 200_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    assert np.sum((density[1:] + density[:-1]) / 2) * (x[1] - x[0]) == pytest.approx(0.95, abs=3e-4)


@pytest.fixture
def two_families(monkeypatch):
    monkeypatch.setattr(evolve, "FAMILIES", {name: None for name in ("transformer", "other")})


def final_rows(tests: dict[str, list[float | None]], settings) -> list[Result]:
    """Three genomes of a search, two kinds of baselines, and their final with these test scores; None for a failure."""
    genomes = {f"g0.{i:02d}": transformer(1, 64, 1, window=w) for i, w in enumerate((0, 64, 256))}
    rows = [toy_result(task(net, id=id), val_bpb=1.0 + 0.1 * i) for i, (id, net) in enumerate(genomes.items())]
    by_hand = task(transformer(1, 64, 1), stage="baseline", id="transformer-1x64", generation=None, operator="", seed=0)
    rows += [toy_result(by_hand, val_bpb=1.5)]
    for id, value in (("transformer-2x64", 1.7), ("other-1x64", 1.6), ("gru-1x64", 1.1)):
        rows.append(toy_result(dataclasses.replace(by_hand, id=id), val_bpb=value))
    for t in evolve.STAGES["final"](rows, settings, 300):
        value = tests[t.id].pop(0)
        if value is None:
            rows += [toy_result(t, "diverged", test_bpb=None)] * 2
        else:
            rows.append(toy_result(t, test_bpb=value, val_bpb=value - 0.1))
    return rows


def outcome(rows: list[Result], settings) -> evolve.Outcome:
    return evolve.outcome(rows, settings, 300)


def test_the_final_adds_up():
    s = tiny(finalists=2, final_seeds=3)
    tests = {"g0.00": [1.30, 1.10, 1.20], "g0.01": [1.10, 1.15, 1.05], "transformer-1x64": [1.50, 1.60, 1.40]}
    rows = final_rows(tests, s)
    assert len({r.seed for r in rows if r.stage == "final"}) == 3
    assert not {r.seed for r in rows if r.stage == "final"} & {r.seed for r in rows if r.stage != "final"}
    before = outcome(rows[:-1], s)  # all of it is done
    assert (before.final, before.winner, before.rival) == ([], None, None)
    o = outcome(rows, s)
    first, second, rival = o.final
    assert [f.id for f in (first, second, rival)] == ["g0.01", "g0.00", "transformer-1x64"]
    assert (o.winner, o.rival, o.long, o.passes, o.grown) == (first, rival, [], [], None)
    # by hand: 1.10, with a standard deviation of 0.05, times 4.303 / sqrt(3)
    assert (first.test.mean, first.test.half) == (pytest.approx(1.1), pytest.approx(0.12421, abs=1e-4))
    assert (first.val.mean, first.passes) == (pytest.approx(1.0), 2.0)
    # leads by seed: 0.40, 0.45, 0.35 and 0.20, 0.50, 0.20
    lead, other = (f.leads["transformer-1x64"] for f in (first, second))
    assert (lead.mean, lead.half) == (pytest.approx(0.4), pytest.approx(0.12421, abs=1e-4))
    assert (other.mean, other.half) == (pytest.approx(0.3), pytest.approx(0.43030, abs=1e-4))
    assert rival.leads == {} and {f.failed for f in (first, second, rival)} == {0}
    line = next(line for line in evolve.final_section(rows, s, o) if line.startswith("| g0.01"))
    cells = ["g0.01", "1.1000 ± 0.1242", "1.0000 ± 0.1242", "1.1000", "3", "2.00", "+0.4000 ± 0.1242"]
    found = line.strip("| ").split(" | ")
    assert found[:6] + found[7:] == cells  # the seventh, tokens a second, is drawn at random


def test_leads_are_over_the_best_of_each_family_and_the_best_in_the_final_first(two_families):
    s = tiny(finalists=1, final_seeds=2)
    rows = final_rows({"g0.00": [1.2, 1.3], "transformer-1x64": [1.6, 1.6], "other-1x64": [1.4, 1.6]}, s)
    best, second, third = (o := outcome(rows, s)).final
    assert (best.id, second.id, third.id) == ("g0.00", "other-1x64", "transformer-1x64") and o.rival is second
    assert list(best.leads) == ["other-1x64", "transformer-1x64"] and second.leads == third.leads == {}
    assert best.leads["other-1x64"].values == (pytest.approx(0.2), pytest.approx(0.3))
    assert best.leads["transformer-1x64"].values == (pytest.approx(0.4), pytest.approx(0.3))
    assert winner(rows, s)["rival"]["id"] == "other-1x64"


def winner(rows: list[Result], settings) -> dict:
    return evolve.best_genome(rows, {"seed": 0}, settings, outcome(rows, settings))


def test_failures_in_the_final():
    s = tiny(finalists=2, final_seeds=3)
    # the better one failed once: it cannot win by that, and its lead counts the pairs that are
    tests = {"g0.00": [1.30, 1.10, 1.20], "g0.01": [None, 1.15, 1.05], "transformer-1x64": [1.50, 1.60, None]}
    o = outcome(rows := final_rows(tests, s), s)
    assert [(f.id, f.failed) for f in o.final] == [("g0.00", 0), ("transformer-1x64", 1), ("g0.01", 1)]
    leads = {f.id: [lead.values for lead in f.leads.values()] for f in o.final}
    assert o.final[2].test.values == (1.15, 1.05) and leads["g0.01"] == [(pytest.approx(0.45),)]
    assert leads["g0.00"] == [(pytest.approx(0.2), pytest.approx(0.5))]
    assert winner(rows, s)["id"] == "g0.00"
    assert "\n".join(evolve.final_section(rows, s, o)).count(", 1 failed") == 2
    # the transformer failed: there is a winner without a lead
    tests = {"g0.00": [1.30, 1.10, 1.20], "g0.01": [1.1, 1.15, 1.05], "transformer-1x64": [None] * 3}
    rows = final_rows(tests, s)
    best, o = winner(rows, s), outcome(rows, s)
    assert (best["id"], best["stage"], best["final"]["winner"]["leads"]) == ("g0.01", "final", {})
    assert best["final"]["baselines"] == [] and o.rival is None and o.target is None
    assert "g0.01" in evolve.end_text(rows, s, 300, {}, Path("out")) and best["rival"]["id"] == "transformer-1x64"
    # one that failed once is the rival all the same where it is the best of them
    tests = {"g0.00": [1.3, 1.1], "g0.01": [1.4, 1.4], "transformer-1x64": [1.2, None], "other-1x64": [1.5, 1.6]}
    two = tiny(finalists=2, final_seeds=2)
    o = outcome(rows := final_rows(tests, two), two)
    assert (o.rival.id, o.rival.failed) == ("transformer-1x64", 1)
    assert [r[0].id for r in evolve.first_two(rows, two, 300)] == ["g0.00", "transformer-1x64"]
    # everyone failed: the best of the search stands, unconfirmed
    rows = final_rows({name: [None] * 3 for name in tests}, s)
    best = winner(rows, s)
    assert (best["id"], best["stage"]) == ("g0.00", "search") and "final" not in best
    assert "No genome was scored in a final" in evolve.end_text(rows, s, 300, {}, Path("out"))


def test_the_transformer_is_no_winner():
    s = tiny(finalists=2, final_seeds=2)
    tests = {"g0.00": [1.3, 1.2], "g0.01": [1.4, 1.5], "transformer-1x64": [1.0, 1.1]}
    best = winner(final_rows(tests, s), s)
    lead = best["final"]["winner"]["leads"]["transformer-1x64"]
    assert best["id"] == best["final"]["winner"]["id"] == "g0.00" and lead["mean"] == pytest.approx(-0.2)
    assert [b["id"] for b in best["final"]["baselines"]] == [best["rival"]["id"]] == ["transformer-1x64"]
    assert Genome.from_dict(best["rival"]["genome"]) == transformer(1, 64, 1)


def test_best_genome_can_be_checked(play, tmp_path):
    assert (
        play("--max-generations=4", "--finalists=2", "--mutation-rate=0.9", "--long-seeds=2", "--long-factor=2")[0] == 0
    )
    best = json.loads((tmp_path / "out" / "best_genome.json").read_text())
    with Record(tmp_path / "out") as record:
        rows, run = record.rows, record.header
    assert Genome.from_dict(best["genome"]).key == next(r.key for r in rows if r.id == best["id"])
    final = [r for r in rows if r.stage == "final"]
    scores = {id: [r.val_bpb for r in final if r.id == id] for id in {r.id for r in final if r.id.startswith("g")}}
    assert len(scores) == 2 and best["id"] == min(scores, key=lambda id: sum(scores[id]))
    first, (rival,) = best["final"]["winner"], best["final"]["baselines"]
    assert first["val"]["values"] == scores[best["id"]], "ranked by val, so that test is not the best of several"

    def tests(stage: str, id: str) -> list[float]:
        return [r.test_bpb for r in rows if r.stage == stage and r.id == id]

    long, passes = best["long"], best["passes"]
    assert (first["id"], rival["id"], best["rival"]["id"]) == (best["id"], "transformer-1x64", "transformer-1x64")
    assert (long["as_found"]["id"], passes["winner"]["id"]) == (best["id"], best["id"])
    assert long["grown"]["id"].partition("+")[0] in scores and long["grown"]["id"].partition("+")[2] in ("1", "2")
    assert (long["budget_factor"], passes["share_of_text"]) == (2.0, 0.5)
    told = [("final", x) for x in (first, rival)] + [("passes", x) for x in (passes["winner"], *passes["baselines"])]
    told += [("long", x) for x in (long["as_found"], long["grown"], *long["baselines"])]
    assert len(told) == 2 + 2 + 3
    for stage, x in told:
        assert x["test"]["values"] == tests(stage, x["id"]) and len(x["test"]["values"]) == 2
        row = next(r for r in rows if r.stage == stage and r.id == x["id"])
        assert Genome.from_dict(x["genome"]).key == row.key and x["summary"] == row.summary
        assert x["passes"] == pytest.approx(row.passes)
        for name, lead in x["leads"].items():
            pairs = zip(tests(stage, name), tests(stage, x["id"]), strict=True)
            assert lead["values"] == [theirs - own for theirs, own in pairs]
    assert all(len(x["leads"]) == x["id"].startswith("g") for _, x in told)
    target = best["time_to_target"]
    assert target["seeds_that_reach_it"] == 2 and 0 < target["share_of_budget"]["mean"] < 1
    assert best["search_val_bpb"] == [r.val_bpb for r in rows if r.id == best["id"] and r.stage == "search"]
    assert (
        best["settings"] == run
        and best["settings"]["mutation_rate"] == 0.9
        and run["data"] == "texts" + run["data"][5:]
    )
    assert best["torch"] == torch.__version__ and run["device"] == "cpu"
    first = {r.id: r for r in reversed(rows) if r.stage == "search" and r.operator != "repeat"}
    family, todo = set(), {best["id"]}
    while todo:
        family |= todo
        todo = {p for id in todo for p in first[id].parents.split(",") if p} - family
    assert [a["id"] for a in best["lineage"]] == sorted(family) and best["lineage"][-1]["id"] == best["id"]
    assert all(a["val_bpb"] == first[a["id"]].val_bpb for a in best["lineage"])


def test_the_winner_is_the_one_of_val(monkeypatch):
    monkeypatch.setattr(evolve, "FAMILIES", {})
    s = tiny(finalists=2, final_seeds=2)
    rows = final_rows({"g0.00": [1.3, 1.3], "g0.01": [1.2, 1.2]}, s)
    swap = {1.2: 1.5, 1.3: 1.4}  # on test it is the other way round
    rows = [dataclasses.replace(r, test_bpb=swap[r.test_bpb]) if r.stage == "final" else r for r in rows]
    assert [f.id for f in outcome(rows, s).final] == ["g0.01", "g0.00"] and winner(rows, s)["id"] == "g0.01"


def strict_json(text: str) -> dict:
    def refused(constant: str):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refused)


def test_best_genome_is_strict_json(free_params, tmp_path):
    """No NaN and no Infinity, which other programs cannot read; for one value there is no interval."""
    short, long = tiny(finalists=1, final_seeds=2), tiny(**ALL_STAGES)
    header = {"data": "text", "device": "cpu", "vocab_size": 300}
    half = final_rows({"g0.00": [1.30, None], "transformer-1x64": [None, 1.6]}, short)
    whole = final_rows({"g0.00": [1.3, 1.2], "transformer-1x64": [1.5, 1.6]}, short)
    for rows, s in ((half, short), (half[:3], short), (whole, short), (planned([], long), long)):
        evolve.write_reports(tmp_path, rows, header, s, {})
        best = strict_json((tmp_path / "best_genome.json").read_text(encoding="utf-8"))
        assert best["id"] == best["lineage"][-1]["id"] and (best["id"] == "g0.00" or s is long)
    assert best["long"]["grown"] and best["passes"]["winner"] and best["time_to_target"]["share_of_budget"]
    evolve.write_reports(tmp_path, half, header, short, {})
    best = strict_json((tmp_path / "best_genome.json").read_text(encoding="utf-8"))
    own = best["final"]["winner"]
    assert own["test"] == {"mean": 1.3, "half": None, "values": [1.3]} and own["leads"] == {}
    assert best["time_to_target"] == {"share_of_budget": None, "seeds_that_reach_it": None}, "not known"
