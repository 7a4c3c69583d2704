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

from odyssey.engine.engine import Engine
from odyssey.engine.formats import FORMATS, LinearFormat, format_of
from odyssey.engine.sampling import GREEDY, Sampling
from odyssey.engine.shapes import DecoderShapes
from odyssey.engine.weights import DecoderWeights, load_weights, random_weights

__all__ = [
    "FORMATS",
    "GREEDY",
    "DecoderShapes",
    "DecoderWeights",
    "Engine",
    "LinearFormat",
    "Sampling",
    "format_of",
    "load_weights",
    "random_weights",
]
