"""A small random LLaMA, for the tests of clipping and of simulated blocks."""

from __future__ import annotations

import pytest
import torch
from helpers.blocks import heavy_tailed
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for seed, module in enumerate(model.modules()):
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(heavy_tailed(*module.weight.shape, seed))
    return model
