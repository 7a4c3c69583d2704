"""The command and its rows on the embedded model: every method, peers, limits; and what the monitor reports."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.checkpoints import write_checkpoint

from odyssey.engine import FORMATS, random_weights
from odyssey.errors import UnsupportedError
from odyssey.latency import sweep
from odyssey.latency.__main__ import main
from odyssey.latency.cells import dummy_config
from odyssey.latency.end_to_end import random_prompt
from odyssey.latency.monitor import GpuMonitor
from odyssey.latency.names import METHODS
from odyssey.latency.sweep import Bench, Case, Entry, random_entries

CPU = torch.device("cpu")
SMALL = ["--models", "tiny", "--device", "cpu", "--input-len", "12", "--output-len", "4", "--repeats", "2"]
ROW_KEYS = {
    "model", "method", "batch_size", "input_len", "output_len", "prefill_ms", "decode_ms_per_token", "total_ms",
    "floor_ms",
}  # fmt: skip


def _bench(entries, **changes):
    options = {"device": CPU, "dtype": torch.float32, "monitor": GpuMonitor(CPU), "ceilings": None, **changes}
    return Bench("tiny", dummy_config("tiny", None), entries, **options)


def _entries(methods, peers=()):
    return random_entries(dummy_config("tiny", None), methods, peers, CPU, torch.float32)


def test_the_command_times_every_method_and_peer(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = [*SMALL, "--batch-sizes", "1,2", "--peers", "transformers-fp16", "--json", str(path)]
    assert main(arguments) == 0
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert [row["method"] for row in rows] == [*METHODS, "transformers-fp16"] * 2
    for row in rows:
        assert set(row) >= ROW_KEYS
        assert row["outcome"] == "ok"
        assert row["weights"] == "random"
        assert row.get("random_mean") == (0.0 if row["engine"] == "odyssey" else None)
        assert 0 < row["prefill_ms"] < row["total_ms"]
        assert row["decode_ms_per_token"] == pytest.approx((row["total_ms"] - row["prefill_ms"]) / 3, rel=0.5)
        assert row["tokens_per_s"] == pytest.approx(1e3 * 4 * row["batch_size"] / row["total_ms"])
        assert len(row["samples"]["total_ms"]) == 2
        assert [len(steps) for steps in row["samples"]["step_ms"]] == [3, 3]
        assert row["step_ms"]["count"] == 6
        assert row["floor_ms"] > 0
        assert row["energy_j_per_token"] is None
        assert row["gpu"]["problem"] == "no GPU"
    assert document["ceilings"]["read_bytes_per_s"] > 0
    assert document["before"]["problem"] == "no GPU"
    assert document["environment"]["git_commit"]
    assert "transformers-fp16 batch 2" in capsys.readouterr().out


def test_two_models_of_one_name_are_refused(tmp_path, capsys):
    for parent in ("a", "b"):
        write_checkpoint(tmp_path / parent / "model")
    assert main([*SMALL, "--models", f"{tmp_path / 'a' / 'model'},{tmp_path / 'b' / 'model'}"]) == 1
    assert "rows of another model have the name model; rename one" in capsys.readouterr().err


def test_a_method_that_is_named_twice_is_timed_once(tmp_path):
    path = tmp_path / "result.json"
    arguments = [*SMALL, "--models", "tiny,tiny", "--methods", "w4a8,fp16,w4a8", "--warmup", "0", "--json", str(path)]
    assert main(arguments) == 0
    document = json.loads(path.read_text())
    assert [row["method"] for row in document["rows"]] == ["w4a8", "fp16"]
    assert document["rows"][0]["interleaved_with"] == ["w4a8", "fp16"]
    assert document["protocol"]["warmup"] == 0
    assert document["device"] == "cpu"


def test_methods_take_turns():
    order = []

    class Spy:
        def __init__(self, name):
            self.name, self.facts, self.problem = name, {}, None

        def run(self, prompt, output_len, monitor):
            from odyssey.latency.candidates import Run

            order.append(self.name)
            return Run(1.0, 2.0)

    from odyssey.latency.end_to_end import time_interleaved

    prompt = random_prompt(10, 1, 4, 0, CPU)
    timings = time_interleaved([Spy("a"), Spy("b")], prompt, output_len=2, warmup=1, repeats=2, monitor=GpuMonitor(CPU))
    assert order == ["a", "b"] * 3
    assert [len(timing.runs) for timing in timings] == [2, 2]


def test_times_of_values_that_are_not_finite_are_not_reported():
    def broken():
        weights = random_weights(dummy_config("tiny", None), FORMATS["w4a8"], CPU, torch.float32)
        weights.layers[0].input_norm[0] = float("nan")
        return weights

    entries = [Entry("broken", FORMATS["w4a8"], broken), *_entries(["w4a8"])]
    rows = _bench(entries).run(Case(1, 8, 2, 0, 1))
    assert [row["outcome"] for row in rows] == ["failed", "ok"]
    assert "not finite" in rows[0]["reason"]
    assert rows[0]["total_ms"] is None


def test_what_does_not_fit_is_a_row_with_both_figures(monkeypatch):
    weights = {"fp16": 4, "w4a8": 2}
    monkeypatch.setattr("odyssey.latency.sweep.available_bytes", lambda device: 3 * 2**30)

    def predict(shapes, form, **_):
        from odyssey.engine.memory import MemoryNeed

        return MemoryNeed(weights[form.name] * 2**30, 0, 0, 0)

    monkeypatch.setattr("odyssey.latency.sweep.predict", predict)
    rows = _bench(_entries(["fp16", "w4a8"])).run(Case(1, 8, 2, 0, 1))
    assert [row["outcome"] for row in rows] == ["unsupported", "ok"]
    assert "predicted 4.0 GiB" in rows[0]["reason"]
    assert "there are 3.0 GiB" in rows[0]["reason"]


def test_methods_that_do_not_fit_together_run_in_groups(monkeypatch):
    monkeypatch.setattr("odyssey.latency.sweep.available_bytes", lambda device: 5 * 2**30)

    def predict(shapes, form, **_):
        from odyssey.engine.memory import MemoryNeed

        return MemoryNeed(2 * 2**30, 0, 0, 0)

    monkeypatch.setattr("odyssey.latency.sweep.predict", predict)
    rows = _bench(_entries(["fp16", "w8a8", "w4a8"])).run(Case(1, 8, 2, 0, 1))
    assert [row["interleaved_with"] for row in rows] == [["fp16", "w8a8"]] * 2 + [["w4a8"]]


def test_an_out_of_memory_group_is_tried_one_by_one_with_the_memory_to_itself(monkeypatch):
    calls, timed = [], sweep.time_interleaved

    def time_interleaved(candidates, *arguments, **options):
        calls.append(([candidate.name for candidate in candidates], sorted(bench._weights)))
        if len(bench._weights) > 1 or calls[-1][0] == ["fp16"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return timed(candidates, *arguments, **options)

    monkeypatch.setattr(sweep, "time_interleaved", time_interleaved)
    bench = _bench(_entries(["fp16", "w8a8", "w4a8"]))
    rows = bench.run(Case(1, 8, 2, 0, 1))
    together = ["fp16", "w8a8", "w4a8"]
    assert calls == [(together, sorted(together)), *(([name], [name]) for name in together)]
    assert [row["outcome"] for row in rows] == ["oom", "ok", "ok"]


def test_too_long_a_sequence_is_a_row_with_a_reason():
    (row,) = _bench(_entries(["w4a8"])).run(Case(1, 500, 100))
    assert row["outcome"] == "unsupported"
    assert "tiny takes 512" in row["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "w5a8"], "w5a8: not known; allowed: fp16, w8a8"),
        (["--models", "llama9"], "its sizes are not built in"),
        (["--batch-sizes", "1,2", "--repeats", "1,2,3"], "3 numbers for 2 batch sizes"),
        (["--device", "cuda"], "no CUDA device is visible"),
        (["--batch-sizes", "1,4,1"], "--batch-sizes 1,4,1: give each once"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*SMALL, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_vllm_there_is_one_clear_line(monkeypatch):
    from odyssey.latency import vllm_engine

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="vLLM is not installed"):
        vllm_engine.require_vllm()


def test_random_prompts_are_the_same_everywhere():
    assert torch.equal(random_prompt(100, 2, 5, 3, CPU), random_prompt(100, 2, 5, 3, CPU))
    assert not torch.equal(random_prompt(100, 2, 5, 3, CPU), random_prompt(100, 2, 5, 4, CPU))


@pytest.mark.gpu
def test_rows_of_a_gpu_have_memory_energy_and_clocks():
    device = torch.device("cuda", 0)
    config = dummy_config("llama2-7b", None)
    config.num_hidden_layers = 4
    from odyssey.latency.ceilings import measure_ceilings

    entries = random_entries(config, list(METHODS), [], device, torch.float16)
    bench = Bench(
        "part", config, entries, device=device, dtype=torch.float16, monitor=GpuMonitor(device),
        ceilings=measure_ceilings(device),
    )  # fmt: skip
    rows = bench.run(Case(2, 256, 16, 1, 3))
    for row in rows:
        assert row["outcome"] == "ok"
        assert row["total_ms"] >= 0.9 * row["floor_ms"]
        assert row["weight_bytes"] == pytest.approx(
            sum(4 * FORMATS[row["method"]].weight_bytes(*size) for size in bench._shapes.linear_sizes().values())
            + 2 * 2 * 32000 * 4096,
            rel=0.02,
        )
        assert row["peak_memory_bytes"] >= row["weight_bytes"] + row["kv_bytes"]
        assert row["peak_memory_bytes"] <= row["predicted_memory_bytes"]
        assert row["gpu"]["sm_mhz"]["max"] > 0
        assert row["energy_j_per_token"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "x"], "--batch-sizes: 'x': must be a whole number, at least 1"),
        (["--batch-sizes", "1,,4"], "--batch-sizes: '': must be a whole number"),
        (["--models", ""], "--models: give at least one name"),
        (["--warmup", "-1"], "--warmup: '-1': must be a whole number, at least 0"),
    ],
)
def test_lists_are_refused_with_the_options_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
