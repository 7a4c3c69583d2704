"""Causal attention of a prefill chunk over the cache, with PyTorch's fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right


def prefill_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, segments: Sequence, window: int | None
) -> torch.Tensor:
    """Attention of a chunk's tokens to all earlier positions of their own prompts and to themselves.

    queries: [tokens, num_heads, head_dim], rotated. keys, values: [batch_size, num_kv_heads, max_len, head_dim], the
    chunk's own positions included. segments: of `decoder.Segment`, in the order of the tokens. window: positions that a
    token attends to, itself included; None for all.

    Returns [tokens, num_heads * head_dim].
    """
    first = segments[0]
    alike = all(
        (each.row, each.start, each.count) == (first.row + number, first.start, first.count)
        for number, each in enumerate(segments)
    )
    if alike:
        rows = slice(first.row, first.row + len(segments))
        return _attend(queries, keys[rows], values[rows], first.start, first.count, window)
    parts = queries.split([segment.count for segment in segments])
    return torch.cat(
        [
            _attend(
                part, keys[each.row : each.row + 1], values[each.row : each.row + 1], each.start, each.count, window
            )
            for part, each in zip(parts, segments, strict=True)
        ]
    )


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, count: int, window: int | None
) -> torch.Tensor:
    """Prompts of one row each, all with `count` tokens from position `start` on."""
    rows, end = keys.shape[0], start + count
    heads, head_dim = queries.shape[1:]
    # [rows, heads, count, head_dim], a view: the kernels take any strides whose last one is 1.
    queries = queries.view(rows, count, heads, head_dim).transpose(1, 2)
    keys, values = keys[:, :, :end], values[:, :, :end]
    grouped = {"enable_gqa": heads != keys.shape[1]}
    if window is not None and end > window:
        positions = torch.arange(end, device=queries.device)
        distance = positions[start:, None] - positions[None]
        mask = (distance >= 0) & (distance < window)
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **grouped)
    elif start == 0:
        output = F.scaled_dot_product_attention(queries, keys, values, is_causal=count > 1, **grouped)
    else:
        bias = causal_lower_right(count, end)
        output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, **grouped)
    return output.transpose(1, 2).reshape(rows * count, heads * head_dim)
