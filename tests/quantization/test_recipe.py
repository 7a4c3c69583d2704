"""The whole recipe on small LLaMA blocks with activation outliers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.outliers import inject_activation_outliers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from odyssey.quantization import recipe as recipe_module
from odyssey.quantization.clipping import LearnedClippingSettings, SearchSettings, search_clipping
from odyssey.quantization.compensation import CompensationSettings, gptq
from odyssey.quantization.fake_quant import FakeQuantLinear, fake_quantized
from odyssey.quantization.grid import dequantize, minmax_grid, quantize_activation_per_token, round_to_nearest
from odyssey.quantization.method import BlockCalibration
from odyssey.quantization.recipe import OdysseyMethod, OdysseySettings
from odyssey.quantization.scheme import QuantScheme

LINEAR_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
NAMES = [name for group in LINEAR_GROUPS for name in group]
HIDDEN = 64
LWC = LearnedClippingSettings(epochs=6, learning_rate=5e-2)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(generator=generator(77))
        for seed, module in enumerate(model.modules()):
            if isinstance(module, torch.nn.Linear):
                normal = torch.randn(module.weight.shape, generator=generator(seed))
                module.weight.copy_((normal + 0.15 * normal**3) / math.sqrt(module.in_features))
    return model


@pytest.fixture
def model() -> LlamaForCausalLM:
    model = make_model()
    inject_activation_outliers(model, [3, 40], 6.0)
    return model


def calibrate(model: LlamaForCausalLM, samples: int = 6, seqlen: int = 32, seed: int = 0) -> BlockCalibration:
    def forward(block, hidden):
        positions = torch.arange(hidden.shape[1])[None]
        return block(hidden, position_embeddings=model.model.rotary_emb(hidden, positions))

    # Correlated features, as hidden states have them.
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator(9)) / 8 + torch.eye(HIDDEN)
    inputs = [torch.randn(1, seqlen, HIDDEN, generator=generator(100 * seed + i)) @ mixing for i in range(samples)]
    with torch.no_grad():
        targets = [forward(model.model.layers[0], hidden) for hidden in inputs]
    return BlockCalibration(
        inputs=inputs,
        reference_inputs=inputs,
        targets=targets,
        forward=forward,
        linear_groups=LINEAR_GROUPS,
        input_norms={0: "input_layernorm", 2: "post_attention_layernorm"},
        device=torch.device("cpu"),
    )


def block_error(block, calibration, weights) -> float:
    with torch.no_grad(), fake_quantized(block, weights):
        errors = [
            functional.mse_loss(calibration.forward(block, hidden), target).item()
            for hidden, target in zip(calibration.inputs, calibration.targets, strict=True)
        ]
    return sum(errors) / len(errors)


def test_outliers_leave_the_full_precision_function_unchanged():
    plain, outliers = make_model(), make_model()
    changed = inject_activation_outliers(outliers, [3, 40], 30.0)
    assert len(changed) == 2 * (2 + 5)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(outliers(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)
        hidden = torch.randn(1, 20, HIDDEN, generator=generator(0))
        ratio = outliers.model.layers[0].input_layernorm(hidden) / plain.model.layers[0].input_layernorm(hidden)
    expected = torch.ones(HIDDEN)
    expected[[3, 40]] = 30
    torch.testing.assert_close(ratio, expected.expand_as(ratio), rtol=1e-4, atol=0)

    state = make_model().state_dict()
    inject_activation_outliers(state, [3, 40], 30.0)
    assert all(torch.equal(state[name], value) for name, value in outliers.state_dict().items())
    with pytest.raises(ValueError, match="no input_layernorm"):
        inject_activation_outliers({"weight": torch.ones(3)}, [0])


def test_outliers_hurt_eight_bit_activations():
    hidden = torch.randn(64, HIDDEN, generator=generator(0))
    errors = []
    for factor in (1.0, 30.0):
        x = hidden.clone()
        x[:, [3, 40]] *= factor
        values, scales = quantize_activation_per_token(x)
        errors.append(((values * scales - x)[:, :3]).square().mean().item())
    assert errors[1] > 50 * errors[0]


@pytest.mark.parametrize("bits", [3, 4])
def test_ablation_is_ordered_as_in_the_paper(model, bits):
    block, calibration = model.model.layers[0], calibrate(model, samples=10)
    errors = {}
    for clipping, compensation in (("none", "none"), ("learned", "none"), ("learned", "gptq")):
        method = OdysseyMethod(OdysseySettings(bits, clipping=clipping, compensation=compensation, lwc=LWC))
        weights = method.quantize_block(block, calibration).weights
        errors[clipping, compensation] = block_error(block, calibration, weights)
    assert errors["none", "none"] > 1.05 * errors["learned", "none"]
    assert errors["learned", "none"] > 1.05 * errors["learned", "gptq"]


@pytest.mark.parametrize("clipping", ["none", "search", "learned"])
@pytest.mark.parametrize("compensation", ["none", "gptq"])
@pytest.mark.parametrize("group_size", [-1, 24])
def test_every_combination_gives_integers_and_json_metrics(model, clipping, compensation, group_size):
    block, calibration = model.model.layers[0], calibrate(model, samples=3)
    settings = OdysseySettings(4, group_size, clipping=clipping, compensation=compensation, lwc=replace(LWC, epochs=1))
    result = OdysseyMethod(settings).quantize_block(block, calibration)
    assert list(result.weights) == NAMES
    for name, weight in result.weights.items():
        source = block.get_submodule(name).weight
        assert weight.values.shape == source.shape
        assert weight.scheme == QuantScheme(4, group_size)
        full, _ = minmax_grid(source.detach(), weight.scheme)
        if clipping != "none":
            assert torch.all(weight.scales <= full)
            assert torch.any(weight.scales < 0.99 * full)
            kept = (weight.scales.double() / full).mean().item()
            assert result.metrics["layers"][name]["kept_range"] == pytest.approx(kept, rel=1e-5)
        elif compensation == "none":
            assert torch.equal(weight.values, round_to_nearest(source.detach(), weight.scheme).values)
    metrics = json.loads(json.dumps(result.metrics))
    assert ("lwc" in metrics) == (clipping == "learned")
    assert all(("kept_range" in layer) == (clipping != "none") for layer in metrics["layers"].values())
    assert all(0.3 <= layer.get("kept_range", 1) <= 1 for layer in metrics["layers"].values())
    if compensation == "gptq":
        assert all(metrics["layers"][name]["damping"] == 0.01 for name in NAMES)
        assert all(0 < metrics["layers"][name]["relative_error"] < 0.2 for name in NAMES)


def test_the_default_is_the_w4a8_recipe():
    method = OdysseyMethod()
    assert method.scheme == QuantScheme(weight_bits=4, group_size=-1, symmetric=True, activation_bits=8)
    assert (method.settings.clipping, method.settings.compensation) == ("learned", "gptq")
    assert method.settings.start_from == "unclipped"
    assert method.settings.lwc.learning_rate == 1e-2
    assert method.settings.lwc.initial_logit == 4.0
    assert method.settings.lwc.targets == "reference"
    assert method.needs_calibration
    assert not OdysseyMethod(OdysseySettings(clipping="none", compensation="none")).needs_calibration


def test_same_seed_same_integers(model):
    block = model.model.layers[0]
    settings = OdysseySettings(lwc=replace(LWC, epochs=2))
    runs = [OdysseyMethod(settings).quantize_block(block, calibrate(model)) for _ in range(2)]
    for name in NAMES:
        assert torch.equal(runs[0].weights[name].values, runs[1].weights[name].values)
        assert torch.equal(runs[0].weights[name].scales, runs[1].weights[name].scales)


def test_compensation_keeps_the_learned_grid(model):
    block, calibration = model.model.layers[0], calibrate(model)
    base = OdysseySettings(lwc=replace(LWC, epochs=2))
    rounded = OdysseyMethod(replace(base, compensation="none")).quantize_block(block, calibration)
    compensated = OdysseyMethod(base).quantize_block(block, calibration)
    for name in NAMES:
        assert torch.equal(rounded.weights[name].scales, compensated.weights[name].scales)
        assert not torch.equal(rounded.weights[name].values, compensated.weights[name].values)


def with_another_reference(calibration: BlockCalibration) -> BlockCalibration:
    """The quantized chain stays, the full-precision one is elsewhere."""
    elsewhere = [hidden + torch.randn(hidden.shape, generator=generator(7)) for hidden in calibration.inputs]
    return replace(calibration, reference_inputs=elsewhere)


def hessian_of(rows: torch.Tensor, quantized: bool = True) -> torch.Tensor:
    if quantized:
        values, scales = quantize_activation_per_token(rows)
        rows = values * scales
    return 2 / len(rows) * rows.double().t() @ rows.double()


def test_later_layers_see_the_partly_quantized_block(model, monkeypatch):
    block, calibration = model.model.layers[0], with_another_reference(calibrate(model))
    seen = {}

    def spy(weight, hessian, *args, **kwargs):
        name = next(n for n in NAMES if torch.equal(block.get_submodule(n).weight, weight))
        seen[name] = hessian
        return gptq(weight, hessian, *args, **kwargs)

    monkeypatch.setattr(recipe_module, "gptq", spy)
    result = OdysseyMethod(OdysseySettings(clipping="none")).quantize_block(block, calibration)

    inputs = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    earlier = {name: result.weights[name] for name in NAMES[:-1]}
    with torch.no_grad(), fake_quantized(block, earlier):
        for hidden in calibration.inputs:
            calibration.forward(block, hidden)
    handle.remove()
    expected = hessian_of(torch.cat(inputs))
    torch.testing.assert_close(seen["mlp.down_proj"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_the_search_weighs_errors_by_what_each_layer_reads(model, monkeypatch, activation_bits):
    """The full-precision block on the quantized chain's inputs, as integers where the layer will get integers."""
    block, calibration = model.model.layers[0], with_another_reference(calibrate(model))
    seen = {}

    def spy(weight, scheme, settings, hessian):
        name = next(n for n in NAMES if torch.equal(block.get_submodule(n).weight, weight))
        seen[name] = hessian
        return search_clipping(weight, scheme, settings, hessian)

    monkeypatch.setattr(recipe_module, "search_clipping", spy)
    settings = OdysseySettings(
        activation_bits=activation_bits, clipping="search", compensation="none", search=SearchSettings("output")
    )
    OdysseyMethod(settings).quantize_block(block, calibration)
    rows = {name: [] for name in NAMES}
    for name in NAMES:
        block.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: rows[name].append(args[0][0])
        )
    with torch.no_grad():
        for hidden in calibration.inputs:
            calibration.forward(block, hidden)
    for name in NAMES:
        expected = hessian_of(torch.cat(rows[name]), quantized=activation_bits == 8)
        torch.testing.assert_close(seen[name].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start_from", ["unclipped", "clipped"])
def test_start_of_the_compensation(model, monkeypatch, start_from):
    block, calibration = model.model.layers[0], calibrate(model)
    starts = []

    def spy(weight, hessian, scheme, scales, **kwargs):
        starts.append((weight, scales, hessian.double()))
        return gptq(weight, hessian, scheme, scales, **kwargs)

    monkeypatch.setattr(recipe_module, "gptq", spy)
    settings = OdysseySettings(3, clipping="search", start_from=start_from)
    result = OdysseyMethod(settings).quantize_block(block, calibration)
    for name, (start, scales, hessian) in zip(NAMES, starts, strict=True):
        weight = block.get_submodule(name).weight.detach()
        clipped = torch.minimum(torch.maximum(weight, -4 * scales), 3 * scales)
        assert not torch.equal(clipped, weight)
        assert torch.equal(start, weight if start_from == "unclipped" else clipped)
        # Whatever it starts from, the error is that against the layer's own weight.
        original, rounded = weight.double(), dequantize(result.weights[name]).double()
        squares = [((part @ hessian) * part).sum().item() for part in (original - rounded, original)]
        found = result.metrics["layers"][name]["relative_error"]
        assert found == pytest.approx(squares[0] / squares[1], rel=1e-3)


def test_search_initialization_and_objectives(model):
    block, calibration = model.model.layers[0], calibrate(model)
    for objective in ("weight", "diagonal", "output"):
        search = SearchSettings(objective)
        searched = OdysseyMethod(
            OdysseySettings(3, clipping="search", compensation="none", search=search)
        ).quantize_block(block, calibration)
        learned = OdysseyMethod(
            OdysseySettings(3, compensation="none", search=search, lwc=replace(LWC, epochs=1, initialization="search"))
        ).quantize_block(block, calibration)
        start = block_error(block, calibration, searched.weights)
        assert learned.metrics["lwc"]["losses"][0] == pytest.approx(start, rel=0.02)
        assert block_error(block, calibration, learned.weights) <= 1.02 * start


def test_progress_is_reported(model):
    calibration = calibrate(model)
    seen = []
    calibration.report = seen.append
    OdysseyMethod(OdysseySettings(lwc=replace(LWC, epochs=2))).quantize_block(model.model.layers[0], calibration)
    assert [text.split()[0] for text in seen] == ["clip", "lwc", "lwc", "gptq", "gptq", "gptq", "gptq"]
    assert "q_proj, k_proj, v_proj" in seen[3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_reported_with_their_place(model, bad):
    block, calibration = model.model.layers[0], calibrate(model)
    block.mlp.up_proj.weight.data[1, 2] = bad
    with pytest.raises(ValueError, match=r"the weight of mlp\.up_proj holds 1 NaN or Inf"):
        OdysseyMethod().quantize_block(block, calibration)
    block.mlp.up_proj.weight.data[1, 2] = 0
    calibration.inputs[2][0, 0, 0] = bad
    with pytest.raises(ValueError, match="calibration sample 2"):
        OdysseyMethod().quantize_block(block, calibration)


def test_a_hopeless_hessian_is_reported_with_the_layers_name(model, monkeypatch):
    def indefinite(block, names, *args):
        return {name: torch.diag(torch.linspace(-1e9, 1e9, HIDDEN)) for name in names}

    monkeypatch.setattr(recipe_module, "collect_hessians", indefinite)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: the Hessian is not positive definite"):
        OdysseyMethod(OdysseySettings(clipping="none")).quantize_block(model.model.layers[0], calibrate(model))


def test_calibration_is_optional_only_without_clipping_and_compensation(model):
    block = model.model.layers[0]
    with pytest.raises(ValueError, match="needs calibration"):
        OdysseyMethod().quantize_block(block, None)
    result = OdysseyMethod(OdysseySettings(clipping="none", compensation="none")).quantize_block(block, None)
    assert sorted(result.weights) == sorted(NAMES)


@pytest.mark.parametrize("changes", [{"clipping": "lwc"}, {"compensation": "obq"}, {"start_from": "rounded"}], ids=str)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        OdysseySettings(**changes)
    for bits in (1, 9, 16):
        with pytest.raises(ValueError, match=rf"bits must be 2\.\.8, not {bits}"):
            OdysseySettings(bits)
    with pytest.raises(ValueError, match="damping"):
        OdysseySettings(gptq=CompensationSettings(damping=-1))


def test_the_simulation_runs_in_half_precision():
    weight = round_to_nearest(torch.randn(6, 8, generator=generator(0)), QuantScheme())
    x = torch.randn(2, 8, generator=generator(1))
    linear = FakeQuantLinear.from_quantized(weight, torch.ones(6))
    assert linear(x.half()).dtype == torch.float16
    torch.testing.assert_close(linear(x.half()).float(), linear(x), rtol=2e-2, atol=2e-2)
