"""Kill a run of evolve.py at random moments, start it again until it ends, and compare it with one left alone.

    uv run tests/kill_run.py OUT DATA_DIR KILLS SEED

Prints JSON: how many kills fell while what was done, and each difference between the two records (none, if all is
well). A process of its own: it forks the runs, so it must not have used torch's threads before. test_run.py runs it
with few kills, `GENESIS_KILLS=50 uv run pytest tests/test_run.py -k kill` with more.
"""

import collections
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot
import torch
from helpers import family_of_transformers

import evolve
import prepare
from genome import Genome, mlp, random_genome, transformer

OF_TIME = ("tokens_per_s", "seconds", "outside", "finished", "memory_mb", "held_mb")  # columns that may differ
FLAGS = dict(population_size=4, survivors=2, max_generations=2, finalists=1, final_seeds=2, long_factor=2.0)
FLAGS |= dict(token_budget=1024, batch_tokens=256, seq_len=64, eval_tokens=1024, max_params=200_000, hurdle=1.0)
FLAGS |= dict(baseline_trials=3, repeats=2, long_seeds=2)
FAMILIES, LEVELS = family_of_transformers(), {"mlp-1x64": mlp(1, 64)}
LAST = ("final", "target", "grow", "long", "passes")  # stages after the search


def narrow_genome(rng: random.Random) -> Genome:
    """A random genome, 64 wide: cheap to breed and to train."""
    genes = random_genome(rng).genes
    return Genome(tuple(gene.change(dim=64) if gene.dim else gene for gene in genes), embed_dim=64)


def start_run(out: Path, data_dir: str) -> int:
    """Fork a process group that runs evolve.py as its command line would; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        evolve.START_METHOD, evolve.check_ops = "fork", lambda: None  # they have tests of their own, and take seconds
        evolve.FAMILIES, evolve.LEVELS, evolve.random_genome = FAMILIES, LEVELS, narrow_genome
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
        code = evolve.main([*flags, "--data-dir", data_dir, "--out", str(out)])
        sys.stdout.flush()
    finally:
        os._exit(code)


def wait_for_workers(out: Path, patience: float = 20.0):
    """Wait until the workers of a killed run are gone: under fork they hold its lock as long as they live."""
    out.mkdir(exist_ok=True)
    until = time.monotonic() + patience
    while (lock := prepare.try_lock(out / ".lock")) is None:
        if time.monotonic() > until:
            raise SystemExit("the workers of a killed run live on")
        time.sleep(0.005)
    os.close(lock)


def stage(out: Path, alone: Path) -> str:
    """What a killed run was about to do, from what lies there."""
    if not (out / "results.tsv").exists():
        return "before the record"
    lines, whole = ((folder / "results.tsv").read_text().splitlines()[2:] for folder in (out, alone))
    if (out / ".progress.png.tmp").exists() or (out / ".best_genome.json.tmp").exists():
        return "writing a file"
    counts = collections.Counter(tuple(line.split("\t")[:2]) for line in lines)
    last = [stage for stage in LAST if counts[stage, ""]]
    if last:
        return last[-1] if len(lines) < len(whole) else "the last report"
    full = [g for g in "01" if counts["search", g] == 4]
    if full and len(lines) == counts["baseline", ""] + 4 * len(full):
        return "between generations"
    return "a generation" if counts["search", "0"] else "the baselines"


def content(out: Path) -> list[list[str]]:
    """The lines of a record, in order, without what depends on time.

    Those of the baselines are sorted: which of the best is repeated first depends on where a run was killed.
    """
    first, *lines = (out / "results.tsv").read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    kept = [i for i, name in enumerate(cells[0]) if name not in OF_TIME]
    names, *rows = ([line[i] for i in kept] for line in cells)
    baselines = sum(row[0] == "baseline" for row in rows)
    return [[first], names, *sorted(rows[:baselines]), *rows[baselines:]]


def differences(out: Path, alone: Path) -> list[str]:
    """What a killed run left that one left alone did not."""
    found = [f"{a} != {b}" for a, b in zip(content(out), content(alone), strict=False) if a != b]
    if len(content(out)) != len(content(alone)):
        found.append(f"{len(content(out))} lines != {len(content(alone))}")
    best = [json.loads((folder / "best_genome.json").read_text()) for folder in (out, alone)]
    if best[0] != best[1]:
        found.append("best_genome.json")
    if not (out / "progress.png").read_bytes().endswith(b"IEND\xaeB`\x82"):
        found.append("progress.png")
    if (out / "runs").exists():
        found.append("a run that was not finished was moved away")
    return found


def main(out: Path, data_dir: str, kills: int, seed: int):
    torch.set_num_threads(1)
    evolve.Optimizer(evolve.Model(transformer(1, 64, 1), 64), 1.0)  # what torch imports late, every run has from here
    rng = random.Random(seed)
    out.mkdir()
    alone, killed = out / "alone", out / "killed"
    began = time.monotonic()
    pid = start_run(alone, data_dir)
    assert os.waitpid(pid, 0)[1] == 0, alone.with_suffix(".log").read_text()
    whole = time.monotonic() - began
    stages, wrong, done, runs = collections.Counter(), [], 0, 0
    while done < kills or killed.exists():
        pid, code = start_run(killed, data_dir), None
        if done < kills:
            # short and long lives, so that kills fall into starting, training, writing and drawing alike
            time.sleep(rng.choice((0.1, 0.3, 0.6)) * whole * rng.random())
            os.kill(pid, signal.SIGKILL)
        code = os.waitpid(pid, 0)[1]
        if code == signal.SIGKILL:
            wait_for_workers(killed)
            stages[stage(killed, alone)] += 1
            done += 1
            continue
        elif code:
            wrong.append(f"exit code {code}: {killed.with_suffix('.log').read_text()[-2000:]}")
            break
        wrong += differences(killed, alone)
        runs += 1
        shutil.rmtree(killed)
    print(json.dumps(dict(kills=done, runs=runs, seconds_alone=round(whole, 2), stages=stages, differences=wrong)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
