"""A trial: the optimizer, the clock, the hurdle, failures, and the check for leaks."""

import dataclasses
import itertools
import math
import random
import time
import types

import numpy as np
import pytest
import torch
from designs import NAMED_DESIGNS
from helpers import (
    ALL_KINDS,
    NET,
    evaluate,
    final_task,
    narrow,
    narrow_genomes,
    padded,
    planted,
    task,
    tiny,
    uniform_bpb,
    with_gene,
    without_time,
)

import evolve
import genome
from genome import Gene, Genome, transformer

pytestmark = pytest.mark.usefixtures("cache")


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
