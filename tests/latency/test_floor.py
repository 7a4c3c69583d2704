"""The floor and the predicted memory against sums written out by hand, and against what is allocated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from odyssey.engine import FORMATS, DecoderShapes, random_weights
from odyssey.engine.memory import MemoryNeed, predict, require, weight_bytes
from odyssey.engine.shapes import known_config
from odyssey.errors import UnsupportedError
from odyssey.latency.ceilings import Ceilings, measure_ceilings
from odyssey.latency.floor import floor_of
from odyssey.latency.names import METHODS, PEERS
from odyssey.latency.statistics import percentiles

CEILINGS = Ceilings(read_bytes_per_s=2e12, int8_ops_per_s=1e15, int8_by="x", float_ops_per_s=5e14)
SEVEN = DecoderShapes.from_config(known_config("llama2-7b"))


def test_decoding_of_llama2_7b_reads_its_weights_and_cache():
    floor = floor_of(SEVEN, FORMATS["w4a8"], CEILINGS, batch_size=1, input_len=1024, output_len=128)
    linear = 32 * (12288 * 4096 + 4096 * 4096 + 22016 * 4096 + 4096 * 11008)
    scales = 32 * 4 * (12288 + 4096 + 22016 + 4096)
    head = 2 * 32000 * 4096
    context = sum(1024 + step for step in range(1, 128))
    expected = 127 * (linear / 2 + scales + head) + context * (2 * 32 * 4096 * 2)
    assert floor.decode_ms == pytest.approx(1e3 * expected / 2e12)
    assert floor.decode_ms_per_token == pytest.approx(floor.decode_ms / 127)
    assert floor.total_ms == floor.prefill_ms + floor.decode_ms


def test_prefill_of_llama2_7b_is_bound_by_its_operations():
    floor = floor_of(SEVEN, FORMATS["w4a8"], CEILINGS, batch_size=4, input_len=1024, output_len=2)
    qkv, o, gate_up, down = 12288 * 4096, 4096 * 4096, 22016 * 4096, 4096 * 11008
    products = 2 * 4096 * (31 * (qkv + o + gate_up + down) + qkv) + 2 * 4 * (o + gate_up + down)
    attention = 4 * 4 * 4096 * (31 * 1024 * 1025 / 2 + 1024)
    head = 2 * 4 * 32000 * 4096
    assert floor.prefill_ms == pytest.approx(1e3 * (products / 1e15 + (attention + head) / 5e14))


@pytest.mark.parametrize(("name", "peak"), [("w4a8", 1e15), ("fp16", 5e14)])
def test_decoding_of_many_sequences_of_grouped_heads_may_be_bound_by_operations(name, peak):
    shapes = DecoderShapes.from_config(known_config("llama3-8b"))
    ceilings = Ceilings(read_bytes_per_s=1e18, int8_ops_per_s=1e15, int8_by="x", float_ops_per_s=5e14)
    floor = floor_of(shapes, FORMATS[name], ceilings, batch_size=16, input_len=100, output_len=3)
    products = 32 * 2 * 16 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    # The steps' own tokens are the 101st and the 102nd position.
    attention = sum(32 * 4 * 16 * 4096 * context for context in (101, 102))
    head = 2 * 16 * 128256 * 4096
    assert floor.decode_ms == pytest.approx(1e3 * (2 * products / peak + (attention + 2 * head) / 5e14))


def test_a_cache_of_grouped_heads_is_read_for_every_sequence():
    shapes = DecoderShapes.from_config(known_config("llama3-8b"))
    one, four = (
        floor_of(shapes, FORMATS["w4a8"], CEILINGS, batch_size=batch, input_len=1000, output_len=2).decode_ms
        for batch in (1, 4)
    )
    # Keys and values of 8 heads of 128 in 32 layers, two bytes each.
    assert four - one == pytest.approx(1e3 * 3 * 1001 * 2 * 32 * 8 * 128 * 2 / 2e12)


def test_formats_rank_as_their_bytes_do():
    floors = {
        name: floor_of(SEVEN, form, CEILINGS, batch_size=1, input_len=1024, output_len=128).decode_ms
        for name, form in FORMATS.items()
    }
    assert floors["w4a8"] < floors["w4a16-g128"] < floors["w4a8-g128"] < floors["w8a8"] < floors["fp16"]
    assert floors["fp16"] == pytest.approx(1e3 * (127 * 2 * 6.607e9 + 127 * 1088 * 524288) / 2e12, rel=1e-3)


def test_a_short_prompt_is_bound_by_reading_the_weights():
    floor = floor_of(SEVEN, FORMATS["fp16"], CEILINGS, batch_size=1, input_len=1, output_len=2)
    assert floor.prefill_ms == pytest.approx(floor.decode_ms, rel=1e-3)


@pytest.mark.parametrize("name", ["fp16", "w8a8", "w4a8", "w4a8-g128"])
def test_predicted_weight_bytes_are_those_allocated(name):
    config = known_config("llama2-7b")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size = 2, 256, 384, 512
    config.num_attention_heads = config.num_key_value_heads = 2
    weights = random_weights(config, FORMATS[name], dtype=torch.float16)
    norms = 2 * 256 * (2 * 2 + 1)
    assert weight_bytes(weights.shapes, FORMATS[name]) == weights.nbytes + norms


def test_memory_of_a_large_batch_is_mostly_cache():
    need = predict(SEVEN, FORMATS["w4a8"], batch_size=64, max_len=1152)
    assert need.kv_cache == 64 * 1152 * 2 * 32 * 4096 * 2
    assert need.weights == pytest.approx(3.77e9, rel=0.01)
    assert 40e9 < need.total < 46e9
    assert need.to_dict()["total"] == need.total


def test_activations_are_those_of_the_widest_point_of_the_largest_chunk():
    # Gate and up, their product and its int8 form, beside two hidden states; logits also in float32.
    gated = int(8192 * (2 * 4096 + 3.5 * 11008) * 2) + 16 * 32000 * 6
    assert predict(SEVEN, FORMATS["fp16"], batch_size=16, max_len=1152).activations == gated
    few = predict(SEVEN, FORMATS["fp16"], batch_size=16, max_len=1152, prefill_tokens=100).activations
    assert few == int(100 * (2 * 4096 + 3.5 * 11008) * 2) + 16 * 32000 * 6
    config = known_config("llama2-7b")
    config.intermediate_size = 512
    attended = predict(DecoderShapes.from_config(config), FORMATS["fp16"], batch_size=1, max_len=10).activations
    assert attended == 10 * (3 * 4096 + 2 * 3 * 4096) * 2 + 32000 * 6


def test_a_tied_head_is_in_memory_once():
    config = known_config("llama2-7b")
    untied = weight_bytes(DecoderShapes.from_config(config), FORMATS["w4a8"])
    config.tie_word_embeddings = True
    assert untied - weight_bytes(DecoderShapes.from_config(config), FORMATS["w4a8"]) == 32000 * 4096 * 2


def test_too_large_is_refused_with_both_figures(monkeypatch):
    monkeypatch.setattr("odyssey.engine.memory.available_bytes", lambda device: 80 * 2**30)
    need = MemoryNeed(weights=130 * 2**30, kv_cache=0, activations=0, fixed=0)
    with pytest.raises(UnsupportedError, match=r"fp16: predicted 130\.0 GiB .* there are 80\.0 GiB"):
        require(need, torch.device("cuda"), "fp16")


def test_names_for_the_config_are_those_of_the_engine():
    from odyssey.latency import peers

    assert tuple(FORMATS) == METHODS
    assert (peers.EAGER, peers.COMPILED) == PEERS


def test_ceilings_of_this_cpu_are_measured():
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert found.read_bytes_per_s > 1e8
    assert found.float_ops_per_s > 1e8
    assert found.int8_ops_per_s > 1e7
    assert found.int8_by in ("fastgemm w8a8", "fastgemm w4a8")


@pytest.mark.parametrize("count", [1, 2, 9, 100, 127])
def test_percentiles_are_nearest_ranks(count):
    samples = list(np.random.default_rng(count).permutation(count).astype(float))
    found = percentiles(samples)
    for key, q in (("p90", 90), ("p99", 99)):
        assert found[key] == np.percentile(samples, q, method="inverted_cdf")
    assert found["p50"] == np.median(samples)
    assert (found["count"], found["max"]) == (count, count - 1)
