"""SmoothQuant's scales against llm-compressor's, given the same activation maxima."""

from __future__ import annotations

import pytest
import torch

from baselines.smoothquant import smoothing_scales
from odyssey.quantization.observation import AbsMaximum, observe_inputs

pytestmark = pytest.mark.reference
GROUPS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class Range:
    """max - min of every feature."""

    def __init__(self) -> None:
        self.low = self.high = None

    def add(self, x: torch.Tensor) -> None:
        rows = x.flatten(0, -2)
        low, high = rows.amin(dim=0), rows.amax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
@pytest.mark.parametrize("first", list(GROUPS))
@pytest.mark.parametrize("index", [0, 5])
def test_scales_are_llm_compressors(index, first, alpha, testbed, report):
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    block, calibration = testbed.block(index), testbed.calibration(index)
    maximum, extent = AbsMaximum(), Range()
    observe_inputs(block, {first: [maximum, extent]}, calibration.forward, calibration.inputs)
    layers = [block.get_submodule(name) for name in GROUPS[first]]
    modifier = SmoothQuantModifier(smoothing_strength=alpha)
    ours = smoothing_scales(maximum.value, [layer.weight for layer in layers], alpha)
    # Both sides are ranges there, max - min of the activations and 2 max|W|: with 2 max|X| for the former, theirs are
    # 2^(2 alpha - 1) times ours in every feature, which per-token and per-channel scales take out again.
    common = 2 ** (2 * alpha - 1)
    theirs = modifier._calculate_smoothing_scales(layers, 2 * maximum.value) / common
    difference = float(((ours - theirs).abs() / theirs).max())
    as_used = modifier._calculate_smoothing_scales(layers, extent.high - extent.low) / common
    asymmetry = (ours - as_used).abs() / ours
    report.add(
        "SmoothQuant: scales against llm-compressor", f"block {index}, {first}, alpha {alpha}",
        **{"largest difference, same maxima": difference, "with its range of the activations": float(asymmetry.max()),
           "median of that": float(asymmetry.median())},
    )  # fmt: skip
    assert difference < 1e-5
