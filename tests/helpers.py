"""What several of the tests use."""

import contextlib
import functools
import math
import os
import signal
import traceback

import numpy as np

import evolve
import genome
from genome import Family, transformer


def uniform_bpb(
    tokens: np.ndarray, token_bytes: np.ndarray, vocab_size: int, *, seq_len: int, max_tokens: int | None = None
) -> float:
    """Return the score of uniform logits over the windows of `tokens`, uint16: log2(vocab_size) * tokens / bytes."""
    n_all = (len(tokens) - 1) // seq_len
    n_scored = min(n_all, (max_tokens or len(tokens)) // seq_len)
    first = np.arange(n_scored) * n_all // n_scored * seq_len
    n_bytes = token_bytes[tokens[first[:, None] + np.arange(1, seq_len + 1)]]
    return math.log2(vocab_size) * np.count_nonzero(n_bytes) / int(n_bytes.sum())


@contextlib.contextmanager
def forked(function):
    """A forked process that runs a function, killed in the end where it still lives; its id."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def genes_have(params: int):
    """In the place of genome.block_params: a gene has so many parameters."""
    return lambda gene, d_in, d_skip, frame: params


def remember_designs(monkeypatch):
    """Designs are made, grown and counted once: the plan asks anew with every call, which costs more than all else."""
    for name, family in genome.FAMILIES.items():
        monkeypatch.setitem(genome.FAMILIES, name, family._replace(design=functools.cache(family.design)))
    for name in ("is_small", "grown"):
        monkeypatch.setattr(evolve, name, functools.cache(getattr(evolve, name)))


def family_of_transformers(**traits: tuple) -> dict[str, Family]:
    """In the place of FAMILIES: transformers of any depth and width, and these traits; the first is 1 x 64."""
    return {"transformer": Family(transformer, traits)}
