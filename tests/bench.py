"""tests/bench.py: how fast the trainer is, run by hand on a GPU, on tokens that prepare.py wrote.

    uv run tests/bench.py --data-dir DIR              everything
    uv run tests/bench.py --data-dir DIR speed bpb    only these
    uv run tests/bench.py --data-dir DIR --seconds 3 soak

speed    the transformer genome through evolve.py's trainer against a hand-written, wholly compiled and captured loop
frame    milliseconds of a step by what they go to: the frame (embedding, head, loss, their optimizer), the genes, Muon
bpb      its val_bpb after 5, 10 and 30 seconds, three seeds (--seeds) each
ops      forward and backward milliseconds of every op and trait choice
soak     100 random genomes at 2 s each through the workers: time outside training, memory, statuses, and how many get
         below the unigram entropy
outside  seconds of an evaluation beside its training, by what they go to, on the second genome of each kind
designs  val_bpb of the named designs after 10 s
hurdle   children of the winner to their end, by kind: how each tenth of the loss curve ranks them, and whom the
         hurdle would stop wrongly
fidelity a dozen unlike genomes at a quarter, a half, one and two times the budget: how one budget ranks for another
inherit  children of the winner that begin with its weights and train for a third of the budget: does that rank them
         better than from scratch?
anchor   the best baseline of results.tsv once more, with the seed of its first evaluation: is this card as fast as the
         one that the record is of? Ends with an error where it is not
worth    what each choice of the search space adds to a transformer or to the winner, 10 s, three seeds each
"""

import argparse
import collections
import dataclasses
import difflib
import gc
import itertools
import math
import random
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn
import torch.nn.functional as F
from designs import NAMED_DESIGNS

import evolve
import genome as genomes
import prepare
from evolve import rank_correlation
from genome import COMPILED, LEVELS, OPS, Block, Frame, Gene, Genome, compile_part, random_genome, transformer

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200, by the datasheet
REFERENCE = transformer(6, 256, 2)
WINNER = Path(__file__).resolve().parent.parent / "runs/seed0-5s/best_genome.json"  # of the first published run


def transformers(*sizes: tuple[int, int]) -> dict[str, Genome]:
    """Transformers of so many layers and such a width, by name."""
    return {f"transformer-{n}x{dim}": transformer(n, dim) for n, dim in sizes}


TRANSFORMERS = transformers((3, 256), (4, 256), (7, 256), (3, 320))
DEVICE = torch.device("cuda:0")


# ----------------------------------------------------------------------------------------------------------------------
# The same transformer by hand: nothing of genome.py or of evolve.py's trainer is used.


class HandBlock(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.gain1, self.gain2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.qkv = nn.Parameter(torch.randn(3, dim, dim) / dim**0.5)
        self.out = nn.Parameter(torch.randn(dim, dim) * 0.1 / dim**0.5)
        self.gate_up = nn.Parameter(torch.randn(2, hidden, dim) / dim**0.5)
        self.down = nn.Parameter(torch.randn(dim, hidden) * 0.1 / hidden**0.5)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        h = F.rms_norm(x, (C,), self.gain1.bfloat16())
        q, k, v = F.linear(h, self.qkv.bfloat16().flatten(0, 1)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),))

        def rope(t):
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)

        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, C), self.out.bfloat16())
        h = F.rms_norm(x, (C,), self.gain2.bfloat16())
        gate, up = F.linear(h, self.gate_up.bfloat16().flatten(0, 1)).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down.bfloat16())


class HandModel(nn.Module):
    def __init__(self, vocab_size, seq_len, n_layer=6, dim=256, heads=2, hidden=704):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab_size, dim))
        self.blocks = nn.ModuleList(HandBlock(dim, heads, hidden) for _ in range(n_layer))
        self.head = nn.Parameter(torch.randn(vocab_size, dim) * 0.001)
        speed = 10_000 ** (-torch.arange(0, dim // heads, 2).float() / (dim // heads))
        angle = torch.arange(seq_len).float()[:, None] * speed
        self.register_buffer("cos", angle.cos().bfloat16())
        self.register_buffer("sin", angle.sin().bfloat16())

    def forward(self, idx, targets):
        x = F.rms_norm(F.embedding(idx, self.embedding).bfloat16(), (self.embedding.size(1),))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = 15 * torch.tanh(F.linear(F.rms_norm(x, (x.size(-1),)), self.head.bfloat16()).float() / 15)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.compile(dynamic=False)
def hand_muon(params: list, grads: list, momenta: list, lr):
    for p, g, m in zip(params, grads, momenta, strict=True):
        m.lerp_(g, 0.05)
        x = torch.lerp(g, m, 0.95).bfloat16()
        tall = x.size(-2) > x.size(-1)
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.mT if tall else x
        p.sub_(lr * max(1, x.size(-2) / x.size(-1)) ** 0.5 * x)


def hand_written(tokens, vocab_size, rows, seq_len, device):
    """Returns a function that makes one step: the whole model compiled, the whole step in one CUDA graph."""
    torch.manual_seed(0)
    model = HandModel(vocab_size, seq_len).to(device)
    forward = torch.compile(model, dynamic=False)
    matrices = [p for p in model.blocks.parameters() if p.dim() >= 2]
    shapes = collections.defaultdict(list)
    for p in matrices:
        shapes[p.shape].append(p)
    stacks = [torch.stack([p.detach() for p in group]) for group in shapes.values()]
    for group, stack in zip(shapes.values(), stacks, strict=True):
        for p, part in zip(group, stack, strict=True):
            p.data = part  # parameters are views of the stacks that Muon updates
    momenta = [torch.zeros_like(stack) for stack in stacks]
    vectors = [p for p in model.blocks.parameters() if p.dim() == 1]
    groups = [
        dict(params=[model.embedding], lr=0.35),
        dict(params=[model.head], lr=0.007),
        dict(params=vectors, lr=0.01),
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True, capturable=True)
    lr = torch.full((), 0.02, device=device)
    window = torch.zeros((), dtype=torch.int64, device=device)
    n_windows = (len(tokens) - 1) // seq_len
    order = torch.randperm(n_windows, device=device)
    reach, span = torch.arange(rows, device=device), torch.arange(seq_len + 1, device=device)

    def step():
        place = order[(window + reach) % n_windows][:, None] * seq_len + span
        ids = tokens[place].long() & 0xFFFF
        forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        with torch.no_grad():
            grads = [torch.stack([p.grad for p in group]) for group in shapes.values()]
            hand_muon(stacks, grads, momenta, lr)
        adamw.step()
        model.zero_grad(set_to_none=True)
        window.add_(rows)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def tokens_per_second(step, tokens_a_step, seconds=2.0):
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            step()
        torch.cuda.synchronize()
        steps += 20
    return steps * tokens_a_step / (time.perf_counter() - start)


def task_for(genome: Genome, seed: int = 0, id: str = "bench") -> evolve.Task:
    return evolve.Task("bench", id, genome, seed, seed)


def speed(data, settings):
    data = data.to(DEVICE)
    rows = settings.batch_tokens // settings.seq_len
    trial = evolve.Trial(task_for(REFERENCE), data, settings, rows)
    start = time.perf_counter()
    ours = trial.capture()
    capture_s = time.perf_counter() - start
    trial.optimizer.schedule.fill_(1.0)
    theirs = hand_written(data.train, data.vocab_size, rows, settings.seq_len, DEVICE)
    rates = {"ours": [], "by hand": []}
    for _ in range(3):  # in turns, so that both meet the same clocks
        rates["ours"].append(tokens_per_second(ours, settings.batch_tokens))
        rates["by hand"].append(tokens_per_second(theirs, settings.batch_tokens))
    mine, hand = (statistics.median(r) for r in rates.values())
    dim, n_layer = REFERENCE.embed_dim, len(REFERENCE.network) // 4
    matmul = REFERENCE.num_params(data.vocab_size) - data.vocab_size * dim
    flops = 6 * matmul + 6 * n_layer * settings.seq_len * dim  # per token; causal attention is half of 12 L T C
    print(f"speed of {REFERENCE.summary}, dim {dim}, {REFERENCE.num_params(data.vocab_size):,} parameters")
    print(f"  evolve.py {mine / 1e6:.2f} M tokens/s, by hand {hand / 1e6:.2f} M tokens/s, ratio {mine / hand:.3f}")
    print(f"  all: {', '.join(f'{name} ' + ' '.join(f'{r / 1e6:.3f}' for r in rs) for name, rs in rates.items())}")
    print(f"  model FLOP utilisation {mine * flops / PEAK_FLOPS:.1%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s")
    print(f"  warm-up and capture {capture_s:.2f} s", flush=True)


def milliseconds(work, times: int = 30) -> float:
    """Of work, captured and replayed."""
    stream = evolve.capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def step_times(genome: Genome, data, settings) -> tuple[float, float, evolve.Trial]:
    """Milliseconds of a whole step, and of the optimizer alone."""
    trial = evolve.Trial(task_for(genome), data, settings, settings.batch_tokens // settings.seq_len)
    whole = milliseconds(trial.step)
    grads = {p: torch.randn_like(p) * 1e-3 for p in trial.model.parameters()}

    def update():
        for p, grad in grads.items():
            p.grad = grad
        trial.optimizer.step()

    return whole, milliseconds(update), trial


def bandwidth() -> float:
    """Bytes a second of the device's memory, by a copy."""
    source, copy = (torch.empty(2**28, device=DEVICE) for _ in range(2))
    return 2 * source.nbytes / milliseconds(lambda: copy.copy_(source)) * 1e3


def frame(data, settings):
    data = data.to(DEVICE)
    tokens, vocab, rate = settings.batch_tokens, data.vocab_size, bandwidth()
    print(f"milliseconds of a step of {tokens:,} tokens; in brackets, at {PEAK_FLOPS / 1e12:.0f} TFLOP/s and the "
          f"{rate / 1e12:.2f} TB/s of a copy")  # fmt: skip
    for name, genome in {"transformer-6x256": REFERENCE, "winner": the_winner()}.items():
        torch.cuda.reset_peak_memory_stats()
        empty = dataclasses.replace(genome, genes=[Gene("identity")])
        around, around_update, trial = step_times(empty, data, settings)
        memory = torch.cuda.max_memory_allocated() / 2**30
        tables = sum(p.numel() for p in (trial.model.embed.table, trial.model.head.matrix) if p is not None)
        whole, update, trial = step_times(genome, data, settings)
        matrices = trial.model.parameter_groups().matrices
        sizes = [(p.numel(), min(p.shape[-2:]), max(p.shape[-2:])) for p in matrices]
        ideal = {
            "products": 6 * tokens * vocab * empty.embed_dim / PEAK_FLOPS,
            "three passes over bf16 logits": 3 * 2 * tokens * vocab / rate,
            "AdamW": 28 * tables / rate,
        }
        genes = 6 * tokens * sum(n for n, _, _ in sizes) / PEAK_FLOPS  # attention's own not counted
        muon = sum(5 * (4 * n * small + 2 * small**2 * n / large) for n, small, large in sizes) / PEAK_FLOPS
        parts = ", ".join(f"{what} {seconds * 1e3:.2f}" for what, seconds in ideal.items())
        print(f"  {name}: {whole:.3f}, {tokens / whole / 1e3:.2f} M tokens/s")
        print(f"    frame {around:.3f}, its optimizer {around_update:.3f} ({parts}), peak memory {memory:.2f} GiB")
        print(f"    genes {whole - update - around + around_update:.3f} (products {genes * 1e3:.2f})")
        print(f"    their optimizer {update - around_update:.3f} (products {muon * 1e3:.2f})", flush=True)


def bpb(data, settings, seeds, budgets=(5.0, 10.0, 30.0)):
    data = data.to(DEVICE)
    print("val_bpb of the same genome through evaluate()")
    for seconds in budgets:
        results = []
        for seed in range(seeds):
            start = time.perf_counter()
            s = dataclasses.replace(settings, time_budget=seconds)
            results.append(evolve.evaluate(task_for(REFERENCE, seed), data, s, evolve.Turn()))
            wall = time.perf_counter() - start
        scores = [r.val_bpb for r in results]
        print(f"  {seconds:g} s: {statistics.fmean(scores):.4f}  ({' '.join(f'{x:.4f}' for x in scores)}), "
              f"{results[-1].tokens_per_s / 1e6:.2f} M tokens/s, peak {results[-1].memory_mb} MiB, trained "
              f"{results[-1].seconds:.3f} s, {wall - results[-1].seconds:.2f} s outside", flush=True)  # fmt: skip


def every_gene(dim: int):
    """Every op with its defaults, and with each other choice of each trait; the wiring's choices on a gate."""
    for name, op in OPS.items():
        width = None if op.keeps_width else dim
        yield Gene(name, width)
        for trait, choices in op.traits.items():
            for choice in choices[1:]:
                yield Gene(name, width, **{trait: choice})
    for trait, choices in genomes.WIRING.items():
        for choice in choices[1:]:
            yield Gene("gate", dim, skip=int(trait == "scale"), **{trait: choice})


def ops(data, settings, dim=256):
    print(f"forward + backward of an op at dim {dim}, {settings.batch_tokens:,} tokens, compiled and captured")
    rows = settings.batch_tokens // settings.seq_len
    COMPILED.clear()
    for gene in every_gene(dim):
        held = torch.cuda.memory_allocated()
        reads = gene.reads
        frame = Frame(data.vocab_size, dim, torch.bfloat16)
        block = Block(gene, dim if "stream" in reads else None, dim if gene.skip else None, frame).cuda()
        stream, embedding = (
            torch.randn(rows, settings.seq_len, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2)
        )
        ids = torch.randint(data.vocab_size, (rows, settings.seq_len), device="cuda")
        x, embedding = stream if "stream" in reads else None, embedding if "embedding" in reads else None
        inputs = [x, stream if gene.skip else None, ids if "ids" in reads else None, embedding]
        start = time.perf_counter()
        reason = "not compiled by choice"
        if OPS[gene.op].compiles:
            reason = compile_part(block, ("bench", gene, dim), inputs)
        wanted = [t for t in (x, embedding, *block.parameters()) if t is not None]
        y = block(*inputs).detach()  # detached: a graph that lives on would keep the step from being captured
        out = torch.randn_like(y)

        def work(block=block, inputs=inputs, out=out, wanted=wanted):
            torch.autograd.grad(block(*inputs), wanted, out)

        work()
        torch.cuda.synchronize()
        first_s = time.perf_counter() - start
        torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(work)  # an op that cannot be captured ends the benchmark with torch's own reason
        usual = Gene(gene.op, gene.dim).to_dict()
        changed = ", ".join(f"{trait} {value}" for trait, value in gene.to_dict().items() if usual[trait] != value)
        finite = "" if y.isfinite().all() else "NOT FINITE "
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30
        print(f"  {gene.op:<11} {changed:<30} {ms:7.3f} ms   peak {peak:5.2f} GiB   "
              f"first use {first_s:5.1f} s   {finite}{reason}", flush=True)  # fmt: skip
        del block, stream, x, embedding, inputs, y, out, wanted, work
        gc.collect()
        torch.cuda.empty_cache()


def evaluated(tasks, settings, data):
    """The results of tasks, from workers that end with them."""
    with evolve.Pool(data, settings, DEVICE, Path("bench")) as pool:
        for result in pool.run(tasks):
            evolve.say(evolve.result_text(result))
            yield result


def soak(data, settings, n=100):
    rng, found = random.Random(1), []
    while len(found) < n:
        genome = random_genome(rng)
        if genome.mixes_tokens and genome.num_params(data.vocab_size) <= settings.max_params:
            found.append(genome)
    tasks = [task_for(g, id=f"r{i:03d}") for i, g in enumerate(found)]
    start = time.perf_counter()
    started, results = None, []
    for r in evaluated(tasks, settings, data):
        started = started or time.perf_counter() - start - r.seconds
        results.append(r)
        wall = time.perf_counter() - start
    trained = sum(r.seconds for r in results)
    print(f"soak: {len(results)} random genomes at {settings.time_budget:g} s: {wall:.0f} s in all, "
          f"{trained:.0f} s of it training, {started:.1f} s until the first began")  # fmt: skip
    outside, with_start = ((wall - trained - t) / len(results) for t in (started, 0))
    on_device, of_gru = (statistics.fmean(r.outside for r in results if name in r.note) for name in ("", "gru"))
    print(f"  seconds outside the budget, mean: {outside:.2f}, or {with_start:.2f} with the start; "
          f"on the device {on_device:.2f}, of genomes with a gru {of_gru:.2f}")  # fmt: skip
    print(f"  longest training {max(r.seconds for r in results):.3f} s")
    print(f"  status {dict(collections.Counter(r.status for r in results))}")
    print(f"  memory held before an evaluation: {sorted({r.held_mb for r in results})} MiB")
    unigram = unigram_entropy(data)
    below = sum((r.val_bpb or 99) < unigram for r in results) / len(results)
    print(f"  below the unigram entropy of {unigram:.3f} bits per byte: {below:.0%}")
    print("  notes " + "; ".join(sorted({r.note for r in results if r.note})), flush=True)


def outside(data, settings):
    data = data.to(DEVICE)
    print("seconds beside training: once ready to train, and before, while another one trains")
    for name, genome in {"transformer-6x256": REFERENCE, "winner": the_winner()}.items():
        for seed in range(2):  # the first compiles
            times, start = {}, time.perf_counter()

            def lap(what, times=times):
                nonlocal start
                torch.cuda.synchronize()
                times[what], start = time.perf_counter() - start, time.perf_counter()

            evolve.check_network(genome, seed)
            lap("the check on the CPU")
            trial = evolve.Trial(task_for(genome, seed), data, settings, settings.batch_tokens // settings.seq_len)
            lap("building" if seed else "building and compiling")
            step = trial.capture()
            lap("warm-up and capture")
            step()
            lap("a step")
            trial.sees_the_future()
            lap("is the future seen?")
            trial.score(data.val)
            lap("scoring val")
            trial.probe()
            lap("does it copy? (in a final)")
            del trial, step
            evolve.free_memory()
            lap("freeing memory")
        print(f"  {name}: " + ", ".join(f"{what} {seconds:.3f}" for what, seconds in times.items()), flush=True)


def unigram_entropy(data) -> float:
    """Bits per byte of a model that knows how frequent each token is in val, and nothing else."""
    counts = torch.bincount(torch.from_numpy(data.val.astype("int64")), minlength=data.vocab_size).double()
    counts[data.bos] = 0
    nats = -(counts * (counts / counts.sum()).clamp(min=1e-12).log2()).sum()
    return (nats / (counts * torch.from_numpy(data.token_bytes)).sum()).item()


def designs(data, settings):
    print(f"val_bpb after {settings.time_budget:g} s")
    named = {**TRANSFORMERS, **LEVELS, **NAMED_DESIGNS}
    list(evaluated([task_for(g, id=name) for name, g in named.items()], settings, data))


def the_winner() -> Genome:
    """The genome of WINNER."""
    return next(iter(evolve.read_designs(WINNER, 1.0, 0).values()))


def with_interval(a, b, samples=2000) -> str:
    """The rank correlation with its 95 % interval, from resampled pairs (Efron 1979)."""
    rng, pairs, drawn = random.Random(0), list(zip(a, b, strict=True)), []
    while len(drawn) < samples:
        some = rng.choices(pairs, k=len(pairs))
        drawn += [r] if (r := rank_correlation(*zip(*some, strict=True))) is not None else []
    drawn.sort()
    return f"{rank_correlation(a, b):5.2f} ({drawn[samples // 40]:.2f} to {drawn[-samples // 40]:.2f})"


def children_of(parent: Genome, small) -> dict[str, Genome]:
    """Children of a genome by name, which begins with their kind."""
    cuts = genomes.clean_cuts(parent)
    blocks = [(a, b) for a, b in itertools.pairwise(cuts) if any(g.op != "norm" for g in parent.genes[a:b])]
    sized = [i for i, gene in enumerate(parent.genes) if gene.dim]
    made = {f"rate {lr}": dataclasses.replace(parent, lr_factor=lr) for lr in (0.5, 0.7, 1.4, 2.0)}
    made |= {f"deeper, block at {a} twice": genomes.spliced(parent, b, b, parent.genes[a:b]) for a, b in blocks}
    made["deeper, grown"] = dataclasses.replace(genomes.grown(parent, 1), tied=True)
    made |= {f"repeat of gene {i}": genomes.with_gene(parent, i, parent.genes[i].change(repeat=2)) for i in sized[:3]}
    made |= {f"fast, no block at {a}": genomes.spliced(parent, a, b, []) for a, b in blocks if b < len(parent.genes)}
    made |= {f"{'fast' if f < 1 else 'large'}, width x{f}": genomes.scaled(parent, f) for f in (0.5, 0.75, 1.25, 1.5)}
    rng = random.Random(0)
    made |= {f"mutant {n}": genomes.mutate(parent, rng, 0.3).genome for n in range(4)}
    by_key = {genome.key: name for name, genome in made.items() if small(genome) and genome.key != parent.key}
    return {name: made[name] for name in by_key.values()}


def hurdle(data, settings, share=evolve.HURDLE):
    children = children_of(the_winner(), lambda g: evolve.is_small(g, settings, data.vocab_size))
    print(f"{len(children)} children of the winner, {settings.time_budget:g} s each, run to the end")
    results = []
    for r in evaluated([task_for(g, id=name) for name, g in children.items()], settings, data):
        print(f"  curve {r.losses}", flush=True)
        results += [r] if r.status == "ok" else []
    scores = [r.val_bpb for r in results]
    print("rank correlation of a tenth of the loss curve with the final score, 95 % interval")
    for tenth in range(evolve.CURVE):
        print(f"  {tenth + 1:2d}  {with_interval([r.curve[tenth] for r in results], scores)}")
    at_half, at_end = ([sorted(own).index(x) + 1 for x in own] for own in ([r.halfway_loss for r in results], scores))
    limit = math.ceil(share * len(results))
    print(f"child, its rank of {len(results)} half-way and at the end; stopped beyond {limit}")
    for r, half, end in sorted(zip(results, at_half, at_end, strict=True), key=lambda x: x[2]):
        print(f"  {r.id:<30} {half:3d} {end:3d}  {r.val_bpb:.4f}  {'stopped' if half > limit else ''}", flush=True)


def unlike() -> dict[str, Genome]:
    """A dozen genomes that differ in kind, size and speed."""
    winner = the_winner()
    return {
        **transformers((2, 256), (4, 256), (7, 256), (3, 320), (10, 192)),
        "transformer-9x256-tied": transformer(9, 256, tied=True),
        "winner": winner,
        "winner, grown": dataclasses.replace(genomes.grown(winner, 1), tied=True),
        "winner, width x0.75": genomes.scaled(winner, 0.75),
        "parallel": NAMED_DESIGNS["parallel"],
        "retnet": NAMED_DESIGNS["retnet"],
        "gpt2": NAMED_DESIGNS["gpt2"],
    }


def fidelity(data, settings, budgets=(0.25, 0.5, 1.0, 2.0)):
    named = unlike()
    print(f"{len(named)} genomes at {', '.join(f'{settings.time_budget * b:g}' for b in budgets)} s")
    tasks = [dataclasses.replace(task_for(g, id=name), budget=b) for b in budgets for name, g in named.items()]
    done = {(r.id, r.budget): r for r in evaluated(tasks, settings, data) if r.status == "ok"}
    names = [name for name in named if all((name, b) in done for b in budgets)]
    for name in sorted(names, key=lambda name: done[name, budgets[-1]].val_bpb):
        print(f"  {name:<24}" + "".join(f"{done[name, b].val_bpb:9.4f}" for b in budgets))
    scores = {b: [done[name, b].val_bpb for name in names] for b in budgets}
    print(f"rank correlation between budgets, {len(names)} genomes; last, of the half-way loss with the score")
    for a in budgets:
        half = [done[name, a].halfway_loss for name in names]
        print(f"  {a:5g}" + "".join(f"{rank_correlation(scores[a], scores[b]):7.2f}" for b in budgets)
              + f"     {with_interval(half, scores[a])}", flush=True)  # fmt: skip


def take_over(model: genomes.Model, parent: genomes.Model) -> int:
    """Copy the weights of every gene that both networks have, in the same order and of equal shapes; how many genes."""
    lines = [[(n.gene.bare, n.d_in, n.d_skip) for n in m.genome.network] for m in (model, parent)]
    matches = difflib.SequenceMatcher(None, *lines, autojunk=False).get_matching_blocks()
    pairs = [(model.blocks[m.a + i], parent.blocks[m.b + i]) for m in matches for i in range(m.size)]
    for mine, theirs in [*pairs, (model.embed, parent.embed), (model.head, parent.head)]:
        known = dict(theirs.named_parameters())
        for name, p in mine.named_parameters():
            if name in known and known[name].shape == p.shape:
                p.data.copy_(known[name].data)
    return len(pairs)


def inherit(data, settings, n=24):
    data, rng, parent = data.to(DEVICE), random.Random(0), the_winner()
    named = {"the parent": parent}
    while len(named) <= n:
        child = genomes.mutate(parent, rng, 0.3)
        if evolve.is_small(child.genome, settings, data.vocab_size):
            named[f"{len(named)} {child.operator}"] = child.genome
    whole, model = evolve.run_trial(task_for(parent), data, settings, evolve.Turn())
    print(f"the parent after {settings.time_budget:g} s: {whole.val_bpb:.4f}; then, of each, a third of that from its "
          "weights, a third from scratch, and all of it from scratch", flush=True)  # fmt: skip
    found = []
    for name, genome in named.items():
        task = dataclasses.replace(task_for(genome, 1, name), budget=1 / 3)
        trial = evolve.Trial(task, data, settings, settings.batch_tokens // settings.seq_len)
        shared = take_over(trial.model, model)
        trial.run()
        scratch = [
            evolve.evaluate(dataclasses.replace(task, budget=b), data, settings, evolve.Turn()) for b in (1 / 3, 1)
        ]
        scores = [r.val_bpb if r.status == "ok" else math.nan for r in (trial.result, *scratch)]
        print(
            f"  {name:<44} {shared:3d} of {len(genome.network):3d} genes" + "".join(f"{x:9.4f}" for x in scores),
            flush=True,
        )
        found += [scores] if not any(map(math.isnan, scores)) else []
        del trial
        evolve.free_memory()
    taken, third, full = zip(*found, strict=True)
    print(f"rank correlation with all of it from scratch, {len(found)} genomes: from the parent's weights "
          f"{with_interval(taken, full)}, a third from scratch {with_interval(third, full)}", flush=True)  # fmt: skip


def everywhere(genome: Genome, op: str, **changes) -> Genome:
    """The genome with those traits in every gene of an op."""
    return dataclasses.replace(genome, genes=[g.change(**changes) if g.op == op else g for g in genome.genes])


def in_the_last(genome: Genome, op: str, **changes) -> Genome:
    i = max(i for i, gene in enumerate(genome.genes) if gene.op == op)
    return genomes.with_gene(genome, i, genome.genes[i].change(**changes))


def in_front(genome: Genome, *genes: Gene) -> Genome:
    return genomes.spliced(genome, 0, 0, genes)


def additions() -> dict[str, tuple[Genome, Genome]]:
    """What is added, with the gene that it changes -> a design without it and one with it.

    t4 is a transformer of 4 layers, w the winner; both with tied heads, so that tables have room.
    """
    t4, w = transformer(4, 256, tied=True), dataclasses.replace(the_winner(), tied=True)
    made = {}
    for name, base in {"t4": t4, "w": w}.items():
        for traits in ({}, {"gated": False}, {"n": 1}, {"n": 3}, {"slots": 4096}, {"slots": 16384}):
            words = " ".join(f"{k} {v}" for k, v in traits.items())
            table = Gene("ngram", 256, skip=1, **traits)
            made[f"{name}: ngram in front, {words or 'as usual'}"] = base, in_front(base, table)
        table = Gene("ngram", 256, skip=1, gated=False, scale="small")
        made[f"{name}: ngram in front, gated False, scale small"] = base, in_front(base, table)
        narrow = [Gene("ngram", 64, slots=32768), Gene("linear", 256, skip=2)]
        made[f"{name}: ngram in front, slots 32768, width 64"] = base, in_front(base, *narrow)
        for choice in (2, 3, 4):
            made[f"{name}: conv {choice} in attention"] = base, everywhere(base, "attention", conv=choice)
        for choice in ("token", "bigram", "embedding"):
            made[f"{name}: values {choice} in the last attention"] = base, in_the_last(base, "attention", values=choice)
        made[f"{name}: exclusive attention"] = base, everywhere(base, "attention", exclusive=True)
    for trait, choices in {"rope_base": (1_000, 100_000), "rope_share": (0.5, 0.25), "window": (64, 256)}.items():
        for choice in choices:
            made[f"t4: {trait} {choice}"] = t4, everywhere(t4, "attention", **{trait: choice})
    made["t4: window 64 in the first attention"] = t4, genomes.with_gene(t4, 1, t4.genes[1].change(window=64))
    made["t4: values embedding in every attention"] = t4, everywhere(t4, "attention", values="embedding")
    for kind in ("relu2", "leaky_relu2"):
        made[f"t4: gate {kind}"] = t4, everywhere(t4, "gate", kind=kind)
        made[f"t4: plain {kind}"] = t4, everywhere(t4, "gate", kind=kind, gated=False)
    made["t4: plain gelu"] = t4, everywhere(t4, "gate", kind="gelu", gated=False)
    x0 = genomes.modern(4, 256, tied=True, mlp="swiglu")
    for scale in ("small", "zero"):
        made[f"t4: x0 before each layer, {scale}"] = t4, everywhere(x0, "identity", scale=scale)
    for scale in ("channel", "small", "zero"):
        changed = everywhere(everywhere(t4, "attention", scale=scale), "gate", scale=scale)
        made[f"t4: scale {scale} in every branch"] = t4, changed
    made["t4: stride 2 in every gate"] = t4, everywhere(t4, "gate", stride=2)
    made["t4: stride 2 in the last attention"] = t4, in_the_last(t4, "attention", stride=2)
    return made


def worth(data, settings, seeds, only=""):
    """Differences of val_bpb with the same batches and seeds; the noise of a difference is pooled over all.

    only: a regular expression; of the additions those in whose name it is found.
    """
    made = {name: pair for name, pair in additions().items() if re.search(only, name)}
    named = {g.key: g for pair in made.values() for g in pair}
    print(f"{len(made)} additions, {settings.time_budget:g} s, {seeds} seeds; below 0 is better")
    results: dict[str, list] = {key: [None] * seeds for key in named}
    for r in evaluated([task_for(g, seed, key) for seed in range(seeds) for key, g in named.items()], settings, data):
        results[r.id][r.seed] = r if r.status == "ok" else None
    pairs = {
        name: [pair for pair in zip(results[a.key], results[b.key], strict=True) if None not in pair]
        for name, (a, b) in made.items()
    }
    found = {name: [b.val_bpb - a.val_bpb for a, b in both] for name, both in pairs.items()}
    noise = math.sqrt(statistics.fmean(statistics.variance(diffs) for diffs in found.values() if len(diffs) > 1))
    interval = 1.96 * noise / seeds**0.5
    print(f"noise of one difference {noise:.4f}; the 95 % interval of a mean of {seeds} is +-{interval:.4f}")
    for name, both in pairs.items():
        if not both:
            print(f"  {name:<55} failed")
            continue
        before, after = (statistics.fmean(r.tokens_per_s for r in rows) for rows in zip(*both, strict=True))
        params = both[0][1].params
        over = " OVER MAX_PARAMS" if params > settings.max_params else ""
        print(f"  {name:<55} {statistics.fmean(found[name]):+.4f}   {params / 1e6:5.2f} M parameters{over}   "
              f"speed x{after / before:.3f}", flush=True)  # fmt: skip


def anchor(data, settings):
    header, _, rows = evolve.read_results(Path("results.tsv").read_bytes())
    settings, card = evolve.settings_of(header, rows), torch.cuda.get_device_name(DEVICE)
    if not (best := evolve.best_baseline(rows)):
        return print("anchor: results.tsv has no baseline yet")
    if card != header["device"]:
        raise SystemExit(f"This is a {card}, the record is of a {header['device']}: do not go on with it here")
    task = evolve.Task("bench", best.id, best.genome, best.first.seed, best.first.order)
    (again,), first = evaluated([task], settings, data), best.first
    if again.status != "ok":
        raise SystemExit(f"anchor: {first.id} ended with status {again.status}. {again.note}")
    change = again.tokens_per_s / first.tokens_per_s - 1
    print(f"anchor: {first.id}, seed {first.seed}: val_bpb {again.val_bpb:.4f} ({first.val_bpb:.4f} in the record), "
          f"{again.tokens_per_s:,} tokens/s ({first.tokens_per_s:,}; {change:+.1%})", flush=True)  # fmt: skip
    if abs(change) > evolve.SLOWER:
        raise SystemExit("This card is not as fast as that of the record: do not go on with it here")


MEASURED = (speed, frame, bpb, ops, soak, outside, designs, hurdle, fidelity, inherit, anchor, worth)
BENCHMARKS = {f.__name__: f for f in MEASURED}
SECONDS = {"inherit": 10.0, "soak": 2.0, "designs": 10.0, "worth": 10.0}
SEEDS = {"bpb": 3, "worth": 3}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="the folder of shards that prepare.py was given (default: FineWeb-Edu)")
    parser.add_argument("--seconds", type=float, help="of training in a trial (not of speed, bpb and ops)")
    parser.add_argument("--seeds", type=int, help="of each genome in bpb and worth")
    parser.add_argument("--only", default="", help="of worth, the additions in whose name this regular expression is")
    parser.add_argument("which", nargs="*", choices=[*BENCHMARKS, []], help="default: all")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.py measures a GPU, and none was found")
    data = prepare.load(prepare.source_folder(data_dir=args.data_dir))
    torch.set_float32_matmul_precision("high")
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {data.source} {data.fingerprint}\n", flush=True)
    for name in args.which or BENCHMARKS:
        seconds = args.seconds or SECONDS.get(name, evolve.TIME_BUDGET)
        more = {"seeds": args.seeds or SEEDS[name]} if name in SEEDS else {}
        more |= {"only": args.only} if name == "worth" else {}
        BENCHMARKS[name](data, evolve.Settings(time_budget=seconds), **more)
        print()


if __name__ == "__main__":
    main()
