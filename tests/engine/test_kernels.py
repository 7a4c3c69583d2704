"""What a decoding step and a prefill launch on the GPU: the planned kernels and nothing else (no copies, no casts)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig

from odyssey.engine import FORMATS, Engine, random_weights

pytestmark = pytest.mark.gpu
# norm, QKV, attention in two kernels, o, norm, gate/up, SiLU, down.
PLANNED = 9


def _engine(form: str, layers: int) -> Engine:
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=4096, max_position_embeddings=1024,
    )  # fmt: skip
    return Engine(random_weights(config, FORMATS[form], "cuda"), batch_size=2, max_len=512)


def _launched(work) -> Counter:
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(names)


def _of_one_layer(form: str, work_of) -> Counter:
    """Kernels that a decoder of four layers launches more than one of three."""
    four, three = (_launched(work_of(_engine(form, layers))) for layers in (4, 3))
    return four - three


def _unplanned(launched: Counter) -> list[str]:
    """Copies and PyTorch's own element-wise kernels, which hide in views that are made contiguous and in casts."""
    return [name for name in launched if name.startswith("Memcpy") or "at::native" in name]


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_a_layer_of_a_decoding_step_is_its_planned_kernels(form):
    def work_of(engine):
        engine.prepare(2)
        engine.prefill(torch.ones(2, 256, dtype=torch.int64))
        return lambda: engine.step(2)

    launched = _of_one_layer(form, work_of)
    assert launched.total() == PLANNED, launched
    assert not _unplanned(launched)


def test_float_products_add_nothing_but_their_library_kernels():
    def work_of(engine):
        engine.prepare(2)
        engine.prefill(torch.ones(2, 256, dtype=torch.int64))
        return lambda: engine.step(2)

    launched = _of_one_layer("fp16", work_of)
    # cuBLAS may split a product over K and add the parts in a second kernel.
    assert PLANNED <= launched.total() <= PLANNED + 4, launched
    assert not _unplanned(launched)


@pytest.mark.parametrize("form", ["w8a8", "w4a8"])
def test_a_layer_of_a_prefill_is_its_planned_kernels(form):
    def work_of(engine):
        prompt = torch.ones(2, 256, dtype=torch.int64, device="cuda")
        return lambda: engine.prefill(prompt)

    launched = _of_one_layer(form, work_of)
    # cuDNN's attention clears a counter of its own.
    launched = Counter({name: count for name, count in launched.items() if not name.startswith("Memset")})
    # norm, QKV, RoPE and cache write, attention, quantization, o, norm, gate/up, SiLU, down.
    assert launched.total() == PLANNED + 1, launched
    assert not _unplanned(launched)
