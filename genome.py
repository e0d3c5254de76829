"""genome.py: genes -> genome -> model, and parents -> child.

A genome is a sequence of genes, a gene is one operation on a (B, T, C) stream of activations. `input` and `skip`
are distances back along the sequence, so residuals, parallel branches and dense connections are still sequences:
a pre-norm transformer block is  norm, attention skip=2, norm, gate skip=2.

Read it in order: the ops (add one of your own there: one class, nothing else), then Gene and Genome, then the Model
that a genome builds, how its parts are compiled and how ops are tried out, then random_genome, mutate and crossover,
then the designs that evolution has to beat, and how a design grows.

    uv run genome.py        the ops with their traits, and how often a search without selection comes by each choice

Reads and writes nothing. B batch, T time (tokens), C channels, H heads, D channels of a head.
"""

from __future__ import annotations  # of kernels, whose language is only there where there is a GPU

import collections
import difflib
import functools
import hashlib
import itertools
import json
import math
import random
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------------
# The vocabulary of a gene. The first choice of a trait is its default.

WIDTHS = (64, 128, 192, 256, 320, 384, 512)  # channels of a gene, as evolution draws them
WIDTH_STEP, MAX_WIDTH = 64, 4_096  # in a file, and when a design is scaled: any multiple of the one up to the other
MAX_GENES = 64  # genes in a genome; a 12-layer transformer has 48, with the embedding added before each layer 59
MAX_DISTANCE = 8  # how far back random wiring reaches, in genes, if not to the embedding
LONGEST_BRANCH = 3  # genes of a residual branch: norm, table, matrix; what reaches further is another kind of link
UNUSUAL = 0.18  # chance of each choice of a trait that is not the usual one, in half of the random genes
MAX_JSON = 200_000  # characters of a genome file; more is refused unread
LOGIT_CAP = 15.0  # logits are soft-capped to +-15 (Gemma 2, 2024)
RESIDUAL_INIT = 0.1  # the last matrix of a residual branch starts at this share of its usual size
MAX_SEQ_LEN = 4_096  # tokens that a model can see at once
CHUNK = 64  # tokens that recurrent ops treat in parallel
VALUE_SLOTS = 8_192  # rows of the table of bigrams in the values of attention
MIN_LOG_DECAY = -1.0  # log of what a recurrent state keeps of itself from one token to the next, at least
# Within a chunk recurrent ops divide by the decay since its start, the log of which goes from 0 down to -64. Shifted by
# HALFWAY it goes from 32 to -32: its exponential, and one over it, are far from the limits of float32. HALFWAY is a
# multiple of log 2, so that the shift is a factor 2**46, which is exact in bfloat16.
HALFWAY = 46 * math.log(2)

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, Primer
    "leaky_relu2": lambda x: F.leaky_relu(x, 0.5).square(),
}
WIRING = {  # what every gene has beside its op's own traits
    "activation": tuple(ACTIVATIONS),
    "repeat": (1, 2, 3),  # the op applied this often with the same weights
    "scale": ("none", "small"),  # with skip, a gain on each channel of the branch (Touvron et al. 2021, LayerScale)
    "stride": (1, 2, 4),  # the op works on the means of so many tokens (Nawrot et al. 2021, Hourglass)
}
WIRING_RETIRED = {"scale": ("channel", "zero")}  # read from a file and never drawn, as an op's `retired`
SCALE_START = {"small": RESIDUAL_INIT, "channel": 1.0, "zero": 0.0}
GENOME_TRAITS = {
    "embed_dim": (256, *(w for w in WIDTHS if w != 256)),  # width of the token embedding
    "lr_factor": (1.0, 0.25, 0.35, 0.5, 0.7, 1.4, 2.0, 2.8, 4.0),  # times every learning rate
    "tied": (False, True),  # the head is the embedding matrix (Press & Wolf 2017)
}


# ------------------------------------------------------------------------------------------------------------------
# Ops. Each maps (B, T, d_in) to (B, T, d_out), and what it puts out at t depends on inputs up to t alone. Weights are
# float32 and are cast to the dtype of x where they are used. A parameter called `weight` is a matrix (..., out, in) and
# is trained by Muon; every other parameter by AdamW.

OPS: dict[str, type[Op]] = {}


class Frame(NamedTuple):
    """What stands around the genes of a model, as far as an op may depend on it."""

    vocab_size: int
    embed_dim: int
    dtype: torch.dtype = torch.float32  # of activations


class Op(nn.Module):
    """Base of all operations; a subclass is part of the search space as soon as it is defined.

    class Name(Op, name="name", mixes_tokens=..., keeps_width=...), with `traits` mapping each trait to its choices and
    __init__(self, d_in, d_out, **traits). `keeps_width` says that d_out is d_in, so that the gene has no width of its
    own. A last matrix called `out` (or `shared_out`) starts smaller in a residual branch. `settle` maps combinations of
    traits that compute the same thing to one of them; choices in `retired` can still be read from a file, and are never
    drawn. `compiles = False` keeps torch.compile away; `tuned = True` lets it try several forms of each reduction on
    the device. A declaration that clashes with another raises ValueError; what only shows when the op is built or run,
    op_problem() finds.

    An op that needs more than what its gene reads says so in `reads`, and its __init__ then takes a `frame` too. One
    that has a table says in `without_table` what is left of its traits when a design grows, or None for nothing.
    """

    name: str
    mixes_tokens = False
    keeps_width = False
    compiles = True
    tuned = False
    traits: dict[str, tuple] = {}
    retired: dict[str, tuple] = {}
    gone: dict[str, object] = {}  # traits of earlier files, each with the choice that is all there is today

    def __init_subclass__(cls, name: str, mixes_tokens: bool = False, keeps_width: bool = False):
        if name in OPS:
            raise ValueError(f"{cls.__name__} and {OPS[name].__name__} are both called {name!r}; give one another name")
        for trait, choices in cls.traits.items():
            if trait in RESERVED or trait in WIRING:
                raise ValueError(f"{cls.__name__}: {trait} is the name of something else; call the trait differently")
            plain = isinstance(choices, tuple) and all(type(c) in (str, int, float, bool) and c == c for c in choices)
            if not plain or len(set(choices)) < max(2, len(choices)):  # c == c: not nan
                raise ValueError(
                    f"{cls.__name__}.{trait}: its choices are {choices!r}; they have to be a tuple of two or more "
                    "different texts, numbers or truth values"
                )
        cls.name, cls.mixes_tokens, cls.keeps_width = name, mixes_tokens, keeps_width
        OPS[name] = cls

    @staticmethod
    def settle(traits: dict) -> dict:
        return traits

    @staticmethod
    def reads(traits: dict) -> tuple[str, ...]:
        """What forward takes, some of these in this order.

        stream: (B, T, d_in) that the gene reads; ids: (B, T) int64, the tokens; embedding: (B, T, embed_dim), of the
        frame. Where the op does not read the stream, d_in is None.
        """
        return ("stream",)

    @staticmethod
    def without_table(traits: dict) -> dict | None:
        return traits


RESERVED = ("op", "dim", "input", "skip", "share", "traits", "self", "d_in", "d_out", "frame")  # no names for a trait


class Linear(nn.Module):
    """A matrix without bias: (..., d_in) -> (..., d_out), uniform with variance 1 / d_in at the start."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        bound = math.sqrt(3 / d_in)
        self.weight = nn.Parameter(torch.empty(d_out, d_in).uniform_(-bound, bound))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def fused_linear(x, *layers: Linear, taps=None):
    """Apply several matrices to x (B, T, C) with one matrix product; returns one tensor for each.

    taps (K, out of all of them): a depthwise causal convolution over what comes out. It is part of the product, which
    then reads K tokens: at this width that is faster than a pass over the result, above all backwards.
    """
    weight = torch.cat([layer.weight for layer in layers])
    if taps is not None:
        x = last_tokens(x, len(taps))
        weight = torch.cat([tap[:, None] * weight for tap in taps], dim=1)
    return F.linear(x, weight.to(x.dtype)).split([layer.weight.size(0) for layer in layers], dim=-1)


def delay(x, steps: int):
    """Shift (B, T, C) by `steps` tokens to the future, zeros in front."""
    return F.pad(x, (0, 0, steps, 0))[:, : x.size(1)] if steps else x


def last_tokens(x, n: int):
    """Each token beside the n - 1 before it, (B, T, C) -> (B, T, n * C)."""
    return torch.cat([delay(x, back) for back in range(n)], dim=-1)


def rms_norm(x, gain=None):
    """Divide by the root mean square of the last dimension (Zhang & Sennrich 2019)."""
    return F.rms_norm(x, (x.size(-1),), None if gain is None else gain.to(x.dtype), eps=1e-5)


def first_tap(kernel: int, channels: int):
    """Taps that change nothing."""
    return F.pad(torch.ones(1, channels), (0, 0, 0, kernel - 1))


class NgramTable(nn.Module):
    """A learned row for the last n tokens: ids (B, T) int64 -> (B, T, width), of root mean square 1.

    n = 1 has a row for each token. Longer ones share `slots` rows by a hash that does not depend on the vocabulary.
    Hashed n-grams in language models: Svenstrup et al. 2017; Engram, DeepSeek 2026.
    """

    def __init__(self, n: int, slots: int, width: int, frame: Frame):
        super().__init__()
        self.n, self.slots, self.dtype = n, slots, frame.dtype
        self.table = nn.Parameter(torch.randn(frame.vocab_size if n == 1 else slots, width))

    def hash(self, ids):
        """(B, T) int64, all bits of it well mixed (multiply and shift; int64 wraps around)."""
        h = torch.zeros_like(ids)
        for back in range(self.n):
            token = F.pad(ids, (back, 0), value=-1)[:, : ids.size(1)]
            h = (h + token + 2) * -7_046_029_254_386_353_131  # 2**64 by the golden ratio, as an int64
            h = h ^ (h >> 32)
        return h

    def forward(self, ids):
        row = ids if self.n == 1 else self.hash(ids) & (self.slots - 1)
        return rms_norm(F.embedding(row, self.table).to(self.dtype))


@functools.cache
def rotary_table(channels: int, base: int):
    """Cosines and sines of the angles, each (MAX_SEQ_LEN, channels / 2); on the CPU, and made once."""
    with torch.device("cpu"):
        speed = base ** (-torch.arange(0, channels, 2, dtype=torch.float32) / channels)
        angle = torch.arange(MAX_SEQ_LEN, dtype=torch.float32)[:, None] * speed
        return angle.cos(), angle.sin()


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) of (B, H, T, D), D even, T <= MAX_SEQ_LEN, from a table.

    share: of the channels, the first ones; the others stay as they are (Black et al. 2022, GPT-NeoX).
    """

    def __init__(self, head_dim: int, base: int = 10_000, share: float = 1.0):
        super().__init__()
        self.turned = max(2, int(head_dim * share) // 2 * 2)
        cos, sin = rotary_table(self.turned, base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x):
        T = x.size(-2)
        cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        a, b = x[..., : self.turned].chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., self.turned :]], dim=-1)


class LinearOp(Op, name="linear"):
    """A matrix applied to each token."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.out = Linear(d_in, d_out)

    def forward(self, x):
        return self.out(x)


class Conv1d(Op, name="conv1d", mixes_tokens=True):
    """Causal convolution over the last `kernel` tokens, the identity at the start where widths allow."""

    traits = {"kernel": (4, 2, 3, 7, 15), "kind": ("depthwise", "dense")}

    def __init__(self, d_in, d_out, kernel, kind):
        super().__init__()
        self.kernel, self.kind = kernel, kind
        if kind == "depthwise":
            self.taps = nn.Parameter(first_tap(kernel, d_in))
            self.out = Linear(d_in, d_out) if d_in != d_out else None
        else:
            bound = math.sqrt(3 / (d_in * kernel))
            weight = torch.empty(kernel, d_out, d_in).uniform_(-bound, bound)
            if d_in == d_out:
                weight = 0.1 * weight
                weight[0] += torch.eye(d_in, device=weight.device)
            self.weight = nn.Parameter(weight)

    def forward(self, x):
        if self.kind == "depthwise":
            y = sum(tap * delay(x, back) for back, tap in enumerate(self.taps.to(x.dtype)))
            return self.out(y) if self.out is not None else y
        return F.linear(last_tokens(x, self.kernel), torch.cat(list(self.weight), dim=1).to(x.dtype))


class Shift(Op, name="shift", mixes_tokens=True, keeps_width=True):
    """Mix each channel with its value at the token before, by a learned share (token shift; Peng et al. 2023, RWKV)."""

    gone = {"mix": "channel"}

    def __init__(self, d_in, d_out):
        super().__init__()
        self.mix = nn.Parameter(torch.full((d_in,), 0.5))

    def forward(self, x):
        return x + self.mix.to(x.dtype) * (delay(x, 1) - x)


class Ngram(Op, name="ngram", mixes_tokens=True):
    """What a table says of the last n tokens (NgramTable); it reads the stream only where that gates it.

    gated: for each token by the match of what the table says with a matrix of the stream (Engram, DeepSeek 2026).
    A table narrower than the stream is an ngram of that width with a `linear` behind it.
    """

    traits = {"n": (2, 1, 3), "slots": (8_192, 4_096, 16_384, 32_768), "gated": (True, False)}
    gone = {"signs": False}

    @staticmethod
    def settle(traits):
        return {**traits, "slots": 8_192} if traits["n"] == 1 else traits

    @staticmethod
    def reads(traits):
        return ("stream", "ids") if traits["gated"] else ("ids",)

    @staticmethod
    def without_table(traits):
        return None

    def __init__(self, d_in, d_out, frame, n, slots, gated):
        super().__init__()
        self.ngrams = NgramTable(n, slots, d_out, frame)
        self.match = Linear(d_in, d_out) if gated else None

    def forward(self, *inputs):
        y = self.ngrams(inputs[-1])
        if self.match is not None:
            match = (rms_norm(self.match(inputs[0])) * y).sum(-1, keepdim=True) / math.sqrt(y.size(-1))
            y = y * torch.sigmoid(match)
        return y


def sparsemax(scores):
    """Project each row onto the simplex (Martins & Astudillo 2016); -inf marks what is masked.

    The threshold is found without sorting: bisection, then Newton steps from below, which end at the exact support.
    It carries the exact gradient.
    """
    with torch.no_grad():
        top = scores.amax(-1, keepdim=True)
        below = scores - top  # the threshold lies in [-1, 0)
        low, high = torch.full_like(top, -1.0), torch.zeros_like(top)
        for _ in range(8):
            middle = (low + high) / 2
            too_low = F.relu(below - middle).sum(-1, keepdim=True) > 1
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        for _ in range(3):
            support = below > low
            step = (torch.where(support, below, 0.0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
            low = torch.maximum(low, step)
        support = below > low
    kept = torch.where(support, scores - top, 0.0)
    threshold = (kept.sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    return F.relu(torch.where(support, kept - threshold, 0.0))


class Attention(Op, name="attention", mixes_tokens=True):
    """Causal attention (Vaswani et al. 2017), in the forms below, which combine freely.

    kv_heads: each query head its own keys and values, pairs of heads sharing them (Ainslie et al. 2023, GQA), or one
        for all (Shazeer 2019, MQA).
    position: rotary, ALiBi (Press et al. 2022) or none; rope_base and rope_share: see Rotary.
    window: 0 for all, else so many tokens, the last ones (Beltagy et al. 2020, Longformer).
    similarity: dot, cosine (times 10; Henry et al. 2020), additive (Bahdanau et al. 2015, 8 hidden units a head), or
        multiplicative (Luong et al. 2015, a matrix between query and key).
    normalisation: softmax, sparsemax (Martins & Astudillo 2016), relu divided by the number of keys (Wortsman et al.
        2023), sigmoid shifted by the logarithm of that number (Ramapuram et al. 2024).
    temperature: fixed, learned per head, or computed from each query.
    gating: on the values, on what comes out (Qiu et al. 2025), or highway (Srivastava et al. 2015).
    qk_norm: RMS norm of queries and keys (Henry et al. 2020; Dehghani et al. 2023).
    latent: keys and values come out of a bottleneck of that width (DeepSeek-V2 2024, MLA).
    memory: learned tokens that every query sees (Sukhbaatar et al. 2019); for rope, at position 0.
    conv: a depthwise convolution over so many tokens after the projections (So et al. 2021, Primer).
    values: plain, or with something of the token added by a gate of the stream for each head: an embedding of its own
        (value embeddings; modded-nanogpt 2024, after Zhou et al. 2024, value residual), a row for the bigram, or a
        matrix of the frame's embedding, which has no table.
    exclusive: of what comes out, the part along the token's own value is taken away (Zhai 2026, XSA).
    """

    traits = {
        "heads": (2, 1, 4, 8),
        "kv_heads": ("all", "half", "one"),
        "position": ("rope", "none", "alibi"),
        "rope_base": (10_000, 100_000),
        "rope_share": (1.0, 0.5, 0.25),
        "window": (0, 64),
        "similarity": ("dot", "cosine", "additive", "multiplicative"),
        "normalisation": ("softmax", "sparsemax", "relu", "sigmoid"),
        "temperature": ("fixed", "learned", "adaptive"),
        "gating": ("none", "input", "output", "highway"),
        "qk_norm": (True, False),
        "latent": (0, 32, 64, 128),
        "memory": (0, 4, 16),
        "conv": (0, 2, 3, 4),
        "values": ("plain", "token", "bigram", "embedding"),
        "exclusive": (False, True),
    }
    # What costs more than it gains (tests/bench.py worth): a window of 256 is slower than none.
    retired = {"window": (256,), "rope_base": (1_000,)}
    gone = {"pattern": "near"}
    HIDDEN = 8  # units of the additive similarity
    tuned = True  # or four heads take 19 % longer than they need (0.889 ms against 0.745 at width 256, one H200)

    @staticmethod
    def settle(traits):
        traits = dict(traits)
        if traits["heads"] == 1:
            traits["kv_heads"] = "all"
        if traits["heads"] == 2 and traits["kv_heads"] == "half":
            traits["heads"] = 4  # or it would be the same as one
        if traits["position"] != "rope":
            traits.update(rope_base=10_000, rope_share=1.0)
        if traits["similarity"] == "cosine":
            traits["qk_norm"] = False  # cosine normalises them itself
        return traits

    @staticmethod
    def reads(traits):
        more = {"plain": (), "token": ("ids",), "bigram": ("ids",), "embedding": ("embedding",)}
        return ("stream", *more[traits["values"]])

    @staticmethod
    def without_table(traits):
        return {**traits, "values": "plain"} if traits["values"] in ("token", "bigram") else traits

    def __init__(self, d_in, d_out, frame=None, **traits):
        super().__init__()
        for name, value in traits.items():
            setattr(self, name, value)
        self.kv = {"all": self.heads, "half": self.heads // 2, "one": 1}[self.kv_heads]
        D = self.head_dim = d_out // self.heads
        self.q = Linear(d_in, d_out)
        if self.position == "rope":
            self.rotary = Rotary(D, self.rope_base, self.rope_share)
        if self.latent:
            self.down = Linear(d_in, self.latent)
        self.k = Linear(self.latent or d_in, self.kv * D)
        self.v = Linear(self.latent or d_in, self.kv * D)
        self.out = Linear(d_out, d_out)
        if self.conv:
            self.q_taps = nn.Parameter(first_tap(self.conv, d_out))
            self.kv_taps = nn.Parameter(first_tap(self.conv, 2 * self.kv * D))
        if self.values != "plain":
            self.mixed_in = (
                Linear(frame.embed_dim, self.kv * D)
                if self.values == "embedding"
                else NgramTable({"token": 1, "bigram": 2}[self.values], VALUE_SLOTS, self.kv * D, frame)
            )
            self.mix_gate = nn.Parameter(torch.zeros(self.kv, d_in))
        if self.gating != "none":
            self.gate = Linear(d_in, self.kv * D if self.gating == "input" else d_out)
        if self.gating == "highway":
            self.carry = Linear(d_in, d_out) if d_in != d_out else nn.Identity()
        if self.similarity == "multiplicative":
            self.between = Bilinear(self.heads, D)
        if self.similarity == "additive":
            self.q_hidden = nn.Parameter(torch.randn(self.heads, D, self.HIDDEN) / math.sqrt(D))
            self.k_hidden = nn.Parameter(torch.randn(self.heads, D, self.HIDDEN) / math.sqrt(D))
            self.hidden_out = nn.Parameter(torch.randn(self.heads, self.HIDDEN) / math.sqrt(self.HIDDEN))
        if self.temperature == "learned":
            self.log_sharpness = nn.Parameter(torch.zeros(self.heads))
        if self.temperature == "adaptive":
            self.sharpness = nn.Parameter(torch.randn(self.heads, d_in) * 0.1 / math.sqrt(d_in))
        if self.memory:
            self.memory_k = nn.Parameter(torch.randn(self.kv, self.memory, D))
            self.memory_v = nn.Parameter(torch.randn(self.kv, self.memory, D))

    def forward(self, x, token=None):
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in self.project(x, token))  # (B, H, T, D)
        own = v
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.position == "rope":
            q, k = self.rotary(q), self.rotary(k)
        if self.similarity == "cosine":
            q, k = F.normalize(q, dim=-1, eps=1e-3), F.normalize(k, dim=-1, eps=1e-3)  # eps bounds the gradient at 0
            q = q * 10 * math.sqrt(self.head_dim)
        if self.similarity == "multiplicative":
            q = self.between(q)
        y = (self.in_window if self.window else self.in_full)(q, k, v, self.query_sharpness(x))
        if self.exclusive:
            own = F.normalize(own, dim=-1, eps=1e-3).repeat_interleave(self.heads // self.kv, dim=1)
            y = y - (y * own).sum(-1, keepdim=True) * own
        y = y.transpose(1, 2).reshape(B, T, -1)
        if self.gating == "output":
            y = y * torch.sigmoid(self.gate(x))
        y = self.out(y)
        if self.gating == "highway":
            g = torch.sigmoid(self.gate(x))
            y = g * y + (1 - g) * self.carry(x)
        return y

    def project(self, x, token):
        """Queries (B, T, H * D), keys and values (B, T, kv * D). token: what the values read beside the stream."""
        q_taps, kv_taps = (self.q_taps, self.kv_taps) if self.conv else (None, None)
        if self.latent:
            (q,), (latent,) = fused_linear(x, self.q, taps=q_taps), fused_linear(x, self.down)
            k, v = fused_linear(rms_norm(latent), self.k, self.v, taps=kv_taps)
        else:
            taps = torch.cat([q_taps, kv_taps], dim=1) if self.conv else None
            q, k, v = fused_linear(x, self.q, self.k, self.v, taps=taps)
        if self.values != "plain":
            share = 2 * torch.sigmoid(F.linear(x, self.mix_gate.to(x.dtype)))  # (B, T, kv)
            v = v + share.repeat_interleave(self.head_dim, dim=-1) * self.mixed_in(token)
        if self.gating == "input":
            v = v * torch.sigmoid(self.gate(x))
        return q, k, v

    def query_sharpness(self, x):
        """Inverse temperature: None, (1, H, 1, 1) or (B, H, T, 1)."""
        if self.temperature == "learned":
            return self.log_sharpness.exp().to(x.dtype).view(1, -1, 1, 1)
        if self.temperature == "adaptive":
            return torch.tanh(F.linear(x, self.sharpness.to(x.dtype))).exp().transpose(1, 2).unsqueeze(-1)
        return None

    def learned(self, like):
        """Keys and values of the memory, each (B, kv, memory, D); none without one. like: (B, ...)

        The keys are of length 1 where the similarity is a cosine, as the others are then.
        """
        if not self.memory:
            return []
        k = self.memory_k.to(like.dtype)
        k = F.normalize(k, dim=-1, eps=1e-3) if self.similarity == "cosine" else k
        return [t.expand(like.size(0), -1, -1, -1) for t in (k, self.memory_v.to(like.dtype))]

    def in_full(self, q, k, v, sharpness):
        """Weigh (B, kv, T, D) values by the similarity of (B, H, T, D) queries and (B, kv, T, D) keys."""
        if self.memory:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.learned(k), (k, v), strict=True))
        position = torch.arange(q.size(2), device=q.device)
        back = position[:, None] - position
        back = F.pad(back, (self.memory, 0))  # what was learned is no tokens back
        shared = self.kv != self.heads
        if self.normalisation == "softmax" and self.similarity != "additive":
            q = q * sharpness if sharpness is not None else q
            plain = not self.memory and self.position != "alibi"
            bias = None if plain else self.bias(back, back < 0)[None].to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=plain, enable_gqa=shared)
        if shared:
            k, v = (t.repeat_interleave(self.heads // self.kv, dim=1) for t in (k, v))
        return self.weigh(q, k, v, sharpness, back, back < 0)

    def in_window(self, q, k, v, sharpness):
        """As in_full, but each query sees a window. Tokens are cut into blocks as long as that, and the queries of one
        see its own keys and those of the block before: T * 2 * window scores in place of T * T."""
        B, H, T, W = *q.shape[:3], self.window
        k, v = (t.repeat_interleave(H // self.kv, dim=1) for t in (k, v))

        def blocks(t):
            """(B, H, T, D) -> (B, H, N, W, D)."""
            return F.pad(t, (0, 0, 0, -T % W)).view(B, H, -1, W, t.size(-1))

        def with_before(t):
            return torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t], dim=3)  # (B, H, N, 2 * W, D)

        k, v = with_before(blocks(k)), with_before(blocks(v))
        N, place = k.size(2), torch.arange(2 * W, device=q.device)
        block, back = torch.arange(N, device=q.device)[:, None, None], W + place[:W, None] - place
        missing = (block == 0) & (place < W)  # before the first block
        hidden = (back < 0) | (back >= W) | missing
        back, hidden = (F.pad(t, (self.memory, 0)) for t in (back.expand(N, -1, -1), hidden))
        if self.memory:
            learned = (t.repeat_interleave(H // self.kv, dim=1)[:, :, None] for t in self.learned(q))
            k, v = (
                torch.cat([t.expand(-1, -1, N, -1, -1), near], dim=3) for t, near in zip(learned, (k, v), strict=True)
            )
        sharpness = sharpness if sharpness is None else blocks(sharpness.expand(B, -1, T, -1))
        return self.weigh(blocks(q), k, v, sharpness, back, hidden).flatten(2, 3)[:, :, :T]

    def weigh(self, q, k, v, sharpness, back, hidden):
        """Weigh (B, H, ..., S, D) values by the similarity of (B, H, ..., T, D) queries and (B, H, ..., S, D) keys.

        back: (..., T, S) how many tokens back a key is. hidden: (..., T, S) whether the query must not see it.
        """
        if self.similarity == "additive":
            inner = [1] * (q.dim() - 4)
            a, b = (
                (t @ w.to(t.dtype).view(self.heads, *inner, self.head_dim, -1)).unsqueeze(axis)
                for t, w, axis in ((q, self.q_hidden, -2), (k, self.k_hidden, -3))
            )  # (B, H, ..., T, 1, hidden) and (B, H, ..., 1, S, hidden)
            weight = self.hidden_out.to(q.dtype).view(self.heads, *inner, 1, 1, -1)
            scores = sum(weight[..., i] * torch.tanh(a[..., i] + b[..., i]) for i in range(self.HIDDEN))
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        scores = scores * sharpness if sharpness is not None else scores
        scores = scores.float() + self.bias(back, hidden)
        if self.normalisation == "softmax":
            weights = scores.softmax(-1)
        elif self.normalisation == "sparsemax":
            weights = sparsemax(scores)
        else:
            seen = (~hidden).sum(-1, keepdim=True).float()
            weights = F.relu(scores) / seen if self.normalisation == "relu" else torch.sigmoid(scores - seen.log())
        return weights.to(v.dtype) @ v

    def bias(self, back, hidden):
        """What is added to scores, float32, (1 or H, ..., T, S): ALiBi, and -inf where a key is hidden."""
        bias = torch.zeros(1, *back.shape, device=back.device)
        if self.position == "alibi":
            slope = 2.0 ** (-8 * torch.arange(1, self.heads + 1, device=back.device) / self.heads)
            bias = -slope.view(-1, *[1] * back.dim()) * back
        return bias.masked_fill(hidden, -math.inf)


class Bilinear(nn.Module):
    """A matrix for each head, the identity at the start: (B, H, T, D) -> (B, H, T, D)."""

    def __init__(self, heads, head_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    def forward(self, q):
        return q @ self.weight.transpose(-1, -2).to(q.dtype)


def chunks(x):
    """Cut (B, H, T, D) into (B, H, N, CHUNK, D), zeros at the end."""
    B, H, T, D = x.shape
    return F.pad(x, (0, 0, 0, -T % CHUNK)).view(B, H, -1, CHUNK, D)


def carry_over(states, total):
    """Sum over earlier chunks m < n of states[m], decayed by everything between: the state before chunk n.

    states: (B, H, N, D, V) what each chunk adds; total: (B, H, N, D) log decay over each chunk.
    """
    N = total.size(2)
    end = total.cumsum(2)  # log decay from the first token to the end of each chunk
    # To its start. Not end - total: that is rounded differently as the chunk's own tokens change, and so the state
    # before a chunk would depend, in its last bit, on tokens that come later.
    start = F.pad(end, (0, 0, 1, 0))[:, :, :N]
    between = start[:, :, :, None] - end[:, :, None]  # (B, H, N, M, D), <= 0 for m < n
    earlier = torch.ones(N, N, device=total.device, dtype=torch.bool).tril(-1)[:, :, None]
    decay = torch.where(earlier, between, -math.inf).exp().to(states.dtype)
    decay, states = decay.permute(0, 1, 4, 2, 3), states.transpose(2, 3)  # (B, H, D, N, M), (B, H, D, M, V)
    return (decay @ states).transpose(2, 3)


def linear_attention(q, k, v, log_decay):
    """o_t = q_t S_t with S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_t', by chunks (Yang et al. 2024, GLA).

    q, k: (B, H, T, D), v: (B, H, T, V), log_decay: (B, H, T, D) float32 in [MIN_LOG_DECAY, 0] -> (B, H, T, V).
    """
    T = q.size(2)
    q, k, v, g = chunks(q), chunks(k), chunks(v), chunks(log_decay)
    since = g.cumsum(3)  # log decay from the start of the chunk, this token's included
    total = since[:, :, :, -1]
    # Not since - total / 2: total depends on later tokens, which would show in how this rounds.
    from_middle = since + HALFWAY
    inside = (q * from_middle.exp().to(q.dtype)) @ (k * (-from_middle).exp().to(k.dtype)).transpose(-1, -2)
    inside = inside.tril() @ v
    added = (k * (total[:, :, :, None] - since).exp().to(k.dtype)).transpose(-1, -2) @ v  # (B, H, N, D, V)
    before = (q * since.exp().to(q.dtype)) @ carry_over(added, total)
    return (inside + before).flatten(2, 3)[:, :, :T]


class Retention(Op, name="retention", mixes_tokens=True):
    """A linear-time mixer, by chunks.

    Linear attention (Katharopoulos et al. 2020), RetNet (Sun et al. 2023) and GLA (Yang et al. 2024) are its corners.
    decay: none, fixed for each head as in RetNet, learned for each head, or computed for each key channel from the
    token (data). What comes out of each head is RMS-normed, and with gating multiplied by silu of a matrix of x.
    """

    traits = {
        "heads": (4, 1, 2, 8),
        "decay": ("fixed", "none", "learned", "data"),
        "position": ("rope", "none"),
        "gating": ("output", "none"),
    }
    gone = {"write": "add"}

    def __init__(self, d_in, d_out, heads, decay, position, gating):
        super().__init__()
        self.heads, self.decay, self.position, self.gating = heads, decay, position, gating
        self.q, self.k, self.v = Linear(d_in, d_out), Linear(d_in, d_out), Linear(d_in, d_out)
        self.out = Linear(d_out, d_out)
        if position == "rope":
            self.rotary = Rotary(d_out // heads)
        if decay == "learned":
            fixed = -torch.log1p(-(2.0 ** (-5 - torch.arange(heads))))
            self.decay_logit = nn.Parameter(fixed.expm1().log())  # softplus gives RetNet's own at the start
        if decay == "data":
            self.forget = Linear(d_in, d_out)
        if gating == "output":
            self.gate = Linear(d_in, d_out)

    def log_decay(self, x):
        """(B, H, T, D) float32."""
        B, T, _ = x.shape
        D = self.q.weight.size(0) // self.heads
        if self.decay == "data":
            forget = F.logsigmoid(self.forget(x).float()) / 16
            return forget.clamp(min=MIN_LOG_DECAY).view(B, T, self.heads, D).transpose(1, 2)
        if self.decay == "none":
            by_head = torch.zeros(self.heads, device=x.device)
        elif self.decay == "fixed":
            by_head = torch.log1p(-(2.0 ** (-5 - torch.arange(self.heads, device=x.device))))
        else:
            by_head = -F.softplus(self.decay_logit)
        return by_head.clamp(min=MIN_LOG_DECAY).view(1, -1, 1, 1).expand(B, -1, T, D)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v, *gate = fused_linear(x, self.q, self.k, self.v, *([self.gate] if self.gating == "output" else []))
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        if self.position == "rope":
            q, k = self.rotary(q), self.rotary(k)
        y = linear_attention(q, k / math.sqrt(k.size(-1)), v, self.log_decay(x))
        y = rms_norm(y).transpose(1, 2).reshape(B, T, -1)
        return self.out(y * F.silu(*gate) if gate else y)


class Ssm(Op, name="ssm", mixes_tokens=True):
    """A selective gated linear recurrence h_t = a_t h_(t-1) + (1 - a_t) u_t for each channel, by parallel scan.

    a and u are computed from the token (Gu & Dao 2023, Mamba; De et al. 2024, Griffin; Feng et al. 2024, minGRU).
    gating: silu of a matrix of x times the state, or none.
    """

    traits = {"gating": ("output", "none")}

    def __init__(self, d_in, d_out, gating):
        super().__init__()
        self.gating = gating
        self.u, self.forget, self.out = Linear(d_in, d_out), Linear(d_in, d_out), Linear(d_out, d_out)
        # from -6 to 1: half-lives from 280 tokens to less than one
        self.forget_bias = nn.Parameter(7 * torch.arange(d_out) / (d_out - 1) - 6)
        if gating == "output":
            self.gate = Linear(d_in, d_out)

    def forward(self, x):
        T = x.size(1)
        u, forget, *gate = fused_linear(x, self.u, self.forget, *([self.gate] if self.gating == "output" else []))
        log_a = -F.softplus(forget.float() + self.forget_bias).clamp(max=-MIN_LOG_DECAY)
        g, u = (chunks(t.unsqueeze(1)) for t in (log_a, -torch.expm1(log_a) * u.float()))  # (B, 1, N, CHUNK, C)
        since = g.cumsum(3)
        from_middle = since + HALFWAY
        inside = from_middle.exp() * (u * (-from_middle).exp()).cumsum(3)
        added = inside[:, :, :, -1, :, None]  # (B, 1, N, C, 1) the state that each chunk leaves
        before = carry_over(added, since[:, :, :, -1]).squeeze(-1).unsqueeze(3)
        h = (inside + since.exp() * before).flatten(1, 3)[:, :T].to(x.dtype)
        return self.out(h * F.silu(*gate) if gate else h)


class Gru(Op, name="gru", mixes_tokens=True):
    """A gated recurrent unit (Cho et al. 2014), one token after the other, by cuDNN on a GPU."""

    compiles = False

    def __init__(self, d_in, d_out):
        super().__init__()
        self.x_to_h = Linear(d_in, 3 * d_out)
        self.h_to_h = Linear(d_out, 3 * d_out)
        self.bias = nn.Parameter(torch.zeros(2, 3 * d_out))

    def forward(self, x):
        weights = [self.x_to_h.weight, self.h_to_h.weight, self.bias[0], self.bias[1]]
        start = x.new_zeros(1, x.size(0), self.h_to_h.weight.size(1))
        flags = dict(has_biases=True, num_layers=1, dropout=0.0, train=True, bidirectional=False, batch_first=True)
        return torch.gru(x, start, [w.to(x.dtype).contiguous() for w in weights], *flags.values())[0]


class Gate(Op, name="gate"):
    """A channel mixer, gated (Shazeer 2020): out(kind(gate(x)) * up(x)), hidden width 2/3 * expansion * d_out; or
    plain: out(kind(up(x))), hidden width expansion * d_out, which has as many parameters."""

    traits = {
        "kind": ("silu", "gelu", "relu", "sigmoid", "relu2", "leaky_relu2"),
        "expansion": (4, 1, 2),
        "gated": (True, False),
    }

    def __init__(self, d_in, d_out, kind, expansion, gated):
        super().__init__()
        hidden = -(-expansion * d_out * 2 // 3 // 64) * 64 if gated else expansion * d_out
        self.kind = torch.sigmoid if kind == "sigmoid" else ACTIVATIONS[kind]
        self.gate = Linear(d_in, hidden) if gated else None
        self.up, self.out = Linear(d_in, hidden), Linear(hidden, d_out)

    def forward(self, x):
        if self.gate is None:
            return self.out(self.kind(self.up(x)))
        gate, up = fused_linear(x, self.gate, self.up)
        return self.out(self.kind(gate) * up)


class Norm(Op, name="norm", keeps_width=True):
    """RMS norm (Zhang & Sennrich 2019) or layer norm (Ba et al. 2016), with a learned gain."""

    traits = {"kind": ("rms", "layer")}

    def __init__(self, d_in, d_out, kind):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d_in))
        self.bias = nn.Parameter(torch.zeros(d_in)) if kind == "layer" else None

    def forward(self, x):
        if self.bias is None:
            return rms_norm(x, self.gain)
        return F.layer_norm(x, (x.size(-1),), self.gain.to(x.dtype), self.bias.to(x.dtype))


class Identity(Op, name="identity", keeps_width=True):
    """Nothing: with skip a sum of two earlier genes, with an activation that activation."""

    def __init__(self, d_in, d_out):
        super().__init__()

    def forward(self, x):
        return x


def has_grouped_mm() -> bool:
    """Whether grouped matrix products can be used, which is on Hopper GPUs alone.

    On older ones they wait for the CPU, which a CUDA graph cannot do. On newer ones experts that get no tokens get
    wrong gradients (https://github.com/pytorch/pytorch/issues/172439).
    """
    return torch.cuda.get_device_capability()[0] == 9


# What torch.compiler.assume_constant_result does, which to do it loads the compiler: half of the time that `import
# genome` took.
has_grouped_mm._dynamo_marked_constant = True


class MoeRouter(Op, name="moe_router"):
    """A mixture of expert MLPs (relu squared, hidden width d_out), chosen for each token by itself.

    routing: soft, every expert weighed by a softmax (Jordan & Jacobs 1994); top1 (Fedus et al. 2021, Switch) or top2
    (Shazeer et al. 2017) with no capacity, so no token is dropped and none sees another. shared: one more expert that
    every token takes (Dai et al. 2024, DeepSeekMoE).
    """

    traits = {"experts": (4, 2, 8), "routing": ("soft", "top1", "top2"), "shared": (False, True)}

    @staticmethod
    def settle(traits):
        both = traits["experts"] == 2 and traits["routing"] == "top2"  # 2 of 2 experts is all of them
        return {**traits, "routing": "soft"} if both else traits

    def __init__(self, d_in, d_out, experts, routing, shared):
        super().__init__()
        self.top = {"soft": experts, "top1": 1, "top2": 2}[routing]
        self.router = Linear(d_in, experts)
        self.up = Experts(experts, d_in, d_out)
        self.out = Experts(experts, d_out, d_out)
        if shared:
            self.shared_up, self.shared_out = Linear(d_in, d_out), Linear(d_out, d_out)
        self.shared = shared

    def forward(self, x):
        B, T, C = x.shape
        flat = x.reshape(B * T, C)
        probs = self.router(flat).float().softmax(-1)  # (B * T, experts)
        grouped = self.top < probs.size(-1) and x.is_cuda and x.dtype == torch.bfloat16 and has_grouped_mm()
        y = self.by_groups(flat, probs) if grouped else self.by_mask(flat, probs)
        if self.shared:
            y = y + self.shared_out(F.relu(self.shared_up(flat)).square())
        return y.view(B, T, -1)

    def by_mask(self, x, probs):
        """Every expert on every token, weighed by 0 where it was not chosen: one fused MLP."""
        if self.top < probs.size(-1):
            chosen = torch.zeros_like(probs).scatter(-1, probs.topk(self.top, dim=-1).indices, 1.0)
            probs = probs * chosen
        E, hidden, d_in = self.up.weight.shape
        h = F.relu(F.linear(x, self.up.weight.to(x.dtype).view(E * hidden, d_in))).square()
        h = (h.view(-1, E, hidden) * probs.to(x.dtype)[:, :, None]).flatten(1)
        return F.linear(h, torch.cat(list(self.out.weight), dim=1).to(x.dtype))

    def by_groups(self, x, probs):
        """Only the chosen experts: tokens sorted by expert, one grouped matrix product for each layer."""
        weight, expert = probs.topk(self.top, dim=-1)  # (N, top)
        order = expert.flatten().argsort(stable=True)
        ends = F.one_hot(expert.flatten(), probs.size(-1)).sum(0).cumsum(0).to(torch.int32)
        token = order // self.top
        h = F.relu(F.grouped_mm(x[token], self.up.weight.to(x.dtype).transpose(1, 2), offs=ends)).square()
        h = h * weight.flatten()[order, None].to(x.dtype)
        y = F.grouped_mm(h, self.out.weight.to(x.dtype).transpose(1, 2), offs=ends)
        back = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=x.device))
        return y[back].view(x.size(0), self.top, -1).sum(1)


class Experts(nn.Module):
    """A matrix for each expert, (experts, d_out, d_in)."""

    def __init__(self, experts, d_in, d_out):
        super().__init__()
        bound = math.sqrt(3 / d_in)
        self.weight = nn.Parameter(torch.empty(experts, d_out, d_in).uniform_(-bound, bound))


class Memory(Op, name="memory"):
    """A learned bank of keys and values that each token looks up by itself (Sukhbaatar et al. 2019)."""

    traits = {"slots": (256, 64, 512)}

    def __init__(self, d_in, d_out, slots):
        super().__init__()
        self.keys, self.out = Linear(d_in, slots), Linear(slots, d_out)

    def forward(self, x):
        return self.out(self.keys(x).float().softmax(-1).to(x.dtype) * math.sqrt(self.out.weight.size(1)))


# ------------------------------------------------------------------------------------------------------------------
# Gene and Genome: immutable, valid by construction, JSON both ways.


class GenomeError(ValueError):
    """A gene or genome that cannot be; the message names the field."""


def shown(value) -> str:
    """A value from a file as it may stand in a message: short, printable, and never written out whole first."""
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**15):
        return str(value)
    return f"a value of type {type(value).__name__}"


def check_choice(where: str, value, choices: tuple):
    """Return value if it is one of the choices, type included: True does not pass for 1."""
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    raise GenomeError(f"{where}: {shown(value)} is not one of {', '.join(map(str, choices))}")


def check_width(where: str, value):
    if type(value) is not int or value % WIDTH_STEP or not WIDTH_STEP <= value <= MAX_WIDTH:
        raise GenomeError(f"{where}: {shown(value)} is not a multiple of {WIDTH_STEP} up to {MAX_WIDTH:,}")


def check_distance(where: str, value, smallest: int):
    if type(value) is not int or not smallest <= value <= MAX_GENES:
        raise GenomeError(f"{where}: {shown(value)} is not a distance from {smallest} to {MAX_GENES}")


def unique_fields(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object as a dict; a field that stands in it twice is refused."""
    fields = {}
    for name, value in pairs:
        if name in fields:
            raise GenomeError(f"the field {shown(name)} stands there twice")
        fields[name] = value
    return fields


@dataclass(frozen=True)
class Gene:
    """One operation. Gene("attention", 256, skip=2, heads=8); traits that are not named take their default.

    op: a name in OPS. dim: channels it puts out, a multiple of 64 (None for ops that keep the width of their input).
    input: it reads the gene this far back (1 the one before; the first gene reads the embedding). skip: what came out
    this far back is added (0 nothing; 1 is a residual around this gene alone). Raises GenomeError.
    """

    op: str
    dim: int | None = None
    activation: str = "none"
    input: int = 1
    skip: int = 0
    repeat: int = 1
    scale: str = "none"
    stride: int = 1
    traits: tuple[tuple[str, object], ...] = ()

    def __init__(self, /, op, dim=None, activation="none", input=1, skip=0, repeat=1, scale="none", stride=1, **traits):
        check_choice("op", op, tuple(OPS))
        if traits.pop("share", 0) != 0:  # earlier files have a 0 there
            raise GenomeError(f"{op}.share: shared weights are no longer part of genesis")
        declared, gone = OPS[op].traits, OPS[op].gone
        traits = {name: value for name, value in traits.items() if name not in gone or value != gone[name]}
        unknown = next((name for name in traits if name not in declared), None)
        if unknown is not None:
            raise GenomeError(f"{op}: no trait {shown(unknown)}; it has {', '.join(declared) or 'none'}")
        if OPS[op].keeps_width and dim is not None:
            raise GenomeError(f"{op}.dim: keeps the width of its input, so dim has to be null")
        if not OPS[op].keeps_width:
            check_width(f"{op}.dim", dim)
        check_distance(f"{op}.input", input, 1)
        check_distance(f"{op}.skip", skip, 0)
        scale = {False: "none", True: "channel"}.get(scale, scale) if type(scale) is bool else scale  # earlier files
        for name, value in {"activation": activation, "repeat": repeat, "scale": scale, "stride": stride}.items():
            check_choice(f"{op}.{name}", value, WIRING[name] + WIRING_RETIRED.get(name, ()))
        full = {n: c[0] for n, c in declared.items()}
        for name, value in traits.items():
            full[name] = check_choice(f"{op}.{name}", value, declared[name] + OPS[op].retired.get(name, ()))
        full = OPS[op].settle(full)
        alone = "stream" not in OPS[op].reads(full)
        if alone or (op, activation) in (("identity", "none"), ("identity", "relu"), ("norm", "none")):
            repeat = 1  # once more changes nothing
        input = 1 if alone else input
        scale = scale if skip else "none"  # without a skip a gain does nothing that the next matrix or norm could not
        values = (op, dim, activation, input, skip, repeat, scale, stride, tuple(full.items()))
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)

    def __getattr__(self, name):
        """gene.heads for a trait."""
        for trait, value in self.__dict__.get("traits", ()):
            if trait == name:
                return value
        raise AttributeError(name)

    def change(self, **changes) -> Gene:
        """The same gene with some fields or traits changed."""
        return Gene(**{**self.to_dict(), **changes}) if changes else self

    def to_dict(self) -> dict:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "traits"}
        return {**own, **dict(self.traits)}

    @functools.cached_property
    def bare(self) -> Gene:
        """The gene without its distances: what it takes to build it, once the widths it reads are known."""
        return self.change(input=1, skip=min(self.skip, 1))

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """Which of stream, ids and embedding the op takes."""
        return OPS[self.op].reads(dict(self.traits))

    @functools.cached_property
    def unusual(self) -> tuple[tuple[str, object], ...]:
        """The traits, wiring included, that are not as usual, each with what they are."""
        wiring = [(name, getattr(self, name), choices) for name, choices in WIRING.items()]
        own = [(name, value, OPS[self.op].traits[name]) for name, value in self.traits]
        return tuple((name, value) for name, value, choices in wiring + own if value != choices[0])

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether it is its op and nothing else."""
        return self.activation == "none" and not self.skip and self.stride == 1

    @functools.cached_property
    def adds_nothing(self) -> bool:
        """Whether it only hands on what it reads."""
        return self.op == "identity" and self.is_plain

    @functools.cached_property
    def is_plain_norm(self) -> bool:
        """Whether it is an RMS norm and nothing else, so that another one after it changes nothing but a gain."""
        return self.op == "norm" and self.kind == "rms" and self.is_plain


class Node(NamedTuple):
    """A gene as it stands in the network: state 0 is the embedding, state i what node i - 1 puts out."""

    gene: Gene
    source: int | None  # the state it reads; None where its op does not read the stream
    skip: int | None  # the state that is added
    d_in: int | None
    d_skip: int | None
    d_out: int
    at: int  # which gene of the genome it is, from 1


def folded(items: tuple) -> list[tuple[tuple, int]]:
    """A sequence as runs of up to 8 items, each with how often it stands there in a row."""
    runs, i = [], 0
    while i < len(items):
        best, times = 1, 1
        for size in range(1, 9):
            n = 1
            while items[i : i + size] == items[i + n * size : i + (n + 1) * size]:
                n += 1
            if n > 1 and (n - 1) * size > (times - 1) * best:
                best, times = size, n
        runs.append((items[i : i + best], times))
        i += best * times
    return runs


@dataclass(frozen=True)
class Genome:
    """A sequence of genes between the embedding and the head. Raises GenomeError unless it can be built.

    A distance that reaches beyond the first gene is refused. What no path from the head reads, and identities that do
    nothing, are part of the genome but not of its network, its parameters or its key.
    """

    genes: tuple[Gene, ...]
    embed_dim: int = 256
    lr_factor: float = 1.0
    tied: bool = False
    network: tuple[Node, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "genes", tuple(self.genes))
        if not 1 <= len(self.genes) <= MAX_GENES:
            raise GenomeError(f"genes: a genome has 1 to {MAX_GENES} of them")
        check_width("embed_dim", self.embed_dim)
        for name in ("lr_factor", "tied"):
            check_choice(name, getattr(self, name), GENOME_TRAITS[name])
        for i, gene in enumerate(self.genes, start=1):
            for name in ("input", "skip"):
                if getattr(gene, name) > i:
                    raise GenomeError(f"genes[{i - 1}].{name}: {getattr(gene, name)} reaches beyond the embedding")
        object.__setattr__(self, "network", self._network())

    def _network(self, up_to_gains: bool = False) -> tuple[Node, ...]:
        """The nodes in the order in which they run: each after what it reads, whatever the order of the genes.

        With up_to_gains plain norms are left out where they do nothing but a gain: where what they read is normed
        already, and before the head, which norms.
        """
        genes = self.genes
        stands_for = [0]  # for each state, the state that holds the same value (identities that do nothing fall away)
        normed = {0}  # states, of which the embedding is one
        for i, gene in enumerate(genes, start=1):
            source = stands_for[i - gene.input]
            again = up_to_gains and gene.is_plain_norm and source in normed
            stands_for.append(source if gene.adds_nothing or again else i)
            if gene.is_plain_norm:
                normed.add(i)
        last = stands_for[-1]
        if up_to_gains and last and last in normed:
            last = stands_for[last - genes[last - 1].input]
        place, order = {0: 0}, []

        def visit(i):
            if i not in place:
                gene = genes[i - 1]
                if "stream" in gene.reads:
                    visit(stands_for[i - gene.input])
                if gene.skip:
                    visit(stands_for[i - gene.skip])
                order.append(i)
                place[i] = len(order)

        visit(last)
        widths, nodes = [self.embed_dim], []
        for i in order:
            gene = genes[i - 1]
            source = place[stands_for[i - gene.input]] if "stream" in gene.reads else None
            skip = place[stands_for[i - gene.skip]] if gene.skip else None
            d_in = None if source is None else widths[source]
            d_out = d_in if OPS[gene.op].keeps_width else gene.dim
            widths.append(d_out)
            nodes.append(Node(gene, source, skip, d_in, None if skip is None else widths[skip], d_out, i))
        return tuple(nodes)

    @functools.cached_property
    def key(self) -> str:
        """A hash of what the genome computes and how it is trained; genomes of one key differ in a gain at most."""
        parts = [
            (n.gene.op, n.d_out, n.gene.activation, n.gene.repeat, n.gene.scale, n.gene.stride, n.gene.traits,
             n.source, n.skip)
            for n in self._network(up_to_gains=True)
        ]  # fmt: skip
        text = json.dumps([parts, self.embed_dim, self.lr_factor, self.tied])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def mixes_tokens(self) -> bool:
        return any(OPS[node.gene.op].mixes_tokens or node.gene.stride > 1 for node in self.network)

    @property
    def d_out(self) -> int:
        """Channels that reach the head."""
        return self.network[-1].d_out if self.network else self.embed_dim

    @functools.cached_property
    def ops(self) -> tuple[str, ...]:
        """Those of its network, in order."""
        return tuple(node.gene.op for node in self.network)

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The genes of its network, each in words: its op, its width, and what is not as usual."""
        genes = [node.gene for node in self.network]
        return tuple(" ".join([g.op, str(g.dim or ""), *(f"{n}={v}" for n, v in g.unusual)]) for g in genes)

    @property
    def summary(self) -> str:
        """The ops in a line, runs that repeat written once: (norm→attention→norm→gate)×6."""
        parts = []
        for run, times in folded(self.ops):
            text = "→".join(run)
            parts.append(text if times == 1 else f"({text})×{times}" if len(run) > 1 else f"{text}×{times}")
        return "→".join(parts) or "nothing"

    def num_params(self, vocab_size: int) -> int:
        """Parameters of Model(self, vocab_size), without allocating them."""
        frame = Frame(vocab_size, self.embed_dim)
        blocks = sum(block_params(n.gene.bare, n.d_in, n.d_skip, frame) for n in self.network)
        embedding = vocab_size * self.embed_dim
        if not self.tied:
            return blocks + embedding + vocab_size * self.d_out
        return blocks + embedding + (self.d_out * self.embed_dim if self.d_out != self.embed_dim else 0)

    def to_json(self) -> str:
        own = {name: getattr(self, name) for name in GENOME_TRAITS}
        return json.dumps({**own, "genes": [gene.to_dict() for gene in self.genes]})

    def __reduce__(self):
        """Pickled by its text: another thread may just then be adding to what is cached here."""
        return Genome.from_json, (self.to_json(),)

    @classmethod
    @functools.cache  # a run reads the genomes of its whole record again and again; each takes 8 KB, its text 2 KB
    def from_json(cls, text: str) -> Genome:
        """Read what to_json wrote. Raises GenomeError on anything else; builds nothing that the text asks for."""
        if not isinstance(text, str) or len(text) > MAX_JSON:
            raise GenomeError(f"a genome is a text of at most {MAX_JSON:,} characters")
        try:
            data = json.loads(text, object_pairs_hook=unique_fields)
        except GenomeError:
            raise
        except (ValueError, RecursionError) as error:
            raise GenomeError(f"not JSON: {str(error)[:100]}") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data) -> Genome:
        """Read what json.loads makes of such a text. Raises GenomeError, naming the field, on anything else."""
        if not isinstance(data, dict) or not isinstance(data.get("genes"), list):
            raise GenomeError("genes: a genome is an object with a list of genes")
        unknown = next((name for name in data if name not in ("genes", *GENOME_TRAITS)), None)
        if unknown is not None:
            raise GenomeError(f"no field {shown(unknown)}; a genome has genes, {', '.join(GENOME_TRAITS)}")
        genes = []
        for i, gene in enumerate(data["genes"][: MAX_GENES + 1]):  # one too many is enough to refuse them all
            if not isinstance(gene, dict) or not all(isinstance(name, str) for name in gene):
                raise GenomeError(f"genes[{i}]: a gene is an object with the name of an op")
            try:
                genes.append(Gene(**{"op": None, **gene}))
            except GenomeError as error:
                raise GenomeError(f"genes[{i}]: {error}") from None
        return cls(**{**data, "genes": genes})


# ------------------------------------------------------------------------------------------------------------------
# Model: a fixed frame (embedding, RMS norm, the genes, RMS norm, head, soft-cap) around a genome's network.


def group(x, stride: int):
    """(B, T, C) -> (B, max(1, T // stride), C), the means of so many tokens each; of ids (B, T) the last ones.

    A group that lacks tokens is never seen.
    """
    if x.size(1) < stride:
        x = F.pad(x, (0,) * (2 * x.dim() - 4) + (0, stride - x.size(1)))
    if x.dim() == 2:
        return x[:, stride - 1 :: stride]
    return x[:, : x.size(1) // stride * stride].unflatten(1, (-1, stride)).mean(2)


def ungroup(y, stride: int, T: int):
    """Back to T tokens: what was made of tokens gs to gs + s - 1 is seen from the last of them on; zeros before."""
    return F.pad(y.repeat_interleave(stride, dim=1), (0, 0, stride - 1, 0))[:, :T]


class Block(nn.Module):
    """A gene as built: (B, T, d_in) that it reads, (B, T, d_skip) that is added, ids, embedding -> (B, T, d_out).

    What the gene does not use may be None.
    """

    def __init__(self, gene: Gene, d_in: int | None, d_skip: int | None, frame: Frame):
        super().__init__()
        cls = OPS[gene.op]
        d_out = d_in if cls.keeps_width else gene.dim
        self.gene, self.d_in, self.d_out = gene, d_in, d_out
        self.resize = Linear(d_in, d_out) if gene.repeat > 1 and d_in != d_out else None
        more = {} if gene.reads == ("stream",) else {"frame": frame}
        self.op = cls(d_out if gene.repeat > 1 else d_in, d_out, **more, **dict(gene.traits))
        gain = SCALE_START.get(gene.scale)
        self.gain = None if gain is None else nn.Parameter(torch.full((d_out,), gain))
        self.project = Linear(d_skip, d_out) if d_skip is not None and d_skip != d_out else None
        for last in (getattr(self.op, name, None) for name in ("out", "shared_out")):
            if d_skip is not None and last is not None:
                last.weight.data *= RESIDUAL_INIT

    def forward(self, x, skip=None, ids=None, embedding=None):
        B, T = next(t for t in (x, ids, embedding) if t is not None).shape[:2]
        gene, stride = self.gene, self.gene.stride
        given = {"stream": x, "ids": ids, "embedding": embedding}
        given = {name: given[name] for name in gene.reads}
        if stride > 1:
            given = {name: group(t, stride) for name, t in given.items()}
        if self.resize is not None:
            given["stream"] = self.resize(given["stream"])
        for _ in range(gene.repeat):
            y = ACTIVATIONS[gene.activation](self.op(*given.values()))
            expected = (B, max(1, T // stride), self.d_out)
            if y.shape != expected:  # it could still be broadcast when the skip is added
                raise ValueError(f"{gene.op} put out {tuple(y.shape)}, not {expected}")
            given |= {"stream": y} if "stream" in given else {}
        if stride > 1:
            y = ungroup(y, stride, T)
        if self.gain is not None:
            y = y * self.gain.to(y.dtype)
        if skip is not None:
            y = y + (self.project(skip) if self.project is not None else skip)
        return y.contiguous()  # the next gene was compiled for this layout


@functools.lru_cache(maxsize=100_000)
def block_params(gene: Gene, d_in: int | None, d_skip: int | None, frame: Frame) -> int:
    """Parameters of a Block."""
    with torch.device("meta"):
        block = Block(gene, d_in, d_skip, frame)
    return sum(p.numel() for p in block.parameters())


class Embed(nn.Module):
    """Tokens to normed embeddings: (B, T) int64 -> (B, T, embed_dim) in `dtype`."""

    def __init__(self, vocab_size: int, embed_dim: int, dtype: torch.dtype):
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocab_size, embed_dim))
        self.dtype = dtype

    def forward(self, idx):
        return rms_norm(F.embedding(idx, self.table).to(self.dtype))


class Head(nn.Module):
    """What the logits are a product of: (B, T, d) -> (B, T, d) normed, and a matrix (vocab_size, d), of one dtype.

    A tied head has no matrix of its own: it is given the table of the embedding, tied_dim wide, and where its input has
    another width, it projects that first.
    """

    def __init__(self, vocab_size: int, d_in: int, tied_dim: int | None):
        super().__init__()
        self.project = Linear(d_in, tied_dim) if tied_dim not in (None, d_in) else None
        self.matrix = nn.Parameter(torch.randn(vocab_size, d_in) * 0.001) if tied_dim is None else None

    def forward(self, x, table=None):
        x = rms_norm(x)
        x = self.project(x) if self.project is not None else x
        # the table has entries of size 1; as they are, logits would begin at size sqrt(d)
        matrix = self.matrix if self.matrix is not None else table * 0.02
        return x, matrix.to(x.dtype)


def capped_logits(x, matrix):
    """(..., d) and (vocab_size, d) -> (..., vocab_size) float32."""
    return LOGIT_CAP * torch.tanh(F.linear(x, matrix).float() / LOGIT_CAP)


def cross_entropy(x, matrix, targets, mean: bool):
    """Nats of targets (B, T) under the capped logits of x (B, T, d): a scalar, or with `mean` false (B, T).

    On a GPU by the kernels below, and then only the mean has a gradient.
    """
    x, flat = x.flatten(0, 1), targets.flatten()
    if x.is_cuda and not isinstance(loss_kernels(len(matrix), x.shape[1], x.dtype), str):
        return MeanNats.apply(x, matrix, flat) if mean else nats_and_gradient(x, matrix, flat)[0].view_as(targets)
    nats = F.cross_entropy(capped_logits(x, matrix), flat, reduction="mean" if mean else "none")
    return nats if mean else nats.view_as(targets)


class MeanNats(torch.autograd.Function):
    """The mean of cross_entropy, with the gradient made on the way (the idea is that of Liger, Hsu et al. 2024). Logits
    are half a gigabyte: their gradient is written once and read twice, they themselves never.

    x: (N, d) and matrix: (vocab_size, d), both contiguous; targets: (N,) int64.
    """

    @staticmethod
    def forward(ctx, x, matrix, targets):
        nats, totals, gradient = nats_and_gradient(x, matrix, targets)
        share = (1 / (len(x) * totals))[:, None]  # of a row in the gradient of the mean
        by_x, shares_of_x = gradient @ matrix, torch.mul(x, share, out=torch.empty_like(x))
        ctx.save_for_backward(by_x.mul_(share), gradient.T @ shares_of_x)
        return nats.mean()

    @staticmethod
    def backward(ctx, by_mean):
        by_x, by_matrix = ctx.saved_tensors
        return by_x * by_mean, by_matrix * by_mean, None


@torch.no_grad()
def nats_and_gradient(x, matrix, targets):
    """Nats (N,) float32, totals (N,) float32, and totals times the gradient of nats by the logits, (N, vocab_size)."""
    (n, d), vocab_size = x.shape, len(matrix)
    all_words, of_targets = loss_kernels(vocab_size, d, x.dtype)
    tile = tile_size(x.dtype)
    tiles = -(-vocab_size // tile["WORDS"])
    strip = strip_size(tiles)
    gradient, sums = torch.empty(n, vocab_size, dtype=x.dtype, device=x.device), torch.empty(tiles, n, device=x.device)
    nats, totals = torch.empty(2, n, device=x.device)
    all_words[(tiles, -(-n // tile["ROWS"]))](x, matrix, gradient, sums, n, vocab_size, d, **tile)
    strips = -(-n // strip["ROWS"])
    of_targets[(strips,)](x, matrix, targets, sums, gradient, nats, totals, n, vocab_size, d, tiles, **strip)
    return nats, totals, gradient


class ParameterGroups(NamedTuple):
    """The parameters of a Model by how they are trained: matrices by Muon, the others by AdamW."""

    matrices: list[nn.Parameter]  # each (..., out, in)
    vectors: list[nn.Parameter]
    tables: list[nn.Parameter]  # each (rows, width): the embedding first, then those of the ops
    head: nn.Parameter | None  # None where the head is the embedding


class Model(nn.Module):
    """The network of a genome. Model(genome, vocab_size)(idx) gives logits; with targets, the loss in nats.

    idx, targets: (B, T) int64. reduction: "mean" (a scalar) or "none" (B, T). dtype: what activations are computed in;
    parameters are float32. Initialised from torch's global generator.
    """

    def __init__(self, genome: Genome, vocab_size: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.genome = genome
        self.embed = Embed(vocab_size, genome.embed_dim, dtype)
        frame = Frame(vocab_size, genome.embed_dim, dtype)
        self.blocks = nn.ModuleList(Block(n.gene, n.d_in, n.d_skip, frame) for n in genome.network)
        self.head = Head(vocab_size, genome.d_out, genome.embed_dim if genome.tied else None)

    def forward(self, idx, targets=None, reduction="mean"):
        assert idx.dim() == 2 and idx.dtype == torch.int64, "idx has to be (B, T) int64"
        assert idx.size(1) <= MAX_SEQ_LEN, f"{idx.size(1)} tokens at once, over MAX_SEQ_LEN = {MAX_SEQ_LEN}"
        states = [self.embed(idx)]  # (B, T, embed_dim)
        for node, block in zip(self.genome.network, self.blocks, strict=True):
            x, skip = (None if state is None else states[state] for state in (node.source, node.skip))
            reads = node.gene.reads
            states.append(block(x, skip, idx if "ids" in reads else None, states[0] if "embedding" in reads else None))
        x, matrix = self.head(states[-1], self.embed.table if self.genome.tied else None)
        return capped_logits(x, matrix) if targets is None else cross_entropy(x, matrix, targets, reduction == "mean")

    def parameter_groups(self) -> ParameterGroups:
        """Every parameter once. In the blocks those called `weight` are matrices, and those called `table` tables."""
        matrices, vectors, tables = [], [], [self.embed.table]
        for name, p in self.blocks.named_parameters():
            kind = name.rpartition(".")[2] if p.dim() >= 2 else ""
            {"weight": matrices, "table": tables}.get(kind, vectors).append(p)
        if self.head.project is not None:
            matrices.append(self.head.project.weight)
        return ParameterGroups(matrices, vectors, tables, self.head.matrix)

    def compile(self, rows: int, seq_len: int) -> str:
        """Compile every part for batches of (rows, seq_len), the only ones that it takes from then on; see below.

        Returns which parts run eagerly all the same and why, or an empty string. Runs nothing of the model.
        """
        table, eager = self.embed.table, set()

        def compile_one(part, key, inputs):
            reason = compile_part(part, (*key, rows, seq_len, len(table)), inputs)
            if reason:
                eager.add(f"{key[0]} ({reason})")

        def stream(width):  # memory alone: its values are never read
            dtype = self.embed.dtype
            return torch.empty(rows, seq_len, width, dtype=dtype, device=table.device, requires_grad=True)

        # read, where the compiler skips a part
        idx = torch.zeros(rows, seq_len, dtype=torch.int64, device=table.device)
        compile_one(self.embed, ("embed", self.genome.embed_dim), [idx])
        for node, block in zip(self.genome.network, self.blocks, strict=True):
            if not OPS[node.gene.op].compiles:
                eager.add(node.gene.op)
                continue
            reads = node.gene.reads
            states = [node.source, node.skip, 0 if "embedding" in reads else None]
            widths = [node.d_in, node.d_skip, self.genome.embed_dim]
            streams = {state: stream(width) for state, width in zip(states, widths, strict=True) if state is not None}
            x, skip, embedding = (streams.get(state) for state in states)
            alike = tuple(states.index(state) for state in states)  # a residual reads one tensor twice
            key = (node.gene.op, node.gene.bare, node.d_in, node.d_skip, embedding is not None and widths[2], alike)
            compile_one(block, key, [x, skip, idx if "ids" in reads else None, embedding])
        tied = table if self.genome.tied else None
        key = ("head", self.genome.d_out, self.genome.tied and self.genome.embed_dim)
        compile_one(self.head, key, [stream(self.genome.d_out), tied])
        width = self.genome.embed_dim if self.genome.tied else self.genome.d_out
        if table.is_cuda and isinstance(problem := loss_kernels(len(table), width, self.embed.dtype), str):
            eager.add(f"loss ({problem})")
        return "eager: " + ", ".join(sorted(eager)) if eager else ""

    def uncompile(self):
        """Let every part run eagerly again, and so take batches of any shape."""
        for part in (self.embed, *self.blocks, self.head):
            part.__dict__.pop("forward", None)


# ------------------------------------------------------------------------------------------------------------------
# Compiling. The parts of a model (embedding, each block, head) are compiled one by one. Compiling a model as a whole
# takes 10 s for every new genome; but genomes share their genes, so most parts of a new one were compiled before, and
# a model compiled in parts trains at 96 % of the speed.
#
# Another process trains on the GPU meanwhile, so nothing of the model may run there. But torch.compile compiles a
# function when it is first called, and then runs it. So the first call is made with `compile_only` set: once forward
# and backward are compiled, OnlyCompiled is raised in the place of running them.

tl = None  # Triton's language, once there is a GPU to write for
COMPILED: dict[tuple, Callable | str] = {}  # what a part is made of: its compiled function, or why there is none
compile_only = False


class OnlyCompiled(Exception):
    """Raised in the place of running what was just compiled."""


def inductor(graph, inputs, tune: bool):
    """torch.compile's own backend, forward and backward at once, but with a stop before it runs.

    Each kernel comes in one form, chosen by rule: to try several would hold the device for half a second a gene. With
    `tune` several forms of each reduction are tried all the same, as the rule is bad for the norms of short heads.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    by_rule = {"triton.autotune_pointwise": False, "test_configs.force_filter_reduction_configs": not tune}
    with config.patch(force_non_lazy_backward_lowering=True):
        run = compile_fx(graph, inputs, config_patches=by_rule)

    def run_unless_compile_only(*args):
        if compile_only:
            raise OnlyCompiled
        return run(*args)

    return run_unless_compile_only


def call(part, *args):
    return type(part).forward(part, *args)


def compile_part(part: nn.Module, key: tuple, inputs: list) -> str:
    """Let part.forward run compiled, for inputs like these, without running it now.

    key: its name, and all that it is made of; parts of one key share one compiled function. Returns why it cannot be
    compiled and stays as it is, or an empty string. Raises OutOfMemoryError and OSError, and tries again the next time.
    """
    global compile_only
    if key not in COMPILED:
        # a code object of its own for each key: torch.compile keeps its list of compiled variants on it
        function = types.FunctionType(call.__code__.replace(co_name=key[0]), globals())
        backend = functools.partial(inductor, tune=isinstance(part, Block) and part.op.tuned)
        COMPILED[key] = torch.compile(function, backend=backend, dynamic=False)
        compile_only = True
        try:
            COMPILED[key](part, *inputs)
            COMPILED[key] = "the compiler skipped it"  # without a word, as it skips bfloat16 on cards that lack it
        except OnlyCompiled:
            pass
        except Exception as error:  # whatever the compiler says of an op: the op still trains, slower
            while hasattr(error, "inner_exception"):  # what torch.compile wraps around it
                error = error.inner_exception
            if isinstance(error, (torch.OutOfMemoryError, OSError)):  # of the machine, not of the op: it may pass
                del COMPILED[key]
                raise error from None
            COMPILED[key] = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            compile_only = False
    function = COMPILED[key]
    if isinstance(function, str):
        return function
    part.forward = lambda *args: function(part, *args)
    return ""


def gradient_of_all(
    x, matrix, gradient, sums, n, vocab_size,
    d: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A Triton kernel: logits, the product of x (n, d) and matrix (vocab_size, d), made by the tile and never stored.

    Capped logits need no maximum taken off before their exponentials, e = exp(capped - CAP). Stored are those times the
    slope of the cap, gradient (n, vocab_size), and summed over the words of each tile, sums (tiles, n) float32.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    is_row, is_word = (row < n)[:, None], (word < vocab_size)[None, :]
    logits = tl.zeros((ROWS, WORDS), tl.float32)
    for first in range(0, d, DEPTH):
        part = first + tl.arange(0, DEPTH)
        a = tl.load(x + row[:, None] * d + part[None, :], mask=is_row & (part < d)[None, :], other=0.0)
        b = tl.load(matrix + word[None, :] * d + part[:, None], mask=is_word & (part < d)[:, None], other=0.0)
        logits = tl.dot(a, b, logits)
    tanh = 1 - 2 / (tl.exp(logits * (2 / CAP)) + 1)
    e = tl.where(is_word, tl.exp(CAP * tanh - CAP), 0.0)
    tl.store(sums + tl.program_id(0) * n + row, tl.sum(e, 1), mask=row < n)
    at = gradient + row[:, None].to(tl.int64) * vocab_size + word[None, :]
    tl.store(at, (e * (1 - tanh * tanh)).to(gradient.dtype.element_ty), mask=is_row & is_word)


def gradient_of_targets(
    x, matrix, targets, sums, gradient, nats, totals, n, vocab_size,
    d: tl.constexpr, tiles, CAP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A Triton kernel, the second: totals (n,) of sums over tiles, nats (n,), and the gradient at the targets (n,), for
    which the total is taken off e."""
    row, tile = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, TILES)
    is_row = row < n
    is_sum = (tile < tiles)[:, None] & is_row[None, :]
    total = tl.sum(tl.load(sums + tile[:, None] * n + row[None, :], mask=is_sum, other=0.0), 0)
    target = tl.load(targets + row, mask=is_row, other=0)
    logit = tl.zeros((ROWS,), tl.float32)
    for first in range(0, d, DEPTH):
        part = first + tl.arange(0, DEPTH)
        mask = is_row[:, None] & (part < d)[None, :]
        a = tl.load(x + row[:, None] * d + part[None, :], mask=mask, other=0.0)
        b = tl.load(matrix + target[:, None] * d + part[None, :], mask=mask, other=0.0)
        logit += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tanh = 1 - 2 / (tl.exp(logit * (2 / CAP)) + 1)
    less = tl.exp(CAP * tanh - CAP) - total
    tl.store(nats + row, tl.log(total) + CAP - CAP * tanh, mask=is_row)
    tl.store(totals + row, total, mask=is_row)
    at = gradient + row.to(tl.int64) * vocab_size + target
    tl.store(at, (less * (1 - tanh * tanh)).to(gradient.dtype.element_ty), mask=is_row)


def tile_size(dtype: torch.dtype) -> dict[str, int | float]:
    """The constants of gradient_of_all: on an H200 the best of those that were tried at widths of 256 and 512."""
    if dtype == torch.float32:  # on cards without bfloat16
        return dict(CAP=LOGIT_CAP, ROWS=64, WORDS=64, DEPTH=32, num_warps=4, num_stages=2)
    return dict(CAP=LOGIT_CAP, ROWS=128, WORDS=128, DEPTH=32, num_warps=8, num_stages=4)


def strip_size(tiles: int) -> dict[str, int | float]:
    """The constants of gradient_of_targets, for sums of so many tiles."""
    return dict(CAP=LOGIT_CAP, ROWS=32, TILES=1 << (tiles - 1).bit_length(), DEPTH=64, num_warps=4)


@functools.cache
def loss_kernels(vocab_size: int, d: int, dtype: torch.dtype):
    """Those kernels, compiled for a vocabulary and a width without being run; or why there are none."""
    global tl
    try:
        import triton
        import triton.language as tl

        all_words, of_targets = triton.jit(gradient_of_all), triton.jit(gradient_of_targets)
        tile, n, fp32 = tile_size(dtype), 64, torch.float32
        tiles = -(-vocab_size // tile["WORDS"])
        all_words.warmup(dtype, dtype, dtype, fp32, n, vocab_size, d, grid=(1,), **tile)
        types = dtype, dtype, torch.int64, fp32, dtype, fp32, fp32
        of_targets.warmup(*types, n, vocab_size, d, tiles, grid=(1,), **strip_size(tiles))
        return all_words, of_targets
    except (torch.OutOfMemoryError, OSError):  # of the machine: it may pass
        raise
    except Exception as error:  # whatever the compiler says: the loss is computed without them, slower
        return f"{type(error).__name__}: {str(error)[:200]}"


# ------------------------------------------------------------------------------------------------------------------
# The rules of an op, tried out. An op of your own that cannot be built would otherwise end a search, when it is first
# drawn; one that puts out the wrong shape would fail every genome that it is part of.


def op_problem(trying: Callable[[str], None] = lambda case: None) -> str:
    """The first op that cannot be built and run as Op says, with the trait and the rule; or an empty string.

    Every op is tried with its defaults and with each other choice of each trait: counted at every width, run at two.
    trying("attention, heads=4") is called before each, so that the caller can tell which one hangs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are done sooner by one
    try:
        for op, cls in OPS.items():
            for traits in ({}, *({name: choice} for name, choices in cls.traits.items() for choice in choices[1:])):
                case = ", ".join([op, *(f"{name}={choice}" for name, choice in traits.items())])
                trying(case)
                for d_in, dtype in ((64, torch.float32), (128, torch.bfloat16)):
                    problem = rule_broken(op, traits, d_in, d_in if cls.keeps_width else 128, dtype)
                    if problem:
                        return f"{case}: {problem}"
        return ""
    finally:
        torch.set_num_threads(threads)


def rule_broken(op: str, traits: dict, d_in: int, d_out: int, dtype: torch.dtype) -> str:
    """Which rule an op breaks when it is built, counted, and run on x (2, 8, d_in); or an empty string."""
    doing = "built"
    try:
        gene, frame = Gene(op, None if OPS[op].keeps_width else d_out, skip=1, **traits), Frame(64, d_in, dtype)
        block = Block(gene, d_in if "stream" in gene.reads else None, d_in, frame)
        doing = "counted, which builds it without memory on the device meta,"
        for width in WIDTHS:
            sized = gene if gene.dim is None else gene.change(dim=width)
            block_params(sized, block.d_in and width, width, Frame(64, 64))  # the same for every dtype: counted once
        doing = f"run in {dtype}"
        stream, ids = torch.randn(2, 8, d_in, dtype=dtype, requires_grad=True) * 1, torch.arange(16).view(2, 8)
        given = {"stream": stream, "ids": ids, "embedding": stream}
        y = block.op(*(given[name] for name in gene.reads))
    except Exception as error:  # whatever an op may raise
        return f"cannot be {doing}: {type(error).__name__}: {error}"
    if not isinstance(y, torch.Tensor) or y.shape != (2, 8, d_out):
        found = tuple(y.shape) if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
        return f"has to map (B, T, {d_in}) to (B, T, {d_out}), here {(2, 8, d_in)} to {(2, 8, d_out)}, not to {found}"
    if y.dtype != dtype:
        return f"has to keep the dtype of what it reads, and makes {y.dtype} of {dtype}"
    if not y.isfinite().all():
        return f"puts out numbers that are not finite, in {dtype}"
    try:
        y.float().sum().backward()
    except RuntimeError as error:
        return f"has no gradient: {error}"
    idle = next((name for name, p in block.op.named_parameters() if p.grad is None), None)
    if idle is not None:
        return f"has a parameter {idle} that is not used, and so has no gradient"
    return order_broken(block.op, [given[name].detach().clone() for name in gene.reads])


@torch.no_grad()
def order_broken(op: Op, inputs: list[torch.Tensor]) -> str:
    """What changes where it should not, or where the op does not say so, when one token does; or an empty string."""
    for p in op.parameters():
        p += 0.05 * torch.randn_like(p)  # nothing hides behind a zero

    def put_out():
        torch.manual_seed(0)  # an op that draws random numbers draws the same ones each time
        return op(*inputs)

    before = put_out()
    for x in inputs:
        x[0, 3] = x[1, 3]
    differs = (put_out() != before).any(-1)
    if differs[1].any():
        return "puts out something else when another row of the batch changes"
    if differs[0, :3].any():
        return "puts out something else at a token when a later one changes: a prediction would see its answer"
    if differs[0, 4:].any() and not op.mixes_tokens:
        return "has a token see others, so its class has to say so: mixes_tokens=True"
    return ""


# ------------------------------------------------------------------------------------------------------------------
# random_genome, mutate, crossover: pure functions of their arguments and a random.Random.


class Child(NamedTuple):
    """A genome and the operators that made it, joined by +."""

    genome: Genome
    operator: str


def fit_distances(genes: list[Gene]) -> tuple[Gene, ...]:
    """Shorten distances that reach beyond the embedding to reach the embedding."""
    fitted = []
    for i, gene in enumerate(genes, start=1):
        if gene.input > i or gene.skip > i:
            gene = gene.change(input=min(gene.input, i), skip=min(gene.skip, i))
        fitted.append(gene)
    return tuple(fitted)


def moved(genome: Genome, start: int, stop: int, to: int) -> list[Gene]:
    """The genes of that run as they stand at place `to`: a link out of it to the embedding still reaches that."""
    run = []
    for k, gene in enumerate(genome.genes[start:stop], start=1):
        far = [name for name in ("input", "skip") if getattr(gene, name) == start + k and (start or k > LONGEST_BRANCH)]
        run.append(gene.change(**dict.fromkeys(far, min(to + k, MAX_GENES))))
    return run


def mostly_usual(rng: random.Random, choices: tuple):
    """The first of the choices, or with a chance of UNUSUAL each, one of the others."""
    return rng.choice(choices[1:]) if rng.random() < UNUSUAL * len(choices[1:]) else choices[0]


def random_gene(rng: random.Random, dim: int, ops: list[str] | None = None) -> Gene:
    """A random op (of those), `dim` wide where it has a width; half the time with its usual traits."""
    op = rng.choice(ops or list(OPS))
    traits = OPS[op].traits if rng.random() < 0.5 else {}
    traits = {name: mostly_usual(rng, choices) for name, choices in traits.items()}
    activation = rng.choice(list(ACTIVATIONS)) if rng.random() < 0.25 else "none"
    stride = rng.choice(WIRING["stride"]) if rng.random() < 0.1 else 1
    return Gene(op, None if OPS[op].keeps_width else dim, activation, skip=rng.choice((0, 1)), stride=stride, **traits)


def random_piece(rng: random.Random, dim: int, ops: list[str] | None = None) -> list[Gene]:
    """A random gene, mostly as a residual branch with a norm before it (He et al. 2016; Xiong et al. 2020).

    A table may be narrower than the stream, with a matrix behind it, and then has room for more rows.
    """
    gene = random_gene(rng, dim, ops)
    if gene.op in ("norm", "identity") or rng.random() < 0.25:
        return [gene]
    piece = [Gene("norm"), gene] if "stream" in gene.reads else [gene]
    if OPS[gene.op].without_table(dict(gene.traits)) is None and rng.random() < 0.7:
        rows = {name: rng.choice(choices) for name, choices in OPS[gene.op].traits.items() if name == "slots"}
        piece[-1:] = [gene.change(dim=min(WIDTHS), skip=0, **rows), Gene("linear", dim)]
    scale = rng.choice(WIRING["scale"]) if rng.random() < 0.25 else "none"
    return [*piece[:-1], piece[-1].change(skip=len(piece), scale=scale)]


def random_genome(rng: random.Random) -> Genome:
    """Two to six random pieces, most of them as wide as the one before."""
    embed_dim = dim = rng.choice(WIDTHS)
    genes = []
    for _ in range(rng.randint(2, 6)):
        dim = dim if rng.random() < 0.75 else rng.choice(WIDTHS)
        genes += random_piece(rng, dim)
    return Genome(fit_distances(genes), embed_dim=embed_dim)


def other(rng: random.Random, choices, present):
    """One of the choices that is not the present one."""
    return rng.choice([choice for choice in choices if choice != present])


def with_gene(genome: Genome, i: int, gene: Gene) -> Genome:
    """The genome with another gene i."""
    return replace(genome, genes=fit_distances([*genome.genes[:i], gene, *genome.genes[i + 1 :]]))


def change_gene(genome: Genome, rng: random.Random, change) -> Genome:
    """Replace one gene by change(gene)."""
    i = rng.randrange(len(genome.genes))
    return with_gene(genome, i, change(genome.genes[i]))


def width_near(genome: Genome, i: int) -> int:
    """The width of the last gene before i that has one, else of the embedding."""
    return next((gene.dim for gene in reversed(genome.genes[:i]) if gene.dim), genome.embed_dim)


def change_op(genome, rng):
    i = rng.randrange(len(genome.genes))
    old = genome.genes[i]
    new = random_gene(rng, old.dim or width_near(genome, i))
    keeps = {name: getattr(old, name) for name in ("input", "skip", *WIRING)}
    return with_gene(genome, i, new.change(**keeps))


def change_width(genome, rng):
    """The width of one gene."""
    sized = [i for i, gene in enumerate(genome.genes) if gene.dim]
    if not sized:
        return genome
    i = rng.choice(sized)
    return with_gene(genome, i, genome.genes[i].change(dim=other(rng, WIDTHS, genome.genes[i].dim)))


def change_width_everywhere(genome, rng):
    """All widths and the embedding's by one step: two times in three a wider network, else a narrower one."""
    step = rng.choice((-1, 1, 1))

    def resized(dim):
        further = [width for width in WIDTHS if (width - dim) * step > 0]
        return min(further, key=lambda width: abs(width - dim), default=dim)

    genes = tuple(gene.change(dim=resized(gene.dim)) if gene.dim else gene for gene in genome.genes)
    return replace(genome, genes=genes, embed_dim=resized(genome.embed_dim))


def change_activation(genome, rng):
    return change_gene(genome, rng, lambda g: g.change(activation=other(rng, ACTIVATIONS, g.activation)))


def change_link(genome, rng, name, smallest):
    i = rng.randrange(len(genome.genes))
    gene = genome.genes[i]
    further = sorted({*range(smallest, MAX_DISTANCE + 1), i + 1})  # near, or to the embedding
    return with_gene(genome, i, gene.change(**{name: other(rng, further, getattr(gene, name))}))


def change_skip(genome, rng):
    return change_link(genome, rng, "skip", 0)


def change_input(genome, rng):
    return change_link(genome, rng, "input", 1)


def change_repeat(genome, rng):
    return change_gene(genome, rng, lambda g: g.change(repeat=other(rng, WIRING["repeat"], g.repeat)))


def change_stride(genome, rng):
    return change_gene(genome, rng, lambda g: g.change(stride=other(rng, WIRING["stride"], g.stride)))


def change_scale(genome, rng):
    """The gain of one branch."""
    branches = [i for i, gene in enumerate(genome.genes) if gene.skip]
    if not branches:
        return genome
    i = rng.choice(branches)
    gene = genome.genes[i]
    return with_gene(genome, i, gene.change(scale=other(rng, WIRING["scale"], gene.scale)))


def change_trait(genome, rng):
    """One trait of one op; each trait of each gene is as likely."""
    traits = [(i, name, value) for i, gene in enumerate(genome.genes) for name, value in gene.traits]
    if not traits:
        return genome
    i, name, value = rng.choice(traits)
    gene = genome.genes[i]
    return with_gene(genome, i, gene.change(**{name: other(rng, OPS[gene.op].traits[name], value)}))


def change_trait_everywhere(genome, rng):
    """One trait of one op, in all of its genes."""
    traits = sorted({(gene.op, name) for gene in genome.genes for name, _ in gene.traits})
    if not traits:
        return genome
    op, name = rng.choice(traits)
    value = other(rng, OPS[op].traits[name], rng.choice([getattr(g, name) for g in genome.genes if g.op == op]))
    genes = (gene.change(**{name: value}) if gene.op == op else gene for gene in genome.genes)
    return replace(genome, genes=tuple(genes))


def change_training(genome, rng):
    """Learning rate, embedding width or tied head."""
    name = rng.choice(list(GENOME_TRAITS))
    return replace(genome, **{name: other(rng, GENOME_TRAITS[name], getattr(genome, name))})


def spliced(genome: Genome, start: int, stop: int, genes) -> Genome:
    """The genome with genes[start:stop] replaced; unchanged where that would leave none or too many.

    Genes behind the splice that reach over it to something before it still do: a residual stays a residual.
    """
    growth = len(genes) - (stop - start)
    if not 1 <= len(genome.genes) + growth <= MAX_GENES:
        return genome
    rest = []
    for state, gene in enumerate(genome.genes[stop:], start=stop + 1):
        reach = {"input": gene.input, "skip": gene.skip}
        over = {
            name: d + growth
            for name, d in reach.items()
            if d and state - d <= start and (state - d < stop or d == state > LONGEST_BRANCH)
        }
        rest.append(gene.change(**over))
    return replace(genome, genes=fit_distances([*genome.genes[:start], *genes, *rest]))


def clean_cuts(genome: Genome) -> list[int]:
    """Places between genes that no later gene reaches over, the start and the end among them.

    A link from afar to the embedding does not count: whatever is moved, it still reaches that.
    """
    cuts, reach = [], len(genome.genes)  # the earliest state that the genes behind the place read
    for place in range(len(genome.genes), -1, -1):
        if reach >= place:
            cuts.append(place)
        if place:
            gene = genome.genes[place - 1]
            near = [d for d in (gene.input, gene.skip) if d < place or d <= LONGEST_BRANCH]
            reach = min([reach, *(place - d for d in near)])
    return cuts[::-1]


def random_run(genome: Genome, rng: random.Random) -> tuple[int, int]:
    """Where a random run of genes starts and ends, short ones more often; mostly whole blocks."""
    cuts = clean_cuts(genome) if rng.random() < 0.8 else range(len(genome.genes) + 1)
    size = min(rng.choice((1, 1, 2, 2, 3, 4)), len(cuts) - 1)
    start = rng.randrange(len(cuts) - size)
    return cuts[start], cuts[start + size]


def add_gene(genome, rng):
    """A random gene, mostly as a residual branch, between blocks or anywhere."""
    i = rng.choice(clean_cuts(genome)) if rng.random() < 0.5 else rng.randint(0, len(genome.genes))
    return spliced(genome, i, i, random_piece(rng, width_near(genome, i)))


def add_block(genome, rng):
    """A block of a new kind: two residual branches, one that mixes tokens and one that mixes channels."""
    i, sized = rng.choice(clean_cuts(genome)), [op for op, cls in OPS.items() if not cls.keeps_width]
    kinds = [[op for op in sized if OPS[op].mixes_tokens is mixes] for mixes in (True, False)]
    dim = width_near(genome, i)
    return spliced(genome, i, i, [gene for ops in kinds for gene in random_piece(rng, dim, ops)])


def add_link(genome, rng):
    """An earlier state, half the time the embedding, is added to the stream, by a gain that starts small."""
    i = rng.choice(clean_cuts(genome)[1:])
    back = min(i + 1 if rng.random() < 0.5 else rng.randint(1, i + 1), MAX_GENES)
    link = Gene("identity", input=back, skip=1, scale="small")
    return spliced(genome, i, i, [link])


def branch_start(genome: Genome, i: int) -> int:
    """The first gene of the residual branch that gene i closes, which is what its skip reaches over; else i itself."""
    skip = genome.genes[i].skip
    return i + 1 - skip if 1 <= skip <= LONGEST_BRANCH else i


def remove_gene(genome, rng):
    """One gene, with the whole branch that it closes."""
    i = rng.randrange(len(genome.genes))
    return spliced(genome, branch_start(genome, i), i + 1, [])


def swap_runs(genome, rng):
    """Two neighbouring runs of whole blocks change places."""
    cuts = clean_cuts(genome)
    if len(cuts) < 3:
        return genome
    i, j, k = sorted(rng.sample(cuts, 3))
    genes = genome.genes
    swapped = [*moved(genome, j, k, to=i), *moved(genome, i, j, to=i + k - j)]
    return replace(genome, genes=fit_distances([*genes[:i], *swapped, *genes[k:]]))


def duplicate_run(genome, rng):
    """A run of genes once more, behind itself or elsewhere."""
    start, stop = random_run(genome, rng)
    at = stop if rng.random() < 0.7 else rng.choice(clean_cuts(genome))
    return spliced(genome, at, at, moved(genome, start, stop, to=at))


def remove_run(genome, rng):
    return spliced(genome, *random_run(genome, rng), [])


class Mutation(NamedTuple):
    change: Callable[[Genome, random.Random], Genome]
    weight: float  # how often it is drawn
    growth: int = 0  # 1 where it makes a genome longer, -1 where shorter


MUTATIONS = {
    "change_op": Mutation(change_op, 2),
    "change_width": Mutation(change_width, 1),
    "change_width_everywhere": Mutation(change_width_everywhere, 3),
    "change_activation": Mutation(change_activation, 1),
    "change_skip": Mutation(change_skip, 1.5),
    "change_input": Mutation(change_input, 1),
    "change_repeat": Mutation(change_repeat, 1),
    "change_stride": Mutation(change_stride, 0.5),
    "change_scale": Mutation(change_scale, 1),
    "change_trait": Mutation(change_trait, 6),
    "change_trait_everywhere": Mutation(change_trait_everywhere, 6),
    "change_training": Mutation(change_training, 1.5),
    "add_gene": Mutation(add_gene, 4, growth=1),
    "add_block": Mutation(add_block, 4, growth=1),
    "add_link": Mutation(add_link, 1, growth=1),
    "remove_gene": Mutation(remove_gene, 1.5, growth=-1),
    "swap_runs": Mutation(swap_runs, 1),
    "duplicate_run": Mutation(duplicate_run, 3, growth=1),
    "remove_run": Mutation(remove_run, 0.5, growth=-1),
}
LONG = 12  # genes, from which on what makes a genome longer is drawn less often, and what makes it shorter more often


def mutate(genome: Genome, rng: random.Random, rate: float) -> Child:
    """One random change, and with chance `rate` another, up to four, each of what is computed; what changed nothing is
    drawn again. The child never computes what its parent does."""
    child, operators = genome, []
    while not operators or (len(operators) < 4 and rng.random() < rate):
        length = max(1.0, len(child.genes) / LONG)
        weights = [m.weight / length**m.growth for m in MUTATIONS.values()]
        while True:
            (name,) = rng.choices(list(MUTATIONS), weights)
            changed = MUTATIONS[name].change(child, rng)
            if changed.key not in (genome.key, child.key):
                break
        child = changed
        operators.append(name)
    return Child(child, "+".join(operators))


def crossover(a: Genome, b: Genome, rng: random.Random) -> Child:
    """A run of b's genes between a's, or in the place of a run of a's.

    Where the parents share genes, runs that are replaced are mostly cut at those. Learning rate and tied head come from
    either, the embedding from a. Where every child that was drawn computes what a parent does, a is mutated.
    """
    shared = difflib.SequenceMatcher(None, a.genes, b.genes, autojunk=False).get_matching_blocks()
    aligned = [(m.a + k, m.b + k) for m in shared for k in range(m.size + 1)]
    for _ in range(20):
        (i, k), (j, l) = random_run(a, rng), random_run(b, rng)
        if rng.random() < 0.5:
            i = k = rng.choice(clean_cuts(a))  # nothing of a is lost
        elif len(aligned) > 2 and rng.random() < 0.8:
            (i, j), (k, l) = sorted(rng.sample(aligned, 2))
        child = spliced(a, i, k, moved(b, j, l, to=i))
        child = replace(child, **{name: getattr(rng.choice((a, b)), name) for name in ("lr_factor", "tied")})
        if child.key not in (a.key, b.key):
            return Child(child, "crossover")
    while (child := mutate(a, rng, 0.0)).genome.key == b.key:
        pass
    return child


# ------------------------------------------------------------------------------------------------------------------
# Designs: what people build, for evolution to beat, and how a design grows. None of them ever becomes a parent.


def transformer(
    n_layer: int, dim: int, heads: int = 2, lr_factor: float = 1.0, tied: bool = False, expansion: int = 4, **attention
) -> Genome:
    """Pre-norm, rotary, SwiGLU (Touvron et al. 2023, Llama)."""
    block = (
        Gene("norm"),
        Gene("attention", dim, skip=2, heads=heads, **attention),
        Gene("norm"),
        Gene("gate", dim, skip=2, expansion=expansion),
    )
    return Genome(block * n_layer, embed_dim=dim, lr_factor=lr_factor, tied=tied)


def modern(
    n_layer: int, dim: int, heads: int = 2, lr_factor: float = 1.0, tied: bool = False, mlp: str = "relu2",
    x0: bool = True, values: str = "none", conv: int = 0,
) -> Genome:  # fmt: skip
    """The transformer as people build it by hand today (modded-nanogpt 2024, nanochat 2025, autoresearch 2026).

    mlp: plain with relu squared, or swiglu. x0: the embedding is added before each layer but the first. values: the
    layers whose values get an embedding of the token. conv: tokens of Primer's convolution.
    """
    genes: list[Gene] = []
    for layers_above in range(n_layer - 1, -1, -1):
        if x0 and genes:
            genes.append(Gene("identity", input=len(genes) + 1, skip=1, scale="small"))
        has_values = {"none": False, "last": layers_above == 0, "half": layers_above % 2 == 0}[values]
        mixed = {"conv": conv, "values": "token" if has_values else "plain"}
        form = {"relu2": {"kind": "relu2", "gated": False}, "swiglu": {"kind": "silu"}}[mlp]
        genes += [Gene("norm"), Gene("attention", dim, skip=2, heads=heads, **mixed)]
        genes += [Gene("norm"), Gene("gate", dim, skip=2, **form)]
    return Genome(genes, embed_dim=dim, lr_factor=lr_factor, tied=tied)


def convnet(n_layer: int, dim: int) -> Genome:
    """Dense convolutions in place of attention."""
    block = (Gene("norm"), Gene("conv1d", dim, skip=2, kernel=4, kind="dense"), Gene("norm"), Gene("gate", dim, skip=2))
    return Genome(block * n_layer, embed_dim=dim)


def gru_net(n_layer: int, dim: int) -> Genome:
    block = (Gene("norm"), Gene("gru", dim, skip=2))
    return Genome(block * n_layer, embed_dim=dim)


def mlp(n_layer: int, dim: int) -> Genome:
    """No token sees another: what a bigram model can do."""
    return Genome((Gene("norm"), Gene("gate", dim, skip=2)) * n_layer, embed_dim=dim)


class Family(NamedTuple):
    """A kind of design that evolve.py tunes before it searches: design(n_layer, dim, **traits) makes one.

    traits: what is tuned beside depth and width, each with its choices, the usual one first. start: the family from
    whose best design the tuning starts, by its own traits first; None: from a line of sizes. effort: its share of
    BASELINE_TRIALS.
    """

    design: Callable[..., Genome]
    traits: dict[str, tuple]
    start: str | None = None
    effort: float = 1.0


FAMILIES = {
    "transformer": Family(
        transformer,
        {
            "heads": Attention.traits["heads"],
            "lr_factor": GENOME_TRAITS["lr_factor"],
            "tied": GENOME_TRAITS["tied"],
            "expansion": Gate.traits["expansion"],
        },
    ),
    "modern": Family(
        modern,
        {
            "conv": Attention.traits["conv"],
            "values": ("none", "last", "half"),
            "mlp": ("relu2", "swiglu"),
            "x0": (True, False),
            "heads": Attention.traits["heads"],
            "lr_factor": GENOME_TRAITS["lr_factor"],
            "tied": GENOME_TRAITS["tied"],
        },
        start="transformer",
        effort=0.5,
    ),
}
LEVELS = {"convnet-4x256": convnet(4, 256), "gru-1x384": gru_net(1, 384), "mlp-4x256": mlp(4, 256)}  # as they are


def pruned(genome: Genome) -> Genome:
    """The same network without the genes that are no part of it. The others keep their order: blocks stay whole."""
    nodes = sorted(genome.network, key=lambda node: node.at)
    states = [0, *(1 + nodes.index(node) for node in genome.network)]  # where each state of the network stands then
    genes = [
        node.gene.change(
            input=1 if node.source is None else state - states[node.source],
            skip=0 if node.skip is None else state - states[node.skip],
        )
        for state, node in enumerate(nodes, start=1)
    ]
    return replace(genome, genes=genes) if genes else genome


def repeated_run(genome: Genome) -> tuple[int, int]:
    """The longest run of whole blocks that stands twice in a row: where the last time of it starts and ends.

    Blocks are what lies between clean cuts, and are alike where their ops and widths are. A run that is a shorter one
    several times over does not count, nor does one of norms or tables alone. Where nothing repeats it is all there is.
    """
    cuts = clean_cuts(genome)
    blocks = [[(gene.op, gene.dim) for gene in genome.genes[a:b]] for a, b in itertools.pairwise(cuts)]
    for size in range(len(blocks) // 2, 0, -1):
        for i in range(len(blocks) - size, size - 1, -1):
            run = blocks[i : i + size]
            shorter = any(size % n == 0 and run == run[:n] * (size // n) for n in range(1, size))
            start, stop = cuts[i], cuts[i + size]
            again = run == blocks[i - size : i] and not shorter
            if again and any(without_table(gene).op not in ("norm", "identity") for gene in genome.genes[start:stop]):
                return start, stop
    return 0, len(genome.genes)


def without_table(gene: Gene) -> Gene:
    """The gene without its table: an identity in its place where it is nothing else."""
    traits = OPS[gene.op].without_table(dict(gene.traits))
    return Gene("identity", input=gene.skip or 1) if traits is None else gene.change(**traits)


def grown(genome: Genome, times: int) -> Genome:
    """The design with its repeated run so many times more: (norm→attention→norm→gate)×6 is one of 6 + times layers.

    Tables are not copied. Raises GenomeError where that is too many genes, or no other network.
    """
    genome = pruned(genome)
    start, stop = repeated_run(genome)
    design = genome
    for at in range(stop, stop + times * (stop - start), stop - start):
        if len(design.genes) + stop - start > MAX_GENES:
            raise GenomeError(f"{len(design.genes) + stop - start} genes, over MAX_GENES = {MAX_GENES}")
        more = [without_table(gene) for gene in moved(genome, start, stop, to=at)]
        design = spliced(design, at, at, more)
    if times > 0 and design.key == genome.key:
        run = "→".join(gene.op for gene in genome.genes[start:stop])
        raise GenomeError(f"{run} once more computes nothing new; tables are not copied")
    return pruned(design)


def scaled(genome: Genome, factor: float) -> Genome:
    """The design so many times as wide, and with as many times more heads where an op has such a choice.

    Widths are rounded to a multiple of 64. Raises GenomeError where one is too large.
    """

    def wider(dim):
        return max(1, round(dim * factor / WIDTH_STEP)) * WIDTH_STEP

    genes = []
    for gene in genome.genes:
        changes = {"dim": wider(gene.dim)} if gene.dim else {}
        heads = dict(gene.traits).get("heads", 0) * factor  # heads stay as wide as they were
        if heads in OPS[gene.op].traits.get("heads", ()):
            changes["heads"] = int(heads)
        genes.append(gene.change(**changes))
    return replace(genome, genes=genes, embed_dim=wider(genome.embed_dim))


def without_a_part(genome: Genome) -> dict[str, Genome]:
    """The genome with each gene or branch taken out and each trait put back to its default, each network once, by name.

    A gene with a skip goes with the branch that the skip reaches over; alone it would take the residual with it. Where
    that branch holds more than norms, the gene is replaced by an identity as well, which leaves the wiring.
    """
    less = {}
    for i, gene in enumerate(genome.genes):
        start = branch_start(genome, i)
        gone = "→".join(g.op for g in genome.genes[start : i + 1])
        less[f"gene {i + 1}: without {gone}"] = spliced(genome, start, i + 1, [])
        if any(g.op != "norm" for g in genome.genes[start:i]):
            nothing = Gene("identity", input=gene.input, skip=gene.skip)
            less[f"gene {i + 1}: identity, not {gene.op}"] = with_gene(genome, i, nothing)
        usual = Gene(gene.op, gene.dim).to_dict()
        for name, value in gene.to_dict().items():
            if name not in ("op", "dim", "input", "skip") and value != usual[name]:
                changed = with_gene(genome, i, gene.change(**{name: usual[name]}))
                less[f"gene {i + 1}: {gene.op} {name} {usual[name]}, not {value}"] = changed
    for name, choices in GENOME_TRAITS.items():
        less[f"{name} {choices[0]}, not {getattr(genome, name)}"] = replace(genome, **{name: choices[0]})
    by_key = {child.key: name for name, child in reversed(less.items())}  # the first name of each network
    return {name: child for name, child in less.items() if child.key != genome.key and by_key[child.key] == name}


def drifted(rng: random.Random, newcomers: int = 300, vocab_size: int = 8_192, max_params: int = 10_000_000):
    """The genomes of a run without selection: as evolve.py breeds them, but all that were bred are parents alike."""
    family: list[Genome] = []
    while len(family) < newcomers:
        if len(family) < 12 or rng.random() < 1 / 12:
            genome = random_genome(rng)
        elif rng.random() < 0.3:
            genome = crossover(*rng.sample(family, 2), rng).genome
        else:
            genome = mutate(rng.choice(family), rng, 0.3).genome
        if genome.mixes_tokens and genome.num_params(vocab_size) <= max_params:
            family.append(genome)
    return family


def choices_in(genome: Genome) -> set[tuple]:
    """What stands in its network: (op,), (op, trait, choice), and (any, trait, choice) of the wiring."""
    genes = [node.gene for node in genome.network]
    found = {(gene.op,) for gene in genes} | {(gene.op, *trait) for gene in genes for trait in gene.traits}
    return found | {("any", name, getattr(gene, name)) for gene in genes for name in WIRING}


def print_choices(op: str, share: str, traits: dict[str, tuple], counts: collections.Counter, runs: int):
    print(f"{op:<12}{share}")
    for trait, choices in traits.items():
        print(f"{'':<14}{trait:<15}" + "   ".join(f"{c} {counts[op, trait, c] / runs:.0f}" for c in choices))


def main():
    """How often each choice is to be expected in the networks of 300 newcomers, if all are worth the same."""
    runs = 12
    families = [drifted(random.Random(n)) for n in range(runs)]
    counts = collections.Counter(c for family in families for genome in family for c in choices_in(genome))
    print("Networks out of 300 newcomers' in which each is to be expected without selection; the usual choice first\n")
    for op, cls in OPS.items():
        print_choices(op, f"{counts[op,] / runs:5.0f}", cls.traits, counts, runs)
    print_choices("any", "", WIRING, counts, runs)
    genomes = [genome for family in families for genome in family]
    depth = sum(len(genome.network) for genome in genomes) / len(genomes)
    print(f"\n{len(genomes)} genomes: {depth:.1f} genes in the network")


if __name__ == "__main__":
    main()
