"""Round to nearest as a method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from baselines.rtn import RtnMethod, RtnSettings
from odyssey.quantization.grid import dequantize, minmax_grid, per_column
from odyssey.quantization.method import BlockCalibration
from odyssey.quantization.scheme import QuantScheme


def make_block() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"attention": nn.ModuleDict({"q": nn.Linear(20, 12)}), "norm": nn.LayerNorm(20), "mlp": nn.Linear(20, 8)}
    )


def with_groups(*groups: tuple[str, ...]) -> BlockCalibration:
    return BlockCalibration([], [], [], lambda block, x: x, groups, {}, torch.device("cpu"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_every_weight_is_within_half_a_step(bits, group_size, symmetric, activation_bits):
    block = make_block()
    method = RtnMethod(RtnSettings(bits, group_size, symmetric, activation_bits))
    assert method.scheme == QuantScheme(bits, group_size, symmetric, activation_bits)
    result = method.quantize_block(block, None)
    assert sorted(result.weights) == ["attention.q", "mlp"]
    for name, quantized in result.weights.items():
        weight = block.get_submodule(name).weight.detach()
        steps = per_column(quantized.scales, 20, group_size)
        # A rounded zero point may move an end of the range by half a step more.
        allowed = 0.5 if symmetric else 1.0
        assert torch.all((dequantize(quantized) - weight).abs() <= allowed * steps * (1 + 1e-5))
        scales, zeros = minmax_grid(weight, method.scheme)
        assert torch.equal(quantized.scales, scales)
        assert (zeros is None and quantized.zeros is None) or torch.equal(quantized.zeros, zeros)


def test_the_block_is_not_changed_and_needs_no_calibration():
    block = make_block()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    assert not RtnMethod.needs_calibration
    RtnMethod().quantize_block(block, None)
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


def test_only_the_named_layers_are_quantized():
    result = RtnMethod().quantize_block(make_block(), with_groups(("mlp",)))
    assert list(result.weights) == ["mlp"]


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_that_are_no_integers_are_refused(bits):
    """16 would be a full-precision model under the name of this method, with a label that says A8."""
    with pytest.raises(ValueError, match=rf"bits must be 2\.\.8, not {bits}"):
        RtnSettings(bits)


def test_bad_weights_are_reported_with_the_layers_name():
    block = make_block()
    block["attention"]["q"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the weight of attention\.q holds 1 NaN or Inf"):
        RtnMethod().quantize_block(block, None)
