"""The pool: workers may die, one trains at a time on a device, each task has one result."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, first_time, forked, is_alive, planted, task, tiny, toy, toy_result, wait_until, with_gene

import evolve
import genome
import prepare
from evolve import Stop, Task

pytestmark = pytest.mark.usefixtures("cache")


HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import evolve, prepare, torch

def hold(pipe, *_):
    lock = multiprocessing.Lock()  # as torch has them where it compiles
    pipe.send("ready")
    time.sleep(600)

if __name__ == "__main__":
    evolve.serve, prepare.load = hold, lambda *_, **__: None
    data = SimpleNamespace(folder=Path("."), stamp=())
    with evolve.Pool(data, evolve.Settings(), torch.device("cpu"), Path(".")) as pool:
        assert len(pool.workers) == 1 and pool.workers[0].pipe.recv() == "ready"
        pool.workers[0].state = "training"  # so that it is killed
    print("stopped")
"""


@pytest.fixture(scope="module")
def holder(cache, tmp_path_factory):
    """A pool whose worker is killed while it holds a lock, at work while the tests run."""
    script = tmp_path_factory.mktemp("holder") / "holder.py"
    script.write_text(HOLDER.format(root=str(ROOT)))
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, script], stdout=pipe, stderr=pipe, text=True)
    yield process
    process.kill()


def test_what_takes_long_is_started(holder):
    """First in the file, so that it works while the rest is tested."""
    assert holder.poll() is None


# ----------------------------------------------------------------------------------------------------------------------
# Workers. A toy stands in for the evaluation; what it does is what the task's operator says.


@contextlib.contextmanager
def pool_of(source, workers: int = 1, out: Path = Path("out"), **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evolve, "worker_count", lambda *_: workers)
        with evolve.Pool(source, tiny(**settings), torch.device("cpu"), out) as pool:
            yield pool
    assert not any(w.process.is_alive() for w in pool.workers)


def tasks_of(*operators: str) -> list[Task]:
    return [task(id=f"g0.{i:02d}", operator=op) for i, op in enumerate(operators)]


def ready(pool) -> bool:
    """Whether all workers are; runs two tasks."""
    assert [r.status for r in pool.run(tasks_of("ok", "ok"))] == ["ok", "ok"]
    return all(w.state == "ready" for w in pool.workers)


def test_workers_are_replaced(toys, source, capfd):
    operators = ("ok", "die", "ok", "exit", "raise", "die early", "hang", "hang early", "ok")
    with pool_of(source, deadline=2) as pool:
        results = {r.operator: r for r in pool.run(tasks_of(*operators))}
        first = pool.workers[0].process.pid
        again = list(pool.run(tasks_of("ok", "ok")))
        assert pool.workers[0].process.pid == first  # a healthy one stays
    assert [r.status for r in again] == ["ok", "ok"]
    assert {op: r.status for op, r in results.items()} == {
        "ok": "ok",
        "die": "crash",
        "die early": "crash",
        "exit": "crash",
        "raise": "crash",
        "hang": "timeout",
        "hang early": "timeout",
    }
    assert all(r.val_bpb is None for r in results.values() if r.status != "ok")
    assert results["die"].note == results["die early"].note == "the worker was killed, twice"
    assert results["exit"].note == "the worker ended with exit code 3"
    assert re.fullmatch(r"ZeroDivisionError: a planted error \(evolve.py:\d+ in serve\)", results["raise"].note)
    assert results["hang"].note == "training took over 2 s" and results["hang early"].note == "preparing took over 2 s"
    assert "in toy" in results["raise"].trace and results["raise"].trace.endswith("Error: a planted error\n")
    told = [line for line in capfd.readouterr().out.splitlines() if "trying once more" in line]
    assert told == [f"g0.{i:02d}: its worker was killed; trying once more" for i in (1, 5)]


def test_a_crash_names_the_line(data):
    """The last one that is in a file of the program, however deep the error is in torch."""

    def forward(self, x):
        return genome.rms_norm(x.reshape(3, 5, 7))

    with planted(forward) as gene:
        try:
            genome.Model(with_gene(gene), 64)(torch.zeros(1, 8, dtype=torch.int64))
        except RuntimeError as error:
            place = evolve.place_of(error)
    lines = (ROOT / "genome.py").read_text().splitlines()
    number, name = re.fullmatch(r" \(genome.py:(\d+) in (\w+)\)", place).groups()
    assert name == "forward" and "self.op(" in lines[int(number) - 1]
    assert evolve.place_of(ValueError("never raised")) == ""


def test_a_worker_that_is_killed_from_outside_is_tried_once_more(toys, source, tmp_path, monkeypatch, capsys):
    def killed_once(t, *args):
        if t.operator == "kill" and first_time(tmp_path / t.id):
            os.kill(os.getpid(), signal.SIGTERM if t.id == "g0.03" else signal.SIGKILL)
        return toy(t, *args)

    monkeypatch.setattr(evolve, "evaluate", killed_once)
    with pool_of(source) as pool:
        results = list(pool.run(tasks_of("ok", "kill", "ok", "kill")))
    assert sorted((r.id, r.status, r.note) for r in results) == [(f"g0.{i:02d}", "ok", "") for i in range(4)]
    told = [line for line in capsys.readouterr().out.splitlines() if line]
    assert told == [f"g0.{i:02d}: its worker was killed; trying once more" for i in (1, 3)]


def test_a_training_that_stood_still_is_tried_once_more(toys, source, tmp_path, monkeypatch, capsys):
    def stalls(t, data, settings, turn):
        if t.operator == "always" or (t.operator == "once" and first_time(tmp_path / t.id)):
            return toy_result(t, "stalled", note="nothing happened for 9.0 s of 10 s")
        return toy(t, data, settings, turn)

    monkeypatch.setattr(evolve, "evaluate", stalls)
    with pool_of(source) as pool:
        results = {r.operator: r for r in pool.run(tasks_of("always", "once", "ok"))}
    assert {op: r.status for op, r in results.items()} == {"always": "stalled", "once": "ok", "ok": "ok"}
    told = [line for line in capsys.readouterr().out.splitlines() if line]
    assert told == [f"g0.{i:02d}: nothing happened for 9.0 s of 10 s; trying once more" for i in (0, 1)]


def test_a_failed_capture_replaces_the_worker_whatever_its_note_says(toys, source, monkeypatch):
    results = {
        "captured": dict(captured=True, note="an op that is called 'not captured: x'"),
        "no cuda": dict(captured=None, note="not captured: by hand"),
        "not captured": dict(captured=False, note="the scheduler said so"),
        "and no note": dict(captured=False),
    }
    monkeypatch.setattr(evolve, "evaluate", lambda t, *_: toy_result(t, **results[t.operator]))
    with pool_of(source) as pool:
        list(pool.run(tasks_of("captured", "no cuda")))
        pids = [pool.workers[0].process.pid]
        for operator in ("captured", "no cuda", "not captured", "captured", "and no note", "captured"):
            assert [r.status for r in pool.run(tasks_of(operator))] == ["ok"]
            pids += [pool.workers[0].process.pid] if pool.workers else []
    assert pids[0] == pids[1] == pids[2] and len(set(pids)) == 3


def test_each_task_has_one_result_whatever_happens(toys, source):
    operators = [random.Random(i).choice(("ok", "ok", "die", "raise", "exit")) for i in range(24)]
    tasks = tasks_of(*operators)
    with pool_of(source, workers=3) as pool:
        results = list(pool.run(tasks))
    assert sorted((r.id, r.operator) for r in results) == [(t.id, t.operator) for t in tasks]
    assert all((r.status == "ok") == (r.operator == "ok") for r in results)


def test_a_worker_that_dies_idle_costs_nothing(toys, source):
    with pool_of(source, workers=2) as pool:
        while not ready(pool):
            pass
        for w in pool.workers:
            os.kill(w.process.pid, signal.SIGKILL)
            w.process.join()
        tasks = [dataclasses.replace(t, seed=2) for t in tasks_of("ok", "ok", "ok")]
        results = list(pool.run(tasks))
        assert sorted((r.id, r.seed, r.status) for r in results) == [(t.id, 2, "ok") for t in tasks]
        for n, r in enumerate(pool.run(tasks)):  # and while others are at work
            idle = [w for w in pool.workers if w.state == "ready"]
            os.kill(idle[0].process.pid, signal.SIGKILL) if n == 1 else None
            assert r.status == "ok"  # also where it had just been given its task
        assert n == 2


@pytest.mark.parametrize("rows", [8, 4])
def test_who_is_short_of_memory_gets_that_of_the_others(toys, source, tmp_path, monkeypatch, capsys, rows):
    """They are ended, what they did is done later, and nothing else runs until the hungry one is done.

    Where it then had room for all 8 rows, fewer workers wait from now on; where it had not, they were not the cause.
    """
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hungry(t, data, settings, turn):
        os.write(log, f"begin {t.id} {os.getpid()}\n".encode())
        if t.operator == "waits" and first_time(tmp_path / t.id):
            time.sleep(600)
        with turn:
            if t.operator == "hungry":
                wait_until(lambda: (tmp_path / "log").read_text().count("begin") > 2)
                turn.make_room()
                os.write(log, f"room {t.id} {os.getpid()}\n".encode())
                time.sleep(0.2)
            os.write(log, f"end {t.id} {os.getpid()}\n".encode())
            return toy_result(t, rows=rows)

    monkeypatch.setattr(evolve, "evaluate", hungry)
    with pool_of(source, workers=3) as pool:
        results = list(pool.run(tasks_of("hungry", "waits", "waits", "ok")))
        assert pool.size == (1 if rows == 8 else 3)  # from now on half as many, at least one
    os.close(log)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(r.id for r in results) == [f"g0.{i:02d}" for i in range(4)] and {r.status for r in results} == {"ok"}
    words = [word for word, *_ in lines]
    at = words.index("room")
    assert lines[at + 1][:2] == ["end", "g0.00"], "nobody began in the meantime"
    assert {pid for _, _, pid in lines[:at]} & {pid for _, _, pid in lines[at:]} == {lines[at][2]}
    told = "g0.00: had too little memory beside those that wait; from now on 1 at work"
    assert (told in capsys.readouterr().out) == (rows == 8)


def test_a_worker_that_cannot_start_stops_the_run(toys, source, monkeypatch, capfd):
    def broken(device):
        raise ZeroDivisionError("in every worker")

    monkeypatch.setattr(evolve, "turn_file", broken)
    with pytest.raises(Stop, match=r"No worker can start \(exit code 1; what it"), pool_of(source) as pool:
        list(pool.run(tasks_of("ok")))
    assert capfd.readouterr().err.count("in every worker\n") == 3
    with pytest.raises(Stop, match="No worker can start"), pool_of(source, workers=3) as pool:
        list(pool.run(tasks_of("ok")))
    assert "Going on with 2\n" in (output := capfd.readouterr().out) and "Going on with 1\n" in output


def test_a_worker_that_cannot_start_is_tried_again(toys, source, tmp_path, monkeypatch, capfd):
    def broken_once(device):
        if first_time(tmp_path / "mark"):
            raise ZeroDivisionError("in one worker")

    monkeypatch.setattr(evolve, "turn_file", broken_once)
    told = "A worker could not start (exit code 1; what it printed stands above); trying again\n"
    output = ""
    with pool_of(source, workers=2) as pool:
        for _ in range(200):
            assert [r.status for r in pool.run(tasks_of("ok", "ok"))] == ["ok", "ok"]
            output += capfd.readouterr().out
            if output and len(pool.workers) == 2 and not any(w.state == "starting" for w in pool.workers):
                break
            time.sleep(0.02)
        assert (pool.size, output) == (2, told)


def test_data_that_change_stop_the_run(toys, data_dir, source, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(source.folder, folder)
    with pool_of(prepare.load(folder)) as pool:
        assert [r.status for r in pool.run(tasks_of("ok"))] == ["ok"]
        os.utime(folder / "val.bin")
        with pytest.raises(prepare.PrepareError, match="changed while the run was at work"):
            list(pool.run(tasks_of("raise", "ok")))
    shutil.rmtree(folder)
    with pytest.raises(prepare.PrepareError, match="No tokens in"), pool_of(dataclasses.replace(source, folder=folder)):
        pass


# Turns of a device


def logs_turns(path: Path, seconds: float = 0.02):
    """An evaluation that logs what it does, with the process it is done in."""

    def logged(t, data, settings, turn):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"prepare {t.id} {os.getpid()}\n".encode())
        with turn:
            os.write(log, f"enter {t.id} {os.getpid()}\n".encode())
            time.sleep(seconds)
            os.write(log, f"leave {t.id} {os.getpid()}\n".encode())
        os.close(log)
        return toy_result(t)

    return logged


def assert_one_at_a_time(lines: list[list[str]]) -> list[str]:
    """Returns the ids in the order of their turns."""
    turns = [line for line in lines if line[0] != "prepare"]
    for (a, *who), (b, *same) in zip(turns[::2], turns[1::2], strict=True):
        assert (a, b, who) == ("enter", "leave", same)
    return [id for word, id, _ in turns if word == "leave"]


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def test_one_at_a_time_on_a_device(toys, source, tmp_path, monkeypatch):
    """Several prepare, one trains."""
    monkeypatch.setattr(evolve, "turn_file", lambda device: tmp_path / "turn")
    monkeypatch.setattr(evolve, "evaluate", logs_turns(tmp_path / "log"))
    with pool_of(source, workers=3) as pool:
        results = list(pool.run(tasks_of(*["ok"] * 12)))
    lines = lines_of(tmp_path / "log")
    order = assert_one_at_a_time(lines)
    assert len(order) == 12 and sorted(r.id for r in results) == sorted(order)
    between = [i for i, (word, *_) in enumerate(lines) if word == "prepare" and i and lines[i - 1][0] == "enter"]
    assert between  # while one trains another prepares


def test_two_runs_on_one_device_take_turns(toys, source, tmp_path, monkeypatch, capfd):
    """Each knows for whom it waits and says so once; never of its own workers."""
    monkeypatch.setattr(evolve, "turn_file", lambda device: tmp_path / "turn")
    monkeypatch.setattr(evolve, "PATIENCE", 0.05)
    logged = logs_turns(tmp_path / "log", 0.1)

    def together(t, *args):
        (tmp_path / f"began {t.id[0]}").touch()
        wait_until(lambda: (tmp_path / "began a").exists() and (tmp_path / "began b").exists())
        return logged(t, *args)

    monkeypatch.setattr(evolve, "evaluate", together)

    def run(name: str):
        with pool_of(source, workers=2, out=tmp_path / name) as pool:
            assert len(list(pool.run([dataclasses.replace(t, id=f"{name}{i}") for i, t in enumerate(many)]))) == 8

    many = tasks_of(*["ok"] * 8)
    with forked(lambda: run("a")) as a, forked(lambda: run("b")) as b:
        assert [os.waitpid(pid, 0)[1] for pid in (a, b)] == [0, 0]
    order = assert_one_at_a_time(lines_of(tmp_path / "log"))
    assert sorted(order) == sorted(f"{name}{i}" for name in "ab" for i in range(8))
    told = sorted(line for line in capfd.readouterr().out.splitlines() if line.startswith("The GPU"))
    expected = {f"The GPU is busy with another run, 'process {pid} for {tmp_path / name}': waiting for our turn"
                for pid, name in ((a, "a"), (b, "b"))}  # fmt: skip
    assert len(told) == len(set(told)) and set(told) <= expected and told


def test_a_run_alone_waits_for_nobody_in_words(toys, source, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evolve, "turn_file", lambda device: tmp_path / "turn")
    monkeypatch.setattr(evolve, "PATIENCE", 0.02)
    monkeypatch.setattr(evolve, "evaluate", logs_turns(tmp_path / "log", 0.15))
    with pool_of(source, workers=3, out=tmp_path) as pool:
        assert len(list(pool.run(tasks_of(*["ok"] * 5)))) == 5
    assert "busy" not in capfd.readouterr().out


def test_two_devices_do_not_wait_for_each_other(toys, source, tmp_path, monkeypatch):
    """Each trains until the other one does."""

    def meets(t, data, settings, turn):
        with turn:
            (tmp_path / t.id).touch()
            wait_until(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
            return toy_result(t)

    monkeypatch.setattr(evolve, "evaluate", meets)

    def run(name: str):
        evolve.turn_file = lambda device: tmp_path / f"turn of {name}"
        with pool_of(source, out=tmp_path / name) as pool:
            assert [r.status for r in pool.run([task(id=name)])] == ["ok"]

    with forked(lambda: run("a")) as a, forked(lambda: run("b")) as b:
        assert [os.waitpid(pid, 0)[1] for pid in (a, b)] == [0, 0]


def test_a_killed_holder_frees_the_turn(toys, source, tmp_path, monkeypatch, capsys):
    """And while it holds it, who waits is not ended: the alarm runs while preparing and while training alone."""
    monkeypatch.setattr(evolve, "PATIENCE", 0.05)

    def hold():
        with evolve.GpuTurn(tmp_path / "turn", "the holder", lambda line: None):
            (tmp_path / "held").touch()
            time.sleep(600)

    with forked(hold) as holder:
        wait_until((tmp_path / "held").exists)
        monkeypatch.setattr(evolve, "turn_file", lambda device: tmp_path / "turn")
        monkeypatch.setattr(evolve, "evaluate", logs_turns(tmp_path / "log"))
        began = time.monotonic()

        def kill_late():
            if time.monotonic() - began > 2.5 and first_time(tmp_path / "killed"):
                assert [word for word, *_ in lines_of(tmp_path / "log")] == ["prepare"]
                os.kill(holder, signal.SIGKILL)

        with pool_of(source, out=tmp_path, deadline=1) as pool:
            results = list(pool.run(tasks_of("ok"), kill_late))
        assert [r.status for r in results] == ["ok"] and (tmp_path / "killed").exists()
    told = [line for line in capsys.readouterr().out.splitlines() if line]
    assert told == ["The GPU is busy with another run, 'the holder': waiting for our turn"]


@pytest.mark.parametrize("name", ["a" * 400, "bytes \udcff", "ä→日本" * 40], ids=["long", "bytes", "letters"])
def test_any_name_of_a_folder_holds_a_turn(tmp_path, monkeypatch, name):
    """Who waits for another worker of its own run says nothing; for another run, it names it."""
    monkeypatch.setattr(evolve, "PATIENCE", 0.01)
    told = {"own": [], "other": []}

    def wait(who: str, lines: list[str]):
        turn = evolve.GpuTurn(tmp_path / "turn", who, lines.append)
        turn.fd = evolve.open_shared(turn.path)
        timer = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with contextlib.suppress(TimeoutError):
                turn.wait()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, timer)
            os.close(turn.fd)

    with evolve.GpuTurn(tmp_path / "turn", f"process 1 for {name}", pytest.fail):
        wait(f"process 1 for {name}", told["own"])
        wait("process 2 for b", told["other"])
    assert told["own"] == [] and len(told["other"]) == 1
    assert (
        told["other"][0].startswith("The GPU is busy with another run, 'process 1 for ") and told["other"][0].isascii()
    )


def test_a_turn_that_cannot_be_locked_is_a_line_and_no_crash(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # of somebody who would have us write there
    told = []
    with evolve.GpuTurn(tmp_path / "link", "we", told.append):
        assert not (tmp_path / "elsewhere").exists()
    assert len(told) == 1 and "link cannot be locked" in told[0]
    umask = os.umask(0o077)
    try:
        with evolve.GpuTurn(tmp_path / "turn", "we", told.append):
            assert (tmp_path / "turn").read_text().strip() == "we"
    finally:
        os.umask(umask)
    assert (tmp_path / "turn").stat().st_mode & 0o777 == 0o666, "every user may lock it"
    assert evolve.turn_file(torch.device("cpu")) is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_workers_end_with_their_parent(toys, source):
    ours, theirs = os.pipe()
    parent = os.fork()
    if not parent:
        with contextlib.suppress(BaseException), pool_of(source, workers=3) as pool:
            assert len(list(pool.run(tasks_of("ok", "ok")))) == 2
            for w, t in zip(pool.workers, tasks_of("hang early", "hang"), strict=False):  # the third has nothing to do
                w.pipe.send(t)
            os.write(theirs, json.dumps([w.process.pid for w in pool.workers]).encode())
            time.sleep(600)
        os._exit(1)
    workers = json.loads(os.read(ours, 1000))
    assert len(workers) == 3 and all(map(is_alive, workers))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        wait_until(lambda: not any(map(is_alive, workers)))
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)


def test_what_a_killed_worker_leaves_is_freed_in_silence(holder):
    assert (*holder.communicate(timeout=120), holder.returncode) == ("stopped\n", "", 0)
