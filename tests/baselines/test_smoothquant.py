"""SmoothQuant against its equation in float64 NumPy, and what it must keep and gain."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers.blocks import HIDDEN, NAMES, block_error, calibrate, generator, layer_inputs, make_model
from helpers.checkpoints import write_checkpoint

import odyssey
from baselines.folding import fold_into_linear, fold_into_norm, storable_quotient
from baselines.rtn import RtnMethod, RtnSettings
from baselines.smoothquant import SmoothQuantMethod, SmoothQuantSettings, smoothing_scales
from odyssey.data.calibration import CalibrationTokens
from odyssey.methods import settings_dict
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model
from odyssey.quantization.grid import dequantize
from odyssey.quantization.observation import AbsMaximum, AbsMean, TokenSample, observe_inputs
from odyssey.quantization.pipeline import quantize_checkpoint
from odyssey.quantization.scheme import QuantScheme

CPU = torch.device("cpu")
GROUPS = {"input_layernorm": NAMES[:3], "post_attention_layernorm": NAMES[4:6]}


def reference_scales(x: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """Equation 4 of the paper, with both maxima clamped at 1e-5."""
    activation = np.maximum(np.abs(x).max(axis=0), 1e-5)
    weight = np.maximum(np.max([np.abs(w).max(axis=0) for w in weights], axis=0), 1e-5)
    return activation**alpha / weight ** (1 - alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_scales_are_those_of_the_equation(alpha):
    x = torch.randn(50, 24, generator=generator(0))
    weights = [torch.randn(rows, 24, generator=generator(rows)) for rows in (8, 4, 4)]
    x[:, 3] = 0
    for weight in weights:
        weight[:, 5] = 0
    scales = smoothing_scales(x.abs().amax(dim=0), weights, alpha)
    expected = reference_scales(x.double().numpy(), [weight.double().numpy() for weight in weights], alpha)
    np.testing.assert_allclose(scales.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_integers_are_those_of_the_smoothed_weights(alpha, kv_heads):
    model = make_model(kv_heads, outlier_factor=20.0)
    # Maxima are those of the full-precision chain; the quantized one is elsewhere.
    block, calibration = model.model.layers[0], calibrate(model, drift=0.3)
    original = copy.deepcopy(block)
    inputs = layer_inputs(original, calibration, NAMES)
    result = SmoothQuantMethod(SmoothQuantSettings(alpha)).quantize_block(block, calibration)

    assert list(result.weights) == NAMES
    assert sorted(result.tensors) == [f"{norm}.weight" for norm in sorted(GROUPS)]
    smoothed = {name: original.get_submodule(name).weight.detach().double().numpy() for name in NAMES}
    for norm, group in GROUPS.items():
        scales = reference_scales(inputs[group[0]].double().numpy(), [smoothed[name] for name in group], alpha)
        before = original.get_submodule(norm).weight.detach().double().numpy()
        effective = before / result.tensors[f"{norm}.weight"].double().numpy()
        # The stored norm has 8 significant bits, whatever the checkpoint's 16-bit dtype.
        np.testing.assert_allclose(effective, scales, rtol=2**-8)
        for name in group:
            smoothed[name] = smoothed[name] * effective
    for name, quantized in result.weights.items():
        assert quantized.scheme == QuantScheme(8, -1, True, 8)
        steps = np.abs(smoothed[name]).max(axis=1, keepdims=True) / 127
        np.testing.assert_allclose(quantized.scales.numpy(), steps, rtol=1e-5)
        # Half a step, but for float32 rounding beside a boundary.
        ratio = smoothed[name] / steps
        assert np.abs(quantized.values.numpy() - ratio).max() <= 0.5 + 1e-4
    metrics = json.loads(json.dumps(result.metrics))
    assert metrics["alpha"] == alpha
    assert set(metrics["smoothing"]) == set(GROUPS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_into_a_norm_costs_nothing_in_the_stored_dtype(dtype):
    model = make_model(outlier_factor=20.0, dtype=dtype)
    block, calibration = model.model.layers[0], calibrate(model)
    scales = torch.exp(torch.randn(HIDDEN, generator=generator(1)) * 2)
    with torch.no_grad():
        expected = torch.cat(calibration.targets)
        for norm, group in GROUPS.items():
            changed, effective = fold_into_norm(block, norm, group, scales)
            torch.testing.assert_close(effective, scales, rtol=2**-8, atol=0)
            stored = changed[f"{norm}.weight"].to(dtype)
            assert torch.equal(stored.float(), block.get_parameter(f"{norm}.weight"))
        output = torch.cat([calibration.forward(block, hidden) for hidden in calibration.reference_inputs])
    # float32 rounding alone; norms rounded without adjusting the columns would cost 1e-3 in bfloat16.
    assert float((output - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("producer", "consumer"), [("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")]
)
def test_folding_into_a_linear_layer_costs_nothing(producer, consumer, bias, dtype):
    model = make_model(bias=bias, dtype=dtype)
    block, calibration = model.model.layers[0], calibrate(model)
    scales = torch.exp(torch.randn(block.get_submodule(consumer).in_features, generator=generator(1)) * 2)
    with torch.no_grad():
        expected = torch.cat(calibration.targets)
        changed, _ = fold_into_linear(block, producer, [consumer], scales)
        assert list(changed) == ([f"{producer}.bias"] if bias else [])
        for name, tensor in changed.items():
            assert torch.equal(tensor.to(dtype).float(), block.get_parameter(name))
        output = torch.cat([calibration.forward(block, hidden) for hidden in calibration.reference_inputs])
    assert float((output - expected).norm() / expected.norm()) < 1e-6


def test_quotients_are_exact_in_every_16_bit_dtype():
    values = torch.tensor([0.0, 1.5, -0.3, 1e-6, 3e-5, 60000.0, 1.0, 2.0])
    scales = torch.tensor([2.0, 3.0, 0.7, 100.0, 0.01, 1e-3, 1e-30, 1e30])
    quotient, effective = storable_quotient(values, scales)
    for dtype in (torch.float16, torch.bfloat16):
        inside = torch.tensor([True, True, True, False, True, False, True, True])
        assert torch.equal(quotient[inside].to(dtype).float(), quotient[inside])
    torch.testing.assert_close(quotient * effective, values, rtol=1e-6, atol=0)
    # Underflow and overflow leave the value as it is.
    assert torch.equal(effective[[3, 5, 6, 7]], torch.ones(4))
    torch.testing.assert_close(effective[[0, 1, 2, 4]], scales[[0, 1, 2, 4]], rtol=2**-8, atol=0)
    assert quotient[0] == 0


def test_outliers_hurt_round_to_nearest_and_not_smoothquant():
    errors = {}
    for method in (RtnMethod(RtnSettings(bits=8)), SmoothQuantMethod(SmoothQuantSettings(0.5))):
        model = make_model(kv_heads=2, outlier_factor=30.0)
        block, calibration = model.model.layers[0], calibrate(model)
        errors[method.name] = block_error(block, calibration, method.quantize_block(block, calibration))
    assert errors["smoothquant"] < 0.2 * errors["rtn"]


def test_the_search_takes_the_best_alpha():
    def run(settings: SmoothQuantSettings):
        model = make_model(kv_heads=2, outlier_factor=30.0)
        block, calibration = model.model.layers[0], calibrate(model, drift=0.01)
        result = SmoothQuantMethod(settings).quantize_block(block, calibration)
        return result, block_error(block, calibration, result)

    grid = [0.1, 0.5, 0.9]
    alone = {alpha: run(SmoothQuantSettings(alpha)) for alpha in grid}
    best = min(grid, key=lambda alpha: alone[alpha][1])
    result, _ = run(SmoothQuantSettings(alpha_search=True, alpha_grid=grid))
    assert result.metrics["alpha"] == best
    for alpha in grid:
        assert result.metrics["alpha_errors"][str(alpha)] == pytest.approx(alone[alpha][1], rel=1e-4)
    for name in NAMES:
        assert torch.equal(result.weights[name].values, alone[best][0].weights[name].values)
    few, _ = run(SmoothQuantSettings(alpha_search=True, alpha_grid=grid, search_samples=2))
    # Two of six samples, evenly spaced.
    model = make_model(kv_heads=2, outlier_factor=30.0)
    block, calibration = model.model.layers[0], calibrate(model, drift=0.01)
    calibration.inputs, calibration.targets = (
        [chain[0], chain[3]] for chain in (calibration.inputs, calibration.targets)
    )
    expected = block_error(block, calibration, alone[0.5][0])
    assert few.metrics["alpha_errors"]["0.5"] == pytest.approx(expected, rel=1e-4)


def test_observers_against_numpy():
    model = make_model(kv_heads=2)
    block, calibration = model.model.layers[0], calibrate(model, samples=5, seqlen=24)
    names = ["self_attn.q_proj", "mlp.up_proj"]
    maximum, mean = {name: AbsMaximum() for name in names}, {name: AbsMean() for name in names}
    sample, everything = TokenSample(120, 50), TokenSample(120, 500)
    observers = {name: [maximum[name], mean[name]] for name in names}
    observers["self_attn.q_proj"] += [sample, everything]
    observe_inputs(block, observers, calibration.forward, calibration.reference_inputs)
    rows = {name: x.numpy() for name, x in layer_inputs(block, calibration, names).items()}
    for name in names:
        np.testing.assert_array_equal(maximum[name].value.numpy(), np.abs(rows[name]).max(axis=0))
        expected = np.abs(rows[name].astype(np.float64)).mean(axis=0)
        np.testing.assert_allclose(mean[name].value.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(sample.value.numpy(), rows["self_attn.q_proj"][::3])
    np.testing.assert_array_equal(everything.value.numpy(), rows["self_attn.q_proj"])
    assert not block.self_attn.q_proj._forward_pre_hooks


def test_checkpoint_round_trip(tmp_path):
    source = resolve_model("random", path=str(write_checkpoint(tmp_path / "source", layers=2, dtype=torch.bfloat16)))
    tokens = torch.randint(256, (4, 48), generator=generator(3))
    settings = SmoothQuantSettings(alpha=0.6)
    report = quantize_checkpoint(
        source, SmoothQuantMethod(settings), settings_dict(settings), CalibrationTokens(tokens, {}),
        tmp_path / "quantized", device=CPU,
    )  # fmt: skip
    assert report.manifest["label"] == "W8A8"
    assert report.manifest["method"]["alpha"] == 0.6
    quantized, original = odyssey.load_quantized(tmp_path / "quantized"), load_model(source)
    for index in range(2):
        block, before = quantized.model.layers[index], original.model.layers[index]
        for norm, group in GROUPS.items():
            ratio = before.get_submodule(norm).weight / block.get_submodule(norm).weight
            assert float((ratio - 1).abs().max()) > 0.1
            for name in group:
                layer = block.get_submodule(name)
                smoothed = before.get_submodule(name).weight * ratio
                assert torch.all((layer.dequantized() - smoothed).abs() <= 0.501 * layer.scales)
    with torch.no_grad():
        error = (quantized(tokens).logits - original(tokens).logits).norm() / original(tokens).logits.norm()
    assert 0 < error < 0.05


def test_bad_input_is_refused_with_its_name():
    model = make_model()
    block, calibration = model.model.layers[0], calibrate(model)
    with pytest.raises(ValueError, match="needs calibration"):
        SmoothQuantMethod().quantize_block(block, None)
    calibration.reference_inputs[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the activation maxima of self_attn\.q_proj"):
        SmoothQuantMethod().quantize_block(block, calibration)
    block.mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the weight of mlp\.down_proj holds 1 NaN or Inf"):
        SmoothQuantMethod().quantize_block(block, calibration)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha must be 0..1"),
        ({"alpha_grid": []}, "alpha_grid must hold"),
        ({"alpha_grid": [0.5, -1.0]}, "alpha_grid must hold"),
        ({"search_samples": 0}, "search_samples must be"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SmoothQuantSettings(**changes)


def test_dequantized_weights_are_what_the_block_multiplies_by():
    model = make_model()
    block, calibration = model.model.layers[0], calibrate(model)
    result = SmoothQuantMethod().quantize_block(block, calibration)
    for name in NAMES:
        step = result.weights[name].scales
        assert torch.all((dequantize(result.weights[name]) - block.get_submodule(name).weight).abs() <= 0.501 * step)
