"""evolve.py: training is what it says, a worker may die, the record survives, selection selects, the final adds up."""

import ast
import collections
import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from designs import NAMED_DESIGNS
from helpers import family_of_transformers, forked, genes_have, remember_designs, uniform_bpb

import evolve
import genome
import prepare
from evolve import Record, Result, Stop, Task
from genome import Gene, Genome, Op, transformer

ROOT = Path(evolve.__file__).parent
KILLS = int(os.environ.get("GENESIS_KILLS", 8))  # of one run, see kill_run.py
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
PHRASES = """the cat sat on the mat. a dog ran far away! we are the champions, my friend; one two three four five"""
WORDS = PHRASES.split()


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


@pytest.fixture(scope="module", autouse=True)
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
def folder(data_dir) -> Path:
    return prepare.source_folder(data_dir=data_dir)


@pytest.fixture(scope="module")
def source(folder) -> prepare.Dataset:
    return prepare.load(folder)


@pytest.fixture(scope="module")
def data(source) -> prepare.Dataset:
    return source.to(torch.device("cpu"))


@pytest.fixture(scope="module")
def kill_run(cache, data_dir, tmp_path_factory):
    """kill_run.py, at work on another core while the tests run."""
    out = tmp_path_factory.mktemp("kills") / "runs"
    command = [sys.executable, ROOT / "tests" / "kill_run.py", out, data_dir, str(KILLS), "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process
    process.kill()


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


@pytest.fixture(autouse=True)
def handlers():
    """evolve.main takes over SIGTERM and SIGHUP."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


def test_what_takes_long_is_started(kill_run, holder):
    """First in the file, so that both work while the rest is tested."""
    assert kill_run.poll() is None and holder.poll() is None


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


def plain_muon(weight, grad, momentum, lr, beta):
    """Muon on one matrix, in float64. Returns the weight and the momentum after a step."""
    momentum = beta * momentum + (1 - beta) * grad
    X = (1 - beta) * grad + beta * momentum
    tall = X.size(0) > X.size(1)
    X = X.T if tall else X
    X = X / (X.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    X = X.T if tall else X
    return weight - lr * max(1, X.size(0) / X.size(1)) ** 0.5 * X, momentum


def plain_adamw(weight, grad, m, v, t, lr):
    """AdamW without decay on one parameter, in float64, step t = 1, 2, ..."""
    m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad.square()
    return weight - lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-10), m, v


class PlainOptimizer:
    """What the Optimizer has to do, parameter by parameter and matrix by matrix."""

    def __init__(self, model, lr_factor):
        self.names = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        self.state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.names.items()}
        self.lr_factor, self.t = lr_factor, 0

    def adamw_lr(self, name, p):
        if name.endswith("table"):  # the embedding, and those of the ops
            return 0.2 * (768 / p.size(1)) ** 0.5
        if name == "head.matrix":
            return 0.004 * (768 / p.size(1)) ** 0.5
        return None if name.endswith("weight") else 0.01

    def step(self, grads, schedule):
        self.t += 1
        for name, p in self.names.items():
            grad, (m, v), lr = grads[name].double(), self.state[name], self.adamw_lr(name, p)
            if lr is not None:
                p, m, v = plain_adamw(p, grad, m, v, self.t, lr * self.lr_factor * schedule)
            else:
                stack = zip(*(t.view(-1, *p.shape[-2:]) for t in (p, grad, m)), strict=True)
                beta = (0.85, 0.85 + 0.1 / 3, 0.85 + 0.2 / 3, 0.95)[min(self.t - 1, 3)]  # of MOMENTUM_STEPS = 3
                done = [plain_muon(*one, 0.02 * self.lr_factor * schedule, beta) for one in stack]
                p, m = (torch.stack(t).view(p.shape) for t in zip(*done, strict=True))
            self.names[name], self.state[name] = p, (m, v)


EVERY_SHAPE = Genome(  # tall, wide and square matrices, stacks of them, vectors, tables, matrices that are not Muon's
    (
        Gene("ngram", 192, slots=4096, gated=False),
        Gene("linear", 64, skip=2, scale="small"),
        Gene("norm", kind="layer"),
        Gene("attention", 128, similarity="multiplicative", temperature="adaptive", memory=4, scale=True),
        Gene("conv1d", 128, kind="dense", kernel=3),
        Gene("conv1d", 64, kind="depthwise"),
        Gene("moe_router", 128, experts=4, shared=True, skip=2),
        Gene("attention", 128, values="token", kv_heads="one", skip=1),
        Gene("gate", 64, repeat=2),
        Gene("gate", 64, repeat=2, stride=2),
        Gene("gru", 64, skip=1),
    ),
    embed_dim=64,
)
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
TABLES = {  # of it, and how wide they are
    "embed.table": 128,
    "blocks.0.op.ngrams.table": 64,
    "blocks.3.op.mixed_in.table": 128,
    "blocks.7.op.mixed_in.table": 128,
    "blocks.9.op.mixed_in.table": 64,  # of one head of two
    "blocks.12.op.ngrams.table": 128,
}


@pytest.mark.parametrize("changes", [{}, dict(tied=True, embed_dim=128, lr_factor=0.5)], ids=["untied", "tied"])
def test_optimizer_is_muon_and_adamw(changes, monkeypatch):
    monkeypatch.setattr(evolve, "MOMENTUM_STEPS", 3)
    torch.manual_seed(0)
    net = dataclasses.replace(EVERY_SHAPE, **changes)
    model = genome.Model(net, 40)
    optimizer, plain = evolve.Optimizer(model, net.lr_factor), PlainOptimizer(model, net.lr_factor)
    assert {p.dim() for p in model.parameters()} == {1, 2, 3}
    for schedule in (1.0, 1.0, 0.7, 0.1, 0.0):
        grads = {
            name: torch.randn_like(p) * 10 ** random.Random(name).uniform(-3, 1) for name, p in plain.names.items()
        }
        for name, p in model.named_parameters():
            p.grad = grads[name].float()
        optimizer.schedule.fill_(schedule)
        optimizer.step()
        plain.step(grads, schedule)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), plain.names[name], atol=2e-4, rtol=1e-4, msg=name)
            assert p.grad is None


def test_every_parameter_is_in_one_group_and_has_a_gradient():
    idx = torch.randint(40, (2, 8))
    for net in [EVERY_SHAPE, dataclasses.replace(EVERY_SHAPE, tied=True), *itertools.islice(narrow_genomes(0), 60)]:
        model = genome.Model(net, 40)
        optimizer = evolve.Optimizer(model, net.lr_factor)
        groups = [*(g.params for g in optimizer.muon), *(g["params"] for g in optimizer.adamw.param_groups)]
        assert sorted(map(id, itertools.chain(*groups))) == sorted(map(id, model.parameters()))
        model(idx, idx).backward()
        idle = {name for name, p in model.named_parameters() if p.grad is None}
        read = net.tied or any(0 in (n.source, n.skip) or "embedding" in n.gene.reads for n in net.network)
        assert idle == (set() if read else {"embed.table"}), net.to_json()  # some read the tokens in a table alone
        optimizer.step()


def test_reset_forgets_all_but_the_weights():
    torch.manual_seed(0)
    used, fresh = genome.Model(EVERY_SHAPE, 40), genome.Model(EVERY_SHAPE, 40)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.schedule.fill_(1.0)
        optimizer.step()

    optimizer = evolve.Optimizer(used, 1.0)
    for seed in range(3):
        step(used, optimizer, seed)
    fresh.load_state_dict(used.state_dict())
    optimizer.reset()
    again = evolve.Optimizer(fresh, 1.0)
    for seed in range(3, 5):
        step(used, optimizer, seed)
        step(fresh, again, seed)
    for a, b in zip(used.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tied", [False, True])
def test_each_table_has_a_rate_of_its_own(tied):
    net = dataclasses.replace(ALL_KINDS, lr_factor=0.5, tied=tied)
    model = genome.Model(net, 40)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = evolve.Optimizer(model, net.lr_factor)
    rates = {tuple(names[id(p)] for p in group["params"]): group["base"] for group in optimizer.adamw.param_groups}
    vectors = max(rates, key=len)
    assert rates.pop(vectors) == 0.01 * 0.5
    assert not [name for name in vectors if name.endswith(("weight", "table", "matrix"))]
    expected = {(name,): pytest.approx(0.2 * math.sqrt(768 / width) * 0.5) for name, width in TABLES.items()}
    assert rates == expected | ({} if tied else {("head.matrix",): pytest.approx(0.004 * math.sqrt(768 / 128) * 0.5)})


def test_schedule():
    values = {0.0: 1.0, 0.25: 1.0, 0.5: 1.0, 0.75: 0.5, 0.9: 0.2, 1.0: 0.0}
    assert {f: pytest.approx(evolve.schedule_at(f)) for f in values} == values


# ----------------------------------------------------------------------------------------------------------------------
# A trial


def without_time(result: Result) -> Result:
    return dataclasses.replace(result, tokens_per_s=0, seconds=0, outside=0, finished="")


@pytest.mark.parametrize(("budget", "tokens"), [(1024, 1024), (1000, 1024), (1025, 1280), (1, 256)])
def test_token_budget_trains_just_these_tokens(data, monkeypatch, budget, tokens):
    steps = []
    step = evolve.Trial.step
    monkeypatch.setattr(evolve.Trial, "step", lambda trial: (steps.append(1), step(trial)))
    result = evaluate(task(), data, tiny(token_budget=budget))
    assert (result.status, result.tokens, len(steps)) == ("ok", tokens, tokens // 256)
    assert result.val_bpb > 0 and result.test_bpb is None
    assert result.params == NET.num_params(data.vocab_size) and result.key == NET.key
    assert len(result.curve) == evolve.CURVE and (result.rows, result.captured) == (8, None)


def test_final_tasks_train_longer_and_read_test(data, monkeypatch):
    read = []
    monkeypatch.setattr(evolve.Trial, "score", lambda trial, tokens: read.append(tokens) or [1.0] * 4)
    search = evaluate(task(), data, tiny())
    assert [tokens is data.val for tokens in read] == [True] and (search.tokens, search.budget) == (1024, 1.0)
    final = evaluate(final_task(2.5), data, tiny())
    assert read[1] is data.val and read[2] is data.test and len(read) == 3
    assert (final.tokens, final.budget, final.val_bpb, final.test_bpb) == (2560, 2.5, 1.0, 1.0)


def test_one_task_has_one_result(data):
    torch.manual_seed(123)  # what came before does not matter
    first = evaluate(task(), data, tiny())
    torch.rand(7), random.random(), np.random.rand()
    assert without_time(evaluate(task(), data, tiny())) == without_time(first)
    assert evaluate(task(seed=2), data, tiny()).val_bpb != first.val_bpb


def test_seed_changes_weights_order_changes_batches_and_all_genomes_meet_the_same(data):
    tasks = (task(), task(seed=2, order=1), task(order=2), task(transformer(1, 64, 1)))
    a, seed, order, net = (evolve.Trial(t, data, tiny(), 8) for t in tasks)
    assert not torch.equal(a.model.embed.table, seed.model.embed.table)
    assert torch.equal(a.model.embed.table, order.model.embed.table)
    assert not torch.equal(a.batches.order, order.batches.order)
    assert torch.equal(a.batches.order, seed.batches.order) and torch.equal(a.batches.order, net.batches.order)
    scores = [evaluate(t, data, tiny()).val_bpb for t in tasks[:3]]
    assert len(set(scores)) == 3


def test_a_share_of_the_text_is_its_beginning_and_seen_more_often(data):
    whole, part = (evolve.Trial(task(text=share), data, tiny(), 8) for share in (1.0, 0.25))
    assert len(part.batches.order) == (round(len(data.train) * 0.25) - 1) // 32 < len(whole.batches.order) // 3
    idx, _ = part.batches(torch.tensor(0), len(part.batches.order))
    assert torch.equal(idx[part.batches.order.argsort()].flatten(), data.train[: idx.numel()].long() & 0xFFFF)
    results = [evaluate(task(text=share), data, tiny()) for share in (1.0, 0.25)]
    assert [r.text for r in results] == [1.0, 0.25] and [r.tokens for r in results] == [1024, 1024]
    for r, trial in zip(results, (whole, part), strict=True):
        assert r.passes == pytest.approx(1024 / 32 / len(trial.batches.order), abs=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fewer_rows_at_once_train_the_same(data, rows):
    whole, parts = (evolve.Trial(task(), data, tiny(), n) for n in (8, rows))
    for trial in (whole, parts):
        trial.train(trial.step)
    assert parts.micro_steps == 8 // rows and whole.result.tokens == parts.result.tokens == 1024
    assert (whole.result.rows, parts.result.rows) == (8, rows)
    assert whole.window == parts.window == 32
    for a, b in zip(whole.result.curve, parts.result.curve, strict=True):
        assert a == pytest.approx(b, abs=2e-4, nan_ok=True)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert whole.score(data.val) == pytest.approx(parts.score(data.val), abs=1e-3)  # thirds of the window too


def test_training_learns(data, source):
    uniform = uniform_bpb(source.val, source.token_bytes, data.vocab_size, seq_len=32, max_tokens=1024)
    result = evaluate(task(), data, tiny(token_budget=20_480))
    curve = result.curve
    assert curve[0] > curve[2] > curve[-1] and result.val_bpb < 0.4 * uniform


def test_tables_are_trained(data):
    """The first step of AdamW moves each entry by its rate; rows of what was not read stay as they are."""
    trial = evolve.Trial(task(ALL_KINDS), data, tiny(token_budget=256), 8)
    before = {name: p.detach().clone() for name, p in trial.model.named_parameters()}
    trial.run()
    assert trial.result.status == "ok" and trial.result.tokens == 256
    assert trial.result.params == ALL_KINDS.num_params(data.vocab_size) == sum(p.numel() for p in before.values())
    after = dict(trial.model.named_parameters())
    assert list(after) == list(before) and {name for name in after if name.endswith("table")} == set(TABLES)
    assert {name for name in after if torch.equal(after[name], before[name])} == set()
    tokens, _ = trial.batches(torch.tensor(0), 8)
    for name, width in TABLES.items():
        change = (after[name] - before[name]).abs()
        assert change.max().item() == pytest.approx(0.2 * math.sqrt(768 / width), rel=1e-3), name
        rows = change.amax(1) > 0
        assert 10 < rows.sum() <= tokens.numel()
        if name not in ("blocks.0.op.ngrams.table", "blocks.9.op.mixed_in.table"):  # a row for each token
            assert set(rows.nonzero().flatten().tolist()) <= set(tokens.flatten().tolist())
    again = evaluate(task(ALL_KINDS), data, tiny())
    assert again.status == "ok" and again.val_bpb < trial.result.val_bpb


def test_progress_is_told_in_tokens_and_in_seconds(data, clock):
    for settings, expected in (
        (tiny(), [0.25, 0.5, 0.75, 1.0]),
        (tiny(token_budget=0, time_budget=1.0), [0.3, 0.6, 0.9, 1.2]),
    ):
        told = []
        result, model = evolve.run_trial(task(), data, settings, evolve.Turn(), told.append)
        assert told == pytest.approx(expected) and result.status == "ok" and model is not None


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but while a step runs, and how long each step takes."""
    clock = types.SimpleNamespace(now=100.0, steps=itertools.repeat(0.3), schedule=[])
    step = evolve.Trial.step

    def timed_step(trial):
        clock.now += next(clock.steps)
        clock.schedule.append(trial.optimizer.schedule.item())
        step(trial)

    monkeypatch.setattr(evolve.Trial, "step", timed_step)
    fake = types.SimpleNamespace(perf_counter=lambda: clock.now, monotonic=time.monotonic)
    monkeypatch.setattr(evolve, "time", fake)
    return clock


def test_time_budget_ends_at_most_a_step_late(data, clock):
    result = evaluate(task(), data, tiny(token_budget=0, time_budget=1.0))
    assert (result.seconds, result.tokens, result.tokens_per_s) == (1.2, 1024, 853)
    assert clock.schedule == pytest.approx([1.0, 1.0, 0.8, 0.2])
    clock.steps = iter([0.25, 4.0])
    result = evaluate(task(), data, tiny(token_budget=0, time_budget=1.0))
    assert (result.status, result.seconds, result.tokens) == ("ok", 4.25, 512)
    clock.steps = itertools.repeat(0.5)
    result = evaluate(final_task(3.0), data, tiny(token_budget=0, time_budget=1.0))
    assert (result.seconds, result.tokens) == (3.0, 6 * 256)


def test_a_step_that_stands_still_is_no_training(data, clock):
    """A step that takes over 20 times the median and a twentieth of the budget; never where tokens are the budget."""
    seconds = tiny(token_budget=0, time_budget=1.0)
    clock.steps = iter([0.02] * 10 + [0.9])
    result = evaluate(task(), data, seconds)
    assert (result.status, result.val_bpb, result.tokens) == ("stalled", None, 11 * 256)
    assert result.note == "nothing happened for 0.9 s of 1 s"
    clock.steps = iter([0.02] * 10 + [0.39] + [0.02] * 100)  # under 20 times
    assert evaluate(task(), data, seconds).status == "ok"
    clock.steps = iter([0.001] * 10 + [0.045] + [0.02] * 100)  # over 20 times, but of no account
    assert evaluate(task(), data, seconds).status == "ok"
    clock.steps = iter([0.9] + [0.02] * 100)  # what is slow once, at first, is no stall
    assert evaluate(task(), data, seconds).status == "ok"
    clock.steps = iter([0.001] * 3 + [0.9])
    assert evaluate(task(), data, tiny()).status == "ok"


def test_hurdle(data):
    s = tiny(token_budget=5120)  # 20 steps, judged after 6 by the loss of the last two, and after 10
    free = evaluate(task(), data, s)
    assert (free.status, free.hurdle, free.tokens) == ("ok", "", 5120)
    above, below = ((free.curve[2] + by, free.curve[4] + by) for by in (0.01, -0.01))
    for hurdle, steps in (((above[0], below[1]), 11), ((below[0], above[1]), 7), (below, 7)):
        stopped = evaluate(task(hurdle=hurdle), data, s)
        assert (stopped.status, stopped.hurdle, stopped.val_bpb) == ("stopped", "stopped", None)
        assert stopped.tokens == steps * 256 and stopped.curve[: steps // 2] == free.curve[: steps // 2]
        spared = evaluate(task(hurdle=hurdle, spared=True), data, s)
        assert (spared.status, spared.hurdle, spared.val_bpb) == ("ok", "spared", free.val_bpb)
    passed = evaluate(task(hurdle=above, spared=True), data, s)
    assert (passed.status, passed.hurdle, passed.val_bpb) == ("ok", "passed", free.val_bpb)


def test_outlook():
    in_seconds, in_tokens = tiny(token_budget=0, time_budget=5.0), tiny(token_budget=1024)
    assert evolve.outlook(3.5, 2e6, in_tokens) == evolve.outlook(3.5, 1e6, in_tokens) == 3.5
    difference = evolve.outlook(3.5, 2e6, in_seconds) - evolve.outlook(3.5, 1e6, in_seconds)
    assert difference == pytest.approx(evolve.SPEED_WORTH * math.log(2)), "the slower one has further to fall"


def test_hurdle_in_seconds_knows_the_speed(data, monkeypatch):
    s, seen = tiny(token_budget=0, time_budget=1.0), []
    monkeypatch.setattr(evolve, "outlook", lambda loss, tokens_per_s, s: seen.append((loss, tokens_per_s)) or 0.0)
    monkeypatch.setattr(evolve, "stood_still", lambda paces, budget: False)
    result = evaluate(task(hurdle=(1.0, 1.0)), data, s)
    assert result.hurdle == "passed" and [round(loss, 4) for loss, _ in seen] == [result.curve[2], result.curve[4]]
    for _, tokens_per_s in seen:
        assert result.tokens_per_s / 3 < tokens_per_s < result.tokens_per_s * 3


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


def with_gene(gene: Gene, net: Genome = NET) -> Genome:
    return dataclasses.replace(net, genes=(*net.genes, gene))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_training_has_no_score(data, bad):
    calls = []

    def forward(self, x):  # well at first, so that the check of the network lets it pass
        calls.append(torch.is_grad_enabled())
        return x * (bad if sum(calls) > 2 else 1)

    with planted(forward) as gene:
        result = evaluate(task(with_gene(gene)), data, tiny())
    assert (result.status, result.val_bpb, result.tokens) == ("diverged", None, 768)


def test_nan_before_training(data):
    with planted(lambda self, x: x / 0) as gene:
        result = evaluate(task(net := with_gene(gene)), data, tiny())
        assert (result.status, result.val_bpb, result.tokens) == ("diverged", None, None)
        assert result.params == net.num_params(data.vocab_size)


def test_divergence_ends_early(data, monkeypatch):
    monkeypatch.setattr(evolve, "HEAD_LR", 1e4)
    result = evaluate(task(), data, tiny(token_budget=256 * 400))
    assert (result.status, result.val_bpb) == ("diverged", None)
    assert 50 * 256 <= result.tokens < 256 * 400


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_none(data, monkeypatch, bad):
    monkeypatch.setattr(evolve.Trial, "score", lambda trial, tokens: [bad if tokens is data.test else 1.0] * 4)
    result = evaluate(final_task(), data, tiny())
    assert (result.status, result.val_bpb, result.test_bpb) == ("diverged", None, None)
    monkeypatch.setattr(evolve.Trial, "score", lambda trial, tokens: [bad] * 4)
    result = evaluate(task(), data, tiny())
    assert (result.status, result.val_bpb, result.test_bpb) == ("diverged", None, None)


def hungry(most: int):
    """An op that runs out of memory while it trains on more rows than that."""

    def forward(self, x):
        if torch.is_grad_enabled() and x.size(0) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nand so on")
        return x

    return planted(forward)


def test_out_of_memory_halves_the_rows(data, monkeypatch):
    turns = []
    with hungry(2) as gene:
        net = with_gene(gene)
        result = evaluate(task(net), data, tiny(), turns)
        assert (result.status, result.rows, result.tokens) == ("ok", 2, 1024)
        assert result.note == "memory for 2 rows at once, not 8"
        assert turns == ["enter", "make room", "leave"]  # others give theirs back before the rows are halved
        trial = evolve.Trial(task(net), data, tiny(), 2)
        trial.train(trial.step)
        assert [result.val_bpb, result.bpb_first, result.bpb_middle, result.bpb_last] == trial.score(data.val)
    with hungry(1) as gene:  # 10 rows, 5 rows, 1 row
        result = evaluate(task(with_gene(gene)), data, tiny(batch_tokens=320, token_budget=960))
        assert (result.status, result.rows, result.tokens) == ("ok", 1, 960)


def test_memory_that_others_held_costs_no_rows(data):
    """What fails once, before its turn or before the others made room, is tried again with all rows."""
    for fails in (1, 2):
        turns, left = [], [fails]

        def forward(self, x, left=left):
            if torch.is_grad_enabled() and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return x

        with planted(forward) as gene:
            result = evaluate(task(with_gene(gene)), data, tiny(), turns)
        assert (result.status, result.rows) == ("ok", 8 if fails == 1 else 4)
        assert turns == ["enter", "make room", "leave"]


def test_out_of_memory_at_the_floor(data, monkeypatch):
    turns = []
    with hungry(0) as gene:
        result = evaluate(task(with_gene(gene)), data, tiny(), turns)
    assert (result.status, result.val_bpb, result.tokens, result.rows) == ("oom", None, None, 1)
    assert turns == ["enter", "make room", "leave"]
    assert result.note == "CUDA out of memory. Tried to allocate 7 GiB"
    monkeypatch.setattr(evolve, "Optimizer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("while building")))
    result = evaluate(task(), data, tiny(), turns)
    assert (result.status, turns) == ("oom", ["enter", "make room", "leave"] * 2)


# ----------------------------------------------------------------------------------------------------------------------
# The check of a network: no leak, not dead


def padded(x, steps: int):
    """What comes that many tokens later."""
    return torch.nn.functional.pad(x[:, steps:], (0, 0, 0, steps))


def chunk_mean(x):
    return torch.cat([c.mean(1, keepdim=True).expand_as(c) for c in x.split(50, 1)], 1)


LEAKS = {
    "the next token": lambda self, x: x + padded(x, 1),
    "a token far ahead": lambda self, x: x + 0.1 * padded(x, 70),
    "the mean over time": lambda self, x: x - x.mean(1, keepdim=True),
    "the mean of its chunk": lambda self, x: x - chunk_mean(x),
    "the mean over the batch": lambda self, x: x - x.mean(0, keepdim=True),
    "rows before": lambda self, x: x.cumsum(0),
    "rows behind": lambda self, x: x.flip(0).cumsum(0).flip(0),
    "its rank in the batch": lambda self, x: x * (1 + x.flatten(0, 1).argsort(0).view_as(x) / x[..., 0].numel()),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_planted_leaks_are_caught(leak):
    rng = random.Random(leak)
    with planted(LEAKS[leak]) as gene:
        found = []
        while len(found) < 12:
            net = next(narrow_genomes(rng.random()))
            at = rng.randint(0, len(net.genes))
            net = dataclasses.replace(net, genes=genome.fit_distances([*net.genes[:at], gene, *net.genes[at:]]))
            if any(node.gene.op == "planted" for node in net.network):
                found.append(evolve.check_network(net, rng.randrange(1000)))
        assert found == ["leak"] * 12


def test_leaks_of_tables_and_strides_are_caught(monkeypatch):
    for seed in range(5):
        assert evolve.check_network(ALL_KINDS, seed) == ""
    whole, ungroup = genome.NgramTable.forward, genome.ungroup
    with monkeypatch.context() as patch:
        patch.setattr(genome.NgramTable, "forward", lambda table, ids: whole(table, ids.roll(-1, 1)))
        assert evolve.check_network(ALL_KINDS, 0) == "leak"
        for values in ("token", "bigram"):
            net = Genome((Gene("norm"), Gene("attention", 64, skip=2, values=values)), embed_dim=64)
            assert evolve.check_network(net, 0) == "leak"
    for op in ("shift", "gate"):
        net = Genome((Gene("norm"), Gene(op, 64 if op == "gate" else None, skip=2, stride=2)), embed_dim=64)
        assert evolve.check_network(net, 0) == ""
        with monkeypatch.context() as patch:
            early = lambda y, stride, T: padded(ungroup(y, stride, T), 1)  # noqa: E731  a group before its last token
            patch.setattr(genome, "ungroup", early)
            assert evolve.check_network(net, 0) == "leak"


def test_dead_networks_are_caught():
    for net in itertools.islice(narrow_genomes(5), 5):
        with planted(lambda self, x: torch.zeros_like(x)) as gene:
            assert evolve.check_network(with_gene(gene, net), 0) == "dead"
        with planted(lambda self, x: x.detach() * 0 + 1) as gene:
            assert evolve.check_network(with_gene(gene, net), 0) == "dead"


def test_clean_networks_pass():
    nets = [*itertools.islice(narrow_genomes(7), 120), *(narrow(net) for net in NAMED_DESIGNS.values())]
    assert [net.to_json() for net in nets if evolve.check_network(net, 3)] == []


@pytest.mark.parametrize(("leak", "status"), [("the next token", "leak"), (None, "dead")])
def test_an_impostor_is_not_trained(data, monkeypatch, leak, status):
    monkeypatch.setattr(evolve.Trial, "train", lambda *_: pytest.fail("it was trained"))
    turns = []
    with planted(LEAKS.get(leak) or (lambda self, x: torch.zeros_like(x))) as gene:
        result = evaluate(task(with_gene(gene)), data, tiny(), turns)
    assert (result.status, result.val_bpb, result.tokens, turns) == (status, None, None, [])


def test_a_network_that_draws_random_numbers_is_no_leak(data):
    """Dropout, in the check and in training: the same numbers in every pass."""
    with planted(lambda self, x: torch.nn.functional.dropout(x, 0.1)) as gene:
        for seed in range(5):
            assert evolve.check_network(with_gene(gene), seed) == ""
        assert evaluate(task(with_gene(gene)), data, tiny()).status == "ok"


LONG_LEAKS = {  # out of the sight of check_network, which looks at 150 tokens
    "the next token of long windows": lambda self, x: x + padded(x, 1) if x.size(1) > 200 else x,
    "9 tokens ahead": lambda self, x: x + padded(x, 9) if x.size(1) > 200 else x,
    "200 tokens ahead": lambda self, x: x + x.roll(-200, 1) if x.size(1) > 200 else x,
    "the last token of long windows": lambda self, x: x + x[:, -1:] if x.size(1) > 200 else x,
    "the mean of its chunk of 256": lambda self, x: (
        x + torch.cat([c.mean(1, keepdim=True).expand_as(c) for c in x.split(256, 1)], 1) if x.size(1) > 200 else x
    ),
}
LONG = dict(seq_len=512, batch_tokens=2048, token_budget=8192, eval_tokens=2048)


@pytest.mark.parametrize("leak", LONG_LEAKS)
def test_leaks_beyond_the_check_are_found_after_training(data, leak):
    with planted(LONG_LEAKS[leak]) as gene:
        net = dataclasses.replace(NET, genes=(gene, *NET.genes))
        assert evolve.check_network(net, 1) == ""
        result = evaluate(task(net), data, tiny(**LONG))
    assert (result.status, result.val_bpb, result.test_bpb) == ("leak", None, None)
    assert result.tokens == 8192


CLEAN = {
    "attention": Gene("attention", 64, heads=1),
    "ssm": Gene("ssm", 64),
    "moe, one of four": Gene("moe_router", 64, experts=4, routing="top1"),
    "convolution": Gene("conv1d", 64, kernel=4, kind="dense"),
    "gru": Gene("gru", 64),
    "retention": Gene("retention", 64),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_networks_pass_after_training(data, name):
    net = Genome((Gene("norm"), CLEAN[name].change(skip=2), Gene("gate", 64, skip=1, expansion=1)), embed_dim=64)
    assert evaluate(task(net), data, tiny(**LONG)).status == "ok"


# ----------------------------------------------------------------------------------------------------------------------
# Workers. A toy stands in for the evaluation; what it does is what the task's operator says.


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


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(evolve, "evaluate", toy)
    monkeypatch.setattr(evolve, "START_METHOD", "fork")


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


def first_time(path: Path) -> bool:
    """Whether nobody asked before, in any process."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


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


# ----------------------------------------------------------------------------------------------------------------------
# Selection and breeding. A toy fitness, whose best is known: genes of one kind, six of them are best.


@pytest.fixture
def free_params(monkeypatch):
    """Parameters are not counted, and designs made once; that costs more than all else here."""
    remember_designs(monkeypatch)
    monkeypatch.setattr(genome, "block_params", genes_have(1_000))


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


BIG = dict(population_size=12, survivors=3, immigrants=1, repeats=9, max_params=10**9)


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
    assert text == ("The hurdle stopped 2 of 7 newcomers and saved 12% of all training; 2 that missed it ran on, 1 of "
                    "them to survive.")  # fmt: skip


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


ALL_STAGES = dict(max_params=10**9, baseline_trials=7, long_seeds=2, long_factor=2.0)


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


# ----------------------------------------------------------------------------------------------------------------------
# The record


def some_rows() -> list[Result]:
    rows = [toy_result(t) for t in evolve.breed([], 0, tiny(max_params=10**7), 300)]
    rows[:2] = dataclasses.replace(rows[0], captured=True), dataclasses.replace(rows[1], captured=False, rows=None)
    odd = "a\ttab, a\r\nline, a # sign, \x0b \x0c \x1c \x85 \u2028 and “ä→日本”"
    failed = toy_result(task(), "crash", note=odd, seconds=1e-9, losses="nan,1.0000,inf", trace="only for the console")
    return [*rows, failed, dataclasses.replace(toy_result(final_task(), val_bpb=1.23456789), note="ends in → é")]


@pytest.fixture
def written(tmp_path, free_params) -> bytes:
    """A record with some rows; its bytes."""
    with Record(tmp_path) as record:
        record.begin({"seed": 0, "data": "“texts”"})
        for row in some_rows():
            record.append(row)
    return (tmp_path / "results.tsv").read_bytes()


def test_rows_come_back(tmp_path, written):
    with Record(tmp_path) as record:
        assert record.header == {"seed": 0, "data": "“texts”"}
        assert len(record.rows) == 6
        for row, back in zip(some_rows(), record.rows, strict=True):
            note = re.sub(r"[\t\r\n]+", " ", row.note).replace("#", "")
            values = dict(finished=back.finished, note=note, val_bpb=row.val_bpb and round(row.val_bpb, 6))
            values |= dict(test_bpb=row.test_bpb and round(row.test_bpb, 6), seconds=row.seconds and 0.0, trace="")
            assert back == dataclasses.replace(row, **values)
            assert Genome.from_json(back.genome).key == back.key
        assert [math.isfinite(x) for x in record.rows[4].curve] == [False, True, False]
    assert (tmp_path / "results.tsv").read_bytes() == written


def test_a_torn_last_line_is_dropped(tmp_path, written):
    path = tmp_path / "results.tsv"
    start = written.rindex(b"\n", 0, -1) + 1
    assert not written[start:].isascii()
    with Record(tmp_path) as record:
        rows = record.rows
    for end in range(start, len(written)):  # the last of these has it all but the line's end
        path.write_bytes(written[:end])
        with Record(tmp_path) as record:
            assert record.rows == rows[:-1]
            assert path.read_bytes() == written[:start]
            if end % 50 == 0:
                record.append(rows[-1])
                assert path.read_bytes() == written


FOREIGN = {
    "one line": b"hello",
    "two lines": b"hello\nyou",
    "empty lines": b"\n\n\n",
    "binary": bytes(range(256)),
    "no object": b"# 3\n" + "\t".join(evolve.COLUMNS).encode() + b"\n",
    "another program's": b"generation\tid\tval_bpb\n0\t1\t9.484\n",
    "other columns": b'# {"seed": 0}\n'
    + "\t".join([name for name in evolve.COLUMNS if name != "genome"]).encode()
    + b"\n",
    "a short row": b'# {"seed": 0}\n' + "\t".join(evolve.COLUMNS).encode() + b"\n0\tg0.01\n",
    "a word for a number": b'# {"seed": 0}\n'
    + "\t".join(evolve.COLUMNS).encode()
    + b"\n"
    + b"x\t" * (len(evolve.COLUMNS) - 1)
    + b"x\n",
    "nothing": b"",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_record_is_left_alone(tmp_path, name):
    path = tmp_path / "results.tsv"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(Stop, match=r"results.tsv is no results.tsv of this program.*--out DIR"):
        Record(tmp_path)
    assert path.read_bytes() == FOREIGN[name]


def test_a_folder_in_its_place(tmp_path):
    (tmp_path / "results.tsv").mkdir()
    with pytest.raises(Stop, match=r"results.tsv: Is a directory\. Move it away, or use --out DIR"):
        Record(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(Stop, match=r"file: File exists\. Name another folder with --out"):
        Record(tmp_path / "file")


def stopped(function) -> str:
    """The message of the Stop that function() raises."""
    try:
        function()
    except Stop as stop:
        return str(stop)
    return ""


def test_one_run_in_a_folder(tmp_path):
    with Record(tmp_path):
        message = in_child(lambda: stopped(lambda: Record(tmp_path)))
        assert message == f"Another run is at work in {tmp_path}; wait for it, or use --out DIR"
    assert in_child(lambda: stopped(lambda: Record(tmp_path))) == ""


@pytest.mark.parametrize("room", [0, 1, 100])
@pytest.mark.parametrize("truncate", [True, False])
def test_a_full_disk(tmp_path, written, room, truncate):
    """A limit on the size of files cuts a write short and then refuses, as a full disk does."""
    path = tmp_path / "results.tsv"

    def fill():
        with Record(tmp_path) as record:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) + room, resource.RLIM_INFINITY))
            if not truncate:  # the worst case: what was written of the line cannot be taken back
                os.truncate = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no"))
            message = stopped(lambda: record.append(record.rows[0]))
            return [message, len(record.rows), stopped(lambda: evolve.write_whole(tmp_path / "best", b"x" * 10**6))]

    message, rows, other = in_child(fill)
    assert message == f"{path}: File too large. {evolve.GO_ON}" and rows == 6
    assert other == f"{tmp_path / 'best'}: File too large. {evolve.GO_ON}" and not (tmp_path / "best").exists()
    assert path.read_bytes()[: len(written)] == written
    assert len(path.read_bytes()) == len(written) + (0 if truncate else room)
    with Record(tmp_path) as record:
        assert len(record.rows) == 6
    assert path.read_bytes() == written


def test_an_unwritable_folder(free_params):
    """Not for the superuser, who may write anywhere: then as somebody else."""
    with tempfile.TemporaryDirectory() as out:
        out, path = Path(out), Path(out) / "results.tsv"
        with Record(out) as record:
            record.begin({})
            record.append(some_rows()[0])
        before = path.read_bytes()
        path.chmod(0o444)
        (out / ".lock").chmod(0o666)
        out.chmod(0o555)

        def attempt():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            with Record(out) as record:
                row = record.rows[0]
                acts = (lambda: record.append(row), lambda: record.begin({}), record.move_away)
                return [*map(stopped, acts), stopped(lambda: Record(out / "new"))]

        messages = in_child(attempt)
        out.chmod(0o755)
        assert all("Permission denied" in message for message in messages), messages
        assert path.read_bytes() == before and {p.name for p in out.iterdir()} == {"results.tsv", ".lock"}


def test_a_lock_is_free_when_the_record_is_closed(tmp_path):
    for _ in range(3):
        with Record(tmp_path) as record:
            descriptor = record.lock
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    with contextlib.suppress(ZeroDivisionError), Record(tmp_path):
        raise ZeroDivisionError
    assert in_child(lambda: stopped(lambda: Record(tmp_path))) == ""


def cells_of(line: bytes) -> dict[str, str]:
    return dict(zip(evolve.COLUMNS, line.decode().split("\t"), strict=True))


def line_with(line: bytes, **cells: str) -> bytes:
    return "\t".join((cells_of(line) | cells).values()).encode()


BROKEN = {  # what an editor, a merge or a spreadsheet makes of the lines 3 to 8, and what is said of it
    "a row twice": (lambda lines: [*lines, lines[0]], r"line 9: g0\.01 with seed 0 stands there again"),
    "a failed row three times": (lambda lines: [*lines, lines[4], lines[4]], r"line 10: g0\.01 with seed 1 stands"),
    "ok without a score": (lambda lines: [line_with(lines[0], val_bpb=""), *lines[1:]], "line 3: status ok with a val"),
    "a score of nan": (lambda lines: [*lines[:2], line_with(lines[2], val_bpb="nan"), *lines[3:]], "line 5: status ok"),
    "an infinite score": (
        lambda lines: [line_with(lines[0], val_bpb="inf")],
        "line 3: status ok with a val_bpb of inf",
    ),
    "a failure with a score": (
        lambda lines: [line_with(lines[4], val_bpb="1.5")],
        "line 3: status crash with a val_bpb",
    ),
    "an unknown status": (
        lambda lines: [lines[0], line_with(lines[1], status="fine")],
        "line 4: no status is called 'f",
    ),
    "a word for a number": (lambda lines: [line_with(lines[0], seed="zero")], "line 3: invalid literal for int"),
    "a decimal comma": (
        lambda lines: [line_with(lines[0], val_bpb="1,5")],
        "line 3: could not convert string to float",
    ),
    "a word for a bool": (lambda lines: [line_with(lines[0], captured="WAHR")], "line 3: "),
    "no genome": (lambda lines: [line_with(lines[0], genome="{}")], "line 3: "),
    "half a genome": (lambda lines: [*lines[:3], lines[3][:-9]], "line 6: "),
    "quotes of a spreadsheet": (
        lambda lines: [
            line_with(line, genome='"' + cells_of(line)["genome"].replace('"', '""') + '"') for line in lines
        ],
        "line 3: ",
    ),
    "a cell too many": (lambda lines: [lines[0] + b"\t", *lines[1:]], "line 3: "),
    "a cell too few": (lambda lines: [lines[0], lines[1].rpartition(b"\t")[0]], "line 4: "),
    "an empty line": (lambda lines: [*lines[:2], b"", *lines[2:]], "line 5: "),
    "a merge conflict": (lambda lines: [lines[0], b"<<<<<<< HEAD", *lines[1:]], "line 4: "),
    "another encoding": (lambda lines: [lines[4].decode().encode("utf-16")], "it does not begin as one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_refused_with_its_line(tmp_path, written, name):
    path, (broken, message) = tmp_path / "results.tsv", BROKEN[name]
    header, columns, *lines = written.removesuffix(b"\n").split(b"\n")
    content = b"\n".join([header, columns, *broken(lines)]) + b"\n"
    path.write_bytes(content)
    with pytest.raises(Stop, match=message) as stop:
        Record(tmp_path)
    assert str(stop.value).startswith(f"{path} is no results.tsv of this program: ")
    assert str(stop.value).endswith("Mend it or move it away, or use --out DIR") and path.read_bytes() == content


def test_two_attempts_are_no_broken_record(tmp_path, written):
    path, lines = tmp_path / "results.tsv", written.splitlines(keepends=True)
    for more in ([lines[6]], [line_with(lines[6], status="ok", val_bpb="1.5")]):  # failed again; went well
        path.write_bytes(b"".join([*lines, *more]))
        with Record(tmp_path) as record:
            assert len(record.rows) == 7
    path.write_bytes(written.replace(b"\n", b"\r\n"))  # saved by an editor of another system
    with Record(tmp_path) as record:
        assert len(record.rows) == 6 and record.rows[-1].genome == some_rows()[-1].genome


@pytest.mark.parametrize("harm", ["emptied", "deleted", "longer", "in its place"])
def test_a_record_that_is_changed_in_mid_run_is_rescued(tmp_path, written, harm):
    path, rows = tmp_path / "results.tsv", some_rows()
    with Record(tmp_path) as record:
        if harm == "emptied":
            path.write_bytes(b"")
        elif harm == "deleted":
            path.unlink()
        elif harm == "longer":
            path.write_bytes(written + b"more\n")
        else:
            path.unlink()
            path.write_bytes(written[:-9])
        changed = path.read_bytes() if path.exists() else None
        again = dataclasses.replace(rows[0], seed=7)
        with pytest.raises(
            Stop, match=r"results.tsv was changed or deleted .* in results.rescued.tsv: put that in its"
        ):
            record.append(again)
        assert (path.read_bytes() if path.exists() else None) == changed
    assert (tmp_path / "results.rescued.tsv").read_bytes() == written
    os.replace(tmp_path / "results.rescued.tsv", path)
    with Record(tmp_path) as record:
        assert len(record.rows) == len(rows)
        record.append(again)
    assert path.read_bytes().startswith(written)


RECORDS = {  # of the repository: rows by stage, rows that were stopped at the hurdle (all others were ok)
    "runs/drift-5s/results.tsv": (dict(baseline=12, search=230, final=15), 22),
    "runs/random-5s/results.tsv": (dict(baseline=12, search=273, final=5), 200),
    "runs/seed0-5s/results.tsv": (dict(baseline=12, search=240, final=55), 41),
    "runs/seed1-5s/results.tsv": (dict(baseline=12, search=240, final=17), 47),
    "runs/seed2-5s/results.tsv": (dict(baseline=12, search=82, final=15), 15),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_earlier_versions_are_read(name):
    stages, n_stopped = RECORDS[name]
    content = (ROOT / name).read_bytes()
    header, columns, rows = evolve.read_results(content)
    assert collections.Counter(r.stage for r in rows) == stages
    n = sum(stages.values())
    assert collections.Counter(r.status for r in rows) == {"ok": n - n_stopped, "stopped": n_stopped}
    assert content.decode().splitlines()[1].split("\t") == columns and header["device"] == "NVIDIA H200"
    assert all(Genome.from_json(r.genome).summary for r in rows)
    assert all((r.generation is None) == (r.stage != "search") for r in rows)
    assert {r.budget for r in rows if r.stage == "final"} == {2.0}
    assert {r.budget for r in rows if r.stage != "final"} == {1.0}
    assert {r.operator for r in rows if r.stage != "search"} == {""} and "again" not in {r.operator for r in rows}
    assert {r.captured for r in rows} == {r.rows for r in rows} == {r.order for r in rows} == {None}
    assert any(r.operator == "repeat" for r in rows) and all(r.tokens_per_s > 1000 for r in rows)
    assert all(1.4 < r.val_bpb < 6 for r in rows if r.status == "ok") and evolve.searched(rows)[0].mean < 1.53


def test_the_controls_of_the_repository_are_found(capsys):
    header, _, rows = evolve.read_results((ROOT / "runs/seed0-5s/results.tsv").read_bytes())
    found = evolve.find_controls(ROOT, header)
    assert {key: len(rows) for key, rows in found.items()} == {
        ("strategy", "random"): 290,
        ("strategy", "drift"): 257,
        ("seed", 1): 269,
        ("seed", 2): 109,
    }
    s = evolve.Settings()
    o = evolve.outcome(rows, s, 8192)
    said = f"{ROOT}/runs/seed0-5s/results.tsv is left out of the picture: it is the same run\n"
    assert capsys.readouterr().out == said and evolve.picture(rows, "the published run", found, o, s)


def test_a_record_with_other_columns_is_read(tmp_path, written):
    """A version of tomorrow or of yesterday: what we do not know is left, what it lacks is not known."""
    header, columns, *lines = written.removesuffix(b"\n").split(b"\n")
    more = b"\n".join([header, columns + b"\tmood", *(line + b"\tgood" for line in lines)]) + b"\n"
    _, names, rows = evolve.read_results(more)
    assert names == [*evolve.COLUMNS, "mood"] and rows == evolve.read_results(written)[2]
    at = list(evolve.COLUMNS).index("outside")
    fewer = [b"\t".join(cell for i, cell in enumerate(line.split(b"\t")) if i != at) for line in (columns, *lines)]
    _, names, rows = evolve.read_results(b"\n".join([header, *fewer]) + b"\n")
    assert names == [name for name in evolve.COLUMNS if name != "outside"] and len(rows) == 6
    assert {row.outside for row in rows} == {None} and [r.val_bpb for r in rows][-1] == 1.234568


def test_a_record_of_the_version_before_is_read(written, capsys):
    """Without the seed of the order, the share of the text and the passes over it, and with settings that are gone."""
    _, columns, *lines = written.removesuffix(b"\n").split(b"\n")
    kept = [i for i, name in enumerate(evolve.COLUMNS) if name not in ("order", "text", "passes")]
    assert len(kept) == len(evolve.COLUMNS) - 3
    older = [b"\t".join(line.split(b"\t")[i] for i in kept) for line in (columns, *lines)]
    header = {"seed": 0, "strategy": "elites", "hurdle_at": 0.7, "final_factor": 2.0}
    read, names, rows = evolve.read_results(b"\n".join([f"# {json.dumps(header)}".encode(), *older]) + b"\n")
    expected = [dataclasses.replace(r, order=None, text=1.0, passes=None) for r in evolve.read_results(written)[2]]
    assert (read, names, rows) == (header, [list(evolve.COLUMNS)[i] for i in kept], expected)
    assert evolve.searched(rows) and evolve.outcome(rows, tiny(), 300).final == []


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs, of toys


@pytest.fixture
def play(toys, free_params, data_dir, tmp_path, monkeypatch, capsys):
    """Run the command with flags; returns the exit code and what it printed."""
    monkeypatch.setattr(evolve, "picture", lambda rows, *_: f"{len(rows)} rows".encode())
    monkeypatch.setattr(evolve, "check_ops", lambda: None)  # it has tests of its own,
    monkeypatch.setattr(evolve, "code_hash", lambda: "the code")  # and so has this
    monkeypatch.setattr(evolve, "FAMILIES", family_of_transformers())
    monkeypatch.setattr(evolve, "LEVELS", {"mlp-1x64": genome.mlp(1, 64)})

    def play(*flags: str, out: Path = tmp_path / "out") -> tuple[int, str]:
        capsys.readouterr()
        code = evolve.main([*FLAGS, "--max-params=10000000", "--data-dir", data_dir, "--out", str(out), *flags])
        output = capsys.readouterr()
        return code, output.out + output.err

    return play


WHOLE = 28  # evaluations of a run that is played
THE_FINAL = "bits per byte on test after 1,024 tokens"
LONG_STEP = ("--long-seeds=2", "--long-factor=2")  # the second step of the final


def rows_of(out: Path) -> list[Result]:
    with Record(out) as record:
        return [without_time(row) for row in record.rows]


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
    assert "Does the lead last? After 2,048 tokens" in told and "more often? 1,024 tokens on 50% of the text" in told


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
        assert evolve.evolve(record, *rest)
        assert len(record.rows) == 3 * s.population_size and not evolve.next_tasks(record.rows, s, 300)


# ----------------------------------------------------------------------------------------------------------------------
# The final


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
    assert [(f.id, f.failed) for f in o.final] == [("g0.00", 0), ("g0.01", 1), ("transformer-1x64", 1)]
    leads = {f.id: [lead.values for lead in f.leads.values()] for f in o.final}
    assert o.final[1].test.values == (1.15, 1.05) and leads["g0.01"] == [(pytest.approx(0.45),)]
    assert leads["g0.00"] == [(pytest.approx(0.2), pytest.approx(0.5))]
    assert winner(rows, s)["id"] == "g0.00"
    assert "\n".join(evolve.final_section(rows, s, o)).count(", 1 failed") == 2
    # the transformer failed: there is a winner without a lead
    tests = {"g0.00": [1.30, 1.10, 1.20], "g0.01": [1.1, 1.15, 1.05], "transformer-1x64": [None] * 3}
    rows = final_rows(tests, s)
    best, o = winner(rows, s), outcome(rows, s)
    assert (best["id"], best["stage"], best["final"]["winner"]["leads"]) == ("g0.01", "final", {})
    assert best["final"]["baselines"] == [] and o.rival is None and o.target == (None, 0)
    assert "g0.01" in evolve.end_text(rows, s, 300, {}, Path("out")) and best["rival"]["id"] == "transformer-1x64"
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
    assert play("--max-generations=4", "--finalists=2", "--mutation-rate=0.9", *LONG_STEP)[0] == 0
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
    assert best["time_to_target"] == {"share_of_budget": None, "seeds_that_reach_it": 0}


# ----------------------------------------------------------------------------------------------------------------------
# One design: --train, --save, --write


@pytest.fixture
def command(data_dir, monkeypatch, capsys):
    """Run the command with flags; returns the exit code, what it printed, and its errors."""
    monkeypatch.setattr(evolve, "check_ops", lambda: None)

    def command(*flags, data_dir: str = data_dir) -> tuple[int, str, str]:
        capsys.readouterr()
        code = evolve.main([*FLAGS, "--data-dir", data_dir, *map(str, flags)])
        return code, *capsys.readouterr()

    return command


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
    assert code == 1 and f"{tmp_path / 'none'} is no model that --save kept" in error
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


def test_a_training_that_fails_says_so(command, tmp_path):
    path = tmp_path / "net.json"
    with planted(LEAKS["the next token"]) as gene:
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
# The picture


def png_size(content: bytes) -> tuple[int, int]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def picture(rows: list[Result], title: str = "a title", controls: dict | None = None, settings=None) -> bytes | None:
    settings = settings or tiny(**BIG)
    return evolve.picture(rows, title, controls or {}, outcome(rows, settings), settings)


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
        for label in ("median of the generation", "best so far, mean of its evaluations"):
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
    losses, leaders = evolve.halfway_losses(rows), evolve.leaders_by_generation(rows, s.survivors)
    lines = evolve.features_section(rows, losses, evolve.steps(rows, losses), leaders, linear)
    told = {line.split(" | ")[0]: line.split(" | ")[1:4] for line in lines if line.startswith("| ")}
    assert told["| linear"] == ["4", "the end", "1"] and told["| attention"] == ["1", "generation 2", "—"]
    assert "| gru" not in told and lines[0].startswith("Nats per token")


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


# ----------------------------------------------------------------------------------------------------------------------
# Which runs are the same one: the hash of the code that decides


def code_of(program: dict[str, str], folder: Path) -> dict[tuple[str, str], str]:
    for name, text in program.items():
        (folder / name).write_text(text, encoding="utf-8")
    return evolve.deciding_code(folder)


@pytest.fixture(scope="module")
def program() -> dict[str, str]:
    return {file: (ROOT / file).read_text(encoding="utf-8") for file in ("prepare.py", "genome.py", "evolve.py")}


def edited(program: dict[str, str], file: str, old: str, new: str) -> dict[str, str]:
    assert program[file].count(old) >= 1, f"{file} has no {old!r}"
    return {**program, file: program[file].replace(old, new, 1)}


DECIDING = {  # a file, what of it changes, and how
    "half the score": ("prepare.py", "bits_per_byte", "(nats / (math.log(2) *", "(nats / (2 * math.log(2) *"),
    "another order of batches": ("prepare.py", "Batches", "(first + torch.arange(", "(first + 7 * torch.arange("),
    "fewer windows": ("prepare.py", "window_count", "return targets // seq_len\n", "return targets // seq_len - 1\n"),
    "other tokens": ("prepare.py", "gather", ".long() & 0xFFFF", ".long() & 0x7FFF"),
    "another precision": ("evolve.py", "Trial", '_matmul_precision("high")', '_matmul_precision("highest")'),
    "other seeds": ("evolve.py", "SEEDS", "SEEDS = 100_000", "SEEDS = 10_000"),
    "who was searched": ("evolve.py", "searched", 'candidates(of_stage(rows, "search"))', "candidates(rows)"),
    "who is a candidate": ("evolve.py", "candidates", "len(group) - len(ok) < 2", "len(group) - len(ok) < 3"),
    "who is best": ("evolve.py", "candidates", "(c.mean, in_order(c.id))", "(min(c.scores), in_order(c.id))"),
    "a tie": ("evolve.py", "in_order", "int(part) if part.isdecimal() else part", "part"),
    "the hurdle of a generation": ("evolve.py", "hurdle_after", "math.ceil(min(1.0, times", "round(min(1.0, times"),
    "where the hurdle stands": ("evolve.py", "RUNGS", "RUNGS = ((3, 2.0)", "RUNGS = ((4, 2.0)"),
    "what speed is worth": ("evolve.py", "SPEED_WORTH", "SPEED_WORTH = 0.15", "SPEED_WORTH = 0.1"),
    "who misses the hurdle": ("evolve.py", "Trial", "/ now, s) > limit", "/ now, s) >= limit"),
    "how much of the text": ("evolve.py", "Trial", "round(len(data.train) * task.text)", "len(data.train)"),
    "the schedule": ("evolve.py", "schedule_at", "2 * (1 - fraction)", "3 * (1 - fraction)"),
    "whose child": ("evolve.py", "elites", "rng.choice(known[", "max(known["),
    "who breeds by another strategy": ("evolve.py", "AGE", "AGE = 60", "AGE = 61"),
    "what a genome consists of": ("evolve.py", "parts", "found[(\"pair\", *pair)] = 0.35", "pass"),
    "what is alike": ("evolve.py", "pieces", '["", *genome.ops]', "genome.ops"),
    "how much a bad score counts": ("evolve.py", "squeezed", "math.log1p(max", "math.sqrt(max"),
    "what is believed before": ("evolve.py", "WEIGHT", "WEIGHT = 0.025", "WEIGHT = 0.02"),
    "which child is trained": ("evolve.py", "breed", "born = min((new(who)", "born = max((new(who)"),
    "how operators are drawn": ("genome.py", "LONG", "LONG = 12", "LONG = 16"),
    "a learning rate": ("evolve.py", "MUON_LR", "MUON_LR, MUON_MOMENTUM = 0.02", "MUON_LR, MUON_MOMENTUM = 0.03"),
    "how the momentum rises": ("evolve.py", "MOMENTUM_STEPS", "MOMENTUM_STEPS = 300", "MOMENTUM_STEPS = 200"),
    "the gradient of the loss": ("genome.py", "gradient_of_targets", "- CAP) - total", "- CAP) - 2 * total"),
    "what a leak is": ("evolve.py", "Trial", "by_change > 0.01", "by_change > 0.02"),
    "attempts at the final": ("evolve.py", "once_more", "attempts=2)\n\n\nSTAGES", "attempts=3)\n\n\nSTAGES"),
    "a stage": ("evolve.py", "STAGES", '    "passes": once_more(passes_evaluations),\n', ""),
    "how a family is tuned": ("evolve.py", "tuning", '("n_layer", 2), *others', '("n_layer", 4), *others'),
    "the sizes of the line": ("evolve.py", "sizes", "max(1, dim // 64)", "max(1, dim // 32)"),
    "who begins where": ("evolve.py", "tuned", "for design in found[:1]:", "for design in found[-1:]:"),
    "where words lead": ("evolve.py", "Design", "return tuple(words) or (-1, 1)", "return tuple(words[:1]) or (-1, 1)"),
    "the line it begins with": ("evolve.py", "LINE", "LINE = 5", "LINE = 7"),
    "when the winner is scored": ("evolve.py", "TARGET_AT", "TARGET_AT = (0.25,", "TARGET_AT = (0.125, 0.25,"),
    "who has won": ("evolve.py", "ranking", "(len(scores) < len(own), stat", "(len(scores) != len(own), stat"),
    "who grows": ("evolve.py", "grow_evaluations", "not score < best", "not score <= best"),
    "how a design grows": ("genome.py", "grown", "stop + times * (stop", "stop + 2 * times * (stop"),
    "a decorator": ("evolve.py", "Optimizer", "    @torch.no_grad()\n    def step(self):", "    def step(self):"),
    "widths": ("genome.py", "WIDTHS", "WIDTHS = (64,", "WIDTHS = (32, 64,"),
    "a helper of ops": ("genome.py", "rms_norm", "def rms_norm(x, gain=None):", "def rms_norm(x, gain=2):"),
    "a baseline": ("genome.py", "LEVELS", "convnet(4, 256)", "convnet(3, 256)"),
    "a trait that is tuned": ("genome.py", "FAMILIES", '"tied": GENOME_TRAITS["tied"],\n', "\n"),
    "a trait of the second family": ("genome.py", "FAMILIES", '"values": ("none", "last", "half"),\n', "\n"),
    "where a family begins": ("genome.py", "FAMILIES", 'start="transformer"', "start=None"),
    "the share of trials": ("genome.py", "FAMILIES", "effort=0.5", "effort=0.75"),
    "how small a gain begins": ("genome.py", "modern", '1, skip=1, scale="small"', '1, skip=1, scale="zero"'),
    "how n-grams are hashed": ("genome.py", "NgramTable", "-7_046_029_254_386_353_131", "-7_046_029_254_386_353_133"),
    "a choice of stride": ("genome.py", "WIRING", '"stride": (1, 2, 4)', '"stride": (1, 2, 4, 8)'),
    "the rate of a table": ("evolve.py", "Optimizer", "EMBED_LR * (768 / table", "EMBED_LR * (512 / table"),
    "a default of a baseline": ("genome.py", "transformer", "heads: int = 2, lr_factor", "heads: int = 4, lr_factor"),
    "a new op": (
        "genome.py", "Twice",
        "class GenomeError(",
        'class Twice(Op, name="twice", keeps_width=True):\n    def forward(self, x):\n        return 2 * x\n\n\n'
        "class GenomeError(",
    ),
}  # fmt: skip
IDLE = {
    "a docstring": ("evolve.py", '"""One optimizer step over', '"""A step over'),
    "the first lines of a file": ("genome.py", '"""', '"""More: '),
    "a docstring of an op": ("genome.py", '"""Rotary position', '"""A position'),
    "a comment": ("evolve.py", "  # of initialisation\n", "  # of weights\n"),
    "a type hint": ("evolve.py", "schedule_at(fraction: float) -> float:", "schedule_at(fraction: int) -> int:"),
    "no type hint": ("prepare.py", "window_count(tokens: torch.Tensor, seq_len: int,", "window_count(tokens, seq_len,"),
    "a hint of a name": ("evolve.py", "found: dict[tuple, float] = {}", "found: dict = {}"),
    "an error": ("evolve.py", 'raise Stop(f"No new genome under', 'raise Stop(f"Nothing new under'),
    "an error of the data": ("prepare.py", "tokens to predict (max_tokens", "tokens to foretell (max_tokens"),
    "an error of a genome": ("genome.py", "over MAX_SEQ_LEN = {MAX_SEQ_LEN}", "beyond MAX_SEQ_LEN = {MAX_SEQ_LEN}"),
    "an assertion": ("prepare.py", "tokens: int16 (tokens,), as Dataset.to", "int16 (tokens,), as Dataset.to"),
    "the console": ("evolve.py", "M tok/s", "million tokens/s"),
    "what genome.py prints": ("genome.py", "Networks out of 300 newcomers' in which", "Of 300 newcomers' networks"),
    "how it is said": ("prepare.py", "tqdm.write(line)", "print(line)"),
    "the picture": ("evolve.py", "Is it getting better?", "Is it?"),
    "intervals": ("evolve.py", "12.706, 4.303", "12.7, 4.3"),
    "patience": ("evolve.py", "PATIENCE = 10.0", "PATIENCE = 20.0"),
    "the default of a constant": ("evolve.py", "POPULATION_SIZE: Count = 12", "POPULATION_SIZE: Count = 13"),
    "a download": ("prepare.py", "ATTEMPTS = 8", "ATTEMPTS = 9"),
}  # fmt: skip


def test_what_decides_a_score_makes_another_run(program, tmp_path):
    before, todo, idle = code_of(program, tmp_path), dict(DECIDING), []
    while todo:
        together, at_once = program, {}
        for name, (file, where, old, new) in todo.items():
            if (file, where) not in at_once.values():  # of each place one change at a time
                together, at_once[name] = edited(together, file, old, new), (file, where)
        after = code_of(together, tmp_path)
        idle += [name for name, place in at_once.items() if after[place] == before.get(place)]
        todo = {name: change for name, change in todo.items() if name not in at_once}
    assert idle == []


def test_what_decides_nothing_makes_no_other_run(program, tmp_path):
    together = program
    for change in IDLE.values():
        together = edited(together, *change)
    before, after = code_of(program, tmp_path), code_of(together, tmp_path)
    assert {place for place in {**before, **after} if before.get(place) != after.get(place)} == set()


def test_a_run_is_the_same_while_its_code_is(program, tmp_path, monkeypatch):
    data = types.SimpleNamespace(source="text", fingerprint="0", vocab_size=300)
    monkeypatch.setattr(evolve, "__file__", str(tmp_path / "evolve.py"))
    code_of(program, tmp_path)
    before = evolve.describe_run(tiny(), data, "cpu")
    assert before == evolve.describe_run(
        tiny(workers=3, max_generations=9, final_seeds=7, long_seeds=2, long_factor=9.0, baseline_trials=9, deadline=9),
        data,
        "cpu",
    )
    assert (before["vocab_size"], before["device"], len(before["code"])) == (300, "cpu", 12)
    code_of(edited(program, "evolve.py", "2 * (1 - fraction)", "3 * (1 - fraction)"), tmp_path)
    after = evolve.describe_run(tiny(seed=1), data, "cpu")
    assert {name for name in after if after[name] != before[name]} == {"code", "seed"}


def test_the_code_that_decides():
    found = {name for file, name in evolve.deciding_code(ROOT) if file == "evolve.py"}
    assert found >= {"evaluate", "Trial", "Optimizer", "check_network", "next_tasks", "breed", "candidates", "SEEDS"}
    assert found >= {"tuning", "hurdle_after", "ranking", "growth", "TARGET_AT", *(f"{s}_evaluations" for s in (
        "final", "target", "grow", "long", "passes"))}  # fmt: skip
    idle = "Pool serve GpuTurn WorkerTurn turn_file Record read_results to_line write_whole find_controls code_hash "
    idle += "describe_run estimate standings outcome time_to_target lineage best_genome picture draw_scores "
    idle += "draw_leads write_reports result_text target_text answer report steps importance final_table as_table "
    idle += (
        "unbeaten harmless ablation_tasks begin_or_join rewrite_report settings_of end_text evolve unless_all_crash "
    )
    idle += "slower_text begin_or_go_on check_ops run_command main save_model write_text"
    defined = {getattr(node, "name", "") for node in ast.parse((ROOT / "evolve.py").read_text()).body}
    assert set(idle.split()) <= defined and not found & set(idle.split()) and not found & set(evolve.CONSTANTS)
    data = {name for file, name in evolve.deciding_code(ROOT) if file == "prepare.py"}
    assert data >= {"Dataset", "Batches", "bits_per_byte", "gather", "window_count"}
    assert not data & {"download", "prepare", "open_source", "main", "say", "try_lock", "write_split"}


def test_code_as_text_is_the_same_in_every_python():
    source = """
def f(x: int, *more, key=None, **rest) -> int:
    'what it does'
    assert x > 0, 'or else'
    if not x:
        raise ValueError(f'{x} is nothing') from None
    return {**rest, 'a': [x, True, 1.5]}[x:]
"""
    told = (
        "Module(body=FunctionDef(name='f' args=arguments(args=arg(arg='x') vararg=arg(arg='more') "
        "kwonlyargs=arg(arg='key') kw_defaults=Constant() kwarg=arg(arg='rest')) body="
        "Assert(test=Compare(left=Name(id='x' ctx=Load()) ops=Gt() comparators=Constant(value=0)))"
        "If(test=UnaryOp(op=Not() operand=Name(id='x' ctx=Load())) body=Raise(exc=Name(id='ValueError' ctx=Load())))"
        "Return(value=Subscript(value=Dict(keys=NoneConstant(value='a') values=Name(id='rest' ctx=Load())"
        "List(elts=Name(id='x' ctx=Load())Constant(value=True)Constant(value=1.5) ctx=Load())) "
        "slice=Slice(lower=Name(id='x' ctx=Load())) ctx=Load()))))"
    )
    assert evolve.tree_text(evolve.Essence().visit(ast.parse(source))) == told


def test_controls_are_runs_that_differ_in_strategy_or_seed_alone(free_params, tmp_path, capsys):
    run = {"strategy": "elites", "seed": 0, "data": "text"}
    rows = search(tiny(**BIG), 1)
    for name, other in {
        "1": run | {"strategy": "random"},
        "2": run | {"strategy": "random", "seed": 1},
        "3": run,
        "4": run | {"strategy": "drift"},
        "5": run | {"seed": 7},
        "6": run | {"seed": 7, "data": "other"},
        "7": {k: v for k, v in run.items() if k != "data"},
        "much else": run | {"strategy": "drift", "seed": 8, "data": "other", "device": "another"},
    }.items():
        with Record(tmp_path / "runs" / name) as record:
            record.begin(other)
            for row in rows[: int(name) if name.isdecimal() else 1]:
                record.append(row)
    (tmp_path / "runs" / "8").mkdir()
    (tmp_path / "runs" / "8" / "results.tsv").write_text("no results\n")
    (tmp_path / "runs" / "9").mkdir()
    (tmp_path / "runs" / "9" / "results.tsv").mkdir()
    found = evolve.find_controls(tmp_path, run)
    *told, last = capsys.readouterr().out.splitlines()
    assert last == f"{tmp_path}/runs: 1 differing in more than STRATEGY or SEED left out of the picture"
    left_out = {line[len(f"{tmp_path}/runs/")]: line.partition(" is left out of the picture: ")[2] for line in told}
    assert sorted(left_out) == ["2", "3", "6", "7", "8", "9"] and left_out["3"] == "it is the same run"
    assert left_out["2"] == "it differs in STRATEGY (random, here elites), SEED (1, here 0)"
    assert left_out["7"] == "it differs in DATA (None, here text)" and left_out["9"]
    assert left_out["8"].startswith("it does not begin as one")
    found = {key: len(rows) for key, rows in found.items()}
    assert found == {("strategy", "random"): 1, ("strategy", "drift"): 4, ("seed", 7): 5}


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
