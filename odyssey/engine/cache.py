"""The static key/value cache: allocated once, the same addresses in every step, so that a CUDA graph can hold them."""

from __future__ import annotations

import torch

from odyssey.engine.shapes import DecoderShapes


class KeyValueCache:
    """Keys and values of `batch_size` sequences of at most `max_len` tokens.

    keys, values: per layer [batch_size, num_kv_heads, max_len, head_dim] in the model's dtype. lengths: int32
    [batch_size] on the device, positions that each sequence has in the cache. Engines of the same shapes and dtype can
    share one, as long as they run one after the other.
    """

    def __init__(
        self, shapes: DecoderShapes, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.batch_size, self.max_len = batch_size, max_len
        size = (shapes.num_layers, batch_size, shapes.num_kv_heads, max_len, shapes.head_dim)
        self._keys = torch.zeros(size, dtype=dtype, device=device)
        self._values = torch.zeros(size, dtype=dtype, device=device)
        self.keys = list(self._keys.unbind(0))
        self.values = list(self._values.unbind(0))
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def fits(self, shapes: DecoderShapes, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a decoder of these shapes can use this cache."""
        layers, _, heads, _, head_dim = self._keys.shape
        wanted = (shapes.num_layers, shapes.num_kv_heads, shapes.head_dim, dtype, device)
        return (layers, heads, head_dim, self._keys.dtype, self._keys.device) == wanted
