"""Tables and figures of end-to-end latency against hand-written results."""

from __future__ import annotations

import json

import pytest

from experiments.__main__ import main
from experiments.bitwidths import figure1_table
from experiments.end_to_end import end_to_end_table, latencies, speedup, speedups, timed_rows, weights_note
from experiments.figures import draw_end_to_end, draw_figure6
from experiments.latency_tables import figure6_table, table4_latency
from experiments.sources import END_TO_END_FORMAT, load_sources
from experiments.style import model_name
from odyssey.latency.__main__ import DOCUMENT_FORMAT


def row(method, total, prefill=20.0, *, batch=1, model="llama2-7b", input_len=1024, output_len=128, **changes):
    return {
        "model": model, "method": method, "batch_size": batch, "input_len": input_len, "output_len": output_len,
        "outcome": "ok", "engine": "transformers" if method.startswith("transformers") else "odyssey",
        "weights": "random", "prefill_ms": prefill, "decode_ms_per_token": (total - prefill) / (output_len - 1),
        "total_ms": total, "tokens_per_s": 1e3 * batch * output_len / total, "floor_ms": total / 2,
        "share_of_floor": 0.5, "step_ms": {"p99": 3.0}, "gpu": {}, "peak_memory_bytes": 2**30,
        "energy_j_per_token": 0.5, **changes,
    }  # fmt: skip


def failed(method, **changes):
    reason = {"outcome": "unsupported", "reason": "predicted 130.0 GiB, this GPU has 79.0 GiB"}
    return {**row(method, 1.0, 0.5), **dict.fromkeys(("prefill_ms", "decode_ms_per_token", "total_ms", "floor_ms")),
            **reason, **changes}  # fmt: skip


def document(rows, path="h100/a.json", started="2026-01-01T00:00:00", gpu="GPU 1", commit="fedcba9876"):
    return {
        "format": END_TO_END_FORMAT, "started": started, "path": path, "rows": rows,
        "environment": {"gpu": {"name": gpu}, "git_commit": commit},
    }  # fmt: skip


RUN = document(
    [
        row("fp16", 800.0),
        row("w8a8", 500.0),
        row("w4a8", 250.0, 15.0),
        row("transformers-fp16", 4000.0),
        row("fp16", 1600.0, batch=16),
        row("w4a8", 1000.0, batch=16),
    ]
)


def texts(table):
    return [dict(zip((column.key for column in table.columns), each, strict=True)) for each in table.rows]


def test_table4_has_our_ratios_beside_the_papers():
    found = texts(table4_latency(latencies(timed_rows([RUN]))))
    seven = {each["engine"]: each for each in found if each["model"] == "LLaMA-2-7B"}
    assert seven["OdysseyLLM"]["measured"] == 250.0
    ratio = seven["OdysseyLLM over TensorRT-LLM FP16"]
    assert (ratio["measured"], ratio["paper"]) == (pytest.approx(3.2), 1.87)
    assert "over FP16 in the same engine" in ratio["note"]
    # Ratios can be compared, milliseconds of different GPUs cannot.
    assert ratio["difference"] == pytest.approx(3.2 - 1.87)
    assert (seven["OdysseyLLM"]["paper"], seven["OdysseyLLM"]["difference"]) == (751, None)
    assert seven["OdysseyLLM over TensorRT-LLM W8A8"]["measured"] == pytest.approx(2.0)
    assert (seven["FP16"]["measured"], seven["FP16"]["paper"]) == (800.0, None)
    assert seven["TensorRT-LLM FP16"]["measured"] is None
    assert all(each["measured"] is None for each in found if each["model"] == "LLaMA-2-70B")


def test_figure6_is_of_one_run_at_batch_1(tmp_path):
    assert [each.value for each in speedups(timed_rows([RUN]))] == [pytest.approx(3.2)]
    assert texts(figure6_table(speedups(timed_rows([RUN]))))[0]["measured"] == pytest.approx(3.2)
    _, svg = draw_figure6(tmp_path / "six", speedups(timed_rows([RUN])))
    assert "3.2x" in svg.read_text()
    assert "measured, GPU 1" in svg.read_text()


def test_ratios_never_mix_runs_or_gpus():
    other = document([row("fp16", 900.0)], path="h100/b.json", started="2026-01-02T00:00:00")
    rows = timed_rows([document([row("w4a8", 250.0)]), other])
    (ours,) = [each for each in rows if each.row["method"] == "w4a8"]
    assert speedup(ours, rows, "fp16") is None
    both = timed_rows([RUN, document(RUN["rows"], path="h200/a.json", gpu="GPU 2")])
    assert len(both) == 2 * len(RUN["rows"])


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_is_the_cpus():
    environment = {"gpu": {"name": "GPU 1"}, "cpu": "CPU 1"}
    slow = [row("w4a8", 25000.0, dtype="float32"), row("fp16", 80000.0, dtype="float32")]
    on_cpu = {**document(slow, path="h100/b.json"), "environment": environment, "device": "cpu"}
    assert {timed.device for timed in timed_rows([on_cpu])} == {"CPU 1, float32"}
    record = {"environment": environment, "device": "cpu", "path": "x/record.json", "latency": {"rows": slow}}
    both = timed_rows([RUN], [record])
    assert {timed.device for timed in both} == {"GPU 1", "CPU 1, float32"}
    (ours,) = [timed for timed in both if timed.device == "GPU 1" and timed.key == ("llama2-7b", 1, "w4a8")]
    assert ours.row["total_ms"] == 250.0


def test_a_run_in_another_dtype_is_of_another_device(tmp_path):
    other = document([row("w4a8", 250.0, dtype="float32"), row("fp16", 1500.0, dtype="float32")], path="h100/b.json")
    usual = document([row("w4a8", 250.0, dtype="float16"), row("fp16", 800.0, dtype="float16")])
    rows = timed_rows([usual, other])
    assert {timed.device: speedup(timed, rows, "fp16") for timed in rows if timed.key[2] == "w4a8"} == {
        "GPU 1": pytest.approx(3.2), "GPU 1, float32": 6.0,
    }  # fmt: skip
    _, svg = draw_figure6(tmp_path / "six", speedups(timed_rows([other])))
    assert "measured, GPU 1, float32" in svg.read_text()
    _, svg = draw_end_to_end(tmp_path / "bars", rows)
    assert svg.read_text().count("GPU 1, float32") == 1


def test_rows_that_took_no_turns_with_fp16_say_so():
    turns = [
        row("fp16", 800.0, interleaved_with=["fp16"]),
        row("w8a8", 500.0, interleaved_with=["w8a8", "w4a8"]),
        row("w4a8", 250.0, interleaved_with=["w8a8", "w4a8"]),
    ]
    rows = timed_rows([document(turns)])
    notes = {each["method"]: each["note"] for each in texts(end_to_end_table(rows))}
    assert notes == {
        "FP16": "random weights, in turns with no other",
        "W8A8": "random weights, not in turns with FP16",
        "OdysseyLLM W4A8": "random weights, int4 of mean -0.5, not in turns with FP16",
    }
    ratios = {each["engine"]: each["note"] for each in texts(table4_latency(latencies(rows))) if each["note"]}
    assert ratios == {
        "OdysseyLLM over TensorRT-LLM FP16": "measured: over FP16 in the same engine and run, not in turns with FP16",
        "OdysseyLLM over TensorRT-LLM W8A8": "measured: over W8A8 in the same engine and run",
    }
    assert texts(figure6_table(speedups(rows)))[0]["note"] == "not in turns with FP16"
    notes = {each["format"]: each["note"] for each in texts(figure1_table(rows))}
    assert notes["W8A8"] == "random weights, not in turns with FP16"
    assert "turns" not in str([each["note"] for each in texts(end_to_end_table(timed_rows([RUN])))])


def test_a_row_that_is_there_twice_counts_once():
    twice = document([row("w4a8", 250.0)] * 3, path="h100/b.json", started="2026-02-01T00:00:00", commit="0123456789")
    rows = {timed.key[2]: timed.run for timed in timed_rows([twice, document(RUN["rows"][:3])])}
    assert set(rows.values()) == {"h100/a.json"}


def test_of_equal_runs_the_last_commits_counts_but_not_its_failures():
    new = [row("w4a8", 240.0), row("w8a8", 480.0), row("fp16", 790.0), failed("transformers-fp16")]
    later = document(new, path="h100/b.json", started="2026-02-01T00:00:00", commit="0123456789")
    rows = {timed.key[2]: timed for timed in timed_rows([later, RUN]) if timed.key[1] == 1}
    assert rows["w4a8"].row["total_ms"] == 240.0
    transformers = rows["transformers-fp16"]
    assert (transformers.row["total_ms"], transformers.run) == (4000.0, "h100/a.json")


def test_a_later_run_of_fewer_methods_does_not_count():
    later = document([row("w4a8", 240.0)], path="h100/b.json", started="2026-02-01T00:00:00", commit="0123456789")
    rows = {timed.key[2]: timed.run for timed in timed_rows([later, RUN]) if timed.key[1] == 1}
    assert set(rows.values()) == {"h100/a.json"}


def test_a_later_run_without_other_formats_counts_for_what_it_has():
    first = document([row(method, 800.0) for method in ("fp16", "w8a8", "w4a16-g128", "w4a8")], path="h100/a.json")
    later = document(
        [row("fp16", 790.0), row("w8a8", 390.0), row("w4a8", 240.0)],
        path="h100/b.json", started="2026-02-01T00:00:00", commit="0123456789",
    )  # fmt: skip
    runs = {timed.key[2]: timed.run for timed in timed_rows([later, first])}
    assert runs == dict.fromkeys(("fp16", "w8a8", "w4a8"), "h100/b.json") | {"w4a16-g128": "h100/a.json"}


def test_of_one_commits_runs_the_one_with_most_methods_counts():
    peers = document([row("w4a8", 251.0), row("transformers-fp16", 3900.0)], path="h100/b.json", started="2026-02-01")
    rows = {timed.key[2]: timed for timed in timed_rows([peers, RUN]) if timed.key[1] == 1}
    assert {method: timed.run for method, timed in rows.items()} == dict.fromkeys(rows, "h100/a.json")
    only = document([row("w4a8", 251.0), row("vllm-fp16", 700.0)], path="h100/c.json", started="2026-02-01")
    rows = {timed.key[2]: timed.run for timed in timed_rows([only, RUN]) if timed.key[1] == 1}
    assert (rows["w4a8"], rows["vllm-fp16"]) == ("h100/a.json", "h100/c.json")


def test_other_lengths_are_left_out_and_cells_are_taken():
    record = {
        "environment": {"gpu": {"name": "GPU 1"}}, "path": "x/record.json", "started": "2026-01-01",
        "latency": {"rows": [row("w4a8", 3.0, 1.0), row("fp16", 3.0, 1.0, input_len=32)]},
    }  # fmt: skip
    assert [each.row["method"] for each in timed_rows([], [record])] == ["w4a8"]


def test_a_row_that_failed_gives_way_to_one_of_a_run_of_fewer_methods():
    most = document([row("fp16", 800.0), row("w8a8", 500.0), failed("w4a8")], path="h100/a.json")
    one = document([row("w4a8", 250.0)], path="h100/b.json")
    assert {timed.key[2]: timed.run for timed in timed_rows([one, most])} == {
        "fp16": "h100/a.json", "w8a8": "h100/a.json", "w4a8": "h100/b.json",
    }  # fmt: skip


def test_ratios_are_of_one_batch_size():
    found = texts(end_to_end_table(timed_rows([RUN])))
    ratios = {(each["method"], each["batch_size"]): each["speedup_over_fp16"] for each in found}
    assert ratios["OdysseyLLM W4A8", 1] == pytest.approx(3.2)
    assert ratios["OdysseyLLM W4A8", 16] == pytest.approx(1.6)


def test_a_ratio_to_what_failed_says_how_that_failed():
    rows = timed_rows([document([failed("fp16"), row("w8a8", 500.0), row("w4a8", 250.0)])])
    found = {each.method: each for each in latencies(rows)}
    ratio = found["odyssey over trtllm-fp16"]
    assert (ratio.value, ratio.outcome) == (None, "unsupported")
    assert found["odyssey over trtllm-w8a8"].value == 2.0
    assert [each.value for each in speedups(rows)] == [None]


def test_stages_of_the_bit_widths_are_prefill_and_what_is_left():
    rows = timed_rows([document([row("fp16", 800.0, 20.0), row("w4a8", 250.0, 16.0)])])
    found = {(each["format"], each["stage"]): each for each in texts(figure1_table(rows))}
    context, decoding = (found["OdysseyLLM W4A8", stage] for stage in ("context decoding", "self-decoding"))
    assert (context["measured"], context["ratio"]) == (16.0, 1.25)
    assert (decoding["measured"], decoding["ratio"]) == (234.0, pytest.approx(780 / 234))
    assert found["FP16", "self-decoding"]["measured"] == 780.0


def test_stages_are_compared_within_one_run_alone():
    other = document([row("fp16", 900.0)], path="h100/b.json", started="2026-01-02T00:00:00")
    rows = timed_rows([document([row("w4a8", 250.0)]), other])
    assert {each["format"]: each["ratio"] for each in texts(figure1_table(rows))} == {
        "FP16": 1.0, "OdysseyLLM W4A8": None,
    }  # fmt: skip


@pytest.mark.parametrize(("outcome", "methods"), [("failed", ["fp16", "w8a8"]), ("ok", []), (None, [])])
def test_a_cell_that_failed_before_it_timed_anything_has_its_rows(outcome, methods):
    lengths = {"batch_size": 1, "input_len": 1024, "output_len": 128}
    record = {
        "config": {"latency": {"engine": "odyssey", "against": ["w8a8"], **lengths}, "model": {"name": "llama2-7b"}},
        "method": {"label": "W16A16"}, "environment": {"gpu": {"name": "GPU 1"}}, "path": "x/record.json",
        "outcome": outcome, "reason": "why",
    }  # fmt: skip
    rows = timed_rows([], [record])
    assert [timed.key for timed in rows] == [("llama2-7b", 1, method) for method in methods]
    assert {timed.row["reason"] for timed in rows} <= {"why"}


def test_the_full_table_says_what_did_not_run():
    rows = timed_rows([document([row("w4a8", 250.0), failed("fp16", batch_size=64)])])
    found = texts(end_to_end_table(rows))
    assert [(each["batch_size"], each["measured_total_ms"]) for each in found] == [(1, 250.0), (64, None)]
    assert found[0]["over_floor"] == pytest.approx(2.0)
    assert "unsupported: predicted 130.0 GiB" in found[1]["note"]
    assert "random weights" in found[0]["note"]
    peer = texts(end_to_end_table(timed_rows([RUN])))
    (eager,) = [each for each in peer if each["method"] == "Transformers FP16, eager"]
    assert eager["floor_ms"] is None


def test_stacked_bars_name_what_did_not_run(tmp_path):
    rows = timed_rows([RUN, document([failed("fp16", model="llama2-70b")], path="h100/c.json")])
    _, svg = draw_end_to_end(tmp_path / "bars", rows)
    text = svg.read_text()
    assert "LLaMA-2-7B, batch 16" in text
    assert "250" in text
    assert "unsupported" in text
    assert "4000" not in text
    assert "not run" in draw_end_to_end(tmp_path / "none", [])[1].read_text()


def test_documents_are_found_in_result_directories(tmp_path, capsys):
    assert DOCUMENT_FORMAT == END_TO_END_FORMAT
    directory = tmp_path / "h100" / "end_to_end"
    directory.mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({**RUN, "path": None}))
    (directory / "other.json").write_text("{}")
    sources = load_sources([tmp_path])
    assert len(sources.end_to_end) == 1
    assert "other.json: not a result of odyssey.latency" in sources.skipped[0]
    assert main(["end_to_end", str(tmp_path), "--format", "md"]) == 0
    assert "| LLaMA-2-7B | 16 | OdysseyLLM W4A8 |" in capsys.readouterr().out


def test_a_model_that_the_paper_does_not_have_has_no_ratios_of_its_table():
    rows = timed_rows([document([row(method, 250.0, model="llama3-8b") for method in ("fp16", "w8a8", "w4a8")])])
    assert [found.method for found in latencies(rows)] == ["fp16", "w8a8", "odyssey"]


def test_every_model_of_the_config_group_has_a_name(project_root):
    for model in {path.stem for path in (project_root / "conf" / "model").glob("*.yaml")} - {"local", "tiny"}:
        assert model_name(model) != model


def test_rows_whose_random_int4_had_a_mean_say_so():
    assert weights_note(row("w4a8", 1.0)) == "random weights, int4 of mean -0.5"
    assert weights_note(row("w4a16-g128", 1.0)) == "random weights, int4 of mean -0.5"
    assert weights_note(row("w4a8", 1.0, random_mean=0.0)) == "random weights"
    assert weights_note(row("w8a8", 1.0)) == "random weights"
    assert weights_note(row("w4a8", 1.0, weights="checkpoint")) is None
