"""Simulated quantization: its straight-through gradients, and modules that stand in for linear layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.blocks import NAMES, generator, heavy_tailed
from torch.nn import functional

from odyssey.quantization.clipping import (
    LearnedClippingLinear,
)
from odyssey.quantization.fake_quant import (
    FakeQuantLinear,
    fake_quant_per_token,
    fake_quant_weight,
    fake_quantized,
    swapped_modules,
)
from odyssey.quantization.grid import quantize_activation_per_token, round_to_nearest
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme


def surrogate(weight, logits, x, target, scheme, rounded, residual):
    """Float64 loss in which rounding adds a frozen residual and clamped integers stay as they are.

    This smooth function is what straight-through gradients differentiate.
    """
    w, low, high = weight, weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    gamma, beta = logits
    kept_high, kept_low = np.abs(high / (1 + np.exp(-gamma))), np.abs(low / (1 + np.exp(-beta)))
    scales = np.maximum(kept_high, kept_low) / scheme.qmax
    clamped = np.clip(rounded, scheme.qmin, scheme.qmax)
    values = np.where(rounded == clamped, w / scales + residual, clamped)
    return float(np.mean((x @ (values * scales).T - target) ** 2))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("logit", [-1.0, 1.0, 4.0])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_gradients_of_gamma_and_beta_agree_with_finite_differences(bits, logit, activation_bits):
    scheme = QuantScheme(bits, PER_CHANNEL, True, activation_bits)
    weight = heavy_tailed(6, 20)
    x, target = torch.randn(9, 20, generator=generator(1)), torch.randn(9, 6, generator=generator(2))
    module = LearnedClippingLinear(weight, None, scheme, logit)
    with torch.no_grad():
        # Both sides of max() must be the larger one for some channels, and no channel near a tie.
        module.gamma += torch.tensor([[0.3], [-0.3], [0.3], [-0.3], [0.3], [-0.3]])
    functional.mse_loss(module(x), target).backward()

    reference_x = x.double().numpy()
    if activation_bits == 8:
        values, scale = quantize_activation_per_token(x)
        reference_x = values.double().numpy() * scale.double().numpy()
    w = weight.double().numpy()
    logits = [module.gamma.detach().double().numpy(), module.beta.detach().double().numpy()]
    ratio = w / module.scales().detach().double().numpy()
    rounded = np.rint(ratio)
    step = 1e-6
    for which, parameter in enumerate((module.gamma, module.beta)):
        for row in range(6):
            losses = []
            for sign in (1, -1):
                moved = [logit.copy() for logit in logits]
                moved[which][row] += sign * step
                losses.append(
                    surrogate(w, moved, reference_x, target.double().numpy(), scheme, rounded, rounded - ratio)
                )
            expected = (losses[0] - losses[1]) / (2 * step)
            assert parameter.grad[row, 0].item() == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_scale_gradient_is_exact_where_every_value_is_clamped():
    scheme = QuantScheme(4)
    weight = torch.tensor([[5.0, -6.0, 7.0]])
    scales = torch.tensor([[0.1]], requires_grad=True)
    fake_quant_weight(weight, scales, scheme).square().sum().backward()
    # sum((q s)^2) with q = (7, -8, 7): derivative 2 s sum(q^2).
    assert scales.grad.item() == pytest.approx(2 * 0.1 * (49 + 64 + 49), rel=1e-6)


def test_activation_estimator_is_the_identity():
    x = torch.randn(5, 7, generator=generator(0))
    # Ties, which go to the even neighbour.
    x[0] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    x.requires_grad_()
    upstream = torch.randn(5, 7, generator=generator(1))
    y = fake_quant_per_token(x)
    y.backward(upstream)
    values, scales = quantize_activation_per_token(x.detach())
    assert torch.equal(y.detach(), values * scales)
    assert y[0].tolist() == [127, 0, 2, 2, 0, -2, -2]
    assert torch.equal(x.grad, upstream)


@pytest.mark.parametrize("bias", [True, False])
def test_integer_forward_has_the_gradients_of_the_composed_functions(bias):
    scheme = QuantScheme(4)
    weight, x = heavy_tailed(10, 24), torch.randn(2, 5, 24, generator=generator(1), requires_grad=True)
    offset = torch.randn(10, generator=generator(2)) if bias else None
    module = LearnedClippingLinear(weight, offset, scheme, 1.0)
    upstream = torch.randn(2, 5, 10, generator=generator(3))
    y = module(x)
    y.backward(upstream)
    fast = [x.grad.clone(), module.gamma.grad.clone(), module.beta.grad.clone()]
    x.grad = module.gamma.grad = module.beta.grad = None
    composed = functional.linear(fake_quant_per_token(x), fake_quant_weight(weight, module.scales(), scheme), offset)
    composed.backward(upstream)
    torch.testing.assert_close(y, composed, rtol=1e-5, atol=1e-5)
    for mine, expected in zip(fast, (x.grad, module.gamma.grad, module.beta.grad), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group_size", [PER_CHANNEL, 7])
def test_simulation_of_integers_is_that_of_the_learned_layer(group_size):
    scheme = QuantScheme(4, group_size)
    weight, x = heavy_tailed(8, 20), torch.randn(3, 20, generator=generator(1))
    module = LearnedClippingLinear(weight, None, scheme, 1.5)
    scales = module.scales().detach()
    simulated = FakeQuantLinear.from_quantized(round_to_nearest(weight, scheme, scales))
    torch.testing.assert_close(simulated(x), module(x), rtol=1e-5, atol=1e-5)
    low, high = weight[:, :7].amin(1), weight[:, :7].amax(1)
    if group_size == 7:
        kept = torch.sigmoid(torch.tensor(1.5)) * torch.maximum(high.abs(), low.abs())
        torch.testing.assert_close(scales[:, 0], kept / 7)


def test_swapped_modules_are_restored_after_an_error(model):
    block = model.model.layers[0]
    before = {name: block.get_submodule(name) for name in NAMES}
    weights = {name: round_to_nearest(m.weight.detach(), QuantScheme()) for name, m in before.items()}
    with fake_quantized(block, weights):
        assert isinstance(block.mlp.up_proj, FakeQuantLinear)
    with pytest.raises(KeyError), fake_quantized(block, weights):
        raise KeyError
    assert all(block.get_submodule(name) is module for name, module in before.items())
    with pytest.raises(AttributeError), swapped_modules(block, {"mlp.missing": torch.nn.Identity()}):
        pass


def test_a_simulated_block_keeps_its_biases():
    block = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 3, bias=False))
    weights = {name: round_to_nearest(block[int(name)].weight.detach(), QuantScheme(8)) for name in "01"}
    x = torch.randn(5, 8, generator=generator(0))
    expected = x.double()
    for name in "01":
        values, scales = quantize_activation_per_token(expected.float())
        dequantized = weights[name].values.double() * weights[name].scales.double()
        expected = (values.double() * scales.double()) @ dequantized.t()
        if block[int(name)].bias is not None:
            expected += block[int(name)].bias.detach().double()
    with torch.no_grad(), fake_quantized(block, weights):
        torch.testing.assert_close(block(x).double(), expected, rtol=1e-4, atol=1e-5)
