"""Operands and references of the ablation's products, in PyTorch's float64 and int64 alone."""

from itertools import pairwise

import torch

GROUP = 128
# Tiles of the Hopper kernels: (warpgroups, tokens) and the columns of a pipeline stage (None: 256 if K is a multiple of
# 256, else 128).
HOPPER_TILES = {
    (2, 8): None,
    (2, 16): None,
    (2, 32): 128,
    (1, 64): 256,
    (2, 64): 128,
    (2, 96): 128,
    (1, 128): 256,
    (2, 128): 128,
    (2, 192): 128,
    (2, 256): 128,
}
FEW_TOKENS = 32  # up to this tile there is one tile of tokens, and clusters of three exist


def splits(tokens):
    """The splits of the reduction that exist for a tile of so many tokens."""
    return (1, 2, 3, 4, 8) if tokens <= FEW_TOKENS else (1, 2, 4, 8)


def operands(m, n, k, seed=0, device="cpu"):
    """x int8 [m, k], x_scale fp32 [m], w int4 as int8 [n, k], group_scale fp32 [k / 128, n], the generator."""
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, **options)
    w = torch.randint(-8, 8, (n, k), dtype=torch.int8, **options)
    # / 32: no result overflows fp16.
    return x, torch.rand(m, **options) + 0.1, w, (torch.rand(k // GROUP, n, **options) + 0.1) / 32, generator


def group_sums(x, w):
    """The exact integer sums of each group, float64 [groups, m, n]."""
    groups = x.shape[1] // GROUP
    x_groups = x.double().view(x.shape[0], groups, GROUP).permute(1, 0, 2)
    w_groups = w.double().view(w.shape[0], groups, GROUP).permute(1, 2, 0)
    return torch.bmm(x_groups, w_groups)


def exact_grouped(sums, group_scale, x_scale):
    """The product in float64 [m, n]."""
    return (sums * group_scale.double()[:, None, :]).sum(0) * x_scale.double()[:, None]


def rounded_grouped(sums, group_scale, x_scale, ranges):
    """The product with the roundings of the Hopper kernel, fp32 [m, n].

    Each CTA adds its groups in ascending order, total = fma(sum, scale, total) in fp32; the totals of the CTAs are
    added in their order and multiplied with x_scale. float64 holds each product and, but for rare ties, each fma.

    Args:
        ranges: (first group, last group + 1) of each CTA.
    """
    result = torch.zeros(sums.shape[1:], dtype=torch.float32, device=sums.device)
    for begin, end in ranges:
        total = torch.zeros_like(result)
        for g in range(begin, end):
            total = (sums[g] * group_scale[g].double() + total.double()).float()
        result = result + total
    return result * x_scale[:, None]


def group_ranges(tile, split, k):
    """The groups that each CTA of a cluster of `split` multiplies: whole pipeline stages, as equal as they can be."""
    columns = HOPPER_TILES[tile] or (256 if k % 256 == 0 else 128)
    steps, groups = -(-k // columns), k // GROUP
    while split > steps:
        split = 2 if split == 3 else split // 2
    cuts = [min(steps * rank // split * (columns // GROUP), groups) for rank in range(split + 1)]
    return list(pairwise(cuts))
