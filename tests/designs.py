"""Published designs as genomes, for test_genome.py and bench.py: 6 to 10 M parameters with 8,192 tokens."""

from genome import Gene, Genome, transformer


def gpt2(n_layer: int, dim: int, heads: int) -> Genome:
    """Pre-norm with layer norm, GELU MLP, tied head (Radford et al. 2019).

    What the space cannot say: learned positions (ALiBi stands in), biases, a hidden width beyond 512.
    """
    block = (
        Gene("norm", kind="layer"),
        Gene("attention", dim, skip=2, heads=heads, position="alibi", qk_norm=False),
        Gene("norm", kind="layer"),
        Gene("linear", 512, activation="gelu"),
        Gene("linear", dim, skip=3),
    )
    return Genome(block * n_layer, embed_dim=dim, tied=True)


def retnet(n_layer: int, dim: int, heads: int) -> Genome:
    """Gated retention with fixed decay, GELU MLP (Sun et al. 2023), values as wide as keys."""
    block = (
        Gene("norm", kind="layer"),
        Gene("retention", dim, skip=2, heads=heads),
        Gene("norm", kind="layer"),
        Gene("linear", 512, activation="gelu"),
        Gene("linear", dim, skip=3),
    )
    return Genome(block * n_layer, embed_dim=dim)


def parallel(n_layer: int, dim: int, heads: int) -> Genome:
    """Attention and retention side by side on the same norm, their sum added to the stream."""
    block = (
        Gene("norm"),
        Gene("attention", dim, skip=2, heads=heads),
        Gene("retention", dim, input=2, skip=1, heads=heads),
        Gene("norm"),
        Gene("gate", dim, skip=2),
    )
    return Genome(block * n_layer, embed_dim=dim)


NAMED_DESIGNS = {
    "gpt2": gpt2(8, 256, 4),
    "llama": transformer(6, 256, 8, kv_heads="half", qk_norm=False),
    "retnet": retnet(7, 256, 4),
    "parallel": parallel(4, 256, 4),
    "evo-attention": transformer(  # the published winner: dot, sparsemax, output gate, learned temperature
        5, 256, 4, normalisation="sparsemax", gating="output", temperature="learned", qk_norm=False
    ),
}
