"""AWQ against float64 NumPy: the scale search, the clip search, and that folding changes nothing."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers.blocks import HIDDEN, NAMES, block_error, calibrate, generator, layer_inputs, make_model
from helpers.checkpoints import write_checkpoint

import odyssey
from baselines.awq import AwqMethod, AwqSettings, awq_scales, relative_magnitude, scale_pairs, search_clipping
from baselines.rtn import RtnMethod, RtnSettings
from odyssey.data.calibration import CalibrationTokens
from odyssey.methods import settings_dict
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model
from odyssey.quantization.pipeline import quantize_checkpoint
from odyssey.quantization.scheme import QuantScheme

CPU = torch.device("cpu")
GROUP = 16
RATIOS = np.arange(20) / 20


def reference_quantize(weight: np.ndarray, group_size: int, symmetric: bool = False) -> np.ndarray:
    """4-bit min/max quantization and back, group by group, in float64 on a float32 grid.

    The grid is float32 as in the checkpoint: a range clipped to [-c, c] puts the zero point at 7.5, a tie.
    """
    result = np.empty_like(weight)
    for start in range(0, weight.shape[1], group_size):
        part = weight[:, start : start + group_size]
        if symmetric:
            scale = np.abs(part).max(axis=1, keepdims=True) / 7
            scale[scale == 0] = 1
            result[:, start : start + group_size] = np.clip(np.rint(part / scale), -8, 7) * scale
            continue
        low = np.minimum(part.min(axis=1, keepdims=True), 0).astype(np.float32)
        high = np.maximum(part.max(axis=1, keepdims=True), 0).astype(np.float32)
        scale = (high - low) / np.float32(15)
        scale[scale == 0] = 1
        zero = np.clip(np.rint(-low / scale), 0, 15)
        result[:, start : start + group_size] = (np.clip(np.rint(part / scale) + zero, 0, 15) - zero) * scale
    return result


def reference_scales(x: np.ndarray, ratio: float) -> np.ndarray:
    s = np.maximum(np.abs(x).mean(axis=0) ** ratio, 1e-4)
    return s / np.sqrt(s.max() * s.min())


def reference_absmax(weight: np.ndarray, group_size: int) -> np.ndarray:
    starts = range(0, weight.shape[1], group_size)
    return np.stack([np.abs(weight[:, start : start + group_size]).max(axis=1) for start in starts], axis=1)


def reference_clipping(weight: np.ndarray, x: np.ndarray, group_size: int, symmetric: bool) -> np.ndarray:
    limits = np.empty((len(weight), -(-weight.shape[1] // group_size)))
    for group in range(limits.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        part, tokens = weight[:, columns], x[:, columns]
        absmax = np.abs(part).max(axis=1, keepdims=True)
        errors = []
        for step in range(10):
            limit = absmax.astype(np.float32) * np.float32(1 - step / 20)
            rounded = reference_quantize(np.clip(part, -limit, limit), group_size, symmetric)
            errors.append(((tokens @ (rounded - part).T) ** 2).mean(axis=0))
        limits[:, group] = absmax[:, 0] * (1 - np.argmin(errors, axis=0) / 20)
    return limits


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def reference_magnitude(weights: list[np.ndarray], group_size: int) -> np.ndarray:
    rows = np.concatenate([np.abs(weight) for weight in weights])
    for start in range(0, rows.shape[1], group_size):
        part = rows[:, start : start + group_size]
        part /= part.max(axis=1, keepdims=True) + 1e-6
    return rows.mean(axis=0)


@pytest.mark.parametrize("group_size", [16, 24])
@pytest.mark.parametrize("ratio", [0.0, 0.35, 0.95])
def test_duo_scaling_divides_by_the_weights_relative_magnitude(ratio, group_size):
    weights = [torch.randn(rows, 64, generator=generator(rows)) ** 3 for rows in (32, 8)]
    x = torch.randn(50, 64, generator=generator(5)).abs() + 0.01
    expected = np.abs(to_numpy(x)).mean(axis=0) ** ratio
    magnitude = reference_magnitude([to_numpy(weight) for weight in weights], group_size)
    expected = np.maximum(expected / (magnitude ** (1 - ratio) + 1e-4), 1e-4)
    expected /= np.sqrt(expected.max() * expected.min())
    scales = awq_scales(x.mean(dim=0), ratio, relative_magnitude(weights, group_size))
    np.testing.assert_allclose(to_numpy(scales), expected, rtol=1e-5)


def test_the_search_uses_duo_scaling_where_asked():
    chosen = {}
    for duo in (False, True):
        model = make_model(kv_heads=2, outlier_factor=20.0)
        block, calibration = model.model.layers[0], calibrate(model)
        norm = block.input_layernorm.weight.clone()
        result = AwqMethod(AwqSettings(group_size=GROUP, duo_scaling=duo)).quantize_block(block, calibration)
        chosen[duo] = (norm / result.tensors["input_layernorm.weight"], result.metrics["scaling"]["input_layernorm"])
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        original = make_model(kv_heads=2, outlier_factor=20.0).model.layers[0]
        weights = [original.get_submodule(name).weight.detach() for name in names]
        x = layer_inputs(original, calibrate(make_model(kv_heads=2, outlier_factor=20.0)), names[:1])[names[0]]
        magnitude = relative_magnitude(weights, GROUP) if duo else None
        expected = awq_scales(x.abs().mean(dim=0), chosen[duo][1]["ratio"], magnitude)
        torch.testing.assert_close(chosen[duo][0], expected, rtol=1e-2, atol=0)
    assert not torch.allclose(chosen[False][0], chosen[True][0], rtol=1e-2)


def quantize(model, settings: AwqSettings | None = None, samples: int = 6):
    # What the method must use is the full-precision chain; the quantized one is elsewhere.
    block, calibration = model.model.layers[0], calibrate(model, samples=samples, drift=0.3)
    return AwqMethod(settings or AwqSettings(group_size=GROUP)).quantize_block(block, calibration)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.5, 0.95])
def test_scales_are_those_of_the_paper(ratio):
    x = torch.randn(50, 24, generator=generator(0)) * torch.logspace(-3, 1, 24)
    x[:, 5] = 0
    expected = reference_scales(to_numpy(x), ratio)
    np.testing.assert_allclose(awq_scales(x.abs().mean(dim=0), ratio).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scale_search_of_single_layers(kv_heads):
    model = make_model(kv_heads, outlier_factor=20.0)
    original = copy.deepcopy(model.model.layers[0])
    rows = layer_inputs(original, calibrate(model), NAMES)
    scaling = quantize(model).metrics["scaling"]
    expected = {"mlp.up_proj": "mlp.down_proj"}
    if kv_heads == 4:
        expected["self_attn.v_proj"] = "self_attn.o_proj"
    assert set(scaling) == {"input_layernorm", "post_attention_layernorm", *expected}
    for producer, name in expected.items():
        weight, x = to_numpy(original.get_submodule(name).weight), to_numpy(rows[name])
        errors = []
        for ratio in RATIOS:
            scales = reference_scales(x, ratio)
            change = reference_quantize(weight * scales, GROUP) / scales - weight
            errors.append(((x @ change.T) ** 2).sum() / ((x @ weight.T) ** 2).sum())
        found = scaling[producer]
        assert found["relative_error"] == pytest.approx(min(errors), rel=1e-3)
        assert found["relative_error_unscaled"] == pytest.approx(errors[0], rel=1e-3)
        assert errors[round(20 * found["ratio"])] <= min(errors) * 1.001


@pytest.mark.parametrize(("search_tokens", "compared"), [(65536, range(6)), (40, (0, 3))], ids=["all", "few"])
def test_scale_search_of_the_mlp(search_tokens, compared):
    """40 tokens are two of the six samples of 32, evenly spaced; the scales come from all."""
    model = make_model(outlier_factor=20.0)
    original = copy.deepcopy(model.model.layers[0])
    x = to_numpy(layer_inputs(original, calibrate(model), ["mlp.gate_proj"])["mlp.gate_proj"])
    gate, up, down = (to_numpy(original.get_submodule(f"mlp.{name}_proj").weight) for name in ("gate", "up", "down"))

    def mlp(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        activation = rows @ gate.T
        return (activation / (1 + np.exp(-activation)) * (rows @ up.T)) @ down.T

    rows = np.concatenate([x[32 * sample : 32 * sample + 32] for sample in compared])
    target = mlp(gate, up)
    errors = []
    for ratio in RATIOS:
        scales = reference_scales(x, ratio)
        output = mlp(*(reference_quantize(weight * scales, GROUP) / scales for weight in (gate, up)))
        errors.append(((output - target) ** 2).sum() / (target**2).sum())
    settings = AwqSettings(group_size=GROUP, search_tokens=search_tokens)
    found = quantize(model, settings).metrics["scaling"]["post_attention_layernorm"]
    assert found["relative_error"] == pytest.approx(min(errors), rel=1e-3)
    assert found["relative_error_unscaled"] == pytest.approx(errors[0], rel=1e-3)
    assert errors[round(20 * found["ratio"])] <= min(errors) * 1.001
    # The outliers make the search worth while.
    assert min(errors) < 0.7 * errors[0]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scale_search_of_the_attention(kv_heads):
    model = make_model(kv_heads, outlier_factor=20.0)
    reference = copy.deepcopy(model).double()
    block, calibration = reference.model.layers[0], calibrate(reference.float())
    reference.double()
    names = NAMES[:3]
    inputs = [hidden.double() for hidden in calibration.reference_inputs]
    x = to_numpy(layer_inputs(block, calibration, names[:1], inputs)[names[0]])
    weights = {name: to_numpy(block.get_submodule(name).weight) for name in names}

    @torch.no_grad()
    def attention() -> np.ndarray:
        outputs = []
        handle = block.self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        for hidden in inputs:
            calibration.forward(block, hidden)
        handle.remove()
        return torch.stack(outputs).numpy()

    target = attention()
    errors = []
    for ratio in RATIOS:
        scales = reference_scales(x, ratio)
        for name in names:
            rounded = reference_quantize(weights[name] * scales, GROUP) / scales
            block.get_submodule(name).weight.data = torch.from_numpy(rounded)
        errors.append(((attention() - target) ** 2).sum() / (target**2).sum())
    found = quantize(model).metrics["scaling"]["input_layernorm"]
    assert found["relative_error"] == pytest.approx(min(errors), rel=1e-3)
    assert found["relative_error_unscaled"] == pytest.approx(errors[0], rel=1e-3)
    assert errors[round(20 * found["ratio"])] <= min(errors) * 1.001


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 20, 48, 64, -1])
def test_clip_search_matches_numpy(group_size, symmetric, monkeypatch):
    # Several chunks of rows, the last one shorter.
    monkeypatch.setattr("baselines.awq.CLIP_CHUNK", 700)
    normal = torch.randn(23, 48, generator=generator(1))
    weight = normal + 0.3 * normal**3
    weight[4, :16] = 0
    x = torch.randn(60, 48, generator=generator(2)) * torch.logspace(-1, 1, 48)
    limits = search_clipping(weight, x, QuantScheme(4, group_size, symmetric, 16)).numpy()
    width = 48 if group_size == -1 else group_size
    expected = reference_clipping(to_numpy(weight), to_numpy(x), width, symmetric)
    assert limits.shape == expected.shape
    # Candidates that are equally good in float32 may swap.
    assert np.isclose(limits, expected, rtol=1e-5).mean() > 0.98
    absmax = reference_absmax(weight.numpy(), width)
    assert (limits <= absmax * (1 + 1e-6)).all()
    assert (limits >= absmax * 0.549).all()
    assert (limits < 0.99 * absmax).mean() > 0.02


def test_integers_are_those_of_the_scaled_and_clipped_weights():
    model = make_model(outlier_factor=20.0)
    result = quantize(model, AwqSettings(group_size=GROUP, clip_tokens=70))
    block = model.model.layers[0]
    # Now folded: its layers' inputs and weights are what the clip search must have seen.
    rows = layer_inputs(block, calibrate(model), NAMES)
    metrics = json.loads(json.dumps(result.metrics))
    assert list(metrics["layers"]) == NAMES[2:]
    for name in NAMES:
        weight = to_numpy(block.get_submodule(name).weight)
        if name not in NAMES[:2]:
            # 192 tokens, at most 70 of them, evenly spaced: every third.
            limits = reference_clipping(weight, to_numpy(rows[name])[::3], GROUP, False)
            kept = (limits / reference_absmax(weight, GROUP)).mean()
            assert metrics["layers"][name]["kept_range"] == pytest.approx(kept, rel=1e-2)
            bound = np.repeat(limits, GROUP, axis=1)
            weight = np.clip(weight, -bound, bound)
        quantized = result.weights[name]
        assert quantized.scheme == QuantScheme(4, GROUP, False, 16)
        assert quantized.values.dtype == quantized.zeros.dtype == torch.uint8
        assert int(quantized.zeros.max()) <= 15
        assert int(quantized.values.max()) <= 15
        zeros, scales = (np.repeat(to_numpy(tensor), GROUP, axis=1) for tensor in (quantized.zeros, quantized.scales))
        dequantized = (quantized.values.numpy() - zeros) * scales
        close = np.abs(dequantized - reference_quantize(weight, GROUP)) < 1e-4 * np.abs(weight).max()
        assert close.mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scaling_keeps_the_function_in_the_stored_dtype(kv_heads, bias, dtype):
    model = make_model(kv_heads, bias, outlier_factor=20.0, dtype=dtype)
    original = copy.deepcopy(model.model.layers[0])
    calibration = calibrate(model)
    result = quantize(model)
    block = model.model.layers[0]
    expected = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    if bias:
        expected |= {"mlp.up_proj.bias"} | ({"self_attn.v_proj.bias"} if kv_heads == 4 else set())
    assert set(result.tensors) == expected
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor.to(dtype).float(), block.get_parameter(name))
        assert not torch.equal(tensor, original.get_parameter(name))
    # With grouped queries nothing can be moved from o into v.
    assert torch.equal(block.self_attn.o_proj.weight, original.self_attn.o_proj.weight) == (kv_heads == 2)
    with torch.no_grad():
        output = torch.cat([calibration.forward(block, hidden) for hidden in calibration.reference_inputs])
    target = torch.cat(calibration.targets)
    assert float((output - target).norm() / target.norm()) < 1e-6


@pytest.mark.parametrize(("kv_heads", "producers"), [
    (4, ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]),
    (2, ["input_layernorm", "post_attention_layernorm", "mlp.up_proj"]),
])  # fmt: skip
def test_pairs_of_a_block(kv_heads, producers):
    model = make_model(kv_heads)
    pairs = scale_pairs(model.model.layers[0], calibrate(model))
    assert [pair.producer for pair in pairs] == producers
    assert (pairs[0].consumers, pairs[0].inspected) == (tuple(NAMES[:3]), "self_attn")
    assert (pairs[-2].consumers, pairs[-2].inspected) == (("mlp.gate_proj", "mlp.up_proj"), "mlp")
    assert (pairs[-1].consumers, pairs[-1].inspected) == (("mlp.down_proj",), "mlp.down_proj")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_beats_round_to_nearest_in_groups(kv_heads, symmetric):
    errors = {}
    for method in (
        RtnMethod(RtnSettings(4, GROUP, symmetric, activation_bits=16)),
        AwqMethod(AwqSettings(4, GROUP, symmetric)),
    ):
        model = make_model(kv_heads, outlier_factor=20.0)
        block, calibration = model.model.layers[0], calibrate(model, samples=10)
        result = method.quantize_block(block, calibration)
        # Other inputs than those of the calibration.
        errors[method.name] = block_error(block, calibrate(make_model(kv_heads, outlier_factor=20.0), seed=7), result)
    assert errors["awq"] < 0.75 * errors["rtn"]


def test_search_tokens_bound_the_samples_that_are_compared():
    scaling = {
        tokens: quantize(make_model(outlier_factor=20.0), AwqSettings(group_size=GROUP, search_tokens=tokens)).metrics[
            "scaling"
        ]
        for tokens in (33, 64, 10**6)
    }
    assert scaling[33] == scaling[64]
    assert scaling[64]["input_layernorm"] != scaling[10**6]["input_layernorm"]
    # A single layer's error is exact on all tokens.
    assert scaling[64]["mlp.up_proj"]["relative_error"] == pytest.approx(
        scaling[10**6]["mlp.up_proj"]["relative_error"], rel=0.05
    )


@pytest.mark.parametrize("case", [
    {"layers": 2, "kv_heads": 2},
    {"layers": 2, "kv_heads": 4, "dtype": torch.bfloat16},
    {"layers": 2, "kv_heads": 4, "family": "qwen2"},
], ids=["grouped-query", "multi-head", "biases"])  # fmt: skip
def test_checkpoint_round_trip(case, tmp_path):
    source = resolve_model("random", path=str(write_checkpoint(tmp_path / "source", **case)))
    tokens = torch.randint(256, (8, 48), generator=generator(3))
    settings = AwqSettings(group_size=32)
    report = quantize_checkpoint(
        source, AwqMethod(settings), settings_dict(settings), CalibrationTokens(tokens, {}),
        tmp_path / "quantized", device=CPU,
    )  # fmt: skip
    assert report.manifest["label"] == "W4A16-g32"
    quantized, original = odyssey.load_quantized(tmp_path / "quantized"), load_model(source)
    layer = quantized.model.layers[0].mlp.down_proj
    assert layer.scheme == QuantScheme(4, 32, False, 16)
    assert layer.zeros.shape == layer.scales.shape == (128, 8)
    assert not torch.equal(
        quantized.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight
    )
    if "family" in case:
        assert not torch.equal(layer_bias(quantized), layer_bias(original))
    rtn = RtnSettings(4, 32, symmetric=False, activation_bits=16)
    quantize_checkpoint(source, RtnMethod(rtn), settings_dict(rtn), None, tmp_path / "rtn", device=CPU)
    with torch.no_grad():
        expected = original(tokens).logits
        error = (quantized(tokens).logits - expected).norm()
        rounded = (odyssey.load_quantized(tmp_path / "rtn")(tokens).logits - expected).norm()
    assert 0 < error < rounded


def layer_bias(model) -> torch.Tensor:
    return model.model.layers[0].self_attn.v_proj.bias


def test_bad_input_is_refused_with_its_name():
    model = make_model()
    block, calibration = model.model.layers[0], calibrate(model)
    with pytest.raises(ValueError, match="needs calibration"):
        AwqMethod().quantize_block(block, None)
    calibration.reference_inputs[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the mean activation of self_attn\.q_proj"):
        AwqMethod().quantize_block(block, calibration)
    block.mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"the weight of mlp\.down_proj holds 1 NaN or Inf"):
        AwqMethod().quantize_block(block, calibration)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 16}, "bits must be 2..8"),
        ({"search_tokens": 0}, "search_tokens must be at least 1"),
        ({"clip_tokens": 0}, "clip_tokens must be at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AwqSettings(**changes)


def test_the_default_is_asymmetric_g128():
    assert AwqMethod().scheme == QuantScheme(4, 128, symmetric=False, activation_bits=16)
    assert AwqSettings().clip_tokens == 512
    assert quantize(make_model(), AwqSettings()).weights["mlp.down_proj"].scales.shape == (HIDDEN, 1)
