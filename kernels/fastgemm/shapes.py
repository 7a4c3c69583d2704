"""Problem sizes shared by the tests and the benchmark: the linear layers of real models, and edge cases."""

from dataclasses import dataclass

HEAD_DIM = 128


@dataclass(frozen=True)
class LinearShape:
    """One weight [n, k] = [out_features, in_features] and what it is."""

    model: str
    layer: str
    n: int
    k: int


@dataclass(frozen=True)
class _Model:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


_MODELS = {
    "llama-7b": _Model(4096, 11008, 32, 32),
    "llama-13b": _Model(5120, 13824, 40, 40),
    "llama-30b": _Model(6656, 17920, 52, 52),
    "llama-65b": _Model(8192, 22016, 64, 64),
    "llama2-70b": _Model(8192, 28672, 64, 8),
    "llama3-8b": _Model(4096, 14336, 32, 8),
    "qwen2.5-7b": _Model(3584, 18944, 28, 4),
    "qwen2.5-14b": _Model(5120, 13824, 40, 8),
    "qwen2.5-32b": _Model(5120, 27648, 40, 8),
    "qwen2.5-72b": _Model(8192, 29568, 64, 8),
    "mistral-7b": _Model(4096, 14336, 32, 8),
}
_ALIASES = {
    "llama2-7b": "llama-7b",
    "llama2-13b": "llama-13b",
    "llama3-70b": "llama2-70b",
    "llama3.1-8b": "llama3-8b",
    "llama3.1-70b": "llama2-70b",
}


def model_names() -> list[str]:
    """Names `model_shapes` knows."""
    return [*_MODELS, *_ALIASES]


def model_shapes(name: str) -> list[LinearShape]:
    """The four products of a decoder block as an engine runs them: q, k, v merged, and gate, up merged.

    Raises:
        ValueError: unknown model.
    """
    key = _ALIASES.get(name, name)
    if key not in _MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(model_names())}")
    m = _MODELS[key]
    qkv = (m.heads + 2 * m.kv_heads) * HEAD_DIM
    return [
        LinearShape(name, "qkv", qkv, m.hidden),
        LinearShape(name, "o", m.hidden, m.heads * HEAD_DIM),
        LinearShape(name, "gate_up", 2 * m.intermediate, m.hidden),
        LinearShape(name, "down", m.hidden, m.intermediate),
    ]


def parse_shapes(text: str) -> list[LinearShape]:
    """Shapes of a comma-separated list of model names and NxK sizes, without repetitions.

    Raises:
        ValueError: an entry is neither, or its size is none the GEMMs take.
    """
    from .packing import check_weight_size

    shapes: dict[tuple[int, int], LinearShape] = {}
    for entry in filter(None, (e.strip() for e in text.split(","))):
        n, separator, k = entry.partition("x")
        if separator and n.isdigit() and k.isdigit():
            found = [LinearShape("", entry, int(n), int(k))]
            check_weight_size(int(n), int(k))
        else:
            found = model_shapes(entry)
        for shape in found:
            shapes.setdefault((shape.n, shape.k), shape)
    if not shapes:
        raise ValueError("no shapes given")
    return list(shapes.values())


def edge_cases() -> list[tuple[int, int, int]]:
    """Sizes (m, n, k) around every tile boundary: one token, odd M, N % 64 and K % 64 not 0."""
    cases = [(m, 16, 32) for m in (0, 1, 2, 7, 8, 9)]
    cases += [(m, 80, 96) for m in (1, 15, 16, 17, 31, 33)]
    cases += [(m, 272, 544) for m in (1, 5, 63, 64, 65, 127, 128, 129, 255, 257)]
    cases += [(m, 1040, 1056) for m in (1, 24, 100, 200, 300)]
    # Both pipeline steps of the Hopper kernel (128 and 256 columns), and every token tile.
    cases += [(1, 1040, 256), (8, 272, 768), (16, 528, 1280), (17, 528, 768), (80, 272, 1056), (96, 1040, 2048)]
    cases += [(160, 528, 1056), (192, 400, 512), (256, 272, 1152), (385, 1040, 288)]
    cases += [(3, 4096, 4096), (48, 1024, 8192), (130, 528, 11008), (513, 400, 352), (1000, 112, 64)]
    # Many whole tiles of an odd number of pieces, each stored soon after the one before.
    cases += [(257, 8256, 416), (600, 4112, 64)]
    # Clusters that share the reductions of several tiles one after the other, alone and after whole tiles; and of one
    # after whole tiles that leave through the memory of the exchange.
    cases += [(1, 9232, 4096), (1, 25616, 4096), (65, 17040, 544), (200, 17040, 2048)]
    return cases


def shared_operand_cases() -> list[tuple[int, int, int]]:
    """Sizes (m, n, k) for which pairs of CTAs of the Hopper kernel for W4A8, W8A8 or both load one operand for both.

    The tokens or (W8A8) the weights, in tiles of 64 to 256 tokens, with odd numbers of row and token tiles and tails
    in M, N and K.
    """
    cases = [(97, 8208, 4096), (300, 4096, 4096), (300, 17040, 1056), (513, 4112, 4096), (385, 8208, 2048)]
    cases += [(300, 2064, 4096), (700, 2064, 4096), (600, 4096, 2048)]
    cases += [(130, 17040, 544), (200, 17040, 544), (370, 17040, 1056), (512, 8208, 4096), (1000, 2064, 4096)]
    return cases
