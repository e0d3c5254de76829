"""evolve.py: train -> score -> record -> select -> breed -> picture.

    uv run evolve.py                     evolve overnight; stop it and start it again as you like
    uv run evolve.py --demo              two minutes on any machine, no download: the same program on a small scale
    uv run evolve.py --final             the final now, from what results.tsv holds
    uv run evolve.py --train best_genome.json --time-budget 120      train one design, and let it write

Reads the tokens that prepare.py wrote (and prepares them first where there are none). Writes results.tsv, one line per
evaluation; everything else (who survives, best_genome.json, progress.png, where a stopped run goes on) is a function of
it. Every constant below is also a flag: TIME_BUDGET = 30 is --time-budget 30.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import prepare
from genome import ENTRANTS, MAX_SEQ_LEN, OPS, Block, Genome, GenomeError, Model, crossover, mutate, random_genome

# ----------------------------------------------------------------------------------------------------------------------
# The search
POPULATION_SIZE = 12  # evaluations in a generation: survivors once more, and children
SURVIVORS = 3  # genomes that breed the next generation
REPEATS = 3  # evaluations of a survivor, one a generation, each with a new seed; after that its mean stands
MUTATION_RATE = 0.3  # chance of each further mutation after the first, and of one after a crossover
CROSSOVER_RATE = 0.3  # share of children with two parents
IMMIGRANTS = 1  # random newcomers among the children of a generation
MAX_GENERATIONS = 25  # generations until the final; raise it to go on
STRATEGY = "evolution"  # evolution, random (every child a random genome) or drift (survivors drawn at random)
SEED = 0  # of everything that is random
# A trial
TIME_BUDGET = 30.0  # seconds of training per genome
TOKEN_BUDGET = 0  # tokens of training per genome in the place of seconds; 0: TIME_BUDGET counts
MAX_PARAMS = 10_000_000  # parameters of a genome, embedding and head included
BATCH_TOKENS = 32_768  # tokens per optimizer step
SEQ_LEN = 2_048  # tokens that a model sees at once
EVAL_TOKENS = 1_048_576  # tokens of val, and of test, that are scored
HURDLE = 0.1  # nats per token worse than every survivor at HURDLE_AT: a newcomer ends there; 0: off
HURDLE_AT = 0.7  # share of the budget, in tenths; earlier the loss is unfair to deep genomes and high learning rates
HURDLE_SAMPLE = 0.1  # share of those that run on all the same, to see what the hurdle costs
# The final
FINALISTS = 3  # best genomes in it
RIVALS = 2  # best transformers in it
FINAL_SEEDS = 5  # times that each is retrained
FINAL_FACTOR = 2.0  # times the budget of the search
# The machine
WORKERS_PER_GPU = 0  # processes: one trains while the others compile what comes next; 0: half the CPU cores, up to 8
DEADLINE = 300  # seconds that building and compiling, or training and scoring beyond twice the budget, may take
# ----------------------------------------------------------------------------------------------------------------------

CONSTANTS = {
    name: value
    for name, value in globals().items()
    if name.isupper() and isinstance(value, int | float | str) and name != "MAX_SEQ_LEN"  # that is genome.py's
}
DEMO = dict(  # the same program on a small scale: what --demo sets; tokens for seconds, so that it runs alike anywhere
    population_size=5, survivors=2, immigrants=0, max_generations=5, token_budget=16_384, max_params=3_000_000,
    batch_tokens=256, seq_len=128, eval_tokens=8_192, hurdle=0.3, finalists=1, final_seeds=2, final_factor=1.0,
)  # fmt: skip
# what may change within a run
MAY_CHANGE = ("max_generations", "finalists", "rivals", "final_seeds", "workers_per_gpu", "deadline")
Settings = dataclasses.make_dataclass(
    "Settings",
    [(name.lower(), type(value), field(default=value)) for name, value in CONSTANTS.items()],
    frozen=True,
    namespace={"__module__": __name__, "__doc__": "The constants above, in lower case."},
)

MUON_LR, MUON_MOMENTUM = 0.02, 0.95
EMBED_LR, HEAD_LR, VECTOR_LR = 0.2, 0.004, 0.01  # of AdamW; the first two times sqrt(768 / width)
ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10
SEEDS = 100_000  # of evaluations, for one SEED: the first half for generations, the second for the final
CURVE = 10  # points of the loss curve kept with each evaluation, each the mean over a tenth of the budget


class Stop(Exception):
    """The run cannot go on; the message says why and what to do."""


def read_settings(args: argparse.Namespace) -> "Settings":
    """Settings from flags, --demo and constants, in that order. Raises Stop naming a constant that is impossible."""
    given = {name.lower(): getattr(args, name.lower()) for name in CONSTANTS}
    given = {name: value for name, value in given.items() if value is not None}
    if "time_budget" in given:
        given.setdefault("token_budget", 0)  # whoever asks for seconds gets seconds, in the demo too
    settings = Settings(**{**(DEMO if args.demo else {}), **given})
    sizes = "population_size survivors repeats batch_tokens seq_len eval_tokens max_params finalists deadline"
    for name in sizes.split():
        if getattr(settings, name) < 1:
            raise Stop(f"{name.upper()} = {getattr(settings, name)}: has to be at least 1")
    for name in ("immigrants", "max_generations", "token_budget", "hurdle", "rivals", "seed", "workers_per_gpu"):
        if not getattr(settings, name) >= 0:
            raise Stop(f"{name.upper()} = {getattr(settings, name)}: cannot be negative")
    for name in ("mutation_rate", "crossover_rate", "hurdle_sample"):
        if not 0 <= getattr(settings, name) <= 1:
            raise Stop(f"{name.upper()} = {getattr(settings, name)}: is a share, from 0 to 1")
    if settings.hurdle_at not in [tenth / CURVE for tenth in range(1, CURVE)]:
        raise Stop(f"HURDLE_AT = {settings.hurdle_at}: is a whole number of tenths, from 0.1 to 0.9")
    for name in ("time_budget", "final_factor"):
        if not 0 < getattr(settings, name) < math.inf:
            raise Stop(f"{name.upper()} = {getattr(settings, name)}: has to be above 0")
    if settings.final_seeds < 2:
        raise Stop(f"FINAL_SEEDS = {settings.final_seeds}: an interval needs at least 2")
    if settings.survivors + settings.immigrants >= settings.population_size:
        raise Stop("SURVIVORS + IMMIGRANTS have to be less than POPULATION_SIZE, or no child is ever bred")
    if settings.seq_len > MAX_SEQ_LEN:
        raise Stop(f"SEQ_LEN = {settings.seq_len}: is over MAX_SEQ_LEN = {MAX_SEQ_LEN} in genome.py; raise that")
    if settings.batch_tokens % settings.seq_len:
        raise Stop(f"BATCH_TOKENS = {settings.batch_tokens}: has to be a multiple of SEQ_LEN = {settings.seq_len}")
    if settings.strategy not in ("evolution", "random", "drift"):
        raise Stop(f"STRATEGY = {settings.strategy}: is evolution, random or drift")
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# A task is all that an evaluation depends on, a result is its line in results.tsv.


@dataclass(frozen=True)
class Task:
    id: str  # of the genome: g3.05 is the fifth of generation 3
    generation: int  # -1 for the designs made by hand, MAX_GENERATIONS for the final
    parents: tuple[str, ...]
    operator: str  # what made the genome: random, crossover, a mutation; or again, entrant, final
    genome: Genome
    seed: int  # of initialisation and of the order of batches
    hurdle: float | None = None  # nats per token at HURDLE_AT
    spared: bool = False  # runs on when it misses the hurdle
    final: bool = False  # scored on test as well


@dataclass(frozen=True)
class Result:
    """One evaluation. status: ok, nan (diverged), oom, leak (sees the future), dead (the input does not reach the
    output), stopped (at the hurdle), timeout, crash. Only ok has a score."""

    generation: int
    id: str
    parents: str
    operator: str
    seed: int
    status: str
    val_bpb: float | None = None  # bits per byte on val
    test_bpb: float | None = None  # bits per byte on test, read by the final alone
    params: int = 0
    tokens: int = 0  # trained on
    tokens_per_s: float = 0.0
    memory_mb: int = 0  # peak on the device
    held_mb: int = 0  # on the device before the evaluation
    seconds: float = 0.0  # of training
    outside: float = 0.0  # seconds on the device beside training: warm-up, capture, scoring
    finished: str = ""  # when, UTC
    hurdle: str = ""  # passed, stopped, spared (missed it and ran on); empty where there was none
    losses: str = ""  # nats per token, mean over each tenth of the budget
    note: str = ""
    key: str = ""  # of the network
    summary: str = ""
    genome: str = ""  # JSON

    @property
    def curve(self) -> list[float]:
        return [float(loss) for loss in self.losses.split(",")] if self.losses else []

    @property
    def is_search(self) -> bool:
        return self.operator not in ("entrant", "final")

    @property
    def is_newcomer(self) -> bool:
        """Whether a genome of the search is evaluated for the first time."""
        return self.is_search and self.operator != "again"


def result_of(task: Task, status: str, **values) -> Result:
    """The result of a task, with what is known before it is trained."""
    return Result(
        generation=task.generation,
        id=task.id,
        parents=",".join(task.parents),
        operator=task.operator,
        seed=task.seed,
        status=status,
        key=task.genome.key,
        summary=task.genome.summary,
        genome=task.genome.to_json(),
        finished=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        **values,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer: Muon for matrices, AdamW for embedding, head and vectors. Works inside a CUDA graph.


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: 5 Newton-Schulz steps on (N, rows, cols), rows <= cols.

    Jordan et al. 2024, Muon: https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices.to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


class MuonGroup:
    """Matrices of one shape, updated as one stack. Wide ones lie as they are, tall ones transposed."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float):
        self.params = params
        self.views = [m for p in params for m in self.matrices(p.detach())]
        tall = [m.size(0) / m.size(1) for p in params for m in p.detach().view(-1, *p.shape[-2:])]
        tall = torch.tensor(tall, device=params[0].device).clamp(min=1).sqrt()
        self.step_size = (-lr * tall).view(-1, 1, 1)
        self.momentum = torch.zeros(len(self.views), *self.views[0].shape, device=params[0].device)

    @staticmethod
    def matrices(p: torch.Tensor) -> list[torch.Tensor]:
        """Views of the (rows <= cols) matrices in a (..., out, in) parameter."""
        return [m if m.size(0) <= m.size(1) else m.T for m in p.view(-1, *p.shape[-2:])]

    def step(self, schedule: torch.Tensor, dtype: torch.dtype):
        grads = torch.stack([m for p in self.params for m in self.matrices(p.grad)])
        self.momentum.lerp_(grads, 1 - MUON_MOMENTUM)
        update = orthogonalize(grads.lerp_(self.momentum, MUON_MOMENTUM), dtype)  # Nesterov
        update = update * (self.step_size * schedule)
        torch._foreach_add_(self.views, list(update.unbind(0)))


class Optimizer:
    """Muon and AdamW over a Model, every learning rate times lr_factor and times `schedule`, a tensor on the device."""

    def __init__(self, model: Model, lr_factor: float):
        device = next(model.parameters()).device
        self.schedule = torch.zeros((), device=device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shapes, vectors = collections.defaultdict(list), []
        for name, p in model.blocks.named_parameters():
            if name.endswith("weight") and p.dim() >= 2:
                shapes[tuple(sorted(p.shape[-2:]))].append(p)
            else:
                vectors.append(p)
        if model.leave.project is not None:
            shapes[tuple(sorted(model.leave.project.weight.shape))].append(model.leave.project.weight)
        self.muon = [MuonGroup(params, MUON_LR * lr_factor) for params in shapes.values()]
        groups = [([model.enter.embedding], EMBED_LR * (768 / model.enter.embedding.size(1)) ** 0.5)]
        if model.leave.head is not None:
            groups.append(([model.leave.head], HEAD_LR * (768 / model.leave.head.size(1)) ** 0.5))
        if vectors:
            groups.append((vectors, VECTOR_LR))
        self.adamw = torch.optim.AdamW(
            [dict(params=params, lr=torch.zeros((), device=device), base=lr * lr_factor) for params, lr in groups],
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            weight_decay=0.0,
            fused=True,
            capturable=device.type == "cuda",
        )

    @torch.no_grad()
    def step(self):
        """Update from .grad, and drop the gradients."""
        for group in self.muon:
            group.step(self.schedule, self.dtype)
        for group in self.adamw.param_groups:
            torch.mul(self.schedule, group["base"], out=group["lr"])
        self.adamw.step()
        for p in itertools.chain(*(g.params for g in self.muon), *(g["params"] for g in self.adamw.param_groups)):
            p.grad = None

    def reset(self):
        """Forget everything but the weights."""
        for group in self.muon:
            group.momentum.zero_()
        for state in self.adamw.state.values():
            for tensor in state.values():
                tensor.zero_()


def schedule_at(fraction: float) -> float:
    """The learning rate after this share of the budget: constant, then linear to zero over the last half."""
    return min(1.0, 2 * (1 - fraction))


# ----------------------------------------------------------------------------------------------------------------------
# Compiling. Each gene is compiled by itself, by what it is made of, so genes that were seen before cost nothing. While
# another process trains, nothing may run on the GPU: then `compile_only` stops each function once it is compiled.

COMPILED: dict[tuple, Callable | str] = {}  # what a part is made of: its compiled function, or why there is none
compile_only = False


NOT_CAPTURED = "not captured"  # in the note of a result whose step could not become a CUDA graph


class OnlyCompiled(Exception):
    """Raised in the place of running what was just compiled."""


def inductor(graph, inputs, tune: bool):
    """torch.compile's own backend, forward and backward at once, but with a stop before it runs.

    Each kernel comes in one form, chosen by rule: trying several on the device would hold it for half a second a gene.
    With `tune` reductions are tried all the same; the rule is bad for the norms of short heads.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    by_rule = {"triton.autotune_pointwise": False, "test_configs.force_filter_reduction_configs": not tune}
    with config.patch(force_non_lazy_backward_lowering=True):
        run = compile_fx(graph, inputs, config_patches=by_rule)

    def run_unless_compile_only(*args):
        if compile_only:
            raise OnlyCompiled
        return run(*args)

    return run_unless_compile_only


def call(part, *args):
    return type(part).forward(part, *args)


def compile_part(part: torch.nn.Module, key: tuple, inputs: list) -> str:
    """Let part.forward run compiled; returns why it cannot, or an empty string. No kernel runs."""
    global compile_only
    if key not in COMPILED:
        # a code object of its own for each key: torch.compile keeps its list of compiled variants on it
        function = types.FunctionType(call.__code__.replace(co_name=key[0]), globals())
        backend = functools.partial(inductor, tune=isinstance(part, Block) and part.op.tuned)
        COMPILED[key] = torch.compile(function, backend=backend, dynamic=False)
        compile_only = True
        try:
            COMPILED[key](part, *inputs)
        except OnlyCompiled:
            pass
        except (torch.OutOfMemoryError, OSError):  # of the machine, not of the op: try again another time
            del COMPILED[key]
            raise
        except Exception as error:  # whatever the compiler says of an op: the op still trains, slower
            COMPILED[key] = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            compile_only = False
    function = COMPILED[key]
    if isinstance(function, str):
        return function
    part.forward = lambda *args: function(part, *args)
    return ""


def compile_model(model: Model, rows: int, seq_len: int) -> str:
    """Compile every part of a model for batches of (rows, seq_len); returns which parts run eagerly, for the record."""
    genome, device = model.genome, model.enter.embedding.device
    vocab_size, embed_dim = model.enter.embedding.shape
    idx = torch.zeros(rows, seq_len, dtype=torch.int64, device=device)

    def stream(width):  # memory alone, its values are never read
        return torch.empty(rows, seq_len, width, dtype=model.enter.dtype, device=device, requires_grad=True)

    eager = []
    shape = (rows, seq_len, vocab_size)
    compile_part(model.enter, ("enter", embed_dim, *shape), [idx])
    for node, block in zip(genome.network, model.blocks, strict=True):
        if not OPS[node.gene.op].compiles:
            eager.append(node.gene.op)
            continue
        x, around = stream(node.d_in), node.skip == node.source  # a residual reads one tensor twice
        skip = None if node.skip is None else x if around else stream(node.d_skip)
        reason = compile_part(block, (node.gene.op, node.gene.bare, node.d_in, node.d_skip, around, *shape), [x, skip])
        if reason:
            eager.append(f"{node.gene.op} ({reason})")
    embedding = model.enter.embedding if genome.tied else None
    key = ("leave", genome.d_out, genome.tied and embed_dim, *shape)
    compile_part(model.leave, key, [stream(genome.d_out), embedding, idx])
    return "eager: " + ", ".join(sorted(set(eager))) if eager else ""


# ----------------------------------------------------------------------------------------------------------------------
# A trial: one genome, trained for its budget and scored.


def tenth_before_hurdle(settings: "Settings") -> int:
    """The point of the loss curve that the hurdle looks at."""
    return round(settings.hurdle_at * CURVE) - 1


def check_network(genome: Genome, seed: int) -> str:
    """Return leak where a later token or another row of the batch changes the logits, dead where no token does, or "".

    Runs the network with a small vocabulary on the CPU, where causality holds to the bit, with noise on every weight
    so that nothing hides behind a zero.
    """
    torch.manual_seed(seed)
    vocab_size, T = 64, 150
    model = Model(genome, vocab_size)
    idx = torch.randint(vocab_size, (2, T))
    anywhere = int(torch.randint(2, T, ()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        before = model(idx)
        for row, t in ((0, 1), (1, 64), (0, 100), (1, T - 1), (0, anywhere)):
            changed = idx.clone()
            changed[row, t:] = (changed[row, t:] + 1 + torch.randint(vocab_size - 1, (T - t,))) % vocab_size
            after = model(changed)
            if not torch.equal(before[row, :t], after[row, :t]) or not torch.equal(before[1 - row], after[1 - row]):
                return "leak" if before.isfinite().all() else "nan"
            if t == 1 and torch.equal(before[row, t:], after[row, t:]):
                return "dead"
    return ""


class DeviceData:
    """The tokens of a data set on a device, moved there once per process."""

    def __init__(self, data: prepare.Dataset, device: torch.device):
        torch.set_float32_matmul_precision("high")
        self.device, self.vocab_size = device, data.vocab_size
        self.train, self.val, self.test = (prepare.to_device(t, device) for t in (data.train, data.val, data.test))
        self.token_bytes = data.token_bytes
        # one stream for every capture: cuBLAS keeps a workspace for each stream that it ever saw
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None


class Trial:
    """A genome built and compiled, ready to train with `rows` windows at once; on the device is its memory alone."""

    def __init__(self, task: Task, data: DeviceData, settings: "Settings", rows: int):
        self.task, self.data, self.settings, self.rows = task, data, settings, rows
        self.micro_steps = settings.batch_tokens // settings.seq_len // rows
        self.on_gpu = data.device.type == "cuda"
        torch.manual_seed(task.seed)  # on the CPU, so that every machine begins with the same weights
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.model = Model(task.genome, data.vocab_size, dtype).to(data.device)
        self.batches = prepare.Batches(data.train, settings.seq_len, task.seed, data.device)
        self.optimizer = Optimizer(self.model, task.genome.lr_factor)
        self.window = torch.zeros((), dtype=torch.int64, device=data.device)  # the first of the next batch
        self.loss = torch.zeros((), device=data.device)  # of the last step, nats per token
        self.note = compile_model(self.model, rows, settings.seq_len) if self.on_gpu else ""

    def token_losses(self, idx, targets):
        return self.model(idx, targets, reduction="none")  # (rows, T) nats

    def step(self):
        """One optimizer step over BATCH_TOKENS tokens; no synchronisation, so that it can be captured."""
        self.loss.zero_()
        for _ in range(self.micro_steps):
            loss = self.token_losses(*self.batches(self.window, self.rows)).mean() / self.micro_steps
            loss.backward()
            self.loss += loss.detach()
            self.window += self.rows
        self.optimizer.step()

    def capture(self) -> Callable[[], None]:
        """The step as one CUDA graph, or as it is where it cannot be captured. Leaves the model as it was."""
        stream = self.data.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()  # the schedule is zero, so no weight moves
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        step = graph.replay
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()
            for p in self.model.parameters():
                p.grad = None
            reason = str(error.__context__ or error).splitlines()[0]
            step, self.note = self.step, f"{self.note} {NOT_CAPTURED}: {reason}".strip()
        self.optimizer.reset()
        self.window.zero_()
        return step

    def train(self, step: Callable[[], None]) -> dict:
        """Train for the budget. The clock covers this alone, and stops about one step late at most."""
        s, task = self.settings, self.task
        factor = s.final_factor if task.final else 1.0
        seconds, tokens = s.time_budget * factor, s.token_budget * factor
        diverged = math.log(self.data.vocab_size) + 1
        before_hurdle = tenth_before_hurdle(s)
        losses: list[list[float]] = [[] for _ in range(CURVE)]
        recent: collections.deque = collections.deque(maxlen=50)
        host = torch.zeros(2, pin_memory=self.on_gpu)
        ends = [torch.cuda.Event(), torch.cuda.Event()] if self.on_gpu else None
        flying: collections.deque = collections.deque()  # the tenth of the budget that each unfinished step belongs to
        status, hurdle, done, pace, done_at = "ok", "", 0, 0.0, 0.0
        self.synchronize()
        start = time.perf_counter()
        while status == "ok":
            launched = done + len(flying)
            begins = done_at + pace * len(flying)  # when this step will begin on the device
            fraction = launched * s.batch_tokens / tokens if tokens else begins / seconds
            if fraction < 1:
                self.optimizer.schedule.fill_(schedule_at(fraction))
                step()
                host[launched % 2].copy_(self.loss, non_blocking=True)
                if self.on_gpu:
                    ends[launched % 2].record()
                flying.append(int(fraction * CURVE))
            elif not flying:
                break
            if done and len(flying) == 1 and self.on_gpu and fraction < 1:
                continue  # the next step is launched before this one is waited for
            if self.on_gpu:
                ends[done % 2].synchronize()
            now = time.perf_counter() - start
            pace, done_at = now - done_at, now
            loss = host[done % 2].item()
            tenth, done = flying.popleft(), done + 1
            losses[tenth].append(loss)
            recent.append(loss)
            if not math.isfinite(loss) or (len(recent) == 50 and statistics.fmean(recent) > diverged):
                status = "nan"
            if not hurdle and task.hurdle is not None and tenth > before_hurdle and losses[before_hurdle]:
                missed = statistics.fmean(losses[before_hurdle]) > task.hurdle
                hurdle = "passed" if not missed else "spared" if task.spared else "stopped"
                status = "stopped" if hurdle == "stopped" else status
        self.synchronize()
        elapsed = time.perf_counter() - start
        curve = ",".join(f"{statistics.fmean(tenth):.4f}" if tenth else "nan" for tenth in losses)
        trained = (done + len(flying)) * s.batch_tokens
        return dict(
            status=status,
            hurdle=hurdle,
            losses=curve,
            seconds=round(elapsed, 3),
            tokens=trained,
            tokens_per_s=round(trained / elapsed),
        )

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def score(self, tokens) -> float:
        """Bits per byte on a split."""

        def token_losses(idx, targets):
            with torch.set_grad_enabled(self.on_gpu):  # there the forward that was compiled for training serves
                return self.token_losses(idx, targets).detach()

        s = self.settings
        sizes = dict(seq_len=s.seq_len, rows=self.rows, device=self.data.device, max_tokens=s.eval_tokens)
        return prepare.bits_per_byte(token_losses, tokens, self.data.token_bytes, **sizes)

    def run(self) -> dict:
        """Train and score; the values of the result."""
        entered = time.perf_counter()
        values = dict(params=sum(p.numel() for p in self.model.parameters()))
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        values |= self.train(self.capture() if self.on_gpu else self.step)
        if values["status"] == "ok":
            scores = {"val_bpb": self.score(self.data.val)}
            if self.task.final:
                scores["test_bpb"] = self.score(self.data.test)
            values |= scores if all(map(math.isfinite, scores.values())) else dict(status="nan")
        if self.on_gpu:
            values["memory_mb"] = torch.cuda.max_memory_allocated() // 2**20
        return values | dict(note=self.note, outside=round(time.perf_counter() - entered - values["seconds"], 3))


def run_trial(task: Task, data: DeviceData, settings: "Settings", wait_for_turn: Callable[[], None] = lambda: None):
    """Build, train and score a genome; returns its Trial and the values of its result.

    Out of memory halves the rows that are treated at once (the tokens of a step stay), down to one, and then becomes
    the status oom, with None for the Trial.
    """
    rows, turn, note = settings.batch_tokens // settings.seq_len, False, ""
    while True:
        trial = None
        try:
            trial = Trial(task, data, settings, rows)
            if not turn:
                wait_for_turn()
                turn = True
            values = trial.run()
            return trial, {**values, "note": f"{note} {values['note']}".strip()}
        except torch.OutOfMemoryError as error:
            if turn and rows == 1:
                return None, dict(status="oom", note=str(error).splitlines()[0][:200])
        del trial  # what failed makes room for what is tried next
        free_memory(data.device)
        if not turn:  # the one in training may have held the memory: again, alone, with as many rows
            wait_for_turn()
            turn = True
            continue
        rows = fewer(rows)
        note = f"{rows} rows at once"


def evaluate(
    task: Task, data: DeviceData, settings: "Settings", wait_for_turn: Callable[[], None] = lambda: None
) -> Result:
    """Train and score one genome: a pure function of its arguments, but for time. Leaves nothing on the device.

    Calls wait_for_turn once it is built and compiled, before it computes on the device.
    """
    held = torch.cuda.memory_allocated() // 2**20 if data.device.type == "cuda" else 0
    problem = check_network(task.genome, task.seed)
    if problem:
        return result_of(task, problem, params=task.genome.num_params(data.vocab_size))
    trial, values = run_trial(task, data, settings, wait_for_turn)
    del trial
    free_memory(data.device)
    return result_of(task, **values, held_mb=held)


def free_memory(device: torch.device):
    """Give back what nobody holds any more; compiled modules hold themselves, in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fewer(rows: int) -> int:
    """Half as many rows at once, or the next smaller number that divides them."""
    return next(r for r in range(rows // 2, 0, -1) if rows % r == 0)


# ----------------------------------------------------------------------------------------------------------------------
# Workers: processes that evaluate, and are replaced when they die or hang.


def worker(pipe, device: str, folder: Path, settings: "Settings", workers: int):
    """Evaluate tasks that come through the pipe: send "ready" when compiled, train when told to, send the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if device != "cpu":
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        torch.set_num_threads(1)
        torch.cuda.set_device(device)
    data = DeviceData(prepare.load(folder), torch.device(device))
    pipe.send("idle")
    while True:
        task = pipe.recv()
        if task is None:  # the pool was stopped
            return

        def wait_for_turn():
            pipe.send("ready")
            pipe.recv()

        try:
            result = EVALUATE(task, data, settings, wait_for_turn)
            if NOT_CAPTURED in result.note:  # a failed capture leaves torch's allocator in disorder: start afresh
                pipe.send((result, ""))
                return
            pipe.send(result)
            gc.freeze()  # what is left, modules and compiled code, stays: gc.collect need not look through it again
        except Exception:  # a result too: it is recorded, printed, and the process replaced
            trace = traceback.format_exc()
            pipe.send((result_of(task, "crash", note=trace.strip().splitlines()[-1][:200]), trace))
            return


EVALUATE = evaluate  # what a worker calls; the tests put others here


@dataclass
class Worker:
    process: multiprocessing.Process
    pipe: multiprocessing.connection.Connection
    device: str
    state: str = "starting"  # starting, idle, preparing, ready, training
    task: Task | None = None
    since: float = field(default_factory=time.monotonic)

    def become(self, state: str):
        self.state, self.since = state, time.monotonic()


class Pool:
    """Workers on every device. run(tasks) yields a result for each task, in the order in which they finish."""

    def __init__(self, folder: Path, settings: "Settings"):
        alike = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_name(i) == device_name()]
        gpus = len(alike)
        self.devices = [f"cuda:{i}" for i in alike] or ["cpu"]
        cores = os.cpu_count() or 1
        self.per_device = (settings.workers_per_gpu or max(1, min(8, cores // 2 // gpus))) if gpus else 1
        self.folder, self.settings = folder, settings
        self.worked, self.failed_starts = False, 0  # whether any worker ever started; starts that failed in a row
        self.context = multiprocessing.get_context(START_METHOD)
        # Trackers, ours and those of workers, free the semaphores of killed processes; their warning helps nobody.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        self.workers = [self.start(d) for _ in range(self.per_device) for d in self.devices]

    def start(self, device: str) -> Worker:
        ours, theirs = self.context.Pipe()
        workers = self.per_device * len(self.devices)
        args = (theirs, device, self.folder, self.settings, workers)
        process = self.context.Process(target=worker, args=args, daemon=True)
        multiprocessing.resource_tracker.ensure_running()  # now, as its start unblocks what is blocked
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a worker inherits that: Ctrl-C is ours alone
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        return Worker(process, ours, device)

    def stop(self):
        for w in self.workers:
            if w.state == "idle":
                with contextlib.suppress(OSError):
                    w.pipe.send(None)  # it ends by itself, and leaves nothing behind
            else:
                w.process.kill()
        deadline = time.monotonic() + 5
        for w in self.workers:
            w.process.join(max(0.0, deadline - time.monotonic()))
            w.process.kill()
            w.process.join()

    def limit(self, w: Worker) -> float:
        """Seconds that a worker may stay in its state."""
        s = self.settings
        if w.state in ("idle", "ready"):
            return math.inf
        if w.state == "training" and not s.token_budget:
            return s.deadline + 2 * s.time_budget * (s.final_factor if w.task.final else 1)
        return s.deadline * (max(1, s.final_factor) if w.task and w.task.final else 1)

    def replace(self, w: Worker, status: str, note: str) -> Result | None:
        """Kill a worker, start another, and turn what it was doing, if anything, into a result."""
        w.process.kill()
        w.process.join(30)
        self.failed_starts += w.state == "starting"
        if w.state == "starting" and (not self.worked or self.failed_starts == 3):
            self.stop()
            raise Stop(f"A worker on {w.device} could not start ({note}); what it printed stands above")
        self.workers[self.workers.index(w)] = self.start(w.device)
        return None if w.state in ("starting", "idle") else result_of(w.task, status, note=note)

    def run(self, tasks: list[Task], tick: Callable[[], None] = lambda: None) -> Iterator[Result]:
        queue, expected = collections.deque(tasks), len(tasks)
        while expected:
            for w in self.workers:
                if w.state == "idle" and queue and w.process.is_alive():
                    w.task = queue.popleft()
                    w.become("preparing")
                    with contextlib.suppress(OSError):  # a dead worker is found below
                        w.pipe.send(w.task)
            for device in self.devices:
                here = [w for w in self.workers if w.device == device]
                ready = [w for w in here if w.state == "ready"]
                if ready and not any(w.state == "training" for w in here):
                    first = min(ready, key=lambda w: tasks.index(w.task))
                    first.become("training")
                    with contextlib.suppress(OSError):
                        first.pipe.send("go")
            readable = multiprocessing.connection.wait([w.pipe for w in self.workers], timeout=0.5)
            tick()
            for w in list(self.workers):
                result = None
                if w.pipe in readable:
                    try:
                        message = w.pipe.recv()
                    except (EOFError, OSError):
                        w.process.join(5)
                        result = self.replace(w, "crash", f"the worker ended with exit code {w.process.exitcode}")
                    else:
                        if isinstance(message, str):
                            w.become(message)
                            if message == "idle":
                                self.worked, self.failed_starts = True, 0
                        elif isinstance(message, Result):
                            result = message
                            w.become("idle")
                        else:
                            result, trace = message
                            if trace:
                                tqdm.write(trace, file=sys.stderr)
                            self.replace(w, "crash", "")
                elif time.monotonic() - w.since > self.limit(w):
                    result = self.replace(w, "timeout", f"{w.state} took over {self.limit(w):.0f} s")
                if result is not None:
                    expected -= 1
                    yield result


START_METHOD = "spawn"  # of workers: a fresh process has no state of its parent's


# ----------------------------------------------------------------------------------------------------------------------
# The record: results.tsv. The first line says what run it is, the second names the columns, then a line per evaluation.

COLUMNS = [f.name for f in dataclasses.fields(Result)]
TYPES = {f.name: f.type for f in dataclasses.fields(Result)}


def to_line(result: Result) -> str:
    values = (getattr(result, name) for name in COLUMNS)
    texts = ("" if v is None else f"{v:.6f}" if isinstance(v, float) else str(v) for v in values)
    return "\t".join(re.sub(r"[\t\r\n]+", " ", text) for text in texts) + "\n"


def from_line(line: str) -> Result:
    values = dict(zip(COLUMNS, line.rstrip("\n").split("\t"), strict=True))
    for name, text in values.items():
        kind = TYPES[name]
        if kind is not str:
            values[name] = None if text == "" else int(text) if kind is int else float(text)
    return Result(**values)


def parse_results(content: bytes) -> tuple[dict, list[Result]]:
    """What run a results.tsv is of, and its rows. Raises ValueError or TypeError on anything else."""
    first, names, *lines = content.decode().split("\n")[:-1]
    run = json.loads(first.removeprefix("# "))
    if not isinstance(run, dict) or names.split("\t") != COLUMNS:
        raise ValueError("other columns")
    return run, [from_line(line) for line in lines]


Controls = dict[tuple[str, str | int], list[Result]]  # ("strategy", "random") or ("seed", 1): the rows of that run


def find_controls(out: Path, run: dict) -> Controls:
    """The runs in out/runs that differ from this one in STRATEGY alone or in SEED alone, of each the last by name."""
    found = {}
    for path in sorted(out.glob("runs/*/results.tsv")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            other, rows = parse_results(path.read_bytes())
            differs = [key for key in {**run, **other} if other.get(key) != run.get(key)]
            if differs in (["strategy"], ["seed"]):
                found[differs[0], other[differs[0]]] = rows
    return found


class Record:
    """The results.tsv of a folder, locked while it is open. Raises Stop where it cannot be read, written or locked."""

    def __init__(self, out: Path):
        self.path, self.rows, self.run = out / "results.tsv", [], None
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(out, os.O_RDONLY)
        except OSError as error:
            raise Stop(f"Cannot use {out}: {error.strerror}; name another folder with --out") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"Another run is at work in {out.resolve()}; wait for it, or use --out DIR") from None
        self.read()

    def read(self):
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise Stop(f"{self.path} cannot be read ({error.strerror}); move it away, or use --out DIR") from None
        whole = content[: content.rfind(b"\n") + 1]  # a line torn by a crash or a full disk has no end
        try:
            self.run, self.rows = parse_results(whole)
        except (ValueError, TypeError) as error:
            raise Stop(
                f"{self.path} is no results.tsv of this program ({error}); move it away, or use --out DIR"
            ) from None
        if whole != content:
            try:
                os.truncate(self.path, len(whole))
            except OSError as error:
                raise Stop(f"Cannot write {self.path}: {error.strerror}") from None

    def begin(self, run: dict):
        """Start a new results.tsv."""
        self.run, self.rows = run, []
        header = f"# {json.dumps(run)}\n" + "\t".join(COLUMNS) + "\n"
        write_whole(self.path, header)

    def append(self, result: Result):
        """Add one line, at once and whole."""
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab") as file:  # buffered: a write that a full disk cuts short raises an error
                file.write(to_line(result).encode(errors="replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next start drops the torn line
                os.truncate(self.path, size)
            raise Stop(
                f"Cannot write {self.path}: {error.strerror}. What it holds is intact; run again to go on"
            ) from None
        self.rows.append(from_line(to_line(result)))

    def move_away(self) -> Path:
        """Move a run and what belongs to it to runs/NAME; nothing is overwritten."""
        name = datetime.datetime.fromtimestamp(self.path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        folder = next(
            f for n in itertools.count() if not (f := self.path.parent / "runs" / f"{name}{f'-{n}' * (n > 0)}").exists()
        )
        try:
            folder.mkdir(parents=True)
            for file in ("best_genome.json", "progress.png", "results.tsv"):  # the record last: it makes it a run
                with contextlib.suppress(FileNotFoundError):
                    os.rename(self.path.parent / file, folder / file)
        except OSError as error:
            raise Stop(f"Cannot move the run in {self.path} to {folder}: {error.strerror}; use --out DIR") from None
        self.rows, self.run = [], None
        return folder


def write_whole(path: Path, content: str | bytes):
    """Write a file so that it appears whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise Stop(f"Cannot write {path}: {error.strerror}. results.tsv is intact; run again to go on") from None


TRAINS_AND_BREEDS = ["orthogonalize", "MuonGroup", "Optimizer", "schedule_at", "Trial", "candidates", "select", "breed"]


def bare(node) -> str:
    """A syntax tree without what differs between versions of Python (places, empty fields) and without docstrings."""
    if isinstance(node, list):
        return "".join(bare(part) for part in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
        fields["body"] = node.body[1:]
    return f"{type(node).__name__}({' '.join(f'{k}={bare(v)}' for k, v in fields.items() if v not in (None, []))})"


def code_hash() -> str:
    """A hash of the code that trains and breeds: what it does counts, not how it is explained."""
    code = f"{MUON_LR} {MUON_MOMENTUM} {EMBED_LR} {HEAD_LR} {VECTOR_LR} {ADAM_BETAS} {ADAM_EPS}"
    for file, names in ("genome.py", None), ("evolve.py", TRAINS_AND_BREEDS):
        tree = ast.parse(Path(__file__).with_name(file).read_text(encoding="utf-8"))
        code += bare(tree if not names else [n for n in tree.body if getattr(n, "name", "") in names])
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def describe_run(settings: "Settings", data: prepare.Dataset, device: str) -> dict:
    """What makes two runs the same one: constants, data, device, and the code that trains and breeds."""
    own = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_CHANGE}
    return {
        **own,
        "data": data.source,
        "fingerprint": data.fingerprint,
        "device": device,
        "torch": torch.__version__,
        "code": code_hash(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Selection and breeding: functions of the record and of a random.Random of their own.


@dataclass(frozen=True)
class Candidate:
    """A genome that was scored, with every score it got in the search."""

    id: str
    genome: Genome
    scores: tuple[float, ...]
    curve: tuple[float, ...]  # the mean of its loss curves

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


def candidates(rows: list[Result]) -> list[Candidate]:
    """Every genome that was scored each time, best first. Lower val_bpb is better: this is the one place to say so."""
    by_id = collections.defaultdict(list)
    for row in rows:
        if row.status in ("ok", "nan", "leak", "dead"):
            by_id[row.id].append(row)
    found = [
        Candidate(
            name,
            Genome.from_json(group[0].genome),
            tuple(row.val_bpb for row in group),
            tuple(statistics.fmean(tenth) for tenth in zip(*(row.curve for row in group), strict=True)),
        )
        for name, group in by_id.items()
        if all(row.status == "ok" for row in group)  # what diverges or leaks with any seed is no survivor
    ]
    return sorted(found, key=lambda c: (c.mean, c.id))


def searched(rows: list[Result]) -> list[Candidate]:
    return candidates([row for row in rows if row.is_search])


def ranked_after(rows: list[Result], generation: int) -> list[Candidate]:
    """The ranking as it stood after a generation, best first."""
    return searched([r for r in rows if r.generation <= generation])


def noise_floor(rows: list[Result]) -> float | None:
    """Pooled standard deviation between evaluations of one genome, in bits per byte; None before there are two."""
    groups = [c.scores for c in searched(rows) if len(c.scores) > 1]
    squares = sum(statistics.variance(g) * (len(g) - 1) for g in groups)
    return math.sqrt(squares / sum(len(g) - 1 for g in groups)) if groups else None


def select(rows: list[Result], settings: "Settings", rng: random.Random) -> list[Candidate]:
    """The survivors: the best by mean of their evaluations; under drift any, for comparison."""
    found = searched(rows)
    if settings.strategy == "drift":
        return rng.sample(found, min(settings.survivors, len(found)))
    return found[: settings.survivors]


def hurdle_text(rows: list[Result], settings: "Settings") -> str:
    """What the hurdle saved, and how often it would have stopped a survivor: some that miss it run on all the same."""
    newcomers = [r for r in rows if r.is_newcomer]
    stopped, spared = ([r for r in newcomers if r.hurdle == what] for what in ("stopped", "spared"))
    survived = sum(row.id in {c.id for c in ranked_after(rows, row.generation)[: settings.survivors]} for row in spared)
    saved = len(stopped) * (1 - settings.hurdle_at) / max(1, sum(r.is_search for r in rows))
    return (
        f"hurdle: {len(stopped)} of {len(newcomers)} newcomers stopped, {saved:.0%} of all training saved; "
        f"{len(spared)} that missed it ran on, {survived} of them to survive"
    )


@dataclass
class Generation:
    tasks: list[Task]
    refused: int = 0  # genomes bred and turned away: too large, mixing no tokens, or trained before
    bred: int = 0


def breed(rows: list[Result], generation: int, settings: "Settings", vocab_size: int) -> Generation:
    """The evaluations of a generation, from what came before it: survivors again with a new seed, then newcomers."""
    rng = random.Random(f"{settings.seed}/{generation}")
    earlier = [row for row in rows if row.generation < generation and row.is_search]
    survivors = select(earlier, settings, rng)
    seed = settings.seed * SEEDS + generation
    hurdle = None
    if settings.hurdle and survivors:
        known = [loss for c in survivors if math.isfinite(loss := c.curve[tenth_before_hurdle(settings)])]
        hurdle = max(known, default=math.inf) + settings.hurdle
    again = [c for c in survivors if len(c.scores) < settings.repeats]
    born = Generation([Task(c.id, generation, (), "again", c.genome, seed) for c in again])
    seen = {row.key for row in earlier}
    newcomers = settings.population_size - len(again)
    for n in range(newcomers):
        while True:
            parents: list[Candidate] = []
            if settings.strategy == "random" or not survivors or n >= newcomers - settings.immigrants:
                genome, operator = random_genome(rng), "random"
            elif len(survivors) > 1 and rng.random() < settings.crossover_rate:
                parents = rng.sample(survivors, 2)
                genome, operator = crossover(parents[0].genome, parents[1].genome, rng)
                if rng.random() < settings.mutation_rate:
                    genome, mutation = mutate(genome, rng, 0.0)
                    operator = f"{operator}+{mutation}"
            else:
                parents = [rng.choice(survivors)]
                genome, operator = mutate(parents[0].genome, rng, settings.mutation_rate)
            born.bred += 1
            small = genome.num_params(vocab_size) <= settings.max_params
            if small and genome.mixes_tokens and genome.key not in seen:
                break
            born.refused += 1
            if born.refused > 100_000:
                raise Stop(f"No new genome under MAX_PARAMS = {settings.max_params:,} was found; raise it")
        seen.add(genome.key)
        spared = rng.random() < settings.hurdle_sample
        task = Task(f"g{generation}.{n + 1:02d}", generation, tuple(p.id for p in parents), operator, genome, seed)
        born.tasks.append(dataclasses.replace(task, hurdle=hurdle, spared=spared))
    return born


def entrant_tasks(settings: "Settings", vocab_size: int) -> list[Task]:
    """The designs made by hand that are small enough; they meet the same batches as generation 0."""
    return [
        Task(name, -1, (), "entrant", genome, settings.seed * SEEDS)
        for name, genome in ENTRANTS.items()
        if genome.num_params(vocab_size) <= settings.max_params
    ]


def best_transformers(rows: list[Result], settings: "Settings") -> list[Candidate]:
    entrants = candidates([row for row in rows if row.operator == "entrant"])
    return [c for c in entrants if c.id.startswith("transformer")][: settings.rivals]


def final_tasks(rows: list[Result], settings: "Settings") -> list[Task]:
    """The best genomes and the best transformers, each with the same fresh seeds."""
    finalists = [*searched(rows)[: settings.finalists], *best_transformers(rows, settings)]
    first = settings.seed * SEEDS + SEEDS // 2  # seeds that the search never used
    return [
        Task(c.id, settings.max_generations, (), "final", c.genome, first + n, final=True)
        for n in range(settings.final_seeds)
        for c in finalists
    ]


# ----------------------------------------------------------------------------------------------------------------------
# The final's arithmetic.

T_95 = (  # by degrees of freedom, from 1
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval (Student 1908)."""

    mean: float
    half: float  # half the width of the interval; infinite for one value
    values: tuple[float, ...]

    def __str__(self):
        return f"{self.mean:.4f} ± {self.half:.4f}"


def estimate(values) -> Estimate:
    values = tuple(values)
    if len(values) < 2:
        return Estimate(values[0], math.inf, values)
    t = T_95[len(values) - 2] if len(values) <= 31 else 1.96 + 2.4 / (len(values) - 1)
    return Estimate(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)), values)


@dataclass(frozen=True)
class Finalist:
    id: str
    genome: Genome
    test: Estimate
    val: Estimate
    search: float  # mean val_bpb in the search, which chose it: compare with val for the winner's curse
    lead: Estimate | None  # test_bpb of the best transformer by val minus its own, seed by seed
    failed: int  # evaluations of the final that were not ok


def final_table(rows: list[Result], settings: "Settings") -> list[Finalist]:
    """Everyone in the final, best first; empty before all of it is done.

    Ranked by val, those with failures last, so that the test score of the winner is not the best of several.
    """
    tasks = final_tasks(rows, settings)
    done = {(r.id, r.seed): r for r in rows if r.operator == "final" and r.generation == settings.max_generations}
    if not tasks or any((t.id, t.seed) not in done for t in tasks):
        return []
    rivals = {c.id: c.mean for c in best_transformers(rows, settings)}
    before = {c.id: c.mean for c in searched(rows)} | rivals
    table = []
    for name in dict.fromkeys(t.id for t in tasks):
        mine = [done[t.id, t.seed] for t in tasks if t.id == name]
        ok = [r for r in mine if r.status == "ok"]
        if ok:
            test, val = estimate(r.test_bpb for r in ok), estimate(r.val_bpb for r in ok)
            genome = Genome.from_json(mine[0].genome)
            table.append(Finalist(name, genome, test, val, before[name], None, len(mine) - len(ok)))
    table.sort(key=lambda f: (f.failed > 0, f.val.mean))
    rival = next((f.id for f in table if f.id in rivals), None)
    seeds = dict.fromkeys(t.seed for t in tasks)
    for n, f in enumerate(table):
        if rival and f.id not in rivals:
            pairs = [(done[rival, seed], done[f.id, seed]) for seed in seeds]
            leads = [theirs.test_bpb - own.test_bpb for theirs, own in pairs if theirs.status == own.status == "ok"]
            table[n] = dataclasses.replace(f, lead=estimate(leads) if leads else None)
    return table


def best_evolved(table: list[Finalist], rows: list[Result]) -> Finalist | None:
    """The winner of the final, transformers aside."""
    evolved = {c.id for c in searched(rows)}
    return next((f for f in table if f.id in evolved), None)


def print_final(table: list[Finalist], settings: "Settings"):
    print(f"\nThe final: {settings.final_seeds} fresh seeds each, ranked by val, 95 % intervals, bits per byte\n")
    print(f"{'':<24}{'test':>18}{'val':>18}{'val in search':>15}   lead over the best transformer on test")
    for f in table:
        lead = f"{f.lead}" if f.lead else ""
        failed = f"   ({f.failed} failed)" if f.failed else ""
        print(f"{f.id:<24}{f.test!s:>18}{f.val!s:>18}{f.search:>15.4f}   {lead}{failed}")
        print(f"    {f.genome.summary}")


def lineage(rows: list[Result], name: str) -> list[dict]:
    """The ancestors of a genome, oldest first, itself last."""
    first = {}
    for row in rows:
        if row.is_newcomer:
            first.setdefault(row.id, row)
    found, todo = {}, [name]
    while todo:
        row = first.get(todo.pop())
        if row and row.id not in found:
            found[row.id] = row
            todo += [parent for parent in row.parents.split(",") if parent]
    keys = ("generation", "id", "parents", "operator", "val_bpb", "params", "summary")
    return [
        {key: getattr(row, key) for key in keys} for row in sorted(found.values(), key=lambda r: (r.generation, r.id))
    ]


def score_text(val_bpb: float | None) -> str:
    return "—" if val_bpb is None else f"{val_bpb:.4f}"


def print_lineage(rows: list[Result], name: str):
    print(f"\nHow {name} came to be\n")
    for row in lineage(rows, name):
        print(f"{row['id']:<8}{score_text(row['val_bpb']):>8}  {row['operator']:<24}  {row['summary']}")


def print_ops(rows: list[Result], winner: Genome, settings: "Settings"):
    """What became of every op: in how many newcomers it was, until when in one of the best, how often in the winner."""
    newcomers = [r for r in rows if r.is_newcomer]
    used = [[node.gene.op for node in Genome.from_json(r.genome).network] for r in newcomers]
    kept = [node.gene.op for node in winner.network]
    last = max(r.generation for r in newcomers)
    until = {}
    for g in range(last + 1):
        for c in ranked_after(rows, g)[: settings.survivors]:
            until |= {node.gene.op: g for node in c.genome.network}
    print(f"\n{'':<12}of {len(newcomers)} newcomers in   among the best {settings.survivors}   times in the winner")
    for op in OPS:
        when = "never" if op not in until else "to the end" if until[op] == last else f"until generation {until[op]}"
        print(f"{op:<12}{sum(op in ops for ops in used):>19}   {when:<20}{kept.count(op):>16}")


def write_best(out: Path, record: Record, settings: "Settings"):
    """best_genome.json: the winner of the final, before it the best of the search, with all it takes to check it."""
    found = searched(record.rows)
    if not found:
        return
    f = best_evolved(final_table(record.rows, settings), record.rows)
    best = next(c for c in found if not f or c.id == f.id)
    stage = {"stage": "search", "note": "the best of the search so far; its score is not yet confirmed by the final"}
    if f:
        stage = {
            "stage": "final",
            "test_bpb": dataclasses.asdict(f.test),
            "val_bpb": dataclasses.asdict(f.val),
            "lead_over_transformer": f.lead and dataclasses.asdict(f.lead),
            "budget_factor": settings.final_factor,
        }
    content = {
        "id": best.id,
        "summary": best.genome.summary,
        "genome": json.loads(best.genome.to_json()),
        "search_val_bpb": list(best.scores),
        **stage,
        "settings": record.run,
        "torch": torch.__version__,
        "lineage": lineage(record.rows, best.id),
    }
    write_whole(out / "best_genome.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# The picture

COLOURS = [
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
]  # Okabe & Ito 2008, for every kind of sight


def draw(rows: list[Result], path: Path, title: str, controls: Controls):
    """progress.png: is it getting better (than its controls), what is it made of, at what cost."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ok = [r for r in rows if r.is_search and r.status == "ok"]
    if not ok:
        return
    last = max(r.generation for r in rows if r.is_search)
    generations = sorted({r.generation for r in ok})
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with plt.rc_context(style):
        figure, axes = plt.subplot_mosaic([["better", "better"], ["made", "cost"]], figsize=(10, 9))
        draw_scores(axes["better"], rows, ok, generations, last, controls)
        draw_ops(axes["made"], ok, generations, last)
        draw_costs(axes["cost"], rows, ok, axes["better"].get_ylim())
        for name in ("better", "made"):
            axes[name].set_xlabel("generation")
            axes[name].xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(title, fontsize=12)
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        plt.close(figure)
    write_whole(path, buffer.getvalue())


def best_so_far(rows: list[Result], generations: list[int]) -> list[float]:
    """The mean of the genome that led after each generation, nan before the first and after the last of the rows."""
    last = max((r.generation for r in rows if r.is_search), default=-1)
    leaders = [next(iter(ranked_after(rows, g)), None) if g <= last else None for g in generations]
    return [leader.mean if leader else math.nan for leader in leaders]


def draw_scores(axis, rows, ok: list[Result], generations: list[int], last: int, controls: Controls):
    """Every evaluation, the best and the median, and what controls and the designs made by hand reach.

    The axis ends above the best lines of this seed and three quarters of the evaluations; those above stand at its end.
    """
    best = best_so_far(rows, generations)
    strategies, seeds = (
        {value: best_so_far(controls[what, value], generations) for what, value in sorted(controls) if what == wanted}
        for wanted in ("strategy", "seed")
    )
    levels: dict[str, float] = {}  # the best of each family made by hand
    for c in candidates([r for r in rows if r.operator == "entrant"]):
        levels.setdefault(c.id.split("-")[0], c.mean)
    most = np.quantile([r.val_bpb for r in ok], (0, 0.75))
    shown = [*best, *itertools.chain(*strategies.values()), *sorted(levels.values())[:1], *most]
    bottom, top = np.nanmin([*shown, *itertools.chain(*seeds.values())]), np.nanmax(shown)
    bottom, top = bottom - 0.1 * (top - bottom) - 0.002, top + 0.2 * (top - bottom) + 0.002
    axis.set(ylim=(bottom, top), xlim=(-0.5, last + 0.5))

    inside, above = ([r for r in ok if (r.val_bpb > top) == over] for over in (False, True))
    x, y = [r.generation for r in inside], [r.val_bpb for r in inside]
    axis.scatter(x, y, s=16, color="#999999", lw=0, label="one evaluation")
    if above:
        x, y = [r.generation for r in above], [top] * len(above)
        axis.scatter(x, y, s=30, color="#999999", lw=0, marker="^", clip_on=False, label="worse than the picture shows")
    median = [statistics.median(r.val_bpb for r in ok if r.generation == g) for g in generations]
    axis.plot(generations, median, color=COLOURS[1], lw=1.5, ls="--", label="median of the generation")
    axis.plot(generations, best, color=COLOURS[0], lw=2.5, label="best so far, mean of its evaluations")
    for (strategy, line), color in zip(strategies.items(), (COLOURS[5], COLOURS[3], COLOURS[2]), strict=False):
        axis.plot(generations, line, color=color, lw=2, ls="-.", label=f"best so far, {strategy} search")
    label = "best so far, other seeds"
    for seed, line in seeds.items():
        axis.plot(generations, line, color=COLOURS[0], lw=1.2, label=label)
        label = None
        if ends := [(g, y) for g, y in zip(generations, line, strict=True) if not math.isnan(y)]:
            axis.annotate(f" seed {seed}", ends[-1], color=COLOURS[0], va="center", annotation_clip=True)
    noise = noise_floor(rows)
    if noise:
        low, high = ([b + side * noise for b in best] for side in (-1, 1))
        label = f"± noise floor, {noise:.4f}"
        axis.fill_between(generations, low, high, color=COLOURS[0], alpha=0.2, lw=0, label=label)
    label = "made by hand, best of each kind"
    for name, level in levels.items():
        if level <= top:
            axis.axhline(level, color="#555555", lw=1, ls=":", label=label)
            axis.annotate(f" {name} {level:.2f}", (1, level), xycoords=("axes fraction", "data"), va="center")
            label = None
    if worse := [f"{name} {level:.2f}" for name, level in levels.items() if level > top]:
        axis.text(1, 0.96, f"far above: {', '.join(worse)}", transform=axis.transAxes, ha="right", va="top")
    axis.set(title="Is it getting better?", ylabel="validation bits per byte (lower is better)")
    axis.legend(fontsize=10, loc="upper center", ncol=3, bbox_to_anchor=(0.5, -0.15))


def draw_ops(axis, ok: list[Result], generations: list[int], last: int):
    """The share of each op in the genes of a generation, norms aside."""
    shares = {}
    for g in generations:
        networks = [Genome.from_json(r.genome).network for r in ok if r.generation == g]
        counts = collections.Counter(node.gene.op for network in networks for node in network)
        del counts["norm"]  # before nearly everything else
        shares[g] = {op: n / max(1, counts.total()) for op, n in counts.items()}
    base = np.zeros(len(generations))
    for i, op in enumerate(OPS):
        if not any(op in share for share in shares.values()):
            continue
        height = np.array([shares[g].get(op, 0) for g in generations])
        hatch = ["", "//", "..", "xx"][i // len(COLOURS)]
        axis.bar(
            generations,
            height,
            1.0,
            base,
            color=COLOURS[i % len(COLOURS)],
            hatch=hatch,
            edgecolor="white",
            lw=0.3,
            label=op,
        )
        base += height
    axis.set(title="What is it made of?", ylabel="share of genes, norms aside", ylim=(0, 1), xlim=(-0.5, last + 0.5))
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_costs(axis, rows: list[Result], ok: list[Result], limits: tuple[float, float]):
    """Score against parameters, coloured by speed, of those within the limits of the score."""
    ok = [r for r in ok if r.val_bpb <= limits[1]]
    hand = [r for r in rows if r.operator == "entrant" and r.status == "ok" and r.val_bpb <= limits[1]]
    unit, word = (1e6, "million") if max(r.tokens_per_s for r in ok) > 5e5 else (1e3, "thousand")
    x, y = [r.params / 1e6 for r in ok], [r.val_bpb for r in ok]
    dots = axis.scatter(x, y, c=[r.tokens_per_s / unit for r in ok], s=18, cmap="cividis", lw=0)
    axis.figure.colorbar(dots, ax=axis, label=f"{word} tokens a second")
    if hand:
        x, y = [r.params / 1e6 for r in hand], [r.val_bpb for r in hand]
        axis.scatter(x, y, marker="x", color=COLOURS[5], s=30, lw=1.5, label="made by hand")
        axis.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    axis.set(title="At what cost?", xlabel="million parameters", ylabel="validation bits per byte", ylim=limits)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def print_result(r: Result):
    test = f"  test {r.test_bpb:.4f}" if r.test_bpb is not None else ""
    speed = f"{r.tokens_per_s / 1e6:6.2f} M tok/s" if r.tokens_per_s >= 1e5 else f"{r.tokens_per_s / 1e3:6.1f} k tok/s"
    note = f"  [{r.note}]" if r.note else ""
    tqdm.write(
        f"{r.id:<24} {r.status:<8}{score_text(r.val_bpb):>8}  {r.params / 1e6:6.2f} M  {speed}  "
        f"{r.operator:<14.14}  {r.summary}{test}{note}"
    )


class Run:
    """A run in a folder: what is recorded, and the pool that adds to it."""

    def __init__(self, out: Path, record: Record, settings: "Settings", data: prepare.Dataset):
        self.out, self.record, self.settings, self.data = out, record, settings, data
        self.pool = Pool(data.folder, settings)

    def evaluate(self, title: str, tasks: list[Task], left_after: int = 0) -> int:
        """Evaluate those of the tasks that the record lacks; returns how many. left_after: those that come later."""
        done = {(r.generation, r.id, r.seed, r.operator) for r in self.record.rows}
        tasks = [t for t in tasks if (t.generation, t.id, t.seed, t.operator) not in done]
        with tqdm(
            total=len(tasks),
            desc=title,
            leave=False,
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {bar:20} {n_fmt}/{total_fmt}  {postfix}",
        ) as bar:
            start = time.monotonic()

            def tick():
                each = (time.monotonic() - start) / bar.n if bar.n else self.settings.time_budget
                here = max(0.0, each * len(tasks) - (time.monotonic() - start))
                clock = [str(datetime.timedelta(seconds=int(t))) for t in (here, here + each * left_after)]
                bar.set_postfix_str(f"{clock[0]} left here, {clock[1]} in the run")

            for result in self.pool.run(tasks, tick):
                self.record.append(result)
                print_result(result)
                bar.update()
        return len(tasks)

    def report(self, title: str):
        controls = find_controls(self.out, self.record.run)
        draw(self.record.rows, self.out / "progress.png", title, controls)
        write_best(self.out, self.record, self.settings)  # last: it is what makes a run a finished one


def evolve(out: Path, record: Record, settings: "Settings", data: prepare.Dataset):
    """The whole search, from wherever the record stands: entrants, generations, final."""
    run = Run(out, record, settings, data)
    what = f"{settings.strategy}, seed {settings.seed}"
    title = f"genesis, {what}: {data.source}, {record.run['device']}, {budget_text(settings)} a trial"
    per_generation, generations = settings.population_size, settings.max_generations
    finals = settings.final_seeds * (settings.finalists + settings.rivals)
    try:
        run.evaluate("by hand", entrant_tasks(settings, data.vocab_size), per_generation * generations + finals)
        done = collections.Counter(r.generation for r in record.rows if r.is_search)
        for generation in range(generations):
            if done[generation] == per_generation:
                continue
            born = breed(record.rows, generation, settings, data.vocab_size)
            later = (generations - generation - 1) * per_generation + finals
            if run.evaluate(f"generation {generation + 1}/{generations}", born.tasks, later):
                print(generation_text(record.rows, generation, born), flush=True)
                run.report(title)
        finish(run, title)
    finally:
        run.pool.stop()


def finish(run: Run, title: str):
    """The final: fresh seeds, the test split, intervals."""
    tasks = final_tasks(run.record.rows, run.settings)
    if not tasks:
        raise Stop("No genome was scored, so there is no final; see the status column of results.tsv")
    run.evaluate("the final", tasks)
    table = final_table(run.record.rows, run.settings)
    if table:
        print_final(table, run.settings)
    if winner := best_evolved(table, run.record.rows):
        print_lineage(run.record.rows, winner.id)
        print_ops(run.record.rows, winner.genome, run.settings)
    if run.settings.hurdle:
        print(f"\n{hurdle_text(run.record.rows, run.settings)}")
    run.report(title)


def is_finished(record: Record, settings: "Settings") -> bool:
    """Whether every generation and the final are evaluated, and best_genome.json tells of the final."""
    searches = sum(r.is_search and r.generation < settings.max_generations for r in record.rows)
    if searches < settings.population_size * settings.max_generations or not final_table(record.rows, settings):
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(record.path.with_name("best_genome.json").read_text(encoding="utf-8"))["stage"] == "final"
    return False


def budget_text(settings: "Settings") -> str:
    return f"{settings.token_budget:,} tokens" if settings.token_budget else f"{settings.time_budget:g} s"


def generation_text(rows: list[Result], generation: int, born: Generation) -> str:
    mine = [r for r in rows if r.generation == generation and r.is_search]
    scores = [r.val_bpb for r in mine if r.status == "ok"]
    best, noise = next(iter(searched(rows)), None), noise_floor(rows)
    failed = collections.Counter(r.status for r in mine if r.status != "ok")
    parts = [f"generation {generation}:"]
    if best:
        parts.append(f"best {best.mean:.4f} ({best.id}, {len(best.scores)} evaluations)")
    parts.append(f"median {statistics.median(scores):.4f}" if scores else "no score")
    parts.append(f"noise {noise:.4f}" if noise is not None else "noise not yet known")
    parts.append(f"{born.refused / max(1, born.bred):.0%} of {born.bred} bred refused")
    parts += [f"{n} {status}" for status, n in failed.items()]
    return "  ".join(parts) + "\n"


def read_genome(path: Path) -> Genome:
    """The genome in best_genome.json or in a file of its own. Raises Stop or GenomeError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Stop(f"Cannot read {path}: {error}") from None
    return Genome.from_dict(content.get("genome", content) if isinstance(content, dict) else content)


def train_one(path: Path, data: prepare.Dataset, settings: "Settings", prompt: str, device: str):
    """Train one genome of a file for the budget, print its val_bpb and some text that it writes."""
    genome = read_genome(path)
    print(f"{genome.summary}\n{genome.num_params(data.vocab_size):,} parameters, {budget_text(settings)} on {device}")
    task = Task(path.stem, -1, (), "train", genome, settings.seed)
    problem = check_network(genome, settings.seed)
    if problem:
        raise Stop(f"{path}: not trained, status {problem}")
    on_device = DeviceData(data, torch.device("cuda:0" if device != "cpu" else "cpu"))
    trial, values = run_trial(task, on_device, settings)
    if trial is None:
        raise Stop(f"{path}: out of memory, even with one row of {settings.seq_len} tokens at once")
    if values["status"] != "ok":
        raise Stop(f"{path}: training ended with status {values['status']}")
    passes = values["tokens"] / len(data.train)
    print(
        f"val_bpb {values['val_bpb']:.4f} after {values['seconds']:.1f} s: {values['tokens']:,} tokens, "
        f"{values['tokens_per_s']:,.0f} a second, {passes:.1f} passes over the training text\n"
    )
    print(write_text(trial.model, data, prompt, settings.seq_len, settings.seed))


@torch.no_grad()
def write_text(model: Model, data: prepare.Dataset, prompt: str, seq_len: int, seed: int, length: int = 200) -> str:
    """Sample `length` tokens after a prompt, temperature 0.8, from the 50 likeliest."""
    for part in (model.enter, *model.blocks, model.leave):
        part.__dict__.pop("forward", None)  # what was compiled knows one shape alone
    tokenizer, device = data.tokenizer(), model.enter.embedding.device
    tokens = [data.bos, *tokenizer.encode_ordinary(prompt)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        idx = torch.tensor([tokens[-seq_len:]], device=device)
        logits = model(idx)[0, -1].float().cpu() / 0.8
        logits[data.bos] = -math.inf
        likely = logits.topk(50)
        tokens.append(likely.indices[torch.multinomial(likely.values.softmax(-1), 1, generator=generator)].item())
    return tokenizer.decode(tokens[1:])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--demo", action="store_true", help="two minutes on any machine, on text that every machine has"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="the folder of parquet shards that prepare.py was given")
    parser.add_argument("--out", metavar="DIR", help="where results go (default: here; with --demo: demo/)")
    parser.add_argument("--final", action="store_true", help="the final now, from what results.tsv holds")
    parser.add_argument("--train", metavar="FILE", help="train the genome in a file, and let it write")
    parser.add_argument("--prompt", default="The history of science", help="what --train goes on from")
    comments = dict(re.findall(r"^([A-Z_]+) = .+?  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))
    for name, value in CONSTANTS.items():
        help = f"{comments[name]} (default {value})".replace("%", "%%")
        parser.add_argument(f"--{name.lower().replace('_', '-')}", type=type(value), metavar="N", help=help)
    return parser.parse_args(argv)


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def start(args: argparse.Namespace):
    settings = read_settings(args)
    source = dict(data_dir=args.data_dir, demo=args.demo)
    try:
        data = prepare.load(prepare.source_folder(**source))
    except prepare.PrepareError:
        data = prepare.load(prepare.prepare(**source))
    shortest = min(len(data.train), len(data.val), len(data.test), settings.eval_tokens + 1) - 1
    if shortest < settings.seq_len:
        raise Stop(f"SEQ_LEN = {settings.seq_len}: EVAL_TOKENS and each split have to fill it, not {shortest} tokens")
    device = device_name()
    if device == "cpu":
        print("No GPU was found: training on the CPU in float32, uncompiled and slow. Good for --demo and for tests.")
    if args.train:
        return train_one(Path(args.train), data, settings, args.prompt, device)
    out = Path(args.out or ("demo" if args.demo else "."))
    record, run = Record(out), describe_run(settings, data, device)
    if record.run is not None and not args.final:
        differs = [name for name in run if record.run.get(name) != run[name]]
        if differs or is_finished(record, settings):
            why = f"differs in {', '.join(differs)}" if differs else "is finished"
            print(f"The run in {record.path} {why}; it was moved to {record.move_away()}")
        else:
            print(f"Going on with the run in {record.path}: {len(record.rows)} evaluations")
    if args.final:
        if not searched(record.rows):
            raise Stop(f"{record.path} holds no scored genome; run: uv run evolve.py")
        if (record.run["fingerprint"], record.run["device"]) != (data.fingerprint, device):
            raise Stop(
                f"{record.path} was made on {record.run['data']} and {record.run['device']}, this is {data.source} "
                f"and {device}; name the data with --data-dir or --demo"
            )
        if record.run.get("code") != run["code"]:
            raise Stop(
                f"{record.path} was made by other code, which trains otherwise; check out the version that made it"
            )
        settings = dataclasses.replace(settings, **{k: record.run[k] for k in record.run if hasattr(settings, k)})
        settings = dataclasses.replace(
            settings, max_generations=1 + max(r.generation for r in record.rows if r.is_search)
        )
        runner = Run(out, record, settings, data)
        try:
            return finish(runner, f"genesis: {data.source}, {device}")
        finally:
            runner.pool.stop()
    if record.run is None:
        record.begin(run)
    tokens = data.meta["splits"]["train"]["tokens"]
    print(
        f"{data.source}: {tokens:,} training tokens. {budget_text(settings)} a trial on {device}, "
        f"{settings.max_generations} generations of {settings.population_size}. Results in {record.path}\n",
        flush=True,
    )
    evolve(out, record, settings, data)


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(prepare.cache_root() / "compiled"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        start(parse(argv))
    except (Stop, GenomeError, prepare.PrepareError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Nothing is lost; run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
