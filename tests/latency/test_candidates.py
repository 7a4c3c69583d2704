"""What is inside the times of a candidate, and what is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from odyssey.engine import FORMATS, Engine, random_weights
from odyssey.latency import candidates, peers, transformers_engine
from odyssey.latency.candidates import EngineCandidate, Run
from odyssey.latency.cells import dummy_config
from odyssey.latency.peers import TransformersCandidate, random_transformers_model

CPU = torch.device("cpu")
PROMPT, NEW = 8, 6


class SlowMonitor:
    """Takes a sample in a second of the clock that a test looks at."""

    def __init__(self, clock=None):
        self.clock, self.samples = clock, 0

    def sample(self):
        self.samples += 1
        if self.clock is not None:
            self.clock.now += 1.0


def _prompt(config):
    return torch.randint(config.vocab_size, (2, PROMPT), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return random_transformers_model(dummy_config("tiny", None), CPU, torch.float32)


def test_phases_of_a_run():
    assert Run(10.0, 40.0).decode_ms_per_token(4) == 10.0
    assert Run(10.0, 10.0).decode_ms_per_token(1) is None


def test_transformers_greedy_text_has_its_length_and_nothing_else_in_its_steps(model, monkeypatch):
    """An end token would need logits processors that forbid it: launches that no other candidate has."""
    candidate, seen = TransformersCandidate(model, "eager", compiled=False, weights="random"), {}
    for kind in ("_get_logits_processor", "_get_stopping_criteria"):
        inner = getattr(model, kind)

        def watched(*arguments, inner=inner, kind=kind, **options):
            found = inner(*arguments, **options)
            seen[kind] = [type(each).__name__ for each in found]
            return found

        monkeypatch.setattr(model, kind, watched)
    run = candidate.run(_prompt(model.config), NEW, SlowMonitor())
    assert len(run.step_ms) == NEW - 1
    assert run.total_ms == pytest.approx(run.prefill_ms + sum(run.step_ms))
    assert seen == {
        "_get_logits_processor": [], "_get_stopping_criteria": ["MaxLengthCriteria", "_TokenClock"],
    }  # fmt: skip


def test_a_sample_of_the_gpu_is_in_no_step(model, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def perf_counter():
        clock.now += 1e-3
        return clock.now

    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=perf_counter))
    monitor = SlowMonitor(clock)
    candidate = TransformersCandidate(model, "eager", compiled=False, weights="random")
    run = candidate.run(_prompt(model.config), NEW, monitor)
    assert monitor.samples == 1
    assert run.total_ms == pytest.approx(NEW, abs=1e-6)
    assert run.step_ms == pytest.approx([1.0] * (NEW - 1), abs=1e-6)


@pytest.mark.parametrize(("output_len", "samples"), [(1, 0), (2, 1), (NEW, 1)])
def test_the_gpu_is_sampled_while_it_decodes(output_len, samples):
    config = dummy_config("tiny", None)
    engine = Engine(random_weights(config, FORMATS["w4a8"], CPU, torch.float32), batch_size=2, max_len=PROMPT + NEW)
    monitor = SlowMonitor()
    run = EngineCandidate("w4a8", engine, 2, PROMPT).run(_prompt(config), output_len, monitor)
    assert monitor.samples == samples
    assert len(run.step_ms) == output_len - 1


def test_an_engines_run_is_one_prefill_and_one_step_for_each_later_token(monkeypatch):
    config, clock = dummy_config("tiny", None), SimpleNamespace(now=0.0)
    engine = Engine(random_weights(config, FORMATS["w4a8"], CPU, torch.float32), batch_size=2, max_len=PROMPT + NEW)
    monkeypatch.setattr(candidates, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    prefill, step = engine.prefill, engine.step

    def timed(work, seconds):
        def call(*arguments):
            clock.now += seconds
            return work(*arguments)

        return call

    engine.prefill, engine.step = timed(prefill, 2.0), timed(step, 0.5)
    run = EngineCandidate("w4a8", engine, 2, PROMPT).run(_prompt(config), NEW, SlowMonitor())
    assert (run.prefill_ms, run.total_ms) == (2000.0, 2000.0 + 500.0 * (NEW - 1))
    assert run.step_ms == [500.0] * (NEW - 1)
    assert engine.cache.lengths.tolist() == [PROMPT + NEW - 1] * 2


def _measure(model, reference, output_len):
    return transformers_engine.measure(
        model, reference, batch_size=2, input_len=PROMPT, output_len=output_len, warmup=1, repeats=2, seed=0
    )


def test_transformers_beside_the_unquantized_model(model):
    found = _measure(model, model, NEW)
    for each in (found, found["reference"]):
        decode, total = each["decode_ms_per_token"], each["total_ms"]
        assert len(total["samples"]) == 2
        whole = [p + (NEW - 1) * d for p, d in zip(each["prefill_ms"]["samples"], decode["samples"], strict=True)]
        assert whole == pytest.approx(total["samples"])
        assert each["decode_tokens_per_s"] == pytest.approx(1e3 * 2 / decode["median"])
        assert each["total_tokens_per_s"] == pytest.approx(1e3 * 2 * NEW / total["median"])
    ratio = found["reference"]["total_ms"]["median"] / found["total_ms"]["median"]
    assert found["speedup_over_reference"] == pytest.approx(ratio)


def test_one_token_has_no_time_of_later_tokens(model):
    found = _measure(model, None, 1)
    assert found["decode_ms_per_token"] is None
    assert found["decode_tokens_per_s"] is None
    assert found["total_ms"]["median"] > 0
