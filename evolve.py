"""evolve.py: train -> score -> record -> select -> breed -> picture.

    uv run evolve.py                     evolve overnight; stop it and start it again as you like
    uv run evolve.py --demo              two minutes on any machine, no download: the same program on a small scale
    uv run evolve.py --train best_genome.json --time-budget 120 --save model.safetensors
                                         train one design, let it write, and keep its weights
    uv run evolve.py --write model.safetensors --prompt "The moon"      let a saved model write
    uv run evolve.py --ablate best_genome.json      train it without each of its parts: what are they worth?
    uv run evolve.py --report DIR                   write the report of any record once more
    uv run --extra ray evolve.py --ray              on all GPUs of this machine, or of a Ray cluster

Reads the tokens that prepare.py wrote (and prepares them first where there are none). Writes results.tsv, one line per
evaluation; everything else (what is evaluated next, report.md, progress.png, best_genome.json) is a function of its
rows. Every constant below is also a flag: TIME_BUDGET = 30 is --time-budget 30.

The file is a row of rooms, and each knows only those before it:

    settings -> trial -> pool -> record -> plan -> report -> run
"""

import sys

if sys.platform == "win32":
    raise SystemExit("genesis needs Linux or macOS; on Windows run it in WSL: https://learn.microsoft.com/windows/wsl")

import argparse
import ast
import bisect
import collections
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import gc
import hashlib
import heapq
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import random
import re
import signal
import socket
import statistics
import subprocess
import threading
import time
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

STARTED = time.monotonic()

# ----------------------------------------------------------------------------------------------------------------------
# Settings: the constants, what values they may have, and a flag for each.


class Rule(NamedTuple):
    """What a value has to be, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


Count = Annotated[int, Rule("has to be at least 1", lambda n: n >= 1)]
CountOr0 = Annotated[int, Rule("cannot be negative", lambda n: n >= 0)]
Share = Annotated[float, Rule("is a share, from 0 to 1", lambda x: 0 <= x <= 1)]
Positive = Annotated[float, Rule("has to be above 0", lambda x: 0 < x < math.inf)]
ShareAbove0 = Annotated[float, Rule("is a share, above 0 and up to 1", lambda x: 0 < x <= 1)]
Above1 = Annotated[float, Rule("has to be above 1", lambda x: 1 < x < math.inf)]
Several = Annotated[int, Rule("has to be at least 2, or there is no interval", lambda n: n >= 2)]
SeveralOr0 = Annotated[int, Rule("is 0, or at least 2 for an interval", lambda n: n == 0 or n >= 2)]
Seed = Annotated[int, Rule("is from 0 to a billion", lambda n: 0 <= n <= 10**9)]
Strategy = Literal["elites", "aging", "lineages", "novelty", "pareto", "lexicase", "map_elites", "random", "drift"]

# The search
POPULATION_SIZE: Count = 12  # evaluations in a generation: survivors once more, and newcomers
SURVIVORS: Count = 3  # best genomes, which are evaluated again, and with STRATEGY elites breed the next generation
REPEATS: Count = 3  # evaluations of a survivor, one a generation, each with a new seed; after that its mean stands
MUTATION_RATE: Share = 0.3  # chance of each further mutation after the first, and of one after a crossover
CROSSOVER_RATE: Share = 0.3  # share of children with two parents
IMMIGRANTS: CountOr0 = 1  # random genomes among the newcomers of a generation
PRESCREEN: Count = 1  # newcomers bred for each that is trained; of several the one that a draw of the record likes best
HURDLE: ShareAbove0 = 0.25  # best share of newcomers that train on after half their budget; 1: no hurdle
HURDLE_SAMPLE: Share = 0.1  # share of newcomers that train on all the same, to see what the hurdle costs
BASELINE_TRIALS: CountOr0 = 20  # evaluations that tune each family of designs by people first; 0: no baselines
MAX_GENERATIONS: CountOr0 = 25  # generations until the final; raise it to go on
STRATEGY: Strategy = "elites"  # who breeds: see SELECTION; controls are random (nobody) and drift (anybody)
SEED: Seed = 0  # of everything that is random
# A trial
TIME_BUDGET: Positive = 30.0  # seconds of training per genome
TOKEN_BUDGET: CountOr0 = 0  # tokens of training per genome in the place of seconds; 0: TIME_BUDGET counts
MAX_PARAMS: Count = 10_000_000  # parameters of a genome, embedding and head included
BATCH_TOKENS: Count = 32_768  # tokens per optimizer step
SEQ_LEN: Count = 2_048  # tokens that a model sees at once
EVAL_TOKENS: Count = 1_048_576  # tokens of val, and of test, that are scored
# The final
FINALISTS: CountOr0 = 3  # best genomes of the search in it, beside the best design of each family; 0: no final
FINAL_SEEDS: Several = 5  # times that each is trained again
LONG_FACTOR: Above1 = 4.0  # times the budget, in the second step, where designs may grow
LONG_SEEDS: SeveralOr0 = 3  # times that each is trained in the second step; 0: no second step
ABLATION_SEEDS: Several = 3  # times that --ablate trains a design without each of its parts
# The machine
WORKERS: CountOr0 = 0  # processes: one trains, the others compile; 0: as many as cores and memory carry; on a CPU one
DEADLINE: Count = 300  # seconds that building and compiling may take; training and scoring: plus twice the budget

DEMO = dict(  # the same program on a small scale: what --demo sets; tokens for seconds, so that it runs alike anywhere
    population_size=5, survivors=2, repeats=2, immigrants=0, max_generations=4, baseline_trials=4, token_budget=3_072,
    max_params=3_000_000, batch_tokens=256, seq_len=128, eval_tokens=2_048, finalists=1, final_seeds=2, long_factor=2.0,
    long_seeds=2, ablation_seeds=2,
)  # fmt: skip
# what may change within a run
MAY_CHANGE = (
    "max_generations", "baseline_trials", "finalists", "final_seeds", "long_factor", "long_seeds", "ablation_seeds",
    "workers", "deadline",
)  # fmt: skip

HINTS = typing.get_type_hints(sys.modules[__name__], include_extras=True)  # of the constants: no other name has one
names = list(globals())
CONSTANTS = {name: globals()[name] for name in names[names.index("Strategy") + 1 : names.index("DEMO")]}
if untyped := ", ".join(CONSTANTS.keys() - HINTS):
    sys.exit(f"evolve.py: {untyped}: its type is missing; write NAME: TYPE = VALUE  # WHAT IT IS, as beside it")
TYPES = {name: str if typing.get_origin(hint) is Literal else typing.get_args(hint)[0] for name, hint in HINTS.items()}
Settings = dataclasses.make_dataclass(
    "Settings",
    [
        *((name.lower(), TYPES[name], field(default=default)) for name, default in CONSTANTS.items()),
        ("start", tuple, field(default=())),
    ],
    frozen=True,
    namespace={"__module__": __name__, "__doc__": "The constants, in lower case, and the genomes of --start."},
)


class Stop(Exception):
    """The run cannot go on; the message says why and what to do."""


PROMPT = "The history of science"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; constants that were not given are None."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="two minutes on any machine, on text that every machine has")
    add("--data-dir", metavar="DIR", help="the folder of parquet shards that prepare.py was given")
    add("--out", metavar="DIR", help="where results go (default: here; with --demo: demo/)")
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="use all GPUs of a Ray cluster, or of this machine")
    add("--minutes", type=float, default=math.inf, metavar="N", help="end so many minutes from now; go on later")
    add("--new", action="store_true", help="move the run that is there to runs/ and begin again")
    add("--start", nargs="+", default=[], metavar="FILE", help="put the genomes in these files into generation 0")
    add("--train", metavar="FILE", help="train the genome in a file, and let it write")
    add("--save", metavar="FILE", help="where --train keeps the weights, as safetensors")
    add("--write", metavar="FILE", help="let a model write that --save kept")
    add("--scale", type=float, default=1.0, metavar="N", help="how many times as wide --train makes the design")
    add("--deeper", type=int, default=0, metavar="N", help="how many times more --train repeats its repeated blocks")
    add("--ablate", metavar="FILE", help="train the genome in a file without each of its parts")
    add("--report", metavar="DIR", help="write report.md of the record in a folder, whoever made it")
    add("--prompt", help=f"what --train and --write go on from (default {PROMPT!r})")
    comments = dict(re.findall(r"^([A-Z_]+): .+? = .+?  # (.+)$", Path(__file__).read_text(encoding="utf-8"), re.M))
    for name, default in CONSTANTS.items():
        help = f"{comments.get(name, '')} (default {default})".replace("%", "%%")
        metavar = "|".join(typing.get_args(HINTS[name])) if TYPES[name] is str else "N"
        add(f"--{name.lower().replace('_', '-')}", type=TYPES[name], metavar=metavar, help=help)
    return parser.parse_args(argv)


def read_settings(args: argparse.Namespace) -> Settings:
    """Settings from flags, --demo and constants, in that order. Raises Stop naming a constant that is impossible."""
    given = {name.lower(): value for name in CONSTANTS if (value := getattr(args, name.lower())) is not None}
    if "time_budget" in given:
        given.setdefault("token_budget", 0)  # whoever asks for seconds gets seconds, in the demo too
    settings = Settings(**{**(DEMO if args.demo else {}), **given})
    for name, hint in HINTS.items():
        value, limits = getattr(settings, name.lower()), typing.get_args(hint)
        if not isinstance(limits[1], Rule):
            words, holds = f"is one of {', '.join(limits)}", limits.__contains__
        elif isinstance(value, (TYPES[name], int)):
            words, holds = limits[1]
        else:
            words, holds = f"has to be a {'whole ' * (TYPES[name] is int)}number", lambda x: False
        if not holds(value):
            raise Stop(f"{name} = {value}: {words}")
    s = settings
    if s.survivors + s.immigrants >= s.population_size:
        raise Stop("SURVIVORS + IMMIGRANTS have to be less than POPULATION_SIZE, or no child is ever bred")
    if s.batch_tokens % s.seq_len:
        raise Stop(f"BATCH_TOKENS = {s.batch_tokens}: has to be a multiple of SEQ_LEN = {s.seq_len}")
    return settings


def constants_of(settings: Settings) -> dict:
    """The settings without the genomes of --start."""
    return {name.lower(): getattr(settings, name.lower()) for name in CONSTANTS}


def budget_text(settings: Settings) -> str:
    return f"{settings.token_budget:,} tokens" if settings.token_budget else f"{settings.time_budget:g} s"


if __name__ == "__main__":
    parse()  # before torch is imported, which takes seconds: --help and mistakes are answered at once
    print("genesis: loading torch", flush=True)

import prepare  # noqa: E402

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(prepare.cache_root() / "compiled"))  # torch wants it when imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from genome import (  # noqa: E402
    FAMILIES,
    GENOME_TRAITS,
    LEVELS,
    MAX_GENES,
    MAX_SEQ_LEN,
    MAX_WIDTH,
    OPS,
    WIDTHS,
    WIRING,
    Gene,
    Genome,
    GenomeError,
    Model,
    crossover,
    folded,
    grown,
    mutate,
    op_problem,
    random_genome,
    scaled,
    without_a_part,
)
from prepare import say  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# The trial: one genome, trained for its budget on one device and scored. It knows a Task, and makes a Result of it.


@dataclass(frozen=True)
class Task:
    """All that an evaluation depends on, beside data and settings."""

    stage: str  # of the plan, as STAGES names them; or what else it is for, as --train
    id: str  # of the genome: g3.05 is the fifth newcomer of generation 3, a baseline has its name
    genome: Genome
    seed: int  # of initialisation
    order: int  # the seed of the order of batches
    generation: int | None = None  # in the search
    parents: tuple[str, ...] = ()
    operator: str = ""  # in the search: random, start, crossover, mutations joined by +, or repeat (once more)
    budget: float = 1.0  # times TIME_BUDGET or TOKEN_BUDGET
    text: float = 1.0  # share of the training text that it sees
    test: bool = False  # scored on test as well
    hurdle: tuple[float, ...] = ()  # what its outlook must not exceed at each of RUNGS; () where there is no hurdle
    spared: bool = False  # runs on when it does

    @property
    def evaluation(self) -> tuple:
        """What is evaluated: a second result of the same evaluation is another attempt at it."""
        return self.stage, self.id, self.seed, round(self.budget, 6), round(self.text, 6)


@dataclass
class Result:
    """One evaluation, as the trial fills it in; one line of results.tsv. None is what was not measured.

    status: one of STATUSES, of which only ok has a score.
    """

    stage: str
    generation: int | None
    id: str
    parents: str  # ids, joined by commas
    operator: str
    seed: int
    budget: float
    order: int | None = None  # None in records of earlier versions, where it is the seed
    text: float = 1.0
    status: str = "ok"
    val_bpb: float | None = None  # bits per byte on val
    bpb_first: float | None = None  # the same of the first third of each window alone: little came before
    bpb_middle: float | None = None
    bpb_last: float | None = None
    test_bpb: float | None = None  # bits per byte on test, read by the final and what follows it
    induction: float | None = None  # see Trial.probe: of evaluations that read test, and for the report alone
    recall_near: float | None = None
    recall_middle: float | None = None
    recall_far: float | None = None
    params: int | None = None
    tokens: int | None = None  # trained on
    passes: float | None = None  # over the training text that it sees
    tokens_per_s: int | None = None
    rows: int | None = None  # windows that are treated at once; fewer than BATCH_TOKENS / SEQ_LEN where memory is short
    captured: bool | None = None  # whether a step is one CUDA graph; None on the CPU
    memory_mb: int | None = None  # peak on the device
    held_mb: int | None = None  # on the device before the evaluation
    seconds: float | None = None  # of training
    outside: float | None = None  # seconds on the device beside training: warm-up, capture, scoring
    finished: str = ""  # when, UTC
    hurdle: str = ""  # passed, stopped, spared (missed it and ran on); empty where there was none
    losses: str = ""  # nats per token, mean over each tenth of the budget
    note: str = ""
    key: str = ""  # of the network
    summary: str = ""
    genome: str = ""  # JSON
    trace: str = ""  # of a crash; for the console, not for results.tsv

    @classmethod
    def of(cls, task: Task, status: str = "ok", **values) -> "Result":
        """The result of a task, with what is known before it is trained."""
        shared = ("stage", "generation", "id", "operator", "seed", "budget", "order", "text")
        same, genome = {name: getattr(task, name) for name in shared}, task.genome
        known = dict(parents=",".join(task.parents), key=genome.key, summary=genome.summary, genome=genome.to_json())
        return cls(**same, **known, status=status, finished=now(), **values)

    @property
    def curve(self) -> list[float]:
        return [float(loss) for loss in self.losses.split(",")] if self.losses else []

    @property
    def halfway_loss(self) -> float:
        """The mean training loss of the fifth tenth of the budget, before the learning rate falls; inf without one."""
        return self.loss_of(5)

    def loss_of(self, tenth: int) -> float:
        """The mean training loss of the first, second, ... tenth of the budget; inf where there is none."""
        curve = self.curve
        loss = curve[tenth - 1] if len(curve) >= tenth else math.nan
        return math.inf if math.isnan(loss) else loss

    @property
    def whole_tenth(self) -> int:
        """The last tenth that it trained to the end, of one that was stopped; 0 where there is none."""
        begun = [tenth for tenth, loss in enumerate(self.curve, start=1) if not math.isnan(loss)]
        return begun[-2] if len(begun) > 1 else 0

    @property
    def is_newcomer(self) -> bool:
        """Whether a genome of the search is evaluated for the first time."""
        return self.stage == "search" and self.operator != "repeat"

    @property
    def spent(self) -> float:
        """Seconds of the device that it took."""
        return (self.seconds or 0) + (self.outside or 0)

    evaluation = Task.evaluation


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


MUON_LR, MUON_MOMENTUM = 0.02, (0.85, 0.95)  # the momentum rises from the one to the other
MOMENTUM_STEPS = 300  # over so many steps
EMBED_LR, HEAD_LR, VECTOR_LR = 0.2, 0.004, 0.01  # of AdamW; the first two times sqrt(768 / width)
ADAM_BETAS, ADAM_EPS = (0.8, 0.95), 1e-10
BF16_CAPABILITY = (8, 0)  # the first with bfloat16 in its matrix units (Ampere)
RECALL_SHARES = (1 / 32, 1 / 8, 1 / 2)  # of the window: how far back a key stands that is asked for again
CURVE = 10  # points of the loss curve kept with each evaluation, each the mean over a tenth of the budget
# The hurdle looks at a newcomer after these tenths of its budget, and lets so many times HURDLE of the best go on.
RUNGS = ((3, 2.0), (5, 1.0))
SPEED_WORTH = 0.15  # nats per token: what a design e times slower has gained on a faster one by the end of its budget


@functools.cache
def compute_dtype(device: torch.device) -> torch.dtype:
    """What activations are computed in: bfloat16 where the card's matrix units know it, else float32.

    Not float16, whose range the factors of `retention` and `ssm` exceed.
    """
    knows = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return torch.bfloat16 if knows else torch.float32


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

    def step(self, schedule: torch.Tensor, beta: torch.Tensor, dtype: torch.dtype):
        """One update, the momentum being beta."""
        grads = torch.stack([m for p in self.params for m in self.matrices(p.grad)])
        self.momentum.lerp_(grads, 1 - beta)
        update = orthogonalize(grads.lerp_(self.momentum, beta), dtype)  # Nesterov
        update = update * (self.step_size * schedule)
        torch._foreach_add_(self.views, list(update.unbind(0)))


class Optimizer:
    """Muon for the matrices of a Model, AdamW for its embedding, head and vectors. Works inside a CUDA graph.

    Every learning rate is multiplied by lr_factor and by `schedule`, a tensor on the device.
    """

    def __init__(self, model: Model, lr_factor: float):
        groups = model.parameter_groups()
        device = groups.tables[0].device
        self.schedule = torch.zeros((), device=device)
        self.steps = torch.zeros((), device=device)
        self.dtype = compute_dtype(device)
        shapes = collections.defaultdict(list)
        for p in groups.matrices:
            shapes[tuple(sorted(p.shape[-2:]))].append(p)
        self.muon = [MuonGroup(params, MUON_LR * lr_factor) for params in shapes.values()]
        rates = [([table], EMBED_LR * (768 / table.size(1)) ** 0.5) for table in groups.tables]
        if groups.head is not None:
            rates.append(([groups.head], HEAD_LR * (768 / groups.head.size(1)) ** 0.5))
        if groups.vectors:
            rates.append((groups.vectors, VECTOR_LR))
        self.adamw = torch.optim.AdamW(
            [dict(params=params, lr=torch.zeros((), device=device), base=lr * lr_factor) for params, lr in rates],
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            weight_decay=0.0,
            fused=True,
            capturable=device.type == "cuda",
        )

    @torch.no_grad()
    def step(self):
        """Update from .grad, and drop the gradients."""
        first, last = MUON_MOMENTUM
        beta = first + (last - first) * (self.steps / MOMENTUM_STEPS).clamp(max=1)
        self.steps += 1
        for group in self.muon:
            group.step(self.schedule, beta, self.dtype)
        for group in self.adamw.param_groups:
            torch.mul(self.schedule, group["base"], out=group["lr"])
        self.adamw.step()
        for p in itertools.chain(*(g.params for g in self.muon), *(g["params"] for g in self.adamw.param_groups)):
            p.grad = None

    def reset(self):
        """Forget everything but the weights."""
        self.steps.zero_()
        for group in self.muon:
            group.momentum.zero_()
        for state in self.adamw.state.values():
            for tensor in state.values():
                tensor.zero_()


def outlook(loss: float, tokens_per_s: float, settings: Settings) -> float:
    """What a newcomer is judged by before its end: its loss, put right for its speed, in nats per token.

    A slower design has seen less text by then and gains more from what is left: of children run to their end the loss
    after half the budget ranks 0.83 with the score, put right 0.98. Alike where the budget is a number of tokens.
    """
    return loss if settings.token_budget else loss + SPEED_WORTH * math.log(tokens_per_s)


def schedule_at(fraction: float) -> float:
    """The learning rate after this share of the budget: constant, then linear to zero over the last half."""
    return min(1.0, 2 * (1 - fraction))


def check_network(genome: Genome, seed: int) -> str:
    """Return leak where a later token or another row of the batch changes the logits, dead where no token does, or "".

    Runs the network with a small vocabulary on the CPU, where causality holds to the bit, with noise on all weights
    so that nothing hides behind a zero. It sees 150 tokens; `Trial.sees_the_future` sees as many as training.
    """
    torch.manual_seed(seed)
    vocab_size, T = 64, 150
    model = Model(genome, vocab_size)
    idx = torch.randint(vocab_size, (2, T))
    anywhere = int(torch.randint(2, T, ()))

    def logits(idx):
        torch.manual_seed(seed)  # an op that draws random numbers draws the same ones each time
        return model(idx)

    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        changes = [(row, t, torch.randint(1, vocab_size, (T - t,))) for row, t in
                   ((0, 1), (1, 64), (0, 100), (1, T - 1), (0, anywhere))]  # fmt: skip
        before = logits(idx)
        for row, t, change in changes:
            changed = idx.clone()
            changed[row, t:] = (changed[row, t:] + change) % vocab_size
            after = logits(changed)
            if not torch.equal(before[row, :t], after[row, :t]) or not torch.equal(before[1 - row], after[1 - row]):
                return "leak" if before.isfinite().all() else "diverged"
            if t == 1 and torch.equal(before[row, t:], after[row, t:]):
                return "dead"
    return ""


def stood_still(paces: list[float], budget: float) -> bool:
    """Whether the last step took over 20 times what a step takes, and more than a twentieth of the budget, in seconds.

    The process was suspended, or the GPU busy with something else: the model had fewer seconds than it was given.
    """
    *before, last = paces[-21:]
    return bool(before) and last > max(20 * statistics.median(before), budget / 20)


class Trial:
    """A genome built and compiled, ready to train with `rows` windows at once.

    Until `run` it takes up memory on the device and computes next to nothing there: it may be built while another
    process trains.
    """

    def __init__(self, task: Task, data: prepare.Dataset, settings: Settings, rows: int):
        self.task, self.data, self.settings, self.rows = task, data, settings, rows
        self.micro_steps = settings.batch_tokens // settings.seq_len // rows
        device = data.train.device
        self.on_gpu = device.type == "cuda"
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(task.seed)  # on the CPU, so that every machine begins with the same weights
        self.model = Model(task.genome, data.vocab_size, compute_dtype(device)).to(device)
        text = data.train[: max(settings.seq_len + 1, round(len(data.train) * task.text))]
        self.batches = prepare.Batches(text, settings.seq_len, task.order)
        self.optimizer = Optimizer(self.model, task.genome.lr_factor)
        self.window = torch.zeros((), dtype=torch.int64, device=device)  # the first of the next batch
        self.loss = torch.zeros((), device=device)  # of the last step, nats per token
        note = self.model.compile(rows, settings.seq_len) if self.on_gpu else ""
        self.result = Result.of(task, params=sum(p.numel() for p in self.model.parameters()), rows=rows, note=note)
        self.progress: Callable[[float], None] = lambda share: None  # is told the share of the budget that is spent

    def step(self):
        """One optimizer step over BATCH_TOKENS tokens; no synchronisation, so that it can be captured."""
        self.loss.zero_()
        for _ in range(self.micro_steps):
            loss = self.model(*self.batches(self.window, self.rows)) / self.micro_steps
            loss.backward()
            self.loss += loss.detach()
            self.window += self.rows
        self.optimizer.step()

    def capture(self) -> Callable[[], None]:
        """The step as one CUDA graph, or as it is where it cannot be captured. Leaves the model as it was."""
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()  # the schedule is zero, so no weight moves
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        step = graph.replay
        self.result.captured = True
        try:
            with torch.cuda.graph(graph, stream=stream):
                self.step()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            torch.cuda.synchronize()
            for p in self.model.parameters():
                p.grad = None
            step, self.result.captured = self.step, False
            self.add_note(f"not captured: {first_line(error.__context__ or error)}")
        self.optimizer.reset()
        self.window.zero_()
        return step

    def add_note(self, note: str):
        self.result.note = f"{self.result.note} {note}".strip()

    def train(self, step: Callable[[], None]):
        """Train for the budget. The clock covers this alone, and stops about one step late at most.

        On a GPU one step is launched ahead of the one that is waited for, so that the device never waits for Python.
        """
        s, task, result = self.settings, self.task, self.result
        seconds, tokens = s.time_budget * task.budget, s.token_budget * task.budget
        diverged = math.log(self.data.vocab_size) + 1
        looks = collections.deque((at, limit) for (at, _), limit in zip(RUNGS, task.hurdle, strict=False))
        losses: list[list[float]] = [[] for _ in range(CURVE)]
        recent: collections.deque = collections.deque(maxlen=50)
        host = torch.zeros(2, pin_memory=self.on_gpu)
        ends = [torch.cuda.Event(), torch.cuda.Event()] if self.on_gpu else None
        flying: collections.deque = collections.deque()  # the tenth of the budget that each unfinished step belongs to
        done, done_at, paces = 0, 0.0, [0.0]  # steps that are done, when the last one was, and how long each took
        self.synchronize()
        start = time.perf_counter()
        while result.status == "ok":
            launched = done + len(flying)
            begins = done_at + paces[-1] * len(flying)  # when this step will begin on the device
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
            paces.append(now - done_at)
            done_at = now
            loss = host[done % 2].item()
            tenth, done = flying.popleft(), done + 1
            losses[tenth].append(loss)
            recent.append(loss)
            self.progress(done * s.batch_tokens / tokens if tokens else now / seconds)
            if not math.isfinite(loss) or (len(recent) == 50 and statistics.fmean(recent) > diverged):
                result.status = "diverged"
            if not tokens and stood_still(paces[1:], seconds):
                result.status = "stalled"
                self.add_note(f"nothing happened for {paces[-1]:.1f} s of {seconds:g} s")
            while looks and tenth >= looks[0][0] and result.hurdle != "spared" and result.status == "ok":
                at, limit = looks.popleft()
                loss = statistics.fmean(losses[at - 1]) if losses[at - 1] else -math.inf  # a step longer than a tenth
                missed = outlook(loss, done * s.batch_tokens / now, s) > limit
                result.hurdle = "passed" if not missed else "spared" if task.spared else "stopped"
                result.status = "stopped" if result.hurdle == "stopped" else result.status
        self.synchronize()
        elapsed = time.perf_counter() - start
        result.losses = ",".join(f"{statistics.fmean(tenth):.4f}" if tenth else "nan" for tenth in losses)
        result.tokens = (done + len(flying)) * s.batch_tokens
        result.seconds, result.tokens_per_s = round(elapsed, 3), round(result.tokens / elapsed)
        result.passes = round(result.tokens / (len(self.batches.order) * s.seq_len), 3)

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def scored_losses(self, idx, targets):
        """The losses for scoring. On a GPU by the blocks that were compiled for training, which want gradients on."""
        with torch.set_grad_enabled(self.on_gpu):
            return self.model(idx, targets, reduction="none").detach()

    def score(self, tokens) -> list[float]:
        """Bits per byte on a split, and on the thirds of its windows."""
        s = self.settings
        sizes = dict(seq_len=s.seq_len, rows=self.rows, max_tokens=s.eval_tokens)
        return prepare.bits_per_byte(self.scored_losses, tokens, self.data.token_bytes, **sizes)

    def probe(self) -> list[float | None]:
        """How much the model copies from its context, in nats per token: below zero where it does.

        Induction (Olsson et al. 2022): the loss on random tokens that stand there again after half a window, minus the
        first time. Recall (Arora et al. 2023): pairs of random tokens are put into windows of val, and once more at
        each of RECALL_SHARES further on; the loss on the second of a pair, minus the first time. None where windows are
        too short for that. As many tokens each as a step has, in the shape that is compiled.
        """
        T, device, changes = self.settings.seq_len, self.data.val.device, collections.defaultdict(list)
        if T < 4:
            return [None] * (1 + len(RECALL_SHARES))
        generator, half = torch.Generator().manual_seed(self.task.seed), T // 2
        batches = prepare.Batches(self.data.val, T, self.task.seed)

        def drawn(n: int) -> torch.Tensor:
            return torch.randint(self.data.vocab_size, (self.rows, n), generator=generator).to(device)

        def losses(tokens: torch.Tensor) -> torch.Tensor:  # (rows, T + 1) -> (rows, T)
            return self.scored_losses(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).float()

        for step in range(self.micro_steps):
            tokens = torch.cat([drawn(half).repeat(1, 2), drawn(T + 1 - 2 * half)], 1)
            nats = losses(tokens)  # at t for token t + 1
            changes[0].append(nats[:, half : 2 * half - 1] - nats[:, : half - 1])
            idx, targets = batches(torch.tensor(step * self.rows, device=device), self.rows)
            for n, share in enumerate(RECALL_SHARES, start=1):
                apart = max(2, int(T * share))
                pairs = max(1, min(16, apart // 4))
                again = half + torch.arange(pairs, device=device) * (apart // pairs)  # where a key stands once more
                tokens = torch.cat([idx, targets[:, -1:]], 1)
                for offset in (0, 1):
                    tokens[:, again - apart + offset] = tokens[:, again + offset] = drawn(pairs)
                nats = losses(tokens)
                changes[n].append(nats[:, again] - nats[:, again - apart])
        return [torch.cat(own).mean().item() for own in changes.values()]

    def sees_the_future(self) -> bool:
        """Whether what was trained predicts otherwise when later tokens are replaced, at the length that was trained.

        Each window has a cut of its own, behind which its tokens are replaced. The random numbers of all passes are the
        same, and one more pass, in which nothing is replaced, says how often a loss moves by itself: routing near a tie
        may jump in single places. A leak moves more than one in a hundred of the losses before the cuts, or, where it
        does not reach far, the losses at some distance just before the cut in most windows; and clearly more often than
        they move by themselves.
        """
        s, val = self.settings, self.data.val
        random_tokens = torch.Generator().manual_seed(self.task.seed)
        rounding = 0.02 if self.on_gpu else 1e-4  # nats: of matrix units, and of float32
        windows = min(-(-4 // self.rows) * self.rows, prepare.window_count(val, s.seq_len))  # four or more
        batches = prepare.Batches(val, s.seq_len, self.task.seed)
        position = torch.arange(s.seq_len, device=val.device)
        reach = min(16, s.seq_len - 1)  # distances to the cut that are looked at one by one
        far, near = [], []
        for first in range(0, windows, self.rows):
            idx, targets = batches(torch.tensor(first, device=val.device), self.rows)
            place = 1 + torch.arange(first, first + self.rows, device=val.device)
            cut = (place * s.seq_len // (windows + self.rows)).clamp(reach, s.seq_len - 1)[:, None]
            other = torch.randint(self.data.vocab_size, idx.shape, generator=random_tokens).to(idx.device)
            losses = []
            for seen in (idx, idx, torch.where(position < cut, idx, other)):
                torch.manual_seed(self.task.seed)
                losses.append(self.scored_losses(seen, targets).float())
            moved = torch.stack([(again - losses[0]).abs() > rounding for again in losses[1:]]).float()  # (2, rows, T)
            far.append(moved[:, position < cut])
            near.append(moved.gather(2, (cut - 1 - position[:reach]).expand(2, -1, -1)))
        by_itself, by_change = torch.cat(far, 1).mean(1)
        near_by_itself, near_by_change = torch.cat(near, 1).mean(1)  # (reach,)
        leaks = (by_change > 0.01 + 2 * by_itself) | (near_by_change > 0.5 + 2 * near_by_itself).any()
        return leaks.item()

    def run(self):
        """Train and score; fills in the result."""
        entered, result = time.perf_counter(), self.result
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.train(self.capture() if self.on_gpu else self.step)
        if result.status == "ok" and self.sees_the_future():
            result.status = "leak"
        if result.status == "ok":
            val_bpb, *thirds = self.score(self.data.val)
            test_bpb = self.score(self.data.test)[0] if self.task.test else None
            if math.isfinite(val_bpb) and math.isfinite(test_bpb or 0.0):
                result.val_bpb, result.test_bpb = val_bpb, test_bpb
                result.bpb_first, result.bpb_middle, result.bpb_last = thirds
                if self.task.test:
                    result.induction, result.recall_near, result.recall_middle, result.recall_far = self.probe()
            else:
                result.status = "diverged"
        if self.on_gpu:
            result.memory_mb = torch.cuda.max_memory_allocated() // 2**20
            torch.cuda.empty_cache()  # what the graph held, before others have their turn
        result.outside = round(time.perf_counter() - entered - result.seconds, 3)
        result.finished = now()


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One stream for every capture of a process: cuBLAS keeps a workspace for each stream that it ever saw."""
    return torch.cuda.Stream()


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the device had no memory left, which CUDA, cuBLAS and Triton each say in an exception of their own."""
    if error is None:
        return False
    lacks = "out of memory" in str(error).lower() or "_STATUS_ALLOC_FAILED" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or lacks or is_out_of_memory(error.__context__)


class Turn:
    """Having a device to oneself: entered once a genome is built and compiled, before anything is computed there.

    This one costs nothing and waits for nobody; `GpuTurn` is the one that does.
    """

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass

    def make_room(self):
        """Have those who wait give back the memory that they hold on the device: they are ended, and start again."""


def run_trial(
    task: Task, data: prepare.Dataset, settings: Settings, turn: Turn, progress: Callable[[float], None] | None = None
) -> tuple[Result, Model | None]:
    """Check, build, train and score a genome; returns its result and the trained model, None where there is none.

    Where memory is short, whoever else holds some is the reason until shown otherwise: it is tried again in its turn,
    then when those who wait have made room, and only then with half as many rows at once (the tokens of a step stay),
    down to one. Then it is the status oom.
    """
    held = torch.cuda.memory_allocated() // 2**20 if data.train.is_cuda else None
    problem = check_network(task.genome, task.seed)
    if problem:
        return Result.of(task, problem, params=task.genome.num_params(data.vocab_size)), None
    all_rows = rows = settings.batch_tokens // settings.seq_len
    has_turn = has_room = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                trial = Trial(task, data, settings, rows)
                trial.result.held_mb = held
                trial.progress = progress or trial.progress
                if not has_turn:
                    stack.enter_context(turn)
                    has_turn = True
                if rows < all_rows:
                    trial.add_note(f"memory for {rows} rows at once, not {all_rows}")
                trial.run()
                return trial.result, trial.model
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if has_room and rows == 1:
                    return Result.of(task, "oom", rows=1, note=first_line(error), held_mb=held), None
            trial = None  # what failed makes room for what is tried next
            free_memory()
            if not has_turn:
                stack.enter_context(turn)
                has_turn = True
            elif not has_room:
                turn.make_room()
                has_room = True
            else:
                rows = fewer(rows)


def evaluate(task: Task, data: prepare.Dataset, settings: Settings, turn: Turn) -> Result:
    """Train and score one genome: a pure function of its arguments, but for time. Leaves nothing on the device."""
    result = run_trial(task, data, settings, turn)[0]
    free_memory()
    return result


def free_memory():
    """Give back what nobody holds any more; compiled modules hold themselves, in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fewer(rows: int) -> int:
    """Half as many rows at once, or the next smaller number that divides them."""
    return next(r for r in range(rows // 2, 0, -1) if rows % r == 0)


# ----------------------------------------------------------------------------------------------------------------------
# The pool: processes that evaluate tasks on ONE device. One trains, the others compile what comes next.
#
# The kernel keeps order. A lock on a file that all programs of this machine share is the turn of a GPU, an alarm ends a
# worker that hangs (but not while it waits for its turn), and a process that dies frees the lock.

START_METHOD = "spawn"  # of workers: a fresh process has no state of its parent's
HOLDER_BYTES = 300  # of the file that is a turn: who has it
PATIENCE = 10.0  # seconds until who waits for a GPU says for whom
TRAINS_MB, WAITS_MB = 3_000, 1_500  # on a card: of a model that trains; of a process that waits, without its tokens
ENDED_BY_ALARM = -signal.SIGALRM  # the exit code of a worker that hung


def turn_file(device: torch.device) -> Path | None:
    """The file whose lock is the turn of a GPU, the same for every user and container-free process; None on the CPU."""
    if device.type == "cpu":
        return None
    return Path("/tmp") / f"genesis-{torch.cuda.get_device_properties(device).uuid}.lock"


def open_shared(path: Path) -> int:
    """Open a file that every user may lock, and make it where there is none."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(FileExistsError):
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(fd, 0o666)  # whatever the umask says
        return fd
    return os.open(path, flags)


class GpuTurn(Turn):
    """The turn of a GPU, among all runs of this program on the machine.

    path: the file whose lock it is; None where there is nobody to wait for. who: for what run, in words. tell: is told
    for whom we wait, after PATIENCE.
    """

    def __init__(self, path: Path | None, who: str, tell: Callable[[str], None]):
        self.path, self.tell, self.fd = path, tell, None
        self.who = os.fsencode(who)[:HOLDER_BYTES].ljust(HOLDER_BYTES)  # of one length: others read it at any time

    def __enter__(self):
        if self.path is None:
            return
        try:
            self.fd = open_shared(self.path)
            self.wait()
        except OSError as error:
            self.tell(
                f"{self.path} cannot be locked ({error.strerror}): another run on this GPU would spoil both clocks"
            )
            return self.__exit__()
        with contextlib.suppress(OSError):  # a full disk: then nobody learns who has it
            os.pwrite(self.fd, self.who, 0)

    def wait(self):
        begun, known = time.monotonic(), {b"", self.who}
        while True:
            try:
                return fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.005)
            if time.monotonic() - begun > PATIENCE:
                holder = os.pread(self.fd, HOLDER_BYTES, 0)
                if holder not in known:
                    known.add(holder)
                    name = holder.decode(errors="replace").strip()
                    self.tell(f"The GPU is busy with another run, {name!a}: waiting for our turn")

    def __exit__(self, *_):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Tell(NamedTuple):
    """What a worker has to say to the user."""

    text: str


class WorkerTurn(GpuTurn):
    """The turn of a worker, which tells its pool. The alarm that ends it when it hangs is off while it waits."""

    def __init__(self, path: Path | None, who: str, pipe, limit: int):
        super().__init__(path, who, lambda text: pipe.send(Tell(text)))
        self.pipe, self.limit = pipe, limit

    def __enter__(self):
        signal.alarm(0)
        super().__enter__()
        self.pipe.send("training")
        signal.alarm(self.limit)

    def make_room(self):
        self.pipe.send("make room")
        self.pipe.recv()


def serve(pipe, folder: Path, stamp: tuple, settings: Settings, device: torch.device, who: str):
    """What a worker does: take tasks from the pool and send results.

    In between it says what it does ("ready", "training"), or that it needs the memory of the others ("make room"). What
    it Tells is for the user to read, and a Stop ends the run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even within a call that never returns
    signal.alarm(settings.deadline)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if device.type != "cpu":
        torch.set_num_threads(1)
        torch.cuda.set_device(device)
    data = prepare.load(folder, stamp=stamp).to(device)
    if device.type == "cuda" and (problem := compiler_problem(data.vocab_size, device, settings)):
        pipe.send(Stop(problem))
        return
    turn_of = turn_file(device)
    pipe.send("ready")
    while True:
        signal.alarm(0)
        task = pipe.recv()
        if task is None:  # the pool is closed
            return
        signal.alarm(settings.deadline)
        try:
            turn = WorkerTurn(turn_of, who, pipe, training_limit(task, settings))
            result = evaluate(task, data, settings, turn)
        except Exception as error:  # a result too: the pool records it and starts another worker
            note = f"{type(error).__name__}: {first_line(error)}{place_of(error)}"
            result = Result.of(task, "crash", note=note, trace=traceback.format_exc())
        pipe.send(result)
        gc.freeze()  # what is left, modules and compiled code, stays: gc.collect need not look through it again


def compiler_problem(vocab_size: int, device: torch.device, settings: Settings) -> str:
    """Why nothing can be compiled on this machine, or "". Without that a night would pass at a third of the speed."""
    model = Model(Genome((Gene("norm"),)), vocab_size, compute_dtype(device)).to(device)
    try:
        reason = model.compile(settings.batch_tokens // settings.seq_len, settings.seq_len)
    except FileNotFoundError as error:  # of a compiler that the environment names
        reason = str(error)
    return reason and (
        f"Nothing can be compiled for {torch.cuda.get_device_name(device)} ({reason}). It needs a C compiler, Python's "
        "headers, and a card that Triton knows (compute capability 7.0 or more): apt install gcc python3-dev"
    )


def place_of(error: BaseException) -> str:
    """Where in this program's own files an exception came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent == Path(__file__).parent]
    return f" ({Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name})" if ours else ""


def training_limit(task: Task, settings: Settings) -> int:
    """Seconds that training and scoring may take before the worker counts as hung."""
    if settings.token_budget:
        return math.ceil(settings.deadline * max(1.0, task.budget))
    return math.ceil(settings.deadline + 2 * settings.time_budget * task.budget)


@dataclass
class Worker:
    """A process as the pool sees it."""

    process: multiprocessing.Process
    pipe: multiprocessing.connection.Connection
    state: str = "starting"  # then ready, preparing, training
    task: Task | None = None


class Pool:
    """Workers on one device. run(tasks) yields a result for each task, in the order in which they finish.

    A worker that dies is replaced. What it was doing becomes a result, timeout or crash; but where a signal from
    outside ended it (an impatient user, the machine out of memory), or its training stood still, it is tried once more.
    """

    def __init__(self, data: prepare.Dataset, settings: Settings, device: torch.device, out: Path):
        self.data, self.settings, self.device = data, settings, device
        self.who = f"process {os.getpid()} for {out.resolve()}"
        self.context = multiprocessing.get_context(START_METHOD)
        self.size = worker_count(settings, data, device)  # workers that there should be
        self.alone: Worker | None = None  # the one that needs all memory of the device
        self.failed_starts = 0  # in a row
        self.gpus, self.gpu_seconds = 1, 0.0  # and for how long there was something to do
        # Trackers, ours and those of workers, free the semaphores of killed processes; their warning helps nobody.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
        # Workers compile at the same time; torch reads this when it is imported.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cpu_cores() // self.size)))
        self.workers = [self.start() for _ in range(self.size)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_):
        for w in self.workers:
            if w.state == "ready":
                with contextlib.suppress(OSError):
                    w.pipe.send(None)  # it ends by itself, and leaves nothing behind
            else:
                w.process.kill()
        deadline = time.monotonic() + 5
        for w in self.workers:
            w.process.join(max(0.0, deadline - time.monotonic()))
            w.process.kill()
            w.process.join(5)

    def start(self) -> Worker:
        """Start a worker. Raises PrepareError where the data are not those that the run began with."""
        prepare.load(self.data.folder, stamp=self.data.stamp)
        ours, theirs = self.context.Pipe()
        args = (theirs, self.data.folder, self.data.stamp, self.settings, self.device, self.who)
        process = self.context.Process(target=serve, args=args, daemon=True)
        multiprocessing.resource_tracker.ensure_running()  # now, as its start unblocks what is blocked
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a worker inherits that: Ctrl-C is ours alone
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        return Worker(process, ours)

    def run(self, tasks: Iterable[Task | None], tick: Callable[[], None] = lambda: None) -> Iterator[Result]:
        """Yield the results of tasks; calls tick twice a second or more. Raises Stop where no worker can start.

        Of the tasks one more is drawn than there are workers for; None says that there is none yet.
        """
        source, todo, tried, told = iter(tasks), collections.deque(), set(), set()
        more, before = True, time.monotonic()
        while True:
            while self.alone is None and len(self.workers) < self.size:
                self.workers.append(self.start())
            for w in [*(w for w in self.workers if w.state == "ready" and self.alone is None), None]:
                if more and not todo:
                    task = next(source, self)
                    more = task is not self
                    todo.extend([task] if more and task else [])
                if w and todo:
                    w.task, w.state = todo.popleft(), "preparing"
                    with contextlib.suppress(OSError):  # a dead worker is found below
                        w.pipe.send(w.task)
            if not (more or todo or any(w.task for w in self.workers)):
                return
            now = time.monotonic()
            self.gpu_seconds, before = self.gpu_seconds + now - before, now
            readable = multiprocessing.connection.wait([w.pipe for w in self.workers], timeout=0.5)
            tick()
            for w in [w for w in self.workers if w.pipe in readable]:
                try:
                    message = w.pipe.recv()
                except (EOFError, OSError):
                    w.process.join(5)
                    if w.state == "starting":
                        self.start_failed(w)
                    message = self.epitaph(w)
                if isinstance(message, Stop):
                    raise message
                if isinstance(message, Tell):
                    if message not in told:
                        told.add(message)
                        say(message.text)
                    continue
                if message == "make room":
                    todo.extendleft(self.make_room(w))
                    break  # most of the others are gone
                if isinstance(message, str):
                    w.state = message
                    if message == "ready":
                        self.failed_starts = 0
                    continue
                task, w.state, w.task = w.task, "ready", None
                if message is None or message.status in ("crash", "timeout") or message.captured is False:
                    self.end(w)  # a failed capture, too, leaves torch's allocator in disorder
                if w is self.alone:
                    self.alone = None
                    if (
                        message
                        and message.rows == self.settings.batch_tokens // self.settings.seq_len
                        and self.size > 1
                    ):
                        self.size //= 2
                        say(f"{task.id}: had too little memory beside those that wait; from now on {self.size} at work")
                if task is None:
                    continue
                if (message is None or message.status == "stalled") and task not in tried:
                    tried.add(task)
                    todo.appendleft(task)
                    why = "its worker was killed" if message is None else message.note
                    say(f"{task.id}: {why}; trying once more")
                    continue
                yield message or Result.of(task, "crash", note="the worker was killed, twice")

    def start_failed(self, w: Worker):
        """Start another in its place; after three failures in a row do without, while there are others."""
        self.failed_starts += 1
        why = f"exit code {w.process.exitcode}; what it printed stands above"
        if w.process.exitcode == ENDED_BY_ALARM:
            why = f"it took over DEADLINE = {self.settings.deadline} s"
        if self.failed_starts < 3:
            return say(f"A worker could not start ({why}); trying again")
        self.size, self.failed_starts = self.size - 1, 0
        if not self.size:
            raise Stop(f"No worker can start ({why})")
        say(f"A worker could not start, three times ({why}). Going on with {self.size}")

    def epitaph(self, w: Worker) -> Result | None:
        """What a worker that died was doing, as a result; None where it was nothing, or where a signal ended it."""
        code = w.process.exitcode
        if w.task is None or (code is not None and code < 0 and code != ENDED_BY_ALARM):
            return None
        if code != ENDED_BY_ALARM:
            return Result.of(w.task, "crash", note=f"the worker ended with exit code {code}")
        seconds = training_limit(w.task, self.settings) if w.state == "training" else self.settings.deadline
        return Result.of(w.task, "timeout", note=f"{w.state} took over {seconds} s")

    def make_room(self, w: Worker) -> list[Task]:
        """End the workers that wait beside one that needs their memory; returns what they were doing."""
        # one that was training has just ended, as it is the turn of w: its result is on its way
        waiting = [other for other in self.workers if other is not w and other.state != "training"]
        for other in waiting:
            self.end(other)
        self.alone = w
        with contextlib.suppress(OSError):
            w.pipe.send("there is room")
        return [other.task for other in waiting if other.task]

    def end(self, w: Worker):
        w.process.kill()
        w.process.join(30)
        self.workers.remove(w)


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_mb(device: torch.device) -> int:
    """MiB that are free on a card. Asking CUDA would take up some hundred of them in this process."""
    card = torch.cuda.get_device_properties(device)
    command = ["nvidia-smi", f"--id=GPU-{card.uuid}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return card.total_memory // 2**20


def worker_count(settings: Settings, data: prepare.Dataset, device: torch.device) -> int:
    """As many as WORKERS says, or as the card's free memory and half the cores carry, up to 8; one on the CPU."""
    if device.type == "cpu":
        return 1
    waiting = WAITS_MB + 2 * sum(len(tokens) for tokens in (data.train, data.val, data.test)) // 2**20
    free = free_mb(device)
    carried = max(1, (free - TRAINS_MB) // waiting)
    n = settings.workers or max(1, min(8, cpu_cores() // 2, carried))
    what = "workers: one trains, the others compile" if n > 1 else "worker"
    say(f"{n} {what} ({cpu_cores()} cores; {free:,} MiB free for {carried} of them)")
    return n


# ----------------------------------------------------------------------------------------------------------------------
# More than one GPU: a pool of its own on each, held together by Ray (Moritz et al. 2018; https://docs.ray.io), an extra
# that is imported here alone. The driver keeps plan and record; tasks and results cross as plain values.

HELD = 4  # tasks that a GPU has: one trains, the others compile
LOOK = 3.0  # seconds between looks at who is there
SLOW = 60.0  # seconds that the start waits for those who are slow to say who they are
SILENT = 120.0  # seconds without a sign of life after which a GPU counts as lost
ATTEMPTS = 3  # of a task, where its GPUs are lost, and of a start; then it is a crash


def task_values(task: Task) -> dict:
    return {**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)}, "genome": task.genome.to_json()}


class Host:
    """A pool on one GPU of a cluster (on a CPU where it has none): what runs there, as a Ray actor of several threads.

    settings: the constants in lower case. folder: the name of the folder of tokens in the cache of that machine.
    """

    def __init__(self, settings: dict, folder: str, out: str):
        vars(sys.modules["__main__"]).pop("__file__", None)  # else each worker begins by loading Ray's own script
        self.settings, self.folder, self.out = Settings(**settings), prepare.cache_root() / folder, Path(out)
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()  # of tasks
        self.waiting: dict[tuple, Future] = {}  # by what is evaluated
        self.problem: Exception | None = None  # what ended the pool

    def describe(self) -> dict:
        """What has to be the same everywhere. Raises PrepareError."""
        name = torch.cuda.get_device_name(0) if self.device.type == "cuda" else "cpu"
        data = prepare.load(self.folder, verify=True)
        return {"device": name, "fingerprint": data.fingerprint, "code": code_hash(), "torch": torch.__version__}

    def begin(self, share: int, shares: int):
        """Start the pool, on one of so many shares of the cores of this machine: each of its GPUs has one."""
        if hasattr(os, "sched_setaffinity") and cpu_cores() >= 2 * shares:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[share::shares])
        threading.Thread(target=self.work, daemon=True).start()

    def alive(self):
        """Answers where this process does."""

    def work(self):
        try:
            data = prepare.load(self.folder)
            workers = min(HELD, worker_count(self.settings, data, self.device))
            with Pool(data, dataclasses.replace(self.settings, workers=workers), self.device, self.out) as pool:
                for result in pool.run(self.tasks()):
                    self.waiting.pop(result.evaluation).set_result(dataclasses.asdict(result))
        except Exception as error:
            self.problem = error
            for future in list(self.waiting.values()):
                future.set_exception(error)

    def tasks(self) -> Iterator[Task | None]:
        """What comes in, without an end; None where there is nothing yet."""
        while True:
            try:
                yield self.inbox.get_nowait()
            except queue.Empty:
                yield None

    def evaluate(self, values: dict) -> dict:
        """The result of a task, as values; waits for it. Raises what ended the pool."""
        task, future = Task(**{**values, "genome": Genome.from_json(values["genome"])}), Future()
        self.waiting[task.evaluation] = future
        self.inbox.put(task)
        if self.problem:
            raise self.problem
        return future.result()


@dataclass
class Member:
    """A GPU of a cluster as the driver sees it."""

    actor: object
    node: str
    share: int  # of its machine's cores
    hello: object  # a reference to what it says of itself; None once that is known
    tasks: dict = field(default_factory=dict)  # by the reference to its result
    device: str = ""
    sign: object = None  # a reference to its next sign of life,
    since: float = field(default_factory=time.monotonic)  # and when there was the last


class RayPool:
    """run(tasks) as that of Pool, on all GPUs of a cluster that are of one model.

    Those that come are used, and what is lost with those that go is done elsewhere. address: of a cluster that runs,
    or "" to start one on this machine. known: the model that is preferred, if there is one. ends: as time.monotonic()
    has it, when waiting for a GPU ends. Raises Stop where Ray is missing or no GPU can take part.
    """

    def __init__(
        self, address: str, data: prepare.Dataset, settings: Settings, out: Path, known: str | None = None,
        ends: float = math.inf,
    ):  # fmt: skip
        # Read when Ray is imported: it would else copy this folder, and build its environment anew, for each process.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError as error:
            raise Stop(f"--ray needs Ray ({error}), an extra: uv run --extra ray evolve.py --ray") from None
        self.ray, self.on_node = ray, NodeAffinitySchedulingStrategy
        path = os.pathsep.join([str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        local = {} if address else {"address": "local", "include_dashboard": False}
        environment = {"env_vars": {"PYTHONPATH": path}}
        try:
            if re.fullmatch(r"[^/]+:\d+", address):  # Ray itself tries an address in vain for minutes
                socket.create_connection(address.rsplit(":", 1), timeout=10).close()
            ray.init(**{"address": address, **local}, logging_level=logging.ERROR, runtime_env=environment)
        except (OSError, ValueError, RuntimeError) as error:
            raise Stop(
                f"--ray {address}: {first_line(error)}. To start a cluster: uv run --extra ray ray start --head"
            ) from None
        # As a module, not as the script that is run: processes elsewhere have to find it by its name.
        self.host = ray.remote(importlib.import_module("evolve").Host)
        self.arguments = (constants_of(settings), data.folder.name, str(out.resolve()))
        self.expected = {"fingerprint": data.fingerprint, "code": code_hash(), "torch": torch.__version__}
        self.members: list[Member] = []
        self.left_out: dict[str, str] = {}  # nodes, and why
        self.deaths: collections.Counter = collections.Counter()  # of nodes, before anybody there was heard
        self.gpu_seconds, self.looked, self.waits, self.ends = 0.0, -math.inf, False, ends
        self.kind = "GPU" if any(node["Resources"].get("GPU") for node in ray.nodes()) else "CPU"
        until = time.monotonic() + SLOW
        while not (there := [m.device for m in self.members if m.device]) or (
            len(there) < len(self.members) and time.monotonic() < until
        ):
            self.look(wait=1.0)
            if time.monotonic() > ends:
                raise Stop(f"No {self.kind} of the cluster answered in time")
        self.expected["device"] = known if known in there else collections.Counter(there).most_common(1)[0][0]
        for m in [m for m in self.members if m.device]:
            self.judge(m)

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_):
        for m in self.members:
            self.ray.kill(m.actor)
        self.ray.shutdown()

    @property
    def device_name(self) -> str:
        return self.expected["device"]

    @property
    def gpus(self) -> int:
        return max(1, sum(not m.hello for m in self.members))

    def count(self, node: dict) -> int:
        return int(node["Resources"].get(self.kind, 0)) if node["Alive"] else 0

    def look(self, wait: float = 0.0):
        """Have a member for each GPU of each node, and hear those that are new. Raises Stop where there is none."""
        nodes = {node["NodeID"]: node for node in self.ray.nodes()}
        for m in [m for m in self.members if not m.tasks and not nodes.get(m.node, {}).get("Alive")]:
            self.members.remove(m)
        for id, node in nodes.items():
            lacking = set(range(self.count(node))) - {m.share for m in self.members if m.node == id}
            for share in sorted(lacking if id not in self.left_out else ()):
                options = dict(num_cpus=int(self.kind == "CPU"), num_gpus=int(self.kind == "GPU"))
                place = self.on_node(node_id=id, soft=False)
                actor = self.host.options(**options, scheduling_strategy=place, max_concurrency=HELD + 2).remote(
                    *self.arguments
                )
                self.members.append(Member(actor, id, share, actor.describe.remote()))
        new = {m.hello: m for m in self.members if m.hello}
        for hello in self.arrived(new, wait):
            self.hear(new[hello])
        signs = {m.sign: m for m in self.members if m.sign}
        for sign in self.arrived(signs, 0):
            signs[sign].sign, signs[sign].since = None, time.monotonic()
        for m in self.members:
            m.sign = m.sign or (None if m.hello else m.actor.alive.remote())
        if not self.members and self.left_out and not self.expected.get("device"):
            raise Stop(f"No {self.kind} of the cluster can take part: {'; '.join(sorted(set(self.left_out.values())))}")
        if not self.members and not self.waits:
            say(f"The cluster has no {self.kind} now that can take part: waiting for one")
        self.waits, self.looked = not self.members, time.monotonic()

    def arrived(self, refs: dict, wait: float) -> list:
        """Those of the references that are there, all of them or after so many seconds."""
        return self.ray.wait(list(refs), num_returns=len(refs), timeout=wait)[0] if refs else []

    def hear(self, m: Member):
        """What a new member says of itself."""
        try:
            found, m.hello, m.since = self.ray.get(m.hello), None, time.monotonic()
        except self.ray.exceptions.RayTaskError as error:
            return self.leave_out(m, first_line(error.cause))
        except self.ray.exceptions.RayError as error:  # it died; it is tried again, but not for ever
            self.members.remove(m)
            self.deaths[m.node] += 1
            if self.deaths[m.node] >= ATTEMPTS:
                self.left_out[m.node] = first_line(error)
            return
        m.device = found.pop("device")
        self.judge(m, found)

    def judge(self, m: Member, found: dict | None = None):
        """Let a member begin that is like the others, once it is known what they are; leave out one that is not."""
        advice = {
            "fingerprint": "prepare the same text there with the prepare.py of this folder",
            "code": "have the same checkout there, at the same path",
            "torch": "have the same environment there: uv sync --extra ray",
            "device": "results of two kinds of GPU do not mix",
        }
        for name, value in {**(found or {}), "device": m.device}.items():
            if value != self.expected.get(name, value):
                return self.leave_out(m, f"its {name} is {value}, not {self.expected[name]}; {advice[name]}")
        if "device" in self.expected:
            m.actor.begin.remote(m.share, sum(other.node == m.node for other in self.members))

    def leave_out(self, m: Member, why: str):
        """Use a member's node no more."""
        self.ray.kill(m.actor)
        self.members.remove(m)
        if m.node not in self.left_out:
            address = {node["NodeID"]: node["NodeManagerAddress"] for node in self.ray.nodes()}.get(m.node, m.node)
            say(f"{address} takes no part: {why}")
        self.left_out[m.node] = why

    def run(self, tasks: Iterable[Task | None], tick: Callable[[], None] = lambda: None) -> Iterator[Result]:
        """Yield the results of tasks as they come; calls tick twice a second or more."""
        todo, lost = collections.deque(), collections.Counter()
        source, before = iter(tasks), time.monotonic()
        while True:
            if time.monotonic() - self.looked > LOOK:
                self.look()
            if time.monotonic() + SPARE > self.ends:
                todo.clear()
            ready = [m for m in self.members if not m.hello]
            while ready and len((m := min(ready, key=lambda m: len(m.tasks))).tasks) < HELD:
                task = todo.popleft() if todo else next(source, None)
                if task is None:
                    break
                m.tasks[m.actor.evaluate.remote(task_values(task))] = task
            owner = {ref: m for m in ready for ref in m.tasks}
            if not owner and (ready or time.monotonic() + SPARE > self.ends):
                return
            done = self.ray.wait(list(owner), timeout=0.5)[0] if owner else []
            if not owner:  # nobody is there
                time.sleep(0.5)
            tick()
            now = time.monotonic()
            self.gpu_seconds, before = self.gpu_seconds + (now - before) * len(ready), now
            gone = [m for m in ready if now - m.since > SILENT]
            for ref in done:
                m = owner[ref]
                try:
                    result = Result(**self.ray.get(ref))
                except self.ray.exceptions.RayTaskError as error:  # its pool cannot go on
                    self.left_out[m.node] = first_line(error.cause)
                    if len(self.members) == 1:
                        raise Stop(first_line(error.cause)) from None
                    say(f"A {self.kind} takes no part any more: {first_line(error.cause)}")
                    gone.append(m)
                except self.ray.exceptions.RayError:
                    gone.append(m)
                else:
                    del m.tasks[ref]
                    yield result
            for m in {id(m): m for m in gone}.values():
                say(f"A {self.kind} of the cluster is lost, with {len(m.tasks)} evaluations: they are made elsewhere")
                self.ray.kill(m.actor)
                self.members.remove(m)
                for task in reversed(m.tasks.values()):
                    lost[task.evaluation] += 1
                    if lost[task.evaluation] < ATTEMPTS:
                        todo.appendleft(task)
                    else:
                        note = f"the {self.kind} that evaluated it was lost, {ATTEMPTS} times"
                        yield Result.of(task, "crash", note=note)


# ----------------------------------------------------------------------------------------------------------------------
# The record: results.tsv. The first line says what run it is, the second names the columns, then a line per evaluation.

COLUMNS = {f.name: (typing.get_args(f.type) or (f.type,))[0] for f in dataclasses.fields(Result) if f.name != "trace"}
STATUSES = {  # all but ok are without a score and can never win
    "ok": "trained and scored",
    "diverged": "its loss or score was no number, or its loss stayed above that of a uniform guess",
    "oom": "out of memory, alone on the card and with one row at a time",
    "leak": "a later token changed an earlier prediction",
    "dead": "no token changed anything",
    "stopped": "a newcomer without prospect, ended by the hurdle",
    "stalled": "training stood still for a while, twice, as where the process was suspended: its seconds do not count",
    "timeout": "it hung past DEADLINE",
    "crash": "it raised an error, or its process ended or was killed, twice",
}


def to_line(result: Result) -> str:
    values = (getattr(result, name) for name in COLUMNS)
    texts = ("" if v is None else f"{v:.6f}" if isinstance(v, float) else str(v) for v in values)
    # what ends a cell; and what to many readers of such files begins a comment, or, in front, a quotation
    return "\t".join(re.sub(r"[\t\r\n]+", " ", text).replace("#", "").lstrip('"') for text in texts) + "\n"


def from_cells(cells: dict[str, str]) -> Result:
    """A row from the texts of its cells; those of columns that it lacks take their defaults. Raises ValueError."""
    values = {}
    for name in COLUMNS.keys() & cells.keys():
        kind, text = COLUMNS[name], cells[name]
        if kind is not str and text == "":
            values[name] = None
        elif kind is bool:
            values[name] = {"True": True, "False": False}[text]
        else:
            values[name] = kind(text)
    return Result(**values)


def of_today(cells: dict[str, str], header: dict) -> dict[str, str]:
    """The cells of a row that an earlier version wrote, as they would be written today."""
    if "stage" in cells:
        return cells
    stage = {"entrant": "baseline", "final": "final"}.get(cells["operator"], "search")
    own = dict(stage=stage, budget="1", tokens_per_s=cells["tokens_per_s"].partition(".")[0])
    if stage != "search":
        own |= dict(generation="", operator="", budget=str(header.get("final_factor", 1)) if stage == "final" else "1")
    if cells["operator"] == "again":
        own["operator"] = "repeat"
    if cells["status"] == "nan":
        own["status"] = "diverged"
    return {**cells, **own}


def read_results(content: bytes) -> tuple[dict, list[str], list[Result]]:
    """The header of a results.tsv, its columns, and its rows; those of earlier versions too.

    Raises ValueError, naming the line, on what no version of this program writes.
    """
    try:
        first, names, *lines = content.decode().replace("\r\n", "\n").split("\n")[:-1]
        header, columns = json.loads(first.removeprefix("# ")), names.split("\t")
    except ValueError as error:
        raise ValueError(f"it does not begin as one ({str(error)[:100]})") from None
    if not isinstance(header, dict) or not {"id", "operator", "status", "val_bpb", "genome"} <= set(columns):
        raise ValueError("it has other columns")
    rows, attempts = [], collections.defaultdict(list)
    for number, line in enumerate(lines, start=3):
        try:
            row = from_cells(of_today(dict(zip(columns, line.split("\t"), strict=True)), header))
            Genome.from_json(row.genome)
            earlier = attempts[row.evaluation]
            _ = row.curve  # raises on what is no number
            if row.stage == "search" and row.generation is None:
                raise ValueError("an evaluation of the search without a generation")
            if row.status not in STATUSES:
                raise ValueError(f"no status is called {row.status!r}")
            if (row.status == "ok") != (row.val_bpb is not None and math.isfinite(row.val_bpb)):
                raise ValueError(f"status {row.status} with a val_bpb of {row.val_bpb}")
            if len(earlier) > 1 or "ok" in earlier:
                raise ValueError(f"{row.id} with seed {row.seed} stands there again")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number}: {error}") from None
        earlier.append(row.status)
        rows.append(row)
    return header, columns, rows


@contextlib.contextmanager
def errors_named(path: Path, advice: str) -> Iterator[None]:
    """Turn what the system refuses to do with a file into a Stop that names it."""
    try:
        yield
    except OSError as error:
        raise Stop(f"{path}: {error.strerror or error}. {advice}") from None


GO_ON = "What results.tsv holds is intact; run again to go on"


def write_whole(path: Path, content: str | bytes):
    """Write a file so that it appears whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    with errors_named(path, GO_ON):
        try:
            with open(aside, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:  # of a disk that is full
            aside.unlink(missing_ok=True)


class Record:
    """The results.tsv of a folder: its header, None before there is one, and its rows.

    Locked while it is open. Raises Stop where it cannot be read, written or locked.
    """

    def __init__(self, out: Path):
        self.path, self.header, self.columns, self.rows, self.size = out / "results.tsv", None, list(COLUMNS), [], 0
        with errors_named(out, "Name another folder with --out"):
            out.mkdir(parents=True, exist_ok=True)
            self.lock = prepare.try_lock(out / ".lock")
        if self.lock is None:
            raise Stop(f"Another run is at work in {out.resolve()}; wait for it, or use --out DIR")
        with errors_named(self.path, "Move it away, or use --out DIR"), contextlib.suppress(FileNotFoundError):
            self.read(self.path.read_bytes())

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_):
        os.close(self.lock)

    def read(self, content: bytes):
        whole = content[: content.rfind(b"\n") + 1]  # a line torn by a crash or a full disk has no end
        try:
            self.header, self.columns, self.rows = read_results(whole)
        except ValueError as error:
            raise Stop(f"{self.path} is no results.tsv of this program: {error}. "
                       "Mend it or move it away, or use --out DIR") from None  # fmt: skip
        self.size = len(whole)
        if whole != content:
            os.truncate(self.path, len(whole))

    def begin(self, header: dict):
        """Start a new results.tsv."""
        self.header, self.rows = header, []
        content = self.content()
        write_whole(self.path, content)
        self.size = len(content)

    def content(self) -> bytes:
        lines = [f"# {json.dumps(self.header)}\n", "\t".join(COLUMNS) + "\n", *map(to_line, self.rows)]
        return "".join(lines).encode(errors="replace")

    def append(self, result: Result):
        """Add one line, at once and whole."""
        line = to_line(result).encode(errors="replace")
        with errors_named(self.path, GO_ON):
            if not self.path.exists() or self.path.stat().st_size != self.size:
                rescued = self.path.with_name("results.rescued.tsv")
                write_whole(rescued, self.content())
                raise Stop(f"{self.path} was changed or deleted while the run was at work. All of its rows are in "
                           f"{rescued.name}: put that in its place, and run again to go on")  # fmt: skip
            try:
                with open(self.path, "ab") as file:  # buffered: a write that a full disk cuts short raises an error
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # else the next start drops the torn line
                    os.truncate(self.path, self.size)
                raise
        self.size += len(line)
        cells = line.decode().removesuffix("\n").split("\t")
        self.rows.append(from_cells(dict(zip(COLUMNS, cells, strict=True))))  # as it will be read

    def move_away(self) -> Path:
        """Move a run and what belongs to it to runs/NAME; nothing is overwritten."""
        out = self.path.parent
        name = datetime.datetime.fromtimestamp(self.path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        names = (f"{name}-{n}" if n else name for n in itertools.count())
        folder = next(out / "runs" / n for n in names if not (out / "runs" / n).exists())
        with errors_named(folder, f"The run in {self.path} cannot be moved there; use --out DIR"):
            folder.mkdir(parents=True)
            files = ("best_genome.json", "progress.png", "report.md", "results.tsv")
            for file in files:  # the record last: it makes it a run
                with contextlib.suppress(FileNotFoundError):
                    os.rename(out / file, folder / file)
        self.header, self.rows = None, []
        return folder


def differences(header: dict, other: dict) -> dict[str, str]:
    """What differs between the headers of two runs, by name, in words."""
    names = [name for name in {**header, **other} if header.get(name) != other.get(name)]
    return {name: f"{name.upper()} ({header.get(name)}, here {other.get(name)})" for name in names}


def in_short(differs: dict[str, str]) -> str:
    """The first two of the differences between runs, and how many more."""
    return ", ".join(list(differs.values())[:2]) + (f" and {len(differs) - 2} more" if len(differs) > 2 else "")


Controls = dict[tuple[str, str | int], list[Result]]  # ("strategy", "random") or ("seed", 1): the rows of that run


def find_controls(out: Path, header: dict) -> Controls:
    """The runs in out/runs that differ from this one in STRATEGY alone or in SEED alone, of each the last by name.

    Says which are left out, and why; of those that differ in much how many.
    """
    found, unlike_this = {}, 0
    for path in sorted(out.glob("runs/*/results.tsv")):
        try:
            other, _, rows = read_results(path.read_bytes())
        except (OSError, ValueError) as error:
            say(f"{path} is left out of the picture: {error}")
            continue
        differs = differences(other, header)
        if list(differs) in (["strategy"], ["seed"]):
            (what,) = differs
            found[what, other[what]] = rows
        elif len(differs) > 3:
            unlike_this += 1
        else:
            why = f"it differs in {in_short(differs)}" if differs else "it is the same run"
            say(f"{path} is left out of the picture: {why}")
    if unlike_this:
        say(f"{out / 'runs'}: {unlike_this} differing in more than STRATEGY or SEED left out of the picture")
    return found


# What makes two runs the same one: settings, data, device, and the code that trains and chooses.

DECIDES = [("evolve.py", "evaluate"), ("evolve.py", "next_tasks"), ("prepare.py", "Dataset")]  # and all that they use
ONLY_PRINTS = ("main", "say")


class Essence(ast.NodeTransformer):
    """Takes out of a syntax tree what only explains it: docstrings, type hints, what raise and assert say."""

    def visit_FunctionDef(self, node):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        node.returns = None
        return self.generic_visit(node)

    visit_ClassDef = visit_Module = visit_FunctionDef

    def visit_AnnAssign(self, node):
        return self.visit(ast.Assign([node.target], node.value) if node.value else ast.Expr(node.target))

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_Raise(self, node):
        return ast.Raise(getattr(node.exc, "func", node.exc))

    def visit_Assert(self, node):
        return ast.Assert(self.visit(node.test))


def tree_text(node) -> str:
    """A syntax tree as text, without what differs between versions of Python: places, and fields that are empty."""
    if isinstance(node, list):
        return "".join(tree_text(part) for part in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{k}={tree_text(v)}" for k, v in ast.iter_fields(node) if v not in (None, [])]
    return f"{type(node).__name__}({' '.join(fields)})"


def deciding_code(folder: Path) -> dict[tuple[str, str], str]:
    """The code of all of genome.py, and of all that DECIDES uses in the three scripts, by file and name."""
    defined, found = collections.defaultdict(list), {}
    for file in ("prepare.py", "genome.py", "evolve.py"):
        for statement in ast.parse((folder / file).read_text(encoding="utf-8")).body:
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            stored = [node.id for t in targets if t is not None for node in ast.walk(t) if isinstance(node, ast.Name)]
            is_call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            for name in stored or [getattr(statement, "name", "a call" if is_call else "")]:
                if name:  # what has none: imports, docstrings, and what a script does when it is run
                    defined[file, name].append(Essence().visit(statement))
    todo = [*DECIDES, *(key for key in defined if key[0] == "genome.py" or key[1] == "a call")]
    while todo:
        file, name = todo.pop()
        if name in ONLY_PRINTS or name in CONSTANTS or (file, name) in found:
            continue  # the constants stand in the header
        found[file, name] = tree_text(defined[file, name])
        for node in itertools.chain.from_iterable(map(ast.walk, defined[file, name])):
            if isinstance(node, ast.Name):
                todo += [(file, node.id)] if (file, node.id) in defined else []
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "prepare":
                todo.append(("prepare.py", node.attr))
    return found


def code_hash() -> str:
    """A hash of the code that decides a score or what is evaluated next: what it does counts, not how it is explained.

    What is forgotten in ONLY_PRINTS separates runs that could be one, and never mixes two.
    """
    code = deciding_code(Path(__file__).parent)
    return hashlib.sha256("\n".join(f"{key} {code[key]}" for key in sorted(code)).encode()).hexdigest()[:12]


def describe_run(settings: Settings, data: prepare.Dataset, device: str) -> dict:
    """The header of a record."""
    own = {name: value for name, value in constants_of(settings).items() if name not in MAY_CHANGE}
    own |= {"start": [f"{genome.key} {genome.summary}" for genome in settings.start]} if settings.start else {}
    data_is = {"data": data.source, "fingerprint": data.fingerprint, "vocab_size": data.vocab_size}
    return {**own, **data_is, "device": device, "torch": torch.__version__, "code": code_hash()}


# ----------------------------------------------------------------------------------------------------------------------
# The plan: what is evaluated next, a pure function of the rows. Lower val_bpb is better: `candidates` alone says so.

SEEDS = 100_000  # of evaluations, for one SEED: from 0 for the search and the baselines,
FINAL, LONG = SEEDS // 2, SEEDS * 3 // 4  # from here for the final and for its second step
ABLATION = SEEDS * 7 // 8  # and from here for what --ablate asks for
LINE = 5  # sizes that the tuning of a family begins with
TARGET_AT = (0.25, 0.375, 0.5, 0.75)  # shares of the budget at which the winner is scored, for the time that it needs


@dataclass(frozen=True)
class Candidate:
    """A genome that was scored, with every score it got in one stage."""

    id: str
    scores: tuple[float, ...]
    tried: int  # evaluations, those that failed included
    generation: int | None  # in which it was new
    genome: Genome
    first: Result  # its first evaluation with a score
    root: str = ""  # of a genome of the search: the random one that it descends from

    @functools.cached_property
    def mean(self) -> float:
        return statistics.fmean(self.scores)


@functools.lru_cache(maxsize=100_000)
def in_order(id: str) -> list:
    """A key that sorts g2.01 before g10.01."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", id)]


def candidates(rows: list[Result]) -> list[Candidate]:
    """Every genome that was scored, best first: by the mean of its scores.

    Not those that diverged, leaked or were dead with any seed, and not those that failed otherwise (out of memory,
    timeout, crash) more than once.
    """
    by_id, root = collections.defaultdict(list), roots(rows)
    for row in rows:
        by_id[row.id].append(row)
    found = []
    for name, group in by_id.items():
        ok = [row for row in group if row.status == "ok"]
        wrong = any(row.status in ("diverged", "leak", "dead") for row in group)
        if ok and not wrong and len(group) - len(ok) < 2:
            new_in = min((row.generation for row in group), key=lambda g: (g is not None, g))
            first = min(ok, key=lambda row: row.seed)
            scores = tuple(row.val_bpb for row in ok)
            genome = Genome.from_json(first.genome)
            found.append(Candidate(name, scores, len(group), new_in, genome, first, root.get(name, "")))
    return sorted(found, key=lambda c: (c.mean, in_order(c.id)))


def roots(rows: list[Result]) -> dict[str, str]:
    """The random genome that each newcomer descends from, of two parents by the first; an immigrant is its own."""
    found: dict[str, str] = {}
    for row in sorted((row for row in rows if row.is_newcomer), key=lambda row: in_order(row.id)):
        found[row.id] = found.get(row.parents.partition(",")[0], row.id)
    return found


def of_stage(rows: list[Result], stage: str) -> list[Result]:
    return [row for row in rows if row.stage == stage]


def searched(rows: list[Result]) -> list[Candidate]:
    return candidates(of_stage(rows, "search"))


def missing(tasks: list[Task], rows: list[Result], attempts: int = 1) -> list[Task]:
    """Those of the tasks that the rows lack, or that failed in fewer attempts than that."""
    done = collections.defaultdict(list)
    for row in rows:
        done[row.evaluation].append(row.status)
    earlier = [done[t.evaluation] for t in tasks]
    return [t for t, ends in zip(tasks, earlier, strict=True) if "ok" not in ends and len(ends) < attempts]


def is_small(genome: Genome, settings: Settings, vocab_size: int) -> bool:
    return genome.num_params(vocab_size) <= settings.max_params


@dataclass(frozen=True)
class Design:
    """A design of a family, by its traits: n_layer, dim, and those that the family has."""

    family: str
    traits: dict[str, object]

    @property
    def id(self) -> str:
        """As transformer-9x256-lr0.7-tied: layers x width, and what is not as usual."""
        own = {n: self.traits[n] for n, (usual, *_) in FAMILIES[self.family].traits.items() if self.traits[n] != usual}
        words = {name: name.partition("_")[0] for name in own}
        more = [words[n] if v is True else f"no-{words[n]}" if v is False else f"{words[n]}{v}" for n, v in own.items()]
        return "-".join([f"{self.family}-{self.traits['n_layer']}x{self.traits['dim']}", *more])

    @property
    def genome(self) -> Genome:
        return FAMILIES[self.family].design(**self.traits)

    def fitted(self, fits: Callable[["Design"], bool]) -> "Design | None":
        """Itself where it fits, else with its head tied, else with as few layers fewer as it takes."""
        for n_layer in range(self.traits["n_layer"], 0, -1):
            for tied in ({}, {"tied": True}) if "tied" in self.traits else ({},):
                design = Design(self.family, {**self.traits, "n_layer": n_layer, **tied})
                if fits(design):
                    return design
        return None

    def ways(self, trait: str) -> tuple:
        """Where to go from here: to fewer and to more, or where the choices are words to each other one."""
        words = [
            c for c in FAMILIES[self.family].traits.get(trait, ()) if isinstance(c, str) and c != self.traits[trait]
        ]
        return tuple(words) or (-1, 1)

    def neighbour(self, trait: str, way: int | str, step: int = 1) -> "Design":
        """With one trait so many layers or choices further; itself where there are none."""
        value = self.traits[trait]
        if isinstance(way, str):
            value = way
        elif trait == "n_layer":
            value = max(1, value + way * step)
        else:
            choices = sorted(WIDTHS if trait == "dim" else FAMILIES[self.family].traits[trait])
            value = choices[min(max(choices.index(value) + way * step, 0), len(choices) - 1)]
        return Design(self.family, {**self.traits, trait: value})


def sizes(family: str, fits: Callable[[Design], bool]) -> list[Design]:
    """A coarse line of LINE designs, from small to the largest that fits; [] where none does."""
    usual = {name: choices[0] for name, choices in FAMILIES[family].traits.items()}
    all_sizes = [Design(family, {"n_layer": max(1, dim // 64), "dim": dim, **usual}) for dim in WIDTHS]
    line = [size for size in all_sizes if fits(size)] or [size for size in [all_sizes[0].fitted(fits)] if size]
    if not line:
        return []
    deepest = line[-1]
    while fits(deeper := deepest.neighbour("n_layer", 1)):
        deepest = deeper
    line.append(deepest)
    return [line[round(i * (len(line) - 1) / (LINE - 1))] for i in range(LINE)]


def tuning(
    line: list[Design], first: list[str], scores: dict[str, float], fits: Callable[[Design], bool]
) -> Iterator[list[Design]]:
    """Rounds of designs that look for the best of a family; each is planned from the scores, by id, of those before.

    First the line. Then one trait after the other around the best: its neighbours on both sides, and on from the better
    one for as long as that helps. Over again, until none of them helps. Depth by two layers before by one: one layer
    alone makes less of a difference than noise may hide. `first` are the traits that come before depth.
    """

    def score(design):
        return scores.get(design.id, math.inf)

    yield line
    best, helped = min(line, key=score, default=None), bool(line)
    while helped:
        helped = False
        others = [(trait, 1) for trait in best.traits if trait not in first]
        for trait, step in (*((trait, 1) for trait in first), ("n_layer", 2), *others):
            ways = best.ways(trait)
            while ways:
                further = {way: best.neighbour(trait, way, step).fitted(fits) for way in ways}
                further = {way: design for way, design in further.items() if design}
                yield list(further.values())
                way = min(further, key=lambda way: score(further[way]), default=None)
                ways = ()
                if way and score(further[way]) < score(best):
                    best, ways, helped = further[way], (way,), True


def tuned(family: str, rows: list[Result], settings: Settings, vocab_size: int) -> tuple[list[Design], list[Design]]:
    """The designs of a family that its tuning has scored, best first, and those that it wants next; after its share of
    BASELINE_TRIALS at most it wants none."""

    def fits(design):
        try:
            return is_small(design.genome, settings, vocab_size)
        except GenomeError:  # too many genes
            return False

    first = [row for row in of_stage(rows, "baseline") if row.seed == settings.seed * SEEDS]
    scores = {row.id: row.val_bpb if row.status == "ok" else math.inf for row in first}
    kind, line, own = FAMILIES[family], [], []
    if kind.start in FAMILIES:
        found, lacking = tuned(kind.start, rows, settings, vocab_size)
        if lacking:
            return [], []
        own = [name for name in kind.traits if name not in FAMILIES[kind.start].traits]
        usual = {name: kind.traits[name][0] for name in own}
        for design in found[:1]:
            known = {name: value for name, value in design.traits.items() if name in ("n_layer", "dim", *kind.traits)}
            line = [d for d in [Design(family, known | usual).fitted(fits)] if d]
    trials, met = math.ceil(settings.baseline_trials * kind.effort), {}
    for designs in tuning(line or sizes(family, fits), own, scores, fits):
        new = {d.id: d for d in designs if d.id not in met}
        new = dict(itertools.islice(new.items(), trials - len(met)))
        met |= new
        if lacking := [design for name, design in new.items() if name not in scores]:
            return [], lacking
        if len(met) == trials:
            break
    return sorted((d for d in met.values() if scores[d.id] < math.inf), key=lambda d: scores[d.id]), []


def of_family(rows: list[Result], family: str) -> list[Candidate]:
    """The designs of a family that were scored as baselines, best first."""
    return [c for c in candidates(of_stage(rows, "baseline")) if family_of(c.id) == family]


def family_of(id: str) -> str | None:
    """The family that a design belongs to; None for what belongs to none."""
    name = id.partition("-")[0]
    return name if name in FAMILIES else None


def best_baselines(rows: list[Result]) -> list[Candidate]:
    """The best design of each family."""
    return [found[0] for family in FAMILIES if (found := of_family(rows, family))]


def best_baseline(rows: list[Result]) -> Candidate | None:
    """The best of all families."""
    return min(best_baselines(rows), key=lambda c: c.mean, default=None)


def baseline_tasks(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """What people build: families tuned in rounds, other kinds as they are; then the best repeated as survivors are."""

    def task(id: str, genome: Genome, k: int = 0) -> Task:
        seed = settings.seed * SEEDS + k
        return Task("baseline", id, genome, seed, seed)

    levels = {name: genome for name, genome in LEVELS.items() if not family_of(name) and settings.baseline_trials}
    others = [task(name, genome) for name, genome in levels.items() if is_small(genome, settings, vocab_size)]
    designs = [design for family in FAMILIES for design in tuned(family, rows, settings, vocab_size)[1]]
    if tasks := missing([*(task(d.id, d.genome) for d in designs), *others], rows):
        return tasks
    best = [c for family in FAMILIES for c in of_family(rows, family)[: settings.survivors]]
    return [task(c.id, c.genome, c.tried) for c in best if c.tried < settings.repeats]


# Who breeds. Each of these takes the genomes that were scored, best first, and gives a function that draws a parent.
# Newcomers that the hurdle stopped have no score, so that none of them is a parent; what they show of their parts
# counts all the same (see Belief).

Draw = Callable[[random.Random], Candidate]
TOURNAMENT = 5  # genomes that are drawn, half of all at most, of which the best becomes a parent
AGE = 60  # of the scored genomes the youngest, which breed by `aging`
PROTECTED = 2  # the best, which breed all the same
NEIGHBOURS = 10  # the most similar genomes, from which `novelty` measures how far one is
OBJECTIVES = {"val_bpb": 1, "params": 1, "tokens_per_s": -1, "memory_mb": 1}  # of `pareto`; 1: less is better
MARGIN = 0.05  # bits per byte behind the best, within which `novelty` and `pareto` look


def tournament(pool: list[Candidate], rank: Callable[[Candidate], float] = lambda c: c.mean) -> Draw:
    """The first by rank of some that are drawn (Goldberg & Deb 1991)."""
    size = min(TOURNAMENT, (len(pool) + 1) // 2)
    return lambda rng: min(rng.sample(pool, size), key=rank)


def elites(known: list[Candidate], settings: Settings) -> Draw:
    """One of the best (truncation selection; Muehlenbein & Schlierkamp-Voosen 1993)."""
    return lambda rng: rng.choice(known[: settings.survivors])


def aging(known: list[Candidate], settings: Settings) -> Draw:
    """A tournament among the youngest, so that luck is forgotten (Real et al. 2019), and the best."""
    young = sorted(known, key=lambda c: in_order(c.id))[-AGE:]
    return tournament(young + [c for c in known[:PROTECTED] if c not in young])


def lineages(known: list[Candidate], settings: Settings) -> Draw:
    """A tournament of the best of each root and each sequence of ops (species; Stanley & Miikkulainen 2002, NEAT)."""
    taken: set = set()
    kept = [c for c in known if not taken & {c.root, c.genome.ops} and not taken.update({c.root, c.genome.ops})]
    return tournament(kept)


def near_best(known: list[Candidate], least: int = 1) -> list[Candidate]:
    """Those within MARGIN of the best, so many at least."""
    return [c for i, c in enumerate(known) if i < least or c.mean <= known[0].mean + MARGIN]


def novelty(known: list[Candidate], settings: Settings) -> Draw:
    """A tournament by the mean distance to the most similar others (Lehman & Stanley 2011)."""
    far, pool = {}, near_best(known, settings.survivors)
    for c in pool:
        away = sorted(gene_distance(c.genome, other.genome) for other in known if other is not c)
        far[c.id] = statistics.fmean(away[:NEIGHBOURS] or [0.0])
    return tournament(pool, rank=lambda c: -far[c.id])


def gene_distance(a: Genome, b: Genome) -> float:
    """How unlike the genes of two networks are, from 0 to 1, in their order; distances aside."""
    return distance_of_words(a.words, b.words)


@functools.lru_cache(maxsize=1_000_000)
def distance_of_words(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    return 1 - difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def fronts(points: list[tuple[float, ...]]) -> list[int]:
    """The front of each point: 0 where no other is at least as low in all and lower in one; then without those, 1."""
    front, left, n = [0] * len(points), set(range(len(points))), 0
    while left:
        beaten = {i for i in left if any(points[j] != points[i] and
                  all(a <= b for a, b in zip(points[j], points[i], strict=True)) for j in left)}  # fmt: skip
        for i in left - beaten:
            front[i] = n
        left, n = beaten, n + 1
    return front


def crowding(points: list[tuple[float, ...]], front: list[int]) -> list[float]:
    """How far the neighbours of each point in its front are from each other, in shares of the width of that front,
    summed over the objectives; inf at its ends."""
    found = [0.0] * len(points)
    for n in set(front):
        members = [i for i in range(len(points)) if front[i] == n]
        for k in range(len(points[0])):
            line = sorted(members, key=lambda i: points[i][k])
            width = points[line[-1]][k] - points[line[0]][k]
            for i in (line[0], line[-1]):
                found[i] = math.inf
            for before, i, after in zip(line, line[1:], line[2:], strict=False):
                found[i] += (points[after][k] - points[before][k]) / width if width else 0.0
    return found


def objectives(c: Candidate) -> tuple[float, ...]:
    """All of them the lower the better; 0 where one was not measured, as memory on a CPU."""
    return tuple(sign * ((c.mean if name == "val_bpb" else getattr(c.first, name)) or 0)
                 for name, sign in OBJECTIVES.items())  # fmt: skip


def pareto(known: list[Candidate], settings: Settings) -> Draw:
    """Of two the one in the better front, or the less crowded (Deb et al. 2002, NSGA-II)."""
    pool = near_best(known, settings.survivors)
    points = [objectives(c) for c in pool]
    front = fronts(points)
    rank = list(zip(front, (-apart for apart in crowding(points, front)), strict=True))
    return lambda rng: pool[min(rng.sample(range(len(pool)), min(2, len(pool))), key=lambda i: rank[i])]


def lexicase(known: list[Candidate], settings: Settings) -> Draw:
    """Thirds of the window in random order: who is worse than the best by more than the median distance from the
    median drops out at each (La Cava et al. 2019, epsilon-lexicase)."""
    cases = [tuple(getattr(c.first, name) for c in known) for name in ("bpb_first", "bpb_middle", "bpb_last")]
    cases = [case for case in cases if all(x is not None and math.isfinite(x) for x in case)]
    cases = cases or [tuple(c.mean for c in known)]
    middle = [statistics.median(case) for case in cases]
    epsilon = [statistics.median(abs(x - m) for x in case) for case, m in zip(cases, middle, strict=True)]

    def draw(rng: random.Random) -> Candidate:
        pool = list(range(len(known)))
        for k in rng.sample(range(len(cases)), len(cases)):
            best = min(cases[k][i] for i in pool)
            pool = [i for i in pool if cases[k][i] <= best + epsilon[k]]
        return known[rng.choice(pool)]

    return draw


def cell(c: Candidate) -> tuple[str, int]:
    """Its mixer of tokens that stands there most often, and its size to the next power of two."""
    mixers = collections.Counter(op for op in c.genome.ops if OPS[op].mixes_tokens)
    return max(mixers, key=lambda op: (mixers[op], op), default=""), round(math.log2(c.first.params or 1))


def map_elites(known: list[Candidate], settings: Settings) -> Draw:
    """The best of a cell, any of them (Mouret & Clune 2015)."""
    best: dict = {}
    for c in known:
        best.setdefault(cell(c), c)
    return lambda rng: rng.choice(list(best.values()))


def drift(known: list[Candidate], settings: Settings) -> Draw:
    """Any: a control, which selects nothing."""
    return lambda rng: rng.choice(known)


SELECTION = {f.__name__: f for f in (elites, aging, lineages, novelty, pareto, lexicase, map_elites, drift)}


def hurdle_after(earlier: list[Result], settings: Settings) -> tuple[float, ...]:
    """For each of RUNGS the outlook that a newcomer must not exceed: that of the last in the best share of all so far.

    () where there is no hurdle: in the first generation, and under drift, which knows no better or worse.
    """
    newcomers = [row for row in earlier if row.is_newcomer and row.status in ("ok", "stopped")]
    if settings.hurdle == 1 or settings.strategy == "drift" or not newcomers:
        return ()
    limits = []
    for tenth, times in RUNGS:
        outlooks = sorted(outlook(row.loss_of(tenth), row.tokens_per_s or 1, settings) for row in newcomers)
        best = math.ceil(min(1.0, times * settings.hurdle) * len(outlooks) - 1e-9)  # 0.28 * 25 is a little over 7
        limits.append(outlooks[max(1, best) - 1])
    return tuple(limits)


# What is tried. The space is wide and an evaluation is dear, but a child costs a millisecond: for each place many are
# bred, and the record, so far as it goes, is asked which one to train.

WEIGHT = 0.025  # bits per byte that a part is worth, before anything is known of it: a standard deviation, as all below
LIKENESS = 0.05  # of what is no sum of parts, and shared by genomes as far as they are alike
MISFIT = 0.01  # of what is neither, and each genome's own
LEVEL = 0.3  # of the level of all scores
NOISE = 0.0025  # of an evaluation
SPREAD = 0.3  # of a draw, times the posterior's deviation; 0: the mean, by which nothing new is worth trying
NEAR = 0.06  # above the best, about where scores begin to count by their logarithm: see `squeezed`


@functools.lru_cache(maxsize=5_000)
def parts(genome: Genome, vocab_size: int) -> dict[tuple, float]:
    """What a network consists of, by name, each on a scale on which it may be worth about as much as the others.

    Ops and how often they stand there; choices of traits that are not the usual ones; pairs of ops in a row, norms
    aside; what stands before the first attention; depth, width, size, ops with no residual of their own, ops on means
    of tokens; and how it is trained.
    """
    found: dict[tuple, float] = {}
    genes = collections.defaultdict(list)
    for node in genome.network:
        genes[node.gene.op].append(node)
    for op, nodes in genes.items():
        found[op,] = 1.0
        found[op, "times"] = 0.7 * math.log2(len(nodes))
        unusual = collections.Counter(choice for node in nodes for choice in node.gene.unusual)
        found |= {(op, *choice): 0.5 + 0.5 * times / len(nodes) for choice, times in unusual.items()}
    line = ["", *(op for op in genome.ops if op != "norm"), ""]
    for pair in itertools.pairwise(line):
        found[("pair", *pair)] = 0.35
    if "attention" in line:
        for op in line[1 : line.index("attention")]:
            found["before attention", op] = 0.5
    sized = [node.d_out for node in genome.network if node.gene.dim]
    branches = sum(node.skip is not None for node in genome.network)
    scales = {
        "depth": branches / 4,
        "width": 2 * statistics.fmean(math.log2(d / 256) for d in sized or [256]),
        "embedding": math.log2(genome.embed_dim / 256),
        "rate": math.log2(genome.lr_factor),
    }
    for name, x in scales.items():
        found[name,], found[name, "squared"] = x, 0.5 * x * x
    alone = [node for node in genome.network if node.skip is None and node.gene.op not in ("norm", "identity")]
    found["no residual",] = float(len(alone))
    found["narrowest",] = math.log2(min([genome.embed_dim, *(node.d_out for node in genome.network)]) / 256)
    found["strided",] = float(sum(node.gene.stride > 1 for node in genome.network))
    found["size",] = math.log2(genome.num_params(vocab_size) / 5e6)
    found["tied",] = float(genome.tied)
    return found


@functools.lru_cache(maxsize=5_000)
def pieces(genome: Genome) -> tuple:
    """What is compared where two networks are: each gene as it is, each two ops in a row, and the genome's own traits;
    with a number each, so that what stands there twice is two pieces."""
    genes = [node.gene for node in genome.network]
    numbered, times = [], collections.Counter()
    for piece in (*genes, *itertools.pairwise(["", *genome.ops]), (genome.embed_dim, genome.tied, genome.lr_factor)):
        times[piece] += 1
        numbered.append((piece, times[piece]))
    return tuple(numbered)


class Evidence(NamedTuple):
    """What one evaluation showed: the score of a genome, squeezed, and how uncertain that is."""

    id: str
    genome: Genome
    score: float
    noise: float


def squeezed(score: float, best: float) -> float:
    """Bits per byte, as they are near the best, and by their logarithm far above it: a bad network says which parts are
    bad, but one at 2.3 must not count for more than all differences between good ones."""
    return best + NEAR * math.log1p(max(0.0, score - best) / NEAR)


def evidence(rows: list[Result], settings: Settings) -> list[Evidence]:
    """What the search has shown so far; in an order that does not depend on which evaluation ended first.

    Who was stopped at the hurdle is taken at what its outlook says there: a line through the others' scores. What
    diverged or failed counts as a bit per byte above the best. All scores are squeezed.
    """
    rows = sorted(of_stage(rows, "search"), key=lambda row: (in_order(row.id), row.seed))
    scored = [row for row in rows if row.status == "ok"]
    if not scored:
        return []
    best, found = min(row.val_bpb for row in scored), []

    @functools.cache
    def line(tenth: int) -> tuple[float, float, float] | None:
        return line_at(tenth, scored, best, settings)

    for row in rows:
        score, noise = None, NOISE
        if row.status == "ok":
            score = squeezed(row.val_bpb, best)
        elif row.status not in ("stopped", "stalled"):
            score, noise = squeezed(best + 1, best), NEAR
        elif row.status == "stopped" and (known := line(row.whole_tenth)):
            slope, level, noise = known
            at = outlook(row.loss_of(row.whole_tenth), row.tokens_per_s or 1, settings)
            score = max(best, level + slope * at)  # who was stopped is not the best
        if score is not None:
            found.append(Evidence(row.id, Genome.from_json(row.genome), score, noise))
    return found


def line_at(tenth: int, scored: list[Result], best: float, settings: Settings) -> tuple[float, float, float] | None:
    """How squeezed scores go with the outlook after a tenth: slope and level of a line, and what they are off it.

    None where too few are known.
    """
    known = [(outlook(r.loss_of(tenth), r.tokens_per_s or 1, settings), r.val_bpb) for r in scored] if tenth else []
    known = [(x, squeezed(y, best)) for x, y in known if x < math.inf]
    if len({x for x, _ in known}) < 3:
        return None
    slope, level = statistics.linear_regression(*zip(*known, strict=True))
    off = statistics.fmean((level + slope * x - y) ** 2 for x, y in known) ** 0.5
    return slope, level, max(NOISE, off)


class Belief:
    """What the record says of a genome: Bayesian linear regression of scores on parts, and what is no sum by likeness.

    Every weight is normal a priori. So is what a genome is off the sum of its parts: some of that is its own, alike in
    all its evaluations, and some is shared by genomes that are alike, as much as they have pieces in common (Tanimoto's
    kernel: Ralaivola et al. 2005). So what is good in a parent and no part of it is handed on to children that keep
    most of it.

    What matters is the draw (Thompson 1933; Russo et al. 2018): weights that are not known yet vary most, so that a new
    part is tried early, and dropped once the record speaks against it. In the search of architectures after White et
    al. 2021, BANANAS.
    """

    def __init__(self, seen: list[Evidence], vocab_size: int):
        self.vocab_size = vocab_size
        ids = {s.id: i for i, s in enumerate(seen)}
        own = np.array([ids[s.id] for s in seen])  # a number that evaluations of one genome share
        known = [parts(s.genome, vocab_size) for s in seen]
        self.names = {name: i for i, name in enumerate(dict.fromkeys(name for found in known for name in found))}
        self.X = np.stack([self.vector(found) for found in known])  # (evaluations, parts)
        made_of = [pieces(s.genome) for s in seen]
        self.place = {piece: i for i, piece in enumerate(dict.fromkeys(itertools.chain(*made_of)))}
        self.sizes = np.array([len(found) for found in made_of])
        self.has = np.zeros((len(self.place), len(seen)), dtype=bool)  # (pieces, evaluations)
        for i, found in enumerate(made_of):
            self.has[[self.place[piece] for piece in found], i] = True
        alike = np.stack([self.likeness(s.genome) for s in seen])
        scores, noise = np.array([s.score for s in seen]), np.array([s.noise for s in seen])
        self.y = scores - scores.mean()
        rest = LEVEL**2 + LIKENESS**2 * alike + MISFIT**2 * (own[:, None] == own) + np.diag(noise**2)
        self.root, self.rest_precision = np.linalg.cholesky(rest), np.linalg.inv(rest)
        self.precision = np.linalg.inv(WEIGHT**2 * self.X @ self.X.T + rest)

    def vector(self, found: dict[tuple, float]) -> np.ndarray:
        x = np.zeros(len(self.names))
        for name, value in found.items():
            if name in self.names:
                x[self.names[name]] = value
        return x

    def likeness(self, genome: Genome) -> np.ndarray:
        """(evaluations,): how much of a genome and of each that was evaluated is the same, from 0 to 1."""
        found = pieces(genome)
        common = self.has[[self.place[piece] for piece in found if piece in self.place]].sum(0)
        return common / (len(found) + self.sizes - common)

    def draw(self, rng: np.random.Generator, spread: float = 1.0) -> Callable[[Genome], float]:
        """One set of weights from the posterior, as a function from a genome to its score, up to a constant.

        By Matheron's rule: a draw from the prior, put right by what it would have seen. A part that the record lacks
        keeps its draw from the prior. What these weights leave unexplained is expected by likeness, and not drawn.
        spread: of the posterior's standard deviation; 0 is its mean.
        """
        n, p = self.X.shape
        weights, rest = spread * WEIGHT * rng.standard_normal(p), spread * (self.root @ rng.standard_normal(n))
        weights += WEIGHT**2 * self.X.T @ (self.precision @ (self.y - self.X @ weights - rest))
        unexplained = LIKENESS**2 * self.rest_precision @ (self.y - self.X @ weights)
        new: dict[tuple, float] = {}

        def score(genome: Genome) -> float:
            found = parts(genome, self.vocab_size)
            unknown = [name for name in found if name not in self.names]
            for name in unknown:
                if name not in new:
                    new[name] = spread * WEIGHT * rng.standard_normal()
            drawn = weights @ self.vector(found) + sum(new[name] * found[name] for name in unknown)
            return float(drawn + self.likeness(genome) @ unexplained)

        return score


class Newborn(NamedTuple):
    genome: Genome
    operator: str
    parents: tuple[str, ...]


def child_of(draw: Draw | None, settings: Settings, rng: random.Random) -> Newborn:
    """A child of one parent or of two that are drawn; without a draw a random genome."""
    if draw is None:
        return Newborn(random_genome(rng), "random", ())
    parent = draw(rng)
    if rng.random() < settings.crossover_rate:
        others = (other for other in (draw(rng) for _ in range(10)) if other.id != parent.id)
        if other := next(others, None):
            genome, operator = crossover(parent.genome, other.genome, rng)
            if rng.random() < settings.mutation_rate:
                genome, mutation = mutate(genome, rng, 0.0)
                operator = f"{operator}+{mutation}"
            return Newborn(genome, operator, (parent.id, other.id))
    genome, operator = mutate(parent.genome, rng, settings.mutation_rate)
    return Newborn(genome, operator, (parent.id,))


def breed(rows: list[Result], generation: int, settings: Settings, vocab_size: int) -> list[Task]:
    """The evaluations of a generation, from what came before it: survivors again with a new seed, then newcomers."""
    rng = random.Random(f"{settings.seed}/{generation}")
    earlier = [row for row in of_stage(rows, "search") if row.generation < generation]
    known = searched(earlier)
    base = settings.seed * SEEDS
    seed, hurdle = base + generation, hurdle_after(earlier, settings)
    repeats = [c for c in known[: settings.survivors] if c.tried < settings.repeats]
    tasks = [Task("search", c.id, c.genome, seed, base + c.tried, generation, operator="repeat") for c in repeats]
    draw = SELECTION[settings.strategy](known, settings) if known and settings.strategy in SELECTION else None
    chooses = draw and settings.prescreen > 1 and settings.strategy != "drift"  # controls choose nothing
    belief = Belief(evidence(earlier, settings), vocab_size) if chooses else None
    met = {row.key for row in earlier}

    def new(who: Draw | None) -> Newborn:
        for _ in range(100_000):
            child = child_of(who, settings, rng)
            if (
                is_small(child.genome, settings, vocab_size)
                and child.genome.mixes_tokens
                and child.genome.key not in met
            ):
                return child
        raise Stop(f"No new genome under MAX_PARAMS = {settings.max_params:,} was found; raise it")

    newcomers = settings.population_size - len(repeats)
    for n in range(newcomers):
        who = None if n >= newcomers - settings.immigrants else draw
        if generation == 0 and n < len(settings.start):
            born = Newborn(settings.start[n], "start", ())
        elif belief is None:
            born = new(who)
        else:
            score = belief.draw(np.random.default_rng(rng.getrandbits(64)), SPREAD)
            born = min((new(who) for _ in range(settings.prescreen)), key=lambda born, score=score: score(born.genome))
        met.add(born.genome.key)
        spared = rng.random() < settings.hurdle_sample
        is_immigrant = born.operator == "random" and settings.strategy != "random"
        limits = dict(hurdle=() if is_immigrant else hurdle, spared=spared)
        name = f"g{generation}.{n + 1:02d}"
        tasks.append(Task("search", name, born.genome, seed, base, generation, born.parents, born.operator, **limits))
    return tasks


def search_tasks(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """What is left of the first generation that is not complete."""
    done = collections.Counter(
        generation for generation, _ in {(r.generation, r.evaluation) for r in of_stage(rows, "search")}
    )
    for generation in range(settings.max_generations):
        if done[generation] < settings.population_size:
            return missing(breed(rows, generation, settings, vocab_size), rows)
    return []


def finalists(rows: list[Result], settings: Settings) -> list[Candidate]:
    """The best genomes of the search."""
    return searched(rows)[: settings.finalists]


def final_evaluations(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """The final: the finalists and the best design of each family, at the search's own budget, with fresh seeds."""
    best = finalists(rows, settings)
    chosen = [*best, *best_baselines(rows)] if best else []
    first = settings.seed * SEEDS + FINAL  # seeds that the search never used, the same for all
    return [
        Task("final", c.id, c.genome, first + n, first + n, test=True)
        for n in range(settings.final_seeds)
        for c in chosen
    ]


def ranking(rows: list[Result], tasks: list[Task]) -> dict[str, list[Result]]:
    """What those in a final reached, task by task, the best first; empty before all of it is done.

    Ranked by val, so that the test score of the first is not picked as the best of several (as both are of the same
    models, it is still up to 0.001 too good). Designs of the search that failed with a seed come last; a baseline keeps
    its place, or the winner would have a weaker rival. Who has no score at all is left out.
    """
    if missing(tasks, rows, attempts=2):
        return {}
    done = {row.evaluation: row for row in rows}  # of two attempts the later one
    results = collections.defaultdict(list)
    for task in tasks:
        results[task.id].append(done[task.evaluation])
    place = {}
    for id, own in results.items():
        scores = [row.val_bpb for row in own if row.status == "ok"]
        if scores:
            place[id] = (len(scores) < len(own) and not family_of(id), statistics.fmean(scores))
    return {id: results[id] for id in sorted(place, key=place.get)}


def first_two(rows: list[Result], settings: Settings, vocab_size: int) -> tuple[list[Result], list[Result]] | None:
    """What the winner, the best finalist, and its rival, the best baseline, reached in the final; None before that."""
    order = ranking(rows, final_evaluations(rows, settings, vocab_size))
    evolved = [results for id, results in order.items() if not family_of(id)]
    by_hand = [results for id, results in order.items() if family_of(id)]
    return (evolved[0], by_hand[0]) if evolved and by_hand else None


def scores_of(rows: list[Result]) -> dict[tuple, float]:
    """val_bpb by evaluation."""
    return {row.evaluation: row.val_bpb for row in rows if row.status == "ok"}


def test_scores(results: list[Result]) -> list[float]:
    return [row.test_bpb for row in results if row.status == "ok"]


def target_evaluations(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """The winner after shares of the budget, with the final's seeds: when does it reach what its rival reaches?

    None where it does not reach that in the whole budget either.
    """
    both = first_two(rows, settings, vocab_size)
    if both is None or min(test_scores(both[0])) > statistics.fmean(test_scores(both[1])):
        return []
    genome = Genome.from_json(both[0][0].genome)
    return [
        Task("target", row.id, genome, row.seed, row.order, budget=share, test=True)
        for share in TARGET_AT
        for row in both[0]
    ]


def growth(genome: Genome, times: int, settings: Settings, vocab_size: int) -> Genome:
    """The design grown, with its head tied where that makes room. Raises GenomeError where it cannot grow."""
    design = grown(genome, times)
    for same in (design, dataclasses.replace(design, tied=True)):
        if is_small(same, settings, vocab_size):
            return same
    raise GenomeError(f"{same.num_params(vocab_size):,} parameters with its head tied, over MAX_PARAMS")


def grow_evaluations(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """One evaluation each at LONG_FACTOR times the budget, to choose who takes part in the long final.

    The finalists and the best design of each family as they are, and grown one step at a time until one more is no
    better or does not fit.
    """
    if not settings.long_seeds or first_two(rows, settings, vocab_size) is None:
        return []
    seed, scores = settings.seed * SEEDS + LONG, scores_of(rows)

    def sizes(c: Candidate) -> Iterator[Task]:
        yield Task("grow", c.id, c.genome, seed, seed, budget=settings.long_factor)
        for times in itertools.count(1):
            try:
                genome = growth(c.genome, times, settings, vocab_size)
            except GenomeError:
                return
            yield Task("grow", f"{c.id}+{times}", genome, seed, seed, parents=(c.id,), budget=settings.long_factor)

    tasks = []
    for c in [*finalists(rows, settings), *best_baselines(rows)]:
        best = math.inf
        for task in sizes(c):
            tasks.append(task)
            score = scores.get(task.evaluation, math.inf)
            if task.parents and not score < best < math.inf:
                break
            best = score
    return tasks


def long_evaluations(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """The long final: the winner as found, the best of the grown, and of each family what grew best. Fresh seeds."""
    both, trials = first_two(rows, settings, vocab_size), grow_evaluations(rows, settings, vocab_size)
    if both is None or not trials or missing(trials, rows, attempts=2):
        return []
    scores = scores_of(rows)
    chosen = [next(task for task in trials if task.id == both[0][0].id)]
    kinds = [lambda task: not family_of(task.id) and task.parents]
    kinds += [lambda task, family=family: family_of(task.id) == family for family in FAMILIES]
    for is_kind in kinds:
        known = [task for task in trials if is_kind(task) and task.evaluation in scores]
        chosen += sorted(known, key=lambda task: scores[task.evaluation])[:1]
    first = settings.seed * SEEDS + LONG + 1
    return [
        dataclasses.replace(task, stage="long", seed=first + n, order=first + n, test=True)
        for n in range(settings.long_seeds)
        for task in chosen
    ]


def passes_evaluations(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """Winner and baselines on so little text that they see it as often in the budget as all of it in the long final.

    None where nobody saw any of it twice there.
    """
    both = first_two(rows, settings, vocab_size)
    long = {task.evaluation for task in long_evaluations(rows, settings, vocab_size)}
    if both is None or max((row.passes or 0 for row in rows if row.evaluation in long), default=0) <= 1:
        return []
    name, seeds = both[0][0].id, [row.seed for row in both[0]][: settings.long_seeds]
    final, share = final_evaluations(rows, settings, vocab_size), 1 / settings.long_factor
    chosen = [task for task in final if task.seed in seeds and (task.id == name or family_of(task.id))]
    return [dataclasses.replace(task, stage="passes", text=share) for task in chosen]


def once_more(evaluations: Callable[..., list[Task]]) -> Callable[..., list[Task]]:
    """A stage of those evaluations, of which one that fails is tried once more."""
    return lambda rows, *rest: missing(evaluations(rows, *rest), rows, attempts=2)


STAGES = {
    "baseline": baseline_tasks,
    "search": search_tasks,
    "final": once_more(final_evaluations),
    "target": once_more(target_evaluations),
    "grow": once_more(grow_evaluations),
    "long": once_more(long_evaluations),
    "passes": once_more(passes_evaluations),
}
FINALS = ("final", "long", "passes")  # the stages that compare designs seed by seed


def next_tasks(rows: list[Result], settings: Settings, vocab_size: int) -> list[Task]:
    """What is to be evaluated next, all of one stage; [] when the run is finished. A pure function of its arguments."""
    return next((tasks for stage in STAGES.values() if (tasks := stage(rows, settings, vocab_size))), [])


def ablation_tasks(rows: list[Result], genome: Genome, settings: Settings) -> list[Task]:
    """What --ablate still wants: a design whole and without each of its parts, ABLATION_SEEDS times each.

    Beside the plan: a stage that next_tasks neither asks for nor looks at. Ids are keys, as the file that names the
    design may be of another run.
    """
    first = settings.seed * SEEDS + ABLATION
    tasks = []
    for n in range(first, first + settings.ablation_seeds):
        tasks.append(Task("ablate", genome.key, genome, n, n, operator="whole"))
        for what, less in without_a_part(genome).items():
            tasks.append(Task("ablate", less.key, less, n, n, parents=(genome.key,), operator=what))
    return missing(tasks, rows, attempts=2)


# ----------------------------------------------------------------------------------------------------------------------
# The report: texts, best_genome.json, progress.png and report.md, all of them functions of the rows.

T_95 = (  # by degrees of freedom, from 1
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval (Student 1908)."""

    mean: float
    half: float | None  # half the width of the interval; None for one value
    values: tuple[float, ...]

    def __str__(self):
        return f"{self.mean:.4f} ± {'?' if self.half is None else f'{self.half:.4f}'}"


def estimate(values) -> Estimate:
    values = tuple(values)
    if len(values) < 2:
        return Estimate(values[0], None, values)
    half = student(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), half, values)


def student(n: int) -> float:
    """How many standard errors half a 95 % interval is, of n values."""
    return T_95[n - 2] if n <= 31 else 1.96 + 2.4 / (n - 1)


def deviation(groups) -> float | None:
    """Pooled standard deviation within groups of values; None where none has two."""
    groups = [g for g in groups if len(g) > 1]
    squares = sum(statistics.variance(g) * (len(g) - 1) for g in groups)
    return math.sqrt(squares / sum(len(g) - 1 for g in groups)) if groups else None


def noise_floor(rows: list[Result]) -> float | None:
    """Pooled standard deviation between evaluations of one genome, in bits per byte; None before there are two."""
    return deviation(c.scores for c in searched(rows))


@dataclass(frozen=True)
class Standing:
    """What a design reached in a final."""

    id: str
    genome: Genome
    test: Estimate
    val: Estimate
    passes: float  # over the training text
    failed: int  # evaluations that were not ok
    leads: dict[str, Estimate]  # by baseline, the best first: its test_bpb minus this one's, seed by seed


def standings(rows: list[Result], tasks: list[Task]) -> list[Standing]:
    """Everyone in a final, best first; empty before all of it is done. Its leads are over the baselines in it."""
    order, table = ranking(rows, tasks), []
    baselines = [id for id in order if family_of(id)]
    for id, results in order.items():
        ok, leads = [r for r in results if r.status == "ok"], {}
        for name in baselines if id not in baselines else ():
            theirs = {r.seed: r for r in order[name]}
            pairs = [(theirs[own.seed], own) for own in ok if own.seed in theirs and theirs[own.seed].status == "ok"]
            if pairs:
                leads[name] = estimate(other.test_bpb - own.test_bpb for other, own in pairs)
        test, val = estimate(r.test_bpb for r in ok), estimate(r.val_bpb for r in ok)
        passes = statistics.fmean(r.passes or 0 for r in ok)
        table.append(Standing(id, Genome.from_json(ok[0].genome), test, val, passes, len(results) - len(ok), leads))
    return table


@dataclass(frozen=True)
class Outcome:
    """What came of a run: its finals, as far as they are done, and the time that the winner needs."""

    final: list[Standing]
    long: list[Standing]  # at LONG_FACTOR times the budget
    passes: list[Standing]  # at the budget, on 1 / LONG_FACTOR of the text
    too_large: dict[str, str]  # the grown designs that were not tried, and why
    # the share of the budget that the winner needs, None where a seed did not get there; how many did. None: unknown
    target: tuple[Estimate | None, int] | None

    @property
    def winner(self) -> Standing | None:
        """The best of the final that evolved."""
        return next((s for s in self.final if not family_of(s.id)), None)

    @property
    def rival(self) -> Standing | None:
        """The best of the final that people build."""
        return next((s for s in self.final if family_of(s.id)), None)

    @property
    def as_found(self) -> Standing | None:
        """The winner in the long final."""
        return next((s for s in self.long if s.id == self.winner.id), None)

    @property
    def on_less_text(self) -> Standing | None:
        """The winner on less text."""
        return next((s for s in self.passes if s.id == self.winner.id), None)

    @property
    def grown(self) -> Standing | None:
        """The best of the long final that evolved and was grown."""
        return next((s for s in self.long if not family_of(s.id) and "+" in s.id), None)


def outcome(rows: list[Result], settings: Settings, vocab_size: int) -> Outcome:
    stages = (final_evaluations, long_evaluations, passes_evaluations)
    final, long, passes = (standings(rows, stage(rows, settings, vocab_size)) for stage in stages)
    scores = {row.id: row.val_bpb for row in of_stage(rows, "grow") if row.status == "ok"}
    too_large, tried = {}, {task.id for task in grow_evaluations(rows, settings, vocab_size)}
    for c in [*finalists(rows, settings), *best_baselines(rows)] if long else ():
        times = next(n for n in itertools.count(1) if f"{c.id}+{n}" not in tried)
        last, before = (scores.get(f"{c.id}+{n}" if n else c.id, math.inf) for n in (times - 1, times - 2))
        if times > 1 and not last < before < math.inf:  # one more was no better: there was no need of another
            continue
        try:
            growth(c.genome, times, settings, vocab_size)
        except GenomeError as error:
            too_large[f"{c.id}+{times}"] = str(error)
    return Outcome(final, long, passes, too_large, time_to_target(rows, settings, vocab_size))


def time_to_target(rows: list[Result], settings: Settings, vocab_size: int) -> tuple[Estimate | None, int] | None:
    """The share of its budget that the winner needs to reach what its rival reaches in the whole, on test.

    Seed by seed, between two runs by interpolation over the logarithm of the budget. Returns it, None where a seed did
    not get there, with the number of seeds that did; None before that is known.
    """
    both, tasks = first_two(rows, settings, vocab_size), target_evaluations(rows, settings, vocab_size)
    if both is None or missing(tasks, rows, attempts=2):
        return None
    if not tasks:  # not in the whole budget
        return None, 0
    target, shares = statistics.fmean(test_scores(both[1])), []
    names = {task.evaluation for task in tasks}
    shorter = [row for row in rows if row.evaluation in names]
    seeds = [row.seed for row in both[0]]
    for seed in seeds:
        curve = sorted((r.budget, r.test_bpb) for r in [*shorter, *both[0]] if r.seed == seed and r.status == "ok")
        shares += crossing(curve, target)
    return (estimate(shares) if len(shares) == len(seeds) else None), len(shares)


def crossing(curve: list[tuple[float, float]], target: float) -> list[float]:
    """Where a falling curve of (budget, score) first reaches the target; [] where it does not.

    Between points straight over the logarithm of the budget; before the first point it is not looked for.
    """
    for n, (budget, score) in enumerate(curve):
        if score <= target:
            if not n:
                return [budget]
            before, worse = curve[n - 1]
            part = (worse - target) / (worse - score)
            return [before * (budget / before) ** part]
    return []


def lineage(rows: list[Result], name: str) -> list[Result]:
    """The first evaluations of a genome's ancestors, oldest first, itself last."""
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
    return sorted(found.values(), key=lambda r: in_order(r.id))


def leaders_by_generation(rows: list[Result], n: int) -> list[set[str]]:
    """The ids of the n best as they stood after each generation."""
    by_generation = collections.defaultdict(list)
    for row in of_stage(rows, "search"):
        by_generation[row.generation].append(row)
    own, known, leaders = collections.defaultdict(list), {}, []
    for generation in range(max(by_generation, default=-1) + 1):
        for row in by_generation[generation]:
            own[row.id].append(row)
        changed = {row.id for row in by_generation[generation]}
        known = {id: c for id, c in known.items() if id not in changed}
        known |= {c.id: c for c in candidates([row for id in changed for row in own[id]])}
        best = sorted(known.values(), key=lambda c: (c.mean, in_order(c.id)))
        leaders.append({c.id for c in best[:n]})
    return leaders


def score_text(val_bpb: float | None) -> str:
    return "—" if val_bpb is None else f"{val_bpb:.4f}"


def made_by_text(r: Result) -> str:
    """The operators that made a genome, of many the first two."""
    names = r.operator.split("+")
    return "+".join([*names[:2], *([f"{len(names) - 2} more"] if len(names) > 2 else [])])


def result_text(r: Result) -> str:
    """An evaluation in a line."""
    test = f"  test {r.test_bpb:.4f}" if r.test_bpb is not None else ""
    speed = r.tokens_per_s or 0
    speed = f"{speed / 1e6:6.2f} M tok/s" if speed >= 1e5 else f"{speed / 1e3:6.1f} k tok/s"
    note = f"  [{r.note}]" if r.note else ""
    what = made_by_text(r) or r.stage
    return (f"{r.id:<24} {r.status:<8}{score_text(r.val_bpb):>8}  {(r.params or 0) / 1e6:6.2f} M  {speed}  "
            f"{what:<16}  {r.summary}{test}{note}")  # fmt: skip


HEADINGS = {  # what the console says where a stage begins
    "baseline": "Baselines: what people build, tuned for this budget",
    "search": "The search",
    "final": "The final: fresh seeds, scored on test too",
    "target": "The winner after parts of the budget: when does it reach what its rival reaches?",
    "grow": "A longer budget, for which designs may grow (+1, +2): one trial each to choose",
    "long": "The final at the longer budget: fresh seeds",
    "passes": "The usual budget on less text, seen as often as in the longer one",
    "ablate": "The design whole and without each of its parts",
}


def stage_text(rows: list[Result], task: Task) -> str:
    """How things stand after the generation or the round of a task; nothing in the final."""
    if task.stage == "baseline":
        best = best_baselines(rows)
        return "  ".join(["baselines:", *(f"{c.id} {c.mean:.4f}" for c in best)]) + "\n" if best else ""
    if task.stage != "search":
        return ""
    mine = [r for r in of_stage(rows, "search") if r.generation == task.generation]
    scores = [r.val_bpb for r in mine if r.status == "ok"]
    best, noise = next(iter(searched(rows)), None), noise_floor(rows)
    parts = [f"generation {task.generation}:"]
    if best:
        n = len(best.scores)
        parts.append(f"best {best.mean:.4f} ({best.id}{f', mean of {n}' if n > 1 else ''})")
    parts.append(f"median {statistics.median(scores):.4f}" if scores else "no score")
    parts.append(f"noise {noise:.4f}" if noise is not None else "noise not yet known")
    failed = collections.Counter(r.status for r in mine if r.status != "ok")
    parts += [f"{n} {status}" for status, n in failed.items()]
    return "  ".join(parts) + "\n"


def budget_times(settings: Settings, factor: float) -> str:
    """A share or a multiple of the budget in words."""
    if settings.token_budget:
        return f"{round(settings.token_budget * factor):,} tokens"
    return f"{float(f'{settings.time_budget * factor:.3g}'):g} s"


def target_text(o: Outcome, settings: Settings) -> str:
    """The time to target in a sentence."""
    if not (o.winner and o.rival and o.target):
        return ""
    what = f"what {o.rival.id} reaches in {budget_times(settings, 1)}"
    share, reached = o.target
    if share is None:
        return f"{o.winner.id} does not reach {what} with every seed ({reached} of {settings.final_seeds} did)"
    least = "at most " if min(share.values) <= TARGET_AT[0] else ""  # there it was not measured when
    of = "tokens" if settings.token_budget else "time"
    return f"{o.winner.id} needs {least}{budget_times(settings, share.mean)} for {what}: {share} of the {of}"


def end_text(rows: list[Result], settings: Settings, vocab_size: int, controls: Controls, out: Path) -> str:
    """What came of a run that is finished, in short, and where the rest is."""
    o = outcome(rows, settings, vocab_size)
    if o.winner is None:
        best = next(iter(searched(rows)), None)
        if best and not settings.finalists:
            return f"\nThe best of the search is {best.id}, {best.mean:.4f}; FINALISTS = 0: no final confirms it"
        return "\nNo genome was scored in a final; see the status column of results.tsv"
    files = (
        f"{out / 'report.md'} tells the rest, {out / 'progress.png'} shows it, {out / 'best_genome.json'} is the design"
    )
    return "\n".join(["", *answer(rows, settings, controls, o), "", files])


def best_genome(rows: list[Result], header: dict, settings: Settings, o: Outcome) -> dict | None:
    """What best_genome.json holds: the winner of the final, before it the best of the search, and how to check it."""
    found = searched(rows)
    if not found:
        return None

    def standing(s: Standing | None) -> dict | None:
        if s is None:
            return None
        own = {name: value for name, value in dataclasses.asdict(s).items() if name != "genome"}
        return {**own, "summary": s.genome.summary, "genome": json.loads(s.genome.to_json())}

    def by_hand(table: list[Standing]) -> list[dict]:
        return [standing(s) for s in table if family_of(s.id)]

    best = next(c for c in found if not o.winner or c.id == o.winner.id)
    family = lineage(rows, best.id)
    result = {"stage": "search", "note": "the best of the search so far; its score is not yet confirmed by the final"}
    if o.winner:
        share, reached = o.target or (None, None)
        result = {
            "stage": "final",
            "final": {"winner": standing(o.winner), "baselines": by_hand(o.final)},
            "time_to_target": {"share_of_budget": share and dataclasses.asdict(share), "seeds_that_reach_it": reached},
            "long": {
                "budget_factor": settings.long_factor,
                "as_found": standing(o.as_found),
                "grown": standing(o.grown),
                "baselines": by_hand(o.long),
            },
            "passes": {
                "share_of_text": 1 / settings.long_factor,
                "winner": standing(o.on_less_text),
                "baselines": by_hand(o.passes),
            },
        }
    shown = ("generation", "id", "parents", "operator", "val_bpb", "params", "summary")
    rival = o.rival or best_baseline(rows)
    return {
        "id": best.id,
        "summary": best.genome.summary,
        "genome": json.loads(best.genome.to_json()),
        "search_val_bpb": list(best.scores),
        **result,
        "rival": rival and {"id": rival.id, "genome": json.loads(rival.genome.to_json())},
        "settings": header,
        "torch": header.get("torch"),
        "descends_from": [row.id for row in family if row.operator == "start"],  # of --start
        "lineage": [{name: getattr(row, name) for name in shown} for row in family],
    }


COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]  # Okabe & Ito 2008
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def picture(rows: list[Result], title: str, controls: Controls, o: Outcome, settings: Settings) -> bytes | None:
    """progress.png: is it getting better than its controls, of what is it made, at what cost, and does its lead last.

    None without a score.
    """
    import io

    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: that would want the backend that the environment names
    from matplotlib.ticker import MaxNLocator

    ok = [r for r in of_stage(rows, "search") if r.status == "ok"]
    if not ok:
        return None
    last = max(r.generation for r in of_stage(rows, "search"))
    generations = sorted({r.generation for r in ok})
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(10, 13 if o.winner else 9))
        panels = {"better better": 1, "made cost": 1, **({"lead lead": 0.7} if o.winner else {})}
        heights, mosaic = list(panels.values()), [row.split() for row in panels]
        axes = figure.subplot_mosaic(mosaic, height_ratios=heights, width_ratios=[0.75, 1])
        if o.winner:
            draw_leads(axes["lead"], o, settings)
        best = leader(rows, o)
        line = descent(rows, best.id) if best else []
        draw_scores(axes["better"], rows, ok, generations, last, controls, line)
        draw_ops(axes["made"], ok, last)
        draw_costs(axes["cost"], rows, ok, axes["better"].get_ylim())
        for name in ("better", "made"):
            axes[name].set_xlabel("generation")
            axes[name].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        title = re.sub(r"\S{50}(?=\S)", r"\g<0> ", title)  # lines break at spaces
        figure.suptitle(title.replace("$", r"\$"), fontsize=12, wrap=True)  # $ begins mathematics
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def clocked(rows: list[Result]) -> list[tuple[float, Result]]:
    """The search, each row with the seconds on the device that it had taken by then."""
    search = of_stage(rows, "search")
    return list(zip(itertools.accumulate(row.spent for row in search), search, strict=True))


def as_long(rows: list[Result], other: list[Result]) -> list[Result]:
    """The search of another run, each row in the generation in which this one had taken as long; what is later is left
    out. A control that stops more of its newcomers gets further in its own generations."""
    ends = {row.generation: seconds for seconds, row in clocked(rows)}
    generations, seconds = list(ends), list(ends.values())
    at = [(bisect.bisect_left(seconds, then), row) for then, row in clocked(other)]
    return [dataclasses.replace(row, generation=generations[i]) for i, row in at if i < len(ends)]


def best_so_far(rows: list[Result], generations: list[int]) -> list[float]:
    """The best genome that was new by each generation, by the mean of all its evaluations: a line that never rises.

    nan before the first and after the last generation of the rows.
    """
    new_in = collections.defaultdict(lambda: math.inf)
    for c in searched(rows):
        new_in[c.generation] = min(new_in[c.generation], c.mean)
    last = max((r.generation for r in of_stage(rows, "search")), default=-1)
    best = list(itertools.accumulate((new_in[g] for g in range(last + 1)), min))
    return [best[g] if g <= last and best[g] < math.inf else math.nan for g in generations]


def draw_scores(
    axis, rows, ok: list[Result], generations: list[int], last: int, controls: Controls, line: list[Result] = ()
):
    """Every evaluation, the best and the median, what controls and baselines reach, and the winner's line of descent.

    The axis ends above the best lines of this seed and three quarters of the evaluations; those above stand at its end.
    """
    best = best_so_far(rows, generations)
    strategies, seeds = (
        {value: best_so_far(as_long(rows, other), generations) for (what, value), other in sorted(controls.items())
         if what == wanted}
        for wanted in ("strategy", "seed")
    )  # fmt: skip
    levels: dict[str, float] = {}  # the best baseline of each kind
    for c in candidates(of_stage(rows, "baseline")):
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
    scores = collections.defaultdict(list)
    for r in ok:
        scores[r.generation].append(r.val_bpb)
    point = dict(marker="o", ms=4) if len(generations) == 1 else {}  # a line of one point cannot be seen
    median = [statistics.median(scores[g]) for g in generations]
    axis.plot(generations, median, color=COLOURS[1], lw=1.5, ls="--", label="median of those with a score", **point)
    axis.plot(generations, best, color=COLOURS[0], lw=2.5, label="best so far, mean of its evaluations", **point)
    means = {c.id: c.mean for c in searched(rows)}
    if known := [r for r in line if r.id in means]:
        x, y = [r.generation for r in known], [means[r.id] for r in known]
        axis.plot(x, y, color=COLOURS[7], lw=1, marker="o", ms=4, mfc="none", label="the winner's line of descent")
    for (strategy, line), color in zip(strategies.items(), (COLOURS[5], COLOURS[3], COLOURS[2]), strict=False):
        seconds, whole = (
            sum(row.spent for row in of_stage(r, "search")) for r in (controls["strategy", strategy], rows)
        )
        so_long = " for as long" if seconds > 0.98 * whole else f", stopped after {seconds / 60:.0f} minutes"
        axis.plot(generations, line, color=color, lw=2, ls="-.", label=f"best so far, {strategy} search{so_long}")
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
    label, place = "baselines, best of each kind", bottom
    for name, level in levels.items():  # the best first
        if level <= top:
            axis.axhline(level, color="#555555", lw=1, ls=":", label=label)
            place = max(level, place + 0.05 * (top - bottom))  # no name over another
            axis.annotate(f" {name} {level:.2f}", (1, place), xycoords=("axes fraction", "data"), va="center")
            label = None
    if worse := [f"{name} {level:.2f}" for name, level in levels.items() if level > top]:
        axis.text(1, 0.96, f"far above: {', '.join(worse)}", transform=axis.transAxes, ha="right", va="top")
    axis.set(title="Is it getting better?", ylabel="validation bits per byte (lower is better)")
    axis.legend(fontsize=10, loc="upper center", ncol=3, bbox_to_anchor=(0.5, -0.15))


def draw_ops(axis, ok: list[Result], last: int):
    """The share of each op in the genes of a generation, norms aside."""
    counts = collections.defaultdict(collections.Counter)
    for r in ok:
        counts[r.generation].update(n.gene.op for n in Genome.from_json(r.genome).network if n.gene.op != "norm")
    edges, base = np.arange(last + 2) - 0.5, np.zeros(last + 1)
    for i, op in enumerate(OPS):
        top = base + [counts[g][op] / max(1, counts[g].total()) for g in range(last + 1)]
        if (top > base).any():
            look = dict(color=COLOURS[i % len(COLOURS)], hatch=["", "//", "..", "xx"][i // len(COLOURS)])
            # the edges of many columns would hide the rest
            look |= dict(edgecolor="white", lw=0.3 if last < 100 else 0)
            axis.stairs(top, edges, baseline=base, fill=True, label=op, **look)
        base = top
    axis.set(title="What is it made of?", ylabel="share of genes, norms aside", ylim=(0, 1), xlim=(-0.5, last + 0.5))
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_costs(axis, rows: list[Result], ok: list[Result], limits: tuple[float, float]):
    """Score against parameters, coloured by speed, of those within the limits of the score."""
    bottom, top = limits
    ok = [r for r in ok if r.val_bpb <= top]
    baselines = [r for r in of_stage(rows, "baseline") if r.status == "ok" and r.val_bpb <= top]
    bottom = min(bottom, *(r.val_bpb - 0.03 * (top - bottom) for r in [*ok, *baselines]))  # a single one may be lower
    unit, word = (1e6, "million") if max(r.tokens_per_s or 0 for r in ok) > 5e5 else (1e3, "thousand")
    x, y = [(r.params or 0) / 1e6 for r in ok], [r.val_bpb for r in ok]
    dots = axis.scatter(x, y, c=[(r.tokens_per_s or 0) / unit for r in ok], s=18, cmap="cividis", lw=0)
    axis.figure.colorbar(dots, ax=axis, label=f"{word} tokens a second")
    if baselines:
        x, y = [(r.params or 0) / 1e6 for r in baselines], [r.val_bpb for r in baselines]
        axis.scatter(x, y, marker="x", color=COLOURS[5], s=30, lw=1.5, label="baselines")
    beaten_by_none = [c for c in unbeaten(rows) if c.mean <= top]
    x, y = [(c.first.params or 0) / 1e6 for c in beaten_by_none], [c.mean for c in beaten_by_none]
    axis.scatter(
        x, y, s=50, facecolors="none", edgecolors=COLOURS[7], lw=1, label="on the front: score, size, speed, memory"
    )
    axis.legend(fontsize=10, loc="upper center", ncol=2, bbox_to_anchor=(0.5, -0.14))
    axis.set(title="At what cost?", xlabel="million parameters", ylabel="validation bits per byte", ylim=(bottom, top))


def draw_leads(axis, o: Outcome, settings: Settings):
    """The winner's leads over the baselines in each final, with their intervals."""
    once, longer = (budget_times(settings, factor) for factor in (1, settings.long_factor))
    rows = {once: o.winner, f"{longer}, as found": o.as_found, f"{longer}, grown": o.grown,
            f"{once}, {1 / settings.long_factor:.0%} of the text": o.on_less_text}  # fmt: skip
    rows, place, ticks, ends = {name: s for name, s in rows.items() if s}, 0.0, {}, [0.0]
    colors = dict(zip(FAMILIES, itertools.cycle(COLOURS), strict=False))
    for name, s in rows.items():
        passes = of_passes([s.passes])
        ticks[place + 0.3 * (len(s.leads) - 1)] = f"{name}\n{s.id}" + (f", {passes} passes" if passes else "")
        for baseline, lead in s.leads.items():
            half, look = lead.half or 0.0, dict(color=colors[family_of(baseline)])
            look["mfc"] = look["color"] if sure(lead) else "white"
            axis.errorbar(lead.mean, place, xerr=half, fmt="o", capsize=4, ms=6, **look)
            ends += [lead.mean - half, lead.mean + half]
            place += 0.6
        place += 0.6 if s.leads else 1.2
    for family in dict.fromkeys(family_of(name) for s in rows.values() for name in s.leads):
        axis.plot([], [], "o", color=colors[family], label=f"over the best {family}")
    axis.plot([], [], "o", color="#555555", mfc="white", label="may be chance")
    axis.axvline(0, color="#555555", lw=1, ls=":")
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=10)
    room = 0.1 * max(max(ends) - min(ends), 1e-3)
    axis.set(xlim=(min(ends) - room, max(ends) + room), ylim=(place - 0.6, -0.6))
    axis.legend(fontsize=10, loc="upper center", ncol=3, bbox_to_anchor=(0.4, -0.2))
    faster = f"  {target_text(o, settings).partition(':')[0]}" if o.target and o.target[0] else ""
    axis.set(title=f"Does the lead last?{faster}", xlabel="lead on test in bits per byte (higher is better)")


# report.md: what happened in a run and what of it to believe, from its rows and those of its controls alone.
#
# A record may be anybody's. What it says in words is made harmless once, where it enters, and its genomes were checked
# when they were read: everything after that writes Markdown and Mermaid without looking back.

ENOUGH = 40  # ancestors, or genomes of a front, that are shown; of more only the line of descent, or the best
FEW_STEPS = 100  # of the optimizer, below which a score says little of a design
FEW = 3  # newcomers that have to have a trait, or children that got or lost it, for the report to say what it is worth
HALFWAY = (
    "By the half-way loss: the mean training loss from 40 to 50 % of the budget, put right for speed, in nats per "
    "token."
)


def harmless(text: object) -> str:
    """Text on one line, with all that is markup in Markdown, HTML or Mermaid as character references."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    markup = r"[^\w .,:=/+()×→…%-]|:(?=//)|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(markup, lambda found: f"&#{ord(found[0])};", f"{line[:200]}…" if len(line) > 200 else line)


def harmless_row(row: Result) -> Result:
    texts = ("id", "parents", "operator", "hurdle", "note", "key")
    return dataclasses.replace(row, **{name: harmless(getattr(row, name)) for name in texts})


def as_table(head: list[str], lines: list[list]) -> list[str]:
    """A table in Markdown, columns of numbers to the right; None is a dash."""
    cells = [["—" if cell is None else str(cell) for cell in line] for line in lines]
    numbers = [
        any(c.isdigit() for cell in column for c in cell) and not any(c.isalpha() for cell in column for c in cell)
        for column in zip(*cells, strict=True)
    ]
    rules = ["---:" if right else "---" for right in numbers]
    return ["| " + " | ".join(line) + " |" for line in (head, rules, *cells)] + [""] if lines else []


def mermaid(lines: list[str]) -> list[str]:
    """A graph for GitHub to draw; character references are written otherwise there."""
    return ["```mermaid", *(line.replace("&#", "#") for line in lines), "```", ""]


def signed(e: Estimate | None, digits: int = 4) -> str | None:
    return e and f"{e.mean:+.{digits}f} ± {'?' if e.half is None else f'{e.half:.{digits}f}'}"


def average(values, digits: int) -> str | None:
    known = [x for x in values if x is not None]
    return f"{statistics.fmean(known):,.{digits}f}" if known else None


# The numbers of the report.


def ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The place of each value: the weight of all that are smaller, and half of that of its equals."""
    return (weights * (values < values[:, None])).sum(1) + (weights * (values == values[:, None])).sum(1) / 2


def rank_correlation(x, y, weights=None) -> float | None:
    """Spearman's rank correlation, weighted where asked; None of fewer than three, or where all are alike."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=float)
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    a, b = (r - np.average(r, weights=w) for r in (ranks(x, w), ranks(y, w)))
    return float((w * a * b).sum() / math.sqrt((w * a * a).sum() * (w * b * b).sum()))


def clustered(groups: list[list[float]]) -> Estimate:
    """The mean of values in groups that share something, as children do their parent, and the noise of its score.

    The interval is bootstrapped over the groups (Efron 1979), and widened for few of them as Student's is.
    """
    values, n = tuple(itertools.chain(*groups)), len(groups)
    if n < 2:
        return Estimate(statistics.fmean(values), None, values)
    sums, sizes = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=2_000)  # (samples, groups): how often each
    deviation = (drawn @ sums / (drawn @ sizes)).std()
    return Estimate(statistics.fmean(values), student(n) * deviation * math.sqrt(n / (n - 1)), values)


def halfway_losses(rows: list[Result], settings: Settings) -> dict[tuple, float]:
    """The half-way loss of each evaluation of the search, put right for speed, in nats per token, by evaluation.

    Who was stopped before is taken at its last whole tenth, less what the losses of the others fell from there.
    """
    trained = [row for row in of_stage(rows, "search") if row.status in ("ok", "stopped")]
    tenth = {row.evaluation: CURVE if row.status == "ok" else row.whole_tenth for row in trained}
    whole = [row for row in trained if tenth[row.evaluation] >= 5 and row.halfway_loss < math.inf]

    @functools.cache
    def fall(since: int) -> float:
        falls = [row.halfway_loss - row.loss_of(since) for row in whole if row.loss_of(since) < math.inf]
        return statistics.fmean(falls) if falls else math.inf

    losses = {}
    for row in trained:
        last = min(5, tenth[row.evaluation])
        loss = row.loss_of(last) + (fall(last) if last < 5 else 0) if last > 0 else math.inf
        losses[row.evaluation] = outlook(loss, row.tokens_per_s or 1, settings)
    return {evaluation: loss for evaluation, loss in losses.items() if loss < math.inf}


class Step(NamedTuple):
    """A newcomer beside its parent; of two parents the one whose genes are more alike."""

    child: Result
    parent: str
    change: float | None  # its half-way loss minus the mean of the parent's; None where it has none
    times: int  # evaluations in that mean
    gained: frozenset[tuple]
    lost: frozenset[tuple]


def steps(rows: list[Result], losses: dict[tuple, float]) -> list[Step]:
    """All newcomers with a parent whose half-way loss is known."""
    own, genomes = collections.defaultdict(list), {}
    for row in of_stage(rows, "search"):
        genomes[row.id] = Genome.from_json(row.genome)
        own[row.id] += [losses[row.evaluation]] if row.evaluation in losses else []
    found = []
    for row in rows:
        parents = [name for name in row.parents.split(",") if row.is_newcomer and own.get(name)]
        if parents:
            genome = genomes[row.id]
            parent = min(parents, key=lambda name: gene_distance(genomes[name], genome))
            loss, before = losses.get(row.evaluation), statistics.fmean(own[parent])
            parts_of, had = features(genome), features(genomes[parent])
            change = None if loss is None else loss - before
            found.append(Step(row, parent, change, len(own[parent]), parts_of - had, had - parts_of))
    return found


@functools.lru_cache(maxsize=10_000)
def features(genome: Genome) -> frozenset[tuple]:
    """Its ops, (op,), and what is not as usual: (op, trait, choice), of wiring "any", of the genome itself "genome"."""
    nodes = genome.network
    found = {(node.gene.op,) for node in nodes}
    for node in nodes:
        found |= {("any" if name in WIRING else node.gene.op, name, value) for name, value in node.gene.unusual}
    own = {name: getattr(genome, name) for name in GENOME_TRAITS}
    return frozenset(found | {("genome", *trait) for trait in own.items() if trait[1] != GENOME_TRAITS[trait[0]][0]})


def feature_text(feature: tuple) -> str:
    op, *choice = feature
    return " ".join([*([op] if op not in ("any", "genome") else []), *(["{}={}".format(*choice)] if choice else [])])


TURNS = "recurrence and attention in turn"
BY_HAND: dict[str, Callable[[Gene], bool]] = {  # what people found by hand, and build today: whether a gene has it
    "attention": lambda gene: gene.op == "attention",
    "a convolution or shift before attention": lambda gene: (
        gene.op in ("conv1d", "shift") or (gene.op == "attention" and gene.conv > 0)
    ),
    "recurrence (or linear attention)": lambda gene: gene.op in ("retention", "ssm", "gru"),
    "a table of n-grams": lambda gene: gene.op == "ngram" or (gene.op == "attention" and gene.values == "bigram"),
    "the token in the values of attention": lambda gene: (
        gene.op == "attention" and gene.values in ("token", "embedding")
    ),
    "an MLP, gated or plain": lambda gene: gene.op == "gate",
    "learned keys and values, as an MLP": lambda gene: gene.op == "memory",
    "experts": lambda gene: gene.op == "moe_router",
}


@functools.lru_cache(maxsize=10_000)
def built_by_hand(genome: Genome) -> dict[str, tuple[int, ...]]:
    """For each part that people found by hand, of which genes its occurrences in the network are, from 1.

    A convolution or shift counts where an attention comes later. TURNS has what follows the other of the two.
    """
    nodes = genome.network
    last = max((i for i, node in enumerate(nodes) if node.gene.op == "attention"), default=-1)
    found = {
        part: tuple(
            node.at
            for i, node in enumerate(nodes)
            if has(node.gene) and (i <= last or not part.endswith("before attention"))
        )
        for part, has in BY_HAND.items()
    }
    recurrent = set(found["recurrence (or linear attention)"])
    mixers = [(node.at, node.at in recurrent) for node in nodes if node.at in recurrent or node.gene.op == "attention"]
    found[TURNS] = tuple(at for (_, before), (at, now) in itertools.pairwise(mixers) if before != now)
    return found


def halfway_noise(rows: list[Result], losses: dict[tuple, float]) -> float | None:
    """Pooled standard deviation between the half-way losses of one genome; None before there are two."""
    alike = collections.defaultdict(list)
    for row in of_stage(rows, "search"):
        alike[row.id] += [losses[row.evaluation]] if row.evaluation in losses else []
    return deviation(alike.values())


def mean_change(taken: list[tuple[Step, int]], noise: float | None) -> Estimate:
    """The mean of changes, each with a sign, over parents; no surer than the noise of children and parents allows."""
    groups, times = collections.defaultdict(list), {}
    for step, sign in taken:
        groups[step.parent].append(sign * step.change)
        times[step.parent] = step.times
    e = clustered(list(groups.values()))
    if noise is None:
        return e
    variance = sum(len(own) + len(own) ** 2 / times[parent] for parent, own in groups.items()) / len(taken) ** 2
    return dataclasses.replace(e, half=max(e.half or 0.0, 1.96 * noise * math.sqrt(variance)))


def importance(taken: list[Step], noise: float | None) -> dict[tuple, Estimate]:
    """What each feature is worth: the change of a child that gained it, or lost it, then with the other sign."""
    found = collections.defaultdict(list)
    for step in taken:
        for sign, those in ((1, step.gained), (-1, step.lost)) if step.change is not None else ():
            for feature in those:
                found[feature].append((step, sign))
    return {feature: mean_change(own, noise) for feature, own in found.items()}


def association(rows: list[Result], losses: dict[tuple, float]) -> dict[tuple, float]:
    """The half-way loss of the newcomers with a feature minus that of those without, within each generation.

    A mean over the generations that have both, by how much each can say: n m / (n + m) for n with and m without.
    """
    by_generation = collections.defaultdict(list)
    for row in rows:
        if row.is_newcomer and row.evaluation in losses:
            by_generation[row.generation].append((losses[row.evaluation], features(Genome.from_json(row.genome))))
    sums, weights = collections.Counter(), collections.Counter()
    for members in by_generation.values():
        total = sum(loss for loss, _ in members)
        n, own = collections.Counter(), collections.Counter()
        for loss, those in members:
            for feature in those:
                n[feature] += 1
                own[feature] += loss
        for feature, count in n.items():
            if rest := len(members) - count:
                weight = count * rest / len(members)
                sums[feature] += weight * (own[feature] / count - (total - own[feature]) / rest)
                weights[feature] += weight
    return {feature: sums[feature] / weights[feature] for feature in weights}


def shape_of(row: Result) -> dict[str, float]:
    """What a genome's loss may go with: depth (ops, norms aside), mean width, parameters and speed."""
    nodes = [node for node in Genome.from_json(row.genome).network if node.gene.op not in ("norm", "identity")]
    width = statistics.fmean(node.d_out for node in nodes) if nodes else 0.0
    return {"depth": len(nodes), "width": width, "parameters": row.params or 0, "tokens/s": row.tokens_per_s or 0}


def converged(rows: list[Result]) -> tuple[int, float, float] | None:
    """The generation at which the best was within the noise of the end, and the minutes of the search until then and in
    all; None without noise."""
    search, noise = of_stage(rows, "search"), noise_floor(rows)
    if noise is None:
        return None
    best = best_so_far(rows, list(range(max(row.generation for row in search) + 1)))
    when = next(g for g, score in enumerate(best) if score <= best[-1] + noise)  # nan is never below
    minutes = [(row.generation, row.spent / 60) for row in search]
    return when, sum(m for g, m in minutes if g <= when), sum(m for _, m in minutes)


def unbeaten(rows: list[Result]) -> list[Candidate]:
    """The genomes and baselines within MARGIN of the best that none beats in all of OBJECTIVES, best first."""
    known, kept = sorted([*searched(rows), *candidates(of_stage(rows, "baseline"))], key=lambda c: c.mean), []
    for c in near_best(known):
        if all(fronts([objectives(other), objectives(c)])[1] == 0 for other in kept):  # who beats it comes before it
            kept.append(c)
    return kept


def descent(rows: list[Result], name: str) -> list[Result]:
    """A genome's ancestors in one line, of two parents the first, oldest first."""
    line, by_id = [], {row.id: row for row in lineage(rows, name)}
    while name in by_id:
        line.append(by_id.pop(name))
        name = line[-1].parents.partition(",")[0]
    return line[::-1]


# The sections of the report, each a list of lines; [] where the record has nothing to say.


def leader(rows: list[Result], o: Outcome) -> Standing | Candidate | None:
    """The winner, or before the final the best of the search."""
    return o.winner or next(iter(searched(rows)), None)


def budget_of(rows: list[Result], stage: str, settings: Settings) -> str:
    """What each evaluation of a stage trained for, in words."""
    return budget_times(settings, next((row.budget for row in rows if row.stage == stage), 1.0))


def sure(lead: Estimate) -> bool:
    """Whether zero lies outside its interval."""
    return lead.half is not None and abs(lead.mean) > lead.half


def lead_text(lead: Estimate, over: str) -> str:
    how = f"{abs(lead.mean):.4f} ± {'?' if lead.half is None else f'{lead.half:.4f}'}"
    chance = "" if sure(lead) else " (which may be chance)"
    return f"{how} {'better' if lead.mean >= 0 else 'worse'} than {over}{chance}"


def lead_over_control(rows: list[Result], other: list[Result]) -> tuple[float, Estimate] | None:
    """How far the best of the search leads over a control's, as both stood after the minutes on the device that both
    had, and these."""
    both = [clocked(those) for those in (rows, other)]
    if not all(both):
        return None
    end = min(those[-1][0] for those in both)
    best = [next(iter(searched([row for seconds, row in those if seconds <= end])), None) for those in both]
    noise = [noise_floor(those) for those in (rows, other)]
    if None in best:
        return None
    half = None
    if None not in noise:
        half = 1.96 * math.sqrt(sum(s * s / len(c.scores) for c, s in zip(best, noise, strict=True)))
    return end / 60, Estimate(best[1].mean - best[0].mean, half, ())


def answer(rows: list[Result], settings: Settings, controls: Controls, o: Outcome) -> list[str]:
    """What came of a run in a few sentences, or what is missing."""
    best, known = leader(rows, o), of_stage(rows, "search")
    if best is None:
        return ["No genome of the search has a score yet." if known else "The search has not begun."]
    if o.winner:
        rival, raced = o.rival, of_stage(rows, "final")
        several = sum(not family_of(s.id) for s in o.final)
        of_several = f"on val of the {several} best " if several > 1 else ""
        told = {s.id: f"{s.id} is {over}" for s in (o.as_found, o.grown) if s and (over := leads_text(s))}
        less = o.on_less_text and leads_text(o.on_less_text)
        seeds = f"{len(best.test.values)} seed{'s' * (len(best.test.values) > 1)} never used before, 95 % intervals"
        sentences = [
            f"{best.id}, {best.genome.summary}, is the best {of_several}of the search: {best.test} bits per byte on "
            f"test after {budget_of(rows, 'final', settings)}, {leads_text(best) or 'without a rival'} ({seeds}).",
            f"After {budget_times(settings, settings.long_factor)} {', '.join(told.values())}."
            if told
            else "Whether that lasts is not in the record.",
        ]
        if less:
            sentences += [f"After {budget_times(settings, 1)} on {1 / settings.long_factor:.0%} of the text, which it "
                          f"saw {o.on_less_text.passes:.1f} times, {best.id} is {less}."]  # fmt: skip
        if raced[0].budget == 1 and (needs := target_text(o, settings)):
            sentences += [f"{needs}."]
        given = any(row.operator == "start" and row.key == best.genome.key for row in known)
        built = next((row.id for row in rows if row.stage == "baseline" and row.key == best.genome.key), None)
        sentences += [f"{best.id} was not found by this run: it is one of the designs of --start."] if given else []
        sentences += [f"{best.id} is the network of {built}, which people built."] if built else []
    else:
        rival, raced = best_baseline(rows), rows
        wanted = [stage for stage in STAGES if stage != "baseline" or settings.baseline_trials]
        lacking = [stage for stage in wanted if not of_stage(rows, stage)]
        now_in = [stage for stage in wanted if stage not in lacking][-1]
        last = max(row.generation for row in known)
        sentences = [
            f"The run is not finished: its record ends in the {now_in}, with generation {last}. It lacks "
            f"{', '.join(lacking) or 'what is left of that'}."
            if settings.finalists
            else f"This is a search alone, without a final (FINALISTS = 0), up to generation {last}.",
            f"{best.id} leads, {best.genome.summary}: {best.mean:.4f} bits per byte on val, evaluated "
            f"{len(best.scores)} x{f'; the best baseline, {rival.id}, has {rival.mean:.4f}' if rival else ''}. "
            "No final has confirmed that.",
        ]
    against = []
    for (what, value), other in sorted(controls.items()):
        if lead := lead_over_control(rows, other):
            name = f"the control {value}" if what == "strategy" else f"{what} {value}"
            same = f"no better than {name}" if round(lead[1].mean, 4) == 0 else lead_text(lead[1], name)
            against.append(f"{same} after {lead[0]:.1f} minutes of each")
    none = ("No control (--strategy random or drift, with --out runs/random) stands in runs/ beside this record: what "
            "selection adds is not measured.")  # fmt: skip
    once = "One run of each: the interval is the noise of trials, not what other seeds of the search would find."
    sentences.append(f"In the search, on val, the best by then is {'; '.join(against)}. {once}" if against else none)
    sentences.append(f"{', '.join(pace_text(raced, c.id) for c in (best, rival) if c)}.")
    steps = [row.tokens // settings.batch_tokens for row in rows if row.status == "ok" and row.tokens]
    few = statistics.median_low(steps) if steps else math.inf
    if few >= FEW_STEPS:
        return sentences
    return [f"Half of the trials had {few} optimizer steps or fewer, too few to tell designs apart: this shows that "
            "the program works, and no more.", *sentences]  # fmt: skip


def leads_text(s: Standing) -> str:
    """Its leads over the best of each family, in words."""
    return " and ".join(lead_text(s.leads[name], name) for name in of_each_family(s.leads))


def of_each_family(baselines) -> list[str]:
    """Of baselines, best first, the best of each family."""
    best: dict[str | None, str] = {}
    for name in baselines:
        best.setdefault(family_of(name), name)
    return list(best.values())


def pace_text(rows: list[Result], id: str) -> str:
    """How fast a design trained, and how often it saw the text."""
    own = [row for row in rows if row.id == id and row.status == "ok"]
    speed, passes = average([row.tokens_per_s for row in own], 0), of_passes([row.passes for row in own])
    return f"{id} trains on {speed or '?'} tokens a second{f', {passes} passes over the text' if passes else ''}"


def of_passes(values) -> str | None:
    """How often the text was seen, in words; None where that is not known or far from once."""
    mean = average(values, 2)
    return mean if mean and float(mean) >= 0.1 else None


def final_table(standing: list[Standing], rows: list[Result], before: dict[str, float]) -> list[str]:
    """A final. rows: its evaluations. before: what its designs scored where they were chosen."""
    own, lines = collections.defaultdict(list), []
    for row in rows:
        own[row.id].append(row)
    baselines = of_each_family(s.id for s in standing if family_of(s.id))
    for s in standing:
        leads = [signed(s.leads.get(name)) for name in baselines]
        chosen = [f"{before[s.id]:.4f}" if s.id in before else None] * bool(before)
        passes, speed = ([getattr(row, name) for row in own[s.id]] for name in ("passes", "tokens_per_s"))
        seeds = f"{len(s.test.values)}, {s.failed} failed" if s.failed else len(s.test.values)
        lines.append([s.id, s.test, s.val, *chosen, seeds, of_passes(passes), average(speed, 0), *leads])
    head = ["design", "test", "val", *["val before"] * bool(before), "seeds", "passes over the text", "tokens/s"]
    head += [f"lead over {name}" for name in baselines]
    return as_table(head, lines)


def grown_text(rows: list[Result]) -> str:
    """What each size reached in the one evaluation by which sizes are chosen."""
    return ", ".join(f"{row.id} {score_text(row.val_bpb)}" for row in of_stage(rows, "grow"))


def final_section(rows: list[Result], settings: Settings, o: Outcome) -> list[str]:
    before = {c.id: c.mean for c in [*searched(rows), *candidates(of_stage(rows, "baseline"))]}
    longer, share = budget_times(settings, settings.long_factor), f"{1 / settings.long_factor:.0%} of the text"
    parts = {
        f"After {budget_of(rows, 'final', settings)}, fresh seeds, ranked by val; bits per byte, 95 % intervals, leads "
        "on test seed by seed.": final_table(o.final, of_stage(rows, "final"), before),
        f"Does the lead last? After {longer}; +1 is grown by one step. All of these were tried before, once each, with "
        f"another seed, to choose the size: {grown_text(rows)}.": [
            *final_table(o.long, of_stage(rows, "long"), {}),
            *(f"- {name} was not tried: {why}" for name, why in o.too_large.items()),
            *[""] * bool(o.too_large),
        ],
        f"Is the lead only memorised? After {budget_of(rows, 'passes', settings)} on {share}, seen as often as all of "
        f"it in {longer}.": final_table(o.passes, of_stage(rows, "passes"), {}),
    }
    named = {s.id: s.genome.summary for s in (*o.final, *o.long, *o.passes)}
    return [
        *(line for words, lines in parts.items() if lines for line in (words, "", *lines)),
        *(f"- {id}: {summary}" for id, summary in named.items()),
        *[""] * bool(named),
    ]


GRAPH = (
    "The number of each gene, its operation, width, and what is not the default. Along + a state is added to what "
    "comes out; along tokens they are read as well."
)
LINEAGE = (
    "Of each ancestor: the operators that made it, the mean of its val_bpb over so many evaluations, and what it has "
    "otherwise than its parent, of two the one more like it."
)


def network_graph(genome: Genome) -> list[str]:
    """A genome's network in Mermaid; runs of genes that repeat, wiring included, stand there once."""
    tied = ", tied to the embedding" if genome.tied else ""
    lines = ["flowchart TD", f'  s0(["embedding {genome.embed_dim}"])']
    network, edges, place = genome.network, [], {0: "s0"}
    linked = [(word, source, skip) for word, (source, skip) in zip(genome.words, links(genome), strict=True)]
    at = 0
    for run, times in folded(tuple(linked)):
        lines += [f'  subgraph r{at}["{times} times"]'] if times > 1 else []
        for state, node in enumerate(network[at : at + len(run)], start=at + 1):
            place[state] = f"s{state}"
            lines.append(f'  s{state}["{node.at}: {" ".join(genome.words[state - 1].split())}"]')
            edges += [f"  {place[node.source]} --> s{state}"] if node.source is not None else []
            edges += [f"  {place[node.skip]} -. + .-> s{state}"] if node.skip is not None else []
            edges += [f"  s0 -. tokens .-> s{state}"] if set(node.gene.reads) - {"stream"} else []
        lines += ["  end"] if times > 1 else []
        for further in range(len(run), len(run) * times):
            place[at + further + 1] = place[at + further % len(run) + 1]
        at += len(run) * times
    return mermaid([*lines, f'  head(["head{tied}"])', *edges, f"  {place[at]} --> head"])


def links(genome: Genome) -> list[tuple[int | None, int | None]]:
    """For each node how many states back it reads, and adds."""
    return [(node.source if node.source is None else state - node.source, node.skip if node.skip is None else
             state - node.skip) for state, node in enumerate(genome.network, start=1)]  # fmt: skip


def gene_texts(genome: Genome) -> list[str]:
    """The genes of a network in words, wiring included."""
    texts = []
    for word, (source, skip) in zip(genome.words, links(genome), strict=True):
        own = [f"input={source}"] * (source not in (1, None)) + [f"skip={skip}"] * (skip is not None)
        texts.append(" ".join([*word.split(), *own]))
    return texts


def differing(a: list[str], b: list[str]) -> Iterator[tuple[int, int, int, int]]:
    """Where two sequences differ, each a[i:j] beside a b[k:l]."""
    for what, *place in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if what != "equal":
            yield tuple(place)


def gene_changes(before: Genome, after: Genome) -> list[str]:
    """What one genome has otherwise than another: genes gone, come, or changed, and how it is trained."""
    found, texts = [], (gene_texts(before), gene_texts(after))
    for i, j, k, l in differing(*texts):
        a, b = texts[0][i:j], texts[1][k:l]
        ops = [[gene.split()[0] for gene in genes] for genes in (a, b)]
        at = 0, 0  # behind what was looked at
        for i, j, k, l in [*differing(*ops), (len(a), len(a), len(b), len(b))]:
            for old, new in zip(a[at[0] : i], b[at[1] : k], strict=True):  # of one op
                gone, come = (
                    [word for word in x.split() if word not in y.split()] for x, y in ((old, new), (new, old))
                )
                if gone or come:
                    found.append(f"{old.split()[0]}: {' '.join(gone) or 'default'} → {' '.join(come) or 'default'}")
            found += [*(f"- {gene}" for gene in a[i:j]), *(f"+ {gene}" for gene in b[k:l])]
            at = j, l
    traits = [(name, getattr(before, name), getattr(after, name)) for name in GENOME_TRAITS]
    return found + [f"{name}: {old} → {new}" for name, old, new in traits if old != new]


def lineage_graph(rows: list[Result], name: str) -> list[str]:
    """How a genome came to be, in Mermaid: of each ancestor operator, score, and what its parent has otherwise."""
    family, scores = lineage(rows, name), {c.id: c for c in searched(rows)}
    if len(family) > ENOUGH:
        family = descent(rows, name)[-ENOUGH:]
    genomes, lines, edges = {row.id: Genome.from_json(row.genome) for row in family}, ["flowchart TD"], []
    number = {row.id: n for n, row in enumerate(family)}
    for row in family:
        parents = [parent for parent in row.parents.split(",") if parent in genomes]
        score = f"{scores[row.id].mean:.4f} ({len(scores[row.id].scores)})" if row.id in scores else row.status
        changes = [genomes[row.id].summary]
        if parents:
            nearest = min(parents, key=lambda parent: gene_distance(genomes[parent], genomes[row.id]))
            changes = gene_changes(genomes[nearest], genomes[row.id])
            changes = [*changes[:5], *([f"and {len(changes) - 5} more"] if len(changes) > 5 else [])]
        lines.append(f'  n{number[row.id]}["{"<br/>".join([f"{row.id} {made_by_text(row)}: {score}", *changes])}"]')
        edges += [f"  n{number[parent]} --> n{number[row.id]}" for parent in parents]
    return mermaid([*lines, *edges]) if family else []


def last_of_survivors(leaders: list[set[str]], parts_of: dict[str, Iterable]) -> dict:
    """Until when a part was among the survivors, in words, by part; those of which none ever had it are left out."""
    until = {part: g for g, ids in enumerate(leaders) for id in ids for part in parts_of.get(id, ())}
    return {part: "the end" if g == len(leaders) - 1 else f"generation {g}" for part, g in until.items()}


def by_hand_section(rows: list[Result], leaders: list[set[str]], winner: Genome | None) -> list[str]:
    """What became of the parts that people found by hand."""
    if winner is None:
        return []
    had = {row.id: {part for part, at in built_by_hand(Genome.from_json(row.genome)).items() if at}
           for row in rows if row.is_newcomer}  # fmt: skip
    anew = collections.Counter()  # newcomers of which no parent had it
    for row in rows:
        if row.is_newcomer:
            anew.update(had[row.id].difference(*(had.get(name, set()) for name in row.parents.split(","))))
    until, worth = last_of_survivors(leaders, had), worth_of_parts(rows, winner.key)
    changes = {less.key: (what, less) for what, less in without_a_part(winner).items()}

    def ops_of(genome: Genome) -> collections.Counter:
        return collections.Counter(node.gene.op for node in genome.network)

    lines = []
    for part, places in built_by_hand(winner).items():
        told = []
        for at in dict.fromkeys(places if part != TURNS else ()):
            # of the changes to its gene after which there is less of it the one that takes out least else
            own = [((ops_of(winner) - ops_of(less)).total(), -worth[key].mean, key)
                   for key, (what, less) in changes.items() if what.startswith(f"gene {at}:") and worth.get(key)
                   and len(built_by_hand(less)[part]) < len(places)]  # fmt: skip
            told += [signed(worth[min(own)[-1]])] if own else []
        newcomers = sum(part in own for own in had.values())
        told = [", ".join(told) or None] * bool(worth)
        lines.append([part, len(places) or None, *told, newcomers, anew[part], until.get(part)])
    head = ["part", "in the winner", *["what each is worth there"] * bool(worth), f"of {len(had)} newcomers",
            "of them anew", "among the survivors until"]  # fmt: skip
    return [
        "What evolution found again of what people build today, and what it left. Anew: drawn or mutated, as no parent "
        "had it. What few newcomers had was hardly tried: that it is absent says little against it.",
        "",
        *as_table(head, lines),
    ]


def features_section(
    rows: list[Result], losses: dict[tuple, float], taken: list[Step], leaders: list[set[str]], winner: Genome | None
) -> list[str]:
    """What became of each op and trait, and what it is worth."""
    newcomers = {row.id: features(Genome.from_json(row.genome)) for row in rows if row.is_newcomer}
    tried = collections.Counter(feature for own in newcomers.values() for feature in own)
    if not tried:
        return []
    worth, beside = importance(taken, halfway_noise(rows, losses)), association(rows, losses)
    until = last_of_survivors(leaders, newcomers)

    def line(feature: tuple) -> list:
        value = worth.get(feature)
        value = value and len(value.values) >= FEW and dataclasses.replace(value, mean=-value.mean)
        times = winner.ops.count(feature[0]) if winner and len(feature) == 1 else 0
        held = (str(times) if times else "yes") if winner and feature in features(winner) else None
        changed = len(worth[feature].values) if feature in worth else None
        near = f"{-beside[feature]:+.3f}" if feature in beside else None
        return [
            feature_text(feature),
            tried[feature],
            until.get(feature),
            held,
            signed(value or None, 3),
            changed,
            near,
        ]

    head = ["part", f"of {len(newcomers)} newcomers", "among the survivors until", "in the winner",
            "importance", "of children", "association"]  # fmt: skip
    traits = sorted((f for f in tried if len(f) > 1), key=lambda f: (f[0], f[1], str(f[2])))
    shown = [f for f in traits if tried[f] >= FEW or (winner and f in features(winner))]
    rare = len(traits) - len(shown)
    rest = f"; left out, as fewer than {FEW} newcomers had them: {rare}" if rare else ""
    return [
        f"{HALFWAY} Above zero a part helps. *Importance*: what a child gained that got the part, or lost with it, "
        "against the mean of its parent's evaluations; 95 % intervals, bootstrapped over parents, and no narrower than "
        f"the noise of both; of {FEW} children or more. A child may differ in more than one part. *Association*: how "
        "much better the newcomers with the part were than those without, within their generation: it says what good "
        "genomes have, not what makes them good.",
        "",
        *as_table(head, [line((op,)) for op in OPS if (op,) in tried]),
        "<details>",
        f"<summary>{len(shown)} traits that are not the usual ones{rest}</summary>",
        "",
        *as_table(head, [line(f) for f in shown]),
        "</details>",
        "",
    ]


def operators_section(rows: list[Result], losses: dict[tuple, float], taken: list[Step]) -> list[str]:
    """What the children of each operator came to, against their parents."""
    noise, of_each = halfway_noise(rows, losses), collections.defaultdict(list)
    for step in taken:
        for operator in dict.fromkeys(step.child.operator.split("+")):
            of_each[operator].append(step)
    lines = []
    for operator, own in sorted(of_each.items(), key=lambda item: -len(item[1])):
        known = [step for step in own if step.change is not None]
        better = None
        if noise is not None:
            better = sum(step.change < -1.96 * noise * math.sqrt(1 + 1 / step.times) for step in known)
            better = f"{better} ({better / len(own):.0%})"
        ends = collections.Counter(step.child.status for step in own)
        gain = signed(mean_change([(step, -1) for step in known], noise)) if known else None
        lines.append([operator, len(own), better, ends["stopped"], ends.total() - ends["ok"] - ends["stopped"], gain])
    head = ["operator", "children", "better than the parent", "stopped", "failed", "mean gain"]
    known_noise = f" of {noise:.4f} in one evaluation" if noise is not None else ", which is not known yet"
    return [
        f"By the half-way loss. Better is by more than the noise of the difference (95 %; "
        f"noise{known_noise}): by luck alone one in forty. A child of several operators counts with each.",
        "",
        *as_table(head, lines),
    ] if lines else []  # fmt: skip


def generations_section(rows: list[Result], losses: dict[tuple, float], leaders: list[set[str]]) -> list[str]:
    """How the search went on: when it was done, how diverse it stayed, and what went with a good loss."""
    search = of_stage(rows, "search")
    if not search:
        return []
    root = roots(rows)
    genomes = {row.id: Genome.from_json(row.genome) for row in search}
    best, lines, weights, correlations = best_so_far(rows, list(range(len(leaders)))), [], [], []
    names = ("depth", "width", "parameters", "tokens/s")  # as shape_of has them
    for g, ids in enumerate(leaders):
        alive = sorted(ids | {row.id for row in search if row.generation == g}, key=in_order)
        apart = [gene_distance(genomes[a], genomes[b]) for a, b in itertools.combinations(alive, 2)]
        new = [row for row in search if row.generation == g and row.is_newcomer and row.evaluation in losses]
        shapes, loss = [shape_of(row) for row in new], [losses[row.evaluation] for row in new]
        correlations.append([rank_correlation([shape[name] for shape in shapes], loss) for name in names])
        weights.append(len(new))
        known = None if math.isnan(best[g]) else f"{best[g]:.4f}"
        ends = collections.Counter(row.status for row in search if row.generation == g)
        failed = ends.total() - ends["ok"] - ends["stopped"]
        newcomers = sum(row.is_newcomer for row in search if row.generation == g)
        lines.append([g, newcomers, ends["stopped"], failed, known, len({root.get(id, id) for id in ids}),
                      average(apart, 2)])  # fmt: skip
    means = []
    for column in zip(*correlations, strict=True):
        pairs = [(r, n) for r, n in zip(column, weights, strict=True) if r is not None]
        means.append(f"{sum(r * n for r, n in pairs) / sum(n for _, n in pairs):+.2f}" if pairs else None)
    goes_with = ", ".join(f"{name} {mean}" for name, mean in zip(names, means, strict=True) if mean)
    head = ["generation", "newcomers", "stopped", "failed", "best val_bpb", "roots of the survivors", "distance"]
    when = converged(rows)
    came = ["When the best was within the noise of the end is not known, as none was evaluated twice."]
    if when:
        came = [f"The best came within {noise_floor(rows):.4f}, the standard deviation of a trial, of its last score "
                f"in generation {when[0]} of {len(leaders) - 1}, after {when[1]:.1f} of {when[2]:.1f} minutes of the "
                "search on the device."]  # fmt: skip
    told = (f"Within a generation, what goes with a worse half-way loss: {goes_with} (rank correlation, mean of the "
            "generations; below zero where more of it goes with a better one).")  # fmt: skip
    return [
        *came,
        "",
        "Roots: the random genomes that the survivors descend from, of two parents by the first. Distance: how unlike "
        "the genes of two of the generation and its survivors are, on average, from 0 to 1.",
        "",
        *as_table(head, lines),
        *([told, ""] if goes_with else []),
    ]


def front_section(rows: list[Result]) -> list[str]:
    known = unbeaten(rows)
    lines = [
        [c.id, f"{c.mean:.4f}", len(c.scores), f"{c.first.params:,}" if c.first.params else None,
         f"{c.first.tokens_per_s:,}" if c.first.tokens_per_s else None, c.first.memory_mb, c.genome.summary]
        for c in known[:ENOUGH]
    ]  # fmt: skip
    more = [f"And {len(known) - ENOUGH} more.", ""] if len(known) > ENOUGH else []
    return [
        f"Genomes and baselines within {MARGIN:g} bits per byte of the best that no other beats in score, parameters, "
        "speed and memory at once; ringed in the picture.",
        "",
        *as_table(["design", "val_bpb", "evaluations", "parameters", "tokens/s", "memory, MiB", "what it is"], lines),
        *more,
    ] if known else []  # fmt: skip


def hurdle_section(rows: list[Result], settings: Settings, leaders: list[set[str]]) -> list[str]:
    """What the hurdle saved, how often it would have stopped a survivor, and how well what it looks at ranks."""
    newcomers = [r for r in rows if r.is_newcomer]
    stopped, spared = ([r for r in newcomers if r.hurdle == what] for what in ("stopped", "spared"))
    lines = []
    if stopped or spared:
        survived = sum(row.id in leaders[row.generation] for row in spared)
        # tenths without a loss, and the one that had just begun
        left = sum(sum(map(math.isnan, row.curve)) + 1 for row in stopped) / CURVE
        saved = left / max(1, len(of_stage(rows, "search")))
        ran_on = f"; {len(spared)} that missed it ran on, {survived} of them into the best" if spared else ""
        lines += [f"The hurdle stopped {len(stopped)} of {len(newcomers)} newcomers and saved {saved:.0%} of the "
                  f"training in the search{ran_on}.", ""]  # fmt: skip
    fair = [
        r
        for r in newcomers
        if (r.generation == 0 or r.hurdle == "spared") and r.status == "ok" and r.halfway_loss < math.inf
    ]
    weights = [1 / max(settings.hurdle_sample, 0.01) if r.hurdle == "spared" else 1.0 for r in fair]
    scores = [r.val_bpb for r in fair]
    losses = [r.halfway_loss for r in fair]
    outlooks = [outlook(r.halfway_loss, r.tokens_per_s or 1, settings) for r in fair]
    by_loss, by_outlook = (rank_correlation(those, scores, weights) for those in (losses, outlooks))
    if None not in (by_loss, by_outlook):
        lines += [f"The half-way loss ranks {by_outlook:.2f} with the score; not put right for speed it would rank "
                  f"{by_loss:.2f} (rank correlation, {len(fair)} newcomers: generation 0, and those that missed the "
                  "hurdle and ran on, who stand for all that missed it).", ""]  # fmt: skip
    causes = collections.defaultdict(collections.Counter)
    for row in rows:
        if row.status != "ok":
            causes[row.status][row.note] += 1
    listed = [
        [status, own.total(), STATUSES[status],
         "; ".join(f"{note} ({n})" for note, n in own.most_common(3) if note) or None]
        for status, own in sorted(causes.items())
    ]  # fmt: skip
    if set(causes) <= {"stopped"}:
        lines += [f"Nothing else went wrong: none of {len(rows)} evaluations failed.", ""]
    else:
        lines += as_table(["status", "evaluations", "what happened", "notes, the most frequent first"], listed)
    slower = [row for row in rows if "against its first evaluation" in row.note]
    told = "; ".join(f"{row.id} {row.note}" for row in slower[:10])
    lines += [f"{len(slower)} repeats trained at another speed than at first: {told}.", ""] if slower else []
    return lines


CONTEXT = {"induction": "induction", "recall_near": "recall", "recall_middle": "recall", "recall_far": "recall",
           "bpb_first": "first third", "bpb_middle": "middle", "bpb_last": "last third"}  # fmt: skip


def context_section(rows: list[Result], settings: Settings) -> list[str]:
    groups = collections.defaultdict(list)
    for row in rows:
        if row.test_bpb is not None and row.induction is not None and row.stage in FINALS:
            groups[row.stage, row.budget, row.id].append(row)
    back = iter(max(2, int(settings.seq_len * share)) for share in RECALL_SHARES)
    names = [f"{what}, {next(back):,} back" if what == "recall" else what for what in CONTEXT.values()]
    lines = []
    for (stage, budget, id), own in groups.items():
        known = [[x for x in (getattr(row, name) for row in own) if x is not None] for name in CONTEXT]
        nats = [str(estimate(values)) if values else None for values in known[:4]]
        lines.append([id, stage, budget_times(settings, budget), *nats, *(average(v, 4) for v in known[4:])])
    return [
        "Nats per token, below zero where a model copies. Induction: random tokens the second time, half a window on, "
        "minus the first (Olsson et al. 2022). Recall: a token that once followed another, when that one comes again, "
        "minus the first time. Nothing is selected by this. On the right val_bpb by the thirds of a window.",
        "",
        *as_table(["design", "stage", "budget", *names], lines),
    ] if lines else []  # fmt: skip


def ablated_scores(rows: list[Result]) -> dict[str, dict[int, float]]:
    """val_bpb by seed of each design of --ablate, whole or with less, by its key; {} where it failed."""
    scores: dict[str, dict[int, float]] = {}
    for row in of_stage(rows, "ablate"):
        scores.setdefault(row.id, {}).update({row.seed: row.val_bpb} if row.status == "ok" else {})
    return scores


def worth_of_parts(rows: list[Result], whole: str) -> dict[str, Estimate | None]:
    """How much worse the design of that key is without a part, by the key of what is left; None where that failed.

    Seed by seed; the deviation of all these differences is taken as one, as each has few seeds.
    """
    scores = ablated_scores(rows)
    parts_of = {less.key for row in of_stage(rows, "ablate") if row.id == whole
                for less in without_a_part(Genome.from_json(row.genome)).values()}  # fmt: skip
    parts_of |= {row.id for row in of_stage(rows, "ablate") if row.parents == whole}
    worth = {less: tuple(scores[less][n] - score for n, score in scores.get(whole, {}).items() if n in scores[less])
             for less in scores if less in parts_of}  # fmt: skip
    noise, free = deviation(worth.values()), sum(len(own) - 1 for own in worth.values() if own)

    def of(own: tuple[float, ...]) -> Estimate | None:
        half = None if noise is None else student(free + 1) * noise / math.sqrt(max(1, len(own)))
        return Estimate(statistics.fmean(own), half, own) if own else None

    return {less: of(own) for less, own in worth.items()}


def ablation_section(rows: list[Result], settings: Settings) -> list[str]:
    """What each part of the designs of --ablate is worth, the dearest first."""
    ablated, scores, lines = of_stage(rows, "ablate"), ablated_scores(rows), []
    names = {row.key: row.id for row in reversed(rows) if row.stage == "search"}
    last = {row.id: row for row in ablated}
    for whole in dict.fromkeys(row.parents or row.id for row in ablated):
        if not scores.get(whole):
            continue
        genome, cells = Genome.from_json(last[whole].genome), []
        parts_of = {row.id: row.operator for row in ablated if row.parents == whole}
        parts_of |= {less.key: what for what, less in without_a_part(genome).items()}
        for less, worth in worth_of_parts(rows, whole).items():
            score = f"{statistics.fmean(scores[less].values()):.4f}" if scores[less] else last[less].status
            cells.append([parts_of[less], score, worth])
        cells.sort(key=lambda cell: -cell[2].mean if cell[2] else -math.inf)
        after = f"{estimate(scores[whole].values())} bits per byte on val after {budget_of(rows, 'ablate', settings)}"
        lines += [
            f"{names.get(whole, whole)}, {genome.summary}: {after}. What is lost by each change, seed by seed; below "
            "zero it is better without. 95 % intervals, by the deviation of all these differences together: of twenty "
            "one is wrong by chance.",
            "",
        ]
        lines += as_table(
            ["change", "val_bpb", "worth"], [[what, score, signed(worth)] for what, score, worth in cells]
        )
    return lines


def made_by(header: dict, rows: list[Result], settings: Settings) -> str:
    """Of which run, and by which version of the program."""
    data, device, torch_is, code = (header.get(name, "unknown") for name in ("data", "device", "torch", "code"))
    ok = [row for row in rows if row.status == "ok"]
    lacks = [name for name in ("order", "passes", "bpb_last") if all(getattr(row, name) is None for row in ok)]
    older = f", an earlier version, which did not record {', '.join(lacks)}" if lacks and ok else ""
    begun = f" Generation 0 began with what was known: {header['start']}." if header.get("start") else ""
    run = f"{settings.strategy}, seed {settings.seed}, {budget_text(settings)} a trial on {device}, text: {data}"
    tried = []
    for stage in (*STAGES, "ablate"):
        if own := of_stage(rows, stage):
            designs = len({row.id for row in own})
            tried.append(f"{stage} {len(own)} of {designs} designs, {sum(row.spent for row in own) / 60:.0f} min")
    told = f" Evaluations and minutes on the device: {'; '.join(tried)}." * bool(tried)
    return f"{len(rows)} evaluations: {run}. By code {code} with torch {torch_is}{older}.{told}{begun}"


def report(rows: list[Result], header: dict, settings: Settings, controls: Controls, pictured: bool = False) -> str:
    """report.md. pictured: whether progress.png stands beside it."""
    rows = [harmless_row(row) for row in rows]
    start = header.get("start")
    listed = {"start": "; ".join(map(str, start))} if isinstance(start, list) else {}
    header = {name: harmless(value) for name, value in {**header, **listed}.items()}
    settings = dataclasses.replace(settings, strategy=harmless(settings.strategy))
    controls = {(what, harmless(value)): other for (what, value), other in controls.items()}
    o = outcome_of_record(rows, settings, vocab_size_of(header))
    best, leaders = leader(rows, o), leaders_by_generation(rows, settings.survivors)
    losses = halfway_losses(rows, settings)
    winner, taken = best and best.genome, steps(rows, losses)
    known = "The winner" if o.winner else "The best so far"
    sections = {
        "The final": final_section(rows, settings, o),
        f"{known}, drawn": best and [f"{best.id}: {winner.summary}", "", GRAPH, "", *network_graph(winner)],
        "How it came to be": best and [LINEAGE, "", *lineage_graph(rows, best.id)],
        "What people found by hand": by_hand_section(rows, leaders, winner),
        "What became of the parts": features_section(rows, losses, taken, leaders, winner),
        "What it is worth without a part": ablation_section(rows, settings),
        "Which operators earned it": operators_section(rows, losses, taken),
        "Diversity and convergence": generations_section(rows, losses, leaders),
        "Score, size, speed and memory": front_section(rows),
        "Long context": context_section(rows, settings),
        "The hurdle, and what went wrong": hurdle_section(rows, settings, leaders),
    }
    told = [f"- {sentence}" for sentence in answer(rows, settings, controls, o)]
    lines = ["# What the run found", "", *told, "", made_by(header, rows, settings), ""]
    lines += ["![progress.png](progress.png)", ""] if pictured else []
    for title, section in sections.items():
        lines += [f"## {title}", "", *section] if section else []
    return "\n".join(lines).rstrip() + "\n"


# For a record of which nothing else is known.


def vocab_size_of(header: dict) -> int:
    size = str(header.get("vocab_size", ""))
    return int(size) if size.isdecimal() else prepare.VOCAB_SIZE  # records of earlier versions do not say


def settings_of(header: dict, rows: list[Result]) -> Settings:
    """The settings of a record, as its header has them; what that leaves out as the rows show it."""
    known = {}
    for name, hint in HINTS.items():
        rules = [rule for rule in typing.get_args(hint) if isinstance(rule, Rule)]
        value, kinds = header.get(name.lower()), (int, float) if TYPES[name] is float else TYPES[name]
        if isinstance(value, kinds) and value is not True and all(rule.holds(value) for rule in rules):
            known[name.lower()] = value
    final, long = of_stage(rows, "final"), of_stage(rows, "long")
    seen = dict(
        finalists=len({row.id for row in final if not family_of(row.id)}),
        final_seeds=len({row.seed for row in final}),
        long_seeds=len({row.seed for row in long}),
        long_factor=max((row.budget for row in long), default=0.0),
    )
    return Settings(**{**known, **{name: value for name, value in seen.items() if value}})


def outcome_of_record(rows: list[Result], settings: Settings, vocab_size: int) -> Outcome:
    """The outcome, with a final of an earlier version as far as it went: none of today's has its evaluations."""
    o, final = outcome(rows, settings, vocab_size), of_stage(rows, "final")
    known = {task.evaluation for task in final_evaluations(rows, settings, vocab_size)}
    if o.final or not final or any(row.evaluation in known for row in final):
        return o
    tasks = {row.evaluation: Task("final", row.id, Genome.from_json(row.genome), row.seed, row.seed, budget=row.budget)
             for row in final}  # fmt: skip
    return dataclasses.replace(o, final=standings(rows, list(tasks.values())))


def write_reports(out: Path, rows: list[Result], header: dict, settings: Settings, controls: Controls):
    """best_genome.json, progress.png and report.md."""
    o = outcome(rows, settings, header["vocab_size"])
    best = best_genome(rows, header, settings, o)
    if best is None and of_stage(rows, "search"):
        say("No genome is scored yet, so there is no best_genome.json and no progress.png")
    if best is not None:
        content = json.dumps(best, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(out / "best_genome.json", content + "\n")
    title = (f"genesis, {settings.strategy}, seed {settings.seed}: {header['data']}, {header['device']}, "
             f"{budget_text(settings)} a trial")  # fmt: skip
    for name, made in {
        "progress.png": lambda: best and picture(rows, title, controls, o, settings),
        "report.md": lambda: report(rows, header, settings, controls, pictured=(out / "progress.png").exists()),
    }.items():
        try:
            content = made()
        except Exception as error:  # whatever a picture dies of, the search goes on
            say(f"{name} was not made: {type(error).__name__}: {first_line(error)}{place_of(error)}")
        else:
            if content:
                write_whole(out / name, content)


# ----------------------------------------------------------------------------------------------------------------------
# The run and the command.

SLOWER = 0.03  # share of its first speed that a genome may lose before a line says so
OPS_SECONDS = 60  # that trying all ops may take
SPARE = 20.0  # seconds that --minutes leaves for compiling and for reports
ALIKE = 3  # crashes in a row with the same note, nothing else before them, that stop a run


Plan = Callable[[list[Result]], list[Task]]  # from the rows to what is evaluated next; [] at its end


def evolve(
    record: Record, plan: Plan, controls: Controls, settings: Settings, data: prepare.Dataset, device: torch.device,
    cluster: RayPool | None = None, minutes: float = math.inf,
) -> bool:  # fmt: skip
    """All that a plan wants, from wherever the record stands, or what of it can end so many minutes after the program
    began; whether that was all. On the device or on a cluster. Reports are written while the next evaluations go on."""
    out = record.path.parent
    at_work = contextlib.nullcontext(cluster) if cluster else Pool(data, settings, device, out)
    with ThreadPoolExecutor(1) as reporter, at_work as pool:
        written, busy, at_first = None, 0.0, len(record.rows)
        while tasks := plan(record.rows):
            done, ends = len(record.rows), STARTED + 60 * minutes
            before, stage = (record.rows[-1].stage if record.rows else ""), tasks[0].stage
            if stage != before:  # a line is free already behind a generation, and a round of baselines
                say(f"{'' if before in ('', 'baseline', 'search') else chr(10)}{HEADINGS[stage]}\n")
            begun = in_time(tasks, record.rows, settings, pool, ends)
            results = under_a_bar(pool, begun, len(tasks), tasks[0])
            for result in unless_all_crash(results, record.rows, settings.population_size):
                result.note = f"{result.note} {slower_text(result, record.rows, settings)}".strip()
                record.append(result)
                busy += result.spent
                say(result_text(result))
            if len(record.rows) > done and (text := stage_text(record.rows, tasks[0])):
                say(text)
            if written:
                written.result()  # raises what went wrong
            written = reporter.submit(write_reports, out, list(record.rows), record.header, settings, controls)
            if len(record.rows) - done < len(tasks):
                break
    if written:
        written.result()
    if tasks and len(record.rows) == at_first:
        least = time.monotonic() - STARTED + SPARE + seconds_for(together(tasks)[0], record.rows, settings, pool.gpus)
        say(f"--minutes {minutes:g}: too short for what comes next ({tasks[0].stage}), which takes about --minutes "
            f"{math.ceil(least / 6) / 10:g}; nothing was done")  # fmt: skip
    elif tasks:
        say(f"\n--minutes {minutes:g}: no other evaluation would end in time. Run the same command again to go on")
    if pool.gpu_seconds and record.header["device"] != "cpu":
        say(f"{max(0.0, 1 - busy / pool.gpu_seconds):.0%} of the GPU time passed without training or scoring")
    return not tasks


def in_time(
    tasks: list[Task], rows: list[Result], settings: Settings, pool: Pool | RayPool, ends: float
) -> Iterator[Task | None]:
    """Those of the tasks, one after the other, that can end by then, as time.monotonic() has it; of those that are
    compared seed by seed in a final all of one seed or none.

    None where that cannot be said before those on the way have ended, for whom as long is set aside as they may take.
    rows: the record, to which the results come meanwhile.
    """
    begun, known = [], len(rows)
    for wanted in together(tasks):
        while True:
            ended = {row.evaluation for row in rows[known:]}
            ahead = [task for task in begun if task.evaluation not in ended]
            left = ends - time.monotonic() - SPARE
            if seconds_for(ahead + wanted, rows, settings, pool.gpus) <= left:
                break
            if not ahead or left < 0:
                return
            yield None
        begun += wanted
        yield from wanted


def together(tasks: list[Task]) -> list[list[Task]]:
    """Those that all end or are not begun: in a final those of one seed, else each by itself."""
    groups = itertools.groupby(tasks, key=lambda task: task.seed if task.stage in FINALS else task.evaluation)
    return [list(group) for _, group in groups]


def seconds_for(tasks: list[Task], rows: list[Result], settings: Settings, gpus: int) -> float:
    """How long tasks take on so many GPUs at most, as far as the rows before them tell."""
    measured = [row for row in rows[-50:] if row.seconds and row.outside is not None]
    seconds = settings.time_budget
    if settings.token_budget:
        seconds = max((row.seconds / row.budget for row in measured), default=0.0)
    outside = max((row.outside for row in measured), default=0.0)
    free = [0.0] * gpus  # when each will be, in seconds from now
    for task in tasks:
        heapq.heapreplace(free, free[0] + seconds * task.budget + outside)
    return max(free)


def under_a_bar(pool: Pool | RayPool, tasks: Iterable[Task | None], most: int, first: Task) -> Iterator[Result]:
    """The results of tasks, of which there are so many at most, under a bar where there is a terminal."""
    title = first.stage if first.generation is None else f"generation {first.generation}"
    form = "{desc} {bar:20} {n_fmt}/{total_fmt}  {remaining} left here"
    with tqdm(total=most, desc=title, leave=False, disable=not sys.stderr.isatty(), bar_format=form) as bar:
        for result in pool.run(tasks, bar.refresh):
            yield result
            bar.update()


def unless_all_crash(results: Iterator[Result], rows: list[Result], limit: int) -> Iterator[Result]:
    """Hold back crashes that are alike until something else happens. Raises Stop where `limit` of them follow another.

    Before a run has its first evaluation that is no crash the limit is ALIKE. What was held back is not recorded when
    the run stops: it is done again when the cause is mended.
    """
    held, most = [], limit if any(row.status != "crash" for row in rows) else ALIKE
    for result in results:
        if held and (result.status, result.note) != (held[0].status, held[0].note):
            yield from held
            held = []
        if result.status == "crash":
            held.append(result)
        else:
            most = limit
            yield result
        if len(held) >= most:
            raise Stop(f"{result.trace}\nThe last {len(held)} evaluations crashed alike ({result.note}). "
                       "They are not recorded: mend the cause, and run again to go on")  # fmt: skip
    yield from held


def slower_text(result: Result, rows: list[Result], settings: Settings) -> str:
    """A warning where a genome trains clearly slower or faster than when it was evaluated first, else nothing."""
    first = next((r for r in rows if r.key == result.key and r.status == "ok"), None)
    if first is None or result.status != "ok" or settings.token_budget or not first.tokens_per_s:
        return ""
    change = result.tokens_per_s / first.tokens_per_s - 1
    return f"{change:+.0%} tokens/s against its first evaluation" if abs(change) > SLOWER else ""


def read_designs(path: Path, scale: float, deeper: int) -> dict[str, Genome]:
    """The genome in best_genome.json or in a file of its own, by name, as --scale and --deeper change it.

    Where they do, the baseline that the file names follows, changed alike. Raises Stop.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = content.get("genome", content) if isinstance(content, dict) else content
        designs = {path.stem: Genome.from_dict(own)}
        if scale == 1 and not deeper:
            return designs
        rival = content.get("rival") if isinstance(content, dict) else None
        if isinstance(rival, dict):
            designs[f"{rival.get('id')} (its best baseline)"] = Genome.from_dict(rival.get("genome"))
        changes = [f"x{scale:g}"] * (scale != 1) + [f"+{deeper}"] * (deeper != 0)
        return {" ".join([name, *changes]): scaled(grown(net, deeper), scale) for name, net in designs.items()}
    except (OSError, ValueError, RecursionError) as error:  # a GenomeError is a ValueError
        raise Stop(f"Cannot read {path}: {error}") from None


def read_start(files: list[str], settings: Settings) -> list[Genome]:
    """The genomes of files, best_genome.json or of their own, that --start puts into generation 0. Raises Stop."""
    found: dict[str, Genome] = {}
    for file in files:
        (genome,) = read_designs(Path(file), 1.0, 0).values()
        if not genome.mixes_tokens:
            raise Stop(f"--start {file}: no token of it sees another")
        if genome.key in found:
            raise Stop(f"--start {file}: it is the same network as another of them")
        found[genome.key] = genome
    if len(found) > settings.population_size:
        raise Stop(f"--start: {len(found)} genomes, over POPULATION_SIZE = {settings.population_size}; raise that")
    return list(found.values())


def check_memory(designs: dict[str, Genome], data: prepare.Dataset, device: torch.device):
    """Raise Stop where weights, gradients and what the optimizer keeps, 16 bytes a parameter, have no room."""
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, genome in designs.items():
        need = 16 * genome.num_params(data.vocab_size)
        if need > room:
            raise Stop(f"{name}: its parameters take {need / 2**30:,.0f} GiB to train, and {device} has "
                       f"{room / 2**30:,.0f}; choose a smaller --scale or --deeper")  # fmt: skip


def train_one(args: argparse.Namespace, designs: dict[str, Genome], settings: Settings, data: prepare.Dataset, device):
    """Train designs for the budget, print what they reach; let the first write some text, and keep it where asked."""
    path = Path(args.train)
    check_memory(designs, data, device)
    on_device = data.to(device)
    turn = GpuTurn(turn_file(device), f"process {os.getpid()} for --train {path}", say)
    if device.type == "cuda" and (problem := compiler_problem(data.vocab_size, device, settings)):
        raise Stop(problem)
    form = "training {bar:20} {percentage:3.0f} %  {remaining} left"
    scores, first = [], None
    if (args.scale != 1 or args.deeper) and len(designs) == 1:
        say(f"{path} names no baseline to be changed alike and trained beside it")
    for name, genome in designs.items():
        say(f"{name}: {genome.summary}\n{genome.num_params(data.vocab_size):,} parameters, {budget_text(settings)} on "
            f"{device}")  # fmt: skip
        task = Task("train", name, genome, settings.seed, settings.seed)
        with tqdm(total=1.0, leave=False, disable=not sys.stderr.isatty(), bar_format=form) as bar:
            result, model = run_trial(
                task, on_device, settings, turn, lambda s, bar=bar: bar.update(min(s, 1.0) - bar.n)
            )
        if result.note:
            say(result.note)
        if result.status != "ok":
            raise Stop(f"{path}: training ended with status {result.status}. {result.note}")
        say(f"val_bpb {result.val_bpb:.4f} after {result.seconds:.1f} s: {result.tokens:,} tokens, "
            f"{result.tokens_per_s:,.0f} a second, {result.passes:.1f} passes over the training text\n")  # fmt: skip
        scores.append(result.val_bpb)
        first = first or model
        if args.save and model is first:
            save_model(Path(args.save), model, data)
            source = prepare.command(data_dir=args.data_dir, demo=args.demo).removeprefix("uv run prepare.py")
            say(
                f"{args.save}: the weights. To let it write: uv run evolve.py --write {args.save} --prompt TEXT{source}"
            )
        model = None  # its memory is for the next
        free_memory()
    if len(scores) > 1:
        say(f"{path.stem} leads by {scores[1] - scores[0]:.4f} bits per byte\n")
    with turn:
        say(write_text(first, data, args.prompt, settings.seq_len, settings.seed))


def save_model(path: Path, model: Model, data: prepare.Dataset):
    """Keep the weights as safetensors, with what it takes to build the model again and to know its tokenizer."""
    from safetensors.torch import save

    metadata = {"genome": model.genome.to_json(), "vocab_size": str(data.vocab_size), "fingerprint": data.fingerprint}
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    write_whole(path, save(weights, metadata))


def load_model(path: Path, data: prepare.Dataset, device: torch.device) -> Model:
    """The model that save_model kept. Raises Stop where it is none, or one of another tokenizer."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        genome = Genome.from_json(metadata["genome"])
    except (OSError, SafetensorError, KeyError, GenomeError) as error:
        raise Stop(f"{path} is no model that --save kept: {error}") from None
    if metadata.get("fingerprint") != data.fingerprint:
        raise Stop(
            f"{path} was trained on other tokens than those of {data.source}; name them with --data-dir or --demo"
        )
    model = Model(genome, data.vocab_size, compute_dtype(device)).to(device)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # of a version whose ops had other parameters
        raise Stop(f"{path} is no model that --save kept: {first_line(error)}") from None
    return model


@torch.no_grad()
def write_text(model: Model, data: prepare.Dataset, prompt: str, seq_len: int, seed: int, length: int = 200) -> str:
    """Sample `length` tokens after a prompt, temperature 0.8, from the 50 likeliest."""
    model.uncompile()  # what was compiled knows one shape alone
    tokenizer, device = data.tokenizer(), next(model.parameters()).device
    tokens = [data.bos, *tokenizer.encode_ordinary(prompt)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(length):
        idx = torch.tensor([tokens[-seq_len:]], device=device)
        logits = model(idx)[0, -1].float().cpu() / 0.8
        logits[data.bos] = -math.inf
        likely = logits.topk(50)
        tokens.append(likely.indices[torch.multinomial(likely.values.softmax(-1), 1, generator=generator)].item())
    return tokenizer.decode(tokens[1:])


def unlike(record: Record, header: dict) -> dict[str, str]:
    """What a record differs in from those of the run that the header describes, by name, in words."""
    columns = {} if record.columns == list(COLUMNS) else {"columns": "columns of another version"}
    return differences(record.header, header) | columns


def begin_or_go_on(record: Record, header: dict, settings: Settings, new: bool) -> bool:
    """Make the record one of the run that the header describes; returns whether there is something to do in it.

    A run that differs is moved to runs/.
    """
    old = record.header
    if old is not None:
        differs = list(unlike(record, header).values())
        if old.get("device", "cpu") != "cpu" and header["device"] == "cpu" and not new:
            raise Stop(f"The run in {record.path} was made on {old['device']}, and no GPU is to be seen. Nothing was "
                       "changed: bring it back, take another folder (--out DIR), or begin anew (--new)")  # fmt: skip
        if new or differs:
            why = "--new" if new else f"it differs in {', '.join(differs)}"
            say(f"The run in {record.path} was moved to {record.move_away()} ({why})")
        elif not next_tasks(record.rows, settings, header["vocab_size"]):
            say(f"The run in {record.path} is finished: {len(record.rows)} evaluations. Raise MAX_GENERATIONS above "
                f"{settings.max_generations} to extend it; --new moves it to runs/ and begins again")  # fmt: skip
            return False
        else:
            say(f"Going on with the run in {record.path}: {len(record.rows)} evaluations")
    if record.header is None:
        record.begin(header)
    return True


def begin_or_join(record: Record, header: dict):
    """Make the record one that --ablate may add to: that of this run, --start aside, or a new one. Raises Stop."""
    if record.header is None:
        return record.begin(header)
    if differs := {name: words for name, words in unlike(record, header).items() if name != "start"}:
        raise Stop(f"--ablate adds to the run in {record.path}, which differs in {in_short(differs)}. Give the flags "
                   "that it was made with, or name another folder with --out")  # fmt: skip


def rewrite_report(folder: Path):
    """--report: report.md of the record in a folder, whoever made it. Raises Stop where there is none."""
    path = folder / "results.tsv"
    with errors_named(path, "Name a folder with a results.tsv"):
        content = path.read_bytes()
    try:
        header, _, rows = read_results(content)
    except ValueError as error:
        raise Stop(f"{path} is no results.tsv of this program: {error}") from None
    controls, pictured = find_controls(folder, header), (folder / "progress.png").exists()
    write_whole(folder / "report.md", report(rows, header, settings_of(header, rows), controls, pictured))
    say(f"{folder / 'report.md'}: of {len(rows)} evaluations")


def try_ops(pipe):
    """Build and run every op: send (which, None) before each, and at the end what is wrong with one, or ""."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and so it ends this one, without a word
    signal.alarm(OPS_SECONDS)
    problem = op_problem(trying=lambda which: pipe.send((which, None)))
    pipe.send(("", problem))


def check_ops():
    """Try every op in a process of its own, where one of the user's may raise or hang. Raises Stop, naming it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=try_ops, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    trying, problem = "", None
    with contextlib.suppress(EOFError):
        while problem is None:
            trying, problem = ours.recv()
    process.join()
    if process.exitcode == ENDED_BY_ALARM:
        problem = f"{trying}: is not built and run within {OPS_SECONDS} s"
    elif problem is None:
        problem = f"{trying}: ended the process that tried it, exit code {process.exitcode}"
    if problem:
        raise Stop(f"genome.py: {problem}")


def no_gpu_reason() -> str:
    """Why torch sees no GPU, in its own words."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return first_line(error)
    return "torch finds none"


def check_device(name: str, device: torch.device, settings: Settings):
    """Say what a device is not good at. Raises Stop where it is good for nothing."""
    if name == "cpu" and not settings.token_budget:
        raise Stop(f"A trial of seconds needs a GPU, and none is to be seen: {no_gpu_reason()}. Mend that (the driver, "
                   "the GPU passed on to a container, or another torch), or see it work with --demo; --token-budget "
                   "trains for tokens, on the CPU too")  # fmt: skip
    if name == "cpu":
        say("No GPU is used: training on the CPU in float32, uncompiled and slow. Good for --demo and for tests")
    elif device.type == "cuda" and compute_dtype(device) == torch.float32:
        more = (
            "" if settings.token_budget else f". Raise TIME_BUDGET (now {settings.time_budget:g} s) to make up for it"
        )
        say(f"{name} does not compute in bfloat16: training in float32, at a fraction of the tokens a second and with "
            f"more memory{more}")  # fmt: skip


def run_command(args: argparse.Namespace):
    settings = read_settings(args)
    commands = [name for name in ("train", "write", "ablate", "report") if getattr(args, name)]
    if len(commands) > 1:
        raise Stop(f"--{' and --'.join(commands)} are commands of their own; give one of them")
    if args.report:
        return rewrite_report(Path(args.report))
    if settings.seq_len > MAX_SEQ_LEN:
        raise Stop(f"SEQ_LEN = {settings.seq_len}: is over MAX_SEQ_LEN = {MAX_SEQ_LEN} in genome.py; raise that")
    if args.save and not args.train:
        raise Stop("--save keeps the weights that --train makes; name a genome with --train FILE")
    if args.prompt is None:
        args.prompt = PROMPT
    elif commands not in (["train"], ["write"]):
        raise Stop("--prompt is what --train FILE and --write FILE go on from; name one of them")
    if args.new and commands:
        raise Stop(f"--new begins a search again; it has no meaning beside --{commands[0]}")
    if args.start and commands:
        raise Stop(f"--start is for a search; it has no meaning beside --{commands[0]}")
    if commands not in ([], ["ablate"]) and (args.ray is not None or args.minutes < math.inf):
        raise Stop(f"--ray and --minutes are for a search and --ablate; they have no meaning beside --{commands[0]}")
    if not args.minutes > 0:
        raise Stop(f"--minutes {args.minutes:g}: has to be above 0")
    if (args.scale != 1 or args.deeper) and not args.train:
        raise Stop("--scale and --deeper change the design that --train trains; name it with --train FILE")
    if not 0 < args.scale <= MAX_WIDTH or not 0 <= args.deeper <= MAX_GENES:
        raise Stop(f"--scale {args.scale:g} --deeper {args.deeper}: the one has to be above 0 and up to {MAX_WIDTH:,}, "
                   f"the other from 0 to {MAX_GENES}")  # fmt: skip
    named = args.train or args.ablate
    designs = read_designs(Path(named), args.scale, args.deeper) if named else {}
    settings = dataclasses.replace(settings, start=tuple(read_start(args.start, settings)))
    if args.save and not Path(args.save).absolute().parent.is_dir():
        raise Stop(f"--save {args.save}: there is no folder {Path(args.save).absolute().parent}")
    if not args.write:  # that builds no op anew
        check_ops()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if args.write and not Path(args.write).is_file():
        raise Stop(f"--write {args.write}: there is no such file; --train FILE --save makes one")
    if not args.write and args.ray is None:
        check_device(name, device, settings)
    data = prepare.open_source(data_dir=args.data_dir, demo=args.demo)
    shortest = min(len(data.train), len(data.val), len(data.test), settings.eval_tokens + 1) - 1
    if shortest < settings.seq_len:
        raise Stop(f"SEQ_LEN = {settings.seq_len}: EVAL_TOKENS and each split have to fill it, not {shortest} tokens")
    for file, genome in zip(args.start, settings.start, strict=True):
        if not is_small(genome, settings, data.vocab_size):
            raise Stop(f"--start {file}: {genome.num_params(data.vocab_size):,} parameters, over MAX_PARAMS = "
                       f"{settings.max_params:,}; raise that")  # fmt: skip
    least = Genome((Gene("shift"),), embed_dim=min(WIDTHS)).num_params(data.vocab_size)
    if settings.max_params < least:
        raise Stop(f"MAX_PARAMS = {settings.max_params:,}: embedding and head of the smallest genome have {least:,}")
    if args.write:
        model = load_model(Path(args.write), data, device)
        with GpuTurn(turn_file(device), f"process {os.getpid()} for --write {args.write}", say):
            return say(write_text(model, data, args.prompt, settings.seq_len, settings.seed))
    if args.train:
        return train_one(args, designs, settings, data, device)
    out = Path(args.out or ("demo" if args.demo else "."))
    own = out / "best_genome.json"
    if any(Path(file).resolve() == own.resolve() for file in args.start):
        raise Stop(f"--start {own}: this run will write that file; copy it first, or use --out DIR")
    with contextlib.ExitStack() as stack:
        record, cluster = stack.enter_context(Record(out)), None
        if args.ray is not None:
            known = (record.header or {}).get("device")
            ends = STARTED + 60 * args.minutes
            cluster = stack.enter_context(RayPool(args.ray, data, settings, out, known, ends))
            name = cluster.device_name
            check_device(name, device, settings)
        elif torch.cuda.device_count() > 1:
            say(f"{torch.cuda.device_count()} GPUs: this run uses the first. All of them: uv run --extra ray evolve.py "
                "--ray. Another run on another one: CUDA_VISIBLE_DEVICES=1 uv run evolve.py --out DIR")  # fmt: skip
        header, plan = describe_run(settings, data, name), lambda rows: next_tasks(rows, settings, data.vocab_size)
        if args.ablate:
            begin_or_join(record, header)
            (design,) = designs.values()
            plan = functools.partial(ablation_tasks, genome=design, settings=settings)
            left = len(plan(record.rows))
            what = f"{left} evaluations of {design.summary} without its parts"
        else:
            left = begin_or_go_on(record, header, settings, args.new)
            what = f"generations: {settings.max_generations} of {settings.population_size}"
        controls, finished = find_controls(out, record.header), True
        if left:
            trial = f"{budget_text(settings)} a trial on {name}"
            say(f"{data.source}: {len(data.train):,} training tokens. {trial}, {what}. Results in {record.path}\n")
            finished = evolve(record, plan, controls, settings, data, device, cluster, args.minutes)
        else:
            write_reports(out, record.rows, record.header, settings, controls)
        if args.ablate and finished:
            say(f"\n{out / 'report.md'} has what each part is worth")
        elif left and finished:
            say(end_text(record.rows, settings, data.vocab_size, controls, out))


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no arrow shows a question mark
    prepare.end_on_signals()
    args = parse(argv)
    try:
        run_command(args)
    except (Stop, GenomeError, prepare.PrepareError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        end = "What was trained is lost." if args.train else "Nothing is lost; run the same command again to go on."
        with contextlib.suppress(OSError):
            print(f"\nStopped. {end}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # `| head`: nobody reads on, and Python would complain of that at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
