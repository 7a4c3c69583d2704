"""Small checkpoints of every kind that the engine runs, quantized in every format, on every device asked for."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.checkpoints import write_checkpoint

from baselines.rtn import RtnMethod, RtnSettings
from odyssey.methods import settings_dict
from odyssey.models.source import resolve_model
from odyssey.quantization.pipeline import quantize_checkpoint

# Head size 64 and sizes in multiples of 128: what the GPU kernels take.
SIZES = {"layers": 3, "hidden": 256, "intermediate": 384, "heads": 4, "kv_heads": 2}
# Formats of the engine by the round-to-nearest settings that make their integers.
SETTINGS = {
    "w8a8": RtnSettings(bits=8),
    "w4a8": RtnSettings(bits=4),
    "w4a8-g128": RtnSettings(bits=4, group_size=128),
    "w4a16-g128": RtnSettings(bits=4, group_size=128, symmetric=False, activation_bits=16),
}


def _edit_config(directory, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _llama3_rope(directory) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    _edit_config(directory, rope_parameters=rope)


def _sliding_window(directory) -> None:
    _edit_config(directory, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=24)


CHECKPOINTS = {
    "gqa": ({}, None),
    "mha": ({"kv_heads": 4, "dtype": torch.bfloat16}, None),
    "tied": ({"tied": True}, None),
    "qwen2-bias": ({"family": "qwen2"}, None),
    "llama3-rope": ({}, _llama3_rope),
    "sliding-window": ({}, _sliding_window),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """checkpoints(name): directory of one of CHECKPOINTS, written once."""
    made = {}

    def get(name):
        if name not in made:
            options, edit = CHECKPOINTS[name]
            made[name] = write_checkpoint(tmp_path_factory.mktemp(name) / "model", **{**SIZES, **options})
            if edit is not None:
                edit(made[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def quantized(checkpoints, tmp_path_factory):
    """quantized(name, form): directory of a quantized checkpoint, written once; name may be a directory."""
    made = {}

    def get(name, form):
        if (name, form) not in made:
            source = resolve_model("model", path=str(checkpoints(name) if name in CHECKPOINTS else name))
            method = RtnMethod(SETTINGS[form])
            output = tmp_path_factory.mktemp(form) / "quantized"
            settings = settings_dict(SETTINGS[form])
            quantize_checkpoint(source, method, settings, None, output, device=torch.device("cpu"))
            made[name, form] = output
        return made[name, form]

    return get
