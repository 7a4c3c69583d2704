"""Existing GPTQ and AWQ checkpoints against the weights that they stand for, packed independently."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.checkpoints import write_checkpoint
from helpers.packed_checkpoints import PackedLayout, pack_fields, quantize_checkpoint_randomly
from safetensors.torch import load_file, save_file

import odyssey
from baselines.checkpoint_formats import QuantizedLayout, unpack_words
from baselines.checkpoint_import import ExistingCheckpoint, checkpoint_source, import_checkpoint, read_layout
from odyssey.errors import InvalidCheckpointError, MissingModelError, UnsupportedError
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model
from odyssey.quantization.scheme import QuantScheme

GPTQ_LAYOUTS = [
    PackedLayout(bits=4, group_size=32),
    PackedLayout(bits=4, group_size=32, version=None),
    PackedLayout(bits=4, group_size=-1, version="gptq_v2"),
    PackedLayout(bits=4, group_size=32, act_order=True),
    PackedLayout(bits=4, group_size=32, zeros="random", act_order=True, version="gptq_v2"),
    PackedLayout(bits=4, group_size=64, zeros="random with 0"),
    PackedLayout(bits=3, group_size=32, zeros="random with 0"),
    PackedLayout(bits=3, group_size=-1, version="gptq_v2"),
    PackedLayout(bits=8, group_size=32, zeros="random with 0"),
    PackedLayout(bits=8, group_size=-1),
    PackedLayout(bits=2, group_size=32, zeros="random"),
]
AWQ_LAYOUTS = [PackedLayout("awq", zeros="random with 0"), PackedLayout("awq", group_size=-1, zeros="random")]


def make(path, layout: PackedLayout, **changes):
    """A quantized checkpoint of two blocks, and the float64 weights behind it."""
    shape = {"layers": 2, "hidden": 128, "intermediate": 192, "kv_heads": 2} | changes
    directory = write_checkpoint(path, **shape)
    return directory, quantize_checkpoint_randomly(directory, layout)


@pytest.mark.parametrize("layout", GPTQ_LAYOUTS + AWQ_LAYOUTS, ids=str)
def test_every_weight_is_the_one_the_integers_stand_for(layout, tmp_path):
    directory, expected = make(tmp_path / "existing", layout)
    source = checkpoint_source("random", str(directory))
    report = import_checkpoint(source, layout.method, {}, tmp_path / "ours")
    group = "" if layout.group_size == -1 else f"-g{layout.group_size}"
    assert report.manifest["label"] == f"W{layout.bits}A16{group}"
    model = odyssey.load_quantized(tmp_path / "ours")
    for key, weight in expected.items():
        layer = model.get_submodule(key.removesuffix(".weight"))
        assert layer.scheme == QuantScheme(layout.bits, layout.group_size, layout.zeros == "middle", 16)
        assert (layer.order is not None) == layout.act_order
        # float16 scales times integers below 2^9 are exact in float32.
        np.testing.assert_array_equal(layer.dequantized().double().numpy(), weight)


@pytest.mark.parametrize(
    "layout", [PackedLayout(act_order=True), PackedLayout("awq", zeros="random")], ids=["gptq", "awq"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_model_computes_what_the_float_model_with_these_weights_does(layout, family, tmp_path):
    directory, expected = make(tmp_path / "existing", layout, family=family)
    import_checkpoint(checkpoint_source("random", str(directory)), layout.method, {}, tmp_path / "ours")
    shape = {"layers": 2, "hidden": 128, "intermediate": 192, "kv_heads": 2}
    original = write_checkpoint(tmp_path / "original", family=family, **shape)
    reference = load_model(resolve_model("random", path=str(original)))
    for key, weight in expected.items():
        reference.get_parameter(key).data.copy_(torch.from_numpy(weight).float())
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            odyssey.load_quantized(tmp_path / "ours")(tokens).logits, reference(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_activation_order_holds_for_integer_activations_too(tmp_path):
    """The order of a layer's columns belongs to its weight, whatever arithmetic multiplies by it."""
    from odyssey.quantization.linear import QuantizedLinear
    from odyssey.quantization.scheme import QuantizedWeight

    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(64, generator=generator)
    values = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=generator)
    x = torch.randn(5, 64, generator=generator)
    for group_size, groups in ((-1, 1), (16, 4)):
        scales = torch.rand(16, groups, generator=generator) + 0.1
        scheme = QuantScheme(4, group_size, True, 8)
        natural = torch.empty(16, 64, dtype=torch.float64)
        natural[:, order] = values.double() * scales.double().repeat_interleave(64 // groups, dim=1)
        step = x.abs().amax(dim=1, keepdim=True).double() / 127
        expected = torch.round(x.double() / step) * step @ natural.t()
        layer = QuantizedLinear(QuantizedWeight(values, scales, scheme, order=order))
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        simulated = QuantizedLinear(QuantizedWeight(values, scales, scheme, order=order), backend="simulate")
        torch.testing.assert_close(simulated(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_is_the_inverse_of_packing(bits):
    fields = np.random.default_rng(bits).integers(0, 2**bits, (96, 5))
    words = torch.from_numpy(np.ascontiguousarray(pack_fields(fields, bits)))
    np.testing.assert_array_equal(unpack_words(words, bits).numpy(), fields)


def test_size_and_config_are_those_of_our_format(tmp_path):
    directory, _ = make(tmp_path / "existing", PackedLayout(act_order=True))
    manifest = import_checkpoint(checkpoint_source("m", str(directory)), "gptq", {}, tmp_path / "ours").manifest
    shapes = [(128, 128), (64, 128), (64, 128), (128, 128), (192, 128), (192, 128), (128, 192)]
    weights = 2 * sum(out * columns for out, columns in shapes)
    stored = 2 * sum(out * columns / 2 + out * columns / 32 * 4 + columns * 4 for out, columns in shapes)
    assert manifest["size"]["quantized_weights"] == weights
    assert manifest["size"]["bits_per_weight"] == pytest.approx(8 * stored / weights)
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert manifest["imported"]["zero_offset"] == 1


def test_a_second_import_finds_the_first_and_a_stopped_one_goes_on(tmp_path):
    directory, _ = make(tmp_path / "existing", PackedLayout())
    source = checkpoint_source("m", str(directory))
    import_checkpoint(source, "gptq", {}, tmp_path / "ours")
    before = (tmp_path / "ours" / "block-00000.safetensors").stat().st_mtime_ns
    assert import_checkpoint(source, "gptq", {}, tmp_path / "ours").seconds == 0
    (tmp_path / "ours" / "odyssey.json").unlink()
    (tmp_path / "ours" / "block-00001.safetensors").unlink()
    assert import_checkpoint(source, "gptq", {}, tmp_path / "ours").resumed_blocks == 1
    assert (tmp_path / "ours" / "block-00000.safetensors").stat().st_mtime_ns == before


def test_one_zero_point_off_the_middle_makes_the_checkpoint_asymmetric(tmp_path):
    directory, expected = make(tmp_path / "existing", PackedLayout())
    name = "model.layers.1.self_attn.k_proj"
    # Version 1 stores zero points less 1: 8 as 7. Output features 8 to 15 of the second group get 7.
    edited(directory, lambda state: state[f"{name}.qzeros"][1, 1].fill_(0x66666666))
    import_checkpoint(checkpoint_source("m", str(directory)), "gptq", {}, tmp_path / "ours")
    model = odyssey.load_quantized(tmp_path / "ours")
    layer = model.get_submodule(name)
    expected[f"{name}.weight"][8:16, 32:64] += layer.scales[8:16, 1:2].double().numpy()
    for key, weight in expected.items():
        found = model.get_submodule(key.removesuffix(".weight"))
        assert not found.scheme.symmetric
        np.testing.assert_array_equal(found.dequantized().double().numpy(), weight)


def test_another_checkpoint_is_not_taken_for_imported(tmp_path):
    for seed in (0, 1):
        directory = write_checkpoint(tmp_path / f"existing-{seed}", layers=2, hidden=128, intermediate=192, kv_heads=2)
        expected = quantize_checkpoint_randomly(directory, PackedLayout(), seed)
        report = import_checkpoint(checkpoint_source("m", str(directory)), "gptq", {}, tmp_path / "ours")
        assert report.resumed_blocks == 0
        model = odyssey.load_quantized(tmp_path / "ours")
        for key, weight in expected.items():
            found = model.get_submodule(key.removesuffix(".weight")).dequantized().double().numpy()
            np.testing.assert_array_equal(found, weight)


def test_zero_biases_of_layers_without_bias_are_dropped_and_others_refused(tmp_path):
    directory, _ = make(tmp_path / "existing", PackedLayout())
    file, name = directory / "model.safetensors", "model.layers.1.mlp.up_proj.bias"
    state = load_file(file)
    save_file({**state, name: torch.zeros(192, dtype=torch.float16)}, file)
    import_checkpoint(checkpoint_source("m", str(directory)), "gptq", {}, tmp_path / "ours")
    save_file({**state, name: torch.ones(192, dtype=torch.float16)}, file)
    with pytest.raises(UnsupportedError, match=rf"{name} is a bias that the model does not have"):
        import_checkpoint(checkpoint_source("m", str(directory)), "gptq", {}, tmp_path / "theirs")


def test_a_layer_in_floating_point_stays_so(tmp_path):
    directory, expected = make(tmp_path / "existing", PackedLayout("awq", zeros="random"))
    file, name = directory / "model.safetensors", "model.layers.0.mlp.down_proj"
    state = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(name)}
    weight = torch.randn(128, 192).half()
    save_file({**state, f"{name}.weight": weight}, file)
    import_checkpoint(checkpoint_source("m", str(directory)), "awq", {}, tmp_path / "ours")
    model = odyssey.load_quantized(tmp_path / "ours")
    assert torch.equal(model.get_parameter(f"{name}.weight"), weight.float())
    up = "model.layers.0.mlp.up_proj"
    np.testing.assert_array_equal(model.get_submodule(up).dequantized().numpy(), expected[f"{up}.weight"])


@pytest.mark.parametrize(
    ("file", "content", "layout"),
    [
        ("quantize_config.json", {"bits": 3, "group_size": 128, "desc_act": True}, ("gptq", 3, 128, 1)),
        ("quantize_config.json", {"bits": 4, "group_size": -1, "checkpoint_format": "gptq_v2"}, ("gptq", 4, -1, 0)),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}, ("awq", 4, 64, 0)),
    ],
)
def test_layouts_described_by_earlier_releases(file, content, layout, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(content))
    assert read_layout(tmp_path, layout[0]) == QuantizedLayout(*layout)


@pytest.mark.parametrize(
    ("description", "method", "error", "message"),
    [
        (None, "gptq", InvalidCheckpointError, "no quantization_config"),
        ({"quant_method": "awq", "bits": 4}, "gptq", UnsupportedError, "quant_method is 'awq'.* use method=awq"),
        ({"quant_method": "fp8"}, "gptq", UnsupportedError, "'fp8', not 'gptq'; GPTQ and AWQ checkpoints are read"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 8}, "gptq", UnsupportedError, "bits=5 is not read"),
        ({"quant_method": "awq", "bits": 3, "group_size": 8}, "awq", UnsupportedError, "bits=3 is not read; awq: 4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq", InvalidCheckpointError, "group_size=None"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
            "gptq", UnsupportedError, "checkpoint_format 'marlin' is not read",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
            "awq", UnsupportedError, "AWQ version 'gemv' is not read",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:down": {}}},
            "gptq", UnsupportedError, "'dynamic'",
        ),
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be_read(description, method, error, message, tmp_path):
    config = {} if description is None else {"quantization_config": description}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message) as caught:
        read_layout(tmp_path, method)
    assert "\n" not in str(caught.value)


def edited(directory, edit):
    state = load_file(directory / "model.safetensors")
    edit(state)
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.gate_proj.qzeros"), r"layers\.1\.mlp\.gate_proj\.qzeros is missing"),
        (lambda s: s.pop("model.layers.0.mlp.up_proj.qweight"), r"layers\.0\.mlp\.up_proj\.qweight is missing"),
        (lambda s: s.pop("model.layers.0.input_layernorm.weight"), r"input_layernorm\.weight is missing"),
        (lambda s: s.pop("model.embed_tokens.weight"), r"embed_tokens\.weight is missing"),
        (lambda s: s.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.scales": torch.ones(2, 128).half()}),
            r"q_proj\.scales has shape \(2, 128\), \(4, 128\) is expected \(gptq, 4 bits, group_size 32\)",
        ),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.g_idx": torch.zeros(128, dtype=torch.int32)}),
            r"q_proj: g_idx does not put 32 input features into every group",
        ),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj.qweight": torch.zeros(16, 128)}),
            r"q_proj\.qweight is torch\.float32, not int32",
        ),
        (
            lambda s: s.update({"model.layers.0.self_attn.o_proj.scales": torch.full((4, 128), torch.nan).half()}),
            r"o_proj\.scales has NaN or Inf",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(edit, message, tmp_path):
    directory, _ = make(tmp_path / "existing", PackedLayout())
    edited(directory, edit)
    with pytest.raises(InvalidCheckpointError, match=message) as caught:
        import_checkpoint(checkpoint_source("m", str(directory)), "gptq", {}, tmp_path / "ours")
    assert "\n" not in str(caught.value)


def test_a_quantized_lm_head_and_a_missing_directory_are_refused(tmp_path):
    directory, _ = make(tmp_path / "existing", PackedLayout())
    edited(directory, lambda state: state.update({"lm_head.qweight": torch.zeros(16, 256, dtype=torch.int32)}))
    with pytest.raises(UnsupportedError, match="a quantized lm_head is not read"):
        ExistingCheckpoint(directory, "gptq")
    with pytest.raises(MissingModelError, match=r"method\.checkpoint=nowhere: no such directory"):
        checkpoint_source("m", "nowhere")


def test_unquantized_checkpoints_have_nothing_to_read(tmp_path):
    directory = write_checkpoint(tmp_path / "plain", layers=1)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = PackedLayout().description()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidCheckpointError, match="nothing is quantized"):
        ExistingCheckpoint(directory, "gptq")
