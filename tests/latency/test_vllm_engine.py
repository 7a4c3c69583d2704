"""vLLM as it is called: a stand-in with the names of vLLM's own arguments, for machines without it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from odyssey.config import LatencyConfig
from odyssey.errors import UnsupportedError
from odyssey.latency import vllm_engine

CLOCK = SimpleNamespace(now=0.0, calls=[], tokens=None)
PREFILL, STEP = 0.100, 0.010


@dataclass(kw_only=True)
class SamplingParams:
    """Those arguments of vLLM's that a run may need."""

    temperature: float = 1.0
    max_tokens: int = 16
    ignore_eos: bool = False
    detokenize: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        seed: int = 0,
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_prefix_caching: bool | None = None,
    ):
        assert skip_tokenizer_init
        # A prefix that is found again would be no prefill.
        assert enable_prefix_caching is False
        CLOCK.calls.append(("LLM", model, load_format, max_model_len, max_num_seqs))
        config = SimpleNamespace(quantization=None, dtype=torch.float16)
        self.llm_engine = SimpleNamespace(model_config=config)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert sampling_params == SamplingParams(
            temperature=0.0, max_tokens=sampling_params.max_tokens, ignore_eos=True, detokenize=False
        )
        assert not use_tqdm
        assert [set(prompt) for prompt in prompts] == [{"prompt_token_ids"}] * len(prompts)
        count = sampling_params.max_tokens
        CLOCK.calls.append(("generate", len(prompts), len(prompts[0]["prompt_token_ids"]), count))
        CLOCK.now += PREFILL + STEP * (count - 1)
        tokens = [0] * (count if CLOCK.tokens is None else CLOCK.tokens)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for _ in prompts]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module)
    monkeypatch.setattr(vllm_engine, "time", SimpleNamespace(perf_counter=lambda: CLOCK.now))
    CLOCK.calls, CLOCK.tokens = [], None

    def measure(device="cuda", **changes):
        settings = {"engine": "vllm", "batch_size": 3, "input_len": 20, "output_len": 5, "warmup": 1, "repeats": 2}
        group = LatencyConfig(**{**settings, **changes})
        return vllm_engine.measure_vllm(
            group, model="m", directory=tmp_path, vocab_size=100, device=torch.device(device), seed=1
        )

    return measure


def test_a_run_is_a_request_of_one_token_and_one_of_all(measured, tmp_path):
    result = measured(dummy_weights=True)
    assert CLOCK.calls[0] == ("LLM", str(tmp_path), "dummy", 25, 3)
    assert CLOCK.calls[1:] == [("generate", 3, 20, 1), ("generate", 3, 20, 5)] * 3
    (row,) = result["rows"]
    assert (row["method"], row["format"], row["dtype"], row["weights"]) == ("vllm-fp16", "fp16", "float16", "random")
    assert row["prefill_ms"] == pytest.approx(100)
    assert row["total_ms"] == pytest.approx(140)
    assert row["decode_ms_per_token"] == pytest.approx(10)
    assert result["total_tokens_per_s"] == row["tokens_per_s"] == pytest.approx(3 * 5 / 0.140)
    assert len(result["total_ms"]["samples"]) == 2
    assert row["interleaved_with"] == ["vllm-fp16"]


def test_what_covers_more_than_the_run_is_not_reported(measured, monkeypatch):
    energy = iter(range(0, 1000, 50))
    monkeypatch.setattr("odyssey.latency.monitor.GpuMonitor.energy_j", lambda monitor: float(next(energy)))
    (row,) = measured()["rows"]
    assert row["weights"] == "checkpoint"
    assert row["energy_j_per_token"] is None
    assert row["peak_memory_bytes"] is None
    assert row["weight_bytes"] is None
    assert row["gpu"]["samples"] == 0


def test_a_text_that_ends_early_is_no_time(measured):
    CLOCK.tokens = 1
    with pytest.raises(UnsupportedError, match=r"vLLM returned \[1\] tokens where 5 were asked for"):
        measured()


def test_without_a_gpu_it_is_refused(measured):
    with pytest.raises(UnsupportedError, match="needs a GPU"):
        measured(device="cpu")
