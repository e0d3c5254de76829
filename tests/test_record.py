"""The record survives what happens to files, and a run is known by the code that decides."""

import ast
import collections
import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import resource
import tempfile
import types
from pathlib import Path

import pytest
from helpers import BIG, ROOT, final_task, in_child, search, task, tiny, toy_result

import evolve
from evolve import Record, Result, Stop
from genome import Genome

pytestmark = pytest.mark.usefixtures("cache")


# ----------------------------------------------------------------------------------------------------------------------
# The record


def some_rows() -> list[Result]:
    rows = [toy_result(t) for t in evolve.breed([], 0, tiny(max_params=10**7), 300)]
    rows[:2] = dataclasses.replace(rows[0], captured=True), dataclasses.replace(rows[1], captured=False, rows=None)
    odd = "a\ttab, a\r\nline, a # sign, \x0b \x0c \x1c \x85 \u2028 and “ä→日本”"
    failed = toy_result(task(), "crash", note=odd, seconds=1e-9, losses="nan,1.0000,inf", trace="only for the console")
    return [*rows, failed, dataclasses.replace(toy_result(final_task(), val_bpb=1.23456789), note="ends in → é")]


@pytest.fixture
def written(tmp_path, free_params) -> bytes:
    """A record with some rows; its bytes."""
    with Record(tmp_path) as record:
        record.begin({"seed": 0, "data": "“texts”"})
        for row in some_rows():
            record.append(row)
    return (tmp_path / "results.tsv").read_bytes()


def test_rows_come_back(tmp_path, written):
    with Record(tmp_path) as record:
        assert record.header == {"seed": 0, "data": "“texts”"}
        assert len(record.rows) == 6
        for row, back in zip(some_rows(), record.rows, strict=True):
            note = re.sub(r"[\t\r\n]+", " ", row.note).replace("#", "")
            values = dict(finished=back.finished, note=note, val_bpb=row.val_bpb and round(row.val_bpb, 6))
            values |= dict(test_bpb=row.test_bpb and round(row.test_bpb, 6), seconds=row.seconds and 0.0, trace="")
            assert back == dataclasses.replace(row, **values)
            assert Genome.from_json(back.genome).key == back.key
        assert [math.isfinite(x) for x in record.rows[4].curve] == [False, True, False]
    assert (tmp_path / "results.tsv").read_bytes() == written


def test_a_torn_last_line_is_dropped(tmp_path, written):
    path = tmp_path / "results.tsv"
    start = written.rindex(b"\n", 0, -1) + 1
    assert not written[start:].isascii()
    with Record(tmp_path) as record:
        rows = record.rows
    for end in range(start, len(written)):  # the last of these has it all but the line's end
        path.write_bytes(written[:end])
        with Record(tmp_path) as record:
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
    "other columns": b'# {"seed": 0}\n'
    + "\t".join([name for name in evolve.COLUMNS if name != "genome"]).encode()
    + b"\n",
    "a short row": b'# {"seed": 0}\n' + "\t".join(evolve.COLUMNS).encode() + b"\n0\tg0.01\n",
    "a word for a number": b'# {"seed": 0}\n'
    + "\t".join(evolve.COLUMNS).encode()
    + b"\n"
    + b"x\t" * (len(evolve.COLUMNS) - 1)
    + b"x\n",
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
    with pytest.raises(Stop, match=r"results.tsv: Is a directory\. Move it away, or use --out DIR"):
        Record(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(Stop, match=r"file: File exists\. Name another folder with --out"):
        Record(tmp_path / "file")


def stopped(function) -> str:
    """The message of the Stop that function() raises."""
    try:
        function()
    except Stop as stop:
        return str(stop)
    return ""


def test_one_run_in_a_folder(tmp_path):
    with Record(tmp_path):
        message = in_child(lambda: stopped(lambda: Record(tmp_path)))
        assert message == f"Another run is at work in {tmp_path}; wait for it, or use --out DIR"
    assert in_child(lambda: stopped(lambda: Record(tmp_path))) == ""


@pytest.mark.parametrize("room", [0, 1, 100])
@pytest.mark.parametrize("truncate", [True, False])
def test_a_full_disk(tmp_path, written, room, truncate):
    """A limit on the size of files cuts a write short and then refuses, as a full disk does."""
    path = tmp_path / "results.tsv"

    def fill():
        with Record(tmp_path) as record:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) + room, resource.RLIM_INFINITY))
            if not truncate:  # the worst case: what was written of the line cannot be taken back
                os.truncate = lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no"))
            message = stopped(lambda: record.append(record.rows[0]))
            return [message, len(record.rows), stopped(lambda: evolve.write_whole(tmp_path / "best", b"x" * 10**6))]

    message, rows, other = in_child(fill)
    assert message == f"{path}: File too large. {evolve.GO_ON}" and rows == 6
    assert other == f"{tmp_path / 'best'}: File too large. {evolve.GO_ON}" and not list(tmp_path.glob("*best*"))
    assert path.read_bytes()[: len(written)] == written
    assert len(path.read_bytes()) == len(written) + (0 if truncate else room)
    with Record(tmp_path) as record:
        assert len(record.rows) == 6
    assert path.read_bytes() == written


def test_an_unwritable_folder(free_params):
    """Not for the superuser, who may write anywhere: then as somebody else."""
    with tempfile.TemporaryDirectory() as out:
        out, path = Path(out), Path(out) / "results.tsv"
        with Record(out) as record:
            record.begin({})
            record.append(some_rows()[0])
        before = path.read_bytes()
        path.chmod(0o444)
        (out / ".lock").chmod(0o666)
        out.chmod(0o555)

        def attempt():
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            with Record(out) as record:
                row = record.rows[0]
                acts = (lambda: record.append(row), lambda: record.begin({}), record.move_away)
                return [*map(stopped, acts), stopped(lambda: Record(out / "new"))]

        messages = in_child(attempt)
        out.chmod(0o755)
        assert all("Permission denied" in message for message in messages), messages
        assert path.read_bytes() == before and {p.name for p in out.iterdir()} == {"results.tsv", ".lock"}


def test_a_lock_is_free_when_the_record_is_closed(tmp_path):
    for _ in range(3):
        with Record(tmp_path) as record:
            descriptor = record.lock
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    with contextlib.suppress(ZeroDivisionError), Record(tmp_path):
        raise ZeroDivisionError
    assert in_child(lambda: stopped(lambda: Record(tmp_path))) == ""


def cells_of(line: bytes) -> dict[str, str]:
    return dict(zip(evolve.COLUMNS, line.decode().split("\t"), strict=True))


def line_with(line: bytes, **cells: str) -> bytes:
    return "\t".join((cells_of(line) | cells).values()).encode()


BROKEN = {  # what an editor, a merge or a spreadsheet makes of the lines 3 to 8, and what is said of it
    "a row twice": (lambda lines: [*lines, lines[0]], r"line 9: g0\.01 with seed 0 stands there again"),
    "a failed row three times": (lambda lines: [*lines, lines[4], lines[4]], r"line 10: g0\.01 with seed 1 stands"),
    "ok without a score": (lambda lines: [line_with(lines[0], val_bpb=""), *lines[1:]], "line 3: status ok with a val"),
    "a score of nan": (lambda lines: [*lines[:2], line_with(lines[2], val_bpb="nan"), *lines[3:]], "line 5: status ok"),
    "an infinite score": (
        lambda lines: [line_with(lines[0], val_bpb="inf")],
        "line 3: status ok with a val_bpb of inf",
    ),
    "a failure with a score": (
        lambda lines: [line_with(lines[4], val_bpb="1.5")],
        "line 3: status crash with a val_bpb",
    ),
    "an unknown status": (
        lambda lines: [lines[0], line_with(lines[1], status="fine")],
        "line 4: no status is called 'f",
    ),
    "a word for a number": (lambda lines: [line_with(lines[0], seed="zero")], "line 3: invalid literal for int"),
    "a decimal comma": (
        lambda lines: [line_with(lines[0], val_bpb="1,5")],
        "line 3: could not convert string to float",
    ),
    "a word for a bool": (lambda lines: [line_with(lines[0], captured="WAHR")], "line 3: "),
    "no genome": (lambda lines: [line_with(lines[0], genome="{}")], "line 3: "),
    "half a genome": (lambda lines: [*lines[:3], lines[3][:-9]], "line 6: "),
    "quotes of a spreadsheet": (
        lambda lines: [
            line_with(line, genome='"' + cells_of(line)["genome"].replace('"', '""') + '"') for line in lines
        ],
        "line 3: ",
    ),
    "a cell too many": (lambda lines: [lines[0] + b"\t", *lines[1:]], "line 3: "),
    "a cell too few": (lambda lines: [lines[0], lines[1].rpartition(b"\t")[0]], "line 4: "),
    "an empty line": (lambda lines: [*lines[:2], b"", *lines[2:]], "line 5: "),
    "a merge conflict": (lambda lines: [lines[0], b"<<<<<<< HEAD", *lines[1:]], "line 4: "),
    "another encoding": (lambda lines: [lines[4].decode().encode("utf-16")], "it does not begin as one"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_refused_with_its_line(tmp_path, written, name):
    path, (broken, message) = tmp_path / "results.tsv", BROKEN[name]
    header, columns, *lines = written.removesuffix(b"\n").split(b"\n")
    content = b"\n".join([header, columns, *broken(lines)]) + b"\n"
    path.write_bytes(content)
    with pytest.raises(Stop, match=message) as stop:
        Record(tmp_path)
    assert str(stop.value).startswith(f"{path} is no results.tsv of this program: ")
    assert str(stop.value).endswith("Mend it or move it away, or use --out DIR") and path.read_bytes() == content


def test_two_attempts_are_no_broken_record(tmp_path, written):
    path, lines = tmp_path / "results.tsv", written.splitlines(keepends=True)
    for more in ([lines[6]], [line_with(lines[6], status="ok", val_bpb="1.5")]):  # failed again; went well
        path.write_bytes(b"".join([*lines, *more]))
        with Record(tmp_path) as record:
            assert len(record.rows) == 7
    path.write_bytes(written.replace(b"\n", b"\r\n"))  # saved by an editor of another system
    with Record(tmp_path) as record:
        assert len(record.rows) == 6 and record.rows[-1].genome == some_rows()[-1].genome


@pytest.mark.parametrize("harm", ["emptied", "deleted", "longer", "in its place"])
def test_a_record_that_is_changed_in_mid_run_is_rescued(tmp_path, written, harm):
    path, rows = tmp_path / "results.tsv", some_rows()
    with Record(tmp_path) as record:
        if harm == "emptied":
            path.write_bytes(b"")
        elif harm == "deleted":
            path.unlink()
        elif harm == "longer":
            path.write_bytes(written + b"more\n")
        else:
            path.unlink()
            path.write_bytes(written[:-9])
        changed = path.read_bytes() if path.exists() else None
        again = dataclasses.replace(rows[0], seed=7)
        with pytest.raises(
            Stop, match=r"results.tsv was changed or deleted .* in results.rescued.tsv: put that in its"
        ):
            record.append(again)
        assert (path.read_bytes() if path.exists() else None) == changed
    assert (tmp_path / "results.rescued.tsv").read_bytes() == written
    os.replace(tmp_path / "results.rescued.tsv", path)
    with Record(tmp_path) as record:
        assert len(record.rows) == len(rows)
        record.append(again)
    assert path.read_bytes().startswith(written)


RECORDS = {  # of the repository: rows by stage, rows that were stopped at the hurdle (all others were ok)
    "runs/drift-5s/results.tsv": (dict(baseline=12, search=230, final=15), 22),
    "runs/random-5s/results.tsv": (dict(baseline=12, search=273, final=5), 200),
    "runs/seed0-5s/results.tsv": (dict(baseline=12, search=240, final=55), 41),
    "runs/seed1-5s/results.tsv": (dict(baseline=12, search=240, final=17), 47),
    "runs/seed2-5s/results.tsv": (dict(baseline=12, search=82, final=15), 15),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_earlier_versions_are_read(name):
    stages, n_stopped = RECORDS[name]
    content = (ROOT / name).read_bytes()
    header, columns, rows = evolve.read_results(content)
    assert collections.Counter(r.stage for r in rows) == stages
    n = sum(stages.values())
    assert collections.Counter(r.status for r in rows) == {"ok": n - n_stopped, "stopped": n_stopped}
    assert content.decode().splitlines()[1].split("\t") == columns and header["device"] == "NVIDIA H200"
    assert all(Genome.from_json(r.genome).summary for r in rows)
    assert all((r.generation is None) == (r.stage != "search") for r in rows)
    assert {r.budget for r in rows if r.stage == "final"} == {2.0}
    assert {r.budget for r in rows if r.stage != "final"} == {1.0}
    assert {r.operator for r in rows if r.stage != "search"} == {""} and "again" not in {r.operator for r in rows}
    assert {r.captured for r in rows} == {r.rows for r in rows} == {r.order for r in rows} == {None}
    assert any(r.operator == "repeat" for r in rows) and all(r.tokens_per_s > 1000 for r in rows)
    assert all(1.4 < r.val_bpb < 6 for r in rows if r.status == "ok") and evolve.searched(rows)[0].mean < 1.53


def test_the_controls_of_the_repository_are_found(capsys):
    header, _, rows = evolve.read_results((ROOT / "runs/seed0-5s/results.tsv").read_bytes())
    found = evolve.find_controls(ROOT, header)
    assert {key: len(rows) for key, rows in found.items()} == {
        ("strategy", "random"): 290,
        ("strategy", "drift"): 257,
        ("seed", 1): 269,
        ("seed", 2): 109,
    }
    s = evolve.Settings()
    o = evolve.outcome(rows, s, 8192)
    said = f"{ROOT}/runs/seed0-5s/results.tsv is left out of the picture: it is the same run\n"
    assert said in capsys.readouterr().out and evolve.picture(rows, "the published run", found, o, s)


def test_a_record_with_other_columns_is_read(tmp_path, written):
    """A version of tomorrow or of yesterday: what we do not know is left, what it lacks is not known."""
    header, columns, *lines = written.removesuffix(b"\n").split(b"\n")
    more = b"\n".join([header, columns + b"\tmood", *(line + b"\tgood" for line in lines)]) + b"\n"
    _, names, rows = evolve.read_results(more)
    assert names == [*evolve.COLUMNS, "mood"] and rows == evolve.read_results(written)[2]
    at = list(evolve.COLUMNS).index("outside")
    fewer = [b"\t".join(cell for i, cell in enumerate(line.split(b"\t")) if i != at) for line in (columns, *lines)]
    _, names, rows = evolve.read_results(b"\n".join([header, *fewer]) + b"\n")
    assert names == [name for name in evolve.COLUMNS if name != "outside"] and len(rows) == 6
    assert {row.outside for row in rows} == {None} and [r.val_bpb for r in rows][-1] == 1.234568


def test_a_record_of_the_version_before_is_read(written, capsys):
    """Without the seed of the order, the share of the text and the passes over it, and with settings that are gone."""
    _, columns, *lines = written.removesuffix(b"\n").split(b"\n")
    kept = [i for i, name in enumerate(evolve.COLUMNS) if name not in ("order", "text", "passes")]
    assert len(kept) == len(evolve.COLUMNS) - 3
    older = [b"\t".join(line.split(b"\t")[i] for i in kept) for line in (columns, *lines)]
    header = {"seed": 0, "strategy": "elites", "hurdle_at": 0.7, "final_factor": 2.0}
    read, names, rows = evolve.read_results(b"\n".join([f"# {json.dumps(header)}".encode(), *older]) + b"\n")
    expected = [dataclasses.replace(r, order=None, text=1.0, passes=None) for r in evolve.read_results(written)[2]]
    assert (read, names, rows) == (header, [list(evolve.COLUMNS)[i] for i in kept], expected)
    assert evolve.searched(rows) and evolve.outcome(rows, tiny(), 300).final == []


# ----------------------------------------------------------------------------------------------------------------------
# Which runs are the same one: the hash of the code that decides


def code_of(program: dict[str, str], folder: Path) -> dict[tuple[str, str], str]:
    for name, text in program.items():
        (folder / name).write_text(text, encoding="utf-8")
    return evolve.deciding_code(folder)


@pytest.fixture(scope="module")
def program() -> dict[str, str]:
    return {file: (ROOT / file).read_text(encoding="utf-8") for file in ("prepare.py", "genome.py", "evolve.py")}


def edited(program: dict[str, str], file: str, old: str, new: str) -> dict[str, str]:
    assert program[file].count(old) >= 1, f"{file} has no {old!r}"
    return {**program, file: program[file].replace(old, new, 1)}


DECIDING = {  # a file, what of it changes, and how
    "half the score": ("prepare.py", "bits_per_byte", "(nats / (math.log(2) *", "(nats / (2 * math.log(2) *"),
    "another order of batches": ("prepare.py", "Batches", "(first + torch.arange(", "(first + 7 * torch.arange("),
    "fewer windows": ("prepare.py", "window_count", "return targets // seq_len\n", "return targets // seq_len - 1\n"),
    "other tokens": ("prepare.py", "gather", ".long() & 0xFFFF", ".long() & 0x7FFF"),
    "another precision": ("evolve.py", "Trial", '_matmul_precision("high")', '_matmul_precision("highest")'),
    "other seeds": ("evolve.py", "SEEDS", "SEEDS = 100_000", "SEEDS = 10_000"),
    "who was searched": ("evolve.py", "searched", 'candidates(of_stage(rows, "search"))', "candidates(rows)"),
    "who is a candidate": ("evolve.py", "candidates", "len(group) - len(ok) < 2", "len(group) - len(ok) < 3"),
    "who is best": ("evolve.py", "candidates", "(c.mean, in_order(c.id))", "(min(c.scores), in_order(c.id))"),
    "a tie": ("evolve.py", "in_order", "int(part) if part.isdecimal() else part", "part"),
    "the hurdle of a generation": ("evolve.py", "hurdle_after", "math.ceil(min(1.0, times", "round(min(1.0, times"),
    "where the hurdle stands": ("evolve.py", "RUNGS", "RUNGS = ((3, 2.0)", "RUNGS = ((4, 2.0)"),
    "what speed is worth": ("evolve.py", "SPEED_WORTH", "SPEED_WORTH = 0.15", "SPEED_WORTH = 0.1"),
    "who misses the hurdle": ("evolve.py", "Trial", "/ now, s) > limit", "/ now, s) >= limit"),
    "how much of the text": ("evolve.py", "Trial", "round(len(data.train) * task.text)", "len(data.train)"),
    "the schedule": ("evolve.py", "schedule_at", "2 * (1 - fraction)", "3 * (1 - fraction)"),
    "whose child": ("evolve.py", "elites", "rng.choice(known[", "max(known["),
    "who breeds by another strategy": ("evolve.py", "AGE", "AGE = 60", "AGE = 61"),
    "what a genome consists of": ("evolve.py", "parts", "found[(\"pair\", *pair)] = 0.35", "pass"),
    "what is alike": ("evolve.py", "pieces", '["", *genome.ops]', "genome.ops"),
    "how much a bad score counts": ("evolve.py", "squeezed", "math.log1p(max", "math.sqrt(max"),
    "what is believed before": ("evolve.py", "WEIGHT", "WEIGHT = 0.025", "WEIGHT = 0.02"),
    "which child is trained": ("evolve.py", "breed", "born = min((new(who)", "born = max((new(who)"),
    "how operators are drawn": ("genome.py", "LONG", "LONG = 12", "LONG = 16"),
    "a learning rate": ("evolve.py", "MUON_LR", "MUON_LR, MUON_MOMENTUM = 0.02", "MUON_LR, MUON_MOMENTUM = 0.03"),
    "how the momentum rises": ("evolve.py", "MOMENTUM_STEPS", "MOMENTUM_STEPS = 300", "MOMENTUM_STEPS = 200"),
    "the gradient of the loss": ("genome.py", "gradient_of_targets", "- CAP) - total", "- CAP) - 2 * total"),
    "what a leak is": ("evolve.py", "Trial", "by_change > 0.01", "by_change > 0.02"),
    "attempts at the final": ("evolve.py", "once_more", "attempts=2)\n\n\nSTAGES", "attempts=3)\n\n\nSTAGES"),
    "a stage": ("evolve.py", "STAGES", '    "passes": once_more(passes_evaluations),\n', ""),
    "how a family is tuned": ("evolve.py", "tuning", '("n_layer", 2), *others', '("n_layer", 4), *others'),
    "the sizes of the line": ("evolve.py", "sizes", "max(1, dim // 64)", "max(1, dim // 32)"),
    "who begins where": ("evolve.py", "tuned", "for design in found[:1]:", "for design in found[-1:]:"),
    "where words lead": ("evolve.py", "Design", "return tuple(words) or (-1, 1)", "return tuple(words[:1]) or (-1, 1)"),
    "the line it begins with": ("evolve.py", "LINE", "LINE = 5", "LINE = 7"),
    "when the winner is scored": ("evolve.py", "TARGET_AT", "TARGET_AT = (0.25,", "TARGET_AT = (0.125, 0.25,"),
    "who has won": ("evolve.py", "ranking", "(len(scores) < len(own) and", "(len(scores) != len(own) and"),
    "who grows": ("evolve.py", "grow_evaluations", "not score < best", "not score <= best"),
    "how a design grows": ("genome.py", "grown", "stop + times * (stop", "stop + 2 * times * (stop"),
    "a decorator": ("evolve.py", "Optimizer", "    @torch.no_grad()\n    def step(self):", "    def step(self):"),
    "widths": ("genome.py", "WIDTHS", "WIDTHS = (64,", "WIDTHS = (32, 64,"),
    "a helper of ops": ("genome.py", "rms_norm", "def rms_norm(x, gain=None):", "def rms_norm(x, gain=2):"),
    "a baseline": ("genome.py", "LEVELS", "convnet(4, 256)", "convnet(3, 256)"),
    "a trait that is tuned": ("genome.py", "FAMILIES", '"tied": GENOME_TRAITS["tied"],\n', "\n"),
    "a trait of the second family": ("genome.py", "FAMILIES", '"values": ("none", "last", "half"),\n', "\n"),
    "where a family begins": ("genome.py", "FAMILIES", 'start="transformer"', "start=None"),
    "the share of trials": ("genome.py", "FAMILIES", "effort=0.5", "effort=0.75"),
    "how small a gain begins": ("genome.py", "modern", '1, skip=1, scale="small"', '1, skip=1, scale="zero"'),
    "how n-grams are hashed": ("genome.py", "NgramTable", "-7_046_029_254_386_353_131", "-7_046_029_254_386_353_133"),
    "a choice of stride": ("genome.py", "WIRING", '"stride": (1, 2, 4)', '"stride": (1, 2, 4, 8)'),
    "the rate of a table": ("evolve.py", "Optimizer", "EMBED_LR * (768 / table", "EMBED_LR * (512 / table"),
    "a default of a baseline": ("genome.py", "transformer", "heads: int = 2, lr_factor", "heads: int = 4, lr_factor"),
    "a new op": (
        "genome.py", "Twice",
        "class GenomeError(",
        'class Twice(Op, name="twice", keeps_width=True):\n    def forward(self, x):\n        return 2 * x\n\n\n'
        "class GenomeError(",
    ),
}  # fmt: skip
IDLE = {
    "a docstring": ("evolve.py", '"""One optimizer step over', '"""A step over'),
    "the first lines of a file": ("genome.py", '"""', '"""More: '),
    "a docstring of an op": ("genome.py", '"""Rotary position', '"""A position'),
    "a comment": ("evolve.py", "  # of initialisation\n", "  # of weights\n"),
    "a type hint": ("evolve.py", "schedule_at(fraction: float) -> float:", "schedule_at(fraction: int) -> int:"),
    "no type hint": ("prepare.py", "window_count(tokens: torch.Tensor, seq_len: int,", "window_count(tokens, seq_len,"),
    "a hint of a name": ("evolve.py", "found: dict[tuple, float] = {}", "found: dict = {}"),
    "an error": ("evolve.py", 'raise Stop(f"No new genome under', 'raise Stop(f"Nothing new under'),
    "an error of the data": ("prepare.py", "tokens to predict (max_tokens", "tokens to foretell (max_tokens"),
    "an error of a genome": ("genome.py", "over MAX_SEQ_LEN = {MAX_SEQ_LEN}", "beyond MAX_SEQ_LEN = {MAX_SEQ_LEN}"),
    "an assertion": ("prepare.py", "tokens: int16 (tokens,), as Dataset.to", "int16 (tokens,), as Dataset.to"),
    "the console": ("evolve.py", "M tok/s", "million tokens/s"),
    "what genome.py prints": ("genome.py", "Networks out of 300 newcomers' in which", "Of 300 newcomers' networks"),
    "how it is said": ("prepare.py", "tqdm.write(line)", "print(line)"),
    "the picture": ("evolve.py", "Is it getting better?", "Is it?"),
    "intervals": ("evolve.py", "12.706, 4.303", "12.7, 4.3"),
    "patience": ("evolve.py", "PATIENCE = 10.0", "PATIENCE = 20.0"),
    "the default of a constant": ("evolve.py", "POPULATION_SIZE: Count = 12", "POPULATION_SIZE: Count = 13"),
    "a download": ("prepare.py", "ATTEMPTS = 8", "ATTEMPTS = 9"),
}  # fmt: skip


def test_what_decides_a_score_makes_another_run(program, tmp_path):
    before, todo, idle = code_of(program, tmp_path), dict(DECIDING), []
    while todo:
        together, at_once = program, {}
        for name, (file, where, old, new) in todo.items():
            if (file, where) not in at_once.values():  # of each place one change at a time
                together, at_once[name] = edited(together, file, old, new), (file, where)
        after = code_of(together, tmp_path)
        idle += [name for name, place in at_once.items() if after[place] == before.get(place)]
        todo = {name: change for name, change in todo.items() if name not in at_once}
    assert idle == []


def test_what_decides_nothing_makes_no_other_run(program, tmp_path):
    together = program
    for change in IDLE.values():
        together = edited(together, *change)
    before, after = code_of(program, tmp_path), code_of(together, tmp_path)
    assert {place for place in {**before, **after} if before.get(place) != after.get(place)} == set()


def test_a_run_is_the_same_while_its_code_is(program, tmp_path, monkeypatch):
    data = types.SimpleNamespace(source="text", fingerprint="0", vocab_size=300)
    monkeypatch.setattr(evolve, "__file__", str(tmp_path / "evolve.py"))
    code_of(program, tmp_path)
    before = evolve.describe_run(tiny(), data, "cpu")
    assert before == evolve.describe_run(
        tiny(workers=3, max_generations=9, final_seeds=7, long_seeds=2, long_factor=9.0, baseline_trials=9, deadline=9),
        data,
        "cpu",
    )
    assert (before["vocab_size"], before["device"], len(before["code"])) == (300, "cpu", 12)
    code_of(edited(program, "evolve.py", "2 * (1 - fraction)", "3 * (1 - fraction)"), tmp_path)
    after = evolve.describe_run(tiny(seed=1), data, "cpu")
    assert {name for name in after if after[name] != before[name]} == {"code", "seed"}


def test_the_code_that_decides():
    found = {name for file, name in evolve.deciding_code(ROOT) if file == "evolve.py"}
    assert found >= {"evaluate", "Trial", "Optimizer", "check_network", "next_tasks", "breed", "candidates", "SEEDS"}
    assert found >= {"tuning", "hurdle_after", "ranking", "growth", "TARGET_AT", *(f"{s}_evaluations" for s in (
        "final", "target", "grow", "long", "passes"))}  # fmt: skip
    idle = "Pool serve GpuTurn WorkerTurn turn_file Record read_results to_line write_whole find_controls code_hash "
    idle += "describe_run estimate standings outcome time_to_target lineage best_genome picture draw_scores "
    idle += "draw_leads write_reports result_text target_text answer report steps importance final_table as_table "
    idle += (
        "unbeaten harmless ablation_tasks begin_or_join rewrite_report settings_of end_text evolve unless_all_crash "
    )
    idle += "slower_text begin_or_go_on check_ops run_command main save_model write_text"
    defined = {getattr(node, "name", "") for node in ast.parse((ROOT / "evolve.py").read_text()).body}
    assert set(idle.split()) <= defined and not found & set(idle.split()) and not found & set(evolve.CONSTANTS)
    data = {name for file, name in evolve.deciding_code(ROOT) if file == "prepare.py"}
    assert data >= {"Dataset", "Batches", "bits_per_byte", "gather", "window_count"}
    assert not data & {"download", "prepare", "open_source", "main", "say", "try_lock", "write_split"}


def test_code_as_text_is_the_same_in_every_python():
    source = """
def f(x: int, *more, key=None, **rest) -> int:
    'what it does'
    assert x > 0, 'or else'
    if not x:
        raise ValueError(f'{x} is nothing') from None
    return {**rest, 'a': [x, True, 1.5]}[x:]
"""
    told = (
        "Module(body=FunctionDef(name='f' args=arguments(args=arg(arg='x') vararg=arg(arg='more') "
        "kwonlyargs=arg(arg='key') kw_defaults=Constant() kwarg=arg(arg='rest')) body="
        "Assert(test=Compare(left=Name(id='x' ctx=Load()) ops=Gt() comparators=Constant(value=0)))"
        "If(test=UnaryOp(op=Not() operand=Name(id='x' ctx=Load())) body=Raise(exc=Name(id='ValueError' ctx=Load())))"
        "Return(value=Subscript(value=Dict(keys=NoneConstant(value='a') values=Name(id='rest' ctx=Load())"
        "List(elts=Name(id='x' ctx=Load())Constant(value=True)Constant(value=1.5) ctx=Load())) "
        "slice=Slice(lower=Name(id='x' ctx=Load())) ctx=Load()))))"
    )
    assert evolve.tree_text(evolve.Essence().visit(ast.parse(source))) == told


def test_controls_are_runs_that_differ_in_strategy_or_seed_alone(free_params, tmp_path, capsys):
    run = {"strategy": "elites", "seed": 0, "data": "text"}
    rows = search(tiny(**BIG), 1)
    for name, other in {
        "1": run | {"strategy": "random"},
        "2": run | {"strategy": "random", "seed": 1},
        "3": run,
        "4": run | {"strategy": "drift"},
        "5": run | {"seed": 7},
        "6": run | {"seed": 7, "data": "other"},
        "7": {k: v for k, v in run.items() if k != "data"},
        "much else": run | {"strategy": "drift", "seed": 8, "data": "other", "device": "another"},
    }.items():
        with Record(tmp_path / "runs" / name) as record:
            record.begin(other)
            for row in rows[: int(name) if name.isdecimal() else 1]:
                record.append(row)
    (tmp_path / "runs" / "8").mkdir()
    (tmp_path / "runs" / "8" / "results.tsv").write_text("no results\n")
    (tmp_path / "runs" / "9").mkdir()
    (tmp_path / "runs" / "9" / "results.tsv").mkdir()
    found = evolve.find_controls(tmp_path, run)
    *told, last = capsys.readouterr().out.splitlines()
    assert last == f"{tmp_path}/runs: 1 differing in more than STRATEGY or SEED left out of the picture"
    left_out = {line[len(f"{tmp_path}/runs/")]: line.partition(" is left out of the picture: ")[2] for line in told}
    assert sorted(left_out) == ["2", "3", "6", "7", "8", "9"] and left_out["3"] == "it is the same run"
    assert left_out["2"] == "it differs in STRATEGY (random, here elites), SEED (1, here 0)"
    assert left_out["7"] == "it differs in DATA (None, here text)" and left_out["9"]
    assert left_out["8"].startswith("it does not begin as one")
    found = {key: len(rows) for key, rows in found.items()}
    assert found == {("strategy", "random"): 1, ("strategy", "drift"): 4, ("seed", 7): 5}
