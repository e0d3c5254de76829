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


def rope(x):
    """Turn the pair (x_i, x_(i + D/2)) of token t by t * 10000^(-2i/D), as complex numbers: (T, D)."""
    T, D = x.shape
    a, b = x[:, : D // 2], x[:, D // 2 :]
    angle = torch.arange(T).double()[:, None] * 10_000.0 ** (-2 * torch.arange(D // 2).double() / D)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


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


def attention(
    x, w, heads, kv_heads, qk_norm, position="rope", window=0, similarity="dot", normalisation="softmax", gating="none"
):
    """Causal self-attention of one sequence (T, C), head by head, query by query.

    Learned temperature, bottleneck of keys and values, and memory tokens are there where w has their weights.
    """
    D, M = w["q.weight"].size(0) // heads, w["memory_k"].size(1) if "memory_k" in w else 0
    source = rms_norm(x @ w["down.weight"].T) if "down.weight" in w else x
    q, k, v = x @ w["q.weight"].T, source @ w["k.weight"].T, source @ w["v.weight"].T
    gate = torch.sigmoid(x @ w["gate.weight"].T) if gating != "none" else None
    if gating == "input":
        v = v * gate
    out = []
    for h in range(heads):
        kv = h * kv_heads // heads
        qh, kh, vh = q[:, h * D : (h + 1) * D], k[:, kv * D : (kv + 1) * D], v[:, kv * D : (kv + 1) * D]
        if qk_norm:
            qh, kh = rms_norm(qh), rms_norm(kh)
        if position == "rope":
            qh, kh = rope(qh), rope(kh)
        if M:  # tokens 0 to M - 1 are the memory
            kh, vh = torch.cat([w["memory_k"][kv], kh]), torch.cat([w["memory_v"][kv], vh])
        rows = []
        for t, query in enumerate(qh):
            first = max(0, t + 1 - window) if window else 0
            seen = [*range(M), *range(M + first, M + t + 1)]
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
                distance = torch.tensor([0] * M + list(range(t - first, -1, -1)))
                scores = scores - 2 ** (-8 * (h + 1) / heads) * distance
            rows.append(NORMALISE[normalisation](scores) @ vh[seen])
        out.append(torch.stack(rows))
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


def retention(x, w, heads):
    """Gated multi-scale retention (Sun et al. 2023, recurrent form, equation 6) of one sequence (T, C)."""
    q, k, v = (x @ w[f"{name}.weight"].T for name in "qkv")
    D = q.size(-1) // heads
    out = []
    for h in range(heads):
        qh, kh, vh = (y[:, h * D : (h + 1) * D] for y in (q, k, v))
        decay = torch.full_like(qh, 1 - 2.0 ** (-5 - h))
        out.append(rms_norm(linear_recurrence(rope(qh), rope(kh) / math.sqrt(D), vh, decay)))
    return (silu(x @ w["gate.weight"].T) * torch.cat(out, dim=-1)) @ w["out.weight"].T


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


def swiglu(x, w):
    return (silu(x @ w["gate.weight"].T) * (x @ w["up.weight"].T)) @ w["out.weight"].T


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
