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
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import evolve
import genome
import prepare
from evolve import Record, Result, Stop, Task
from genome import Gene, Genome, Op, transformer

ROOT = Path(evolve.__file__).parent
KILLS = int(os.environ.get("GENESIS_KILLS", 12))  # of one run, see kill_run.py
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
    hurdle=0.0,
    hurdle_at=0.5,
    repeats=9,
    finalists=1,
    rivals=1,
    final_seeds=2,
    workers_per_gpu=1,
)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
NET = Genome((Gene("norm"), Gene("conv1d", 64, skip=2), Gene("gate", 64, skip=1, expansion=1)), embed_dim=64)
PHRASES = """the cat sat on the mat. a dog ran far away! we are the champions, my friend; one two three four five"""
WORDS = PHRASES.split()


def tiny(**changes):
    return evolve.Settings(**{**TINY, **changes})


def task(net: Genome = NET, seed: int = 1, id: str = "g0.01", **fields) -> Task:
    return Task(id, 0, (), "random", net, seed, **fields)


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
def data(folder) -> evolve.DeviceData:
    return evolve.DeviceData(prepare.load(folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def kill_run(cache, data_dir, tmp_path_factory):
    """kill_run.py, at work on another core while the tests run."""
    out = tmp_path_factory.mktemp("kills") / "runs"
    command = [sys.executable, ROOT / "tests" / "kill_run.py", out, data_dir, str(KILLS), "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process
    process.kill()


@pytest.fixture(autouse=True)
def handlers():
    """evolve.main takes over SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


def test_kills_are_started(kill_run):
    """First in the file, so that kill_run.py works while the rest is tested."""
    assert kill_run.poll() is None


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


def plain_muon(weight, grad, momentum, lr):
    """Muon on one matrix, in float64. Returns the weight and the momentum after a step."""
    momentum = 0.95 * momentum + 0.05 * grad
    X = 0.05 * grad + 0.95 * momentum
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
        if name == "enter.embedding":
            return 0.2 * (768 / p.size(1)) ** 0.5
        if name == "leave.head":
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
                done = [plain_muon(*one, 0.02 * self.lr_factor * schedule) for one in stack]
                p, m = (torch.stack(t).view(p.shape) for t in zip(*done, strict=True))
            self.names[name], self.state[name] = p, (m, v)


EVERY_SHAPE = Genome(  # tall, wide and square matrices, stacks of them, vectors, and matrices that are not Muon's
    (
        Gene("norm", kind="layer"),
        Gene("attention", 128, similarity="multiplicative", temperature="adaptive", memory=4, scale=True),
        Gene("conv1d", 128, kind="dense", kernel=3),
        Gene("conv1d", 64, kind="depthwise"),
        Gene("moe_router", 128, experts=4, shared=True, skip=2),
        Gene("gate", 64, repeat=2),
        Gene("gru", 64, skip=1),
    ),
    embed_dim=64,
)


@pytest.mark.parametrize("changes", [{}, dict(tied=True, embed_dim=128, lr_factor=0.5)], ids=["untied", "tied"])
def test_optimizer_is_muon_and_adamw(changes):
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
        assert all(p.grad is not None for p in model.parameters()), net.to_json()
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
    result = evolve.evaluate(task(), data, tiny(token_budget=budget))
    assert (result.status, result.tokens, len(steps)) == ("ok", tokens, tokens // 256)
    assert result.val_bpb > 0 and result.test_bpb is None
    assert result.params == NET.num_params(data.vocab_size) and result.key == NET.key
    assert len(result.curve) == evolve.CURVE


def test_final_tasks_train_longer_and_read_test(data, monkeypatch):
    read = []
    monkeypatch.setattr(evolve.Trial, "score", lambda trial, tokens: read.append(tokens) or 1.0)
    search = evolve.evaluate(task(), data, tiny(final_factor=2.5))
    assert [tokens is data.val for tokens in read] == [True] and search.tokens == 1024
    final = evolve.evaluate(task(final=True), data, tiny(final_factor=2.5))
    assert read[1] is data.val and read[2] is data.test and len(read) == 3
    assert (final.tokens, final.val_bpb, final.test_bpb) == (2560, 1.0, 1.0)


def test_one_task_has_one_result(data):
    torch.manual_seed(123)  # what came before does not matter
    first = evolve.evaluate(task(), data, tiny())
    torch.rand(7), random.random(), np.random.rand()
    assert without_time(evolve.evaluate(task(), data, tiny())) == without_time(first)
    assert evolve.evaluate(task(seed=2), data, tiny()).val_bpb != first.val_bpb


def test_seed_changes_weights_and_order_and_all_genomes_meet_the_same_batches(data):
    a, b, c = (evolve.Trial(t, data, tiny(), 8) for t in (task(), task(seed=2), task(transformer(1, 64, 1))))
    assert not torch.equal(a.model.enter.embedding, b.model.enter.embedding)
    assert not torch.equal(a.batches.order, b.batches.order)
    assert torch.equal(a.batches.order, c.batches.order)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_fewer_rows_at_once_train_the_same(data, rows):
    whole, parts = (evolve.Trial(task(), data, tiny(), n) for n in (8, rows))
    values = [trial.train(trial.step) for trial in (whole, parts)]
    assert parts.micro_steps == 8 // rows and values[0]["tokens"] == values[1]["tokens"] == 1024
    assert whole.window == parts.window == 32
    for a, b in zip(*(map(float, v["losses"].split(",")) for v in values), strict=True):
        assert a == pytest.approx(b, abs=2e-4, nan_ok=True)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert whole.score(data.val) == pytest.approx(parts.score(data.val), abs=1e-3)


def test_training_learns(data, folder):
    uniform = prepare.uniform_bpb(
        prepare.load(folder).val, data.token_bytes, data.vocab_size, seq_len=32, max_tokens=1024
    )
    result = evolve.evaluate(task(), data, tiny(token_budget=20_480))
    curve = result.curve
    assert curve[0] > curve[2] > curve[-1] and result.val_bpb < 0.4 * uniform


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
    result = evolve.evaluate(task(), data, tiny(token_budget=0, time_budget=1.0))
    assert (result.seconds, result.tokens, result.tokens_per_s) == (1.2, 1024, 853)
    assert clock.schedule == pytest.approx([1.0, 1.0, 0.8, 0.2])
    clock.steps = iter([0.25, 50.0])
    result = evolve.evaluate(task(), data, tiny(token_budget=0, time_budget=1.0))
    assert (result.status, result.seconds, result.tokens) == ("ok", 50.25, 512)
    clock.steps = itertools.repeat(0.5)
    result = evolve.evaluate(task(final=True), data, tiny(token_budget=0, time_budget=1.0, final_factor=3.0))
    assert (result.seconds, result.tokens) == (3.0, 6 * 256)


def test_hurdle(data):
    s = tiny(token_budget=5120)  # 20 steps, judged after 10 by the loss of the ninth and tenth
    free = evolve.evaluate(task(), data, s)
    assert (free.status, free.hurdle, free.tokens) == ("ok", "", 5120)
    stopped = evolve.evaluate(task(hurdle=free.curve[4] - 0.01), data, s)
    assert (stopped.status, stopped.hurdle, stopped.val_bpb) == ("stopped", "stopped", None)
    assert stopped.tokens == 11 * 256 and stopped.curve[:5] == free.curve[:5]
    early = evolve.evaluate(task(hurdle=free.curve[1] - 0.01), data, tiny(token_budget=5120, hurdle_at=0.2))
    assert (early.status, early.tokens) == ("stopped", 5 * 256)
    spared = evolve.evaluate(task(hurdle=free.curve[4] - 0.01, spared=True), data, s)
    assert (spared.status, spared.hurdle, spared.val_bpb) == ("ok", "spared", free.val_bpb)
    passed = evolve.evaluate(task(hurdle=free.curve[4] + 0.01, spared=True), data, s)
    assert (passed.status, passed.hurdle, passed.val_bpb) == ("ok", "passed", free.val_bpb)


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
        result = evolve.evaluate(task(with_gene(gene)), data, tiny())
    assert (result.status, result.val_bpb, result.tokens) == ("nan", None, 768)


def test_nan_before_training(data):
    with planted(lambda self, x: x / 0) as gene:
        result = evolve.evaluate(task(with_gene(gene)), data, tiny())
    assert (result.status, result.val_bpb, result.tokens) == ("nan", None, 0)


def test_divergence_ends_early(data, monkeypatch):
    monkeypatch.setattr(evolve, "HEAD_LR", 1e4)
    result = evolve.evaluate(task(), data, tiny(token_budget=256 * 400))
    assert (result.status, result.val_bpb) == ("nan", None)
    assert 50 * 256 <= result.tokens < 256 * 400


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_none(data, monkeypatch, bad):
    monkeypatch.setattr(evolve.Trial, "score", lambda trial, tokens: bad if tokens is data.test else 1.0)
    result = evolve.evaluate(task(final=True), data, tiny())
    assert (result.status, result.val_bpb, result.test_bpb) == ("nan", None, None)
    monkeypatch.setattr(evolve.Trial, "score", lambda trial, tokens: bad)
    result = evolve.evaluate(task(), data, tiny())
    assert (result.status, result.val_bpb, result.test_bpb) == ("nan", None, None)


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
        result = evolve.evaluate(task(net), data, tiny(), lambda: turns.append(1))
        assert (result.status, result.note, result.tokens, turns) == ("ok", "2 rows at once", 1024, [1])
        trial = evolve.Trial(task(net), data, tiny(), 2)
        trial.train(trial.step)
        assert result.val_bpb == trial.score(data.val)
    with hungry(1) as gene:  # 10 rows, 5 rows, 1 row
        result = evolve.evaluate(task(with_gene(gene)), data, tiny(batch_tokens=320, token_budget=960))
        assert (result.status, result.note, result.tokens) == ("ok", "1 rows at once", 960)


def test_out_of_memory_at_the_floor(data, monkeypatch):
    turns = []
    with hungry(0) as gene:
        result = evolve.evaluate(task(with_gene(gene)), data, tiny(), lambda: turns.append(1))
    assert (result.status, result.val_bpb, result.tokens, turns) == ("oom", None, 0, [1])
    assert result.note == "CUDA out of memory. Tried to allocate 7 GiB"
    monkeypatch.setattr(evolve, "Optimizer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("while building")))
    result = evolve.evaluate(task(), data, tiny(), lambda: turns.append(1))
    assert (result.status, turns) == ("oom", [1, 1])


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


def test_dead_networks_are_caught():
    for net in itertools.islice(narrow_genomes(5), 5):
        with planted(lambda self, x: torch.zeros_like(x)) as gene:
            assert evolve.check_network(with_gene(gene, net), 0) == "dead"
        with planted(lambda self, x: x.detach() * 0 + 1) as gene:
            assert evolve.check_network(with_gene(gene, net), 0) == "dead"


def test_clean_networks_pass():
    nets = [*itertools.islice(narrow_genomes(7), 200), *(narrow(net) for net in genome.NAMED_DESIGNS.values())]
    assert [net.to_json() for net in nets if evolve.check_network(net, 3)] == []


@pytest.mark.parametrize(("leak", "status"), [("the next token", "leak"), (None, "dead")])
def test_an_impostor_is_not_trained(data, monkeypatch, leak, status):
    monkeypatch.setattr(evolve.Trial, "train", lambda *_: pytest.fail("it was trained"))
    turns = []
    with planted(LEAKS.get(leak) or (lambda self, x: torch.zeros_like(x))) as gene:
        result = evolve.evaluate(task(with_gene(gene)), data, tiny(), lambda: turns.append(1))
    assert (result.status, result.val_bpb, result.tokens, turns) == (status, None, 0, [])


# ----------------------------------------------------------------------------------------------------------------------
# Workers. A toy stands in for the evaluation; what it does is what the task's operator says.


def toy_result(t: Task, status: str = "ok", **values) -> Result:
    """A result that depends on the task alone."""
    rng = random.Random(f"{t.genome.key}/{t.seed}")
    losses = ",".join(f"{3 - 0.1 * i + 0.01 * rng.random():.4f}" for i in range(evolve.CURVE))
    score = 1 + random.Random(t.genome.key).random() + 0.01 * rng.random()
    scores = dict(val_bpb=score, test_bpb=score + 0.02 if t.final else None) if status == "ok" else {}
    values = dict(params=1000, tokens=1024, tokens_per_s=1e6 * rng.random(), losses=losses, **scores) | values
    return evolve.result_of(t, status, **{**values, **({} if status == "ok" else dict(val_bpb=None))})


def toy(t: Task, data, settings, wait_for_turn):
    if t.operator == "die early":
        os.kill(os.getpid(), signal.SIGKILL)
    if t.operator == "hang early":
        time.sleep(600)
    wait_for_turn()
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
    monkeypatch.setattr(evolve, "EVALUATE", toy)
    monkeypatch.setattr(evolve, "START_METHOD", "fork")


@contextlib.contextmanager
def pool_of(folder, workers: int = 1, **settings):
    pool = evolve.Pool(folder, tiny(**settings))
    try:
        pool.workers += [pool.start("cpu") for _ in range(workers - 1)]
        yield pool
    finally:
        pool.stop()


def tasks_of(*operators: str) -> list[Task]:
    return [dataclasses.replace(task(id=f"g0.{i:02d}"), operator=op) for i, op in enumerate(operators)]


def test_workers_are_replaced(toys, folder, capfd):
    operators = ("ok", "die", "ok", "exit", "raise", "die early", "hang", "hang early", "ok")
    with pool_of(folder, deadline=2) as pool:
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
    assert results["die"].note == "the worker ended with exit code -9"
    assert results["exit"].note == "the worker ended with exit code 3"
    assert results["raise"].note == "ZeroDivisionError: a planted error"
    assert results["hang"].note == "training took over 2 s" and results["hang early"].note == "preparing took over 2 s"
    assert "in toy" in capfd.readouterr().err  # the traceback


def test_each_task_has_one_result_whatever_happens(toys, folder):
    operators = [random.Random(i).choice(("ok", "ok", "die", "raise", "exit")) for i in range(24)]
    tasks = tasks_of(*operators)
    with pool_of(folder, workers=3) as pool:
        results = list(pool.run(tasks))
    assert sorted((r.id, r.operator) for r in results) == [(t.id, t.operator) for t in tasks]
    assert all((r.status == "ok") == (r.operator == "ok") for r in results)


def test_a_worker_that_dies_idle_costs_nothing(toys, folder):
    with pool_of(folder, workers=2) as pool:
        while any(w.state != "idle" for w in pool.workers):
            assert len(list(pool.run(tasks_of("ok", "ok")))) == 2
        for w in pool.workers:
            os.kill(w.process.pid, signal.SIGKILL)
            w.process.join()
        tasks = [dataclasses.replace(t, seed=2) for t in tasks_of("ok", "ok", "ok")]
        results = list(pool.run(tasks))
        assert sorted((r.id, r.seed, r.status) for r in results) == [(t.id, 2, "ok") for t in tasks]
        for n, r in enumerate(pool.run(tasks)):  # and while others are at work
            idle = [w for w in pool.workers if w.state == "idle"]
            os.kill(idle[0].process.pid, signal.SIGKILL) if n == 1 else None
            assert r.status == "ok" or n == 2  # it may have been given its task in that moment
        assert n == 2


def test_a_worker_that_cannot_start_stops_the_run(toys, tmp_path, capfd):
    with pytest.raises(Stop, match="A worker on cpu could not start"), pool_of(tmp_path / "no data") as pool:
        list(pool.run(tasks_of("ok")))
    assert not any(w.process.is_alive() for w in pool.workers)
    assert "No tokens in" in capfd.readouterr().err


def test_one_at_a_time_on_a_device(toys, folder, tmp_path, monkeypatch):
    """Several prepare, one trains, and the turns go by the order of the tasks."""
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def logged(t, data, settings, wait_for_turn):
        os.write(log, f"prepare {t.id}\n".encode())
        wait_for_turn()
        os.write(log, f"enter {t.id}\n".encode())
        time.sleep(0.02)
        os.write(log, f"leave {t.id}\n".encode())
        return toy_result(t)

    monkeypatch.setattr(evolve, "EVALUATE", logged)
    tasks = tasks_of(*["ok"] * 12)
    with pool_of(folder, workers=3) as pool:
        results = list(pool.run(tasks))
    os.close(log)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    turns = [line for line in lines if line[0] != "prepare"]
    assert len(turns) == 24
    for (a, id), (b, same) in zip(turns[::2], turns[1::2], strict=True):
        assert (a, b, id) == ("enter", "leave", same)
    assert [r.id for r in results] == [id for word, id in turns if word == "leave"]
    between = [i for i, (word, _) in enumerate(lines) if word == "prepare" and i and lines[i - 1][0] == "enter"]
    assert between  # while one trains another prepares


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
def test_workers_end_with_their_parent(toys, folder):
    ours, theirs = os.pipe()
    parent = os.fork()
    if not parent:
        with contextlib.suppress(BaseException), pool_of(folder, workers=3) as pool:
            assert len(list(pool.run(tasks_of("ok", "ok")))) == 2
            for w, t in zip(pool.workers, tasks_of("hang early", "hang"), strict=False):  # the third has nothing to do
                w.pipe.send(t)
            os.write(theirs, json.dumps([w.process.pid for w in pool.workers]).encode())
            time.sleep(600)
        os._exit(1)
    workers = json.loads(os.read(ours, 1000))
    assert all(map(is_alive, workers))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        wait_until(lambda: not any(map(is_alive, workers)))
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)


HOLDER = """
import multiprocessing, sys, time
sys.path.insert(0, {root!r})
import evolve

def hold(pipe, *_):
    lock = multiprocessing.Lock()  # as torch has them where it compiles
    pipe.send("idle")
    time.sleep(600)

if __name__ == "__main__":
    evolve.worker = hold
    pool = evolve.Pool(None, evolve.Settings(workers_per_gpu=1))
    assert pool.workers[0].pipe.recv() == "idle"
    pool.workers[0].become("training")  # so that it is killed
    pool.stop()
    print("stopped")
"""


def test_what_a_killed_worker_leaves_is_freed_in_silence(tmp_path):
    (tmp_path / "holder.py").write_text(HOLDER.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, tmp_path / "holder.py"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


# ----------------------------------------------------------------------------------------------------------------------
# Selection and breeding. A toy fitness, whose best is known: genes of one kind, six of them are best.


@pytest.fixture
def free_params(monkeypatch):
    """Parameters are not counted; that costs more than all else here."""
    monkeypatch.setattr(genome, "block_params", lambda gene, d_in, d_skip: 1000)


def fitness(net: Genome, seed: int) -> float:
    """1.0 with six attention genes in the network and little else, plus what a seed does."""
    ops = [node.gene.op for node in net.network]
    missing, others = abs(6 - ops.count("attention")), len(ops) - ops.count("attention")
    return 1 + 0.1 * missing + 0.01 * others + 0.002 * random.Random(f"{net.key}/{seed}").random()


def search(settings, generations: int, score=fitness, status=lambda t: "ok") -> list[Result]:
    rows = []
    for generation in range(generations):
        for t in evolve.breed(rows, generation, settings, 300).tasks:
            value = score(t.genome, t.seed)
            rows.append(toy_result(t, status(t), val_bpb=value))
    return rows


BIG = dict(population_size=12, survivors=3, immigrants=1, max_params=10**9)


@pytest.mark.parametrize("seed", range(4))
def test_evolution_finds_what_random_and_drift_do_not(free_params, seed):
    """Six attention genes within 20 generations of 12."""
    best, most = {}, {}
    for strategy in ("evolution", "random", "drift"):
        rows = search(tiny(**BIG, seed=seed, strategy=strategy), 20)
        assert len(rows) == 240
        genomes = [Genome.from_json(r.genome) for r in rows]
        most[strategy] = max(sum(node.gene.op == "attention" for node in net.network) for net in genomes)
        best[strategy] = evolve.searched(rows)[0].mean
    assert most["evolution"] >= 6 > max(most["random"], most["drift"])
    assert best["evolution"] + 0.05 < min(best["random"], best["drift"])


@pytest.mark.parametrize("strategy", ["evolution", "random", "drift"])
def test_breeding(free_params, strategy):
    s = tiny(**BIG, strategy=strategy)
    rows = search(s, 6)
    by_generation = [[r for r in rows if r.generation == g] for g in range(6)]
    assert all(len(mine) == 12 for mine in by_generation)
    assert {r.operator for r in by_generation[0]} == {"random"}
    for g, mine in enumerate(by_generation[1:], start=1):
        earlier = [r for r in rows if r.generation < g]
        survivors, newcomers = mine[:3], mine[3:]
        assert {r.operator for r in survivors} == {"again"} and "again" not in {r.operator for r in newcomers}
        for r in survivors:  # a new seed for the same genome
            before = [e for e in earlier if e.id == r.id]
            assert before and {e.genome for e in before} == {r.genome} and r.seed not in {e.seed for e in before}
        assert len({r.seed for r in mine}) == 1  # all meet the same batches
        assert not {r.key for r in newcomers} & {r.key for r in earlier}
        assert len({r.key for r in newcomers}) == 9
        assert all(Genome.from_json(r.genome).mixes_tokens for r in newcomers)
        parents = {p for r in newcomers for p in r.parents.split(",") if p}
        assert parents <= {r.id for r in survivors}
        strangers = [r for r in newcomers if r.operator == "random"]
        assert all(not r.parents for r in strangers)
        assert len(strangers) == (9 if strategy == "random" else 1)
        if strategy != "drift":
            assert [r.id for r in survivors] == [c.id for c in evolve.searched(earlier)[:3]]
    if strategy == "drift":
        best = [[c.id for c in evolve.searched([r for r in rows if r.generation < g])[:3]] for g in range(1, 6)]
        assert best != [[r.id for r in mine[:3]] for mine in by_generation[1:]]
    if strategy == "evolution":
        assert any("," in r.parents for r in rows) and any(r.operator.startswith("crossover") for r in rows)
    assert len({r.id for r in rows if r.operator != "again"}) == 72 - 15


def test_a_survivor_is_evaluated_so_often_and_no_more(free_params):
    s = tiny(**BIG, repeats=2)
    rows = search(s, 8)
    evaluations = collections.Counter(r.id for r in rows)
    assert set(evaluations.values()) == {1, 2}
    for g in range(1, 8):
        earlier = [r for r in rows if r.generation < g]
        survivors = evolve.searched(earlier)[:3]
        again = [r.id for r in rows if r.generation == g and r.operator == "again"]
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
    assert [evolve.to_line(toy_result(t)).split("\t")[-1] for t in born.tasks] == [
        evolve.to_line(r).split("\t")[-1] for r in rows if r.generation == 3
    ]
    assert evolve.breed(rows, 3, tiny(**BIG, seed=1), 300).tasks[3:] != born.tasks[3:]


def test_children_are_small_enough():
    s = tiny(max_params=90_000)
    rows = search(s, 3)
    genomes = [Genome.from_json(r.genome) for r in rows]
    assert all(net.num_params(300) <= 90_000 and net.mixes_tokens for net in genomes)
    born = evolve.breed(rows, 2, s, 300)
    assert born.bred - born.refused == 2 and born.refused > 0  # two newcomers beside the survivors


def test_siblings_differ(free_params, monkeypatch):
    pool = [
        transformer(1, 64, 1, window=w, qk_norm=q, latent=d)
        for w in (0, 64)
        for q in (True, False)
        for d in (0, 32, 64)
    ]
    monkeypatch.setattr(evolve, "random_genome", lambda rng: rng.choice(pool))
    born = evolve.breed([], 0, tiny(**BIG), 300)
    assert len({t.genome.key for t in born.tasks}) == len(pool) == 12 and born.refused > 0


def test_nothing_new_to_breed_stops_the_run(free_params, monkeypatch):
    monkeypatch.setattr(evolve, "random_genome", lambda rng: NET)
    monkeypatch.setattr(Genome, "num_params", lambda net, vocab_size: 2)
    with pytest.raises(Stop, match="MAX_PARAMS"):
        evolve.breed([], 0, tiny(max_params=1), 300)


FAILURES = ("nan", "oom", "leak", "dead", "stopped", "timeout", "crash")


@pytest.mark.parametrize("status", FAILURES)
def test_failures_never_survive(free_params, status):
    rows = search(tiny(**BIG), 4, status=lambda t: status if int(t.id[-2:]) % 3 == 0 else "ok")
    failed = {r.id for r in rows if r.status == status}
    assert failed and not failed & {p for r in rows for p in r.parents.split(",")}
    assert not failed & {r.id for r in rows if r.operator == "again"}
    assert not failed & {c.id for c in evolve.searched(rows)}
    assert all(r.val_bpb is None for r in rows if r.id in failed)


def test_a_generation_of_failures_begins_anew(free_params):
    rows = search(tiny(**BIG), 2, status=lambda t: "nan")
    assert {r.operator for r in rows} == {"random"} and len({r.key for r in rows}) == 24


def test_entrants_are_never_parents(free_params):
    s = tiny(**BIG)
    entrants = [toy_result(t, val_bpb=0.1) for t in evolve.entrant_tasks(s, 300)]
    assert len(entrants) == len(genome.ENTRANTS) and {r.generation for r in entrants} == {-1}
    rows = search(s, 2)
    assert evolve.breed(entrants + rows, 2, s, 300) == evolve.breed(rows, 2, s, 300)
    assert evolve.noise_floor(entrants + rows) == evolve.noise_floor(rows)
    final, rival = evolve.final_tasks(entrants + rows, s), min(r.id for r in entrants if "transformer" in r.id)
    assert [t.id for t in final] == [evolve.searched(rows)[0].id, rival] * 2


def test_hurdle_is_what_the_survivors_had(free_params):
    s = tiny(**BIG, hurdle=0.25)
    rows = search(s, 3)
    survivors = evolve.searched([r for r in rows if r.generation < 2])[:3]
    curves = {c.id: [r.curve[4] for r in rows if r.id == c.id and r.generation < 2] for c in survivors}
    worst = max(statistics.fmean(curve) for curve in curves.values())
    tasks = evolve.breed(rows, 2, s, 300).tasks
    assert [t.hurdle for t in tasks[:3]] == [None] * 3
    assert all(t.hurdle == pytest.approx(worst + 0.25) for t in tasks[3:])
    assert {t.hurdle for t in evolve.breed([], 0, s, 300).tasks} == {None}
    assert {t.hurdle for t in evolve.breed(rows, 2, tiny(**BIG, hurdle=0.0), 300).tasks} == {None}
    spared = [t.spared for g in range(30) for t in evolve.breed(rows, 3 + g, tiny(**BIG, hurdle_sample=0.5), 300).tasks]
    assert 0.25 < sum(spared) / len(spared) < 0.5  # survivors, a quarter, meet no hurdle
    assert not any(t.spared for t in evolve.breed(rows, 2, tiny(**BIG, hurdle_sample=0.0), 300).tasks)


def test_what_the_hurdle_saved():
    def row(generation, id, hurdle, val_bpb, operator="change_op"):
        status = "stopped" if hurdle == "stopped" else "ok"
        made = Task(id, generation, (), operator, NET, 1)
        return toy_result(made, status=status, val_bpb=val_bpb, hurdle=hurdle)

    rows = [row(0, "g0.01", "", 2.0), row(0, "g0.02", "", 3.0)]
    rows += [row(1, "g0.01", "", 2.0, "again"), row(1, "g1.01", "stopped", None), row(1, "g1.02", "spared", 2.5)]
    rows += [row(2, "g2.01", "spared", 2.8), row(2, "g2.02", "passed", 1.0), row(2, "g2.03", "stopped", None)]
    text = evolve.hurdle_text(rows, tiny(survivors=2, hurdle_at=0.2))
    assert text.startswith("hurdle: 2 of 7 newcomers stopped, 20% of all training saved; 2 that missed it ran on, 1 of")


def test_noise_floor():
    rows = [toy_result(task(id=id, seed=i), val_bpb=v) for i, (id, v) in enumerate(
        [("a", 1.0), ("a", 1.2), ("b", 2.0), ("b", 2.0), ("b", 2.3), ("c", 9.0)])]  # fmt: skip
    # a: squares 0.02 on 1 degree of freedom; b: 0.06 on 2
    assert evolve.noise_floor(rows) == pytest.approx(math.sqrt(0.08 / 3))
    assert evolve.noise_floor(rows[-1:]) is None
    assert [(c.id, c.mean) for c in evolve.searched(rows)] == [("a", 1.1), ("b", pytest.approx(2.1)), ("c", 9.0)]


# ----------------------------------------------------------------------------------------------------------------------
# The record


@contextlib.contextmanager
def record_in(out: Path):
    record = Record(out)
    try:
        yield record
    finally:
        os.close(record.lock)


def some_rows() -> list[Result]:
    rows = [toy_result(t) for t in evolve.breed([], 0, tiny(max_params=10**7), 300).tasks]
    odd = "a\ttab, a\r\nline, \x0b \x0c \x1c \x85 \u2028 and “ä→日本”"
    failed = toy_result(task(), "crash", note=odd, seconds=1e-9, losses="nan,1.0000,inf")
    return [*rows, failed, dataclasses.replace(toy_result(task(final=True), val_bpb=1.23456789), note="ends in → é")]


@pytest.fixture
def written(tmp_path, free_params) -> bytes:
    """A record with some rows; its bytes."""
    with record_in(tmp_path) as record:
        record.begin({"seed": 0, "data": "“texts”"})
        for row in some_rows():
            record.append(row)
    return (tmp_path / "results.tsv").read_bytes()


def test_rows_come_back(tmp_path, written):
    with record_in(tmp_path) as record:
        assert record.run == {"seed": 0, "data": "“texts”"}
        assert len(record.rows) == 6
        for row, back in zip(some_rows(), record.rows, strict=True):
            note = re.sub(r"[\t\r\n]+", " ", row.note)
            values = dict(finished=back.finished, note=note, val_bpb=row.val_bpb and round(row.val_bpb, 6), seconds=0.0)
            values |= dict(tokens_per_s=round(row.tokens_per_s, 6), test_bpb=row.test_bpb and round(row.test_bpb, 6))
            assert back == dataclasses.replace(row, **values)
            assert Genome.from_json(back.genome).key == back.key
        assert [math.isfinite(x) for x in record.rows[4].curve] == [False, True, False]
    assert (tmp_path / "results.tsv").read_bytes() == written


def test_a_torn_last_line_is_dropped(tmp_path, written):
    path = tmp_path / "results.tsv"
    start = written.rindex(b"\n", 0, -1) + 1
    assert not written[start:].isascii()
    with record_in(tmp_path) as record:
        rows = record.rows
    for end in range(start, len(written)):  # the last of these has it all but the line's end
        path.write_bytes(written[:end])
        with record_in(tmp_path) as record:
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
    "other columns": b'# {"seed": 0}\n' + "\t".join(evolve.COLUMNS[1:]).encode() + b"\n",
    "a short row": b'# {"seed": 0}\n' + "\t".join(evolve.COLUMNS).encode() + b"\n0\tg0.01\n",
    "a word for a number": b'# {"seed": 0}\n' + "\t".join(evolve.COLUMNS).encode() + b"\n" + b"x\t" * 20 + b"x\n",
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
    with pytest.raises(Stop, match="cannot be read"):
        Record(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(Stop, match=r"Cannot use .*file.*--out"):
        Record(tmp_path / "file")


def stopped(function) -> str:
    """The message of the Stop that function() raises."""
    try:
        function()
    except Stop as stop:
        return str(stop)
    return ""


def test_one_run_in_a_folder(tmp_path):
    with record_in(tmp_path):
        message = in_child(lambda: stopped(lambda: Record(tmp_path)))
        assert message == f"Another run is at work in {tmp_path}; wait for it, or use --out DIR"
    assert in_child(lambda: stopped(lambda: Record(tmp_path))) == ""


@pytest.mark.parametrize("room", [0, 1, 100])
@pytest.mark.parametrize("truncate", [True, False])
def test_a_full_disk(tmp_path, written, room, truncate):
    """A limit on the size of files cuts a write short and then refuses, as a full disk does."""
    path = tmp_path / "results.tsv"

    def fill():
        with record_in(tmp_path) as record:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) + room, resource.RLIM_INFINITY))
            if not truncate:  # the worst case: what was written of the line cannot be taken back
                os.truncate = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no"))
            message = stopped(lambda: record.append(record.rows[0]))
            return [message, len(record.rows), stopped(lambda: evolve.write_whole(tmp_path / "best", b"x" * 10**6))]

    message, rows, other = in_child(fill)
    assert message == f"Cannot write {path}: File too large. What it holds is intact; run again to go on" and rows == 6
    assert other.startswith(f"Cannot write {tmp_path / 'best'}: File too large.") and not (tmp_path / "best").exists()
    assert path.read_bytes()[: len(written)] == written
    assert len(path.read_bytes()) == len(written) + (0 if truncate else room)
    with record_in(tmp_path) as record:
        assert len(record.rows) == 6
    assert path.read_bytes() == written


def test_an_unwritable_folder(free_params):
    """Not for the superuser, who may write anywhere: then as somebody else."""
    with tempfile.TemporaryDirectory() as out:
        out, path = Path(out), Path(out) / "results.tsv"
        with record_in(out) as record:
            record.begin({})
            record.append(some_rows()[0])
        before = path.read_bytes()
        path.chmod(0o444)
        out.chmod(0o555)

        def attempt():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            with record_in(out) as record:
                row = record.rows[0]
                acts = (lambda: record.append(row), lambda: record.begin({}), record.move_away)
                return [*map(stopped, acts), stopped(lambda: Record(out / "new"))]

        messages = in_child(attempt)
        out.chmod(0o755)
        assert all("Permission denied" in message for message in messages), messages
        assert path.read_bytes() == before and [p.name for p in out.iterdir()] == ["results.tsv"]


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs, of toys


@pytest.fixture
def play(toys, free_params, data_dir, tmp_path, monkeypatch, capsys):
    """Run the command with flags; returns the exit code and what it printed."""
    monkeypatch.setattr(evolve, "draw", lambda rows, path, title, controls: path.write_text(f"{len(rows)} rows"))
    monkeypatch.setattr(evolve, "ENTRANTS", {"transformer-1x64": transformer(1, 64, 1), "mlp-1x64": genome.mlp(1, 64)})

    def play(*flags: str, out: Path = tmp_path / "out") -> tuple[int, str]:
        capsys.readouterr()
        code = evolve.main([*FLAGS, "--max-params=10000000", "--data-dir", data_dir, "--out", str(out), *flags])
        output = capsys.readouterr()
        unlock(out)
        return code, output.out + output.err

    return play


def unlock(out: Path):
    """Close what evolve.main leaves open until its process ends: the lock of a folder."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == str(out):
                os.close(int(name))


def rows_of(out: Path) -> list[Result]:
    with record_in(out) as record:
        return [without_time(row) for row in record.rows]


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_run_and_what_comes_after_it(play, tmp_path):
    out = tmp_path / "out"
    code, output = play()
    first, rows = files_of(out), rows_of(out)
    assert code == 0 and set(first) == {"results.tsv", "best_genome.json", "progress.png"}
    assert collections.Counter(r.generation for r in rows) == {-1: 2, 0: 4, 1: 4, 2: 4, 3: 4}
    assert output.count("generation 0:") == output.count("generation 2:") == 1 and "The final: 2 fresh seeds" in output
    # raising MAX_GENERATIONS goes on
    code, output = play("--max-generations=5")
    assert code == 0 and f"Going on with the run in {out}/results.tsv: 18 evaluations" in output
    assert "generation 2:" not in output and output.count("generation 3:") == 1
    assert rows_of(out)[:18] == rows and len(rows_of(out)) == 18 + 2 * 4 + 4
    # a finished one is moved away, and the same run begins again
    second = files_of(out)
    code, output = play("--max-generations=5")
    moved = re.search("is finished; it was moved to (.*)", output)[1]
    assert code == 0 and files_of(Path(moved)) == second
    assert [r for r in rows_of(out) if r.is_search] == [r for r in rows_of(Path(moved)) if r.is_search]
    # as is one of other constants, and nothing is overwritten
    third = files_of(out)
    for seed in range(1, 4):
        code, output = play(f"--seed={seed}")
        assert code == 0 and "differs in seed; it was moved to" in output
    kept = [files_of(folder) for folder in (out / "runs").iterdir()]
    assert len(kept) == 4 and second in kept
    assert {name: data for name, data in third.items() if "/" not in name} in kept


def test_a_run_stopped_anywhere_ends_as_one_that_was_not(play, tmp_path, monkeypatch):
    assert play(out=tmp_path / "alone")[0] == 0
    alone, out, rng = rows_of(tmp_path / "alone"), tmp_path / "out", random.Random(0)
    append, left = Record.append, [0]

    def interrupted(record, result):
        append(record, result)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "append", interrupted)
    for start in itertools.count():
        left[0] = rng.choice((1, 1, 2, 3))
        code, output = play()
        assert len(rows_of(out)) > start
        if code == 0:
            break
        assert code == 130 and output.endswith("Stopped. Nothing is lost; run the same command again to go on.\n")
        with open(out / "results.tsv", "ab") as file:  # and at times within the next line
            file.write(rng.choice([b"", b"1\tg1.0", b"0"]))
    assert start > 5 and rows_of(out) == alone and not (out / "runs").exists()
    assert (out / "best_genome.json").read_bytes() == (tmp_path / "alone" / "best_genome.json").read_bytes()


def test_failures_are_rows_of_a_run(play, tmp_path, monkeypatch):
    def frail(t, *args):
        rng = random.Random(f"{t.genome.key}{t.seed}")
        operators = ["ok"] * 4 + ["raise", "die", "exit"]
        return (
            toy(dataclasses.replace(t, operator=rng.choice(operators)), *args)
            if t.operator != "final"
            else toy_result(t)
        )

    monkeypatch.setattr(
        evolve, "EVALUATE", lambda t, d, s, turn: dataclasses.replace(frail(t, d, s, turn), operator=t.operator)
    )
    code, output = play("--population-size=8", "--max-generations=2")
    rows = rows_of(tmp_path / "out")
    assert code == 0 and len([r for r in rows if r.is_search]) == 16
    statuses = collections.Counter(r.status for r in rows)
    assert set(statuses) == {"ok", "crash"}
    assert sum(map(int, re.findall(r"(\d+) crash$", output, re.M))) == sum(
        r.status == "crash" for r in rows if r.is_search
    )


def test_the_final_now(play, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code, output = play("--final")
    assert code == 1 and "holds no scored genome; run: uv run evolve.py" in output
    append = Record.append

    def interrupted(record, result):
        append(record, result)
        if len(record.rows) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Record, "append", interrupted)
    assert play()[0] == 130
    code, output = play("--final")
    assert code == 0 and "The final: 2 fresh seeds" in output
    assert json.loads((out / "best_genome.json").read_text())["stage"] == "final"
    code, output = play()  # and then the search goes on, to its own final
    assert code == 0 and "Going on" in output and not (out / "runs").exists()
    assert sum(r.is_search for r in rows_of(out)) == 12
    assert "is finished" in play()[1]


def test_a_full_disk_stops_a_run_that_goes_on_later(play, tmp_path):
    assert play(out=tmp_path / "alone")[0] == 0

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        return play()

    code, output = in_child(limited)
    assert code == 1 and output.endswith("results.tsv: File too large. What it holds is intact; run again to go on\n")
    assert 0 < len(rows_of(tmp_path / "out")) < 18
    assert play()[0] == 0 and rows_of(tmp_path / "out") == rows_of(tmp_path / "alone")


# ----------------------------------------------------------------------------------------------------------------------
# The final


def test_intervals_by_hand():
    two = evolve.estimate([1.0, 2.0])
    assert (two.mean, two.half) == (1.5, pytest.approx(12.706 * 0.70711 / 1.41421, rel=1e-4))
    five = evolve.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (five.mean, five.half) == (3.0, pytest.approx(2.776 * 1.58114 / 2.23607, rel=1e-4))
    assert f"{five}" == "3.0000 ± 1.9629"
    assert evolve.estimate([1.5]) == evolve.Estimate(1.5, math.inf, (1.5,))


@pytest.mark.parametrize("n", [2, 3, 5, 12, 31, 32, 60])
def test_student_t(n):
    """95 % of Student's distribution lies within: its density, summed up numerically."""
    spread = evolve.estimate([0.0] * (n - 1) + [1.0])
    t, df = spread.half * math.sqrt(n) / statistics.stdev(spread.values), n - 1
    x = np.linspace(-t, t, 200_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = scale * (1 + x**2 / df) ** (-(df + 1) / 2)
    assert np.sum((density[1:] + density[:-1]) / 2) * (x[1] - x[0]) == pytest.approx(0.95, abs=3e-4)


def final_rows(tests: dict[str, list[float | None]], settings) -> list[Result]:
    """Three genomes of a search, a transformer, and their final with these test scores; None for a failure."""
    genomes = {f"g0.{i:02d}": transformer(1, 64, 1, window=w) for i, w in enumerate((0, 64, 256))}
    rows = [toy_result(task(net, id=id), val_bpb=1.0 + 0.1 * i) for i, (id, net) in enumerate(genomes.items())]
    by_hand = Task("transformer-1x64", -1, (), "entrant", transformer(1, 64, 1), 0)
    rows += [
        toy_result(by_hand, val_bpb=1.5),
        toy_result(dataclasses.replace(by_hand, id="transformer-b"), val_bpb=1.6),
    ]
    for t in evolve.final_tasks(rows, settings):
        value = tests[t.id].pop(0)
        values = dict(test_bpb=value, val_bpb=value and value - 0.1)
        rows.append(dataclasses.replace(toy_result(t, "ok" if value else "nan"), **values))
    return rows


def test_the_final_adds_up():
    s = tiny(finalists=2, final_seeds=3)
    tests = {"g0.00": [1.30, 1.10, 1.20], "g0.01": [1.10, 1.15, 1.05], "transformer-1x64": [1.50, 1.60, 1.40]}
    rows = final_rows(tests, s)
    assert len({r.seed for r in rows if r.operator == "final"}) == 3
    assert not {r.seed for r in rows if r.operator == "final"} & {r.seed for r in rows if r.operator != "final"}
    assert evolve.final_table(rows[:-1], s) == []  # before all of it is done
    first, second, rival = evolve.final_table(rows, s)
    assert [f.id for f in (first, second, rival)] == ["g0.01", "g0.00", "transformer-1x64"]
    # by hand: 1.10, with a standard deviation of 0.05, times 4.303 / sqrt(3)
    assert (first.test.mean, first.test.half) == (pytest.approx(1.1), pytest.approx(0.12421, abs=1e-4))
    assert (first.val.mean, first.search) == (pytest.approx(1.0), 1.1)
    # leads by seed: 0.40, 0.45, 0.35 and 0.20, 0.50, 0.20
    assert (first.lead.mean, first.lead.half) == (pytest.approx(0.4), pytest.approx(0.12421, abs=1e-4))
    assert (second.lead.mean, second.lead.half) == (pytest.approx(0.3), pytest.approx(0.43030, abs=1e-4))
    assert rival.lead is None and {f.failed for f in (first, second, rival)} == {0}


def test_leads_are_over_the_transformer_that_is_best_in_the_final():
    s = tiny(finalists=1, rivals=2, final_seeds=2)
    rows = final_rows({"g0.00": [1.2, 1.3], "transformer-1x64": [1.6, 1.6], "transformer-b": [1.4, 1.6]}, s)
    best, second, third = evolve.final_table(rows, s)
    assert (best.id, second.id, third.id) == ("g0.00", "transformer-b", "transformer-1x64")
    assert best.lead.values == (pytest.approx(0.2), pytest.approx(0.3)) and second.lead is third.lead is None


def winner(rows: list[Result], settings, out: Path) -> dict:
    evolve.write_best(out, types.SimpleNamespace(rows=rows, run={"seed": 0}), settings)
    return json.loads((out / "best_genome.json").read_text())


def test_failures_in_the_final(tmp_path, capsys):
    s = tiny(finalists=2, final_seeds=3)
    # the better one failed once: it cannot win by that, and its lead counts the pairs that are
    tests = {"g0.00": [1.30, 1.10, 1.20], "g0.01": [None, 1.15, 1.05], "transformer-1x64": [1.50, 1.60, None]}
    table = evolve.final_table(rows := final_rows(tests, s), s)
    assert [(f.id, f.failed) for f in table] == [("g0.00", 0), ("transformer-1x64", 1), ("g0.01", 1)] or [
        (f.id, f.failed) for f in table
    ] == [("g0.00", 0), ("g0.01", 1), ("transformer-1x64", 1)]
    by_id = {f.id: f for f in table}
    assert by_id["g0.01"].test.values == (1.15, 1.05) and by_id["g0.01"].lead.values == (pytest.approx(0.45),)
    assert by_id["g0.00"].lead.values == (pytest.approx(0.2), pytest.approx(0.5))
    assert winner(rows, s, tmp_path)["id"] == "g0.00"
    evolve.print_final(table, s)
    assert capsys.readouterr().out.count("(1 failed)") == 2
    # the transformer failed: there is a winner without a lead
    tests = {"g0.00": [1.30, 1.10, 1.20], "g0.01": [1.1, 1.15, 1.05], "transformer-1x64": [None] * 3}
    best = winner(final_rows(tests, s), s, tmp_path)
    assert (best["id"], best["stage"], best["lead_over_transformer"]) == ("g0.01", "final", None)
    # everyone failed: the best of the search stands, unconfirmed
    best = winner(final_rows({name: [None] * 3 for name in tests}, s), s, tmp_path)
    assert (best["id"], best["stage"]) == ("g0.00", "search")


def test_the_transformer_is_no_winner(tmp_path):
    s = tiny(finalists=2, final_seeds=2)
    tests = {"g0.00": [1.3, 1.2], "g0.01": [1.4, 1.5], "transformer-1x64": [1.0, 1.1]}
    best = winner(final_rows(tests, s), s, tmp_path)
    assert best["id"] == "g0.00" and best["lead_over_transformer"]["mean"] == pytest.approx(-0.2)


def test_best_genome_can_be_checked(play, tmp_path):
    assert play("--max-generations=4", "--finalists=2", "--mutation-rate=0.9")[0] == 0
    best = json.loads((tmp_path / "out" / "best_genome.json").read_text())
    with record_in(tmp_path / "out") as record:
        rows, run = record.rows, record.run
    assert Genome.from_dict(best["genome"]).key == next(r.key for r in rows if r.id == best["id"])
    final = [r for r in rows if r.operator == "final"]
    scores = {id: [r.test_bpb for r in final if r.id == id] for id in {r.id for r in final if r.id.startswith("g")}}
    assert len(scores) == 2 and best["id"] == min(scores, key=lambda id: sum(scores[id]))
    assert best["test_bpb"]["values"] == scores[best["id"]]
    assert best["search_val_bpb"] == [r.val_bpb for r in rows if r.id == best["id"] and r.is_search]
    assert (
        best["settings"] == run
        and best["settings"]["mutation_rate"] == 0.9
        and run["data"] == "texts" + run["data"][5:]
    )
    assert best["torch"] == torch.__version__ and run["device"] == "cpu"
    first = {r.id: r for r in reversed(rows) if r.operator != "again"}
    family, todo = set(), {best["id"]}
    while todo:
        family |= todo
        todo = {p for id in todo for p in first[id].parents.split(",") if p} - family
    assert [a["id"] for a in best["lineage"]] == sorted(family) and best["lineage"][-1]["id"] == best["id"]
    assert all(a["val_bpb"] == first[a["id"]].val_bpb for a in best["lineage"])


def test_train_one_design(data_dir, tmp_path, capsys):
    path = tmp_path / "best_genome.json"
    path.write_text(json.dumps({"id": "x", "genome": json.loads(NET.to_json()), "settings": {}}))
    flags = [*FLAGS, "--data-dir", data_dir, "--train", str(path), "--prompt", "a dog ran"]
    assert evolve.main(flags) == 0
    output = capsys.readouterr().out
    assert NET.summary in output and re.search(r"val_bpb \d\.\d{4} after .* s: 1,024 tokens", output)
    written = output.partition("over the training text\n\n")[2]
    assert written.startswith("a dog ran") and len(written) > 100
    plain = tmp_path / "plain.json"
    plain.write_text(NET.to_json())
    assert evolve.main([str(plain) if flag == str(path) else flag for flag in flags]) == 0
    assert capsys.readouterr().out.partition("over the training text\n\n")[2] == written
    for content in ("[", "3", "[]", "{}", '{"genome": {"genes": [{"op": "no such"}]}}', "[" * 100_000):
        plain.write_text(content)
        assert evolve.main([str(plain) if flag == str(path) else flag for flag in flags]) == 1, content[:40]
        assert capsys.readouterr().err.strip()
    assert evolve.main([*FLAGS, "--data-dir", data_dir, "--train", str(tmp_path / "none")]) == 1
    assert "No such file" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# The picture


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def test_the_picture(free_params, tmp_path):
    s = tiny(**BIG)
    rows = search(s, 5)
    entrants = [toy_result(t) for t in evolve.entrant_tasks(s, 300)]
    first = [r for r in rows if r.generation == 0]
    odd = [dataclasses.replace(r, val_bpb=1.0, params=0, tokens_per_s=0.0) for r in first]
    sizes = set()
    for name, drawn in {
        "many generations": entrants + rows,
        "one generation, no noise known, no entrants": first,
        "one row": first[:1],
        "failures among them": [*first[:2], *search(s, 3, status=lambda t: "nan"), *entrants[:1]],
        "all the same": odd,
        "one far off": [*rows, dataclasses.replace(rows[0], id="far", val_bpb=1e6)],
    }.items():
        evolve.draw(drawn, tmp_path / "progress.png", f"a title: {name}", {})
        sizes.add(png_size(tmp_path / "progress.png"))
        (tmp_path / "progress.png").unlink()
    assert len(sizes) == 1 and min(next(iter(sizes))) > 500
    for drawn in ([], entrants, search(s, 2, status=lambda t: "crash")):
        evolve.draw(drawn, tmp_path / "progress.png", "nothing was scored", {})
        assert not (tmp_path / "progress.png").exists()
    controls = {("strategy", "random"): search(s, 2), ("strategy", "drift"): [], ("seed", 1): rows}
    evolve.draw(rows, tmp_path / "alone.png", "a title", {})
    evolve.draw(rows, tmp_path / "beside.png", "a title", controls)
    assert (tmp_path / "alone.png").read_bytes() != (tmp_path / "beside.png").read_bytes()


def test_the_picture_shows_controls_as_far_as_they_went(free_params):
    import matplotlib.pyplot as plt

    rows, short = search(tiny(**BIG), 4), search(tiny(**BIG, seed=1), 2)
    better = [dataclasses.replace(r, val_bpb=r.val_bpb - 0.5) for r in short]
    controls = {("strategy", "random"): rows, ("seed", 10): short, ("seed", 2): better, ("seed", 3): []}
    figure, axis = plt.subplots()
    evolve.draw_scores(axis, rows, rows, [0, 1, 2, 3], 3, controls)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert drawn["best so far, random search"] == drawn["best so far, mean of its evaluations"]
    ours = drawn["best so far, other seeds"]  # of seed 2, the first
    assert ours[:2] == evolve.best_so_far(better, [0, 1]) and all(map(math.isnan, ours[2:]))
    assert [text.get_text() for text in axis.texts][:2] == [" seed 2", " seed 10"]
    assert axis.get_ylim()[0] < min(ours[:2]), "a seed that is better is in the picture"
    plt.close(figure)


def test_the_picture_is_about_the_better_evaluations(free_params):
    import matplotlib.pyplot as plt

    s = tiny(**BIG)
    rows = search(s, 4)
    entrant = toy_result(evolve.entrant_tasks(s, 300)[0])
    rows += [entrant, dataclasses.replace(entrant, id="far-1", val_bpb=1e5)]
    rows += [dataclasses.replace(rows[0], id="far", val_bpb=1e6)]
    rows += [
        dataclasses.replace(rows[0], id="lucky", val_bpb=0.5),
        dataclasses.replace(rows[0], id="lucky", val_bpb=5.0),
    ]
    best = evolve.best_so_far(rows, [0, 1, 2, 3])
    figure, axis = plt.subplots()
    evolve.draw_scores(axis, rows, [r for r in rows if r.is_search], [0, 1, 2, 3], 3, {})
    low, high = axis.get_ylim()
    assert low < 0.5 and max(best) < high < 1e5, "the best evaluation is seen, even of a genome that is not good"
    assert any("far 100000" in text.get_text() for text in axis.texts), "what lies above is named"
    plt.close(figure)


def test_what_became_of_every_op(free_params, capsys):
    s = tiny(**BIG)
    linear, both = (Genome((Gene("linear", 64), *more)) for more in ((), (Gene("attention", 64), Gene("norm"))))
    rows = []
    for generation, (name, net, score) in enumerate(
        [("a", both, 3.0), ("b", linear, 2.0), ("c", linear, 1.5), ("d", linear, 1.0)]
    ):
        rows.append(toy_result(evolve.Task(name, generation, (), "random", net, 0), val_bpb=score))
        rows.append(toy_result(evolve.Task(name, generation, (), "again", net, 1), val_bpb=score))
    evolve.print_ops(rows, linear, s)  # three survive: a until generation 2
    told = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(told) == list(evolve.OPS)
    assert told["linear"] == ["4", "to", "the", "end", "1"]
    assert told["attention"] == ["1", "until", "generation", "2", "0"]
    assert told["gru"] == ["0", "never", "0"]


def test_a_run_is_the_same_as_long_as_the_search_space_is(monkeypatch, tmp_path):
    data = types.SimpleNamespace(source="text", fingerprint="0")
    folder = Path(evolve.__file__).parent
    code = {file: (folder / file).read_text(encoding="utf-8") for file in ("genome.py", "evolve.py")}
    monkeypatch.setattr(evolve, "__file__", str(tmp_path / "evolve.py"))

    def run_with(old: str, new: str) -> dict:
        assert any(old in text for text in code.values())
        for file, text in code.items():
            (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
        return evolve.describe_run(evolve.Settings(), data, "cpu")

    tree = ast.parse("def f(x):\n    'told'\n    return x")
    told = "args=arguments(args=arg(arg='x')) body=Return(value=Name(id='x' ctx=Load()))"
    assert evolve.bare(tree) == f"Module(body=FunctionDef(name='f' {told}))"  # in every version of Python
    before = run_with("", "")
    for idle in ('"""A matrix applied', '"""How the'), ("# The vocabulary", "# It"), ("came to be\\n", "came about\\n"):
        assert run_with(*idle) == before
    for telling in ("WIDTHS = (64,", "WIDTHS = (32, 64,"), ("2 * (1 - fraction)", "3 * (1 - fraction)"):
        assert run_with(*telling) != before
    assert run_with("rng.choice(survivors)", "survivors[0]") != before


def test_controls_are_runs_that_differ_in_strategy_or_seed_alone(free_params, tmp_path):
    run = {"strategy": "evolution", "seed": 0, "data": "text"}
    rows = search(tiny(**BIG), 1)
    for name, other in {
        "1": run | {"strategy": "random"},
        "2": run | {"strategy": "random", "seed": 1},
        "3": run,
        "4": run | {"strategy": "drift"},
        "5": run | {"seed": 7},
        "6": run | {"seed": 7, "data": "other"},
        "7": {k: v for k, v in run.items() if k != "data"},
    }.items():
        with record_in(tmp_path / "runs" / name) as record:
            record.begin(other)
            for row in rows[: int(name)]:
                record.append(row)
    (tmp_path / "runs" / "8").mkdir()
    (tmp_path / "runs" / "8" / "results.tsv").write_text("no results\n")
    found = evolve.find_controls(tmp_path, run)
    found = {key: len(rows) for key, rows in found.items()}
    assert found == {("strategy", "random"): 1, ("strategy", "drift"): 4, ("seed", 7): 5}


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_every_constant_has_a_comment_and_a_flag(capsys):
    source = Path(evolve.__file__).read_text().split("# " + "-" * 118)[1]
    constants = re.findall(r"^([A-Z_]+) = \S.*?  # .{10,}$", source, re.M)
    assert constants == re.findall(r"^([A-Z_]+) =", source, re.M) == list(evolve.CONSTANTS) and len(constants) > 20
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
        args = evolve.parse([flag, given, *(["--seq-len=1"] if name == "BATCH_TOKENS" else [])])
        read = getattr(evolve.read_settings(args), name.lower())
        assert (read, type(read)) == (type(value)(given), type(value))
    assert evolve.read_settings(evolve.parse([])) == evolve.Settings()
    demo = evolve.read_settings(evolve.parse(["--demo", "--survivors=1"]))
    assert demo == evolve.Settings(**{**evolve.DEMO, "survivors": 1})


IMPOSSIBLE = [f"--{name}=0" for name in ("population-size", "survivors", "batch-tokens", "seq-len", "eval-tokens",
    "max-params", "finalists", "deadline", "time-budget", "final-factor")]  # fmt: skip
IMPOSSIBLE += [f"--{name}=-1" for name in ("immigrants", "max-generations", "token-budget", "hurdle", "seed",
    "workers-per-gpu")]  # fmt: skip
IMPOSSIBLE += [
    f"--{name}={x}" for name in ("mutation-rate", "crossover-rate", "hurdle-sample") for x in (-0.1, 1.1, "nan")
]
IMPOSSIBLE += ["--final-seeds=1", "--strategy=best", "--time-budget=nan", "--time-budget=inf", "--final-factor=nan"]
IMPOSSIBLE += ["--hurdle=nan", "--batch-tokens=1000", "--survivors=12", "--immigrants=9", "--population-size=4"]
IMPOSSIBLE += [f"--hurdle-at={x}" for x in (0, 0.25, 1, "nan")]


@pytest.mark.parametrize("flag", IMPOSSIBLE)
def test_an_impossible_value_is_an_error_that_names_it(flag, data_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evolve, "evolve", lambda *_: pytest.fail("it began"))
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


@pytest.mark.parametrize("flag", ["--seq-len=8192", "--eval-tokens=31"])
def test_what_the_data_cannot_fill_is_an_error(flag, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert evolve.main([*FLAGS, flag, "--batch-tokens=8192", "--data-dir", data_dir, "--out", str(out)]) == 1
    assert flag.partition("=")[0][2:].upper().replace("-", "_") in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_ctrl_c(data_dir, tmp_path):
    """The command as it is, workers spawned."""
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "evolve.py", *FLAGS, "--max-params=300000", "--data-dir", data_dir, "--out", out]
    command += ["--max-generations=1", "--time-budget=1"]

    def in_session(id: int) -> list[int]:
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        return [pid for pid in pids if is_alive(pid) and os.getsid(pid) == id]

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
        assert not in_session(run.pid)
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
