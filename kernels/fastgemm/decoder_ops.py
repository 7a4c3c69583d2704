"""The operators of a LLaMA decoder layer between its matrix products, and their public functions.

As in `ops`: every operator has a CUDA, a CPU and a fake implementation, checks its arguments before anything runs,
can be captured in a CUDA graph and is not differentiable. Those that append to the key/value cache write into
`k_cache` and `v_cache` and are declared so; all others are functional.

The cache of one layer is k_cache and v_cache, each [batch, kv_heads, max_len, head_dim] in the model's dtype.
`cos_sin` is the table of rotary embeddings, fp32 [positions, head_dim], positions at least max_len: cos of the
head_dim / 2 angles in the first half of a row, sin in the second. Element d of a head is paired with
d + head_dim / 2 ("rotate half", as in Transformers' LLaMA):

    x1' = x1 cos - x2 sin        x2' = x2 cos + x1 sin

in fp32, rounded once to the model's dtype.
"""

import torch

from . import decoder_cpu, decoder_cuda
from .checks import check_rms_norm_quant, check_silu_mul_quant, check_tensor
from .decoder_checks import check_decode_attention, check_rope_append
from .ops import _require_tensors

_ATTENTION_ARGUMENTS = (
    "(Tensor qkv, Tensor cos_sin, Tensor lengths, Tensor(a!) k_cache, Tensor(b!) v_cache, int num_heads, "
    "float? softmax_scale=None, int? window=None, bool cache_ready=False)"
)
_SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "silu_mul": "(Tensor gate_up) -> Tensor",
    "rope_append": (
        "(Tensor qkv, Tensor cos_sin, Tensor positions, Tensor rows, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "int num_heads) -> Tensor"
    ),
    "decode_attention": _ATTENTION_ARGUMENTS + " -> Tensor",
    "decode_attention_quant": _ATTENTION_ARGUMENTS + " -> (Tensor, Tensor)",
}

_library = torch.library.Library("fastgemm", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(decoder_cpu, _name), "CPU")
    _library.impl(_name, getattr(decoder_cuda, _name), "CUDA")


@torch.library.register_fake("fastgemm::rms_norm", lib=_library)
def _(x, weight, eps):
    check_rms_norm_quant(x, weight, eps, None)
    return x.new_empty(x.shape)


@torch.library.register_fake("fastgemm::add_rms_norm", lib=_library)
def _(x, residual, weight, eps):
    check_rms_norm_quant(x, weight, eps, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("fastgemm::silu_mul", lib=_library)
def _(gate_up):
    check_silu_mul_quant(gate_up)
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.register_fake("fastgemm::rope_append", lib=_library)
def _(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads):
    shape = check_rope_append(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads)
    return qkv.new_empty(shape.tokens, num_heads, shape.head_dim)


@torch.library.register_fake("fastgemm::decode_attention", lib=_library)
def _(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale=None, window=None, cache_ready=False):
    shape = check_decode_attention(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window)
    return qkv.new_empty(shape.tokens, num_heads * shape.head_dim)


@torch.library.register_fake("fastgemm::decode_attention_quant", lib=_library)
def _(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale=None, window=None, cache_ready=False):
    shape = check_decode_attention(qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window)
    q = qkv.new_empty(shape.tokens, num_heads * shape.head_dim, dtype=torch.int8)
    return q, qkv.new_empty(shape.tokens, dtype=torch.float32)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, optionally of x + residual: `rms_norm_quant` without the quantization, to the bit.

    Args:
        x: float16, bfloat16 or float32 [M, K].
        weight: [K], dtype of `x`.
        eps: added to the mean of squares.
        residual: None or [M, K], dtype of `x`.

    Returns:
        (y, residual_out): both [M, K] in the dtype of `x`; residual_out is x + residual (`x` itself without a
        residual).

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device.
    """
    _require_tensors(x=x, weight=weight)
    if residual is None:
        return torch.ops.fastgemm.rms_norm(x, weight, eps), x
    check_tensor("residual", residual, (x.dtype,), 2, x)
    return torch.ops.fastgemm.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: `silu_mul_quant` without the quantization, to the bit.

    Args:
        gate_up: float16, bfloat16 or float32 [M, 2 * I]: the gate's I columns first.

    Returns:
        [M, I] in the dtype of `gate_up`.

    Raises:
        TypeError, ValueError: `gate_up` has a wrong dtype or shape.
    """
    _require_tensors(gate_up=gate_up)
    return torch.ops.fastgemm.silu_mul(gate_up)


def rope_append(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Rotary embedding of the queries and keys of T tokens, and their keys and values into the cache (prefill).

    Token t is position positions[t] of sequence rows[t]. No two tokens may share both.

    Args:
        qkv: [T, (num_heads + 2 * kv_heads) * head_dim]: queries, then keys, then values.
        cos_sin: rotary table, fp32 [positions, head_dim].
        positions: int32 [T], in 0..max_len - 1.
        rows: int32 [T], in 0..batch - 1.
        k_cache, v_cache: [batch, kv_heads, max_len, head_dim], contiguous, dtype of `qkv`; written.
        num_heads: number of query heads, a multiple of kv_heads.

    Returns:
        The queries after rotary embedding, [T, num_heads, head_dim].

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device. An index outside the cache is a
            ValueError on a CPU; a GPU does not read indices back: it writes nothing for such a token and its
            queries are NaN.
    """
    _require_tensors(qkv=qkv, cos_sin=cos_sin, positions=positions, rows=rows, k_cache=k_cache, v_cache=v_cache)
    return torch.ops.fastgemm.rope_append(qkv, cos_sin, positions, rows, k_cache, v_cache, num_heads)


def decode_attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    lengths: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    softmax_scale: float | None = None,
    window: int | None = None,
    *,
    cache_ready: bool = False,
) -> torch.Tensor:
    """One decoded token of each sequence: rotary embedding, cache append and attention.

    Token b is position lengths[b] of sequence b, whose earlier positions are in the cache. Its key and value are
    stored there, and its queries attend to lengths[b] + 1 positions, or to the last `window` of them. Scores and
    softmax are fp32; on a GPU the probabilities are rounded to the model's dtype before they multiply the values.
    `lengths` stays on the device and is not changed.

    Args:
        qkv: [batch, (num_heads + 2 * kv_heads) * head_dim]: queries, then keys, then values.
        cos_sin: rotary table, fp32 [positions, head_dim].
        lengths: int32 [batch], in 0..max_len - 1.
        k_cache, v_cache: [batch, kv_heads, max_len, head_dim], contiguous, dtype of `qkv`; position lengths[b] is
            written. A GPU supports float16 and bfloat16 with a head_dim of 64 or 128.
        num_heads: number of query heads, a multiple of kv_heads.
        softmax_scale: factor of the scores; None: 1 / sqrt(head_dim).
        window: positions attended to, the token's own included; None: all.
        cache_ready: CUDA only. A promise that no kernel of the stream that may still be running writes the caches. The
            kernel before this one may itself have begun before those ahead of it ended, as most kernels here do on
            Hopper; behind `w4a8_gemm` and `w8a8_gemm` only that one may be running. The earlier positions are then
            loaded while it still runs.

    Returns:
        [batch, num_heads * head_dim] in the dtype of `qkv`.

    Raises:
        TypeError, ValueError: an argument has a wrong dtype, shape or device. A length outside the cache is a
            ValueError on a CPU; a GPU does not read lengths back: it writes nothing for such a token and its output
            is NaN.
    """
    _require_tensors(qkv=qkv, cos_sin=cos_sin, lengths=lengths, k_cache=k_cache, v_cache=v_cache)
    return torch.ops.fastgemm.decode_attention(
        qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window, cache_ready
    )


def decode_attention_quant(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    lengths: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    softmax_scale: float | None = None,
    window: int | None = None,
    *,
    cache_ready: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_per_token(decode_attention(...))`, equal to the bit on the same device, without the second pass.

    Returns:
        (q, scale): int8 [batch, num_heads * head_dim] and fp32 [batch].
    """
    _require_tensors(qkv=qkv, cos_sin=cos_sin, lengths=lengths, k_cache=k_cache, v_cache=v_cache)
    return torch.ops.fastgemm.decode_attention_quant(
        qkv, cos_sin, lengths, k_cache, v_cache, num_heads, softmax_scale, window, cache_ready
    )
