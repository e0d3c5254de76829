"""prepare.py: downloads survive bad servers, files are whole or absent, bytes add up, the metric is what it says."""

import errno
import hashlib
import json
import math
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
import torch
from helpers import uniform_bpb

import prepare

ROOT = Path(prepare.__file__).parent
LAST = "shard_01822.parquet"
FILES = prepare.FILES
WORDS = [w for w in prepare.__doc__.split() if w.isalpha()]


def write_shard(path: Path, texts: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=16)
    return path


def prose(seed: int, n_documents: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(rng.choices(WORDS, k=rng.randrange(20, 200))) for i in range(n_documents)]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A cache of its own for every test, a small vocabulary, and no waiting for servers."""
    monkeypatch.setenv("GENESIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 400)
    monkeypatch.setattr(prepare, "BACKOFF", 0.001)
    monkeypatch.setattr(prepare, "BACKOFF_MAX", 0.005)
    monkeypatch.setattr(prepare, "ATTEMPTS", 4)
    monkeypatch.setattr(prepare, "REACH", 0.05)
    monkeypatch.setattr(prepare, "CHUNK", 512)
    monkeypatch.setattr(prepare, "PIECE_CHARS", 2000)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    for i in range(3):
        write_shard(tmp_path / "texts" / f"shard_{i}.parquet", prose(i))
    return tmp_path / "texts"


def run_main(monkeypatch, capsys, *args: str) -> tuple[int, str]:
    """Run the command line; return its exit code and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    capsys.readouterr()
    try:
        code = prepare.main()
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def texts_of(data: prepare.Dataset, split: str) -> list[bytes]:
    """Decode a split back to the bytes of its documents."""
    tokens, tokenizer = getattr(data, split), data.tokenizer()
    starts = np.flatnonzero(tokens == data.bos)
    assert starts[0] == 0
    return [tokenizer.decode_bytes(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


# ----------------------------------------------------------------------------------------------------------------
# Download: a hub on 127.0.0.1 that misbehaves as told


class Hub(ThreadingHTTPServer):
    """Serves `files`; `faults[name]` lists what goes wrong with the next requests; `log` has (name, Range)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.faults, self.log, self.delay, self.retry_after = {}, {}, [], 0.0, "0"
        self.tokens, self.elsewhere = [], ""  # what HF_TOKEN sends; where "redirect" leads
        self.url = f"http://127.0.0.1:{self.server_port}"

    def ranges(self, name: str) -> list:
        return [asked for logged, asked in self.log if logged == name]

    def handle_error(self, request, client_address):
        pass  # clients that are killed


class HubHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1]
        asked = self.headers.get("Range")
        hub.log.append((name, asked))
        hub.tokens.append(self.headers.get("Authorization"))
        faults = hub.faults.get(name) or [""]
        fault = faults.pop(0) if len(faults) > 1 else faults[0]  # the last one stays
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", hub.elsewhere + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault.isdigit() or name not in hub.files:
            self.send_response(int(fault or 404))
            self.send_header("Retry-After", hub.retry_after)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = {"corrupt": b"no parquet" * 99, "no text": hub.files.get("no text")}.get(fault, hub.files[name])
        start = int(asked[len("bytes=") : -1]) if asked and fault != "no range" else 0
        if fault == "416" or (start and start >= len(body)):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        rest, extra = body[start:], {"too long": 1000, "too short": -100}.get(fault, 0)
        self.send_response(206 if start else 200)
        if start:
            first = start + (5 if fault == "wrong range" else 0)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(rest) + extra))
        self.end_headers()
        if fault in ("truncate", "drop"):
            rest = rest[: len(rest) // 2]
        for i in range(0, len(rest), 4096):
            self.wfile.write(rest[i : i + 4096])
            time.sleep(hub.delay)
        if fault == "drop":  # a reset, not an orderly end
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@contextmanager
def serving():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for i, name in enumerate(["shard_00000.parquet", "shard_00001.parquet", LAST]):
            hub.files[name] = write_shard(tmp_path / "hub" / name, prose(i)).read_bytes()
        pq.write_table(pa.table({"words": ["a", "b"]}), tmp_path / "hub" / "no text")
        hub.files["no text"] = (tmp_path / "hub" / "no text").read_bytes()
        yield hub


RECOVERED = {
    "truncated": ["truncate", ""],
    "truncated again and again": ["truncate", "truncate", "truncate", "truncate", "truncate", ""],
    "connection dropped": ["drop", "drop", ""],
    "server busy": ["503", "500", ""],
    "too many requests": ["429", ""],
    "announces more than it sends": ["too long", ""],
    "announces less than it has": ["too short", ""],
    "corrupt": ["corrupt", ""],
    "another file": ["no text", ""],
    "ignores Range": ["truncate", "no range"],
    "refuses Range": ["truncate", "416", ""],
    "answers with another range": ["truncate", "wrong range", ""],
}


@pytest.mark.parametrize("faults", RECOVERED.values(), ids=RECOVERED)
def test_download_recovers(hub, tmp_path, faults):
    for name in ("shard_00001.parquet", LAST):
        hub.faults[name] = list(faults)
    folder = prepare.prepare(shards=2)
    for name in ("shard_00000.parquet", "shard_00001.parquet", LAST):
        assert (folder / "shards" / name).read_bytes() == hub.files[name]
    assert not list(folder.rglob("*.part"))
    assert len(hub.ranges(LAST)) == len(faults)
    if faults[0] == "truncate":  # asked to go on from where it stopped
        half = len(hub.files[LAST]) // 2
        assert hub.ranges(LAST)[1] == f"bytes={half - half % prepare.CHUNK}-"


REPORTED = {
    "404": (["404"], "HTTP 404", 1),
    "403": (["403"], "HTTP 403", 1),
    "503 for ever": (["503"], "HTTP 503", 4),
    "429 for ever": (["429"], "HTTP 429", 4),
    "corrupt for ever": (["corrupt"], "does not open as parquet", 2),
    "another file for ever": (["no text"], "no `text` column", 2),
    "always wrong about the length": (["too long"], "more expected", 5),
}


@pytest.mark.parametrize("faults, why, requests", REPORTED.values(), ids=REPORTED)
def test_download_reports(hub, monkeypatch, capsys, faults, why, requests):
    hub.faults["shard_00001.parquet"] = list(faults)
    code, message = run_main(monkeypatch, capsys, "--shards", 2)
    assert code == 1
    first, cause, next_step = message.splitlines()
    assert first == "1 of 3 shards could not be downloaded:"
    assert "shard_00001.parquet" in cause and why in cause and hub.url in cause
    assert next_step.endswith("Run again to resume: uv run prepare.py --shards 2")
    assert len(hub.ranges("shard_00001.parquet")) == requests

    folder = prepare.source_folder()
    kept = {path.name for path in (folder / "shards").iterdir() if path.suffix == ".parquet"}
    assert kept == {"shard_00000.parquet", LAST}
    with pytest.raises(prepare.PrepareError, match=r"No tokens in .*; run: uv run prepare.py$"):
        prepare.load(folder)
    assert not list(folder.glob(".tmp-*"))

    hub.faults.clear(), hub.log.clear()  # the same command, when the server is well again
    assert run_main(monkeypatch, capsys, "--shards", 2)[0] == 0
    assert [name for name, _ in hub.log] == ["shard_00001.parquet"]


def test_no_server_is_reported_once(monkeypatch, capsys):
    with serving() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    code, message = run_main(monkeypatch, capsys, "--shards", 8)
    assert code == 1 and message.count("cannot be reached") == 1 and "refused" in message
    assert all(way in message for way in ("HF_ENDPOINT", "HTTPS_PROXY", "--data-dir", "--demo"))
    monkeypatch.setenv("HF_ENDPOINT", "no url at all")
    code, message = run_main(monkeypatch, capsys, "--shards", 1)
    assert code == 1 and "no url at all" in message and "HF_ENDPOINT" in message  # at once, in requests' own words


UNTRUSTED = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed")
HOPELESS = {
    "untrusted certificate": (requests.exceptions.SSLError(UNTRUSTED), "REQUESTS_CA_BUNDLE"),
    "no such certificates": (
        requests.RequestException("Could not find a suitable TLS CA certificate bundle"),
        "REQUESTS_CA_BUNDLE",
    ),
    "SOCKS proxy": (requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support."), "--with pysocks"),
}


@pytest.mark.parametrize("error, help", HOPELESS.values(), ids=HOPELESS)
@pytest.mark.parametrize("call", ["head", "get"])
def test_what_no_retry_mends_is_final(hub, monkeypatch, capsys, error, help, call):
    calls = []

    def refuse(url, **options):
        calls.append(url)
        raise error

    monkeypatch.setattr(prepare, "REACH", 60)
    monkeypatch.setattr(prepare.requests, call, refuse)
    code, message = run_main(monkeypatch, capsys, "--shards", 1)
    assert code == 1 and help in message and "uv run prepare.py --shards 1" in message
    assert sorted(calls) == sorted(set(calls))  # no shard was tried twice


def test_the_token_is_for_the_hub_alone(hub, monkeypatch):
    with serving() as elsewhere:
        elsewhere.files = hub.files
        hub.elsewhere = elsewhere.url.replace("127.0.0.1", "localhost")
        hub.faults[LAST] = ["redirect"]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_TOKEN", "secret\n")
        prepare.prepare(shards=1)
    assert set(hub.tokens) == {"Bearer secret"} and len(hub.tokens) == 2
    assert elsewhere.tokens == [None]
    monkeypatch.delenv("HF_TOKEN")
    prepare.prepare(shards=2)
    assert hub.tokens[2:] == [None]


class Waits(threading.Event):
    """A stop signal that notes how long it was waited for, and does not wait."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        if timeout is None:
            return super().wait()
        self.seconds.append(timeout)


def test_backoff_and_retry_after(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "BACKOFF", 1.0)
    monkeypatch.setattr(prepare, "BACKOFF_MAX", 3.0)
    monkeypatch.setattr(prepare, "ATTEMPTS", 9)
    monkeypatch.setattr(prepare.random, "uniform", lambda low, high: 1.0)
    hub.faults["shard_00000.parquet"] = ["truncate", "503", "503", "503", "429", "truncate", ""]
    hub.retry_after, stop = "7", Waits()
    bar = SimpleNamespace(total=0, update=lambda n: None)
    prepare.Download(f"{hub.url}/shard_00000.parquet", tmp_path / "shard", bar, stop).run()
    assert stop.seconds == [0.5, 7.0, 7.0, 7.0, 7.0, 0.5]  # bytes arrived: the count starts again


def test_retry_after_header(monkeypatch):
    now = 1_700_000_000
    monkeypatch.setattr(prepare.time, "time", lambda: now)
    cases = {"12": 12, "0": 0, formatdate(now + 90, usegmt=True): 90, formatdate(now - 90, usegmt=True): 0}
    for value, seconds in (cases | {"soon": 0, "": 0, "-3": 0, "99999": prepare.RETRY_AFTER_MAX}).items():
        assert prepare.retry_after(SimpleNamespace(headers={"Retry-After": value})) == seconds, value
    assert prepare.retry_after(SimpleNamespace(headers={})) == 0


def test_a_whole_part_is_not_downloaded_again(hub):
    shards = prepare.source_folder() / "shards"
    shards.mkdir(parents=True)
    (shards / f"{LAST}.part").write_bytes(hub.files[LAST])
    (shards / "shard_00000.parquet.part").write_bytes(hub.files["shard_00000.parquet"] + b"too much")
    (shards / "shard_00001.parquet").write_bytes(b"damaged since")
    prepare.prepare(shards=2)
    assert hub.ranges(LAST) == [f"bytes={len(hub.files[LAST])}-"]
    assert hub.ranges("shard_00000.parquet")[1:] == [None]
    assert all((shards / name).read_bytes() == hub.files[name] for name in [LAST, "shard_00001.parquet"])


def test_more_shards_later(hub):
    one = prepare.load(prepare.prepare(shards=1))
    hub.log.clear()
    two = prepare.load(prepare.prepare(shards=2))
    assert [name for name, _ in hub.log] == ["shard_00001.parquet"]
    assert len(two.train) > len(one.train) and two.fingerprint != one.fingerprint
    assert prepare.load(prepare.prepare()).fingerprint == two.fingerprint  # no number: as it is prepared
    assert two.source == "fineweb-edu" and two.meta["shards"][-1] == LAST


def test_disk_is_checked_first(hub, monkeypatch, capsys):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda folder: SimpleNamespace(free=123_000_000))
    code, message = run_main(monkeypatch, capsys, "--shards", 8)
    assert code == 1 and not hub.log
    assert "2.0 GB needed, 123.0 MB free" in message and message.strip().endswith("uv run prepare.py --shards 8")


def test_full_disk(hub, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # while tokens are written
        patch.setattr(prepare, "encode", full)
        code, message = run_main(patch, capsys, "--shards", 1)
    assert code == 1 and "disk is full" in message and "Run again to resume: uv run prepare.py --shards 1" in message
    folder = prepare.source_folder()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "shards"]
    hub.log.clear()
    prepare.prepare(shards=1)
    assert not hub.log  # the shards were there

    with monkeypatch.context() as patch:  # while shards are written: the tokens of before stay
        patch.setattr(prepare.os, "fsync", full)
        code, message = run_main(patch, capsys, "--shards", 2)
    assert code == 1 and "disk is full" in message
    assert len(prepare.load(folder).meta["shards"]) == 2


# ----------------------------------------------------------------------------------------------------------------
# Files: whole or absent


def start(*args: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "prepare.py"), *map(str, args)]
    return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_at_random_moments(hub, tmp_path):
    for i, name in enumerate(["shard_00000.parquet", LAST]):
        hub.files[name] = write_shard(tmp_path / "hub" / name, prose(i, 400)).read_bytes()
    hub.delay = 0.003
    began = time.time()
    assert start("--shards", 1, GENESIS_CACHE=str(tmp_path / "calm")).wait() == 0
    seconds = time.time() - began
    calm = contents(tmp_path / "calm" / "fineweb-edu")

    rng, folder = random.Random(0), tmp_path / "cache" / "fineweb-edu"
    for fraction in (0.5, 0.7, 0.8, 0.9, 1.0):
        process = start("--shards", 1)
        time.sleep(seconds * fraction * rng.uniform(0.9, 1.0))
        process.kill()
        process.communicate()
        try:
            prepare.load(folder)
        except prepare.PrepareError:
            continue
        assert contents(folder) == calm
        for name in FILES:  # it was done already: from the tokens on once more
            (folder / name).unlink()
    process = start("--shards", 1)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert contents(folder) == calm
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, ".lock", "shards"])  # no leftovers
    assert {path.name for path in (folder / "shards").iterdir()} == {"shard_00000.parquet", LAST}


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_by_the_user(hub, by):
    hub.delay = 60  # a silent server is not waited for
    process = start("--shards", 2)
    while not hub.log:
        time.sleep(0.01)
    process.send_signal(by)
    output, _ = process.communicate(timeout=prepare.TIMEOUT[1] - 5)
    assert process.returncode == 130, output
    assert output.strip().endswith("Run again to resume: uv run prepare.py --shards 2") and "Traceback" not in output


def test_nohup_is_respected(hub):
    hub.delay = 0.01
    run = ["nohup", sys.executable, str(ROOT / "prepare.py"), "--shards", "1"]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not hub.log:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate()
    assert process.returncode == 0, output


def test_a_closed_pipe_ends_it_quietly(data_dir):
    reader, writer = os.pipe()
    os.close(reader)
    run = [sys.executable, str(ROOT / "prepare.py"), "--data-dir", str(data_dir)]
    result = subprocess.run(run, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize("calls", range(len(FILES)))
def test_crash_between_renames(data_dir, monkeypatch, calls):
    folder = prepare.prepare(data_dir=data_dir)
    old = contents(folder)
    write_shard(data_dir / "shard_0.parquet", prose(7))
    left, replace = [calls], os.replace

    def crash(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(data_dir=data_dir)
    with pytest.raises(prepare.PrepareError, match="No tokens in"):
        prepare.load(folder)
    prepare.prepare(data_dir=data_dir)
    assert contents(folder)["train.bin"] != old["train.bin"]


def test_damaged_files_are_not_believed(data_dir):
    folder = prepare.prepare(data_dir=data_dir)
    whole = contents(folder)
    for name in FILES:
        (folder / name).write_bytes(whole[name][: len(whole[name]) // 2])
        if name != "tokenizer.json":  # read when it is used
            with pytest.raises(prepare.PrepareError, match=rf"{name}.*; run: uv run prepare.py --data-dir DIR"):
                prepare.load(folder)
        with pytest.raises(prepare.PrepareError, match=rf"{name}.*; run: uv run prepare.py --data-dir DIR"):
            prepare.load(folder, verify=True)
        prepare.prepare(data_dir=data_dir)
        assert contents(folder) == whole


@pytest.mark.parametrize("name", FILES[:-1])
def test_one_changed_bit_is_noticed(data_dir, monkeypatch, capsys, name):
    folder = prepare.prepare(data_dir=data_dir)
    whole = contents(folder)
    changed = bytearray(whole[name])
    changed[len(changed) // 2 & ~1] ^= 1  # the size stays, and so does every shape
    (folder / name).write_bytes(changed)
    with pytest.raises(prepare.PrepareError, match=rf"{name}.*; run: uv run prepare.py --data-dir DIR"):
        prepare.load(folder, verify=True)
    with pytest.raises(prepare.PrepareError, match=name):
        prepare.open_source(data_dir=data_dir)
    assert run_main(monkeypatch, capsys, "--data-dir", data_dir)[0] == 0 and contents(folder) == whole  # it mends


def test_changed_hashes_in_meta_are_noticed(data_dir):
    folder = prepare.prepare(data_dir=data_dir)
    text = (folder / "meta.json").read_text()
    fingerprint = prepare.load(folder).fingerprint
    (folder / "meta.json").write_text(text.replace(fingerprint, "0" * 16))
    with pytest.raises(prepare.PrepareError, match=r"meta\.json"):
        prepare.load(folder, verify=True)


def test_fingerprint_is_that_of_published_runs(data_dir):
    """Tokenizer files as they are, then the 16-byte hash of each split: runs that quote one stay comparable."""
    folder = prepare.prepare(data_dir=data_dir)
    expected = hashlib.blake2b(digest_size=8)
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        expected.update((folder / name).read_bytes())
    for name in ("train.bin", "val.bin", "test.bin"):
        expected.update(hashlib.blake2b((folder / name).read_bytes(), digest_size=16).digest())
    assert prepare.load(folder).fingerprint == expected.hexdigest()


META = {
    "a list": lambda meta: [meta],
    "a string": lambda meta: "meta",
    "a number": lambda meta: 7,
    "null": lambda meta: None,
    "empty": lambda meta: {},
    **{
        f"no {key}": lambda meta, key=key: {k: v for k, v in meta.items() if k != key}
        for key in ("format", "source", "vocab_size", "bos", "splits", "hashes", "fingerprint", "recipe")
    },
    **{
        f"{key} is a list": lambda meta, key=key: meta | {key: [1]}
        for key in ("format", "source", "vocab_size", "bos", "splits", "hashes", "fingerprint", "recipe")
    },
    "splits of strings": lambda meta: meta | {"splits": {split: "many" for split in prepare.SPLITS}},
    "tokens as text": lambda meta: meta | {"splits": {split: {"tokens": "9"} for split in prepare.SPLITS}},
    "inputs of a number": lambda meta: meta | {"recipe": {"inputs": 3, "tokenizer": []}},
    "no recipe of the tokenizer": lambda meta: meta | {"recipe": {"inputs": meta["recipe"]["inputs"]}},
    "another vocabulary": lambda meta: meta | {"vocab_size": 399, "bos": 398},
    "another BOS": lambda meta: meta | {"bos": 7},
}


@pytest.mark.parametrize("change", META.values(), ids=META)
def test_meta_of_another_shape(data_dir, monkeypatch, capsys, change):
    folder = prepare.prepare(data_dir=data_dir)
    whole = contents(folder)
    (folder / "meta.json").write_text(json.dumps(change(json.loads(whole["meta.json"]))))
    for call in (lambda: prepare.load(folder), lambda: prepare.open_source(data_dir=data_dir)):
        with pytest.raises(prepare.PrepareError, match=r"run: uv run prepare\.py --data-dir"):
            call()
    assert run_main(monkeypatch, capsys, "--data-dir", data_dir)[0] == 0 and contents(folder) == whole


OTHER = {
    "meta.json": [b"\xff\xfe\x00", b"", b"[1, 2", b"\x00" * 99],
    "tokenizer.tiktoken": [b"\xff\xfe", b"", b"one two three\n", b"AA== 5\n", b"AA== 0\nAA== 1\n", b"!!! 0\n", b"{}"],
    "tokenizer.json": [
        b"\xff\xfe",
        b"",
        b"[]",
        b'"x"',
        b"7",
        b"{}",
        b'{"pattern": 3, "special_tokens": {"<|bos|>": 399}}',
        b'{"pattern": "(", "special_tokens": {"<|bos|>": 399}}',
        b'{"pattern": "a", "special_tokens": []}',
    ],
    "train.bin": [b"", b"odd"],
}


@pytest.mark.parametrize(
    "name, content",
    [pytest.param(name, content, id=f"{name} {i}") for name in OTHER for i, content in enumerate(OTHER[name])],
)
def test_files_of_another_shape(data_dir, name, content):
    folder = prepare.prepare(data_dir=data_dir)
    (folder / name).write_bytes(content)
    with pytest.raises(prepare.PrepareError, match=rf"{name}.*; run: uv run prepare.py --data-dir DIR"):
        prepare.load(folder).tokenizer()
    with pytest.raises(prepare.PrepareError, match=r"run: uv run prepare\.py --data-dir"):
        prepare.open_source(data_dir=data_dir)


def test_an_unreadable_file(data_dir):
    folder = prepare.prepare(data_dir=data_dir)
    (folder / "val.bin").unlink()
    (folder / "val.bin").mkdir()
    with pytest.raises(prepare.PrepareError, match=r"val\.bin cannot be read .*directory.*; run: uv run prepare.py"):
        prepare.load(folder)
    with pytest.raises(prepare.PrepareError, match=r"val\.bin cannot be written \(Is a directory\)"):
        prepare.prepare(data_dir=data_dir)


def test_a_cache_that_is_no_folder(data_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "file/below"):
        monkeypatch.setenv("GENESIS_CACHE", str(tmp_path / name))
        code, message = run_main(monkeypatch, capsys, "--data-dir", data_dir)
        assert code == 1 and "is no folder" in message and "GENESIS_CACHE" in message, message
        with pytest.raises(prepare.PrepareError, match="is no folder"):
            prepare.open_source(data_dir=data_dir)
        with pytest.raises(prepare.PrepareError, match="No tokens in"):
            prepare.load(prepare.source_folder(data_dir=data_dir))


def test_a_read_only_cache(data_dir, monkeypatch, capsys):
    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "open", refuse)
        code, message = run_main(patch, capsys, "--data-dir", data_dir)
        assert code == 1 and "cannot be written (Permission denied)" in message and "GENESIS_CACHE" in message
    folder = prepare.prepare(data_dir=data_dir)
    monkeypatch.setattr(prepare.os, "open", refuse)
    assert prepare.prepare(data_dir=data_dir) == folder  # what is prepared can be used there
    assert prepare.open_source(data_dir=data_dir).folder == folder


def test_tokens_replaced_during_a_run(data_dir):
    folder = prepare.prepare(data_dir=data_dir)
    first = prepare.load(folder)
    assert prepare.load(folder, stamp=first.stamp).stamp == first.stamp
    write_shard(data_dir / "shard_0.parquet", prose(7))
    prepare.prepare(data_dir=data_dir)
    with pytest.raises(prepare.PrepareError, match="changed while the run was at work"):
        prepare.load(folder, stamp=first.stamp)


def test_second_call_does_nothing(data_dir, monkeypatch, capsys):
    folder = prepare.prepare(data_dir=data_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(prepare, "tokenize", None)  # would not survive being called
    capsys.readouterr()
    assert prepare.prepare(data_dir=data_dir) == folder
    assert capsys.readouterr().out == f"Nothing to do: {folder} is prepared\n"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_preparing_does_not_import_torch():
    """It costs seconds, and a second call has one."""
    check = "import sys, prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_leftovers_are_removed(data_dir):
    folder = prepare.prepare(data_dir=data_dir)
    (folder / ".tmp-killed").mkdir()
    (folder / ".tmp-killed" / "train.bin").write_bytes(b"half")
    (folder / "meta.json").unlink()
    prepare.prepare(data_dir=data_dir)
    assert not list(folder.glob(".tmp-*"))


def test_one_prepare_at_a_time(data_dir):
    folder = prepare.source_folder(data_dir=data_dir)
    folder.mkdir(parents=True)
    fd = prepare.try_lock(folder / ".lock")
    with pytest.raises(prepare.PrepareError, match=r"Another prepare\.py is at work in"):
        prepare.prepare(data_dir=data_dir)
    os.close(fd)
    prepare.prepare(data_dir=data_dir)


def test_a_lock_is_held_until_it_is_closed(tmp_path):
    path = tmp_path / ".lock"
    fd = prepare.try_lock(path)
    assert prepare.try_lock(path) is None
    check = "import prepare, pathlib, sys; sys.exit(prepare.try_lock(pathlib.Path(sys.argv[1])) is not None)"
    assert subprocess.run([sys.executable, "-c", check, path], cwd=ROOT).returncode == 0  # another process
    n_open = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert prepare.try_lock(path) is None
    assert n_open == (len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0)
    os.close(fd)
    os.close(prepare.try_lock(path))
    with pytest.raises(OSError):
        prepare.try_lock(tmp_path / "nowhere" / ".lock")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(data_dir, monkeypatch, capsys, code):
    def flock(fd, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    prepare.prepare(data_dir=data_dir)
    assert capsys.readouterr().out.count("this file system has no locks") == 1


def test_another_failure_to_lock_flies(tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"):
        prepare.try_lock(tmp_path / ".lock")


# ----------------------------------------------------------------------------------------------------------------
# Sources


def test_changed_text_is_noticed(data_dir):
    first = prepare.load(prepare.prepare(data_dir=data_dir))
    write_shard(data_dir / "shard_1.parquet", prose(9))
    second = prepare.load(prepare.prepare(data_dir=data_dir))
    assert second.fingerprint != first.fingerprint
    write_shard(data_dir / "shard_1.parquet", prose(1))  # as it was, though newer
    assert prepare.load(prepare.prepare(data_dir=data_dir)).fingerprint == first.fingerprint
    write_shard(data_dir / "shard_2.parquet", prose(9))  # held out: the tokenizer stays as it is
    assert prepare.load(prepare.prepare(data_dir=data_dir)).fingerprint != first.fingerprint


def test_open_source_prepares_what_is_not_there(data_dir):
    data = prepare.open_source(data_dir=data_dir)
    assert data.folder == prepare.source_folder(data_dir=data_dir)
    before = contents(data.folder)
    assert prepare.open_source(data_dir=data_dir).stamp == data.stamp and contents(data.folder) == before
    with pytest.raises(prepare.PrepareError, match="--data-dir nowhere: there is no such folder"):
        prepare.open_source(data_dir="nowhere")


def test_open_source_notices_changed_shards(data_dir, capsys):
    """A run must not score the tokens of shards that are no longer there in that form."""
    first = prepare.open_source(data_dir=data_dir)
    command = f"run: uv run prepare.py --data-dir {data_dir}$"
    write_shard(data_dir / "shard_1.parquet", prose(9))
    with pytest.raises(prepare.PrepareError, match=rf"changed since they were prepared; {command}"):
        prepare.open_source(data_dir=data_dir)
    prepare.prepare(data_dir=data_dir)
    assert prepare.open_source(data_dir=data_dir).fingerprint != first.fingerprint
    write_shard(data_dir / "shard_3.parquet", prose(3))
    with pytest.raises(prepare.PrepareError, match="changed since"):
        prepare.open_source(data_dir=data_dir)

    (data_dir / "shard_3.parquet").unlink()  # shards may go once there are tokens
    (data_dir / "shard_0.parquet").unlink()
    capsys.readouterr()
    prepare.open_source(data_dir=data_dir)
    assert "are gone" in capsys.readouterr().out
    for path in data_dir.iterdir():
        path.unlink()
    data_dir.rmdir()
    prepare.open_source(data_dir=data_dir)
    assert capsys.readouterr().out.count("are gone") == 1


def test_open_source_tells_of_changed_settings(data_dir, monkeypatch, capsys):
    prepare.open_source(data_dir=data_dir)
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 300)
    capsys.readouterr()
    assert prepare.open_source(data_dir=data_dir).vocab_size == 400
    assert "was made with other constants" in capsys.readouterr().out


def test_one_source_at_a_time(tmp_path):
    for call in (prepare.source_folder, prepare.prepare, prepare.open_source):
        with pytest.raises(prepare.PrepareError, match="--data-dir and --demo"):
            call(data_dir=tmp_path, demo=True)
        with pytest.raises(prepare.PrepareError, match="--data-dir: the name is empty"):
            call(data_dir="")


TEXT_TYPES = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]
TEXT_TYPES = [getattr(pa, name)() for name in TEXT_TYPES if hasattr(pa, name)]  # the views are newer


@pytest.mark.parametrize("kind", [*TEXT_TYPES, pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_text_columns_of_every_type(tmp_path, kind):
    texts = ["one", "é", "one", None, "", "two"]
    values = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(texts).cast(kind)
    for name in ("a", "b"):
        (tmp_path / "d").mkdir(exist_ok=True)
        held_out = pa.table({"text": pa.array(["v", "t"])})
        pq.write_table(pa.table({"text": values}) if name == "a" else held_out, tmp_path / "d" / f"{name}.parquet")
    assert pq.read_schema(tmp_path / "d" / "a.parquet").field("text").type == kind
    data = prepare.load(prepare.prepare(data_dir=tmp_path / "d"))
    assert texts_of(data, "train") == [text.encode() for text in texts if text]


def test_changed_settings_are_noticed(data_dir, monkeypatch):
    assert prepare.load(prepare.prepare(data_dir=data_dir)).vocab_size == 400
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 300)
    assert prepare.load(prepare.prepare(data_dir=data_dir)).vocab_size == 300


def test_too_little_text_for_the_vocabulary(tmp_path, capsys):
    for i in range(2):
        write_shard(tmp_path / "few" / f"{i}.parquet", [f"a {i}", f"b {i}"])
    data = prepare.load(prepare.prepare(data_dir=tmp_path / "few"))
    assert 256 < data.vocab_size < 300 and data.bos == data.vocab_size - 1 == data.tokenizer().n_vocab - 1
    assert "too little text for 400" in capsys.readouterr().out


def test_folders_differ(tmp_path, monkeypatch):
    folders = [prepare.source_folder(), prepare.source_folder(demo=True)]
    folders += [prepare.source_folder(data_dir=tmp_path / parent / "data") for parent in "ab"]
    assert len(set(folders)) == 4 and {folder.parent for folder in folders} == {prepare.cache_root()}
    monkeypatch.chdir(tmp_path)
    assert prepare.source_folder(data_dir="a/data") == folders[2]
    monkeypatch.delenv("GENESIS_CACHE")
    assert prepare.cache_root() == Path.home() / ".cache" / "genesis"


def test_data_dir_errors(tmp_path, monkeypatch, capsys):
    def message() -> str:
        code, text = run_main(monkeypatch, capsys, "--data-dir", tmp_path / "d")
        assert code == 1 and "--data-dir" in text and "Traceback" not in text
        return text

    assert "no such folder" in message()
    (tmp_path / "d").mkdir()
    assert "holds no *.parquet file" in message()
    write_shard(tmp_path / "d" / "a.parquet", prose(0))
    assert "holds only a.parquet" in message()
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "d" / "b.parquet")
    assert "b.parquet is no shard: it has no `text` column" in message()
    pq.write_table(pa.table({"text": [1]}), tmp_path / "d" / "b.parquet")
    assert "holds int64, not strings" in message()
    (tmp_path / "d" / "b.parquet").write_bytes(b"PAR1 but no more")
    assert "b.parquet is no shard: it does not open as parquet" in message()
    write_shard(tmp_path / "d" / "b.parquet", ["the same", "the same", "", None])
    assert "b.parquet is held out and needs two different documents" in message()
    write_shard(tmp_path / "d" / "a.parquet", ["x", "", None, "y"])
    write_shard(tmp_path / "d" / "b.parquet", ["x", "y"])
    assert "No document to train on" in message()
    whole = bytearray(write_shard(tmp_path / "d" / "a.parquet", prose(0, 500)).read_bytes())
    whole[100 : len(whole) // 2] = bytes(len(whole) // 2 - 100)  # opens, but its pages are gone
    (tmp_path / "d" / "a.parquet").write_bytes(whole)
    assert "a.parquet is damaged" in message()
    assert [path.name for path in prepare.source_folder(data_dir=tmp_path / "d").iterdir()] == [".lock"]


def test_impossible_flags(monkeypatch, capsys):
    cases = [("--shards", "0"), ("--shards", "1823"), ("--shards", "many"), ("--shards",), ("--data-dir",)]
    cases += [("--demo", "--shards", "2"), ("--data-dir", "x", "--demo"), ("--shard", "2")]
    for args in cases:
        code, message = run_main(monkeypatch, capsys, *args)
        assert code == 2 and args[0] in message.splitlines()[-1], (args, message)


def test_demo(monkeypatch):
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 8192)
    data = prepare.load(prepare.prepare(demo=True))
    assert data.vocab_size == 8192 and data.bos == 8191 and data.source == "demo"
    assert len(data.train) > 1_000_000 and min(len(data.val), len(data.test)) > 50_000
    assert any(text.startswith(b'"""') for text in texts_of(data, "val"))


# ----------------------------------------------------------------------------------------------------------------
# Text and tokens


def test_splits_share_no_document(tmp_path):
    held_out = ["h0", "h1", "h0", "h2", "h1", "h3", "h3", "h4"]
    write_shard(tmp_path / "d" / "0.parquet", ["t0", "h3", "t1", "", "t1", None, "h0"])
    write_shard(tmp_path / "d" / "1.parquet", ["h4", "t2", "h1"])
    write_shard(tmp_path / "d" / "2.parquet", held_out)
    data = prepare.load(prepare.prepare(data_dir=tmp_path / "d"))
    assert texts_of(data, "train") == [b"t0", b"t1", b"t1", b"t2"]
    assert texts_of(data, "val") == [b"h0", b"h2", b"h4"]
    assert texts_of(data, "test") == [b"h1", b"h3"]


HOSTILE = [
    "plain",
    "crlf\r\nand\rcr\n\n\n",
    "<|bos|> is text, and so is <|endoftext|>",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 flags 🇳🇴",
    "\x00\x01\x1b[31m control \x7f\x85",
    "zalgo h̷̢̛e̸͓̐ right-to-left \u202eabc\u202c bom \ufeff nonchar \uffff \U0010ffff",
    "中文 ไทย हिन्दी עברית عربى",
    "   \t\t   \u3000\u00a0 ",
    " " * 1_000_000,
    "\r\n" * 100_000,
    "x" * 30_000 + "é" * 30_001,
    "1234567890" * 50,
]


def test_bytes_add_up_over_hostile_documents(tmp_path):
    write_shard(tmp_path / "d" / "0.parquet", [*HOSTILE, "", None, *prose(0)])
    write_shard(tmp_path / "d" / "1.parquet", prose(1))
    data = prepare.load(prepare.prepare(data_dir=tmp_path / "d"))
    texts = [*HOSTILE, *prose(0)]
    assert texts_of(data, "train") == [text.encode() for text in texts]
    tokenizer = data.tokenizer()
    for text in [*texts, ""]:
        ids = prepare.encode(tokenizer, text)
        assert ids[0] == data.bos and data.bos not in ids[1:]
        assert data.token_bytes[ids].sum() == len(text.encode())
    for split in prepare.SPLITS:
        counts, tokens = data.meta["splits"][split], getattr(data, split)
        assert counts["tokens"] == len(tokens) and counts["documents"] == (tokens == data.bos).sum()
        assert counts["bytes"] == data.token_bytes[tokens].sum() == sum(map(len, texts_of(data, split)))
    assert data.token_bytes[data.bos] == 0 and (np.delete(data.token_bytes, data.bos) > 0).all()


RUNS = [
    "a",
    "ab",
    "aab",
    "ACGT",
    "=",
    "-=",
    " ",
    " \t",
    "\n ",
    "\r\n",
    "é",
    "中文字",
    "👩‍👧",
    "'s",
    "x'",
    "ſ",
    "\x1c ",
    "\u0301",
]


def unbroken(rng: random.Random) -> str:
    """Runs of few characters, long and short, now and then with any character between them."""
    parts = []
    for _ in range(rng.randrange(1, 9)):
        parts.append("".join(rng.choices(rng.choice(RUNS), k=int(2 ** rng.uniform(0, 11)))))
        parts.append(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) * rng.randrange(3))
    return "".join(parts)


def test_long_words(tmp_path):
    """Unbroken runs of megabytes: tiktoken before 0.13 takes the square of a word's length, which is minutes here."""
    rng = random.Random(0)
    prepare.train_tokenizer([unbroken(rng) for _ in range(30)], tmp_path)
    tokenizer = prepare.read_tokenizer(tmp_path)
    for text in ("a" * 5_000_000, "".join(rng.choices("😀😃😄", k=1_000_000)), *(unbroken(rng) for _ in range(60))):
        tokens = prepare.encode(tokenizer, text)
        assert tokenizer.decode_bytes(tokens[1:].tolist()) == text.encode()


def test_what_is_in_flight_is_bounded(tmp_path, monkeypatch):
    """Books: so many documents at a time would not fit in memory."""
    monkeypatch.setattr(prepare, "BATCH_CHARS", 1000)
    monkeypatch.setattr(prepare, "IN_FLIGHT_CHARS", 5000)
    prepare.train_tokenizer(prose(0), tmp_path)
    read, written, most = [0], [0], [0]

    def texts():
        for i in range(100):
            text = f"{i} " + "book " * 300
            read[0] += len(text)
            most[0] = max(most[0], read[0] - written[0])
            yield text

    def encode(tokenizer, text):
        time.sleep(0.001)
        return tokens_of(tokenizer, text)

    tokens_of = prepare.encode
    monkeypatch.setattr(prepare, "encode", encode)
    bar = SimpleNamespace(update=lambda n: written.__setitem__(0, written[0] + 1503 * n))
    counts = prepare.write_split(tmp_path / "train.bin", texts(), bar)
    assert counts["documents"] == 100 and counts["bytes"] == read[0]
    assert most[0] <= 5000 + 2 * 1510, most[0]


def test_bytes_that_are_not_text(tmp_path):
    """A lone surrogate and cut-off UTF-8 become U+FFFD; nothing crashes."""
    raw = [b"lone \xed\xa0\x80 surrogate", b"cut \xf0\x9f", b"\xff\xfe", b"fine"]
    broken = pa.array(raw, pa.binary()).cast(pa.string(), safe=False)
    for name in ("0", "1"):
        (tmp_path / "d").mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": broken[:2] if name == "1" else broken}), tmp_path / "d" / f"{name}.parquet")
    data = prepare.load(prepare.prepare(data_dir=tmp_path / "d"))
    assert texts_of(data, "train") == [b"\xef\xbf\xbd" * 2, b"fine"]
    assert texts_of(data, "val") == ["lone \ufffd\ufffd\ufffd surrogate".encode()]


def test_order_is_kept_over_many_batches(tmp_path):
    texts = [f"document {i} " + "word " * (i * 7919 % 97) for i in range(1500)]
    write_shard(tmp_path / "d" / "0.parquet", texts[:700])
    write_shard(tmp_path / "d" / "1.parquet", texts[700:])
    write_shard(tmp_path / "d" / "2.parquet", ["v", "t"])
    data = prepare.load(prepare.prepare(data_dir=tmp_path / "d"))
    assert texts_of(data, "train") == [text.encode() for text in texts]


def test_tokenizer_files_are_plain_text(data_dir):
    folder = prepare.prepare(data_dir=data_dir)
    assert (folder / "tokenizer.tiktoken").read_text().splitlines()[0] == "AA== 0"
    assert json.loads((folder / "tokenizer.json").read_text())["special_tokens"] == {"<|bos|>": 399}


# ----------------------------------------------------------------------------------------------------------------
# Batches and the metric

WORDS16 = np.random.default_rng(0).integers(0, 65536, 10 * 8 + 1 + 5).astype("<u2")  # ten windows of 8, and a rest
TOKENS = torch.from_numpy(WORDS16.view(np.int16))


def batch(batches: prepare.Batches, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batches(torch.tensor(first), rows)


def test_batches_cover_an_epoch_once():
    batches = prepare.Batches(TOKENS, 8, seed=1)
    parts = [batch(batches, first, 2) for first in range(0, 10, 2)]
    for idx, targets in parts:
        assert idx.shape == targets.shape == (2, 8) and idx.dtype == targets.dtype == torch.int64
        assert torch.equal(idx[:, 1:], targets[:, :-1])
    windows = {tuple(WORDS16[i * 8 : i * 8 + 9].tolist()) for i in range(10)}
    rows = [(*i.tolist(), t[-1].item()) for idx, targets in parts for i, t in zip(idx, targets, strict=True)]
    assert len(rows) == 10 and set(rows) == windows
    assert max(map(max, rows)) > 32767  # uint16 came through int16


def test_batches_wrap_around():
    batches = prepare.Batches(TOKENS, 8, seed=1)
    late, _ = batch(batches, 8, 4)
    early, _ = batch(batches, 0, 2)
    assert torch.equal(late[2:], early)
    assert torch.equal(batch(batches, 1_000_000, 3)[0], batch(batches, 0, 3)[0])


def test_batches_follow_the_seed():
    order = [batch(prepare.Batches(TOKENS, 8, seed), 0, 10)[0] for seed in (1, 1, 2)]
    assert torch.equal(order[0], order[1]) and not torch.equal(order[0], order[2])


def test_batches_share_tokens_on_the_device_and_never_wait():
    from torch._subclasses.fake_tensor import FakeTensorMode

    batches = prepare.Batches(TOKENS, 8, seed=1)
    assert batches.tokens.data_ptr() == TOKENS.data_ptr()
    first = torch.tensor(3)
    with FakeTensorMode(allow_non_fake_inputs=True):  # raises at whatever a CUDA graph could not capture
        assert batches(first, 4)[0].shape == (4, 8)


def test_too_short_a_split_is_an_error():
    with pytest.raises(ValueError, match=r"7 tokens to predict .* fill no window of 8"):
        prepare.Batches(TOKENS[:8], 8, seed=1)
    with pytest.raises(ValueError, match="max_tokens = 7"):
        prepare.bits_per_byte(None, TOKENS, torch.ones(65536, dtype=torch.int64), seq_len=8, rows=1, max_tokens=7)
    assert batch(prepare.Batches(TOKENS[:9], 8, seed=1), 0, 1)[0].shape == (1, 8)


BYTES = torch.tensor([1, 2, 3, 4, 0])  # of five tokens; the last is BOS
STREAM = torch.tensor([4, 0, 1, 4, 2, 3, 3, 4, 1, 0, 2, 2, 4, 1]).short()  # 13 targets: four windows of 3, one over


def score(token_losses, stream=STREAM, rows=3, **options) -> float:
    return prepare.bits_per_byte(token_losses, stream, BYTES, seq_len=3, rows=rows, **options)[0]


def test_bits_per_byte_by_hand():
    def nats(idx, targets):
        assert idx.shape == targets.shape == (3, 3)  # the last call too
        return (10 * idx + targets).float()

    pairs = [(a, b) for a, b in zip(STREAM[:12].tolist(), STREAM[1:13].tolist(), strict=True) if b != 4]
    expected = sum(10 * a + b for a, b in pairs) / math.log(2) / sum(BYTES[b].item() for _, b in pairs)
    assert score(nats) == pytest.approx(expected, rel=1e-12)
    assert score(nats, max_tokens=None) == score(nats, max_tokens=12) == score(nats, max_tokens=14)
    # every other of the four windows: targets 0 1 BOS, BOS 1 0
    expected = (40 + 1 + 41 + 10) / math.log(2) / (1 + 2 + 2 + 1)
    assert score(nats, max_tokens=8) == score(nats, max_tokens=6) == pytest.approx(expected, rel=1e-12)


def test_thirds_of_the_window_by_hand():
    def nats(idx, targets):
        return (10 * idx + targets).float()

    whole, *thirds = prepare.bits_per_byte(nats, STREAM, BYTES, seq_len=3, rows=3)
    pairs = list(zip(STREAM[:12].tolist(), STREAM[1:13].tolist(), strict=True))
    sums = [[(10 * a + b, BYTES[b].item()) for a, b in pairs[place::3] if b != 4] for place in range(3)]
    by_hand = [sum(n for n, _ in part) / math.log(2) / sum(b for _, b in part) for part in sums]
    assert thirds == pytest.approx(by_hand, rel=1e-12) and len(set(thirds)) == 3
    assert whole == score(nats)
    short = prepare.bits_per_byte(lambda idx, targets: torch.ones(idx.shape), STREAM, BYTES, seq_len=2, rows=1)
    assert len(short) == 4 and math.isnan(short[3]), "a window of two tokens has no last third"


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), (9,), (3, 3, 1), ()])
def test_losses_of_another_shape_are_refused(shape):
    with pytest.raises(AssertionError, match=r"not \(3, 3\)"):  # most of them would broadcast
        score(lambda idx, targets: torch.ones(shape))


def test_padding_does_not_count():
    scores = {score(lambda idx, targets: (idx + 2 * targets).float(), rows=rows) for rows in range(1, 8)}
    assert len(scores) == 1


def test_nan_and_inf_come_through():
    def poisoned(value, token):
        return lambda idx, targets: torch.where(targets == token, value, 1.0)

    assert math.isnan(score(poisoned(math.nan, 3))) and score(poisoned(math.inf, 3)) == math.inf
    assert score(poisoned(math.nan, 4)) == score(poisoned(math.inf, 4)) == score(poisoned(0.0, 4))  # BOS is out


def test_uniform_model_scores_what_is_computed(data_dir):
    data = prepare.load(prepare.prepare(data_dir=data_dir))
    moved = data.to("cpu")

    def uniform(idx, targets):
        logits = torch.zeros(*idx.shape, data.vocab_size)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(idx)

    for max_tokens in (None, 777):
        options = {"seq_len": 32, "max_tokens": max_tokens}
        expected = uniform_bpb(data.val, data.token_bytes, data.vocab_size, **options)
        scored, *_ = prepare.bits_per_byte(uniform, moved.val, moved.token_bytes, rows=7, **options)
        assert scored == pytest.approx(expected, rel=1e-6)
    n_all = (len(data.val) - 1) // 32
    firsts = [i * n_all // 24 * 32 for i in range(24)]  # 777 tokens fill 24 windows, spread over all of them
    targets = np.concatenate([data.val[first + 1 : first + 33] for first in firsts])
    text = data.tokenizer().decode_bytes(targets[targets != data.bos].tolist())
    assert expected == pytest.approx(math.log2(400) * (targets != data.bos).sum() / len(text), rel=1e-12)


def test_tokens_on_a_device_are_the_same_bits(data_dir):
    data = prepare.load(prepare.prepare(data_dir=data_dir))
    moved = data.to("cpu")
    for split in prepare.SPLITS:
        tokens = getattr(moved, split)
        assert tokens.dtype == torch.int16 and (tokens.numpy().view(np.uint16) == getattr(data, split)).all()
    assert moved.token_bytes.dtype == torch.int64 and moved.token_bytes.tolist() == data.token_bytes.tolist()
    assert (moved.folder, moved.meta, moved.stamp) == (data.folder, data.meta, data.stamp)
    with pytest.raises(AssertionError, match=r"int16 .* Dataset\.to"):
        prepare.gather(moved.val.long(), torch.zeros(1, dtype=torch.int64), 8)


def test_tokens_on_disk_cannot_be_changed(data_dir):
    folder = prepare.prepare(data_dir=data_dir)
    before = contents(folder)
    prepare.load(folder).to("cpu").train.zero_()
    assert contents(folder) == before
