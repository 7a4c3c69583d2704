"""GPTQ as a method: which Hessians it uses, what it gains. Its mathematics is tested in test_compensation.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.blocks import HIDDEN, NAMES, block_error, calibrate, generator, layer_inputs, make_model
from helpers.checkpoints import write_checkpoint

import baselines.gptq as gptq_module
import odyssey
from baselines.gptq import GptqMethod, GptqSettings
from baselines.rtn import RtnMethod, RtnSettings
from odyssey.data.calibration import CalibrationTokens
from odyssey.methods import settings_dict
from odyssey.models.architecture import LlamaFamily
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model
from odyssey.quantization.compensation import CompensationSettings, gptq
from odyssey.quantization.fake_quant import fake_quantized
from odyssey.quantization.grid import dequantize
from odyssey.quantization.pipeline import quantize_checkpoint
from odyssey.quantization.scheme import QuantScheme

CPU = torch.device("cpu")
GROUPS = LlamaFamily.linear_groups


def reference_hessian(x: torch.Tensor) -> np.ndarray:
    rows = x.double().numpy()
    return 2 / len(rows) * rows.T @ rows


def reference_rounding(weight: np.ndarray, hessian: np.ndarray, group_size: int, damping: float = 0.01) -> np.ndarray:
    """Dequantized GPTQ-g weights (4 bits, symmetric), column by column with an explicit inverse in float64."""
    w = weight.copy()
    n = w.shape[1]
    inverse = np.linalg.inv(hessian + damping * np.diag(hessian).mean() * np.eye(n))
    result = np.zeros_like(w)
    for j in range(n):
        if j % group_size == 0:
            scale = np.abs(w[:, j : j + group_size]).max(axis=1) / 7.5
        result[:, j] = np.clip(np.rint(w[:, j] / scale), -8, 7) * scale
        w -= np.outer((w[:, j] - result[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_first_group_matches_the_float64_reference(kv_heads):
    model = make_model(kv_heads)
    block, calibration = model.model.layers[0], calibrate(model, drift=0.1)
    x = layer_inputs(block, calibration, NAMES[:1], calibration.inputs)[NAMES[0]]
    result = GptqMethod(GptqSettings(group_size=16)).quantize_block(block, calibration)
    for name in GROUPS[0]:
        weight = block.get_submodule(name).weight.detach().double().numpy()
        expected = reference_rounding(weight, reference_hessian(x), 16)
        difference = np.abs(dequantize(result.weights[name]).numpy() - expected)
        # A float32 tie may fall to the other side and move what follows in its row.
        assert (difference < 1e-4 * np.abs(weight).max()).mean() > 0.99


def test_hessians_come_from_the_quantized_chain_and_the_partly_quantized_block(monkeypatch):
    model = make_model(kv_heads=2)
    block, calibration = model.model.layers[0], calibrate(model, drift=0.1)
    used = {}

    def spy(weight, hessian, *args, **kwargs):
        name = next(name for name in NAMES if torch.equal(block.get_submodule(name).weight, weight))
        used[name] = hessian
        return gptq(weight, hessian, *args, **kwargs)

    monkeypatch.setattr(gptq_module, "gptq", spy)
    result = GptqMethod(GptqSettings(group_size=16)).quantize_block(block, calibration)
    done: dict = {}
    for group in GROUPS:
        with fake_quantized(block, done):
            rows = layer_inputs(block, calibration, group, calibration.inputs)
        for name in group:
            np.testing.assert_allclose(used[name].numpy(), reference_hessian(rows[name]), rtol=1e-4, atol=1e-5)
        done.update({name: result.weights[name] for name in group})


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 24])
def test_integers_are_those_of_the_compensation(group_size, symmetric, act_order):
    model = make_model(kv_heads=2)
    block, calibration = model.model.layers[0], calibrate(model, samples=4)
    settings = GptqSettings(3, group_size, symmetric, act_order, damping=0.02, block_size=32)
    result = GptqMethod(settings).quantize_block(block, calibration)
    scheme = QuantScheme(3, group_size, symmetric, 16)
    x = layer_inputs(block, calibration, NAMES[:1])[NAMES[0]]
    hessian = torch.from_numpy(reference_hessian(x)).float()
    options = CompensationSettings(0.02, 32, act_order, full_range=True)
    for name in NAMES:
        assert result.weights[name].scheme == scheme
    for name in GROUPS[0]:
        expected, _ = gptq(block.get_submodule(name).weight.detach(), hessian, scheme, settings=options)
        assert (result.weights[name].values == expected.values).float().mean() > 0.99
        torch.testing.assert_close(result.weights[name].scales, expected.scales, rtol=1e-2, atol=0)
    if symmetric and act_order:
        # Static groups: the grid of the original weight, whatever order its columns are taken in.
        for name in NAMES:
            weight = block.get_submodule(name).weight.detach()
            width = weight.shape[1] if group_size == -1 else group_size
            absmax = torch.stack([part.abs().amax(dim=1) for part in weight.split(width, dim=1)], dim=1)
            torch.testing.assert_close(result.weights[name].scales, absmax / 3.5)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_beats_round_to_nearest_in_groups(symmetric, act_order):
    errors = {}
    for method in (
        RtnMethod(RtnSettings(4, 16, symmetric, activation_bits=16)),
        GptqMethod(GptqSettings(4, 16, symmetric, act_order)),
    ):
        model = make_model(kv_heads=2, outlier_factor=20.0)
        block, calibration = model.model.layers[0], calibrate(model, samples=40)
        result = method.quantize_block(block, calibration)
        # Other inputs than those of the calibration.
        errors[method.name] = block_error(block, calibrate(model, samples=6, seed=7), result)
    assert errors["gptq"] < 0.85 * errors["rtn"]


def test_act_order_helps_where_a_few_features_are_large():
    errors = {}
    for act_order in (False, True):
        model = make_model(kv_heads=2, outlier_factor=20.0, outlier_channels=(50, 57, 63))
        block, calibration = model.model.layers[0], calibrate(model, samples=10)
        result = GptqMethod(GptqSettings(3, -1, act_order=act_order)).quantize_block(block, calibration)
        errors[act_order] = sum(result.metrics["layers"][name]["relative_error"] for name in GROUPS[0])
    assert errors[True] < errors[False]


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_full_range_divides_by_half_a_step_more(act_order, full_range):
    model = make_model()
    block, calibration = model.model.layers[0], calibrate(model)
    settings = GptqSettings(4, 16, act_order=act_order, full_range=full_range)
    result = GptqMethod(settings).quantize_block(block, calibration)
    for name in GROUPS[0]:
        first = block.get_submodule(name).weight[:, :16].abs().amax(dim=1)
        # Nothing has been compensated before the first group.
        expected = first / (7.5 if full_range else 7)
        torch.testing.assert_close(result.weights[name].scales[:, 0], expected, rtol=1e-6, atol=0)
        assert result.weights[name].values.max() == 7


def test_raised_damping_is_recorded():
    model = make_model()
    block, calibration = model.model.layers[0], calibrate(model, samples=1, seqlen=4)
    result = GptqMethod(GptqSettings(group_size=16, damping=1e-10)).quantize_block(block, calibration)
    metrics = json.loads(json.dumps(result.metrics))["layers"]
    assert list(metrics) == NAMES
    # Four tokens in 64 dimensions: the Hessian is singular.
    assert all(1e-10 < metrics[name]["damping"] <= 1e-4 for name in GROUPS[0])
    usual = GptqMethod(GptqSettings(group_size=16)).quantize_block(block, calibrate(model)).metrics["layers"]
    assert all(layer["damping"] == 0.01 for layer in usual.values())


@pytest.mark.parametrize("settings", [GptqSettings(), GptqSettings(4, 32, symmetric=False, act_order=True)], ids=str)
def test_checkpoint_round_trip(settings, tmp_path):
    source = resolve_model("random", path=str(write_checkpoint(tmp_path / "source", layers=2)))
    tokens = torch.randint(256, (8, 48), generator=generator(3))
    report = quantize_checkpoint(
        source, GptqMethod(settings), settings_dict(settings), CalibrationTokens(tokens, {}),
        tmp_path / "quantized", device=CPU,
    )  # fmt: skip
    assert report.manifest["label"] == f"W4A16-g{settings.group_size}"
    assert all(layer["damping"] == 0.01 for layer in report.manifest["block_metrics"][1]["layers"].values())
    quantized, original = odyssey.load_quantized(tmp_path / "quantized"), load_model(source)
    layer = quantized.model.layers[0].mlp.up_proj
    assert layer.scheme == QuantScheme(4, settings.group_size, settings.symmetric, 16)
    assert layer.scales.shape == (256, 128 // settings.group_size)
    assert (layer.zeros is None) == settings.symmetric
    rtn = RtnSettings(4, settings.group_size, settings.symmetric, 16)
    quantize_checkpoint(source, RtnMethod(rtn), settings_dict(rtn), None, tmp_path / "rtn", device=CPU)
    with torch.no_grad():
        expected = original(tokens).logits
        error = (quantized(tokens).logits - expected).norm()
        rounded = (odyssey.load_quantized(tmp_path / "rtn")(tokens).logits - expected).norm()
    assert 0 < error < 0.9 * rounded


def test_bad_input_is_refused_with_its_name():
    model = make_model()
    block, calibration = model.model.layers[0], calibrate(model)
    with pytest.raises(ValueError, match="needs calibration"):
        GptqMethod().quantize_block(block, None)
    calibration.inputs[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the activations of self_attn\.q_proj"):
        GptqMethod().quantize_block(block, calibration)
    block.mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the weight of mlp\.down_proj holds 1 NaN or Inf"):
        GptqMethod().quantize_block(block, calibration)


def test_a_hopeless_hessian_is_reported_with_the_layers_name(monkeypatch):
    def indefinite(block, names, *args, **kwargs):
        return {name: torch.diag(torch.linspace(-1e9, 1e9, HIDDEN)) for name in names}

    monkeypatch.setattr(gptq_module, "collect_hessians", indefinite)
    model = make_model()
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: the Hessian is not positive definite"):
        GptqMethod().quantize_block(model.model.layers[0], calibrate(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 16}, "bits must be 2..8"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GptqSettings(**changes)


def test_the_default_is_g128():
    assert GptqMethod().scheme == QuantScheme(4, 128, symmetric=True, activation_bits=16)
