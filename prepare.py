"""
Prepare the data, once: shards of text -> tokenizer -> tokens; and measure models on them in bits per byte.

    uv run prepare.py                  download 8 shards of FineWeb-Edu and the held-out one (1 GB), tokenize them
    uv run prepare.py --shards 16      more of them; what is there already is kept
    uv run prepare.py --data-dir DIR   your own parquet shards, each with a `text` column; the last one is held out
    uv run prepare.py --demo           no download: the Python standard library's own source files

Reads the shards. Writes one folder per source under ~/.cache/genesis (GENESIS_CACHE moves it): tokenizer.tiktoken,
tokenizer.json, train.bin, val.bin, test.bin (uint16 tokens, BOS before each document) and, last of all, meta.json:
a folder without it holds nothing. Stop it whenever you like: the next call resumes the download and starts the rest
again. evolve.py uses `prepare`, `load`, `Batches` and `bits_per_byte` from here.
"""

from __future__ import annotations

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
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import rustbpe
import tiktoken
from tqdm import tqdm

if TYPE_CHECKING:
    import torch  # seconds to import, and only the metric needs it: it is imported there

# ----------------------------------------------------------------------------------------------------------------------
# Constants: text and tokens. Changing one of these makes the next call tokenize again.

VOCAB_SIZE = 8192  # tokens, BOS included
BOS = "<|bos|>"  # stands before every document
SPLIT_PATTERN = (  # GPT-4's, with numbers cut at two digits instead of three: they cost a small vocabulary less
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)
TOKENIZER_CHARS = 100_000_000  # characters of training text that the tokenizer is trained on: the first ones
TOKENIZER_DOC_CHARS = 10_000  # characters of one document that the tokenizer may see
PIECE_CHARS = (
    100_000  # longer documents are tokenized in pieces: the regex overflows on a million spaces in a row
)
DEMO_CHARS = 8_000_000  # characters of source code in the demo
DEMO_HELD_OUT = 10  # every 10th file of the demo is held out
FORMAT = 1  # of the files below; raise it when they change

# Constants: download.

SHARDS = 8  # training shards, of about 250 MB of text (60 M tokens) each
HUB = "https://huggingface.co"  # HF_ENDPOINT names a mirror
HUB_REPO = "karpathy/fineweb-edu-100b-shuffle"
LAST_SHARD = 1822  # held out; shards 0 to 1821 are for training
SHARD_BYTES = (
    100_000_000  # of one shard, roughly: for the disk check, and the progress bar before the hub answers
)
SHARD_TOKEN_BYTES = 125_000_000  # of its tokens, roughly
DOWNLOADS = 4  # shards at a time
TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
ATTEMPTS = 8  # in a row that bring a shard no further, before it is given up
DAMAGED_ATTEMPTS = 2  # whole downloads of a shard that turn out to be no parquet, before it is given up
BACKOFF = 1.0  # seconds before the first retry; doubles with each
BACKOFF_MAX = 60.0  # seconds
RETRY_AFTER_MAX = 300.0  # seconds that a server may ask to wait

SPLITS = ("train", "val", "test")
assert 256 < VOCAB_SIZE <= 2**16, "a token is a uint16"


class PrepareError(Exception):
    """What went wrong and what to run next, for the user."""


def say(line: str) -> None:
    tqdm.write(line)  # above the progress bar where there is one
    sys.stdout.flush()


def progress(**options) -> tqdm:
    return tqdm(disable=None, leave=False, **options)  # None: no bar in a log file


def size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


# ----------------------------------------------------------------------------------------------------------------------
# Where things are


def cache_root() -> Path:
    return Path(os.environ.get("GENESIS_CACHE") or "~/.cache/genesis").expanduser()


def source_folder(*, data_dir: str | Path | None = None, demo: bool = False) -> Path:
    """Return the folder that holds a source's tokens, prepared or not."""
    assert not (data_dir and demo), "choose one source"
    if not data_dir:
        return cache_root() / ("demo" if demo else "fineweb-edu")
    path = Path(data_dir).expanduser().resolve()
    return cache_root() / f"data-{path.name}-{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"


def command(*, data_dir: str | Path | None = None, demo: bool = False, shards: int | None = None) -> str:
    option = (
        f" --data-dir {data_dir}"
        if data_dir
        else " --demo"
        if demo
        else f" --shards {shards}"
        if shards
        else ""
    )
    return f"uv run prepare.py{option}"


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


# ----------------------------------------------------------------------------------------------------------------------
# Download


class Retry(Exception):
    """A failure that may pass: why, and how many seconds the server asks to wait."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


def retry_after(response: requests.Response) -> float:
    """Return the seconds that a Retry-After header asks for, given as a number or as an HTTP date."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = (
            float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
        )
    except ValueError:
        seconds = 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_MAX)


def shard_problem(path: Path) -> str | None:
    """Say why `path` cannot be used as a shard; None where it can."""
    try:
        kind = pq.read_schema(path).field("text").type
    except KeyError:
        return "it has no `text` column"
    except (pa.ArrowException, OSError) as error:
        return f"it is not a parquet file that opens ({str(error).splitlines()[0]})"
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)
    return None if is_text else f"its `text` column holds {kind}, not strings"


class Download:
    """One shard on its way: `run` until it lies at `path`, whole and checked. A `.part` file holds what came so far."""

    def __init__(self, url: str, path: Path, bar: tqdm, stop: threading.Event):
        self.url, self.path, self.bar, self.stop = url, path, bar, stop
        self.part = path.with_name(path.name + ".part")
        self.total = SHARD_BYTES  # a guess until the hub answers

    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def restart(self) -> None:
        self.bar.update(-self.have())
        self.part.unlink(missing_ok=True)

    def run(self) -> None:
        """Raise PrepareError when the shard cannot be had; `stop` ends it early."""
        furthest, failures, damaged = self.have(), 0, 0
        while not self.stop.is_set():
            try:
                self.attempt()
                if self.stop.is_set():
                    return
                if problem := shard_problem(self.part):
                    damaged += 1
                    self.restart()
                    raise Retry(f"arrived, but {problem}")
                os.replace(self.part, self.path)
                return
            except (Retry, requests.RequestException) as error:
                failures = 0 if self.have() > furthest else failures + 1
                furthest = max(furthest, self.have())
                hopeless = isinstance(error, ValueError)  # requests' own: HF_ENDPOINT is no URL
                if hopeless or failures >= ATTEMPTS or damaged >= DAMAGED_ATTEMPTS:
                    raise PrepareError(f"{self.path.name}: {error} ({self.url})") from None
                wait = min(BACKOFF * 2 ** max(failures - 1, 0), BACKOFF_MAX)
                wait = max(wait, getattr(error, "wait", 0.0)) * random.uniform(
                    1.0, 1.5
                )  # not all at once again
                say(f"{self.path.name}: {error}; trying again in {wait:.0f} s")
                self.stop.wait(wait)

    def attempt(self) -> None:
        """Ask once for the bytes that are missing, and append them to the part."""
        have = self.have()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            status, length = response.status_code, response.headers.get("Content-Length", "")
            span = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
            if status == 416 and span and int(span[2]) == have:
                return  # nothing is missing: killed just before the part got its name
            if status == 416 or (status == 206 and not (span and span[1] and int(span[1]) == have)):
                self.restart()
                raise Retry(f"HTTP {status} does not continue the {have} bytes that are here: starting over")
            if status in (408, 425, 429) or status >= 500:
                raise Retry(f"HTTP {status}", retry_after(response))
            if status not in (200, 206):
                raise PrepareError(f"{self.path.name}: HTTP {status} ({self.url})")
            if status == 200:
                self.restart()  # the server sends the whole file, asked or not
            total = int(span[2]) if status == 206 else int(length) if length.isdecimal() else None
            self.bar.total += (total or self.total) - self.total
            self.total = total or self.total
            with open(self.part, "ab") as file:
                for chunk in response.iter_content(256 * 1024):
                    self.bar.update(file.write(chunk))
                    if self.stop.is_set():
                        return
                file.flush()
                os.fsync(file.fileno())
        if total is not None and self.have() != total:
            got = self.have()
            if got > total:
                self.restart()
            raise Retry(f"{got} bytes arrived where {total} were announced")


def download(folder: Path, names: list[str], again: str) -> list[Path]:
    """Bring the named shards into `folder`, in parallel; return their paths. What arrived stays, whatever happens."""
    folder.mkdir(exist_ok=True)
    base = f"{os.environ.get('HF_ENDPOINT') or HUB}/datasets/{HUB_REPO}/resolve/main".replace(
        "//datasets", "/datasets"
    )
    paths = [folder / name for name in names]
    missing = [path for path in paths if shard_problem(path)]
    stop, failed = threading.Event(), []
    with progress(total=len(missing) * SHARD_BYTES, unit="B", unit_scale=True, desc="download") as bar:
        shards = [Download(f"{base}/{path.name}", path, bar, stop) for path in missing]
        bar.update(sum(shard.have() for shard in shards))
        check_disk(
            folder, len(shards) * SHARD_BYTES - bar.n + len(names) * SHARD_TOKEN_BYTES if shards else 0, again
        )
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            waiting = {pool.submit(shard.run): shard for shard in shards}
            try:
                for done, future in enumerate(as_completed(waiting), start=1):
                    try:
                        future.result()
                    except PrepareError as error:
                        failed.append(str(error))
                    else:
                        if bar.disable:
                            say(f"{waiting[future].path.name}: downloaded ({done} of {len(shards)})")
            except BaseException:  # Ctrl-C, or a full disk: end the other downloads too
                stop.set()
                raise
    if failed:
        lines = "\n  ".join(sorted(failed))
        raise PrepareError(
            f"{len(failed)} of {len(names)} shards could not be downloaded:\n  {lines}\n"
            f"What was downloaded is kept. Run again to resume: {again}"
        )
    return paths


def check_disk(folder: Path, need: int, again: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise PrepareError(
            f"Not enough disk space in {folder}: {size(need)} needed, {size(free)} free. "
            f"Make room, or set GENESIS_CACHE to another disk, and run again: {again}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Other sources of shards


def local_shards(data_dir: str | Path) -> list[Path]:
    """Return the sorted parquet shards of a user's folder."""
    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        raise PrepareError(f"--data-dir {data_dir}: there is no such folder")
    paths = sorted(folder.glob("*.parquet"))
    if len(paths) < 2:
        found = "holds no *.parquet file" if not paths else f"holds one parquet file, {paths[0].name}"
        raise PrepareError(f"--data-dir {data_dir} {found}; it takes two or more: the last one is held out")
    for path in paths:
        if problem := shard_problem(path):
            raise PrepareError(f"--data-dir: {path} cannot be used: {problem}. Replace it or move it away")
    return paths


def demo_shards(folder: Path) -> list[Path]:
    """Write the Python standard library's source files as two shards: for training, and held out."""
    root, chars, texts = Path(sysconfig.get_path("stdlib")), 0, []
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    for path in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(root).parts) and chars < DEMO_CHARS:
            try:
                texts.append(path.read_text(encoding="utf-8")[: DEMO_CHARS - chars])
            except UnicodeDecodeError:
                continue  # a few files are there to be undecodable
            chars += len(texts[-1])
    if len(texts) < 2 * DEMO_HELD_OUT:
        raise PrepareError(
            f"No source files of the standard library in {root}; use --data-dir DIR instead of --demo"
        )
    paths = [folder / shard_name(0), folder / shard_name(1)]
    held_out = texts[::DEMO_HELD_OUT]
    del texts[::DEMO_HELD_OUT]
    for path, documents in zip(paths, (texts, held_out), strict=True):
        pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), path)
    return paths


# ----------------------------------------------------------------------------------------------------------------------
# Text: train, val and test share no document


def documents(paths: Iterable[Path], again: str) -> Iterator[str]:
    """Stream the documents of shards, empty ones left out; bytes that are not UTF-8 become U+FFFD."""
    for path in paths:
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
                for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
                    if raw:
                        yield raw.decode("utf-8", "replace")
        except (pa.ArrowException, OSError) as error:
            raise PrepareError(
                f"{path} is damaged: {error}\nReplace or delete it, and run again: {again}"
            ) from None


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def alternate(texts: Iterable[str], which: int) -> Iterator[str]:
    """Yield every other distinct document: the even ones (which = 0) or the odd ones (which = 1)."""
    seen = set()
    for text in texts:
        key = digest(text)
        if key not in seen:
            if len(seen) % 2 == which:
                yield text
            seen.add(key)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Train a BPE on the first TOKENIZER_CHARS characters; write tokenizer.tiktoken and tokenizer.json."""
    started, chars = time.time(), 0

    def sample() -> Iterator[str]:
        nonlocal chars
        for text in texts:
            text = text[:TOKENIZER_DOC_CHARS]
            chars += len(text)
            bar.update(len(text))
            yield text
            if chars >= TOKENIZER_CHARS:
                return

    bpe = rustbpe.Tokenizer()
    with progress(unit="char", unit_scale=True, desc="tokenizer") as bar:
        bpe.train_from_iterator(sample(), VOCAB_SIZE - 1, pattern=SPLIT_PATTERN)
    ranks = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
    lines = (f"{base64.b64encode(bytes(token)).decode()} {rank}\n" for token, rank in ranks)
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    settings = {"pattern": SPLIT_PATTERN, "special_tokens": {BOS: len(ranks)}}
    (folder / "tokenizer.json").write_text(json.dumps(settings, indent=1) + "\n")
    short = "" if len(ranks) == VOCAB_SIZE - 1 else f" (the text is too small for {VOCAB_SIZE})"
    say(
        f"Tokenizer: {len(ranks) + 1} tokens{short} from {chars / 1e6:.1f} M characters, {time.time() - started:.0f} s"
    )


def read_ranks(folder: Path) -> dict[bytes, int]:
    """Read tokenizer.tiktoken: the raw bytes of every token but BOS, in order."""
    lines = (folder / "tokenizer.tiktoken").read_text().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}


def read_tokenizer(folder: Path) -> tiktoken.Encoding:
    settings = json.loads((folder / "tokenizer.json").read_text())
    return tiktoken.Encoding(
        name="genesis",
        pat_str=settings["pattern"],
        mergeable_ranks=read_ranks(folder),
        special_tokens=settings["special_tokens"],
    )


def read_token_bytes(folder: Path) -> np.ndarray:
    """Return the length in bytes of each token, int64 (vocab_size,); BOS, the last, has none."""
    return np.array([*map(len, read_ranks(folder)), 0], dtype=np.int64)


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """Return BOS and the document's tokens, uint16; a literal `<|bos|>` in the text is text."""
    pieces = (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))
    ids = [tokenizer.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([[tokenizer.max_token_value], *ids]).astype("<u2")


def write_split(
    path: Path, texts: Iterable[str], tokenizer: tiktoken.Encoding, bar: tqdm
) -> tuple[dict, str]:
    """Tokenize on all cores and write the tokens in order; return the split's counts and a hash of its tokens."""
    token_bytes = read_token_bytes(path.parent)
    counts, content = {"documents": 0, "tokens": 0, "bytes": 0}, hashlib.blake2b(digest_size=16)

    def encode_batch(batch: list[str]) -> tuple[np.ndarray, int]:
        tokens = np.concatenate([encode(tokenizer, text) for text in batch])
        n_bytes = sum(len(text.encode()) for text in batch)
        assert token_bytes[tokens].sum() == n_bytes, "token lengths must add up to the text's"
        return tokens, n_bytes

    with (
        ThreadPoolExecutor() as pool,
        open(path, "wb") as file,
    ):  # threads: tiktoken works outside Python's lock
        texts = iter(texts)
        batches = iter(lambda: list(islice(texts, 64)), [])
        running = deque((batch, pool.submit(encode_batch, batch)) for batch in islice(batches, 128))
        while running:  # a bounded queue: the text streams through
            batch, future = running.popleft()
            tokens, n_bytes = future.result()
            running.extend((batch, pool.submit(encode_batch, batch)) for batch in islice(batches, 1))
            file.write(tokens.data)
            content.update(tokens.data)
            for key, n in (("documents", len(batch)), ("tokens", len(tokens)), ("bytes", n_bytes)):
                counts[key] += n
            bar.update(len(batch))
    return counts, content.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Prepare: one folder, whole or not at all


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, or yield False where another process holds it. A killed process holds nothing."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def prepare(*, data_dir: str | Path | None = None, demo: bool = False, shards: int | None = None) -> Path:
    """
    Prepare a source where it is not prepared yet, or has changed; return its folder. Raises PrepareError.
    Without `shards`, FineWeb-Edu is taken as it is prepared, or with SHARDS training shards.
    """
    folder = source_folder(data_dir=data_dir, demo=demo)
    if data_dir:
        paths = local_shards(data_dir)
        inputs = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    elif demo:
        inputs = [f"Python {sys.version.split()[0]}", DEMO_CHARS, DEMO_HELD_OUT]
    else:
        shards = shards or prepared_shards(folder) or SHARDS
        inputs = [shard_name(i) for i in [*range(shards), LAST_SHARD]]
    recipe = {
        "inputs": inputs,
        "tokenizer": [VOCAB_SIZE, BOS, SPLIT_PATTERN, TOKENIZER_CHARS, TOKENIZER_DOC_CHARS, PIECE_CHARS],
    }
    again = command(data_dir=data_dir, demo=demo, shards=shards)
    work = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder) as mine:
            for leftover in folder.glob(".tmp-*") if mine else ():
                shutil.rmtree(leftover)
            if is_current(folder, recipe):
                say(f"Nothing to do: {folder} is prepared")
                return folder
            if not mine:
                raise PrepareError(f"Another prepare.py is at work in {folder}; wait for it, or stop it")
            work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder))
            if demo:
                paths = demo_shards(work)
            elif not data_dir:
                paths = download(folder / "shards", inputs, again)
            source = "demo" if demo else Path(data_dir).resolve().name if data_dir else "fineweb-edu"
            meta = tokenize(paths, work, again) | {"source": source, "recipe": recipe}
            (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
            publish(work, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PrepareError(
            f"The disk is full: writing in {folder} failed. What was downloaded is kept. "
            f"Make room, or set GENESIS_CACHE to another disk, and run again: {again}"
        ) from None
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)
    for split in SPLITS:
        say(
            "{:5} {documents:9,} documents {tokens:13,} tokens {bytes:13,} bytes".format(
                split, **meta["splits"][split]
            )
        )
    say(f"Ready: {folder}")
    return folder


def tokenize(paths: list[Path], folder: Path, again: str) -> dict:
    """Write the tokenizer and the three splits of the shards `paths`, the last one held out; return their meta."""
    files = [pq.ParquetFile(path).metadata for path in paths]
    text_bytes = sum(file.row_group(i).total_byte_size for file in files for i in range(file.num_row_groups))
    check_disk(folder, text_bytes // 2, again)  # a token stands for four bytes of text and takes two

    *train, last = paths
    held_out = {digest(text) for text in documents([last], again)}
    if len(held_out) < 2:
        raise PrepareError(
            f"{last} is the held-out shard and needs two different documents: one for val, one for test"
        )
    texts = {
        "train": lambda: (text for text in documents(train, again) if digest(text) not in held_out),
        "val": lambda: alternate(documents([last], again), 0),
        "test": lambda: alternate(documents([last], again), 1),
    }
    train_tokenizer(texts["train"](), folder)
    tokenizer, splits, started = read_tokenizer(folder), {}, time.time()
    fingerprint = hashlib.blake2b(digest_size=8)
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        fingerprint.update((folder / name).read_bytes())
    with progress(total=sum(file.num_rows for file in files), unit="doc", desc="tokens") as bar:
        for split in SPLITS:
            splits[split], content = write_split(folder / f"{split}.bin", texts[split](), tokenizer, bar)
            fingerprint.update(content.encode())
    if not splits["train"]["documents"]:
        raise PrepareError(
            f"No document is left to train on in {paths[0].parent}: all are empty, or in {last.name} too"
        )
    total = sum(counts["bytes"] for counts in splits.values())
    say(f"Tokens: {size(total)} of text, {time.time() - started:.0f} s")
    return {
        "format": FORMAT,
        "shards": [path.name for path in paths],
        "vocab_size": tokenizer.n_vocab,
        "bos": tokenizer.max_token_value,
        "splits": splits,
        "fingerprint": fingerprint.hexdigest(),
    }


def publish(work: Path, folder: Path) -> None:
    """Move finished files to their place. Without meta.json a folder counts as empty: it goes first and comes last."""
    names = ["tokenizer.tiktoken", "tokenizer.json", *(f"{split}.bin" for split in SPLITS), "meta.json"]
    for name in names:
        with open(work / name, "rb") as file:
            os.fsync(file.fileno())
    (folder / "meta.json").unlink(missing_ok=True)
    for name in names:
        os.replace(work / name, folder / name)


def is_current(folder: Path, recipe: dict) -> bool:
    try:
        return load(folder).meta["recipe"] == recipe
    except PrepareError:
        return False


def prepared_shards(folder: Path) -> int | None:
    try:
        return len(load(folder).meta["shards"]) - 1
    except PrepareError:
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Load


@dataclass(frozen=True)
class Dataset:
    """The tokens of one source, memory-mapped."""

    folder: Path
    meta: dict
    train: np.ndarray  # uint16 (tokens,)
    val: np.ndarray  # uint16 (tokens,): evolution selects on it
    test: np.ndarray  # uint16 (tokens,): seen once, for the final report
    token_bytes: np.ndarray  # int64 (vocab_size,): bytes of each token, 0 for BOS

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def bos(self) -> int:
        return self.meta["bos"]

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and of all tokens: equal text and equal tokenizer, equal fingerprint."""
        return self.meta["fingerprint"]

    @property
    def source(self) -> str:
        return self.meta["source"]

    def tokenizer(self) -> tiktoken.Encoding:
        return read_tokenizer(self.folder)


def load(folder: str | Path) -> Dataset:
    """Open a prepared folder. Raises PrepareError where it holds no tokens, or not the ones that meta.json describes."""
    folder = Path(folder)
    option = {"demo": " --demo", "fineweb-edu": ""}.get(folder.name, " --data-dir DIR")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["format"] != FORMAT:
            raise PrepareError(f"The tokens in {folder} have another format; run: uv run prepare.py{option}")
        token_bytes = read_token_bytes(folder)
        expected = {f"{split}.bin": 2 * meta["splits"][split]["tokens"] for split in SPLITS}
        found = {name: (folder / name).stat().st_size for name in expected}
    except FileNotFoundError:
        raise PrepareError(f"No tokens in {folder}; run: uv run prepare.py{option}") from None
    if found != expected or len(token_bytes) != meta["vocab_size"]:
        raise PrepareError(
            f"The files in {folder} are not those of its meta.json; run: uv run prepare.py{option}"
        )
    # copy on write: PyTorch wants writable memory, and nothing that it writes may reach the file
    splits = {split: np.memmap(folder / f"{split}.bin", dtype="<u2", mode="c") for split in SPLITS}
    return Dataset(folder, meta, **splits, token_bytes=token_bytes)


# ----------------------------------------------------------------------------------------------------------------------
# The metric, and the batches: do not change them, results would no longer compare


def to_device(tokens: np.ndarray | torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Move uint16 tokens to the device, as int16 (few torch ops know uint16; `& 0xFFFF` brings the token back)."""
    import torch

    if isinstance(tokens, np.ndarray):
        tokens = torch.from_numpy(tokens.view(np.int16))
    assert tokens.dtype == torch.int16 and tokens.ndim == 1, "tokens: uint16 array or int16 tensor, (tokens,)"
    return tokens.to(device)


def window_count(tokens: np.ndarray | torch.Tensor, seq_len: int, max_tokens: int | None = None) -> int:
    """Count the non-overlapping windows of seq_len inputs, each with its target, in the first max_tokens targets."""
    targets = len(tokens) - 1  # the first token is the target of nothing
    n = min(targets, targets if max_tokens is None else max_tokens) // seq_len
    if n < 1:
        limit = "" if max_tokens is None else f" and max_tokens = {max_tokens}"
        raise ValueError(f"a split of {len(tokens)} tokens{limit} has no window of {seq_len} + 1 tokens")
    return n


class Batches:
    """
    Training batches, gathered on the device from tokens that live there whole. A seed fixes the order of the windows,
    the same on every device; after the last window the order starts again.
    """

    def __init__(
        self, tokens: np.ndarray | torch.Tensor, seq_len: int, seed: int, device: str | torch.device
    ):
        import torch

        self.tokens, self.seq_len = to_device(tokens, device), seq_len
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(window_count(tokens, seq_len), generator=generator).to(device)
        self.window = torch.arange(seq_len + 1, device=device)

    def __call__(self, first: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return idx and targets, int64 (rows, seq_len), of `rows` windows from the `first` on (int64, 0-dim, on the
        device). No sync with the host and no shape that depends on data: a CUDA graph can capture it.
        """
        import torch

        place = (first + torch.arange(rows, device=self.order.device)) % len(self.order)
        start = self.order[place] * self.seq_len
        window = self.tokens[start[:, None] + self.window].long() & 0xFFFF  # (rows, seq_len + 1)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def bits_per_byte(
    token_losses,
    tokens: np.ndarray | torch.Tensor,
    token_bytes: np.ndarray | torch.Tensor,
    *,
    seq_len: int,
    rows: int,
    device: str | torch.device,
    max_tokens: int | None = None,
) -> float:
    """
    Score a model: sum of nats / (ln 2 * sum of bytes) over non-overlapping windows of a split; NaN and inf stay so.
    token_losses(idx, targets), all (rows, seq_len), returns nats; it always gets full batches, the last one padded
    with windows that do not count. BOS has no bytes: as a target it is out of both sums.
    """
    import torch

    n = window_count(tokens, seq_len, max_tokens)
    tokens = to_device(tokens, device)
    token_bytes = torch.as_tensor(token_bytes, device=device)
    steps, row = torch.arange(seq_len + 1, device=device), torch.arange(rows, device=device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        for first in range(0, n, rows):
            start = (first + row).clamp(max=n - 1) * seq_len
            window = tokens[start[:, None] + steps].long() & 0xFFFF
            idx, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
            losses = token_losses(idx, targets)
            assert losses.shape == targets.shape, (
                f"{tuple(losses.shape)} losses for {tuple(targets.shape)} targets"
            )
            n_bytes = token_bytes[targets] * (first + row < n)[:, None]
            nats += torch.where(n_bytes > 0, losses.double(), 0.0).sum()
            total += n_bytes.sum()
    return (nats / (math.log(2) * total)).item()


def uniform_bpb(
    tokens: np.ndarray,
    token_bytes: np.ndarray,
    vocab_size: int,
    *,
    seq_len: int,
    max_tokens: int | None = None,
) -> float:
    """Return what a model with uniform logits must score over the same windows: log2(vocab_size) * tokens / bytes."""
    targets = np.asarray(tokens)[1 : 1 + window_count(tokens, seq_len, max_tokens) * seq_len]
    n_bytes = token_bytes[targets]
    return math.log2(vocab_size) * int((n_bytes > 0).sum()) / int(n_bytes.sum())


# ----------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shards", type=int, help=f"training shards of FineWeb-Edu (default {SHARDS})")
    source.add_argument("--data-dir", metavar="DIR", help="folder of parquet shards with a `text` column")
    source.add_argument("--demo", action="store_true", help="the Python standard library's own source files")
    args = parser.parse_args()
    if args.shards is not None and not 1 <= args.shards <= LAST_SHARD:
        parser.error(f"argument --shards: {args.shards} is not between 1 and {LAST_SHARD}")
    if args.data_dir == "":
        parser.error("argument --data-dir: it is empty")
    try:
        prepare(**vars(args))
    except PrepareError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped; run again to resume: {command(**vars(args))}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
