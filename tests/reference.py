"""Independent implementations that test_genome.py compares genome.py with.

Written from the papers in float64, plain and slow: loops over heads and tokens, explicit softmax, sorting. Nothing here
comes from genome.py. Weights come in as dictionaries of tensors; matrices are (out, in).
"""

import math

import torch

EPS = 1e-5


def rms_norm(x, gain=1.0):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain


def layer_norm(x, gain, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain + bias


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "gelu": gelu,
    "silu": silu,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": torch.tanh,
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "leaky_relu2": lambda x: torch.where(x > 0, x, x / 2) ** 2,
}


def rope(x, base=10_000, share=1.0):
    """Turn the pair (x_i, x_(i + R/2)) of token t by t * base^(-2i/R), as complex numbers: (T, D), R = share * D."""
    T, R = len(x), int(share * x.size(1))
    a, b = x[:, : R // 2], x[:, R // 2 : R]
    angle = torch.arange(T).double()[:, None] * float(base) ** (-2 * torch.arange(R // 2).double() / R)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[:, R:]], dim=-1)


def softmax(z):
    e = (z - z.max()).exp()
    return e / e.sum()


def sparsemax(z):
    """The projection of a vector onto the simplex, by sorting (Martins & Astudillo 2016, algorithm 1)."""
    s = z.sort(descending=True).values
    k = torch.arange(1, len(z) + 1)
    k_max = int(((1 + k * s) > s.cumsum(0)).sum())
    return (z - (s[:k_max].sum() - 1) / k_max).clamp(min=0)


NORMALISE = {  # scores of one query -> weights
    "softmax": softmax,
    "sparsemax": sparsemax,
    "relu": lambda z: z.clamp(min=0) / len(z),
    "sigmoid": lambda z: torch.sigmoid(z - math.log(len(z))),
}


def keys_seen(t, window):
    """What the query at t sees: all tokens, or the last `window`."""
    return [j for j in range(t + 1) if not window or t - j < window]


def ngram_rows(w, rows):
    """The row of each token of a table, of root mean square 1."""
    return rms_norm(w[rows])


def attention(
    x, w, heads, kv_heads, qk_norm, position="rope", rope_base=10_000, rope_share=1.0, window=0,
    similarity="dot", normalisation="softmax", gating="none", exclusive=False, rows=None, embedding=None,
):  # fmt: skip
    """Causal self-attention of one sequence (T, C), head by head, query by query.

    Learned temperature, bottleneck of keys and values, memory tokens, a convolution after the projections and values
    that are mixed with something of the token are there where w has their weights. rows: of the table that is mixed
    into the values, for each token; or embedding (T, E), where a matrix of it is.
    """
    D, M = w["q.weight"].size(0) // heads, w["memory_k"].size(1) if "memory_k" in w else 0
    source = rms_norm(x @ w["down.weight"].T) if "down.weight" in w else x
    q, k, v = x @ w["q.weight"].T, source @ w["k.weight"].T, source @ w["v.weight"].T
    if "q_taps" in w:
        k_taps, v_taps = w["kv_taps"].chunk(2, dim=1)
        q, k, v = (convolution(y, taps.diag_embed()) for y, taps in ((q, w["q_taps"]), (k, k_taps), (v, v_taps)))
    if "mix_gate" in w:
        more = ngram_rows(w["mixed_in.table"], rows) if rows is not None else embedding @ w["mixed_in.weight"].T
        more = more.view(len(x), kv_heads, D) * 2 * torch.sigmoid(x @ w["mix_gate"].T)[:, :, None]
        v = v + more.flatten(1)
    gate = torch.sigmoid(x @ w["gate.weight"].T) if gating != "none" else None
    if gating == "input":
        v = v * gate
    seen_by = [torch.tensor(keys_seen(t, window)) for t in range(len(x))]
    out = []
    for h in range(heads):
        kv = h * kv_heads // heads
        qh, kh, vh = q[:, h * D : (h + 1) * D], k[:, kv * D : (kv + 1) * D], v[:, kv * D : (kv + 1) * D]
        own = vh
        if qk_norm:
            qh, kh = rms_norm(qh), rms_norm(kh)
        if position == "rope":
            qh, kh = rope(qh, rope_base, rope_share), rope(kh, rope_base, rope_share)
        if M:  # tokens 0 to M - 1 are the memory
            kh, vh = torch.cat([w["memory_k"][kv], kh]), torch.cat([w["memory_v"][kv], vh])
        y = []
        for t, query in enumerate(qh):
            tokens = seen_by[t]
            seen = torch.cat([torch.arange(M), M + tokens])
            keys = kh[seen]
            if similarity == "dot":
                scores = keys @ query / math.sqrt(D)
            elif similarity == "cosine":
                scores = 10 * (keys @ query) / (keys.norm(dim=1) * query.norm())
            elif similarity == "multiplicative":
                scores = keys @ (w["between.weight"][h] @ query) / math.sqrt(D)
            else:
                scores = torch.tanh(keys @ w["k_hidden"][h] + query @ w["q_hidden"][h]) @ w["hidden_out"][h]
            if "log_sharpness" in w:
                scores = scores * w["log_sharpness"][h].exp()
            if "sharpness" in w:
                scores = scores * torch.tanh(w["sharpness"][h] @ x[t]).exp()
            if position == "alibi":
                scores = scores - 2 ** (-8 * (h + 1) / heads) * torch.cat([torch.zeros(M), t - tokens])
            y.append(NORMALISE[normalisation](scores) @ vh[seen])
            if exclusive:
                y[t] = y[t] - (y[t] @ own[t]) / (own[t] @ own[t]) * own[t]
        out.append(torch.stack(y))
    y = torch.cat(out, dim=-1)
    if gating == "output":
        y = y * gate
    y = y @ w["out.weight"].T
    if gating == "highway":
        y = gate * y + (1 - gate) * (x @ w["carry.weight"].T if "carry.weight" in w else x)
    return y


def linear_recurrence(q, k, v, decay):
    """o_t = q_t S_t, S_t = diag(decay_t) S_(t-1) + k_t v_t' for one head: (T, D), (T, D), (T, V), (T, D) -> (T, V)."""
    state, out = torch.zeros(k.size(1), v.size(1), dtype=k.dtype), []
    for t in range(len(q)):
        state = decay[t][:, None] * state + torch.outer(k[t], v[t])
        out.append(q[t] @ state)
    return torch.stack(out)


def retention(x, w, heads, decay="fixed", position="rope"):
    """Gated multi-scale retention (Sun et al. 2023, recurrent form, equation 6) of one sequence (T, C).

    decay: 1 - 2^(-5 - h) for head h (fixed), 1 (none), exp(-softplus) of a learned number, or for each channel the
    sixteenth root of a sigmoid of x (data; Yang et al. 2024).
    """
    q, k, v = (x @ w[f"{name}.weight"].T for name in "qkv")
    D = q.size(-1) // heads
    out = []
    for h in range(heads):
        part = slice(h * D, (h + 1) * D)
        qh, kh, vh = (rope(y[:, part]) if position == "rope" and y is not v else y[:, part] for y in (q, k, v))
        if decay == "data":
            kept = torch.sigmoid(x @ w["forget.weight"].T)[:, part] ** (1 / 16)
        elif decay == "learned":
            kept = torch.full_like(qh, 1 / (1 + w["decay_logit"][h].exp().item()))
        else:
            kept = torch.full_like(qh, 1 - 2.0 ** (-5 - h) if decay == "fixed" else 1.0)
        out.append(rms_norm(linear_recurrence(qh, kh / math.sqrt(D), vh, kept)))
    y = torch.cat(out, dim=-1)
    return (y * silu(x @ w["gate.weight"].T) if "gate.weight" in w else y) @ w["out.weight"].T


def gru(x, w):
    """A gated recurrent unit over one sequence (T, C) (Cho et al. 2014, with cuDNN's two biases)."""
    H = w["h_to_h.weight"].size(1)
    h, out = torch.zeros(H, dtype=x.dtype), []
    for token in x:
        r_x, z_x, n_x = (w["x_to_h.weight"] @ token + w["bias"][0]).split(H)
        r_h, z_h, n_h = (w["h_to_h.weight"] @ h + w["bias"][1]).split(H)
        z = torch.sigmoid(z_x + z_h)
        h = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h
        out.append(h)
    return torch.stack(out)


def convolution(x, weight):
    """y_t = sum_j W_j x_(t - j) of one sequence (T, C), weight (kernel, out, in)."""
    return torch.stack([sum(W @ x[t - j] for j, W in enumerate(weight) if t >= j) for t in range(len(x))])


def ssm(x, w, log_a_min):
    """h_t = a_t h_(t-1) + (1 - a_t) u_t, log a_t = max(-softplus(W x_t + b), log_a_min), of one sequence (T, C)."""
    u, forget = x @ w["u.weight"].T, x @ w["forget.weight"].T + w["forget_bias"]
    a = (-(1 + forget.exp()).log()).clamp(min=log_a_min).exp()
    h, out = torch.zeros(u.size(1), dtype=u.dtype), []
    for t in range(len(x)):
        h = a[t] * h + (1 - a[t]) * u[t]
        out.append(h)
    h = torch.stack(out)
    return (h * silu(x @ w["gate.weight"].T) if "gate.weight" in w else h) @ w["out.weight"].T


def mixture(x, w, top):
    """Each token (N, C) through the `top` experts that its router gives most, weighed by their share of the softmax."""
    out = []
    for token in x:
        share = softmax(w["router.weight"] @ token)
        y = 0.0
        for e in share.topk(top).indices:
            hidden = (w["up.weight"][e] @ token).clamp(min=0) ** 2
            y = y + share[e] * (w["out.weight"][e] @ hidden)
        if "shared_up.weight" in w:
            y = y + w["shared_out.weight"] @ (w["shared_up.weight"] @ token).clamp(min=0) ** 2
        out.append(y)
    return torch.stack(out)


def gate(x, w, kind):
    """A gated MLP (Shazeer 2020), or without a gate a plain one."""
    y = x @ w["up.weight"].T
    y = ACTIVATIONS[kind](x @ w["gate.weight"].T) * y if "gate.weight" in w else ACTIVATIONS[kind](y)
    return y @ w["out.weight"].T


def swiglu(x, w):
    return gate(x, w, "silu")


def shift(x, w):
    """Each token mixed with the one before, by a share for each channel: (T, C)."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        before = x[t - 1] if t else torch.zeros_like(x[t])
        out[t] = (1 - w["mix"]) * x[t] + w["mix"] * before
    return out


def ngram(x, w, rows):
    """A row of a table for each token; gated by its match with a matrix of the stream (Engram)."""
    y = ngram_rows(w["ngrams.table"], rows)
    if "match.weight" in w:
        match = (rms_norm(x @ w["match.weight"].T) * y).sum(1) / math.sqrt(y.size(1))
        y = y * torch.sigmoid(match)[:, None]
    return y


# ------------------------------------------------------------------------------------------------------------------
# What stands around an op. w: the weights of the wiring, without those of the op.


def grouped(x, stride):
    """The mean of each whole group of `stride` tokens; of ids (T,) the last one."""
    groups = [x[i : i + stride] for i in range(0, len(x) - stride + 1, stride)]
    if not groups:
        return x[:0]
    return torch.stack([group[-1] if x.dim() == 1 else group.mean(0) for group in groups])


def ungrouped(y, stride, T):
    """What was made of a group is seen from its last token on, until the next one is whole; zeros before the first."""
    out = torch.zeros(T, y.size(1), dtype=y.dtype)
    for g, made in enumerate(y):
        out[g * stride + stride - 1 : g * stride + 2 * stride - 1] = made
    return out


def wired(op, x, skip, w, activation="none", repeat=1, scale="none", stride=1):
    """What a gene makes of (T, C) where op makes (G, C') of (G, C): in groups, again, with a gain, added to skip."""
    y = grouped(x, stride)
    if "resize.weight" in w:
        y = y @ w["resize.weight"].T
    for _ in range(repeat):
        y = ACTIVATIONS[activation](op(y))
    y = ungrouped(y, stride, len(x))
    if scale != "none":
        y = y * w["gain"]
    if skip is not None:
        y = y + (skip @ w["project.weight"].T if "project.weight" in w else skip)
    return y


# ------------------------------------------------------------------------------------------------------------------
# Designs. ops: the weights of one gene after the other.


def language_model(idx, embedding, head, layers, ops):
    """Logits (B, T, vocab) of idx (B, T); `layers` maps a stream (T, C) and the weights of its ops to a stream."""
    logits = []
    for tokens in idx:
        x = layers(rms_norm(embedding[tokens]), iter(ops))
        logits.append(15 * torch.tanh(rms_norm(x) @ head.T / 15))
    return torch.stack(logits)


def llama(n_layer, mixer):
    """Pre-norm, RMSNorm, a mixer of tokens, SwiGLU (Touvron et al. 2023)."""

    def layers(x, ops):
        for _ in range(n_layer):
            x = x + mixer(rms_norm(x, next(ops)["gain"]), next(ops))
            x = x + swiglu(rms_norm(x, next(ops)["gain"]), next(ops))
        return x

    return layers


def gpt2(n_layer, mixer):
    """Pre-norm, layer norm, a mixer of tokens, GELU MLP (Radford et al. 2019)."""

    def layers(x, ops):
        for _ in range(n_layer):
            x = x + mixer(layer_norm(x, **next(ops)), next(ops))
            h = layer_norm(x, **next(ops)) @ next(ops)["out.weight"].T
            x = x + gelu(h) @ next(ops)["out.weight"].T
        return x

    return layers


def parallel(n_layer, heads):
    """Attention and retention beside each other, then SwiGLU."""

    def layers(x, ops):
        for _ in range(n_layer):
            h = rms_norm(x, next(ops)["gain"])
            x = x + attention(h, next(ops), heads, heads, qk_norm=True) + retention(h, next(ops), heads)
            x = x + swiglu(rms_norm(x, next(ops)["gain"]), next(ops))
        return x

    return layers
