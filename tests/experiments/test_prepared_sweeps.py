"""conf/experiment: a sweep for every table and figure, GEMM cells among them, and what is drawn of them."""

import functools
import json
import os
import socket

import pytest
from helpers.records import cell_record, gemm_result
from helpers.sweeps import ROOT

from experiments.__main__ import main
from experiments.bitwidths import figure1_table
from experiments.catalogue import CATALOGUE
from experiments.end_to_end import Timed
from experiments.mmlu import table_mmlu
from experiments.sources import load_sources
from odyssey.cell import Cell
from odyssey.config import register_schemas
from odyssey.overrides import check_command_line
from odyssey.record import write_json
from odyssey.runner import locate_cell

EXPERIMENTS = (
    "table2_perplexity", "table3_commonsense", "table_mmlu", "table4_latency", "table5_gemm", "table6_ablation",
    "table_seeds", "figure1_bitwidths", "figure6_speedup", "figure7_gemm_kinds", "quickstart", "testbed",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _schemas():
    register_schemas()


@functools.cache
def _cells(*arguments):
    """Read-only: every caller gets the same."""
    return check_command_line(["-m", *arguments], ROOT / "conf").cells


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_table_and_figure_has_its_sweep_and_its_drawing(name):
    cells = _cells(f"experiment={name}")
    assert cells
    if name not in ("quickstart", "testbed"):
        assert name in CATALOGUE
        digests = {locate_cell(cell)[0] for cell in cells}
        assert len(digests) == len(cells), "two cells of the sweep are the same"


def test_the_sweeps_ask_for_what_their_tables_show():
    assert {cell.model.name for cell in _cells("experiment=table_mmlu")} == {
        "llama-7b", "llama-13b", "llama-65b", "llama2-7b", "llama2-13b", "llama2-70b",
    }  # fmt: skip
    assert all(cell.accuracy.tasks == ["mmlu"] for cell in _cells("experiment=table_mmlu"))
    (cell,) = _cells("experiment=figure1_bitwidths", "model=llama2-7b", "latency.batch_size=1")
    assert set(cell.latency.against) >= {"fp16", "w8a8", "w4a16-g128"}
    assert (cell.latency.input_len, cell.latency.output_len) == (1024, 128)
    (gemm,) = _cells("experiment=figure7_gemm_kinds")
    assert (gemm.gemm.m, gemm.gemm.bench) == ([1, 1024], "fastgemm")


def test_a_gemm_cell_is_its_settings_and_no_model(tmp_path):
    def digest(*more):
        (cell,) = _cells("experiment=table5_gemm", f"output_dir={tmp_path}", *more)
        return locate_cell(cell)

    first, directory = digest()
    assert directory.parent == tmp_path / "gemm"
    assert directory.name == f"fastgemm-{first}"
    assert digest("model=llama-7b", "method=fp16")[0] == first
    assert digest("gemm.m=[2]")[0] != first


def _gemm_cell(monkeypatch, tmp_path, code):
    (config,) = _cells("experiment=figure7_gemm_kinds", f"output_dir={tmp_path}")
    asked = []

    def bench(arguments):
        asked.extend(arguments)
        path = next(each.partition("=")[2] for each in arguments if each.startswith("--json="))
        kinds = (("fastgemm-sm80", 2.0), ("grouped-sm80", 6.0))
        rows = [(64, 64, m, kernel, m * time, True) for m in (1, 1024) for kernel, time in kinds]
        if code == 0:
            write_json(tmp_path / path, gemm_result(rows))
        return code

    monkeypatch.setattr("fastgemm.bench.__main__.main", bench)
    digest, directory = locate_cell(config)
    directory.mkdir(parents=True, exist_ok=True)
    plain = {"method": {"name": "odyssey"}, "model": {"name": "tiny"}, "gemm": {"bench": "fastgemm"}}
    record = Cell(config, plain, digest).run()
    write_json(directory / "record.json", record)
    return record, asked


def test_a_gemm_cells_result_is_drawn(monkeypatch, tmp_path, capsys):
    record, asked = _gemm_cell(monkeypatch, tmp_path, 0)
    assert record["outcome"] == "ok", record["reason"]
    assert "--m=1,1024" in asked
    assert "--against=fastgemm-sm80,grouped,grouped-sm80,asymmetric,asymmetric-sm80,unfused,cublas-fp16" in asked
    assert len(load_sources([tmp_path]).gemm) == 1
    assert main(["figure7_gemm_kinds", str(tmp_path), "--format", "md"]) == 0
    printed = capsys.readouterr().out
    assert "| self-decoding (M = 1) | 64 x 64 | fine-grained g128 (mma.sync) | 6.00 | 3.00 |" in printed
    assert "| context decoding (M = 1024) | 64 x 64 | fine-grained g128 (mma.sync) | 6144.00 | 3.00 |" in printed
    assert main(["status", str(tmp_path), "--format", "csv"]) == 0
    assert "gemm,GEMM (fastgemm),ok" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "outcome", "words"), [(2, "unsupported", "GPU"), (3, "failed", "wrong")])
def test_a_gemm_cell_that_could_not(monkeypatch, tmp_path, code, outcome, words):
    record, _ = _gemm_cell(monkeypatch, tmp_path, code)
    assert record["outcome"] == outcome
    assert words in record["reason"]


def _timed(method, prefill, total, run="a", outcome="ok", batch=1):
    row = {
        "model": "llama2-7b", "batch_size": batch, "method": method, "outcome": outcome, "prefill_ms": prefill,
        "total_ms": total, "engine": "odyssey", "reason": "why" if outcome != "ok" else None,
    }  # fmt: skip
    return Timed(row, "GPU 1", "abc", run)


def test_bit_widths_by_stage():
    rows = [
        _timed("w4a8", 12.0, 274.0), _timed("fp16", 20.0, 690.0), _timed("w4a8-g128", 1.0, 2.0),
        _timed("w8a8", None, None, outcome="oom"), _timed("w4a16-g128", 24.0, 310.0, run="b"),
    ]  # fmt: skip
    table = figure1_table(rows)
    found = {(row[2], row[3]): (row[4], row[5]) for row in table.rows}
    assert found["context decoding", "FP16"] == (20.0, 1.0)
    measured, ratio = found["self-decoding", "OdysseyLLM W4A8"]
    assert measured == 262.0
    assert ratio == pytest.approx(670 / 262)
    # Ratios are within a run; a format that failed says how; groups are an ablation, not another width.
    assert all(ratio is None for (_, form), (_, ratio) in found.items() if "W4A16" in form)
    assert {value for (_, form), (value, _) in found.items() if form == "W8A8"} == {"oom"}
    assert len(table.rows) == 8
    assert [row[2] for row in table.rows] == ["context decoding"] * 4 + ["self-decoding"] * 4


def test_bit_widths_before_anything_is_measured():
    texts = figure1_table([]).texts()
    assert len(texts) == 8
    assert all("not run" in row for row in texts)


def test_mmlu_has_a_place_for_every_cell():
    table = table_mmlu([cell_record("odyssey", "llama2-7b", tasks={"mmlu": ("acc", 0.4512)})])
    shown = {(row[0], row[1]): row[3] for row in table.rows}
    assert len(table.rows) == 6 * 5
    assert shown["LLaMA-2-7B", "OdysseyLLM"] == pytest.approx(45.12)
    assert shown["LLaMA-2-70B", "AWQ"] is None


def test_status_tells_a_running_cell_from_a_lost_one(tmp_path, capsys):
    for name, pid in (("rtn-1", os.getpid()), ("gptq-2", 2**22 + 1)):
        (tmp_path / "m" / name).mkdir(parents=True)
        (tmp_path / "m" / name / "config.yaml").write_text("")
        running = {"host": socket.gethostname(), "pid": pid, "started": "2026-01-01T00:00:00+00:00"}
        write_json(tmp_path / "m" / name / "running.json", running)
    write_json(tmp_path / "m" / "fp16-3" / "record.json", cell_record("fp16", "m", outcome="timeout"))
    (tmp_path / "m" / "awq-4").mkdir()
    whole = json.dumps(cell_record("awq", "m"))
    (tmp_path / "m" / "awq-4" / "record.json").write_text(whole[: len(whole) // 2])
    (tmp_path / "m" / "awq-4" / "config.yaml").write_text("")
    assert main(["status", str(tmp_path), "--format", "csv"]) == 0
    printed = capsys.readouterr().out
    assert "m,rtn,running," in printed
    assert "m,gptq,no record," in printed
    assert "m,awq,no record," in printed
    assert "m,FP16,timeout," in printed
