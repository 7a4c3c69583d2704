"""How much memory a run takes, predicted from its sizes before anything is allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import psutil
import torch

from odyssey.engine.engine import PREFILL_TOKENS
from odyssey.engine.formats import LinearFormat
from odyssey.engine.shapes import DecoderShapes
from odyssey.errors import UnsupportedError

# CUDA context, libraries' workspaces, graphs and what the allocator leaves between blocks.
_FIXED_BYTES = 1 << 30


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a run by what they are for."""

    weights: int
    kv_cache: int
    activations: int
    fixed: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.fixed

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def weight_bytes(shapes: DecoderShapes, form: LinearFormat, element_size: int = 2) -> int:
    """Bytes of all weights: linear layers in `form`; embedding, head and norms in the model's dtype."""
    layer = sum(form.weight_bytes(*size, element_size) for size in shapes.linear_sizes().values())
    tables = (1 if shapes.tied_head else 2) * shapes.vocab_size * shapes.hidden_size * element_size
    norms = (2 * shapes.num_layers + 1) * shapes.hidden_size * element_size
    return shapes.num_layers * layer + tables + norms


def predict(
    shapes: DecoderShapes,
    form: LinearFormat,
    *,
    batch_size: int,
    max_len: int,
    element_size: int = 2,
    prefill_tokens: int = PREFILL_TOKENS,
) -> MemoryNeed:
    """What `batch_size` sequences of `max_len` tokens take; the largest prefill chunk decides over the activations."""
    tokens = min(prefill_tokens, batch_size * max_len)
    # At the widest point: the residual, gate and up, their product and its int8 form; or the queries, keys and values.
    widest = max(2 * shapes.hidden_size + 3.5 * shapes.intermediate_size, 3 * shapes.hidden_size + 2 * shapes.qkv_size)
    logits = batch_size * shapes.vocab_size * (element_size + 4)
    return MemoryNeed(
        weights=weight_bytes(shapes, form, element_size),
        kv_cache=batch_size * max_len * shapes.kv_bytes_per_token(element_size),
        activations=int(tokens * widest * element_size) + logits,
        fixed=_FIXED_BYTES,
    )


def available_bytes(device: torch.device) -> int:
    """Bytes that this process can still have: of the GPU, its own cached blocks included, or of the host."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require(need: MemoryNeed, device: torch.device, what: str) -> None:
    """Raise UnsupportedError, with both figures, where `need` is more than the GPU has left."""
    available = available_bytes(device)
    if need.total > available:
        raise UnsupportedError(
            f"{what}: {too_large(need, available)}; use a smaller batch, another format or a larger GPU"
        )


def too_large(need: MemoryNeed, available: int) -> str:
    """Both figures in one line."""
    return (
        f"predicted {need.total / 2**30:.1f} GiB ({need.weights / 2**30:.1f} weights, {need.kv_cache / 2**30:.1f} KV "
        f"cache), there are {available / 2**30:.1f} GiB"
    )
