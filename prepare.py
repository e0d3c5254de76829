"""
Prepare the data, once: shards of text -> tokenizer -> tokens; and score models on them in bits per byte.

    uv run prepare.py                  download 8 shards of FineWeb-Edu and the held-out one (about 1 GB)
    uv run prepare.py --shards 16      more of them; those that are here are kept
    uv run prepare.py --data-dir DIR   your own parquet shards with a `text` column; the last one is held out
    uv run prepare.py --demo           no download: the Python standard library's own source files

Reads the shards. Writes a folder for each source under ~/.cache/genesis (GENESIS_CACHE moves it) with
tokenizer.tiktoken, tokenizer.json, train.bin, val.bin, test.bin (uint16 tokens, BOS before each document) and, last
of all, meta.json: without it the folder counts as empty. Stop it whenever you like: the next call resumes the
download and starts the rest again. HF_ENDPOINT names a mirror of the hub, HF_TOKEN is sent to it, and HTTPS_PROXY and
REQUESTS_CA_BUNDLE mean what they usually do. evolve.py uses `open_source`, `load`, `Batches` and `bits_per_byte`.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise SystemExit("genesis needs Linux or macOS; on Windows run it in WSL: https://learn.microsoft.com/windows/wsl")

import argparse
import base64
import errno
import fcntl
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
from tqdm import tqdm

if TYPE_CHECKING:
    import torch  # only the metric needs it and it takes seconds to import, so it is imported there

# --------------------------------------------------------------------------------------------------
# Constants: text and tokens. The next call after a change tokenizes again.

VOCAB_SIZE = 8192  # tokens, BOS included; 65,536 at most, as they are stored in 16 bits
BOS = "<|bos|>"  # stands before every document
SPLIT_PATTERN = (  # GPT-4's, but a number is cut every two digits, not three: kinder to a small vocabulary
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)
TOKENIZER_CHARS = 100_000_000  # characters of training text the tokenizer is trained on: the first ones
TOKENIZER_DOC_CHARS = 10_000  # characters it may see of one document
PIECE_CHARS = 20_000  # longer documents are encoded in pieces: a long unbroken run overflows the regex
BATCH_CHARS = 250_000  # characters a thread encodes at a time, in whole documents
IN_FLIGHT_CHARS = 32_000_000  # characters read ahead of what is written, all threads together: they bound the memory
DEMO_CHARS = 8_000_000  # characters of source code in the demo
DEMO_HELD_OUT = 10  # one file in so many is held out
FORMAT = 2  # of the files written; raise it when they change
SPLITS = ("train", "val", "test")
FILES = ("tokenizer.tiktoken", "tokenizer.json", *(f"{split}.bin" for split in SPLITS), "meta.json")  # meta.json last

# Constants: download

SHARDS = 8  # training shards, each about 250 MB of text (60 M tokens)
LAST_SHARD = 1822  # held out; 0 to 1821 are for training
HUB = "https://huggingface.co"  # HF_ENDPOINT names a mirror
HUB_FOLDER = "datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"
SHARD_BYTES = 100_000_000  # of one shard, about: for the disk check, and until the hub tells
SHARD_TOKEN_BYTES = 125_000_000  # of its tokens, about
DOWNLOADS = 4  # shards at a time
CHUNK = 64 * 1024  # bytes read at a time; a broken connection loses at most these
TIMEOUT = (10, 15)  # seconds to connect, seconds without a byte
ATTEMPTS = 8  # in a row that bring a shard no further, then it is given up
DAMAGED_ATTEMPTS = 2  # downloads of a shard that turn out to be no parquet, then it is given up
BACKOFF, BACKOFF_MAX = 1.0, 60.0  # seconds before the first retry, doubled with each; the longest
RETRY_AFTER_MAX = 300.0  # seconds a server may make us wait
REACH = 15.0  # seconds of trying to reach the hub at all


class PrepareError(Exception):
    """What went wrong and what to do next, in words for the user."""


def say(line: str) -> None:
    tqdm.write(line)  # above the progress bar, where there is one
    sys.stdout.flush()


def progress(**options) -> tqdm:
    return tqdm(disable=None, leave=False, **options)  # None: no bar in a log file


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process as Ctrl-C does, but for one that is ignored, as nohup wants it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def in_units(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


# --------------------------------------------------------------------------------------------------
# Where a source's tokens are, and the command that puts them there


def cache_root() -> Path:
    try:
        return Path(os.environ.get("GENESIS_CACHE") or "~/.cache/genesis").expanduser()
    except RuntimeError:  # a user without a home, as containers have them
        return Path(tempfile.gettempdir()) / f"genesis-{os.getuid()}"


def source_folder(*, data_dir: str | Path | None = None, demo: bool = False) -> Path:
    """Return the folder of a source's tokens, prepared or not. Raises PrepareError where that is no one source."""
    if data_dir is not None and demo:
        raise PrepareError("--data-dir and --demo are two sources: choose one")
    if data_dir == "":
        raise PrepareError("--data-dir: the name is empty")
    if data_dir is None:
        return cache_root() / ("demo" if demo else "fineweb-edu")
    path = Path(data_dir).expanduser().resolve()
    return cache_root() / f"data-{path.name}-{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"


def command(*, data_dir: str | Path | None = None, demo: bool = False, shards: int | None = None) -> str:
    flags = {"--data-dir": data_dir and shlex.quote(str(data_dir)), "--demo": demo and "", "--shards": shards}
    used = [f" {flag} {value}".rstrip() for flag, value in flags.items() if value not in (None, False)]
    return "uv run prepare.py" + "".join(used)


def run_again(folder: Path) -> str:
    return "run: uv run prepare.py" + {"demo": " --demo", "fineweb-edu": ""}.get(folder.name, " --data-dir DIR")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make a PrepareError that names `path` of whatever is wrong with it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise PrepareError(f"No tokens in {path.parent}; {run_again(path.parent)}") from None
    except OSError as error:
        raise PrepareError(f"{path} cannot be read ({error.strerror}); {run_again(path.parent)}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise PrepareError(f"{path} is not as prepare.py wrote it; {run_again(path.parent)}") from None


# --------------------------------------------------------------------------------------------------
# Shards from the hub


class Retry(Exception):
    """
    A failure that may pass: why, and the seconds that the server asks to wait. urllib3 has retries of its own, but they
    do not ask for the rest of a body that broke off, so that there would be two loops in place of one.
    """

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


def retry_after(response: requests.Response) -> float:
    """Return the seconds of a Retry-After header, which holds a number or an HTTP date."""
    value = response.headers.get("Retry-After", "")
    try:
        wait = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        wait = 0.0
    return min(max(wait, 0.0), RETRY_AFTER_MAX)


def hopeless(error: Exception) -> str | None:
    """Say what is wrong, and what helps, where trying again does not; None where it may."""
    why = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in why or "CA certificate bundle" in why:
        return f"{why}. REQUESTS_CA_BUNDLE has to name a file with the certificates that your network uses"
    if "SOCKS support" in why:
        return (
            "the proxy (HTTPS_PROXY, ALL_PROXY) is SOCKS, which needs a package; run: uv run --with pysocks prepare.py"
        )
    return why if isinstance(error, ValueError) else None  # what requests says of a wrong HF_ENDPOINT


def hub_headers() -> dict[str, str]:
    """Return the headers that HF_TOKEN asks for; requests leaves them out where the hub redirects to another host."""
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def reach(url: str) -> None:
    """Try for REACH seconds to get any answer, so that a missing network is told once and soon. Raises PrepareError."""
    end = time.monotonic() + REACH
    while True:
        try:
            requests.head(url, headers=hub_headers(), timeout=(3, 10)).close()
            return
        except OSError as error:  # requests' own are OSErrors too
            why = hopeless(error)
            if why or time.monotonic() > end:
                raise PrepareError(
                    f"{url} cannot be reached: {why or error}\n"
                    "Is there a network, or a proxy to name (HTTPS_PROXY)? HF_ENDPOINT names a mirror of the hub; "
                    "--data-dir and --demo need no download"
                ) from None
            time.sleep(BACKOFF)


def shard_problem(path: Path) -> str | None:
    """Say why `path` is no shard; None where it is one."""
    try:
        kind = pq.read_schema(path).field("text").type
    except KeyError:
        return "it has no `text` column"
    except (pa.ArrowException, OSError) as error:
        return f"it does not open as parquet ({str(error).splitlines()[0]})"
    values = str(kind.value_type if pa.types.is_dictionary(kind) else kind).removeprefix("large_").removesuffix("_view")
    return None if values in ("string", "binary") else f"its `text` column holds {kind}, not strings"


class Download:
    """A shard on its way. What came so far lies in a .part file; the shard gets its name whole and checked."""

    def __init__(self, url: str, path: Path, bar: tqdm, stop: threading.Event):
        self.url, self.path, self.bar, self.stop = url, path, bar, stop
        self.part = path.with_name(path.name + ".part")
        self.total = SHARD_BYTES  # until the hub tells

    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def start_over(self) -> None:
        self.bar.update(-self.have())
        self.part.unlink(missing_ok=True)

    def run(self) -> None:
        """Try until the shard is here, `stop` is set or there is no hope left (PrepareError)."""
        furthest, failures, damaged = self.have(), 0, 0
        while not self.stop.is_set():
            try:
                self.attempt()
                if self.stop.is_set():
                    return
                if problem := shard_problem(self.part):
                    damaged += 1
                    self.start_over()
                    raise Retry(f"it arrived, but {problem}")
                os.replace(self.part, self.path)
                return
            except (Retry, requests.RequestException) as error:
                failures = 0 if self.have() > furthest else failures + 1
                furthest = max(furthest, self.have())
                why = hopeless(error)
                if why or failures >= ATTEMPTS or damaged >= DAMAGED_ATTEMPTS:
                    raise PrepareError(f"{self.path.name}: {why or error} ({self.url})") from None
                wait = max(min(BACKOFF * 2 ** (failures - 1), BACKOFF_MAX), getattr(error, "wait", 0.0))
                wait *= random.uniform(1.0, 1.5)  # so that they do not all come back at once
                say(f"{self.path.name}: {error}; trying again in {wait:.0f} s")
                self.stop.wait(wait)

    def attempt(self) -> None:
        """Ask once for the bytes that are missing and append them to the part."""
        have = self.have()
        headers = {"Accept-Encoding": "identity"} | hub_headers() | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            status, length = response.status_code, response.headers.get("Content-Length", "")
            span = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
            if status == 416 and span and int(span[2]) == have:
                return  # all is here: an earlier call was killed before it could rename the part
            if status == 416 or (status == 206 and not (span and span[1] and int(span[1]) == have)):
                self.start_over()
                raise Retry(f"HTTP {status} does not continue the {have} bytes that are here: starting over")
            if status in (408, 425, 429) or status >= 500:
                raise Retry(f"HTTP {status}", retry_after(response))
            if status not in (200, 206):
                raise PrepareError(f"{self.path.name}: HTTP {status} ({self.url})")
            if status == 200:
                self.start_over()  # the server sends all of it, asked or not
            total = int(span[2]) if status == 206 else int(length) if length.isdecimal() else None
            if total is not None:
                self.bar.total += total - self.total
                self.total = total
            with open(self.part, "ab") as file:
                for chunk in response.iter_content(CHUNK):
                    self.bar.update(file.write(chunk))
                    if self.stop.is_set():
                        return
                file.flush()
                os.fsync(file.fileno())
        if total is not None and (got := self.have()) != total:
            if got > total:
                self.start_over()
            raise Retry(f"{got} bytes arrived of {total}")


def download(folder: Path, names: list[str]) -> list[Path]:
    """Bring the named shards into `folder` and return their paths. What arrived stays, whatever happens."""
    folder.mkdir(exist_ok=True)
    base = f"{(os.environ.get('HF_ENDPOINT') or HUB).rstrip('/')}/{HUB_FOLDER}"
    paths, stop, failed = [folder / name for name in names], threading.Event(), []
    missing = [path for path in paths if shard_problem(path)]
    if not missing:
        return paths
    with progress(total=len(missing) * SHARD_BYTES, unit="B", unit_scale=True, desc="download") as bar:
        shards = [Download(f"{base}/{path.name}", path, bar, stop) for path in missing]
        here = sum(shard.have() for shard in shards)
        bar.update(here)
        check_disk(folder, len(shards) * SHARD_BYTES - here + len(paths) * SHARD_TOKEN_BYTES)
        reach(shards[0].url)
        todo, done = iter(shards), SimpleQueue()

        def work() -> None:
            for shard in todo:
                try:
                    done.put((shard, shard.run()))
                except Exception as error:  # for the main thread to judge
                    done.put((shard, error))

        for _ in range(DOWNLOADS):  # daemons: Ctrl-C does not wait for a server that is silent
            threading.Thread(target=work, daemon=True).start()
        try:
            for n_done in range(1, len(shards) + 1):
                shard, error = done.get()
                if isinstance(error, PrepareError):
                    failed.append(str(error))
                elif error:
                    raise error
                else:
                    say(f"{shard.path.name}: downloaded, {n_done} of {len(shards)}")
        finally:
            stop.set()
    if failed:
        lines = "\n  ".join(sorted(failed))
        raise PrepareError(f"{len(failed)} of {len(names)} shards could not be downloaded:\n  {lines}")
    return paths


def check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        needed = f"{in_units(need)} needed, {in_units(free)} free"
        raise PrepareError(f"Not enough disk space in {folder}: {needed}. Make room, or move GENESIS_CACHE")


# --------------------------------------------------------------------------------------------------
# Shards from elsewhere


def local_shards(data_dir: str | Path) -> list[Path]:
    """Return the parquet shards of a user's folder, sorted."""
    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        raise PrepareError(f"--data-dir {data_dir}: there is no such folder")
    paths = sorted(folder.glob("*.parquet"))
    if len(paths) < 2:
        found = f"only {paths[0].name}" if paths else "no *.parquet file"
        raise PrepareError(f"--data-dir {data_dir} holds {found}; it needs two shards: the last is held out")
    for path in paths:
        if problem := shard_problem(path):
            raise PrepareError(f"--data-dir {data_dir}: {path.name} is no shard: {problem}. Move it away")
    return paths


def demo_shards(folder: Path) -> list[Path]:
    """Write the Python standard library's source files as two shards, for training and held out."""
    root, chars, texts = Path(sysconfig.get_path("stdlib")), 0, []
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    for path in sorted(root.rglob("*.py")):
        if chars < DEMO_CHARS and left_out.isdisjoint(path.relative_to(root).parts):
            try:
                texts.append(path.read_text(encoding="utf-8")[: DEMO_CHARS - chars])
            except UnicodeDecodeError:
                continue  # a few are in Latin-1
            chars += len(texts[-1])
    if len(texts) < 2 * DEMO_HELD_OUT:
        raise PrepareError(f"{root} holds no source files of the standard library: use --data-dir instead")
    held_out = texts[::DEMO_HELD_OUT]
    del texts[::DEMO_HELD_OUT]
    paths = [folder / "shard_00000.parquet", folder / "shard_00001.parquet"]
    for path, part in zip(paths, (texts, held_out), strict=True):
        pq.write_table(pa.table({"text": part}), path)
    return paths


# --------------------------------------------------------------------------------------------------
# Text


def documents(paths: Iterable[Path]) -> Iterator[str]:
    """Stream the documents of shards, without the empty ones; bytes that are not UTF-8 become U+FFFD."""
    for path in paths:
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=["text"]):
                for raw in batch.column(0).cast(pa.large_binary()):
                    if text := (raw.as_py() or b"").decode("utf-8", "replace"):
                        yield text
        except (pa.ArrowException, OSError) as error:
            raise PrepareError(f"{path} is damaged, delete or replace it: {error}") from None


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def alternate(texts: Iterable[str], which: int) -> Iterator[str]:
    """Yield every other document, repeats not counted: the even ones (which = 0) or the odd ones (1)."""
    seen = set()
    for text in texts:
        key = digest(text)
        if key not in seen:
            if len(seen) % 2 == which:
                yield text
            seen.add(key)


# --------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train a BPE on the first TOKENIZER_CHARS characters; write tokenizer.tiktoken and tokenizer.json."""
    started, chars = time.time(), 0

    def sample() -> Iterator[str]:
        nonlocal chars
        for text in texts:
            if chars < TOKENIZER_CHARS:
                yield text[:TOKENIZER_DOC_CHARS]
                chars += len(text[:TOKENIZER_DOC_CHARS])
                bar.update(chars - bar.n)
            else:
                return

    bpe = rustbpe.Tokenizer()
    with progress(unit="char", unit_scale=True, desc="tokenizer") as bar:
        bpe.train_from_iterator(sample(), VOCAB_SIZE - 1, pattern=SPLIT_PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
    lines = [f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in ranks]
    settings = {"pattern": SPLIT_PATTERN, "special_tokens": {BOS: len(ranks)}}
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    (folder / "tokenizer.json").write_text(json.dumps(settings, indent=1) + "\n")
    short = "" if len(ranks) == VOCAB_SIZE - 1 else f" (too little text for {VOCAB_SIZE})"
    say(f"Tokenizer: {len(ranks) + 1} tokens{short} from {chars:,} characters, {time.time() - started:.0f} s")


def read_ranks(folder: Path) -> dict[bytes, int]:
    """Read the bytes of every token but BOS, in order."""
    path = folder / "tokenizer.tiktoken"
    with reading(path):
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        if list(ranks.values()) != list(range(len(lines))):
            raise ValueError
    return ranks


def read_tokenizer(folder: Path) -> tiktoken.Encoding:
    ranks, path = read_ranks(folder), folder / "tokenizer.json"
    with reading(path):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings["special_tokens"] != {BOS: len(ranks)}:
            raise ValueError
        return tiktoken.Encoding(
            "genesis", pat_str=settings["pattern"], mergeable_ranks=ranks, special_tokens={BOS: len(ranks)}
        )


def read_token_bytes(folder: Path) -> np.ndarray:
    """Return the length in bytes of each token, int64 (vocab_size,). BOS, the last, has none."""
    return np.array([*map(len, read_ranks(folder)), 0], dtype=np.int64)


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """Return BOS and the document's tokens, uint16. A literal `<|bos|>` in the text is just text."""
    pieces = [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
    ids = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([[tokenizer.encode_single_token(BOS)], *ids]).astype("<u2")


def write_split(path: Path, texts: Iterable[str], bar: tqdm) -> dict[str, int]:
    """Tokenize on all cores and write the tokens in order; return the split's counts."""
    tokenizer, token_bytes = read_tokenizer(path.parent), read_token_bytes(path.parent)

    def encode_batch(batch: list[str]) -> tuple[np.ndarray, tuple[int, int, int]]:
        tokens = np.concatenate([encode(tokenizer, text) for text in batch])
        n_bytes = sum(len(text.encode()) for text in batch)
        assert token_bytes[tokens].sum() == n_bytes, "the tokens' bytes must add up to the text's"
        return tokens, (len(batch), len(tokens), n_bytes)

    def encoded() -> Iterator[tuple[np.ndarray, tuple[int, int, int]]]:
        queue, in_flight = deque(), 0  # batches in order, each with its characters; the characters of all
        for batch in batched(texts, BATCH_CHARS):
            n_chars = sum(map(len, batch))
            queue.append((pool.submit(encode_batch, batch), n_chars))  # tiktoken frees Python's lock
            in_flight += n_chars
            while in_flight > IN_FLIGHT_CHARS:
                first, n_chars = queue.popleft()
                in_flight -= n_chars
                yield first.result()
        for rest, _ in queue:
            yield rest.result()

    counts = np.zeros(3, dtype=np.int64)
    with ThreadPoolExecutor(os.cpu_count()) as pool, open(path, "wb") as file:
        try:
            for tokens, n in encoded():
                file.write(tokens.data)
                counts += n
                bar.update(n[0])
        except BaseException:  # Ctrl-C or a full disk: do not encode what was read ahead
            pool.shutdown(cancel_futures=True)
            raise
    return dict(zip(("documents", "tokens", "bytes"), counts.tolist(), strict=True))


def batched(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """Yield lists of documents in order, each ended by the document that fills its `chars`."""
    batch, room = [], chars
    for text in texts:
        batch.append(text)
        room -= len(text)
        if room <= 0:
            yield batch
            batch, room = [], chars
    if batch:
        yield batch


def tokenize(paths: list[Path], folder: Path) -> dict:
    """Write the tokenizer and the splits of the shards, the last one held out, to `folder`; return their meta."""
    shards = [pq.ParquetFile(path).metadata for path in paths]
    text_bytes = sum(shard.row_group(i).total_byte_size for shard in shards for i in range(shard.num_row_groups))
    check_disk(folder, text_bytes // 2)  # a token stands for about four bytes of text, and takes two

    *train, last = paths
    held_out = {digest(text) for text in documents([last])}
    if len(held_out) < 2:
        raise PrepareError(f"{last} is held out and needs two different documents, one for val, one for test")
    texts: dict[str, Callable[[], Iterator[str]]] = {  # no document is in two of them
        "train": lambda: (text for text in documents(train) if digest(text) not in held_out),
        "val": lambda: alternate(documents([last]), 0),
        "test": lambda: alternate(documents([last]), 1),
    }
    if next(texts["train"](), None) is None:
        raise PrepareError(f"No document to train on in {paths[0].parent}: all are empty, or in {last.name} too")
    train_tokenizer(texts["train"](), folder)
    started = time.time()
    with progress(total=sum(shard.num_rows for shard in shards), unit="doc", desc="tokens") as bar:
        splits = {split: write_split(folder / f"{split}.bin", texts[split](), bar) for split in SPLITS}
    say(f"Tokens: {in_units(text_bytes)} of text, {time.time() - started:.0f} s")
    n_vocab, (hashes, fingerprint) = len(read_token_bytes(folder)), hash_files(folder)
    return {"vocab_size": n_vocab, "bos": n_vocab - 1, "splits": splits, "hashes": hashes, "fingerprint": fingerprint}


# --------------------------------------------------------------------------------------------------
# Prepare: a folder is whole or counts as empty


def prepare(*, data_dir: str | Path | None = None, demo: bool = False, shards: int | None = None) -> Path:
    """
    Prepare a source unless it is prepared, unchanged and undamaged; return its folder. Raises PrepareError. Without
    `shards`, FineWeb-Edu keeps the number of training shards it is prepared with, SHARDS at first.
    """
    folder = source_folder(data_dir=data_dir, demo=demo)
    if data_dir:
        paths = local_shards(data_dir)
        source, inputs = paths[0].parent.name, shard_inputs(paths)
    elif demo:
        source, inputs = "demo", [f"Python {sys.version.split()[0]}", DEMO_CHARS, DEMO_HELD_OUT]
    else:
        shards = shards or prepared_shards(folder)
        source, inputs = "fineweb-edu", [f"shard_{i:05d}.parquet" for i in [*range(shards), LAST_SHARD]]
    recipe = {"inputs": inputs, "tokenizer": tokenizer_recipe()}
    if is_prepared(folder, recipe):  # before anything is written: the folder may be read-only
        say(f"Nothing to do: {folder} is prepared")
        return folder

    with errors_explained(folder, command(data_dir=data_dir, demo=demo, shards=shards)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / ".lock")
        if lock is None:
            raise PrepareError(f"Another prepare.py is at work in {folder}: let it finish")
        try:
            for leftover in folder.glob(".tmp-*"):
                shutil.rmtree(leftover)  # of a call that was killed
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as work:
                work = Path(work)
                if demo:
                    paths = demo_shards(work)
                elif not data_dir:
                    paths = download(folder / "shards", inputs)
                meta = {"format": FORMAT, "source": source, "shards": [path.name for path in paths]}
                meta |= tokenize(paths, work) | {"recipe": recipe}
                (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
                publish(work, folder)
        finally:
            os.close(lock)
    for split, n in meta["splits"].items():
        say(f"{split:5} {n['documents']:9,} documents {n['tokens']:13,} tokens {n['bytes']:14,} bytes")
    say(f"Ready: {folder}")
    return folder


def shard_inputs(paths: Iterable[Path]) -> list:
    """Return what tells that a user's shards changed: name, bytes and mtime in ns of each."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]


def tokenizer_recipe() -> list:
    return [VOCAB_SIZE, BOS, SPLIT_PATTERN, TOKENIZER_CHARS, TOKENIZER_DOC_CHARS, PIECE_CHARS]


def prepared_shards(folder: Path) -> int:
    """Return the training shards that FineWeb-Edu is prepared with, even where its tokens are damaged or older."""
    try:
        return max(len(json.loads((folder / "meta.json").read_bytes())["recipe"]["inputs"]) - 1, 1)
    except (OSError, ValueError, TypeError, KeyError):
        return SHARDS


def is_prepared(folder: Path, recipe: dict) -> bool:
    try:
        return load(folder, verify=True).meta["recipe"] == recipe
    except PrepareError:
        return False


@contextmanager
def errors_explained(folder: Path, again: str) -> Iterator[None]:
    """End every PrepareError with the command to run next, and make one of a disk that cannot be written."""
    try:
        yield
    except PrepareError as error:
        why = str(error)
    except BrokenPipeError:
        raise  # nobody reads what we say: not a matter of the disk
    except OSError as error:
        where = error.filename2 or error.filename or folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"The disk is full, in {folder} ({error.strerror}). Make room, or move GENESIS_CACHE"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            why = f"{where} is in the way: it is no folder. Move it, or set GENESIS_CACHE to a folder"
        else:
            why = f"{where} cannot be written ({error.strerror or error}). Mend that, or move GENESIS_CACHE"
    else:
        return
    raise PrepareError(f"{why}\nWhat is finished is kept. Run again to resume: {again}")


def try_lock(path: Path) -> int | None:
    """
    Lock a file, made where it is missing, until the descriptor returned is closed or the process ends; None where
    another process holds it. Raises OSError where the file cannot be opened for writing.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # writable: NFS locks nothing else
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            os.close(fd)
            raise
        say(f"{path}: this file system has no locks; make sure that nothing else is at work there")
    return fd


def publish(work: Path, folder: Path) -> None:
    """
    Move the finished files to their place. The old meta.json goes first and the new one comes last: a folder that was
    left in between has none, and counts as empty.
    """
    for name in FILES:
        with open(work / name, "rb") as file:
            os.fsync(file.fileno())
    (folder / "meta.json").unlink(missing_ok=True)
    for name in FILES:
        os.replace(work / name, folder / name)


# --------------------------------------------------------------------------------------------------
# Load


@dataclass(frozen=True)
class Dataset:
    """The tokens of a source: memory-mapped as load() opens them, tensors after to()."""

    folder: Path
    meta: dict
    train: np.ndarray | torch.Tensor  # (tokens,): uint16, or int16 of the same bits in a tensor
    val: np.ndarray | torch.Tensor  # (tokens,): evolution selects on it
    test: np.ndarray | torch.Tensor  # (tokens,): seen once, for the final report
    token_bytes: np.ndarray | torch.Tensor  # int64 (vocab_size,): bytes of each token, 0 for BOS
    stamp: tuple  # (name, bytes, mtime in ns) of each file when it was opened

    vocab_size = property(lambda self: self.meta["vocab_size"])
    bos = property(lambda self: self.meta["bos"])
    source = property(lambda self: self.meta["source"])
    fingerprint = property(lambda self: self.meta["fingerprint"])  # same tokenizer, same text: same fingerprint

    def tokenizer(self) -> tiktoken.Encoding:
        return read_tokenizer(self.folder)

    def to(self, device: str | torch.device) -> Dataset:
        """Return the same tokens as tensors on a device, int16 of the same bits: torch does little with uint16."""
        import torch

        splits = {split: torch.from_numpy(getattr(self, split).view(np.int16)).to(device) for split in SPLITS}
        return replace(self, **splits, token_bytes=torch.from_numpy(self.token_bytes).to(device))


def load(folder: str | Path, *, verify: bool = False, stamp: tuple | None = None) -> Dataset:
    """
    Open a prepared folder. Raises PrepareError where it does not hold what its meta.json says; with `verify`, where
    the content of a file changed too (it reads them all); with the `stamp` of an earlier load, where any file was
    replaced since.
    """
    folder = Path(folder)
    seen = stamp_of(folder)
    if stamp is not None and seen != stamp:
        raise PrepareError(f"The tokens in {folder} changed while the run was at work; start it again")
    meta = read_meta(folder)
    token_bytes = read_token_bytes(folder)
    if len(token_bytes) != meta["vocab_size"]:
        raise PrepareError(f"{folder / 'tokenizer.tiktoken'} holds another vocabulary; {run_again(folder)}")
    splits = {split: read_split(folder, split, meta["splits"][split]["tokens"]) for split in SPLITS}
    if verify:
        hashes, fingerprint = hash_files(folder)
        changed = [name for name in hashes if hashes[name] != meta["hashes"].get(name)]
        if not changed and fingerprint != meta["fingerprint"]:
            changed = ["meta.json"]
        if changed:
            raise PrepareError(f"Damaged in {folder}: {', '.join(changed)}; {run_again(folder)}")
    if stamp_of(folder) != seen:
        raise PrepareError(f"The tokens in {folder} are being replaced; start again when prepare.py has finished")
    return Dataset(folder, meta, **splits, token_bytes=token_bytes, stamp=seen)


def stamp_of(folder: Path) -> tuple:
    """Return (name, bytes, mtime in ns) of each file: what differs when one of them is replaced."""
    with reading(folder / "meta.json"):
        stats = [(folder / name).stat() for name in FILES]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(FILES, stats, strict=True))


def read_meta(folder: Path) -> dict:
    kinds = {"source": str, "vocab_size": int, "bos": int, "fingerprint": str, "hashes": dict}
    with reading(folder / "meta.json"):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise PrepareError(f"The tokens in {folder} are of another format; {run_again(folder)}")
        whole = all(isinstance(meta[key], kind) for key, kind in kinds.items())
        whole &= all(isinstance(meta["splits"][split]["tokens"], int) for split in SPLITS)
        whole &= all(isinstance(meta["recipe"][key], list) for key in ("inputs", "tokenizer"))
        if not (whole and meta["bos"] == meta["vocab_size"] - 1):
            raise ValueError
    return meta


def read_split(folder: Path, split: str, n_tokens: int) -> np.ndarray:
    path = folder / f"{split}.bin"
    with reading(path):
        # mode c, copy on write: torch wants memory that it could write to, and the file stays as it is
        tokens = np.memmap(path, dtype="<u2", mode="c")
        if len(tokens) != n_tokens:
            raise ValueError
    return tokens


def hash_files(folder: Path) -> tuple[dict[str, str], str]:
    """Return the hash of each file that load() opens but meta.json, and the fingerprint of them together."""
    hashes, fingerprint = {}, hashlib.blake2b(digest_size=8)
    for name in FILES[:-1]:
        content = hashlib.blake2b(digest_size=16)
        with reading(folder / name), open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
                if not name.endswith(".bin"):
                    fingerprint.update(block)
        if name.endswith(".bin"):  # tokens by their hash: published runs quote a fingerprint that is made so
            fingerprint.update(content.digest())
        hashes[name] = content.hexdigest()
    return hashes, fingerprint.hexdigest()


def open_source(*, data_dir: str | Path | None = None, demo: bool = False) -> Dataset:
    """
    Open a source's tokens for a run, verified; prepare them first where there are none. Raises PrepareError where they
    are damaged or the shards of `data_dir` changed since.
    """
    folder = source_folder(data_dir=data_dir, demo=demo)
    if not os.path.lexists(folder / "meta.json"):
        prepare(data_dir=data_dir, demo=demo)
    data = load(folder, verify=True)
    recipe, again = data.meta["recipe"], command(data_dir=data_dir, demo=demo)
    if data_dir:
        here = shard_inputs(Path(data_dir).expanduser().glob("*.parquet"))
        if any(shard not in recipe["inputs"] for shard in here):
            raise PrepareError(f"The shards in {data_dir} changed since they were prepared; run: {again}")
        if len(here) < len(recipe["inputs"]):
            say(f"Shards that {folder} was made from are gone from {data_dir}; going on with its tokens")
    if recipe["tokenizer"] != tokenizer_recipe():
        say(f"{folder} was made with other constants than prepare.py has now; to make it anew, run: {again}")
    return data


# --------------------------------------------------------------------------------------------------
# Batches and the metric: do not change them, results would no longer compare


def window_count(tokens: torch.Tensor, seq_len: int, max_tokens: int | None = None) -> int:
    """Count the non-overlapping windows of seq_len inputs, each with its target; max_tokens bounds the targets."""
    targets = len(tokens) - 1 if max_tokens is None else min(len(tokens) - 1, max_tokens)
    if targets < seq_len:
        raise ValueError(f"{targets} tokens to predict (max_tokens = {max_tokens}) fill no window of {seq_len}")
    return targets // seq_len


def gather(tokens: torch.Tensor, window: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return idx and targets, the token after each, int64 (rows, seq_len), of the windows numbered (rows,)."""
    import torch

    assert tokens.dtype == torch.int16 and tokens.ndim == 1, "tokens: int16 (tokens,), as Dataset.to gives them"
    place = window[:, None] * seq_len + torch.arange(seq_len + 1, device=window.device)
    ids = tokens[place].long() & 0xFFFF  # (rows, seq_len + 1); tokens above 32767 are negative as int16
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Batches:
    """
    Training batches, gathered on the device that holds the tokens, int16 (tokens,). The seed alone orders the
    windows, alike on every device; after the last window the order starts again.
    """

    def __init__(self, tokens: torch.Tensor, seq_len: int, seed: int):
        import torch

        self.tokens, self.seq_len = tokens, seq_len
        generator = torch.Generator().manual_seed(seed)  # on the CPU: a GPU orders otherwise
        self.order = torch.randperm(window_count(tokens, seq_len), generator=generator).to(tokens.device)

    def __call__(self, first: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return idx and targets, int64 (rows, seq_len), of the windows `first`, `first + 1`, ... in order. `first` is
        int64, 0-dim, on the device: nothing here waits for the host, so that a CUDA graph can capture it.
        """
        import torch

        place = (first + torch.arange(rows, device=self.order.device)) % len(self.order)
        return gather(self.tokens, self.order[place], self.seq_len)


def bits_per_byte(
    token_losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    tokens: torch.Tensor,
    token_bytes: torch.Tensor,
    *,
    seq_len: int,
    rows: int,
    max_tokens: int | None = None,
) -> list[float]:
    """
    Return sum of nats / (ln 2 * sum of bytes) over non-overlapping windows of a split, and the same of the first,
    second and last third of each window; NaN and inf come through.
    tokens: int16 (tokens,), token_bytes: int64 (vocab_size,), both on the device. max_tokens scores as many windows
    as it fills, spread evenly over the split. token_losses(idx, targets) -> nats, all (rows, seq_len): every call has
    this shape, the last is padded with windows that do not count. Targets without bytes (BOS) are out of both sums.
    """
    import torch

    device, n_windows = tokens.device, window_count(tokens, seq_len, max_tokens)
    windows = torch.arange(n_windows, device=device) * window_count(tokens, seq_len) // n_windows
    row = torch.arange(rows, device=device)
    sum_nats = torch.zeros(seq_len, dtype=torch.float64, device=device)  # at each place in a window
    sum_bytes = torch.zeros_like(sum_nats)
    with torch.no_grad():
        for first in range(0, n_windows, rows):
            place = first + row
            idx, targets = gather(tokens, windows[place.clamp(max=n_windows - 1)], seq_len)
            losses = token_losses(idx, targets)
            assert losses.shape == targets.shape, f"losses {tuple(losses.shape)}, not {tuple(targets.shape)}"
            n_bytes = token_bytes[targets] * (place < n_windows)[:, None]  # 0: padding, or BOS
            sum_nats += torch.where(n_bytes > 0, losses.double(), 0.0).sum(0)
            sum_bytes += n_bytes.sum(0)
    of_both = torch.stack([sum_nats, sum_bytes])  # (2, seq_len)
    sums = [part.sum(1) for part in (of_both, *of_both.tensor_split(3, dim=1))]
    return [(nats / (math.log(2) * n_bytes)).item() for nats, n_bytes in sums]


# --------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", type=int, help=f"training shards of FineWeb-Edu (default {SHARDS}, or as prepared)")
    source.add_argument("--data-dir", metavar="DIR", help="folder of parquet shards with a `text` column")
    source.add_argument("--demo", action="store_true", help="the Python standard library's source files")
    args = parser.parse_args()
    if args.shards is not None and not 1 <= args.shards <= LAST_SHARD:
        parser.error(f"argument --shards: {args.shards} is not between 1 and {LAST_SHARD}")
    end_on_signals()
    try:
        prepare(**vars(args))
    except PrepareError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. Run again to resume: {command(**vars(args))}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
