"""A candidate's row from runs, energies and bytes that are known; and which candidates share a device's memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from odyssey.engine.formats import FORMATS
from odyssey.engine.memory import MemoryNeed
from odyssey.latency import ceilings
from odyssey.latency.candidates import Run
from odyssey.latency.end_to_end import Timing, row_of
from odyssey.latency.floor import Floor
from odyssey.latency.statistics import summarize
from odyssey.latency.sweep import Bench, Case, Entry

BATCH, INPUT, OUTPUT = 4, 100, 11
FACTS = {"engine": "odyssey", "format": "w4a8", "weight_bytes": 1000, "kv_bytes": 200, "graph_bytes": 30}


def _timing(runs, energies, peak=7, **facts) -> Timing:
    timing = Timing(SimpleNamespace(name="w4a8", facts={**FACTS, **facts}, problem=None))
    timing.runs, timing.energy_j, timing.peak_bytes, timing.gpu = runs, energies, peak, {"samples": 1}
    return timing


def _row(timing, output_len=OUTPUT, floor=None) -> dict:
    return row_of(timing, model="m", batch_size=BATCH, input_len=INPUT, output_len=output_len, floor=floor)


def test_a_row_has_the_medians_of_its_runs():
    # Of each phase another run is the median.
    runs = [
        Run(20.0, 130.0, [10.0, 12.0] * 5), Run(30.0, 120.0, [9.0] * 10), Run(10.0, 160.0, [15.0] * 10),
    ]  # fmt: skip
    floor = Floor(prefill_ms=5.0, decode_ms=60.0, decode_ms_per_token=6.0, total_ms=65.0)
    row = _row(_timing(runs, [None, 2.0, 4.0]), floor=floor)
    assert (row["prefill_ms"], row["decode_ms_per_token"], row["total_ms"]) == (20.0, 11.0, 130.0)
    assert (row["model"], row["method"], row["outcome"], row["format"]) == ("m", "w4a8", "ok", "w4a8")
    assert row["tokens_per_s"] == pytest.approx(BATCH * OUTPUT / 0.130)
    assert row["decode_tokens_per_s"] == pytest.approx(BATCH / 0.011)
    assert (row["floor_ms"], row["share_of_floor"]) == (65.0, 0.5)
    assert row["floor"]["prefill_ms"] == 5.0
    # Joules of the two runs whose energy is known, over the tokens of a run.
    assert row["energy_j_per_token"] == pytest.approx(3.0 / (BATCH * OUTPUT))
    assert row["peak_memory_bytes"] == 1237
    assert "graph_bytes" not in row
    assert row["step_ms"]["count"] == 30
    assert (row["step_ms"]["p50"], row["step_ms"]["max"]) == (11.0, 15.0)
    assert row["samples"]["prefill_ms"] == [20.0, 30.0, 10.0]
    assert row["samples"]["total_ms"] == [130.0, 120.0, 160.0]
    assert row["samples"]["step_ms"][1] == [9.0] * 10
    assert row["samples"]["energy_j"] == [None, 2.0, 4.0]


def test_a_row_of_one_token_without_a_gpu_says_only_what_is_known():
    row = _row(_timing([Run(20.0, 20.0)], [None], peak=None), output_len=1)
    for key in (
        "decode_ms_per_token", "decode_tokens_per_s", "step_ms", "floor_ms", "floor", "share_of_floor",
        "peak_memory_bytes", "energy_j_per_token",
    ):  # fmt: skip
        assert row[key] is None
    assert row["tokens_per_s"] == pytest.approx(1e3 * BATCH / 20.0)


def test_quartiles():
    found = summarize([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found["min"], found["p25"], found["median"], found["p75"], found["max"]) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert found["samples"] == [5.0, 1.0, 2.0, 4.0, 3.0]
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_candidates_that_take_turns_share_a_cache_and_the_room_for_activations():
    needs = {"a": MemoryNeed(100, 10, 3, 1), "b": MemoryNeed(50, 10, 5, 1), "peer": MemoryNeed(100, 10, 4, 1)}
    bench = object.__new__(Bench)
    bench._need = lambda entry, case: needs[entry.name]
    entries = [Entry(name, FORMATS["fp16"], None if name == "peer" else object) for name in needs]
    assert bench._together(entries[:2], Case(1)) == 150 + 10 + 5 + 1
    # A peer's modules have a cache of their own beside the engine's.
    assert bench._together(entries, Case(1)) == 250 + 20 + 5 + 1


def test_memory_that_holds_our_weights_is_available(monkeypatch):
    monkeypatch.setattr("odyssey.latency.sweep.available_bytes", lambda device: 1000)
    bench = object.__new__(Bench)
    bench._device, bench._weights = torch.device("cpu"), {"a": SimpleNamespace(nbytes=30)}
    assert bench._available() == 1030


def test_ceilings_are_bytes_and_operations_over_the_best_time(monkeypatch):
    # Seconds of the sum, of the float product, and of the two int8 products.
    seconds = iter([0.5, 0.25, 0.2, 0.1])
    monkeypatch.setattr(ceilings, "_best", lambda work, device, repeats: next(seconds))
    found = ceilings.measure_ceilings(torch.device("cpu"), torch.float32)
    assert found.read_bytes_per_s == 2**28 / 0.5
    assert found.float_ops_per_s == 2 * 768**3 / 0.25
    assert found.int8_ops_per_s == 2 * 768**3 / 0.1
    assert found.int8_by == "fastgemm w4a8"


def test_the_fastest_run_counts_after_two_that_do_not(monkeypatch):
    calls, seconds = [], iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(ceilings, "_seconds", lambda work: next(seconds))
    assert ceilings._best(lambda: calls.append(1), torch.device("cpu"), 3) == 1.0
    assert len(calls) == 2
