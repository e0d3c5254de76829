"""tests/simulate.py: which search finds most, on made-up landscapes, by hand and on the CPU.

    uv run tests/simulate.py                       every strategy, with and without prescreen and repeats: some hours
    uv run tests/simulate.py --seeds 4 elites "elites repeats=1 prescreen=50"        only these searches
    uv run tests/simulate.py --sizes elites        where depth and width count as they do for transformers in 30 s
    uv run tests/simulate.py --records                          what the belief would have foretold in published runs

Each search is evolve.py's own breeding, in the space of genome.py, for 25 generations of 12; only training is made up.
A landscape says what each genome would score: what a ridge regression finds in the records of published runs, with
parts planted on top. Of these some help, some do nothing, more of them harm; some act only in front of attention or
only together, one pair harms alone and helps together; and part of each genome's score is no sum of anything, but
shared by genomes that are alike. All searches meet the same landscapes. The score of a search is the true one of its
winner, found by a final of three genomes with five seeds.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import random
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import evolve
from genome import OPS, Genome

VOCAB = 8_192
RECORDS = ("seed0-5s", "seed1-5s", "random-5s", "drift-5s")
RUNS = Path(evolve.__file__).parent / "runs"
PAIRS_OF_RUNS = sorted(f"pairs-5s/{path.name}" for path in RUNS.glob("pairs-5s/*"))
NOISE = evolve.NOISE  # of an evaluation
NOISE_AT = {3: 0.012, 5: 0.006}  # of the outlook after so many tenths, beside that
MISFIT = 0.003  # standard deviation of what no sum explains, and which no two genomes share
STRUCTURE = 0.01  # of what no sum explains, and which genomes share by their likeness
HASHES = 64  # see `structure`
ROOM = 0.08  # below the best of the records, which nothing can use up
PAIRS = 6
HELP, HARM = 0.010, 0.008  # standard deviations of what a planted part gains or costs
HELPS, HARMS = 0.2, 0.4  # shares of those that gain and that cost something
# --sizes: what transformers lose in 30 s, by layers and by width, read off those of runs/seed0-30s-h100, between them
# and beyond by eye, and how much better than the landscape of 5 s the right size is
LAYERS = (
    (0, 0.45), (1, 0.2), (2, 0.07), (3, 0.03), (4, 0.014), (5, 0.004), (7, 0.0), (9, 0.004), (12, 0.02), (20, 0.1),
)  # fmt: skip
WIDTH = ((64, 0.3), (128, 0.1), (192, 0.031), (256, 0.0), (320, -0.004), (384, 0.005), (512, 0.03))
RIGHT_SIZE = 0.06
OF_SIZE = ("depth", "width", "embedding", "size", "narrowest")  # parts, which count no more then
CHANGES = ("WEIGHT", "LIKENESS", "MISFIT", "NEAR", "SPREAD")
USUAL = {name: getattr(evolve, name) for name in CHANGES}  # what an arm may change, beside settings


def normal(*what) -> float:
    """A number that is always the same for the same thing, standard normal over all things."""
    return random.Random(hashlib.sha256(repr(what).encode()).digest()).gauss(0, 1)


def rows_of(name: str) -> list[evolve.Result]:
    """The rows of a record in runs/."""
    return evolve.read_results((RUNS / name / "results.tsv").read_bytes())[2]


@functools.cache
def fitted() -> tuple[dict[tuple, tuple[float, float, float]], float, float]:
    """What a ridge regression says of the parts in the records, scores squeezed: the weight of each, the least and the
    most of it that was seen; the level, and the best score."""
    rows = []
    for k, name in enumerate(RECORDS):  # as one record, with one best score
        rows += [dataclasses.replace(row, id=f"{row.id}.{k}") for row in rows_of(name)]
    seen = evolve.evidence(rows, evolve.Settings(time_budget=5.0))
    known = [evolve.parts(evidence.genome, VOCAB) for evidence in seen]
    names = list(dict.fromkeys(name for found in known for name in found))
    X = np.array([[found.get(name, 0.0) for name in names] for found in known])
    y = np.array([evidence.score for evidence in seen])
    weights = np.linalg.solve(X.T @ X + 5.0 * np.eye(len(names)), X.T @ (y - y.mean()))
    return dict(zip(names, zip(weights, X.min(0), X.max(0), strict=True), strict=True)), y.mean(), y.min()


def pieces(genome: Genome) -> list[int]:
    """A number for each gene, each two in a row, and each op; for the second of the same another one. Not quite
    evolve.pieces: the search should not know by what a landscape is made.
    """
    genes = [repr(node.gene) for node in genome.network]
    found = [*genes, *itertools.pairwise(["", *genes]), *genome.ops, (genome.embed_dim, genome.tied, genome.lr_factor)]
    return [hashed(piece, found[:i].count(piece)) for i, piece in enumerate(found)]


@functools.lru_cache(maxsize=500_000)
def hashed(*what) -> int:
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "big")


def structure(seed: int, genome: Genome) -> float:
    """A random function, standard normal, of which two genomes share as much as they have pieces in common (Tanimoto):
    with that probability the least hash of all their pieces is the same one (Broder 1997)."""
    factors = np.random.default_rng(seed).integers(1, 2**63, HASHES, dtype=np.uint64) | np.uint64(1)
    x = np.array(pieces(genome), np.uint64)[:, None] * factors
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    least = (x ^ (x >> np.uint64(32))).min(0)
    return sum(random.Random(int(n) ^ i).gauss(0, 1) for i, n in enumerate(least)) / HASHES**0.5


def lost_by_size(genome: Genome) -> float:
    """What a genome loses as it is too shallow or too narrow for 30 s, or too deep or wide: --sizes."""

    def between(table, x: float) -> float:
        return float(np.interp(x, *zip(*table, strict=True)))

    sized = [node.d_out for node in genome.network if node.gene.dim] or [genome.embed_dim]
    narrowest = min(genome.embed_dim, *(node.d_out for node in genome.network))
    widths = (statistics.geometric_mean(sized), narrowest, genome.embed_dim)
    branches = sum(node.skip is not None for node in genome.network)
    return between(LAYERS, branches / 2) + statistics.fmean(between(WIDTH, width) for width in widths)


class Landscape:
    def __init__(self, seed: int, sizes: bool = False):
        self.seed, self.sizes, rng = seed, sizes, random.Random(seed)
        known = fitted()[0]
        choices = [(op, name, c) for op, cls in OPS.items() for name, all in cls.traits.items() for c in all[1:]]
        choices += [("before attention", op) for op in OPS if op not in ("norm", "identity", "attention")]
        choices = [choice for choice in choices if choice not in known]
        self.planted = {}
        for choice in choices:
            worth = -abs(rng.gauss(0, HELP)), abs(rng.gauss(0, HARM)), 0.0
            (self.planted[choice],) = rng.choices(worth, (HELPS, HARMS, 1 - HELPS - HARMS))
        pairs = rng.sample(list(itertools.combinations(self.planted, 2)), PAIRS)
        self.pairs = {pair: rng.gauss(0, HELP) for pair in pairs}
        trap = rng.sample(list(self.planted), 2)
        self.planted |= dict.fromkeys(trap, 0.008)
        self.pairs[tuple(trap)] = -0.032

    @functools.cache  # noqa: B019
    def truth(self, genome: Genome) -> float:
        known, level, best = fitted()
        parts = evolve.parts(genome, VOCAB)
        if self.sizes:
            known = {name: value for name, value in known.items() if name[0] not in OF_SIZE}
        score = level + sum(w * min(max(parts.get(name, 0.0), low), high) for name, (w, low, high) in known.items())
        score += sum(worth * min(1.0, parts.get(part, 0.0)) for part, worth in self.planted.items())
        score += sum(worth for (a, b), worth in self.pairs.items() if a in parts and b in parts)
        if self.sizes:
            score += lost_by_size(genome) - RIGHT_SIZE
        else:
            score += 0.02 * max(0.0, len(genome.network) / 24 - 1) ** 2  # too slow to see enough text
        score += STRUCTURE * structure(self.seed, genome) + MISFIT * normal(self.seed, genome.key)
        if score < best:  # the more is gained, the less is left
            return best - ROOM * (1 - math.exp((score - best) / ROOM))
        return best + USUAL["NEAR"] * math.expm1(min((score - best) / USUAL["NEAR"], 3.0))  # no longer squeezed

    def result(self, task: evolve.Task) -> evolve.Result:
        """The row of an evaluation, with the hurdle that it meets."""
        truth, own = self.truth(task.genome), (self.seed, task.genome.key)
        row = evolve.Result.of(task, params=task.genome.num_params(VOCAB), tokens_per_s=10**6)
        losses = [truth + NOISE_AT.get(tenth, 0.01) * normal(*own, tenth) for tenth in range(1, evolve.CURVE + 1)]
        speed = evolve.outlook(0.0, row.tokens_per_s, evolve.Settings())
        for (tenth, _), limit in zip(evolve.RUNGS, task.hurdle, strict=False):
            if losses[tenth - 1] + speed > limit and not task.spared:
                row.status, losses[tenth + 1 :] = "stopped", [math.nan] * (evolve.CURVE - tenth - 1)
                break
        row.losses = ",".join(f"{loss:.4f}" for loss in losses)
        if row.status == "ok":
            row.val_bpb = truth + NOISE * normal(*own, task.seed)
            thirds = [row.val_bpb + 0.005 * normal(*own, k) + NOISE * normal(*own, k, task.seed) for k in range(3)]
            row.bpb_first, row.bpb_middle, row.bpb_last = thirds
            row.memory_mb = 1000 + 100 * len(task.genome.network)
        return row


def run(arm: str, seed: int, generations: int, sizes: bool = False) -> dict[str, float]:
    fitted()  # before an arm changes constants
    changed, constants = arm_of(arm)
    for name, value in {**USUAL, **constants}.items():
        setattr(evolve, name, value)
    land, settings = Landscape(seed, sizes), dataclasses.replace(evolve.Settings(seed=seed), **changed)
    rows: list[evolve.Result] = []
    for generation in range(generations):
        rows += [land.result(task) for task in evolve.breed(rows, generation, settings, VOCAB)]
    known = evolve.searched(rows)
    final = {c.id: land.truth(c.genome) + NOISE / 5**0.5 * normal(seed, "final", c.genome.key) for c in known[:3]}
    winner = next(c for c in known if c.id == min(final, key=final.get))
    genomes = {row.id: Genome.from_json(row.genome) for row in rows}
    children = [row for row in rows if row.is_newcomer and row.parents]
    better = [
        land.truth(genomes[row.id]) < min(land.truth(genomes[p]) for p in row.parents.split(",")) for row in children
    ]
    helpful = [part for part, worth in land.planted.items() if worth < -0.004]
    in_it = evolve.parts(winner.genome, VOCAB)
    root = evolve.roots(rows)
    last = [row for row in rows if row.generation >= generations - 3 and row.is_newcomer]
    return {
        "score": land.truth(winner.genome),
        "roots": len({root[row.id] for row in last if row.parents}),
        "better": statistics.fmean(better) if better else 0.0,
        "found": sum(part in in_it for part in helpful) / max(1, len(helpful)),
    }


def foretold(name: str) -> tuple[float, float | None, int]:
    """Rank correlation of newcomers' scores in a record with what was to be expected of them before their generation,
    by the belief and by the mean score of their parents: a mean over generations, weighted; and of how many newcomers.
    Who was stopped counts with what its outlook says; random genomes only where there are no others, and no parents.
    """
    settings = evolve.Settings(time_budget=5.0)
    rows = evolve.of_stage(rows_of(name), "search")
    score_of = {e.id: e.score for e in reversed(evolve.evidence(rows, settings))}
    bred, found = any(row.parents for row in rows), []
    for generation in range(2, max(row.generation for row in rows) + 1):
        earlier = [row for row in rows if row.generation < generation]
        means = {c.id: c.mean for c in evolve.searched(earlier)}
        new = [row for row in rows if row.generation == generation and row.is_newcomer and row.id in score_of]
        new = [row for row in new if all(p in means for p in row.parents.split(",")) or not (bred or row.parents)]
        expect = evolve.Belief(evolve.evidence(earlier, settings), VOCAB).draw(np.random.default_rng(0), 0.0)
        scores = [score_of[row.id] for row in new]
        by_belief = evolve.rank_correlation([expect(Genome.from_json(row.genome)) for row in new], scores)
        parents = [statistics.fmean(means[p] for p in row.parents.split(",")) for row in new] if bred else []
        by_parents = evolve.rank_correlation(parents, scores) if bred else 0.0
        found += [(by_belief, by_parents, len(new))] if None not in (by_belief, by_parents) else []
    total = sum(n for *_, n in found)
    by_belief, by_parents = (sum(f[k] * f[2] for f in found) / total for k in (0, 1))
    return by_belief, by_parents if bred else None, total


def arm_of(text: str) -> tuple[dict, dict]:
    """elites repeats=1 SPREAD=1 -> the settings that it names, and the constants of evolve.py that are no settings."""
    strategy, *changes = text.split()
    known, settings, constants = evolve.Settings(), {"strategy": strategy}, {}
    for name, value in (change.split("=") for change in changes):
        where, of = (constants, evolve) if name in USUAL else (settings, known)
        where[name] = type(getattr(of, name))(value)
    return settings, constants


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--generations", type=int, default=25)
    parser.add_argument("--processes", type=int, default=evolve.cpu_cores())
    searches = [name for name in evolve.SELECTION if name != "drift"]
    defaults = [f"{name} prescreen=1" for name in (*searches, "drift", "random")]
    defaults += [f"{name} prescreen=50" for name in searches]
    defaults += [f"{name} prescreen={n} repeats=1" for n in (1, 50) for name in searches]
    parser.add_argument("arms", nargs="*", default=defaults)
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--records", action="store_true")
    args = parser.parse_args()
    if args.records:
        for name in (*RECORDS, *PAIRS_OF_RUNS):
            by_belief, by_parents, n = foretold(name)
            print(
                f"{name}: belief {by_belief:.2f}, parents {by_parents and round(by_parents, 2)}, {n} newcomers",
                flush=True,
            )
        return
    first = None
    print(f"{'':<44}{'score':>8}{'against the first':>22}{'found':>8}{'better':>8}{'roots':>7}")
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for arm in args.arms:
            tasks = [(arm, seed, args.generations, args.sizes) for seed in range(args.seeds)]
            results = pool.starmap(run, tasks, chunksize=1)
            scores, means = (
                [r["score"] for r in results],
                {k: statistics.fmean(r[k] for r in results) for k in results[0]},
            )
            first = first or scores
            gain = evolve.estimate(a - b for a, b in zip(scores, first, strict=True))
            print(f"{arm:<44}{means['score']:8.4f}{gain!s:>22}{means['found']:8.2f}{means['better']:8.3f}"
                  f"{means['roots']:7.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
