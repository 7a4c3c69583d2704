"""Integer grids against NumPy, whose float32 arithmetic is IEEE like the one promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odyssey.quantization.grid import (
    asymmetric_scales,
    check_finite,
    dequantize,
    group_range,
    minmax_grid,
    per_column,
    quantize_activation_per_token,
    quantize_weight,
    round_to_nearest,
    sum_groups,
    symmetric_scales,
)
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme


def random_weight(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def groups_of(in_features: int, group_size: int) -> list[slice]:
    if group_size == PER_CHANNEL:
        return [slice(0, in_features)]
    return [slice(start, start + group_size) for start in range(0, in_features, group_size)]


def reference_symmetric(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Group by group in NumPy float32: integers and scales."""
    qmax = np.float32(2 ** (bits - 1) - 1)
    values, scales = np.zeros(weight.shape, np.int8), []
    for part in groups_of(weight.shape[1], group_size):
        absmax = np.abs(weight[:, part]).max(axis=1, keepdims=True)
        scale = np.where(absmax == 0, np.float32(1), absmax / qmax)
        values[:, part] = np.clip(np.rint(weight[:, part] / scale), -qmax - 1, qmax).astype(np.int8)
        scales.append(scale)
    return values, np.concatenate(scales, axis=1)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 40))
group_sizes = st.one_of(st.just(PER_CHANNEL), st.integers(1, 45))


@given(shape=shapes, group_size=group_sizes, bits=st.integers(2, 8), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_round_to_nearest_matches_numpy(shape, group_size, bits, seed):
    weight = random_weight(*shape, seed)
    weight[0] = 0
    scheme = QuantScheme(bits, group_size)
    result = round_to_nearest(weight, scheme)
    values, scales = reference_symmetric(weight.numpy(), bits, group_size)
    np.testing.assert_array_equal(result.values.numpy(), values)
    np.testing.assert_array_equal(result.scales.numpy(), scales)
    expected = np.concatenate(
        [
            values[:, part].astype(np.float32) * scales[:, group : group + 1]
            for group, part in enumerate(groups_of(shape[1], group_size))
        ],
        axis=1,
    )
    np.testing.assert_array_equal(dequantize(result).numpy(), expected)


@given(shape=shapes, group_size=group_sizes, bits=st.integers(2, 8), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_integer_is_the_nearest_of_its_grid(shape, group_size, bits, seed):
    weight = random_weight(*shape, seed)
    scheme = QuantScheme(bits, group_size, symmetric=seed % 2 == 0)
    result = round_to_nearest(weight, scheme)
    assert result.values.min() >= scheme.qmin
    assert result.values.max() <= scheme.qmax
    levels = torch.arange(scheme.qmin, scheme.qmax + 1, dtype=torch.float64)
    scales = per_column(result.scales, shape[1], group_size).double().expand(shape)
    zeros = torch.zeros(shape, dtype=torch.float64)
    if result.zeros is not None:
        zeros = per_column(result.zeros, shape[1], group_size).double().expand(shape)
    best = (weight.double()[..., None] - (levels - zeros[..., None]) * scales[..., None]).abs().amin(-1)
    error = (weight.double() - (result.values.double() - zeros) * scales).abs()
    assert torch.all(error <= best + 1e-6 * scales)


@given(shape=shapes, group_size=group_sizes, seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_asymmetric_grid_covers_the_range_and_holds_zero(shape, group_size, seed):
    weight = random_weight(*shape, seed) + (seed % 5 - 2)
    scheme = QuantScheme(4, group_size, symmetric=False, activation_bits=16)
    scales, zeros = minmax_grid(weight, scheme)
    assert zeros.dtype == torch.uint8
    for group, part in enumerate(groups_of(shape[1], group_size)):
        low = weight[:, part].amin(1).clamp(max=0).double()
        high = weight[:, part].amax(1).clamp(min=0).double()
        scale, zero = scales[:, group].double(), zeros[:, group].double()
        torch.testing.assert_close(scale, (high - low) / 15, rtol=1e-6, atol=0)
        assert torch.all((zero >= 0) & (zero <= 15))
        # The zero point is rounded, so each end of the range may lie up to half a step outside the grid.
        assert torch.all(-zero * scale - low <= 0.5 * scale * (1 + 1e-5))
        assert torch.all(high - (15 - zero) * scale <= 0.5 * scale * (1 + 1e-5))
    of_zero = QuantizedWeight(quantize_weight(torch.zeros(shape), scales, zeros, scheme), scales, scheme, zeros)
    assert not dequantize(of_zero).any()


def test_group_helpers_with_a_shorter_last_group():
    weight = torch.tensor([[1.0, -2, 3, 4, -5, -6, -7], [-1, -1, -1, -1, -1, -1, -3]])
    low, high = group_range(weight, 3)
    assert low.tolist() == [[-2, -6, -7], [-1, -1, -3]]
    assert high.tolist() == [[3, 4, -7], [-1, -1, -3]]
    assert sum_groups(weight, 3).tolist() == [[2, -7, -7], [-3, -3, -3]]
    assert per_column(torch.tensor([[1.0, 2, 3]]), 7, 3).tolist() == [[1, 1, 1, 2, 2, 2, 3]]


def test_scales_of_zero_and_of_denormal_groups():
    scheme = QuantScheme(4)
    absmax = torch.tensor([[0.0], [7.0], [1e-45]])
    assert symmetric_scales(absmax, scheme).tolist() == [[1], [1], [1]]
    scales, zeros = asymmetric_scales(torch.zeros(1, 1), torch.zeros(1, 1), QuantScheme(4, symmetric=False))
    assert scales.item() == 1
    assert zeros.item() == 0
    assert torch.isfinite(dequantize(round_to_nearest(torch.full((1, 4), 1e-45), scheme))).all()


def test_fixed_grid_clamps_to_both_ends():
    scheme = QuantScheme(4)
    weight = torch.tensor([[-20.0, -8.4, -7.5, -6.5, 6.5, 7.4, 20.0]])
    result = round_to_nearest(weight, scheme, scales=torch.ones(1, 1))
    assert result.values.tolist() == [[-8, -8, -8, -6, 6, 7, 7]]


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_activations_match_numpy(rows, columns, seed, dtype):
    x = (random_weight(rows, columns, seed) * 10.0 ** (seed % 7 - 3)).to(dtype)
    values, scales = quantize_activation_per_token(x)
    reference = x.float().numpy()
    absmax = np.abs(reference).max(axis=-1, keepdims=True)
    expected = np.where(absmax == 0, np.float32(1), absmax / np.float32(127))
    assert values.dtype == torch.int8
    assert scales.dtype == torch.float32
    np.testing.assert_array_equal(scales.numpy(), expected)
    np.testing.assert_array_equal(values.numpy(), np.clip(np.rint(reference / expected), -128, 127))


def test_activations_round_half_to_even_and_keep_leading_dimensions():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -2.5, -127.0]).expand(2, 3, 7)
    values, scales = quantize_activation_per_token(x)
    assert values.shape == (2, 3, 7)
    assert scales.shape == (2, 3, 1)
    assert values[1, 2].tolist() == [127, 0, 2, 2, 0, -2, -127]


def test_a_row_of_zeros_has_scale_one():
    values, scales = quantize_activation_per_token(torch.zeros(2, 5))
    assert scales.tolist() == [[1], [1]]
    assert not values.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_visible_in_the_scale_of_their_row_alone(bad):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    _, scales = quantize_activation_per_token(x)
    assert torch.isfinite(scales).flatten().tolist() == [True, False, True]


def test_bad_weights_are_refused():
    weight = random_weight(2, 3)
    with pytest.raises(ValueError, match="out_features"):
        round_to_nearest(weight[0], QuantScheme())
    weight[0, 1] = float("nan")
    with pytest.raises(ValueError, match="1 NaN or Inf of 6"):
        round_to_nearest(weight, QuantScheme())
    with pytest.raises(ValueError, match=r"layers\.3"):
        check_finite(weight, "the weight of layers.3")
    with pytest.raises(ValueError, match="scales have shape"):
        QuantizedWeight(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 2), QuantScheme())
