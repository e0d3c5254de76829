"""The machines and cards that this program meets, and what it leaves for others to read.

No test needs a GPU: what torch and nvidia-smi say of one is put in their mouths.
"""

import contextlib
import csv
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import FLAGS, NET, ROOT, family_of_transformers, forked, genes_have, task, tiny, wait_until
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import evolve
import genome
import prepare
from evolve import Record, Result, Stop, Task
from genome import Gene, Genome, Op

pytestmark = pytest.mark.usefixtures("cache")
CPU, CARD = torch.device("cpu"), torch.device("cuda:0")


def toy(t: Task, data=None, settings=None, turn=None) -> Result:
    """A result that depends on the task alone, in the place of a training: genomes are better than transformers."""
    rng = random.Random(f"{t.genome.key}/{t.seed}")
    losses = ",".join(f"{3 - 0.1 * i + 0.01 * rng.random():.4f}" for i in range(evolve.CURVE))
    score = 1 + random.Random(t.genome.key).random() + 0.01 * rng.random() + t.id.startswith("transformer")
    values = dict(val_bpb=score, test_bpb=score + 0.02 if t.test else None, tokens_per_s=rng.randrange(10**6))
    return Result.of(t, params=1000, tokens=1024, losses=losses, **values)


@pytest.fixture
def command(command, monkeypatch):
    """Run the command with flags; returns the exit code and all that it printed."""
    monkeypatch.setattr(evolve, "code_hash", lambda: "the code")
    monkeypatch.setattr(evolve, "FAMILIES", family_of_transformers())
    monkeypatch.setattr(evolve, "LEVELS", {})

    def joined(*flags, **data) -> tuple[int, str]:
        code, output, errors = command(*flags, **data)
        return code, output + errors

    return joined


@pytest.fixture
def toys(monkeypatch):
    """Runs of toys: nothing is trained, counted or drawn."""
    monkeypatch.setattr(evolve, "evaluate", toy)
    monkeypatch.setattr(evolve, "START_METHOD", "fork")
    monkeypatch.setattr(evolve, "picture", lambda rows, *_: b"a picture")
    monkeypatch.setattr(genome, "block_params", genes_have(1_000))


# ----------------------------------------------------------------------------------------------------------------------
# Who nobody knows, started first and asked last: importing torch takes seconds

STRANGER = """
import os
os.setresuid(12345, 0, 0)  # the files can be read all the same, wherever Python lives
import prepare
print(prepare.cache_root())
import evolve
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.fixture(scope="module")
def stranger():
    """A process that imports the scripts for a user without a name and without a home."""
    known = {"HOME", "GENESIS_CACHE", "USER", "LOGNAME", "USERNAME", "LNAME", "TORCHINDUCTOR_CACHE_DIR"}
    env = {name: value for name, value in os.environ.items() if name not in known}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", STRANGER], cwd=ROOT, env=env, **pipes)
    yield process
    process.kill()


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


@as_root
def test_a_stranger_is_started(stranger):
    assert stranger.pid


# ----------------------------------------------------------------------------------------------------------------------
# Cards: how many workers


def tokens(n: int) -> SimpleNamespace:
    return SimpleNamespace(train=range(n), val=range(1000), test=range(1000))


FEW = tokens(10**6)


@pytest.fixture
def machine(monkeypatch, capsys):
    """How many workers a machine has, by its free MiB and its cores."""

    def count(free: int, cores: int, data=FEW, device=CARD, **settings) -> int:
        monkeypatch.setattr(evolve, "free_mb", lambda device: free)
        monkeypatch.setattr(evolve, "cpu_cores", lambda: cores)
        capsys.readouterr()
        n = evolve.worker_count(tiny(**{"workers": 0, **settings}), data, device)
        told = capsys.readouterr().out.splitlines()
        if device.type == "cpu":
            assert told == []
        else:
            assert len(told) == 1 and told[0].startswith(f"{n} worker") and f"{free:,} MiB free" in told[0]
            assert f"{cores} cores" in told[0]
        return n

    return count


def test_small_cards_have_few_workers(machine):
    small, middle, large = machine(7_600, 16), machine(11_600, 16), machine(80_000, 16)
    assert 1 < small < 4 < middle < large == 8
    assert machine(80_000, 128) == 8 and machine(80_000, 8) == 4 and machine(80_000, 4) == 2
    for cores in (1, 2, 3):
        assert machine(80_000, cores) == 1
    for free in (0, 500, 3_000, 4_000):
        assert machine(free, 16) == 1
    assert [machine(free, 32) for free in range(0, 30_000, 500)] == sorted(
        machine(free, 32) for free in range(0, 30_000, 500)
    )


def test_each_worker_has_its_tokens_on_the_card(machine):
    """10^9 of them take up 2 GB."""
    assert machine(20_000, 32, tokens(10**9)) < machine(20_000, 32) and machine(7_600, 32, tokens(10**9)) == 1


def test_workers_are_as_many_as_wanted(machine):
    assert machine(80_000, 16, workers=3) == 3 and machine(2_000, 1, workers=12) == 12
    assert machine(80_000, 16, device=CPU) == machine(80_000, 16, device=CPU, workers=3) == 1


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7, 127}, raising=False)
    assert evolve.cpu_cores() == 4
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert evolve.cpu_cores() == 128
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert evolve.cpu_cores() == 1


SMI = {
    "it": ("7321\n", 7_321),
    "a card that shares its memory": ("[N/A]\n", 16_384),
    "nonsense": ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver\n", 16_384),
    "nothing": ("", 16_384),
    "two lines": ("7321\n7321\n", 16_384),
    "missing": (FileNotFoundError(2, "No such file or directory"), 16_384),
    "forbidden": (PermissionError(13, "Permission denied"), 16_384),
    "failing": (subprocess.CalledProcessError(9, "nvidia-smi"), 16_384),
    "hanging": (subprocess.TimeoutExpired("nvidia-smi", 60), 16_384),
}


@pytest.mark.parametrize("says", SMI)
def test_free_memory_without_nvidia_smi_is_all_of_it(monkeypatch, says):
    answer, expected = SMI[says]
    commands = []

    def run(command, **options):
        commands.append(command)
        assert options["timeout"] and options["check"]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    card = SimpleNamespace(uuid="01234567-89ab", total_memory=16_384 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(subprocess, "run", run)
    assert evolve.free_mb(CARD) == expected
    assert len(commands) == 1 and commands[0][0] == "nvidia-smi" and any(card.uuid in word for word in commands[0])


# Cards: short of memory

NO_MEMORY = {
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cudnn": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "the driver": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "triton": "Triton Error [CUDA]: out of memory",
}


@contextlib.contextmanager
def failing(fails):
    """NET with an op that raises fails(x) in training, where that is something."""

    class Failing(Op, name="failing", keeps_width=True):
        def __init__(self, d_in, d_out):
            super().__init__()

        def forward(self, x):
            error = fails(x) if torch.is_grad_enabled() else None
            if error:
                raise error
            return x

    try:
        yield dataclasses.replace(NET, genes=(*NET.genes, Gene("failing")))
    finally:
        del genome.OPS["failing"]
        genome.block_params.cache_clear()


class Noted(evolve.Turn):
    """Notes what a trial does with its turn."""

    def __init__(self):
        self.done = []

    def __enter__(self):
        self.done.append("enter")

    def make_room(self):
        self.done.append("make room")

    def __exit__(self, *_):
        self.done.append("leave")


@pytest.mark.parametrize("name", NO_MEMORY)
def test_what_cuda_says_of_memory_is_out_of_memory(data, name):
    turn, seen, small = Noted(), [], tiny(batch_tokens=128, token_budget=512)

    def too_many(x):
        seen.append((x.size(0), *turn.done))
        return RuntimeError(NO_MEMORY[name]) if x.size(0) > 2 else None

    with failing(too_many) as net:
        result = evolve.evaluate(task(net), data, small, turn)
    assert (result.status, result.rows, result.tokens) == ("ok", 2, 512)
    assert result.note == "memory for 2 rows at once, not 4" and turn.done == ["enter", "make room", "leave"]
    assert seen[:2] == [(4, "enter"), (4, "enter", "make room")]
    assert all("make room" in done for rows, *done in seen if rows < 4), "first the others give theirs back"
    with failing(lambda x: RuntimeError(NO_MEMORY[name])) as net:
        result = evolve.evaluate(task(net), data, small, Noted())
    assert (result.status, result.rows, result.note) == ("oom", 1, NO_MEMORY[name].partition("\n")[0])


def test_all_rows_come_back_once_there_is_room(data):
    turn = Noted()
    no_memory = RuntimeError(NO_MEMORY["cublas"])
    with failing(lambda x: None if "make room" in turn.done else no_memory) as net:
        result = evolve.evaluate(task(net), data, tiny(), turn)
        assert (result.status, result.rows, result.note) == ("ok", 8, "")
        alone = evolve.evaluate(task(net), data, tiny(), turn)
    assert turn.done[:3] == ["enter", "make room", "leave"] and result.val_bpb == alone.val_bpb


def test_another_error_of_cuda_is_a_crash(data):
    with (
        failing(lambda x: RuntimeError("CUDA error: an illegal memory access was encountered")) as net,
        pytest.raises(RuntimeError, match="illegal memory access"),
    ):
        evolve.evaluate(task(net), data, tiny(), Noted())


def test_a_capture_that_lacks_memory_is_out_of_memory(data, monkeypatch):
    """Not a step that cannot be captured: that one would train on, slower, and say nothing of memory."""
    for name, nothing in {
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "graph": lambda *_, **__: contextlib.nullcontext(),
        "stream": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda stream: None),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(evolve, "capture_stream", torch.cuda.current_stream)

    def captured(error: Exception) -> evolve.Trial:
        trial, steps = evolve.Trial(task(), data, tiny(), 8), iter([None, None, error])

        def step():
            if failure := next(steps):
                raise failure

        trial.step = step
        trial.capture()
        return trial

    trial = captured(RuntimeError("operation not permitted when stream is capturing"))
    assert trial.result.captured is False and trial.result.note.startswith("not captured: operation not permitted")
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(NO_MEMORY["cublas"])):
        with pytest.raises(RuntimeError) as raised:
            captured(error)
        assert raised.value is error


# Cards: what they compute in


@pytest.fixture
def card(monkeypatch):
    """See a card of some capability."""
    monkeypatch.setattr(evolve, "evolve", lambda *_: None)

    def see(*capability: int):
        evolve.compute_dtype.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {capability[0]}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    yield see
    evolve.compute_dtype.cache_clear()


CAPABILITIES = {(6, 1): "float32", (7, 0): "float32", (7, 5): "float32", (8, 0): "bfloat16", (8, 9): "bfloat16",
    (9, 0): "bfloat16", (12, 0): "bfloat16"}  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_card_without_bfloat16_computes_in_float32(card, command, tmp_path, capability):
    card(*capability)
    wanted = getattr(torch, CAPABILITIES[capability])
    assert evolve.compute_dtype(CARD) == wanted and evolve.compute_dtype(CPU) == torch.float32
    code, output = command("--time-budget=40", "--token-budget=0", "--out", tmp_path)
    told = [line for line in output.splitlines() if "in bfloat16" in line]
    assert code == 0 and len(told) == (wanted == torch.float32) and "40 s a trial on Card" in output
    for line in told:
        assert line.startswith(f"Card {capability[0]} ") and "float32" in line and "TIME_BUDGET (now 40 s)" in line


def test_no_seconds_are_asked_for_where_none_count(card, command, tmp_path):
    card(7, 5)
    code, output = command("--out", tmp_path)
    (told,) = [line for line in output.splitlines() if "in bfloat16" in line]
    assert code == 0 and "TIME_BUDGET" not in told, "a budget of tokens has no seconds"


# Cards: the compiler


@pytest.fixture
def compiler(monkeypatch):
    """Put something in the place of torch.compile."""

    def put(function):
        monkeypatch.setattr(genome, "COMPILED", {})
        monkeypatch.setattr(torch, "compile", function)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 7")
    return put


def fails(error: BaseException):
    """A compiler that raises an error when what it compiles is called, as torch.compile does."""

    def compiled(*_):
        raise error

    return lambda function, **_: compiled


@pytest.fixture
def garbage():
    """What torch.empty holds is the worst that it can hold, as it may on a card."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def skips(function, **_):
    return function


LINEAR = Genome((Gene("norm"), Gene("linear", 64)), embed_dim=64)
SKIPPED = [f"{part} (the compiler skipped it)" for part in ("embed", "head", "linear", "norm")]


def test_what_the_compiler_skips_without_a_word_is_named(compiler, garbage):
    """And what it skips does not read tokens that nobody wrote: on a card that would be the end of the process."""
    compiler(skips)
    model, idx = genome.Model(LINEAR, 300), torch.arange(64).view(2, 32)
    expected = model(idx, idx)
    for _ in range(2):
        assert model.compile(2, 32) == f"eager: {', '.join(SKIPPED)}"
    assert not genome.compile_only and torch.equal(model(idx, idx), expected)
    for name, op in genome.OPS.items():
        model = genome.Model(Genome((Gene(name, None if op.keeps_width else 64),), embed_dim=64), 300)
        told = model.compile(2, 32)
        for node in model.genome.network:
            assert f"{node.gene.op} (the compiler skipped it)" in told or not op.compiles


def test_one_part_that_is_skipped_is_named_among_others(compiler, garbage):
    compiler(lambda function, **_: function if function.__name__ == "linear" else fails(genome.OnlyCompiled())(None))
    assert genome.Model(LINEAR, 300).compile(2, 32) == f"eager: {SKIPPED[2]}"


def test_a_compiler_that_works_is_no_problem(compiler):
    compiler(fails(genome.OnlyCompiled()))
    assert evolve.compiler_problem(300, CPU, tiny()) == ""
    assert {key[0] for key in genome.COMPILED} >= {"embed", "head"}, "it compiled something"


def wrapped(error: BaseException) -> RuntimeError:
    """As torch.compile wraps what it dies of."""
    outer = RuntimeError("backend='inductor' raised:")
    outer.inner_exception = error
    return outer


NO_COMPILER = {
    "no gcc": (FileNotFoundError(2, "No such file or directory", "/usr/bin/gcc"), "No such file or directory"),
    "no gcc for triton": (
        wrapped(RuntimeError("Failed to find C compiler. Please specify via CC")),
        "Failed to find C",
    ),
    "no headers": (RuntimeError("Python.h: No such file or directory"), "Python.h"),
    "an old card": (wrapped(RuntimeError("Device capability 6.1 is not supported")), "Device capability 6.1"),
}


@pytest.mark.parametrize("name", NO_COMPILER)
def test_a_machine_that_cannot_compile_says_what_it_lacks(compiler, name):
    error, reason = NO_COMPILER[name]
    compiler(fails(error))
    problem = evolve.compiler_problem(300, CPU, tiny())
    assert problem.startswith("Nothing can be compiled for Card 7 (") and reason in problem
    assert "apt install gcc python3-dev" in problem and "7.0" in problem
    compiler(skips)
    assert "the compiler skipped it" in evolve.compiler_problem(300, CPU, tiny())


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_what_may_pass_is_not_taken_for_a_lack_of_a_compiler(compiler, error):
    """The worker ends, and another one is started."""
    compiler(fails(wrapped(error)))
    with pytest.raises(type(error)):
        evolve.compiler_problem(300, CPU, tiny())


def test_a_worker_that_cannot_compile_ends_the_run_before_a_trial(toys, source, tmp_path, monkeypatch):
    on_card = SimpleNamespace(folder=source.folder, stamp=source.stamp, vocab_size=300, to=lambda device: on_card)
    monkeypatch.setattr(prepare, "load", lambda *_, **__: on_card)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(evolve, "turn_file", lambda device: None)
    monkeypatch.setattr(evolve, "evaluate", lambda t, *_: (tmp_path / "trial").touch() or toy(t))
    monkeypatch.setattr(evolve, "worker_count", lambda *_: 2)
    results = []
    for problem in ("Nothing can be compiled (no gcc): apt install it", ""):
        monkeypatch.setattr(evolve, "compiler_problem", lambda vocab, device, settings, said=problem: said)
        how = pytest.raises(Stop) if problem else contextlib.nullcontext()
        with how as stop, evolve.Pool(on_card, tiny(), CARD, tmp_path) as pool:
            results += pool.run([task(), task(id="g0.02")])
        if problem:
            assert str(stop.value) == problem and results == [] and not (tmp_path / "trial").exists()
    assert [r.status for r in results] == ["ok", "ok"] and (tmp_path / "trial").exists()


NO_GPU = {
    "a driver": RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nAnd more of it"),
    "no driver": RuntimeError("Found no NVIDIA driver on your system."),
    "another torch": AssertionError("Torch not compiled with CUDA enabled"),
    "nothing": None,
}


@pytest.mark.parametrize("name", NO_GPU)
def test_seconds_without_a_gpu_end_with_the_reason_of_torch(command, tmp_path, monkeypatch, name):
    def init():
        if NO_GPU[name]:
            raise NO_GPU[name]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(evolve, "evolve", lambda *_: None)
    code, output = command("--token-budget=0", "--time-budget=5", "--out", tmp_path / "out")
    assert code == 1 and "Traceback" not in output and not (tmp_path / "out").exists()
    reason = str(NO_GPU[name] or "torch finds none").splitlines()[0]
    assert reason in output and "And more of it" not in output
    assert all(way in output for way in ("driver", "container", "another torch", "--demo", "--token-budget"))
    code, output = command("--out", tmp_path / "out")  # tokens
    assert code == 0 and "1,024 tokens a trial on cpu" in output and (tmp_path / "out" / "results.tsv").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Machines


@pytest.mark.parametrize("script", ["prepare.py", "evolve.py"])
def test_windows_is_told_of_wsl(script):
    """Before anything is imported that Windows lacks."""
    check = "import runpy, sys; sys.modules['fcntl'] = None; sys.platform = 'win32'; runpy.run_path(sys.argv[1], {}, "
    for name in ("__main__", "a_module"):
        run = [sys.executable, "-c", f"{check} {name!r})", script]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "WSL" in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert done.stdout == ""


def rows_of(out: Path) -> list[Result]:
    with Record(out) as record:
        return [dataclasses.replace(row, finished="") for row in record.rows]


def test_a_run_goes_on_from_a_record_of_another_system(toys, command, tmp_path):
    """As git or an editor of Windows leaves it, every line end two bytes."""
    for name in ("alone", "moved"):
        assert command("--max-generations=1", "--out", tmp_path / name)[0] == 0
    assert rows_of(tmp_path / "alone") == rows_of(tmp_path / "moved")
    path = tmp_path / "moved" / "results.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert rows_of(tmp_path / "alone") == rows_of(tmp_path / "moved")
    for name in ("alone", "moved"):
        code, output = command("--max-generations=3", "--out", tmp_path / name)
        assert code == 0 and "Going on with the run" in output and not (tmp_path / name / "runs").exists()
    rows = rows_of(tmp_path / "alone")
    assert len({r.generation for r in rows}) == 4 and rows_of(tmp_path / "moved") == rows
    torn = path.read_bytes()
    path.write_bytes(torn + b"search\t4\tg4.0")
    assert rows_of(tmp_path / "moved") == rows and path.read_bytes() == torn


def test_code_is_the_same_with_other_line_ends(tmp_path, monkeypatch):
    before = evolve.code_hash()
    for name in ("prepare.py", "genome.py", "evolve.py"):
        content = (ROOT / name).read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(evolve, "__file__", str(tmp_path / "evolve.py"))
    assert evolve.code_hash() == before
    assert evolve.parse(["--seed=3"]).seed == 3, "what the constants mean is read from there too"


def test_a_log_shows_a_result_when_it_is_recorded(toys, data_dir, tmp_path, monkeypatch):
    """stdout is a file, and the third evaluation of a generation waits until we have read it."""
    monkeypatch.setattr(evolve, "check_ops", lambda: None)
    monkeypatch.setattr(evolve, "FAMILIES", family_of_transformers())
    monkeypatch.setattr(evolve, "LEVELS", {})

    def waits(t, *args):
        if t.id == "g0.03":
            wait_until((tmp_path / "go").exists)
        return toy(t)

    def run():
        fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
        return evolve.main([*FLAGS, "--max-generations=1", "--data-dir", data_dir, "--out", str(tmp_path / "out")])

    monkeypatch.setattr(evolve, "evaluate", waits)
    log, record = tmp_path / "log", tmp_path / "out" / "results.tsv"
    with forked(run) as pid:
        wait_until(lambda: record.exists() and record.read_bytes().count(b"\n") == 2 + 3 + 2)
        shown = re.compile(r"^(transformer-1x64|g0\.\d\d) +ok", re.M)
        wait_until(lambda: shown.findall(log.read_text()) == [*["transformer-1x64"] * 3, "g0.01", "g0.02"], 10)
        assert "generation 0:" not in log.read_text()
        (tmp_path / "go").touch()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, log.read_text()
    assert len(shown.findall(log.read_text())) == 3 + 4 + 4 + 8 == len(rows_of(tmp_path / "out"))
    assert "\r" not in log.read_text() and "\x1b" not in log.read_text()


def test_a_cache_that_is_no_folder(toys, command, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "file/below"):
        monkeypatch.setenv("GENESIS_CACHE", str(tmp_path / name))
        code, output = command("--out", tmp_path / "out")
        assert code == 1 and "is no folder" in output and str(tmp_path / name.partition("/")[0]) in output
        assert "GENESIS_CACHE" in output and "Traceback" not in output and not (tmp_path / "out").exists()


@as_root
def test_a_cache_that_is_read_only(data_dir, monkeypatch):
    """As somebody who may not write there: what is prepared serves, what is not ends in words."""
    monkeypatch.setattr(evolve, "check_ops", lambda: None)
    monkeypatch.setattr(evolve, "evolve", lambda *_: None)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        place.chmod(0o755)
        cache, empty, out, texts = (place / name for name in ("cache", "empty", "out", "texts"))
        for folder, mode in ((cache, 0o755), (empty, 0o755), (out, 0o777)):
            folder.mkdir()
            folder.chmod(mode)
        shutil.copytree(data_dir, texts)
        texts.chmod(0o755)
        monkeypatch.setenv("GENESIS_CACHE", str(cache))
        prepare.prepare(data_dir=texts)

        def run(root: Path, log: Path) -> int:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for _ in range(2))  # noqa: SIM115
            os.setgid(65534)
            os.setuid(65534)
            os.environ["GENESIS_CACHE"] = str(root)
            code = evolve.main([*FLAGS, "--data-dir", str(texts), "--out", str(out / root.name)])
            sys.stdout.flush()
            sys.stderr.flush()
            return code

        ends = {}
        for root in (cache, empty):
            with forked(lambda root=root: run(root, place / f"{root.name}.log")) as pid:
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            ends[root] = code, (place / f"{root.name}.log").read_text()
        assert ends[cache][0] == 0 and "25,341 training tokens" in ends[cache][1], ends[cache]
        code, told = ends[empty]
        assert code == 1 and f"{empty}/" in told and "cannot be written (Permission denied)" in told, told
        assert "GENESIS_CACHE" in told and "Traceback" not in told
        assert not (out / "empty").exists() and not list(empty.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_not_another_run(tmp_path, monkeypatch, capsys, code):
    def flock(fd, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    with Record(tmp_path) as record:
        record.begin({"seed": 0})
        record.append(toy(task()))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and "no locks" in told[0] and "nother run is at work" not in told[0]
    told, entered = [], []
    with evolve.GpuTurn(tmp_path / "turn", "we", told.append) as turn:
        entered.append(turn)
    assert entered and len(told) == 1 and str(tmp_path / "turn") in told[0] and os.strerror(code) in told[0]
    assert "cannot be locked" in told[0] and "busy" not in told[0]
    descriptors = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with evolve.GpuTurn(tmp_path / "turn", "we", told.append):
            pass
    assert len(os.listdir("/dev/fd")) == descriptors


# ----------------------------------------------------------------------------------------------------------------------
# Records


ODD = ["plain", "a # sign", "#", "# first", "tab\tand\ttab", "line\nline", "line\r\nline", "\r", "ends in a tab\t",
    'a "quote"', "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", "\udcff", "→ 日本", "\x00", " ", "'", "\\", ","]  # fmt: skip


def plain_table(path: Path) -> list[dict[str, str]]:
    """A results.tsv as every program reads a file of tabs: lines that begin with a number sign are comments."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = (line for line in file if not line.startswith("#"))
        first, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    assert all(len(row) == len(first) for row in rows)
    return [dict(zip(first, row, strict=True)) for row in rows]


def test_a_record_is_a_table_for_every_program(tmp_path):
    rows = [dataclasses.replace(toy(task(id=f"g0.{n:02d}")), note=note) for n, note in enumerate(ODD)]
    rows[1].captured, rows[2].captured = True, False
    rows[3] = Result.of(task(id="g0.03"), "crash", note=ODD[3], trace="of\ta crash #")
    header = {"seed": 0, "data": "texts # 2\tand a tab\n"}
    with Record(tmp_path) as record:
        record.begin(header)
        for row in rows:
            record.append(row)
    path = tmp_path / "results.tsv"
    first, *lines = path.read_bytes().decode().split("\n")
    assert first.startswith("# ") and json.loads(first[2:]) == header and lines[-1] == ""
    assert not any(sign in line for line in lines for sign in "#\r") and len(lines) == 1 + len(rows) + 1
    table = plain_table(path)
    assert list(table[0]) == list(evolve.COLUMNS) and [row["id"] for row in table] == [row.id for row in rows]
    assert [row["captured"] for row in table[:4]] == ["", "True", "False", ""]
    assert all(re.fullmatch(r"\d+", row["tokens_per_s"]) for row in table if row["id"] != "g0.03")
    failed = table[3]
    unmeasured = ("val_bpb", "test_bpb", "params", "tokens", "tokens_per_s", "rows", "memory_mb", "held_mb", "seconds")
    assert {failed[name] for name in unmeasured} == {""} and failed["status"] == "crash"
    assert not any(cell in ("None", "nan") for row in table for cell in row.values())
    kinds = {name for name, kind in evolve.COLUMNS.items() if kind in (int, float)}
    for row in table:
        for name in kinds:
            assert row[name] == "" or float(row[name]) == pytest.approx(float(row[name])), name
        assert json.loads(row["genome"])
    with Record(tmp_path) as record:
        assert [row.note for row in record.rows] == [row["note"] for row in table]


def test_the_readme_reads_a_record_as_we_do():
    assert 'pd.read_csv("results.tsv", sep="\\t", comment="#")' in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_trained_row_is_a_row_of_that_table(data, tmp_path):
    with Record(tmp_path) as record:
        record.begin({})
        record.append(evolve.evaluate(task(), data, tiny(), evolve.Turn()))
    (row,) = plain_table(tmp_path / "results.tsv")
    assert row["captured"] == row["memory_mb"] == row["held_mb"] == row["test_bpb"] == "" and row["status"] == "ok"
    assert re.fullmatch(r"\d+", row["tokens_per_s"]) and re.fullmatch(r"\d\.\d{6}", row["val_bpb"])


def test_a_run_that_is_left_out_of_the_picture_is_named_with_the_reason(tmp_path, capsys):
    run = {"strategy": "elites", "seed": 0, "device": "NVIDIA H100", "torch": "2.11.0", "code": "abc"}
    others = {
        "a card": (run | {"device": "NVIDIA T4"}, ["DEVICE (NVIDIA T4, here NVIDIA H100)"]),
        "b torch": (run | {"torch": "2.10.0"}, ["TORCH (2.10.0, here 2.11.0)"]),
        "c both": (run | {"seed": 1, "strategy": "drift"}, ["SEED (1, here 0)", "STRATEGY (drift, here elites)"]),
        "d seed and card": (run | {"seed": 1, "device": "cpu"}, ["SEED (1, here 0)", "DEVICE (cpu, here NVIDIA H100)"]),
        "e older": ({k: v for k, v in run.items() if k != "torch"}, ["TORCH (None, here 2.11.0)"]),
        "f newer": (run | {"mood": "good"}, ["MOOD (good, here None)"]),
        "g same": (run, ["same run"]),
        "h seed": (run | {"seed": 7}, []),
        "i random": (run | {"strategy": "random"}, []),
    }
    for name, (header, _) in others.items():
        with Record(tmp_path / "runs" / name) as record:
            record.begin(header)
            record.append(toy(task()))
    found = evolve.find_controls(tmp_path, run)
    told = capsys.readouterr().out.splitlines()
    assert set(found) == {("seed", 7), ("strategy", "random")}
    left_out = {name: reasons for name, (_, reasons) in others.items() if reasons}
    assert len(told) == len(left_out)
    for line, (name, reasons) in zip(told, left_out.items(), strict=True):
        assert line.startswith(f"{tmp_path}/runs/{name}/results.tsv is left out of the picture: ")
        assert all(reason in line for reason in reasons) and line.count(", here ") == sum("here" in r for r in reasons)
    assert evolve.find_controls(tmp_path / "nothing", run) == {} and capsys.readouterr().out == ""


def test_too_few_parameters_for_the_vocabulary_are_refused_at_once(command, tmp_path, monkeypatch):
    """With the least value that does: no genome that can be drawn has fewer."""
    many = SimpleNamespace(train=range(10**6), val=range(10**6), test=range(10**6), vocab_size=8192, source="texts")
    many.fingerprint = "abc"
    monkeypatch.setattr(prepare, "open_source", lambda **_: many)
    monkeypatch.setattr(evolve, "Pool", lambda *_: pytest.fail("a worker was started"))
    out = tmp_path / "out"
    code, output = command("--max-params=500000", "--out", out)
    assert code == 1 and "MAX_PARAMS = 500,000" in output and not out.exists()
    least = int(re.search(r"([\d,]+)\s*$", output)[1].replace(",", ""))
    width, drawn = min(genome.WIDTHS), random.Random(0)
    narrowest = [Genome((Gene(name, None if op.keeps_width else width),), width) for name, op in genome.OPS.items()]
    assert min(net.num_params(8192) for net in narrowest if net.mixes_tokens) == least
    assert not any(genome.random_genome(drawn).tied for _ in range(100)), "a first genome has a head of its own"
    monkeypatch.setattr(evolve, "evolve", lambda *_: None)
    assert command(f"--max-params={least - 1}", "--out", out)[0] == 1 and not out.exists()
    assert command(f"--max-params={least}", "--out", out)[0] == 0


# ----------------------------------------------------------------------------------------------------------------------
# The picture


@pytest.fixture
def drawn(monkeypatch):
    """Draw a picture; returns the figure as it was saved."""
    saved = []
    savefig = Figure.savefig

    def save(figure, *args, **more):
        saved.append(figure)
        savefig(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", save)

    def draw(rows: list[Result], title: str = "a title") -> Figure:
        saved.clear()
        o = evolve.outcome(rows, tiny(), 300)
        assert evolve.picture(rows, title, {}, o, tiny()).startswith(b"\x89PNG")
        (figure,) = saved
        return figure

    return draw


def generations(n: int, each: int = 2) -> list[Result]:
    ops = ("conv1d", "linear", "attention", "gru")
    nets = [Genome((Gene("norm"), Gene(op, 64, skip=2)), embed_dim=64) for op in ops]
    rows = []
    for g in range(n):
        for i in range(each):
            t = task(nets[(g + i) % len(nets)], g, f"g{g}.{i:02d}", generation=g)
            rows.append(dataclasses.replace(toy(t), val_bpb=2 - g / n + 0.1 * i))
    return rows


def panels(figure: Figure) -> dict:
    return {axis.get_title(): axis for axis in figure.axes}


OVER_TIME = ("Is it getting better?", "What is it made of?")


@pytest.mark.parametrize("n", [1, 2, 3, 7, 26])
def test_generations_are_whole_numbers(drawn, n):
    figure = drawn(generations(n))
    for name in OVER_TIME:
        axis = panels(figure)[name]
        left, right = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if left <= tick <= right]
        assert axis.get_xlabel() == "generation" and left < 0 and n - 1 < right
        assert ticks and all(tick == round(tick) and 0 <= tick < n for tick in ticks)
        assert len(ticks) == n or n > 3


def test_many_columns_have_no_edges(drawn):
    few, many = ([p for p in panels(drawn(generations(n, 1)))[OVER_TIME[1]].patches] for n in (3, 1000))
    assert few and many and all(patch.get_linewidth() > 0 for patch in few)
    assert all(patch.get_linewidth() == 0 or patch.get_edgecolor()[3] == 0 for patch in many)


TITLES = {"words": "genesis is at work " * 16, "one word": "a" * 300, "a folder": "genesis, data-" + "my_texts_" * 32,
    "wide letters": "W" * 300, "short": "genesis"}  # fmt: skip


@pytest.mark.parametrize("name", TITLES)
def test_a_title_of_any_length_is_within_the_picture(drawn, name):
    title = TITLES[name][:300]
    figure = drawn(generations(2), title)
    renderer = FigureCanvasAgg(figure).get_renderer()
    (shown,) = [text for text in figure.texts if title[:5] in text.get_text()]
    box, page = shown.get_window_extent(renderer), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    below = panels(figure)[OVER_TIME[0]].title.get_window_extent(renderer)
    assert not box.overlaps(below)


def test_a_run_without_a_score_says_that_there_is_no_picture(toys, command, tmp_path, monkeypatch, capsys):
    def diverges(t, *_):
        return Result.of(t, "diverged") if t.stage == "search" else toy(t)

    monkeypatch.setattr(evolve, "evaluate", diverges)
    code, output = command("--max-generations=2", "--out", tmp_path)
    assert code == 0 and output.count("no progress.png") == 2, "after each generation; there is no final"
    assert {path.name for path in tmp_path.iterdir()} == {"results.tsv", "report.md", ".lock"}
    baseline, failed, scored = toy(task(stage="baseline", generation=None)), Result.of(task(), "crash"), toy(task())
    for rows, says in (([], 0), ([baseline], 0), ([baseline, failed], 1), ([failed, scored], 0)):
        header = evolve.describe_run(tiny(), SimpleNamespace(source="", fingerprint="", vocab_size=300), "cpu")
        evolve.write_reports(tmp_path, rows, header, tiny(), {})
        assert capsys.readouterr().out.count("no progress.png") == says
    assert (tmp_path / "progress.png").exists()


# ----------------------------------------------------------------------------------------------------------------------


@as_root
def test_a_user_without_a_name_and_a_home(stranger):
    output, error = stranger.communicate(timeout=120)
    assert stranger.returncode == 0, error
    root, compiled = output.splitlines()
    assert Path(compiled) == Path(root) / "compiled" and "12345" in root
    assert Path(root).is_relative_to(Path(os.environ.get("TMPDIR", "/tmp")))
