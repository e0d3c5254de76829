"""What several of the tests use."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import signal
import struct
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import evolve
import genome
from evolve import Record, Result, Task
from genome import Family, Gene, Genome, Op, transformer

ROOT = Path(evolve.__file__).parent
TINY = dict(
    population_size=4,
    survivors=2,
    immigrants=1,
    max_generations=3,
    token_budget=1024,
    batch_tokens=256,
    seq_len=32,
    eval_tokens=1024,
    max_params=150_000,
    hurdle=1.0,
    repeats=3,
    baseline_trials=1,
    prescreen=1,
    finalists=1,
    final_seeds=2,
    long_seeds=0,
    workers=1,
)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
NET = Genome((Gene("norm"), Gene("conv1d", 64, skip=2), Gene("gate", 64, skip=1, expansion=1)), embed_dim=64)
BIG = dict(population_size=12, survivors=3, immigrants=1, repeats=9, max_params=10**9)
ALL_STAGES = dict(max_params=10**9, baseline_trials=7, long_seeds=2, long_factor=2.0)
ALL_KINDS = Genome(  # strides, gains, and each kind of table
    (
        Gene("ngram", 64, slots=4096, gated=False),
        Gene("linear", 128, skip=2),
        Gene("norm"),
        Gene("attention", 128, skip=2, values="token", conv=2, scale="small"),
        Gene("norm"),
        Gene("gate", 128, skip=2, stride=4, expansion=1),
        Gene("norm"),
        Gene("attention", 128, skip=2, values="token", conv=2),
        Gene("norm"),
        Gene("attention", 128, skip=2, values="bigram", kv_heads="one", scale="small", stride=2),
        Gene("identity", input=11, skip=1, scale="zero"),
        Gene("norm"),
        Gene("ngram", 128, n=1, skip=2),
        Gene("attention", 128, values="embedding", skip=1),
    ),
    embed_dim=128,
)


def tiny(**changes):
    return evolve.Settings(**{**TINY, **changes})


def task(net: Genome = NET, seed: int = 1, id: str = "g0.01", **fields) -> Task:
    known = dict(stage="search", id=id, genome=net, seed=seed, order=seed, generation=0, operator="random")
    return Task(**{**known, **fields})


def final_task(budget: float = 2.0, **fields) -> Task:
    return task(stage="final", generation=None, operator="", budget=budget, test=True, **fields)


def evaluate(t: Task, data, settings, turns: list | None = None) -> Result:
    """evolve.evaluate; notes in `turns` what the trial does with its turn."""

    class Noted(evolve.Turn):
        def __enter__(self):
            turns.append("enter")

        def make_room(self):
            turns.append("make room")

        def __exit__(self, *_):
            turns.append("leave")

    return evolve.evaluate(t, data, settings, evolve.Turn() if turns is None else Noted())


def narrow(net: Genome) -> Genome:
    """The same genes, 64 wide: cheap to build and to train."""
    genes = tuple(gene.change(dim=64) if gene.dim else gene for gene in net.genes)
    return dataclasses.replace(net, genes=genes, embed_dim=64)


def narrow_genomes(seed: int):
    rng = random.Random(seed)
    while True:
        yield narrow(genome.random_genome(rng))


def with_gene(gene: Gene, net: Genome = NET) -> Genome:
    return dataclasses.replace(net, genes=(*net.genes, gene))


@contextlib.contextmanager
def planted(compute):
    """An op that computes compute(self, x), as a gene; gone from the search space afterwards."""

    class Planted(Op, name="planted", keeps_width=True):
        def __init__(self, d_in, d_out):
            super().__init__()

        def forward(self, x):
            return compute(self, x)

    try:
        yield Gene("planted")
    finally:
        del genome.OPS["planted"]
        genome.block_params.cache_clear()


def padded(x, steps: int):
    """What comes that many tokens later."""
    return torch.nn.functional.pad(x[:, steps:], (0, 0, 0, steps))


def without_time(result: Result) -> Result:
    return dataclasses.replace(result, tokens_per_s=0, seconds=0, outside=0, finished="")


def toy_result(t: Task, status: str = "ok", **values) -> Result:
    """A result that depends on the task alone: better with more of the budget and of the text, worse by hand."""
    rng = random.Random(f"{t.genome.key}/{t.seed}")
    losses = ",".join(f"{3 - 0.1 * i + 0.01 * rng.random():.4f}" for i in range(evolve.CURVE))
    score = 1 + random.Random(t.genome.key).random() + 0.01 * rng.random() - 0.1 * math.log2(t.budget * t.text)
    score += evolve.family_of(t.id) is not None
    scores = dict(val_bpb=score, test_bpb=score + 0.02 if t.test else None) if status == "ok" else {}
    values = dict(passes=2 * t.budget / t.text, losses=losses, **scores) | values
    values = dict(params=1000, tokens=1024, tokens_per_s=rng.randrange(10**6)) | values
    return Result.of(t, status, **{**values, **({} if status == "ok" else dict(val_bpb=None))})


def toy(t: Task, data, settings, turn):
    if t.operator == "die early":
        os.kill(os.getpid(), signal.SIGKILL)
    if t.operator == "hang early":
        time.sleep(600)
    with turn:
        if t.operator == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if t.operator == "exit":
            os._exit(3)
        if t.operator == "hang":
            time.sleep(600)
        if t.operator == "raise":
            raise ZeroDivisionError("a planted error")
        return toy_result(t)


def first_time(path: Path) -> bool:
    """Whether nobody asked before, in any process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.01)


def in_child(function):
    """What function() returns in a forked process."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.write(theirs, json.dumps(function()).encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def fitness(net: Genome, seed: int) -> float:
    """1.0 with six attention genes in the network and little else, plus what a seed does."""
    ops = [node.gene.op for node in net.network]
    missing, others = abs(6 - ops.count("attention")), len(ops) - ops.count("attention")
    return 1 + 0.1 * missing + 0.01 * others + 0.002 * random.Random(f"{net.key}/{seed}").random()


def tuned(settings, **values) -> list[Result]:
    """All baselines, round by round."""
    rows = []
    while tasks := evolve.baseline_tasks(rows, settings, 300):
        rows += [toy_result(t, **values) for t in tasks]
    return rows


def search(settings, generations: int, score=fitness, status=lambda t: "ok") -> list[Result]:
    rows = []
    for generation in range(generations):
        for t in evolve.breed(rows, generation, settings, 300):
            value = score(t.genome, t.seed)
            rows.append(toy_result(t, status(t), val_bpb=value))
    return rows


def rounds(rows: list[Result], settings, result=toy_result) -> Iterator[list[Result]]:
    """Go on from the rows to the end of the run, round by round."""
    rows = list(rows)
    while tasks := evolve.next_tasks(rows, settings, 300):
        yield (found := [result(t) for t in tasks])
        rows += found


def planned(rows: list[Result], settings, most: int = 10**6, result=toy_result) -> list[Result]:
    """Go on from the rows to the end of the run, or for so many evaluations."""
    more = itertools.chain.from_iterable(rounds(rows, settings, result))
    return [*rows, *itertools.islice(more, most)]


def rows_of(out: Path) -> list[Result]:
    with Record(out) as record:
        return [without_time(row) for row in record.rows]


def png_size(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def uniform_bpb(
    tokens: np.ndarray, token_bytes: np.ndarray, vocab_size: int, *, seq_len: int, max_tokens: int | None = None
) -> float:
    """Return the score of uniform logits over the windows of `tokens`, uint16: log2(vocab_size) * tokens / bytes."""
    n_all = (len(tokens) - 1) // seq_len
    n_scored = min(n_all, (max_tokens or len(tokens)) // seq_len)
    first = np.arange(n_scored) * n_all // n_scored * seq_len
    n_bytes = token_bytes[tokens[first[:, None] + np.arange(1, seq_len + 1)]]
    return math.log2(vocab_size) * np.count_nonzero(n_bytes) / int(n_bytes.sum())


@contextlib.contextmanager
def forked(function):
    """A forked process that runs a function, killed in the end where it still lives; its id."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def genes_have(params: int):
    """In the place of genome.block_params: a gene has so many parameters."""
    return lambda gene, d_in, d_skip, frame: params


def remember_designs(monkeypatch):
    """Designs are made, grown and counted once: the plan asks anew with every call, which costs more than all else."""
    for name, family in genome.FAMILIES.items():
        monkeypatch.setitem(genome.FAMILIES, name, family._replace(design=functools.cache(family.design)))
    for name in ("is_small", "grown"):
        monkeypatch.setattr(evolve, name, functools.cache(getattr(evolve, name)))


def family_of_transformers(**traits: tuple) -> dict[str, Family]:
    """In the place of FAMILIES: transformers of any depth and width, and these traits; the first is 1 x 64."""
    return {"transformer": Family(transformer, traits)}
