"""AWQ's scales, clips and integers against autoawq's, on the same block and activations."""

from __future__ import annotations

import pytest
import torch

import baselines.awq as awq_module
from baselines.autoawq_backend import BlockQuantizer
from baselines.awq import AwqMethod, AwqSettings, search_clipping
from odyssey.quantization.fake_quant import fake_quantized
from odyssey.quantization.observation import TokenSample, observe_inputs
from odyssey.quantization.scheme import QuantScheme

pytestmark = pytest.mark.reference
# Grouped-query attention: no v -> o.
PRODUCERS = ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"]


@pytest.fixture(scope="module", params=[(0, False), (5, False), (5, True)], ids=str)
def both(request, testbed):
    """One block by both: (case, our result, our scales by producer, their result, their quantizer)."""
    index, duo = request.param
    settings = AwqSettings(duo_scaling=duo)
    folded: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fold_into_norm", "fold_into_linear"):
            original = getattr(awq_module, name)

            def spy(block, producer, consumers, scales, original=original):
                folded[producer] = scales.clone()
                return original(block, producer, consumers, scales)

            patch.setattr(awq_module, name, spy)
        ours = AwqMethod(settings).quantize_block(testbed.block(index), testbed.calibration(index))
    quantizer = BlockQuantizer(testbed.block(index), testbed.calibration(index), settings)
    theirs = quantizer.quantize()
    return f"block {index}, duo_scaling={str(duo).lower()}", ours, folded, theirs, quantizer


def test_scales_are_autoawqs(both, report):
    case, ours, folded, _, quantizer = both
    assert list(folded) == list(quantizer.scales) == PRODUCERS
    for producer, scales in folded.items():
        difference = ((scales - quantizer.scales[producer]).abs() / quantizer.scales[producer]).max()
        exponent = ours.metrics["scaling"][producer]["ratio"]
        figures = {"exponent": exponent, "largest relative difference": float(difference)}
        report.add("AWQ: searched scales against autoawq", f"{case}, {producer}", **figures)
        # The same exponent of the search, and the mean magnitudes up to the order of their sums.
        assert difference < 1e-4


def test_integers_are_autoawqs_but_for_float16(both, report):
    case, ours, _, theirs, _ = both
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        mine, other = (
            result.weights[name].values.int() - result.weights[name].zeros.int().repeat_interleave(128, dim=1)
            for result in (ours, theirs)
        )
        figures = {
            "equal": float((mine == other).double().mean()),
            "within one step": float(((mine - other).abs() <= 1).double().mean()),
            "equal zero points": float((ours.weights[name].zeros == theirs.weights[name].zeros).double().mean()),
        }
        report.add("AWQ: integers less zero points against autoawq", f"{case}, {name}", **figures)
        # Weights and scales are float16 there, and the norms' quotients are rounded before the weights here. A group
        # clipped to [-c, c] has its zero point at 7.5, a tie that float16 may decide the other way.
        assert figures["equal"] > 0.95
        assert figures["within one step"] > 0.999


def test_the_block_is_as_good_as_autoawqs(both, testbed, report):
    case, ours, _, theirs, _ = both
    index = int(case.split()[1].rstrip(","))
    calibration = testbed.calibration(index)
    errors = []
    for result in (ours, theirs):
        block = testbed.block(index)
        for name, tensor in result.tensors.items():
            block.get_parameter(name).data.copy_(tensor.half().float())
        with torch.no_grad(), fake_quantized(block, result.weights):
            squares = [
                float((calibration.forward(block, hidden) - target).square().sum())
                for hidden, target in zip(calibration.inputs[:8], calibration.targets[:8], strict=True)
            ]
        errors.append(sum(squares))
    report.add(
        "AWQ: squared error of the block's output", case,
        **{"ours": errors[0], "theirs": errors[1], "ratio": errors[0] / errors[1]},
    )  # fmt: skip
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_clips_are_autoawqs(name, testbed, report):
    """The clip search alone, on the very same weight and tokens."""
    block, calibration = testbed.block(2), testbed.calibration(2)
    weight = block.get_submodule(name).weight.detach()
    sample = TokenSample(16 * 512, 512)
    observe_inputs(block, {name: [sample]}, calibration.forward, calibration.inputs)
    x = sample.value
    assert x.shape[0] == 512
    quantizer = BlockQuantizer(block, calibration, AwqSettings()).quantizer
    theirs = quantizer._compute_best_clip(weight, x).squeeze(-1)
    ours = search_clipping(weight, x, QuantScheme(4, 128, symmetric=False, activation_bits=16))
    equal = (ours - theirs).abs() <= 1e-6 * theirs
    equal_part = float(equal.double().mean())
    report.add("AWQ: searched clips against autoawq", name, groups=equal.numel(), equal=equal_part)
    # Two candidates of one error, up to rounding, are all that may differ.
    assert equal_part > 0.99
