"""The decode engine: one decoder for every method, in which only the linear layers differ.

shapes.py    sizes of a LLaMA-family decoder, from its Transformers configuration
formats.py   the number formats of linear layers, and how many bytes a weight takes in each
linear.py    one linear layer in each format
gemv.py      the product of one token with a floating-point weight
weights.py   a decoder's weights: from a checkpoint, a quantized checkpoint, or random
decoder.py   prefill of a chunk and one decoding step over a static KV cache
sampling.py  greedy and sampled choice of the next token
greedy.py    the end of a greedy step in one kernel
engine.py    prompts in, tokens out; CUDA graphs
memory.py    how much memory a run will take, before anything is allocated
"""

import importlib

_HOMES = {
    "FORMATS": "formats",
    "GREEDY": "sampling",
    "DecoderShapes": "shapes",
    "DecoderWeights": "weights",
    "Engine": "engine",
    "LinearFormat": "formats",
    "Sampling": "sampling",
    "format_of": "formats",
    "load_weights": "weights",
    "random_weights": "weights",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    # Loaded on demand: a sweep's preflight needs the formats' sizes, not what runs them.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
