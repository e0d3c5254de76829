"""tests/simulate.py: which search finds most, on made-up landscapes, by hand and on the CPU.

    uv run tests/simulate.py                                    every strategy, with and without prescreen, 40 seeds
    uv run tests/simulate.py --seeds 4 elites "elites repeats=1 prescreen=10"        only these searches
    uv run tests/simulate.py --records                          what the belief would have foretold in published runs

Each search is evolve.py's own breeding, in the space of genome.py, for 25 generations of 12; only training is made up.
A landscape says what each genome would score: what a ridge regression finds in the records of published runs, with
parts planted on top. Of these some help, some do nothing, some harm; some act only in front of attention or only
together, one pair harms alone and helps together; and part of each genome's score is no sum of anything. All searches
meet the same landscapes. The score of a search is the true one of its winner, found by a final of three genomes with
five seeds.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import math
import multiprocessing
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import evolve
from genome import OPS, Genome

VOCAB = 8_192
RECORDS = ("results.tsv", "runs/seed1-5s/results.tsv", "runs/random-5s/results.tsv")
NOISE = evolve.NOISE  # of an evaluation
NOISE_AT = {3: 0.012, 5: 0.006}  # of the outlook after so many tenths, beside that
MISFIT = 0.006  # standard deviation of what no sum explains
ROOM = 0.08  # below the best of the records, which nothing can use up
PLANTED, PAIRS = 24, 6
WORTH = 0.010  # standard deviation of what a planted part is worth
USUAL = {name: getattr(evolve, name) for name in ("ROUNDS", "WEIGHT", "MISFIT", "CLIP")}  # what an arm may change


def normal(*what) -> float:
    """A number that is always the same for the same thing, standard normal over all things."""
    return random.Random(hashlib.sha256(repr(what).encode()).digest()).gauss(0, 1)


@functools.cache
def fitted() -> tuple[dict[tuple, tuple[float, float, float]], float, float]:
    """What a ridge regression says of the parts in the records: the weight of each, the least and the most of it that
    was seen; the level, and the best score."""
    root, rows = Path(__file__).resolve().parent.parent, []
    for name in RECORDS:
        rows += [row for row in evolve.read_results((root / name).read_bytes())[2] if row.status == "ok"]
    rows = [row for row in rows if row.stage == "search" and row.val_bpb < 1.7]
    parts = [evolve.parts(Genome.from_json(row.genome), VOCAB) for row in rows]
    names = list(dict.fromkeys(name for p in parts for name in p))
    X = np.array([[p.get(name, 0.0) for name in names] for p in parts])
    y = np.array([row.val_bpb for row in rows])
    weights = np.linalg.solve(X.T @ X + 5.0 * np.eye(len(names)), X.T @ (y - y.mean()))
    return dict(zip(names, zip(weights, X.min(0), X.max(0), strict=True), strict=True)), y.mean(), y.min()


class Landscape:
    def __init__(self, seed: int):
        self.seed, rng = seed, random.Random(seed)
        known = fitted()[0]
        choices = [(op, name, c) for op, cls in OPS.items() for name, all in cls.traits.items() for c in all[1:]]
        choices += [("before attention", op) for op in OPS if op not in ("norm", "identity", "attention")]
        choices = [choice for choice in choices if choice not in known]
        self.planted = {
            choice: rng.choice((1, 1, 1, 0)) * rng.gauss(0, WORTH) for choice in rng.sample(choices, PLANTED)
        }
        pairs = rng.sample(list(itertools.combinations(self.planted, 2)), PAIRS)
        self.pairs = {pair: rng.gauss(0, WORTH) for pair in pairs}
        trap = rng.sample(list(self.planted), 2)
        self.planted |= dict.fromkeys(trap, 0.008)
        self.pairs[tuple(trap)] = -0.032

    @functools.cache  # noqa: B019
    def truth(self, genome: Genome) -> float:
        known, level, best = fitted()
        parts = evolve.parts(genome, VOCAB)
        score = level + sum(w * min(max(parts.get(name, 0.0), low), high) for name, (w, low, high) in known.items())
        score += sum(worth * min(1.0, parts.get(part, 0.0)) for part, worth in self.planted.items())
        score += sum(worth for (a, b), worth in self.pairs.items() if a in parts and b in parts)
        score += 0.02 * max(0.0, len(genome.network) / 24 - 1) ** 2  # too slow to see enough text
        if score < best:  # the more is gained, the less is left
            score = best - ROOM * (1 - math.exp((score - best) / ROOM))
        return score + MISFIT * normal(self.seed, genome.key)

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


def run(arm: str, seed: int, generations: int = 25) -> dict[str, float]:
    changed, constants = arm_of(arm)
    for name, value in {**USUAL, **constants}.items():
        setattr(evolve, name, value)
    land, settings = Landscape(seed), dataclasses.replace(evolve.Settings(seed=seed), **changed)
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


def foretold(name: str) -> tuple[float, float, int]:
    """Rank correlation of newcomers' scores in a record with what was to be expected of them before their generation,
    by the belief and by the mean score of their parents: a mean over generations, weighted; and of how many newcomers.
    """
    settings = evolve.Settings()
    rows = evolve.read_results((Path(__file__).resolve().parent.parent / name).read_bytes())[2]
    rows, found = evolve.of_stage(rows, "search"), []
    for generation in range(2, max(row.generation for row in rows) + 1):
        earlier = [row for row in rows if row.generation < generation]
        means = {c.id: c.mean for c in evolve.searched(earlier)}
        new = [row for row in rows if row.generation == generation and row.is_newcomer and row.status == "ok"]
        new = [row for row in new if row.parents and all(p in means for p in row.parents.split(","))]
        belief = evolve.Belief(evolve.evidence(earlier, settings, VOCAB))
        weights = evolve.WEIGHT**2 * belief.X.T @ (belief.precision @ belief.y)
        expected = [weights @ belief.vector(evolve.parts(Genome.from_json(row.genome), VOCAB)) for row in new]
        parents = [statistics.fmean(means[p] for p in row.parents.split(",")) for row in new]
        scores = [row.val_bpb for row in new]
        both = [evolve.rank_correlation(those, scores) for those in (expected, parents)]
        found += [(*both, len(new))] if None not in both else []
    total = sum(n for *_, n in found)
    return sum(a * n for a, _, n in found) / total, sum(b * n for _, b, n in found) / total, total


def arm_of(text: str) -> tuple[dict, dict]:
    """elites repeats=1 ROUNDS=1 -> the settings that it names, and the constants of evolve.py that are no settings."""
    strategy, *changes = text.split()
    known, settings, constants = evolve.Settings(), {"strategy": strategy}, {}
    for name, value in (change.split("=") for change in changes):
        where, of = (constants, evolve) if name in USUAL else (settings, known)
        where[name] = type(getattr(of, name))(value)
    return settings, constants


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--processes", type=int, default=evolve.cpu_cores())
    strategies = [*evolve.SELECTION, "random"]
    defaults = [f"{name} prescreen=1" for name in strategies] + [name for name in evolve.SELECTION if name != "drift"]
    parser.add_argument("arms", nargs="*", default=defaults)
    parser.add_argument("--records", action="store_true")
    args = parser.parse_args()
    if args.records:
        for name in ("results.tsv", "runs/seed1-5s/results.tsv"):
            print("{}: belief {:.2f}, parents {:.2f}, {} newcomers".format(name, *foretold(name)))
        return
    first = None
    print(f"{'':<44}{'score':>8}{'against the first':>22}{'found':>8}{'better':>8}{'roots':>7}")
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:
        for arm in args.arms:
            results = pool.starmap(run, [(arm, seed) for seed in range(args.seeds)], chunksize=1)
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
