"""GPTQ against the published equations, column by column in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odyssey.quantization.compensation import (
    CompensationSettings,
    HessianAccumulator,
    collect_hessians,
    gptq,
    inverse_factor,
)
from odyssey.quantization.grid import (
    dequantize,
    minmax_grid,
    quantize_activation_per_token,
    round_to_nearest,
)
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) * 0.5 + torch.eye(features)
    return torch.randn(tokens, features, generator=generator) @ mixing


def random_weight(out_features: int, in_features: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator(x.shape[1])
    accumulator.add(x)
    return accumulator.hessian


def output_error(weight, quantized, x) -> float:
    error = x.double() @ (weight.double() - dequantize(quantized).double()).t()
    return float(error.square().sum())


def reference_grid(part: np.ndarray, scheme: QuantScheme) -> tuple[np.ndarray, np.ndarray]:
    if scheme.symmetric:
        scale = np.abs(part).max(axis=1) / (2 ** (scheme.weight_bits - 1) - 1)
        return np.where(scale == 0, 1, scale), np.zeros(len(part))
    low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
    scale = (high - low) / (2**scheme.weight_bits - 1)
    scale = np.where(scale == 0, 1, scale)
    return scale, np.clip(np.rint(-low / scale), 0, 2**scheme.weight_bits - 1)


def reference_gptq(weight, hessian, scheme, scales=None, damping=0.01, act_order=False):
    """Optimal brain quantization in a fixed order: one column at a time, explicit inverse, no Cholesky, no
    blocks.

    After column j: w -= (w_j - q_j) / [H^-1]_jj * [H^-1]_j, then row and column j are eliminated from H^-1.
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    n = w.shape[1]
    size = n if scheme.group_size == PER_CHANNEL else scheme.group_size
    dead = np.diag(h) == 0
    mean = np.diag(h)[~dead].mean()
    h[dead, dead] = mean
    w[:, dead] = 0
    order = np.argsort(-np.diag(hessian.double().numpy()), kind="stable") if act_order else np.arange(n)
    grid = {}
    if scales is not None:
        grid = {g: (scales[:, g].double().numpy(), np.zeros(len(w))) for g in range(scales.shape[1])}
    elif act_order:
        grid = {g: reference_grid(w[:, g * size : (g + 1) * size], scheme) for g in range(-(-n // size))}
    inverse = np.linalg.inv(h + damping * mean * np.eye(n))
    values = np.zeros(w.shape)
    loss = 0.0
    for j in order:
        group = j // size
        if group not in grid:
            grid[group] = reference_grid(w[:, j : j + size], scheme)
        scale, zero = grid[group]
        q = np.clip(np.rint(w[:, j] / scale) + zero, scheme.qmin, scheme.qmax)
        values[:, j] = q
        error = w[:, j] - (q - zero) * scale
        loss += (error**2).sum() / inverse[j, j] / 2
        w -= np.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    all_scales = np.stack([grid[g][0] for g in sorted(grid)], axis=1)
    return values, all_scales, loss


CASES = {
    "per-channel": {},
    "group 16": {"group_size": 16},
    "shorter last group": {"group_size": 20},
    "group wider than the block": {"group_size": 40, "block_size": 16},
    "group that does not divide the block": {"group_size": 12, "block_size": 32},
    "asymmetric groups": {"group_size": 16, "symmetric": False},
    "3 bits": {"bits": 3},
    "8 bits": {"bits": 8},
    "act-order": {"act_order": True},
    "act-order with static groups": {"act_order": True, "group_size": 16},
    "dead columns": {"dead": [0, 5, 33]},
    "many dead columns and much damping": {"dead": list(range(0, 48, 2)), "damping": 1.0},
    "dead columns in act-order with groups": {"dead": [0, 5, 33], "act_order": True, "group_size": 16},
    "fixed grid": {"shrink": 0.8},
    "fixed grid in act-order": {"shrink": 0.8, "act_order": True},
    "fixed grid with groups": {"shrink": 0.8, "group_size": 20},
    "more damping": {"damping": 0.1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_the_column_by_column_reference(case):
    x = correlated_inputs(400, 48)
    x[:, case.get("dead", [])] = 0
    weight = random_weight(24, 48)
    hessian = hessian_of(x)
    scheme = QuantScheme(case.get("bits", 4), case.get("group_size", PER_CHANNEL), case.get("symmetric", True), 16)
    damping, act_order = case.get("damping", 0.01), case.get("act_order", False)
    scales = minmax_grid(weight, scheme)[0] * case["shrink"] if "shrink" in case else None

    result, metrics = gptq(
        weight,
        hessian,
        scheme,
        scales,
        settings=CompensationSettings(damping, case.get("block_size", 128), act_order),
    )
    values, expected_scales, loss = reference_gptq(weight, hessian, scheme, scales, damping, act_order)

    np.testing.assert_array_equal(result.values.numpy(), values)
    np.testing.assert_allclose(result.scales.numpy(), expected_scales, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-3)
    assert metrics["damping"] == damping
    assert metrics["dead_columns"] == len(case.get("dead", []))
    if "dead" in case:
        assert not dequantize(result)[:, case["dead"]].any()
    if scales is not None:
        assert torch.equal(result.scales, scales)


@pytest.mark.parametrize("block_size", [1, 7, 16, 48, 500])
def test_the_block_size_changes_nothing(block_size):
    weight, hessian = random_weight(16, 48), hessian_of(correlated_inputs(300, 48))
    expected, _ = gptq(weight, hessian, QuantScheme(4, 12))
    result, _ = gptq(weight, hessian, QuantScheme(4, 12), settings=CompensationSettings(block_size=block_size))
    assert torch.equal(result.values, expected.values)


@given(
    out_features=st.integers(1, 6),
    in_features=st.integers(1, 40),
    group_size=st.one_of(st.just(PER_CHANNEL), st.integers(1, 45)),
    block_size=st.integers(1, 50),
    act_order=st.booleans(),
    symmetric=st.booleans(),
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_any_shape_stays_on_its_grid(
    out_features, in_features, group_size, block_size, act_order, symmetric, bits, seed
):
    x, weight = correlated_inputs(64, in_features, seed), random_weight(out_features, in_features, seed + 1)
    scheme = QuantScheme(bits, group_size, symmetric, 16)
    result, metrics = gptq(
        weight, hessian_of(x), scheme, settings=CompensationSettings(block_size=block_size, act_order=act_order)
    )
    assert result.values.shape == weight.shape
    assert result.values.dtype == (torch.int8 if symmetric else torch.uint8)
    assert result.values.min() >= scheme.qmin
    assert result.values.max() <= scheme.qmax
    relative = output_error(weight, result, x) / float((x.double() @ weight.double().t()).square().sum())
    assert metrics["relative_error"] == pytest.approx(relative, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [PER_CHANNEL, 16])
def test_beats_rounding_to_the_nearest_on_correlated_inputs(bits, group_size):
    x, weight = correlated_inputs(600, 64), random_weight(32, 64)
    scheme = QuantScheme(bits, group_size, activation_bits=16)
    result, _ = gptq(weight, hessian_of(x), scheme)
    nearest = round_to_nearest(weight, scheme)
    assert output_error(weight, result, x) < 0.8 * output_error(weight, nearest, x)


def test_without_correlation_it_rounds_to_the_nearest():
    weight = random_weight(8, 32)
    result, _ = gptq(weight, torch.eye(32), QuantScheme())
    assert torch.equal(result.values, round_to_nearest(weight, QuantScheme()).values)


def test_hessian_is_the_mean_over_all_tokens():
    x = correlated_inputs(90, 10)
    accumulator = HessianAccumulator(10)
    for part in (x[:1].view(1, 1, 10), x[1:60].view(1, 59, 10), x[60:60], x[60:].view(2, 15, 10)):
        accumulator.add(part.half() if part.shape[1] == 0 else part)
    assert accumulator.tokens == 90
    expected = 2 / 90 * x.double().t() @ x.double()
    torch.testing.assert_close(accumulator.hessian.double(), expected, rtol=1e-5, atol=1e-5)


def test_inverse_factor():
    hessian = hessian_of(correlated_inputs(200, 20))
    factor, damping = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(20)
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.double().t() @ factor.double() @ damped, torch.eye(20).double(), rtol=1e-3, atol=1e-3
    )


def test_damping_is_raised_and_recorded():
    hessian = torch.eye(12)
    hessian[0, 0] = -0.3
    _, metrics = gptq(random_weight(4, 12), hessian, QuantScheme())
    # 0.01 and 0.1 of the mean (0.89) do not lift -0.3 above 0; 1.0 does.
    assert metrics["damping"] == pytest.approx(1.0)
    hessian[0, 0] = -1e9
    hessian[1, 1] = 1e9 + 1
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(random_weight(4, 12), hessian, QuantScheme())


def test_all_columns_dead():
    result, metrics = gptq(random_weight(4, 12), torch.zeros(12, 12), QuantScheme())
    assert not result.values.any()
    assert metrics["dead_columns"] == 12
    assert metrics["relative_error"] == 0


def test_bad_arguments_are_refused():
    weight = random_weight(4, 12)
    with pytest.raises(ValueError, match="12 input features"):
        gptq(weight, torch.eye(13), QuantScheme())
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="weight holds 1 NaN"):
        gptq(weight, torch.eye(12), QuantScheme())
    with pytest.raises(ValueError, match="damping"):
        CompensationSettings(damping=0)
    with pytest.raises(ValueError, match="block_size"):
        CompensationSettings(block_size=0)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.last_calls = 0

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        self.last_calls += 1
        return self.last(x)


@pytest.mark.parametrize("quantized_inputs", [True, False])
def test_hessians_are_those_of_the_layers_inputs(quantized_inputs):
    block = TwoLayers()
    inputs = [torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def run(module, x):
        return module(x)

    found = collect_hessians(block, ["first", "second"], run, inputs, quantized_inputs)
    assert block.last_calls == 0, "a pass must end at the last wanted layer"
    assert not any(module._forward_pre_hooks for module in block.modules())
    x = torch.cat(inputs).view(-1, 6)
    for name, rows in (("first", x), ("second", torch.relu(block.first(x)).detach())):
        if quantized_inputs:
            values, scales = quantize_activation_per_token(rows)
            rows = values * scales
        expected = 2 / 21 * rows.double().t() @ rows.double()
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_bad_activations_are_reported_with_the_layers_name():
    block = TwoLayers()
    block.first.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="the activations of second"):
        collect_hessians(block, ["first", "second"], lambda m, x: m(x), [torch.ones(1, 3, 6)], True)


@pytest.mark.gpu
def test_cuda_gives_the_integers_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight, hessian = random_weight(64, 256), hessian_of(correlated_inputs(2000, 256))
    expected, _ = gptq(weight, hessian, QuantScheme(4, 64))
    result, metrics = gptq(weight.cuda(), hessian.cuda(), QuantScheme(4, 64))
    # A value at a rounding boundary may fall to the other side and move the rest of its row.
    assert (result.values.cpu() == expected.values).float().mean() > 0.9
    assert metrics["relative_error"] == pytest.approx(output_ratio(weight, expected, hessian), rel=0.05)


def output_ratio(weight, quantized, hessian) -> float:
    error = weight.double() - dequantize(quantized).double()
    reference = weight.double()
    h = hessian.double()
    return float(((error @ h) * error).sum() / ((reference @ h) * reference).sum())
