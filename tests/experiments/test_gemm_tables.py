"""Tables and figures of single matrix products and of latency, against hand-written results."""

import pytest
from helpers.records import gemm_result

from experiments.figures import draw_figure6, draw_figure7, draw_gemm
from experiments.gemm import figure7_table, gemm_kinds, gemm_table
from experiments.latency_tables import figure6_table, table4_latency, table5_gemm
from experiments.measured import Measurement
from experiments.sources import load_sources
from odyssey.record import write_json

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


def rows_of(table):
    return [dict(zip((column.key for column in table.columns), row, strict=True)) for row in table.rows]


def test_gemm_table():
    table = gemm_table(RESULT)
    rows = rows_of(table)
    assert (rows[0]["n_x_k"], rows[0]["m"], rows[0]["kernel"], rows[0]["time_us"]) == (
        "4096 x 4096", 1, "FastGEMM W4A8", 5.0,
    )  # fmt: skip
    assert [row["speedup_over_fp16"] for row in rows] == [4.0, 1.0, 2.0, 1.0, None]
    assert rows[2]["tops"] == pytest.approx(2 * 4096 * 4096 * 1024 / 25e-6 / 1e12)
    assert [row["correct"] for row in rows] == ["yes"] * 4 + ["WRONG"]
    assert "GPU 1, 2026-01-02, commit fedcba9" in table.title
    assert "4.00x" in table.render("terminal")


def test_ratios_to_a_wrong_product_and_of_wrong_products_are_not_drawn(tmp_path):
    result = gemm_result(
        [
            (4096, 4096, 1, "fastgemm", 5.0, True),
            (4096, 4096, 1, "int-mm", 1.0, False),
            (4096, 4096, 1, "cublas-fp16", 20.0, True),
            (4096, 4096, 16, "w8a8", 25.0, True),
            (4096, 4096, 16, "cublas-fp16", 50.0, False),
        ]
    )
    rows = rows_of(gemm_table(result))
    assert [row["speedup_over_fp16"] for row in rows] == [4.0, 20.0, 1.0, None, None]
    assert [row["time_us"] for row in rows] == [5.0, 1.0, 20.0, 25.0, 50.0]
    text = draw_gemm(result, tmp_path / "gemm")[1].read_text()
    assert "FastGEMM W4A8" in text
    assert "torch._int_mm W8A8" not in text
    assert ">W8A8<" not in text


def test_a_kernel_that_was_not_available_is_a_row_with_its_reason():
    result = gemm_result([(64, 64, 1, "fastgemm", 1.0, True)])
    result["rows"].append({"n": 64, "k": 64, "m": 1, "kernel": "humming", "unavailable": "not installed"})
    assert gemm_table(result).rows[1][-2:] == (None, "not installed")
    assert "not installed" in gemm_table(result).render("md")


def test_table5_keeps_our_sizes_apart_from_the_papers():
    rows = rows_of(table5_gemm([RESULT]))
    ours = [row for row in rows if row["measured"] is not None]
    assert [(row["stage"], row["size"], row["paper"], row["difference"]) for row in ours] == [
        ("context decoding", "4096 x 4096, M = 1024", None, None),
        ("self-decoding", "4096 x 4096, M = 1", None, None),
        ("self-decoding", "512 x 512, M = 1", None, None),
    ]
    assert [row["measured"] for row in ours] == [pytest.approx(0.025), pytest.approx(0.005), "wrong result"]
    assert [row["paper"] for row in rows if row["size"] == "not reported"] == [0.139, 0.121, 1.14, 0.052, 0.012, 4.33]


def test_figure7_compares_ratios():
    assert gemm_kinds(KINDS) == {
        "self-decoding": {"4096 x 4096": {"fastgemm-sm80": 10.0, "grouped": 25.0, "asymmetric": 12.0}},
        "context decoding": {},
    }
    rows = {row["kernel"]: row for row in rows_of(figure7_table([KINDS]))}
    grouped = rows["fine-grained g128"]
    assert (grouped["measured_us"], grouped["measured_ratio"], grouped["paper_us"]) == (25.0, 2.5, 264.0)
    assert grouped["difference"] == pytest.approx(2.5 - 264 / 87)
    assert rows["FastGEMM W4A8 (mma.sync)"]["measured_ratio"] == 1.0
    # What only the paper has keeps its place.
    assert (rows["FastGEMM W4A8"]["measured_us"], rows["FastGEMM W4A8"]["paper_us"]) == (None, 87.0)


def test_names_of_the_first_format_are_the_mma_sync_kernels(tmp_path):
    write_json(tmp_path / "gemm.json", {**KINDS, "format": 1})
    (document,) = load_sources([tmp_path]).gemm
    kernels = [row["kernel"] for row in document["rows"]]
    assert kernels == ["fastgemm-sm80", "grouped-sm80", "asymmetric-sm80", "unfused", "grouped-sm80", "fastgemm-sm80"]
    write_json(tmp_path / "gemm.json", KINDS)
    (document,) = load_sources([tmp_path]).gemm
    assert document["rows"] == KINDS["rows"]


PHASES = {"self-decoding (M = 1)": (1, 10.0), "context decoding (M = 1024)": (1024, 100.0)}


@pytest.fixture
def both_phases():
    """What the prepared sweep of figure 7 measures: every kind in both phases, two sizes, and a number of tokens that
    is of neither phase."""
    times = {
        "fastgemm-sm80": 1.0, "grouped-sm80": 1.5, "asymmetric-sm80": 1.25,
        "fastgemm": 0.5, "grouped": 0.7, "asymmetric": 0.55, "unfused": 3.0,
    }  # fmt: skip
    return gemm_result(
        [
            (n, 4096, m, kernel, base * time, True)
            for n in (4096, 8192)
            for m, base in (*PHASES.values(), (16, 7.0))
            for kernel, time in times.items()
        ]
    )


def test_figure7_has_both_phases(both_phases):
    rows = rows_of(figure7_table([both_phases]))
    assert len(rows) == 2 * 2 * 7
    assert list(dict.fromkeys(row["stage"] for row in rows)) == list(PHASES)
    for phase, (_, base) in PHASES.items():
        found = {row["kernel"]: row for row in rows if (row["stage"], row["size"]) == (phase, "8192 x 4096")}
        assert {kernel: row["measured_us"] for kernel, row in found.items()} == {
            "unpack + GEMM": 3 * base, "fine-grained g128 (mma.sync)": 1.5 * base,
            "asymmetric (mma.sync)": 1.25 * base, "FastGEMM W4A8 (mma.sync)": base,
            "fine-grained g128": 0.7 * base, "asymmetric": 0.55 * base, "FastGEMM W4A8": base / 2,
        }  # fmt: skip
        # Like with like: each kind over FastGEMM on the same kernel.
        ratios = {kernel: row["measured_ratio"] for kernel, row in found.items()}
        assert ratios == pytest.approx({
            "unpack + GEMM": 6, "fine-grained g128 (mma.sync)": 1.5, "asymmetric (mma.sync)": 1.25,
            "FastGEMM W4A8 (mma.sync)": 1, "fine-grained g128": 1.4, "asymmetric": 1.1, "FastGEMM W4A8": 1,
        })  # fmt: skip
        # The paper's figure is of self-decoding alone.
        papers = {kernel: row["paper_us"] for kernel, row in found.items() if row["paper_us"] is not None}
        expected = {
            "fine-grained g128 (mma.sync)": 264.0, "asymmetric (mma.sync)": 87.0,
            "fine-grained g128": 264.0, "asymmetric": 87.0, "FastGEMM W4A8": 87.0,
        }  # fmt: skip
        assert papers == (expected if phase.startswith("self") else {})
    assert "| context decoding (M = 1024) | 8192 x 4096 | fine-grained g128 | 70.00 |" in figure7_table(
        [both_phases]
    ).render("md")


def test_figure7_draws_a_panel_for_each_phase(tmp_path, both_phases):
    png, svg = draw_figure7(tmp_path / "seven", [both_phases])
    assert png.stat().st_size < 200_000
    text = svg.read_text()
    for phase in PHASES:
        assert f">{phase}, GPU 1<" in text
    assert text.count(">8192 x 4096<") == 2
    assert text.count(">A100-80G<") == 1
    # Twice in each panel, and once the paper's ratio.
    assert (text.count(">6.00<"), text.count(">1.40<"), text.count(">3.03<")) == (4, 4, 1)


def test_figure7_without_measured_kinds_has_the_papers():
    rows = rows_of(figure7_table([RESULT]))
    assert [row["measured_us"] for row in rows] == [None] * 3
    assert [row["paper_us"] for row in rows] == [264.0, 87.0, 87.0]
    assert {row["stage"] for row in rows} == {"self-decoding (M = 1)"}
    assert "not run" in figure7_table([RESULT]).render("md")


def measurement(model, method, value):
    return Measurement(model, method, "W4A8", None, value, "ok", "GPU 1", "abcdefg", None)


def test_latency_tables_take_measurements_when_there_are_some():
    empty = table4_latency()
    assert len(empty.rows) == 15
    assert {row[3] for row in empty.rows} == {None}
    table = table4_latency([measurement("llama2-7b", "odyssey", 700.0), measurement("llama2-7b", "vllm", 800.0)])
    assert ("LLaMA-2-7B", "OdysseyLLM", "ms", 700.0, 751.0, None) in [row[:6] for row in table.rows]
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
