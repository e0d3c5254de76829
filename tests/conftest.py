"""Fixtures of several files: a small text and its tokens, runs of toys.

The commands that tests start meet signals as a terminal's do, also where the tests run under nohup or behind `&`.
"""

import gc
import random
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import FLAGS, NET, family_of_transformers, genes_have, remember_designs, toy

import evolve
import genome
import prepare

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        # Goes on doing nothing here, while a command that is started from here has the default again.
        signal.signal(number, lambda *_: None)

PHRASES = "the cat sat on the mat. a dog ran far away! we are the champions, my friend; one two three four five"
WORDS = PHRASES.split()


def text(seed: int) -> str:
    rng = random.Random(seed)
    starts = (rng.randrange(0, len(WORDS) - 5, 5) for _ in range(60))
    return f"{seed} " + " ".join(" ".join(WORDS[i : i + 5]) for i in starts)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for i, seeds in enumerate((range(60), range(60, 80))):
        pq.write_table(pa.table({"text": [text(seed) for seed in seeds]}), folder / f"shard_{i:05d}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, data_dir):
    """A cache of its own with a small data set, and torch on one thread, which is faster for what is small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENESIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")  # of processes that are started
        patch.setattr(prepare, "VOCAB_SIZE", 300)
        prepare.prepare(data_dir=data_dir)
        evolve.Optimizer(genome.Model(NET, 64), 1.0)  # what torch imports late,
        gc.freeze()  # and what is never garbage: each evaluation looks for that
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(data_dir, cache) -> Path:
    return prepare.source_folder(data_dir=data_dir)


@pytest.fixture(scope="module")
def source(folder) -> prepare.Dataset:
    return prepare.load(folder)


@pytest.fixture(scope="module")
def data(source) -> prepare.Dataset:
    return source.to(torch.device("cpu"))


@pytest.fixture(autouse=True)
def handlers():
    """evolve.main takes over SIGTERM and SIGHUP."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(evolve, "evaluate", toy)
    monkeypatch.setattr(evolve, "START_METHOD", "fork")


@pytest.fixture
def free_params(monkeypatch):
    """Parameters are not counted, and designs made once; that costs more than all else here."""
    remember_designs(monkeypatch)
    monkeypatch.setattr(genome, "block_params", genes_have(1_000))


@pytest.fixture
def command(data_dir, monkeypatch, capsys):
    """Run the command with flags; returns the exit code, what it printed, and its errors."""
    monkeypatch.setattr(evolve, "check_ops", lambda: None)  # it has tests of its own

    def command(*flags, data_dir: str = data_dir) -> tuple[int, str, str]:
        capsys.readouterr()
        code = evolve.main([*FLAGS, "--data-dir", data_dir, *map(str, flags)])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def play(toys, free_params, command, tmp_path, monkeypatch):
    """Run the command with flags, on toys; returns the exit code and all that it printed."""
    monkeypatch.setattr(evolve, "picture", lambda rows, *_: f"{len(rows)} rows".encode())
    monkeypatch.setattr(evolve, "code_hash", lambda: "the code")  # it has tests of its own
    monkeypatch.setattr(evolve, "FAMILIES", family_of_transformers())
    monkeypatch.setattr(evolve, "LEVELS", {"mlp-1x64": genome.mlp(1, 64)})

    def play(*flags: str, out: Path = tmp_path / "out") -> tuple[int, str]:
        code, output, errors = command("--max-params=10000000", "--out", out, *flags)
        return code, output + errors

    return play
