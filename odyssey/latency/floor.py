"""The least time that a run can take on a machine: operations over its peak, bytes over its bandwidth.

Prefill: every product of the prompt's tokens at the measured peak of its format (int8 for W8A8 and W4A8, the model's
dtype for the others), causal attention at the peak of the model's dtype; behind the last layer's attention only the
prompt's last token. Or, if that is longer, the bytes of the weights once. Decoding: in every step the bytes of all
linear layers, of the head and of the keys and values so far, once, at the measured bandwidth; or the operations, if
they take longer. Norms, activation functions, sampling and launches count as nothing; a sliding window takes nothing
off.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from odyssey.engine.formats import LinearFormat
from odyssey.engine.shapes import DecoderShapes
from odyssey.latency.ceilings import Ceilings


@dataclass(frozen=True)
class Floor:
    """Milliseconds; decode_ms is the sum over all decoding steps, decode_ms_per_token their mean."""

    prefill_ms: float
    decode_ms: float
    decode_ms_per_token: float
    total_ms: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def floor_of(
    shapes: DecoderShapes,
    form: LinearFormat,
    ceilings: Ceilings,
    *,
    batch_size: int,
    input_len: int,
    output_len: int,
    element_size: int = 2,
) -> Floor:
    """The floor of a run: `input_len` tokens in, of `output_len` tokens out the first from the prefill."""
    bandwidth = ceilings.read_bytes_per_s
    peak = ceilings.int8_ops_per_s if form.takes_int8 else ceilings.float_ops_per_s
    sizes = shapes.linear_sizes()
    head_bytes = shapes.vocab_size * shapes.hidden_size * element_size
    head_s = 2 * batch_size * shapes.vocab_size * shapes.hidden_size / ceilings.float_ops_per_s
    layer_bytes = sum(form.weight_bytes(*size, element_size) for size in sizes.values())
    weight_bytes = shapes.num_layers * layer_bytes + head_bytes

    def attention_s(pairs: float) -> float:
        """Two products of head_dim for each query head and pair of positions."""
        return 4 * batch_size * shapes.attention_size * pairs / ceilings.float_ops_per_s

    def products_s(tokens: float, names: tuple[str, ...] = tuple(sizes)) -> float:
        return sum(2 * tokens * sizes[name][0] * sizes[name][1] for name in names) / peak

    tokens = batch_size * input_len
    pairs = input_len * (input_len + 1) / 2
    compute_s = (
        (shapes.num_layers - 1) * products_s(tokens)
        + products_s(tokens, ("qkv",))
        + products_s(batch_size, ("o", "gate_up", "down"))
        + (shapes.num_layers - 1) * attention_s(pairs)
        + attention_s(input_len)
        + head_s
    )
    prefill_s = max(compute_s, weight_bytes / bandwidth)
    steps = output_len - 1
    decode_s = 0.0
    for step in range(1, steps + 1):
        context = input_len + step
        read_s = (weight_bytes + batch_size * context * shapes.kv_bytes_per_token(element_size)) / bandwidth
        step_s = shapes.num_layers * (products_s(batch_size) + attention_s(context)) + head_s
        decode_s += max(read_s, step_s)
    return Floor(
        prefill_ms=1e3 * prefill_s,
        decode_ms=1e3 * decode_s,
        decode_ms_per_token=1e3 * decode_s / max(1, steps),
        total_ms=1e3 * (prefill_s + decode_s),
    )
