"""GPTQ's integers against auto-gptq's GPTQ class and llm-compressor's quantize_weight, given the same Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from baselines.auto_gptq_backend import _integers
from baselines.gptq import GptqMethod, GptqSettings
from baselines.reference_packages import auto_gptq_module, without_cuda_synchronization
from odyssey.quantization.compensation import CompensationSettings, collect_hessians, gptq, relative_output_error
from odyssey.quantization.grid import dequantize, minmax_grid
from odyssey.quantization.scheme import PER_CHANNEL, QuantizedWeight, QuantScheme

pytestmark = pytest.mark.reference
FIRSTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
BLOCK = 3


@pytest.fixture(scope="module")
def layers(testbed) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight and Hessian of a layer of every kind, in the middle of the model."""
    block, calibration = testbed.block(BLOCK), testbed.calibration(BLOCK)
    hessians = collect_hessians(block, FIRSTS, calibration.forward, calibration.inputs, quantized_inputs=False)
    return {name: (block.get_submodule(name).weight.detach(), hessians[name]) for name in FIRSTS}


def auto_gptq(weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, act_order: bool) -> QuantizedWeight:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    quantizer = auto_gptq_module("quantization.gptq").GPTQ(layer)
    quantizer.H = hessian.clone()
    quantizer.nsamples = 1
    quantizer.quantizer.configure(scheme.weight_bits, perchannel=True, sym=scheme.symmetric, mse=False)
    with without_cuda_synchronization():
        scales, zeros, g_idx = quantizer.fasterquant(
            percdamp=0.01, group_size=scheme.group_size, actorder=act_order,
            static_groups=act_order and scheme.group_size != PER_CHANNEL,
        )  # fmt: skip
    width = weight.shape[1] if scheme.group_size == PER_CHANNEL else scheme.group_size
    assert torch.equal(g_idx.long(), torch.arange(weight.shape[1]) // width)
    return _integers(layer.weight.data, scales, zeros, scheme)


def compare(report, title: str, case: str, ours: QuantizedWeight, theirs: QuantizedWeight, weight, hessian) -> dict:
    errors = [relative_output_error(weight, quantized, hessian) for quantized in (ours, theirs)]
    figures = {
        "equal integers": float((ours.values.int() == theirs.values.int()).double().mean()),
        "largest scale difference": float(((ours.scales - theirs.scales).abs() / theirs.scales).max()),
        "output error, ours": errors[0],
        "output error, theirs": errors[1],
        "ratio": errors[0] / errors[1],
    }
    report.add(title, case, **figures)
    return figures


@pytest.mark.parametrize("name", FIRSTS)
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "act_order"),
    [(4, 128, True, False), (4, 128, False, False), (4, 128, True, True), (4, -1, True, False), (4, -1, False, True),
     (3, 128, True, False), (8, 128, False, False)],
)  # fmt: skip
def test_integers_are_auto_gptqs(name, bits, group_size, symmetric, act_order, layers, report):
    weight, hessian = layers[name]
    scheme = QuantScheme(bits, group_size, symmetric, 16)
    options = CompensationSettings(act_order=act_order, full_range=True)
    ours, _ = gptq(weight, hessian, scheme, settings=options)
    theirs = auto_gptq(weight, hessian, scheme, act_order)
    kind = f"{scheme.label}, {'symmetric' if symmetric else 'asymmetric'}{', act-order' if act_order else ''}"
    figures = compare(report, "GPTQ: auto-gptq, same grid", f"{kind}, {name}", ours, theirs, weight, hessian)
    # Sums of float32 in another order: where one falls on the other side of a tie, the rest of its row moves with it.
    assert figures["equal integers"] > 0.995
    assert figures["ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", FIRSTS)
def test_what_the_divisor_makes(name, layers, report):
    """full_range=false divides by 7, auto-gptq by 7.5: other integers by design, figures for the report."""
    weight, hessian = layers[name]
    scheme = QuantScheme(4, 128, True, 16)
    ours, _ = gptq(weight, hessian, scheme)
    theirs = auto_gptq(weight, hessian, scheme, act_order=False)
    title = "GPTQ: auto-gptq, divisor 7 (full_range=false) and 7.5"
    figures = compare(report, title, name, ours, theirs, weight, hessian)
    assert 0.5 < figures["ratio"] < 2


def llm_compressor_arguments(group_size: int, symmetric: bool, act_order: bool):
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs

    strategy = {"strategy": "channel"} if group_size == PER_CHANNEL else {"strategy": "group", "group_size": group_size}
    order = ActivationOrdering.WEIGHT if act_order else None
    return QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, actorder=order, **strategy)


@pytest.mark.parametrize("name", FIRSTS)
@pytest.mark.parametrize(
    ("group_size", "symmetric", "act_order"),
    [(128, True, False), (128, False, False), (128, True, True), (-1, True, False)],
)
def test_integers_are_llm_compressors(name, group_size, symmetric, act_order, layers, report):
    """llm-compressor takes every group's grid from the original weight; given that grid, the integers are the same."""
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weight, hessian = layers[name]
    arguments = llm_compressor_arguments(group_size, symmetric, act_order)
    width = weight.shape[1] if group_size == PER_CHANNEL else group_size
    grouped = weight.view(weight.shape[0], -1, width)
    scales, zeros = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    dequantized, _, fell_back = quantize_weight(
        weight.clone()[None], hessian.clone()[None], scales[None], zeros[None], None, arguments
    )
    assert not bool(fell_back.any())
    scheme = QuantScheme(4, group_size, symmetric, 16)
    # Their asymmetric integers are signed: -8..7 with a zero point that is 8 less.
    shifted = None if symmetric else (zeros.int() + 8).to(torch.uint8)
    theirs = _integers(dequantized[0], scales.float(), zeros if symmetric else shifted, scheme)
    own_scales, own_zeros = minmax_grid(weight, scheme, full_range=True)
    torch.testing.assert_close(own_scales, theirs.scales, rtol=1e-6, atol=0)
    assert symmetric or (own_zeros == shifted).double().mean() > 0.999
    ours, _ = gptq(weight, hessian, scheme, theirs.scales, shifted, CompensationSettings(act_order=act_order))
    kind = f"{scheme.label}, {'symmetric' if symmetric else 'asymmetric'}{', act-order' if act_order else ''}"
    figures = compare(report, "GPTQ: llm-compressor, same grid", f"{kind}, {name}", ours, theirs, weight, hessian)
    assert figures["equal integers"] > 0.995
    assert figures["ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "settings", [{}, {"symmetric": False}, {"act_order": True}, {"bits": 3, "group_size": -1}], ids=str
)
def test_the_backend_is_auto_gptq_layer_by_layer(settings, testbed, report):
    """A whole block with the package's quantizer and with ours: inputs, order of layers and integers."""
    results = {}
    for backend in ("native", "auto-gptq"):
        block, calibration = testbed.block(0), testbed.calibration(0)
        method = GptqMethod(GptqSettings(backend=backend, **settings))
        results[backend] = method.quantize_block(block, calibration)
    ours, theirs = results["native"], results["auto-gptq"]
    assert list(ours.weights) == list(theirs.weights)
    equal = {
        name: float((weight.values.int() == theirs.weights[name].values.int()).double().mean())
        for name, weight in ours.weights.items()
    }
    errors = [
        sum(metrics["relative_error"] for metrics in result.metrics["layers"].values()) for result in (ours, theirs)
    ]
    report.add(
        "GPTQ: a block by method.backend=auto-gptq and native", str(settings or "default"),
        **{"equal integers, q": equal["self_attn.q_proj"], "down": equal["mlp.down_proj"],
           "output error, ours": errors[0], "output error, theirs": errors[1], "ratio": errors[0] / errors[1]},
    )  # fmt: skip
    assert equal["self_attn.q_proj"] > 0.98
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert all("auto-gptq 0.7" in metrics["backend"] for metrics in theirs.metrics["layers"].values())
    for name, weight in theirs.weights.items():
        assert dequantize(weight).shape == testbed.block(0).get_submodule(name).weight.shape
