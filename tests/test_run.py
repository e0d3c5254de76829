"""Whole runs and commands: stopped anywhere they end as one that was not."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ALL_KINDS,
    FLAGS,
    NET,
    ROOT,
    family_of_transformers,
    final_task,
    first_time,
    forked,
    in_child,
    is_alive,
    padded,
    planted,
    png_size,
    rows_of,
    task,
    tiny,
    toy,
    toy_result,
    wait_until,
    with_gene,
)

import evolve
import genome
import prepare
from evolve import Record, Result, Stop, Task
from genome import Gene, Genome, Op, transformer

pytestmark = pytest.mark.usefixtures("cache")
KILLS = int(os.environ.get("GENESIS_KILLS", 8))  # of one run, see kill_run.py


@pytest.fixture(scope="module")
def kill_run(cache, data_dir, tmp_path_factory):
    """kill_run.py, at work on another core while the tests run."""
    out = tmp_path_factory.mktemp("kills") / "runs"
    command = [sys.executable, ROOT / "tests" / "kill_run.py", out, data_dir, str(KILLS), "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process
    process.kill()


def test_what_takes_long_is_started(kill_run):
    """First in the file, so that it works while the rest is tested."""
    assert kill_run.poll() is None


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs, of toys

WHOLE = 28  # evaluations of a run that is played
THE_FINAL = "bits per byte on test after 1,024 tokens"
LONG_STEP = ("--long-seeds=2", "--long-factor=2")  # the second step of the final


def files_of(out: Path) -> dict[str, bytes]:
    """Without the lock, which holds nothing."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_a_run_and_what_comes_after_it(play, tmp_path):
    out = tmp_path / "out"
    code, output = play()
    first, rows = files_of(out), rows_of(out)
    assert code == 0 and set(first) == {"results.tsv", "best_genome.json", "progress.png", "report.md"}
    assert collections.Counter(r.generation for r in rows) == {None: 4 + 4 + 8, 0: 4, 1: 4, 2: 4}
    assert collections.Counter(r.stage for r in rows) == {"baseline": 4, "search": 12, "final": 4, "target": 8}
    assert output.count("generation 0:") == output.count("generation 2:") == 1 and THE_FINAL in output
    assert first["progress.png"] == b"28 rows" and len(rows) == WHOLE
    # raising MAX_GENERATIONS goes on
    code, output = play("--max-generations=5")
    assert code == 0 and f"Going on with the run in {out}/results.tsv: {WHOLE} evaluations" in output
    assert "generation 2:" not in output and output.count("generation 3:") == 1
    extended, settings = rows_of(out), tiny(max_generations=5, max_params=10**7)
    in_final, in_target = (
        {t.evaluation for t in tasks(extended, settings, 300)}
        for tasks in (evolve.final_evaluations, evolve.target_evaluations)
    )
    assert extended[:WHOLE] == rows and {r.generation for r in extended[WHOLE : WHOLE + 8]} == {3, 4}
    assert {r.evaluation for r in extended[WHOLE + 8 :]} == (in_final | in_target) - {r.evaluation for r in rows}
    assert len(in_final) == 4 and len(in_target) == 8 and THE_FINAL in output
    # and so does a second step of the final, where there was none
    code, output = play("--max-generations=5", *LONG_STEP)
    both = rows_of(out)
    assert code == 0 and both[: len(extended)] == extended and "moved" not in output
    assert {r.stage for r in both[len(extended) :]} == {"grow", "long", "passes"}
    assert {r.budget for r in both if r.stage in ("grow", "long")} == {2.0}
    assert "After 2,048 tokens g" in output
    told = (out / "report.md").read_text(encoding="utf-8")
    assert (
        "Does the lead last? After 2,048 tokens" in told and "memorised? After 1,024 tokens on 50% of the text" in told
    )


def test_a_finished_run_is_left_as_it_is(play, tmp_path):
    out = tmp_path / "out"
    assert play()[0] == 0
    before = files_of(out)
    for flags in ((), ("--workers=3",)):
        code, output = play(*flags)
        assert code == 0 and files_of(out) == before
        assert f"The run in {out}/results.tsv is finished: {WHOLE} evaluations. Raise MAX_GENERATIONS above 3" in output
        assert "--new moves it to runs/ and begins again" in output and "Results in" not in output
    (out / "progress.png").unlink()  # what is lost is made again
    (out / "best_genome.json").unlink()
    assert play()[0] == 0 and files_of(out) == before
    code, output = play("--new")
    moved = re.search(r"was moved to (.*) \(--new\)", output)[1]
    assert code == 0 and files_of(Path(moved)) == before and Path(moved).parent == out / "runs"
    assert rows_of(out) == rows_of(Path(moved))  # the same run once more
    code, output = play("--new", out=tmp_path / "nothing there")
    assert code == 0 and "moved" not in output


def test_a_run_that_differs_is_moved_away(play, tmp_path, monkeypatch):
    """It says what differs, with the old and the new value, and nothing is overwritten."""
    out = tmp_path / "out"
    assert play()[0] == 0
    kept = [files_of(out)]
    for seed in range(1, 4):
        code, output = play(f"--seed={seed}")
        moved = re.search(rf"The run in {out}/results.tsv was moved to (.*) \(it differs in (.*)\)\n", output)
        assert code == 0 and moved[2] == f"SEED ({seed - 1}, here {seed})" and files_of(Path(moved[1])) == kept[-1]
        kept.append({name: content for name, content in files_of(out).items() if "/" not in name})
    assert len(list((out / "runs").iterdir())) == 3
    assert [files_of(folder) in kept for folder in (out / "runs").iterdir()] == [True] * 3
    assert (
        "(it differs in SEED (3, here 0), TOKEN_BUDGET (1024, here 512))" in play("--seed=0", "--token-budget=512")[1]
    )
    monkeypatch.setattr(evolve, "code_hash", lambda: "another")
    assert re.search(r"\(it differs in CODE \(the code, here another\)\)", play("--seed=0", "--token-budget=512")[1])


def test_a_run_of_other_columns_is_moved_away(play, tmp_path):
    out = tmp_path / "out"
    assert play()[0] == 0
    lines = (out / "results.tsv").read_text().splitlines()
    changed = "\n".join([lines[0], *(line + ("\tmood" if n == 0 else "\tgood") for n, line in enumerate(lines[1:]))])
    (out / "results.tsv").write_text(changed + "\n")
    code, output = play()
    assert code == 0 and "(it differs in columns of another version)" in output and len(rows_of(out)) == WHOLE


def test_a_run_of_a_gpu_stays_when_none_is_seen(play, tmp_path):
    out = tmp_path / "out"
    assert play("--max-generations=1")[0] == 0
    path = out / "results.tsv"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "NVIDIA H200"', 1))
    before = files_of(out)
    for flags in ((), ("--seed=5",)):
        code, output = play(*flags)
        assert code == 1 and files_of(out) == before
        assert f"The run in {path} was made on NVIDIA H200, and no GPU is to be seen. Nothing was changed" in output
    code, output = play("--new")
    assert code == 0 and "(--new)" in output and len(list((out / "runs").iterdir())) == 1


def test_a_run_stopped_anywhere_ends_as_one_that_was_not(play, tmp_path, monkeypatch):
    assert play(*LONG_STEP, out=tmp_path / "alone")[0] == 0
    alone, out, rng = rows_of(tmp_path / "alone"), tmp_path / "out", random.Random(0)
    assert {r.stage for r in alone} == set(evolve.STAGES)
    append, left = Record.append, [0]

    def interrupted(record, result):
        append(record, result)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "append", interrupted)
    for start in itertools.count():
        left[0] = rng.choice((1, 2, 4, 6))
        code, output = play(*LONG_STEP)
        assert len(rows_of(out)) > start
        if code == 0:
            break
        assert code == 130 and output.endswith("Stopped. Nothing is lost; run the same command again to go on.\n")
        with open(out / "results.tsv", "ab") as file:  # and at times within the next line
            file.write(rng.choice([b"", b"1\tg1.0", b"0"]))
    assert start > 5 and rows_of(out) == alone and not (out / "runs").exists()
    assert (out / "progress.png").read_bytes() == (tmp_path / "alone" / "progress.png").read_bytes()
    assert (out / "best_genome.json").read_bytes() == (tmp_path / "alone" / "best_genome.json").read_bytes()


def test_failures_are_rows_of_a_run(play, tmp_path, monkeypatch):
    def frail(t, *args):
        rng = random.Random(f"{t.genome.key}{t.seed}")
        operators = ["ok"] * 4 + ["raise", "die", "exit"]
        operator = rng.choice(operators) if t.stage == "search" else "ok"
        return dataclasses.replace(toy(dataclasses.replace(t, operator=operator), *args), operator=t.operator)

    monkeypatch.setattr(evolve, "evaluate", frail)
    code, output = play("--population-size=8", "--max-generations=2")
    rows = rows_of(tmp_path / "out")
    assert code == 0 and len([r for r in rows if r.stage == "search"]) == 16
    assert {r.status for r in rows} == {"ok", "crash"}
    crashes = [r for r in rows if r.status == "crash"]
    assert sum(map(int, re.findall(r"(\d+) crash$", output, re.M))) == len(crashes)
    assert {r.note.partition(":")[0] for r in crashes} <= {
        "the worker was killed, twice",
        "the worker ended with exit code 3",
        "ZeroDivisionError",
    }


def test_a_final_that_failed_once_is_a_final(play, tmp_path, monkeypatch):
    def frail(t, *args):
        if t.stage == "final" and t.id.startswith("g") and first_time(tmp_path / f"{t.id} {t.seed}"):
            os._exit(3)
        return toy(t, *args)

    monkeypatch.setattr(evolve, "evaluate", frail)
    code, output = play()
    rows = rows_of(tmp_path / "out")
    final = collections.Counter((r.id[0], r.status) for r in rows if r.stage == "final")
    assert code == 0 and final == {("g", "crash"): 2, ("g", "ok"): 2, ("t", "ok"): 2} and "failed)" not in output
    assert f"is finished: {WHOLE + 2} evaluations" in play()[1]


def test_crashes_that_are_alike_stop_the_run(play, tmp_path, monkeypatch):
    """Three, when nothing else ever happened: nothing is recorded, and once mended the run goes on."""
    assert play(out=tmp_path / "alone")[0] == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(evolve, "evaluate", lambda t, *args: toy(dataclasses.replace(t, operator="raise"), *args))
        patch.setattr(evolve, "LEVELS", {name: genome.mlp(n, 64) for n, name in enumerate("ab", start=1)})
        code, output = play()
    assert code == 1 and rows_of(out) == []
    assert re.search(r"Traceback .*in toy\n.*ZeroDivisionError: a planted error\n", output, re.S)
    note = r"ZeroDivisionError: a planted error \(evolve.py:\d+ in serve\)"
    end = r"They are not recorded: mend the cause, and run again to go on\n$"
    assert re.search(rf"\nThe last 3 evaluations crashed alike \({note}\)\. {end}", output)
    assert play()[0] == 0 and rows_of(out) == rows_of(tmp_path / "alone")


def test_crashes_that_are_alike_stop_a_run_in_its_middle(play, tmp_path, monkeypatch):
    """As many in a row as a generation has evaluations; fewer are genomes that crash, and rows of the record."""
    assert play(out=tmp_path / "alone")[0] == 0
    out, alone = tmp_path / "out", rows_of(tmp_path / "alone")

    def crashing(first: int, last: int):
        def evaluate(t, *args):
            order = [r.evaluation for r in alone]
            n = order.index(t.evaluation) if t.evaluation in order else len(order)
            made = toy(dataclasses.replace(t, operator="raise" if first <= n < last else "ok"), *args)
            return dataclasses.replace(made, operator=t.operator)

        return evaluate

    assert [r.stage for r in alone[3:9]] == ["baseline", *["search"] * 5]
    monkeypatch.setattr(evolve, "evaluate", crashing(4, 8))  # the whole of generation 0
    code, output = play()
    assert code == 1 and "The last 4 evaluations crashed alike" in output and rows_of(out) == alone[:4]
    monkeypatch.setattr(evolve, "evaluate", crashing(4, 7))  # all of it but one
    assert play("--max-generations=1")[0] == 0
    rows = rows_of(out)
    assert [r.status for r in rows[:8]] == ["ok"] * 4 + ["crash"] * 3 + ["ok"]
    assert [(r.id, r.seed) for r in rows[:8]] == [(r.id, r.seed) for r in alone[:8]]


def test_crashes_are_held_back_and_not_lost():
    """unless_all_crash lets through all that it is given, in order, unless it raises."""

    def result(word: str) -> Result:
        return toy_result(task(), "crash", note=word) if len(word) == 1 else toy_result(task(), word)

    def passed(words: str, limit: int = 4) -> str:
        found = []
        try:
            for r in evolve.unless_all_crash(map(result, words.split()), [], limit):
                found.append(r.note if r.status == "crash" else r.status)
        except Stop as stop:
            found.append(re.search(r"The last (\d+)", str(stop))[1])
        return " ".join(found)

    for words in ("ok ok", "a a ok", "a a b b ok a a a ok", "ok a a a", "a a", "oom a a a ok", "a b a b a b", ""):
        assert passed(words) == words
    assert passed("a a a") == "3" and passed("a b b b") == "a 3" and passed("ok a a a a") == "ok 4"
    assert passed("oom a a a b b b b ok") == "oom a a a 4"


def test_a_final_of_what_there_is_and_then_the_rest(play, tmp_path, monkeypatch):
    """MAX_GENERATIONS may be lowered for a final now, and raised again."""
    out, append = tmp_path / "out", Record.append

    def interrupted(record, result):
        append(record, result)
        if len(record.rows) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "append", interrupted)
    assert play()[0] == 130
    assert json.loads((out / "best_genome.json").read_text())["stage"] == "search"
    code, output = play("--max-generations=1")
    assert code == 0 and THE_FINAL in output
    assert json.loads((out / "best_genome.json").read_text())["stage"] == "final"
    code, output = play()  # and then the search goes on, to its own final
    assert code == 0 and "Going on" in output and not (out / "runs").exists()
    assert sum(r.stage == "search" for r in rows_of(out)) == 12
    assert "is finished" in play()[1]


def test_a_record_that_is_lost_in_mid_run_is_rescued(play, tmp_path, monkeypatch):
    """And with it put in its place the run ends as one that was left alone."""
    assert play(out=tmp_path / "alone")[0] == 0
    out, append = tmp_path / "out", Record.append

    def emptied(record, result):
        append(record, result)
        if len(record.rows) == 7:
            record.path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(Record, "append", emptied)
        code, output = play()
    assert code == 1 and "All of its rows are in results.rescued.tsv: put that in its place" in output
    os.replace(out / "results.rescued.tsv", out / "results.tsv")
    assert rows_of(out) == rows_of(tmp_path / "alone")[:7]
    assert play()[0] == 0 and rows_of(out) == rows_of(tmp_path / "alone")


def test_a_full_disk_stops_a_run_that_goes_on_later(play, tmp_path):
    assert play(out=tmp_path / "alone")[0] == 0

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        return play()

    code, output = in_child(limited)
    assert code == 1 and output.endswith("File too large. What results.tsv holds is intact; run again to go on\n")
    assert 0 < len(rows_of(tmp_path / "out")) < WHOLE
    assert play()[0] == 0 and rows_of(tmp_path / "out") == rows_of(tmp_path / "alone")


def test_the_console_shows_what_made_a_genome(play, tmp_path):
    rows = [toy_result(task(operator="change_training+duplicate_run")), toy_result(final_task())]
    text = evolve.result_text(rows[0])
    assert "  change_training+duplicate_run  " in text and text.endswith(NET.summary) and "\n" not in text
    assert f"{rows[1].val_bpb:.4f}" in (text := evolve.result_text(rows[1])) and f"test {rows[1].test_bpb:.4f}" in text
    assert "  final  " in text.replace("final   ", "final  ")
    crash = toy_result(task(), "crash", note="why", params=None, tokens_per_s=None)
    assert evolve.result_text(crash).endswith("  [why]") and " — " in evolve.result_text(crash)
    code, output = play("--max-generations=2", "--mutation-rate=0.9")
    rows = [r for r in rows_of(tmp_path / "out") if r.stage == "search"]
    assert code == 0 and any(len(r.operator) > 24 for r in rows)
    for r in rows:
        lines = [line for line in output.splitlines() if line.startswith(r.id + " ") and r.summary in line]
        assert any(f" tok/s  {evolve.made_by_text(r)} " in line for line in lines)


def test_a_genome_that_trains_slower_than_at_first_is_marked():
    """Only where seconds are the budget: then its score is of fewer tokens."""
    seconds = tiny(token_budget=0, time_budget=1.0)
    first = toy_result(task(), tokens_per_s=1000)
    failed = toy_result(task(), "oom", tokens_per_s=5000)
    other = toy_result(task(transformer(1, 64, 1)), tokens_per_s=5000)
    rows = [failed, other, first, toy_result(task(seed=2), tokens_per_s=2000)]

    def told(settings=seconds, rows=rows, status="ok", **values):
        return evolve.slower_text(toy_result(task(seed=3), status, **values), rows, settings)

    assert told(tokens_per_s=900) == "-10% tokens/s against its first evaluation"
    assert told(tokens_per_s=1100) == "+10% tokens/s against its first evaluation"
    assert told(tokens_per_s=971) == told(tokens_per_s=1029) == ""
    assert told(tokens_per_s=900, settings=tiny()) == told(tokens_per_s=900, status="stopped") == ""
    assert told(tokens_per_s=900, rows=[failed, other]) == told(tokens_per_s=900, rows=[]) == ""


def test_a_slow_repeat_has_a_note_in_the_record(toys, free_params, source, tmp_path, monkeypatch):
    def slow(t, *args):
        return dataclasses.replace(toy(t, *args), tokens_per_s=900 if t.operator == "repeat" else 1000)

    monkeypatch.setattr(evolve, "evaluate", slow)
    monkeypatch.setattr(evolve, "picture", lambda *_: b"a picture")
    s = tiny(token_budget=0, time_budget=1.0, max_params=10**9)
    with Record(tmp_path) as record:
        record.begin(evolve.describe_run(s, source, "cpu"))
        evolve.evolve(record, lambda rows: evolve.next_tasks(rows, s, 300), {}, s, source, torch.device("cpu"))
        rows = record.rows
    assert {r.operator == "repeat" for r in rows if "-10% tokens/s" in r.note} == {True}
    assert evolve.next_tasks(rows, s, 300) == []


def test_a_run_ends_in_time_and_goes_on(toys, free_params, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evolve, "picture", lambda *_: b"a picture")
    s = tiny(max_params=10**9, baseline_trials=0, finalists=0)
    rest = (lambda rows: evolve.next_tasks(rows, s, 300), {}, s, source, torch.device("cpu"))
    with Record(tmp_path) as record:
        record.begin(evolve.describe_run(s, source, "cpu"))
        real = evolve.in_time

        def six_in_all(tasks, *how):
            return itertools.islice(real(tasks, *how), 6 - len(record.rows))

        monkeypatch.setattr(evolve, "in_time", six_in_all)
        assert not evolve.evolve(record, *rest, minutes=99) and len(record.rows) == 6
        assert "--minutes 99: no other evaluation would end in time" in capsys.readouterr().out
        monkeypatch.setattr(evolve, "in_time", real)
        assert not evolve.evolve(record, *rest, minutes=1e-9)
        assert len(record.rows) == 6, "nothing is begun"
        output = capsys.readouterr().out
        (least,) = map(float, re.findall(r"comes next \(search\), which takes about --minutes (\S+); nothing", output))
        assert 0 < 60 * least - (evolve.time.monotonic() - evolve.STARTED + evolve.SPARE) < 60
        assert evolve.evolve(record, *rest)
        assert len(record.rows) == 3 * s.population_size and not evolve.next_tasks(record.rows, s, 300)


# ----------------------------------------------------------------------------------------------------------------------
# One design: --train, --save, --write


def test_train_one_design(command, tmp_path, monkeypatch):
    path = tmp_path / "best_genome.json"
    path.write_text(json.dumps({"id": "x", "genome": json.loads(NET.to_json()), "settings": {}}))
    code, output, _ = command("--train", path, "--prompt", "a dog ran")
    assert code == 0
    assert NET.summary in output and re.search(r"val_bpb \d\.\d{4} after .* s: 1,024 tokens", output)
    written = output.partition("over the training text\n\n")[2]
    assert written.startswith("a dog ran") and len(written) > 100
    plain = tmp_path / "plain.json"
    plain.write_text(NET.to_json())
    code, output, _ = command("--train", plain, "--prompt", "a dog ran")
    assert code == 0 and output.partition("over the training text\n\n")[2] == written
    # what cannot be trained is refused before any data are looked at
    monkeypatch.setattr(prepare, "open_source", lambda **_: pytest.fail("it looked at data"))
    for content in ("[", "3", "[]", "{}", '{"genome": {"genes": [{"op": "no such"}]}}', "[" * 100_000, "\udcff"):
        plain.write_bytes(content.encode(errors="surrogateescape"))
        code, _, error = command("--train", plain)
        assert code == 1 and error.strip() and "Traceback" not in error, content[:40]
    code, _, error = command("--train", tmp_path / "none")
    assert code == 1 and "No such file" in error


def test_train_a_design_that_is_wider_and_deeper_and_its_rival(command, tmp_path):
    """The rival of the file is changed alike, trained too, and compared; the first is what writes and is kept."""
    path, model = tmp_path / "best_genome.json", tmp_path / "model.safetensors"
    rival = {"id": "transformer-1x64", "genome": json.loads(transformer(1, 64).to_json())}
    path.write_text(json.dumps({"id": "x", "genome": json.loads(NET.to_json()), "rival": rival}))
    code, output, _ = command("--train", path, "--scale=2", "--deeper=1", "--save", model, "--prompt", "a dog ran")
    own, other = genome.scaled(genome.grown(NET, 1), 2), genome.scaled(genome.grown(transformer(1, 64), 1), 2)
    assert code == 0 and own.embed_dim == 128 and len(own.genes) == 2 * len(NET.genes)
    assert f"best_genome x2 +1: {own.summary}\n{own.num_params(300):,} parameters" in output
    assert f"transformer-1x64 (its best baseline) x2 +1: {other.summary}\n{other.num_params(300):,} param" in output
    first, second = map(float, re.findall(r"val_bpb (\d\.\d{4}) after", output))
    lead = float(re.search(r"^best_genome leads by (-?\d\.\d{4}) bits per byte$", output, re.M)[1])
    assert lead == pytest.approx(second - first, abs=2e-4) and output.count("over the training text") == 2
    written = output.partition("bits per byte\n\n")[2]
    assert written.startswith("a dog ran") and command("--write", model, "--prompt", "a dog ran") == (0, written, "")
    path.write_text(NET.to_json())  # a file that names no rival
    code, output, _ = command("--train", path, "--deeper=1")
    assert code == 0 and genome.grown(NET, 1).summary in output and "leads by" not in output


@pytest.mark.parametrize(
    "flags", [("--scale=0",), ("--scale=-1",), ("--scale=nan",), ("--scale=1e9",), ("--deeper=-1",), ("--deeper=99",)]
)
def test_a_scale_that_is_impossible_is_refused_in_words(command, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(prepare, "open_source", lambda **_: pytest.fail("it looked at data"))
    path = tmp_path / "net.json"
    path.write_text(NET.to_json())
    code, _, error = command("--train", path, *flags)
    assert code == 1 and flags[0].partition("=")[0] in error and "Traceback" not in error
    code, _, error = command(*flags)
    assert code == 1 and "name it with --train FILE" in error
    for more in ("--scale=65", "--deeper=40"):  # possible, but not for this design
        code, _, error = command("--train", path, more)
        assert code == 1 and error.strip() and "Traceback" not in error


@pytest.mark.parametrize(
    "net",
    [
        NET,
        dataclasses.replace(NET, tied=True),
        Genome((Gene("linear", 64), *NET.genes), embed_dim=128, tied=True),
        ALL_KINDS,
    ],
    ids=["", "tied", "projected", "all kinds"],
)
def test_a_model_that_was_saved_writes_the_same(command, data_dir, tmp_path, net):
    path, model = tmp_path / "net.json", tmp_path / "model.safetensors"
    path.write_text(net.to_json())
    code, output, _ = command("--train", path, "--save", model, "--prompt", "a dog ran")
    told = f"To let it write: uv run evolve.py --write {model} --prompt TEXT --data-dir {data_dir}\n"
    written = output.partition(told)[2]
    assert code == 0 and written.startswith("a dog ran") and len(written) > 100
    assert {file.name for file in tmp_path.iterdir()} == {"net.json", "model.safetensors"}
    assert command("--write", model, "--prompt", "a dog ran") == (0, written, "")
    code, other, _ = command("--write", model, "--prompt", "one two")
    assert code == 0 and other.startswith("one two") and other != written


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_kept_to_the_bit(tmp_path, data, source, tied):
    torch.manual_seed(0)
    net, path = dataclasses.replace(ALL_KINDS, tied=tied), tmp_path / "model.safetensors"
    model = genome.Model(net, data.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    evolve.save_model(path, model, source)
    loaded = evolve.load_model(path, data, torch.device("cpu"))
    assert loaded.genome == net
    assert all(torch.equal(p, before[name]) for name, p in loaded.state_dict().items()) and len(before) > 30
    assert sum(p.numel() for p in loaded.parameters()) == net.num_params(data.vocab_size)
    idx = torch.randint(data.vocab_size, (2, 32))
    with torch.no_grad():
        assert torch.equal(loaded(idx), model(idx))
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), "the model is as it was"


def test_what_is_no_model_is_refused_in_words(command, tmp_path, data, source):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    evolve.save_model(path, model := genome.Model(NET, data.vocab_size), source)
    whole, weights = path.read_bytes(), model.state_dict()
    known = dict(genome=NET.to_json(), vocab_size=str(data.vocab_size), fingerprint=data.fingerprint)
    for content in (b"", b"hello", whole[:100], whole[:-1], whole + b"x", json.dumps({}).encode()):
        path.write_bytes(content)
        code, _, error = command("--write", path)
        assert code == 1 and error.startswith(f"\n{path} is no model that --save kept: "), content[:20]
    for changed in ({**known, "genome": "{}"}, {"fingerprint": known["fingerprint"]}, None):
        save_file(weights, path, changed)
        code, _, error = command("--write", path)
        assert code == 1 and error.startswith(f"\n{path} is no model that --save kept: "), changed
    save_file(weights, path, {**known, "fingerprint": "of others"})
    code, _, error = command("--write", path)
    assert code == 1 and "was trained on other tokens than those of" in error and "--data-dir or --demo" in error
    code, _, error = command("--write", tmp_path / "none")
    assert code == 1 and f"--write {tmp_path / 'none'}: there is no such file" in error
    save_file(weights, path, known)
    assert command("--write", path)[0] == 0


def test_weights_of_another_genome_are_refused_in_words(command, tmp_path, data, source):
    """As those of a version whose ops had other parameters."""
    from safetensors.torch import save_file

    path, weights = tmp_path / "model.safetensors", genome.Model(NET, data.vocab_size).state_dict()
    other = dict(genome=transformer(1, 64, 1).to_json(), vocab_size=str(data.vocab_size), fingerprint=data.fingerprint)
    save_file(weights, path, other)
    code, _, error = command("--write", path)
    assert code == 1 and error.startswith(f"\n{path} is no model that --save kept: ")


def test_a_prompt_alone_begins_no_search(command, tmp_path):
    code, _, error = command("--prompt", "a dog ran", "--out", tmp_path / "out")
    assert code == 1 and "--prompt is what --train FILE and --write FILE go on from" in error
    assert not (tmp_path / "out").exists()


def test_a_training_that_fails_says_so(command, tmp_path):
    path = tmp_path / "net.json"
    with planted(lambda self, x: x + padded(x, 1)) as gene:
        path.write_text(with_gene(gene).to_json())
        code, _, error = command("--train", path, "--save", tmp_path / "model")
    assert code == 1 and "net.json: training ended with status leak." in error and not (tmp_path / "model").exists()


def test_what_was_trained_is_lost_when_it_is_stopped(command, tmp_path, monkeypatch):
    path = tmp_path / "net.json"
    path.write_text(NET.to_json())

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evolve, "run_trial", stop)
    code, _, error = command("--train", path)
    assert code == 130 and error.endswith("\nStopped. What was trained is lost.\n")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_every_constant_has_a_comment_and_a_flag(capsys):
    source = Path(evolve.__file__).read_text().split("# " + "-" * 118)[1]
    constants = re.findall(r"^([A-Z_]+): \S.*? = \S.*?  # .{10,}$", source, re.M)
    assert constants == re.findall(r"^([A-Z_]+): ", source, re.M) == list(evolve.CONSTANTS) and len(constants) > 20
    with pytest.raises(SystemExit) as exit:
        evolve.main(["--help"])
    help = capsys.readouterr().out
    assert exit.value.code == 0
    for name, value in evolve.CONSTANTS.items():
        flag = "--" + name.lower().replace("_", "-")
        assert flag in help and name.lower() in {f.name for f in dataclasses.fields(evolve.Settings)}
        given = {str: "drift", int: "64", float: "0.5"}[type(value)]
        if name in ("SEQ_LEN", "SURVIVORS", "IMMIGRANTS"):
            given = "1"
        if name == "LONG_FACTOR":
            given = "1.5"
        args = evolve.parse([flag, given, *(["--seq-len=1"] if name == "BATCH_TOKENS" else [])])
        read = getattr(evolve.read_settings(args), name.lower())
        assert (read, type(read)) == (type(value)(given), type(value))
    assert evolve.read_settings(evolve.parse([])) == evolve.Settings()
    demo = evolve.read_settings(evolve.parse(["--demo", "--survivors=1"]))
    assert demo == evolve.Settings(**{**evolve.DEMO, "survivors": 1})
    demo = evolve.read_settings(evolve.parse(["--demo", "--time-budget=5"]))  # who asks for seconds gets seconds
    assert (demo.time_budget, demo.token_budget) == (5.0, 0)
    assert set(evolve.MAY_CHANGE) < {name.lower() for name in evolve.CONSTANTS}


IMPOSSIBLE = [f"--{name}=0" for name in ("population-size", "survivors", "batch-tokens", "seq-len", "eval-tokens",
    "max-params", "deadline", "time-budget", "long-factor", "hurdle", "prescreen")]  # fmt: skip
IMPOSSIBLE += [f"--{name}=-1" for name in ("immigrants", "max-generations", "token-budget", "hurdle", "seed",
    "workers", "long-seeds", "baseline-trials", "finalists")]  # fmt: skip
IMPOSSIBLE += [
    f"--{name}={x}" for name in ("mutation-rate", "crossover-rate", "hurdle-sample") for x in (-0.1, 1.1, "nan")
]
IMPOSSIBLE += ["--final-seeds=1", "--strategy=best", "--time-budget=nan", "--time-budget=inf"]
IMPOSSIBLE += [f"--long-factor={x}" for x in (1, 0.5, "nan", "inf")] + ["--long-seeds=1"]
IMPOSSIBLE += ["--hurdle=nan", "--batch-tokens=1000", "--survivors=12", "--immigrants=9", "--population-size=4"]
IMPOSSIBLE += ["--seed=1000000001", f"--seed={2**64}", "--hurdle=inf", "--hurdle=1.1", "--repeats=0"]


@pytest.mark.parametrize("flag", IMPOSSIBLE)
def test_an_impossible_value_is_an_error_that_names_it(flag, data_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "open_source", lambda **_: pytest.fail("it looked at data"))
    assert evolve.main([flag, "--data-dir", data_dir]) == 1
    assert flag.partition("=")[0][2:].upper().replace("-", "_") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--population", "3", "--tme-budget=3"], ["--seed=1.5"], ["--time-budget=long"], ["x"]]
)
def test_an_unknown_flag_is_an_error_that_names_it(flags, capsys):
    with pytest.raises(SystemExit) as exit:
        evolve.main(flags)
    assert exit.value.code == 2 and flags[-1].partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--seq-len=8192", "--seq-len=4096", "--eval-tokens=31", "--max-params=5"])
def test_what_the_data_cannot_fill_is_an_error(flag, command, tmp_path):
    out = tmp_path / "out"
    code, _, error = command(flag, "--batch-tokens=8192", "--out", out)
    assert code == 1 and flag.partition("=")[0][2:].upper().replace("-", "_") in error and not out.exists()
    if flag == "--seq-len=8192":
        assert "MAX_SEQ_LEN = 4096 in genome.py" in error


def test_seconds_on_a_machine_without_a_gpu_are_an_error(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, error = command("--token-budget=0", "--time-budget=1", "--out", tmp_path / "out")
    assert code == 1 and "A trial of seconds needs a GPU, and none is to be seen" in error
    assert "--demo" in error and "--token-budget" in error and not (tmp_path / "out").exists()


# Ops of the user's


@contextlib.contextmanager
def only_op(monkeypatch, build):
    """An op that build() is called for when it is built, beside one that is well."""
    with monkeypatch.context() as patch:
        patch.setattr(genome, "OPS", {"norm": genome.OPS["norm"]})

        class Planted(Op, name="planted", keeps_width=True):
            def __init__(self, d_in, d_out):
                super().__init__()
                build()

            def forward(self, x):
                return x

        try:
            yield
        finally:
            genome.block_params.cache_clear()


def raises():
    raise ZeroDivisionError("a planted error")


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (raises, "genome.py: planted: cannot be built: ZeroDivisionError: a planted error"),
        (lambda: time.sleep(600), "genome.py: planted: is not built and run within 2 s"),
        (lambda: os._exit(0), "genome.py: planted: ended the process that tried it, exit code 0"),
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "genome.py: planted: ended the process that tried it, exit code -9",
        ),
    ],
    ids=["raises", "hangs", "exits", "is killed"],
)
def test_an_op_that_does_not_work_is_named_before_a_run(monkeypatch, data_dir, tmp_path, capsys, build, problem):
    monkeypatch.setattr(evolve, "OPS_SECONDS", 2)
    monkeypatch.setattr(prepare, "open_source", lambda **_: pytest.fail("it looked at data"))
    with only_op(monkeypatch, build):
        assert evolve.main([*FLAGS, "--data-dir", data_dir, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip() == problem and not (tmp_path / "out").exists()


def test_ops_that_work_are_no_problem(monkeypatch):
    evolve.check_ops()
    with only_op(monkeypatch, lambda: None):
        evolve.check_ops()


# Signals, pipes and terminals


@contextlib.contextmanager
def run_in_session(log: Path, *flags: str, pipe: tuple = (), ignore: tuple = (), encoding: str = "utf-8", **env: str):
    """A forked process in a session of its own that runs the command as a shell would start it; its id.

    Both streams go to the file `log`; or stdout to a pipe, where one is given.
    """

    def run():
        os.setsid()
        os.environ.update(env)
        for name in [name for name in sys.modules if name.startswith("matplotlib")]:
            del sys.modules[name]  # it reads the environment when it is imported
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignore else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(pipe[1] if pipe else fd, 1)
        os.dup2(fd, 2)
        for end in pipe:
            os.close(end)
        sys.stdout, sys.stderr = (open(fd, "w", encoding=encoding, closefd=False) for fd in (1, 2))  # noqa: SIM115
        code = evolve.main([*FLAGS, "--max-params=10000000", *flags])
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # as Python does in the end
        os._exit(code)

    with forked(run) as pid:
        yield pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_session(id: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found += [pid] if os.getsid(pid) == id and is_alive(pid) else []
    return found


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def slow_toy(t: Task, *args):
    time.sleep(0.05)
    return toy(t, *args)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_end_a_run_as_ctrl_c_does(play, data_dir, tmp_path, monkeypatch, number):
    assert play(out=tmp_path / "alone")[0] == 0
    monkeypatch.setattr(evolve, "evaluate", slow_toy)
    out, log = tmp_path / "out", tmp_path / "log"
    with run_in_session(log, "--data-dir", data_dir, "--out", str(out)) as pid:
        wait_until(lambda: lines_in(out / "results.tsv") > 4)
        os.kill(pid, number)
        assert exit_code(pid) == 130, log.read_text()
        wait_until(lambda: not in_session(pid))
    output = log.read_text()
    assert output.endswith("\nStopped. Nothing is lost; run the same command again to go on.\n")
    assert "Traceback" not in output and 2 < len(rows_of(out)) < WHOLE
    assert play()[0] == 0 and rows_of(out) == rows_of(tmp_path / "alone")


def test_a_run_under_nohup_survives_its_terminal(play, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(evolve, "evaluate", slow_toy)
    out, log = tmp_path / "out", tmp_path / "log"
    with run_in_session(log, "--data-dir", data_dir, "--out", str(out), ignore=(signal.SIGHUP,)) as pid:
        wait_until(lambda: lines_in(out / "results.tsv") > 4)
        os.killpg(pid, signal.SIGHUP)
        assert exit_code(pid) == 0, log.read_text()
    assert len(rows_of(out)) == WHOLE


def test_a_closed_pipe_ends_a_run_as_ctrl_c_does(play, data_dir, tmp_path, monkeypatch):
    """As `| head -2` closes it."""
    monkeypatch.setattr(evolve, "evaluate", slow_toy)
    out, log, (ours, theirs) = tmp_path / "out", tmp_path / "log", os.pipe()
    with run_in_session(log, "--data-dir", data_dir, "--out", str(out), pipe=(ours, theirs)) as pid:
        os.close(theirs)
        with open(ours) as file:
            assert file.readline() and file.readline()
        assert exit_code(pid) == 130, log.read_text()
    assert log.read_text() == "\nStopped. Nothing is lost; run the same command again to go on.\n"
    assert len(rows_of(out)) < WHOLE


def test_no_terminal_and_no_matplotlibrc_stops_a_run(toys, free_params, data_dir, tmp_path, monkeypatch):
    """Letters that the encoding lacks, a backend that does not exist, TeX that is not installed."""
    monkeypatch.setattr(evolve, "check_ops", lambda: None)
    monkeypatch.setattr(evolve, "FAMILIES", family_of_transformers())
    monkeypatch.setattr(evolve, "LEVELS", {})
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\nbackend: module://nonsense\n")
    env = dict(MPLBACKEND="module://nonsense", MATPLOTLIBRC=str(tmp_path))
    out, log = tmp_path / "out", tmp_path / "log"
    flags = ("--max-generations=1", "--data-dir", data_dir, "--out", str(out))
    with run_in_session(log, *flags, encoding="latin-1", **env) as pid:
        assert exit_code(pid) == 0, log.read_text("latin-1")
    output = log.read_text("latin-1")
    assert "norm?" in output and THE_FINAL in output and "was not made" not in output
    assert len(rows_of(out)) == 3 + 4 + 4 + 8 and png_size((out / "progress.png").read_bytes())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_ctrl_c(data_dir, tmp_path):
    """The command as it is, workers spawned."""
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "evolve.py", *FLAGS, "--max-params=300000", "--data-dir", data_dir, "--out", out]
    command += ["--max-generations=1", "--time-budget=1"]

    def starting() -> list[int]:
        """The worker, once it has begun to import torch."""
        with contextlib.suppress(OSError):
            workers = [pid for pid in in_session(run.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
            return [pid for pid in workers if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]
        return []

    log = tmp_path / "log"
    with open(log, "w") as file:
        run = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(starting, 120)
        os.kill(starting()[0], signal.SIGINT)  # nothing to a worker, even then
        wait_until(lambda: run.poll() is not None or (out / "results.tsv").read_bytes().count(b"\n") > 3, 120)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130
        wait_until(lambda: not in_session(run.pid))  # the resource tracker ends a little later
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    output = log.read_text()
    assert output.endswith("Stopped. Nothing is lost; run the same command again to go on.\n")
    assert "Traceback" not in output and len(rows_of(out)) > 1


def test_kills(kill_run):
    """Killed at random moments and started again, a run on the CPU ends as one that was left alone."""
    output = kill_run.communicate(timeout=600)[0]
    report = json.loads(output.splitlines()[-1])
    assert report["differences"] == [] and report["kills"] == KILLS and report["runs"] > 0, output
