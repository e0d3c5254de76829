"""More than one GPU: evolve.py on a Ray cluster, here of two machines in name with a processor each."""

import collections
import contextlib
import dataclasses
import os
import signal
import sys
import time

import pytest
import torch

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # as evolve.py does before it imports Ray
ray = pytest.importorskip("ray", reason="an extra: uv run --extra ray pytest")
from ray.cluster_utils import Cluster  # noqa: E402

import evolve  # noqa: E402
from evolve import RayPool, Settings, Stop, Task  # noqa: E402
from genome import Gene, Genome  # noqa: E402

S = Settings(
    population_size=4, survivors=1, repeats=2, immigrants=0, prescreen=1, hurdle=1.0, max_generations=2,
    baseline_trials=0, token_budget=1_024, max_params=10**6, batch_tokens=256, seq_len=32, eval_tokens=1_024,
    finalists=0, workers=1,
)  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(S).items() if name != "start"]
OUT_OF_CLOCK = ("finished", "seconds", "outside", "tokens_per_s")


@pytest.fixture(scope="module")
def cluster(source):
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def some(n: int) -> list[Task]:
    nets = [
        Genome([Gene("conv1d", 64, skip=1), Gene("gate", 64, skip=1)], embed_dim=64, lr_factor=lr) for lr in (1.0, 2.0)
    ]
    return [Task("search", f"g0.{i:02d}", nets[i % 2], i, 0, generation=0, operator="random") for i in range(n)]


def scores(results) -> dict[str, float]:
    return {r.id: r.val_bpb for r in results}


def rows_of(folder) -> list[dict]:
    _, _, rows = evolve.read_results((folder / "results.tsv").read_bytes())
    kept = [{k: v for k, v in dataclasses.asdict(r).items() if k not in OUT_OF_CLOCK} for r in rows]
    return sorted(kept, key=str)


def test_the_record_is_that_of_the_local_pool(source, data_dir, tmp_path, capfd):
    for name, flags in {"alone": [], "ray": ["--ray"]}.items():
        assert evolve.main([*FLAGS, "--data-dir", data_dir, "--out", str(tmp_path / name), *flags]) == 0, (
            capfd.readouterr()
        )
    assert not ray.is_initialized(), "what was started is ended"
    alone, on_ray = (rows_of(tmp_path / name) for name in ("alone", "ray"))
    assert alone == on_ray and len(alone) == 8 and {row["status"] for row in alone} == {"ok"}


def test_members_and_nodes_come_and_go(cluster, source, tmp_path):
    """An actor is killed, another hangs, a node goes and one comes: every task has its one result, the same as ever."""
    with evolve.Pool(source, S, torch.device("cpu"), tmp_path) as pool:
        expected = scores(pool.run(some(2)))
    tasks, found = some(24), []
    with pytest.MonkeyPatch.context() as patch, RayPool(cluster.address, source, S, tmp_path) as pool:
        assert pool.device_name == "cpu" and len(pool.members) == 2
        patch.setattr(evolve, "LOOK", 0.2)
        patch.setattr(evolve, "ATTEMPTS", 4)  # a task may be on what is lost all three times
        for n, result in enumerate(pool.run(tasks), start=1):
            found.append(result)
            if n == 3:
                ray.kill(pool.members[0].actor)
            if n == 8:
                (other,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
                cluster.remove_node(other)
                cluster.add_node(num_cpus=1)
                deadline = time.monotonic() + 60
            if n == 12:
                while len([m for m in pool.members if not m.hello]) < 2 and time.monotonic() < deadline:
                    pool.look(wait=0.5)
                assert len(pool.members) == 2, "the node that joined is used"
                hung = pool.members[1]
                pid = ray.get(hung.actor.__ray_call__.remote(lambda host: os.getpid()))
                os.kill(pid, signal.SIGSTOP)
                patch.setattr(evolve, "SILENT", 15.0)
        with contextlib.suppress(ProcessLookupError):  # Ray may have ended it by now
            os.kill(pid, signal.SIGCONT)
    assert collections.Counter(r.id for r in found) == dict.fromkeys((t.id for t in tasks), 1)
    assert {r.status for r in found} == {"ok"}
    assert {i: s for i, s in scores(found).items() if i in expected} == expected


def test_what_is_lost_again_and_again_is_a_crash(cluster, source, tmp_path, monkeypatch):
    monkeypatch.setattr(evolve, "ATTEMPTS", 2)
    monkeypatch.setattr(evolve, "LOOK", 0.2)
    with RayPool(cluster.address, source, S, tmp_path) as pool:
        judge = RayPool.judge

        def killed_once_judged(pool, m, found=None):
            judge(pool, m, found)
            ray.kill(m.actor)

        monkeypatch.setattr(RayPool, "judge", killed_once_judged)
        for m in pool.members:
            ray.kill(m.actor)
        (result,) = pool.run(some(1))
    assert result.status == "crash" and "was lost, 2 times" in result.note


@pytest.mark.parametrize("what, advice", [("fingerprint", "prepare the same text"), ("code", "have the same checkout")])
def test_who_differs_takes_no_part(cluster, source, tmp_path, monkeypatch, what, advice):
    if what == "fingerprint":
        source = dataclasses.replace(source, meta={**source.meta, "fingerprint": "another"})
    else:
        monkeypatch.setattr(evolve, "code_hash", lambda: "another")
    with pytest.raises(Stop, match=rf"No CPU of the cluster can take part: its {what} is .*, not another; {advice}"):
        RayPool(cluster.address, source, S, tmp_path)
    ray.shutdown()


def test_without_ray_it_says_what_to_run(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Stop, match=r"an extra: uv run --extra ray evolve\.py --ray"):
        RayPool("", source, S, tmp_path)


def test_no_cluster_at_an_address(source, tmp_path):
    with pytest.raises(Stop, match=r"--ray 127\.0\.0\.1:1: .*refused.* ray start --head"):
        RayPool("127.0.0.1:1", source, S, tmp_path)
