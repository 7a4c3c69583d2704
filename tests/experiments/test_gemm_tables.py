"""Tables and figures of single matrix products and of latency, against hand-written results."""

import pytest
from helpers.records import gemm_result

from experiments.figures import draw_figure6, draw_figure7, draw_gemm
from experiments.gemm import figure7_table, gemm_kinds, gemm_table
from experiments.latency_tables import figure6_table, table4_latency, table5_gemm
from experiments.measured import Measurement

RESULT = gemm_result(
    [
        (4096, 4096, 1, "fastgemm", 5.0, True),
        (4096, 4096, 1, "cublas-fp16", 20.0, True),
        (4096, 4096, 1024, "fastgemm", 25.0, True),
        (4096, 4096, 1024, "cublas-fp16", 50.0, True),
        (512, 512, 1, "fastgemm", 3.0, False),
    ]
)
KINDS = gemm_result(
    [
        (4096, 4096, 1, "fastgemm-sm80", 10.0, True),
        (4096, 4096, 1, "grouped", 25.0, True),
        (4096, 4096, 1, "asymmetric", 12.0, True),
        (4096, 4096, 1, "unfused", 40.0, False),
        (4096, 4096, 16, "grouped", 99.0, True),
        (512, 512, 1, "fastgemm-sm80", 1.0, True),
    ]
)


def test_gemm_table():
    table = gemm_table(RESULT)
    rows = [dict(zip((column.key for column in table.columns), row, strict=True)) for row in table.rows]
    assert (rows[0]["n_x_k"], rows[0]["m"], rows[0]["kernel"], rows[0]["time_us"]) == (
        "4096 x 4096", 1, "FastGEMM W4A8", 5.0,
    )  # fmt: skip
    assert [row["speedup_over_fp16"] for row in rows] == [4.0, 1.0, 2.0, 1.0, None]
    assert rows[2]["tops"] == pytest.approx(2 * 4096 * 4096 * 1024 / 25e-6 / 1e12)
    assert [row["correct"] for row in rows] == ["yes"] * 4 + ["WRONG"]
    assert "GPU 1, 2026-01-02, commit fedcba9" in table.title
    assert "4.00x" in table.render("terminal")


def test_a_kernel_that_was_not_available_is_a_row_with_its_reason():
    result = gemm_result([(64, 64, 1, "fastgemm", 1.0, True)])
    result["rows"].append({"n": 64, "k": 64, "m": 1, "kernel": "humming", "unavailable": "not installed"})
    assert gemm_table(result).rows[1][-2:] == (None, "not installed")
    assert "not installed" in gemm_table(result).render("md")


def test_table5_keeps_our_sizes_apart_from_the_papers():
    table = table5_gemm([RESULT])
    rows = [dict(zip((column.key for column in table.columns), row, strict=True)) for row in table.rows]
    ours = [row for row in rows if row["measured"] is not None]
    assert [(row["stage"], row["size"], row["paper"], row["difference"]) for row in ours] == [
        ("context decoding", "4096 x 4096, M = 1024", None, None),
        ("self-decoding", "4096 x 4096, M = 1", None, None),
        ("self-decoding", "512 x 512, M = 1", None, None),
    ]
    assert [row["measured"] for row in ours] == [pytest.approx(0.025), pytest.approx(0.005), "wrong result"]
    assert [row["paper"] for row in rows if row["size"] == "not reported"] == [0.139, 0.121, 1.14, 0.052, 0.012, 4.33]


def test_figure7_compares_ratios():
    assert gemm_kinds(KINDS) == {"4096 x 4096": {"fastgemm-sm80": 10.0, "grouped": 25.0, "asymmetric": 12.0}}
    table = figure7_table([KINDS])
    rows = {row[1]: dict(zip((column.key for column in table.columns), row, strict=True)) for row in table.rows}
    grouped = rows["fine-grained g128"]
    assert (grouped["measured_us"], grouped["measured_ratio"], grouped["paper_us"]) == (25.0, 2.5, 264.0)
    assert grouped["difference"] == pytest.approx(2.5 - 264 / 87)
    assert rows["FastGEMM W4A8 (mma.sync)"]["measured_ratio"] == 1.0


def test_figure7_has_both_phases():
    kinds = [("fastgemm-sm80", 100.0), ("grouped", 150.0), ("fastgemm", 50.0)]
    result = gemm_result([(4096, 4096, 1024, kernel, time, True) for kernel, time in kinds])
    result["rows"] += KINDS["rows"]
    assert list(gemm_kinds(result)) == ["4096 x 4096", "4096 x 4096, M = 1024"]
    table = figure7_table([result])
    prefill = {row[1]: row[2:7] for row in table.rows if row[0] == "4096 x 4096, M = 1024"}
    assert prefill["fine-grained g128"] == (150.0, 1.5, None, None, None)
    assert prefill["FastGEMM W4A8"][1] == 0.5


def test_figure7_without_measured_kinds_has_the_papers():
    table = figure7_table([RESULT])
    assert [row[2] for row in table.rows] == [None] * 3
    assert [row[4] for row in table.rows] == [264.0, 87.0, 87.0]
    assert "not run" in table.render("md")


def measurement(model, method, value):
    return Measurement(model, method, "W4A8", None, value, "ok", "GPU 1", "abcdefg", None)


def test_latency_tables_take_measurements_when_there_are_some():
    empty = table4_latency()
    assert len(empty.rows) == 15
    assert {row[3] for row in empty.rows} == {None}
    table = table4_latency([measurement("llama2-7b", "odyssey", 700.0), measurement("llama2-7b", "vllm", 800.0)])
    assert ("LLaMA-2-7B", "OdysseyLLM", "ms", 700.0, 751.0, -51.0) in [row[:6] for row in table.rows]
    assert ("LLaMA-2-7B", "vllm", "ms", 800.0, None, None) in [row[:6] for row in table.rows]
    speedups = figure6_table([measurement("llama2-13b", "odyssey", 2.0)])
    assert speedups.rows[1][:3] == ("LLaMA-2-13B", 2.0, 2.15)
    assert speedups.rows[0][:3] == ("LLaMA-2-7B", None, 1.9)


def test_gemm_figure_has_a_panel_for_each_size(tmp_path):
    other = [(64, 64, m, kernel, time, True) for m in (1, 2) for kernel, time in (("w8a8", 2.0), ("cublas-fp16", 4.0))]
    result = gemm_result(other)
    result["rows"] += RESULT["rows"]
    png, svg = draw_gemm(result, tmp_path / "gemm")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size < 200_000
    text = svg.read_text()
    assert "N x K = 64 x 64" in text
    assert "N x K = 4096 x 4096" in text
    # A size whose only row is wrong is not drawn.
    assert "N x K = 512" not in text
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_gemm(gemm_result([(64, 64, 1, "fastgemm", 1.0, True)]), tmp_path / "none")


def test_figures_6_and_7(tmp_path):
    _, svg = draw_figure6(tmp_path / "six", [measurement("llama2-7b", "odyssey", 1.5)])
    text = svg.read_text()
    assert "1.5x" in text
    assert "2.15x" in text
    assert text.count("not run") == 2
    _, svg = draw_figure7(tmp_path / "seven", [KINDS])
    assert "2.50" in svg.read_text()
    assert "3.03" in svg.read_text()
    _, svg = draw_figure7(tmp_path / "none")
    assert "not run" in svg.read_text()


def test_the_same_input_gives_the_same_files(tmp_path):
    first, second = draw_gemm(RESULT, tmp_path / "a"), draw_gemm(RESULT, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
