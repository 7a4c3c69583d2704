"""Shapes of published models against their parameter counts; the RoPE table against Transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from odyssey.engine.formats import FORMATS, format_of
from odyssey.engine.shapes import DecoderShapes, known_config, rope_table
from odyssey.errors import UnsupportedError
from odyssey.quantization.scheme import QuantScheme

# As the models' pages on the hub state them.
PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_published_size(name):
    shapes = DecoderShapes.from_config(known_config(name))
    layer = sum(n * k for n, k in shapes.linear_sizes().values()) + 2 * shapes.hidden_size
    layer += shapes.qkv_size if shapes.qkv_bias else 0
    tables = 2 * shapes.vocab_size * shapes.hidden_size
    assert shapes.num_layers * layer + tables + shapes.hidden_size == PARAMETERS[name]


def test_every_model_of_the_config_group_is_known(project_root):
    names = {path.stem for path in (project_root / "conf" / "model").glob("*.yaml")} - {"local", "tiny"}
    for name in names:
        assert known_config(name).num_hidden_layers > 0


def test_llama31_has_the_scaled_rope_and_no_other_has():
    assert known_config("llama3.1-8b").rope_parameters["rope_type"] == "llama3"
    table, plain = (rope_table(known_config(name), 200, torch.device("cpu")) for name in ("llama3.1-8b", "llama3-8b"))
    assert not torch.equal(table, plain)
    for name in PARAMETERS.keys() - {"llama3.1-8b", "llama3.1-70b"}:
        assert known_config(name).rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_the_rope_table_is_transformers(rope):
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=256, rope_parameters=rope, num_hidden_layers=1
    )
    table = rope_table(config, 200, torch.device("cpu"))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(200)[None])
    assert table.shape == (200, 64)
    assert torch.equal(table[:, :32], cos[0, :, :32])
    assert torch.equal(table[:, 32:], sin[0, :, 32:])


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LlamaConfig(num_hidden_layers=3), (None, None, None)),
        (MistralConfig(num_hidden_layers=3, sliding_window=8), (8, 8, 8)),
        (MistralConfig(num_hidden_layers=3, sliding_window=None), (None, None, None)),
        # Qwen2's first layers attend to everything.
        (
            Qwen2Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            (None, 8, 8),
        ),
        (Qwen2Config(num_hidden_layers=3, use_sliding_window=False, sliding_window=8), (None, None, None)),
    ],
    ids=["llama", "mistral", "mistral-none", "qwen2", "qwen2-off"],
)
def test_windows_of_each_layer(config, windows):
    assert DecoderShapes.from_config(config).windows == windows


def test_what_the_engine_cannot_run_is_refused():
    config = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedError, match="rope_type 'dynamic'"):
        DecoderShapes.from_config(config)
    with pytest.raises(UnsupportedError, match="hidden_act 'gelu'"):
        DecoderShapes.from_config(LlamaConfig(hidden_act="gelu"))
    with pytest.raises(UnsupportedError, match="no kernel for asymmetric W4A8"):
        format_of(QuantScheme(4, -1, False, 8))


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (QuantScheme(16, activation_bits=16), "fp16"),
        (QuantScheme(8), "w8a8"),
        (QuantScheme(6), "w8a8"),
        (QuantScheme(4), "w4a8"),
        (QuantScheme(3), "w4a8"),
        (QuantScheme(4, 128), "w4a8-g128"),
        (QuantScheme(4, 128, True, 16), "w4a16-g128"),
        (QuantScheme(4, 128, False, 16), "w4a16-g128"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label,
)
def test_schemes_find_their_format(scheme, name):
    assert format_of(scheme) == FORMATS[name]
