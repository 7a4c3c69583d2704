"""Cells without a record say why, from the catalogue, the prepared sweeps, the predictions and the other records."""

from dataclasses import asdict

import pytest
from helpers.records import MEASURED_ALONE, cell_record, gemm_result

from experiments import paper
from experiments.accuracy_tables import table3_commonsense
from experiments.bitwidths import figure1_table
from experiments.catalogue import CATALOGUE, Selection
from experiments.end_to_end import end_to_end_table, latencies, speedups, timed_rows
from experiments.figures import draw_figure6, draw_figure7
from experiments.gemm import figure7_table
from experiments.latency_tables import figure6_table, table4_latency, table5_gemm
from experiments.mmlu import table_mmlu
from experiments.not_run import NotRun, is_catalogued, prepared_cell
from experiments.recipes import RECIPE_ORDER, recipe_name, recipe_settings
from experiments.sources import Sources
from experiments.table import Column, Table
from odyssey.config import AccuracyConfig, PerplexityConfig, register_schemas
from odyssey.overrides import check_command_line

GPU = {"name": "GPU 80", "memory_bytes": 80 * 2**30}


def sources(*records, gpu=GPU, **more):
    small = cell_record("fp16", "testbed", value=36.0)
    small["environment"]["gpu"] = gpu
    return Sources(records=[small, *records], **more)


def text(reasons):
    return "; ".join(reason.text for reason in reasons)


def rows_of(table):
    """Rows as dicts, with what the measured column says and why."""
    keys = [column.key for column in table.columns]
    reasons = table.reasons or ((),) * len(table.rows)
    return [dict(zip(keys, row, strict=True)) | {"why": why} for row, why in zip(table.rows, reasons, strict=True)]


def test_every_model_of_the_paper_is_catalogued_with_its_licence():
    """Llama 2 and 3 ask for a licence on the hub, the LLaMA conversions that conf/model names do not."""
    for model in paper.MODEL_NAMES:
        assert is_catalogued(model)
        assert ("gated" in text(NotRun(sources()).accuracy("table2_perplexity", model, "fp16"))) == ("llama2" in model)
    assert "no GPT-5" in text(NotRun().accuracy("table2_perplexity", "GPT-5", "fp16"))
    assert "no GPT-5" in text(NotRun().latency("table4_latency", "GPT-5", ()))


def test_gated_weights_name_their_owner_and_what_to_do():
    gated, size = NotRun(sources()).accuracy("table2_perplexity", "llama2-7b", "odyssey")
    assert gated.text == "weights are gated: accept the licence of meta-llama on the hub, then set HF_TOKEN"
    assert gated.short == "gated"
    assert "predicted to fit the largest GPU with a record (GPU 80, 80 GiB)" in size.text


@pytest.mark.parametrize(
    ("model", "method", "fits"),
    [("llama-7b", "fp16", True), ("llama2-70b", "fp16", False), ("llama2-70b", "odyssey", True),
     ("llama-65b", "fp16", False)],
)  # fmt: skip
def test_a_model_that_is_too_large_says_by_how_much(model, method, fits):
    """FP16 weights: parameters of the model cards (6.74, 68.98 and 65.29 billion) of two bytes each."""
    weights = {"llama-7b": 6.738e9, "llama2-70b": 68.977e9, "llama-65b": 65.286e9}[model] * 2 / 2**30
    *_, size = NotRun(sources()).accuracy("table2_perplexity", model, method)
    assert ("predicted to fit" in size.text) == fits
    if not fits:
        assert f"(FP16 weights: {weights:.0f} GiB)" in size.text
        needed = int(size.short.removeprefix("needs ").removesuffix(" GiB"))
        assert weights < needed < 1.25 * weights


def test_the_prediction_is_held_against_the_largest_gpu_of_any_record():
    def fits(**gpu):
        return "predicted to fit" in text(NotRun(sources(**gpu)).latency("figure6_speedup", "llama2-70b", ("fp16",)))

    small, large = {"name": "GPU 8", "memory_bytes": 8 * 2**30}, {"name": "GPU 192", "memory_bytes": 192 * 2**30}
    assert not fits(gpu=small)
    assert fits(gpu=large)
    assert fits(gpu=small, end_to_end=[{"environment": {"gpu": large}}])
    product = gemm_result([(64, 64, 1, "fastgemm", 1.0, True)], gpu="GPU 192")
    product["environment"]["memory_bytes"] = 192 * 2**30
    assert fits(gpu=small, gemm=[product])
    assert "no record of any GPU yet" in text(NotRun(sources(gpu=None)).accuracy("table_mmlu", "llama-7b", "fp16"))


def test_the_prediction_is_of_what_the_prepared_sweep_asks_for(project_root):
    """The settings behind a reason are those of a cell of the sweep itself."""
    register_schemas()
    arguments = ["-m", "experiment=table6_ablation", "device=cuda", "model=llama2-7b", "method.clipping=learned"]
    none, gptq = check_command_line(arguments, project_root / "conf").cells
    assert asdict(prepared_cell("table6_ablation", "llama2-7b", "odyssey", "LWC")) == asdict(none)
    assert asdict(prepared_cell("table6_ablation", "llama2-7b", "odyssey", "LWC + GPTQ")) == asdict(gptq)
    assert none.accuracy == AccuracyConfig(perplexity=PerplexityConfig(dataset="wikitext2"))
    arguments = ["-m", "experiment=table3_commonsense", "device=cuda", "model=llama-13b", "method=smoothquant"]
    (cell,) = check_command_line(arguments, project_root / "conf").cells
    assert asdict(prepared_cell("table3_commonsense", "llama-13b", "smoothquant")) == asdict(cell)


def test_recipes_have_one_name_each_and_back():
    assert {recipe_name(**recipe_settings(name)) for name in RECIPE_ORDER} == set(RECIPE_ORDER)
    assert recipe_settings("LWC + GPTQ") == {"clipping": "learned", "compensation": "gptq"}


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in MEASURED_ALONE])
def test_no_cell_of_any_table_is_without_a_record_and_without_a_reason(name):
    rows = rows_of(CATALOGUE[name].table(sources(), Selection()))
    (key,) = [column.key for column in CATALOGUE[name].table(sources(), Selection()).columns if column.explained]
    unmeasured = [row for row in rows if row[key] is None]
    assert unmeasured
    assert all(row["why"] for row in unmeasured)
    assert not any(row["why"] for row in rows if row[key] is not None)
    assert not CATALOGUE[name].table(sources(), Selection(explain=False)).reasons


def test_a_record_takes_the_place_of_the_reason():
    asked = {"mmlu": ("acc", 0.35)}
    failed = cell_record("awq", "llama2-7b", outcome="gated")
    failed["config"]["accuracy"]["tasks"] = ["mmlu"]
    found = sources(cell_record("fp16", "llama2-7b", tasks=asked), failed)
    rows = {(row["model"], row["method"]): row for row in rows_of(table_mmlu(found.records, NotRun(found)))}
    assert rows["LLaMA-2-7B", "FP16"]["why"] == ()
    assert (rows["LLaMA-2-7B", "AWQ"]["measured"], rows["LLaMA-2-7B", "AWQ"]["why"]) == ("gated", ())
    assert rows["LLaMA-2-7B", "AWQ"]["note"] == "gated: the reason"
    assert len(rows["LLaMA-2-7B", "GPTQ"]["why"]) == 2


def test_a_failed_cell_fails_its_average_too():
    failed = cell_record("fp16", "llama2-70b", outcome="oom")
    failed["config"]["accuracy"]["tasks"] = ["winogrande", "piqa", "hellaswag", "arc_easy"]
    found = sources(failed)
    rows = rows_of(table3_commonsense(found.records, NotRun(found)))
    shown = {row["task"]: (row["measured"], row["note"], row["why"]) for row in rows
             if (row["model"], row["method"]) == ("LLaMA-2-70B", "FP16")}  # fmt: skip
    assert set(shown) == {"WinoGrande", "PIQA", "HellaSwag", "ARC-e", "average"}
    assert set(shown.values()) == {("oom", "oom: the reason", ())}


def test_a_model_of_ours_that_failed_needs_no_catalogue(tmp_path):
    record = latency_record("oom")
    record["model"]["name"] = "tiny"
    _, svg = draw_figure6(tmp_path / "six", speedups(timed_rows([], [record])), NotRun(sources()))
    assert ">oom<" in svg.read_text()


def test_latency_counts_the_formats_that_a_cell_compares():
    rows = {(row["model"], row["engine"]): row for row in rows_of(table4_latency((), NotRun(sources())))}
    assert "TensorRT-LLM FP16" in {engine for _, engine in rows}
    (engine,) = rows["LLaMA-2-7B", "TensorRT-LLM FP16"]["why"]
    assert engine == "none of the engines that this project times (latency.engine: transformers, odyssey, vllm)"
    (alone,) = rows["LLaMA-2-70B", "OdysseyLLM"]["why"]
    (beside,) = rows["LLaMA-2-70B", "OdysseyLLM over TensorRT-LLM FP16"]["why"]
    assert "predicted to fit" in alone
    assert "predicted to need" in beside


def latency_record(outcome, method="rtn", reason="no room"):
    record = cell_record(method, "llama2-13b", outcome=outcome)
    record["reason"] = reason
    record["path"] = "x/record.json"
    record["config"]["latency"] = {
        "engine": "odyssey", "batch_size": 1, "input_len": 1024, "output_len": 128, "against": ["fp16", "w8a8"],
    }  # fmt: skip
    return record


def test_a_latency_cell_that_failed_shows_how(tmp_path):
    rows = timed_rows([], [latency_record("oom")])
    assert [(each.row["method"], each.row["outcome"]) for each in rows] == [
        ("fp16", "oom"), ("w8a8", "oom"), ("w4a8", "oom"),
    ]  # fmt: skip
    found = {row["engine"]: row for row in rows_of(table4_latency(latencies(rows))) if row["model"] == "LLaMA-2-13B"}
    for engine in ("OdysseyLLM", "OdysseyLLM over TensorRT-LLM FP16", "OdysseyLLM over TensorRT-LLM W8A8"):
        assert (found[engine]["measured"], found[engine]["note"]) == ("oom", "oom: no room")
    (row,) = [row for row in rows_of(figure6_table(speedups(rows))) if row["model"] == "LLaMA-2-13B"]
    assert (row["measured"], row["note"]) == ("oom", "oom: no room")
    assert {row["note"] for row in rows_of(end_to_end_table(rows))} == {"oom: no room"}
    assert "oom" in {row["measured"] for row in rows_of(figure1_table(rows))}
    _, svg = draw_figure6(tmp_path / "six", speedups(rows), NotRun(sources()))
    assert ">oom<" in svg.read_text()
    assert ">not run: needs 130 GiB<" in svg.read_text()
    assert ">not run: no GPU record<" in svg.read_text()


def test_a_failed_attempt_gives_way_to_figures():
    good = latency_record("ok")
    good["latency"] = {"rows": [
        {"model": "llama2-13b", "method": method, "batch_size": 1, "input_len": 1024, "output_len": 128,
         "outcome": "ok", "prefill_ms": 1.0, "total_ms": total}
        for method, total in (("w4a8", 100.0), ("fp16", 250.0))
    ]}  # fmt: skip
    rows = timed_rows([], [good, latency_record("timeout")])
    assert [each.value for each in speedups(rows)] == [2.5]


def gemm_record(outcome):
    record = cell_record(outcome=outcome)
    record["config"]["gemm"] = {"bench": "fastgemm"}
    return record


def test_products_say_what_is_missing(tmp_path):
    why = {row["kernel"]: row["why"] for row in rows_of(table5_gemm((), NotRun(sources())))}
    assert why["QUIK W4A4"] == ("none of the kernels that fastgemm.bench times",)
    assert why["FastGEMM W4A8"] == ("the size of the paper's product is not known, so that no record can be of it",)
    failed = sources(gemm_record("unsupported"))
    for table in (table5_gemm((), NotRun(failed)), figure7_table((), NotRun(failed))):
        assert {row["why"] for row in rows_of(table) if row["kernel"] == "FastGEMM W4A8"} == {
            ("unsupported: the reason",)
        }
    _, svg = draw_figure7(tmp_path / "seven", (), NotRun(failed))
    assert "measured: not run: unsupported" in svg.read_text()
    result = gemm_result([(64, 64, 1, "fastgemm", 1.0, True)])
    result["rows"].append({"n": 64, "k": 64, "m": 1, "kernel": "grouped", "unavailable": "not built"})
    found = sources(gemm_record("failed"), gemm=[result])
    why = {row["kernel"]: row["why"] for row in rows_of(figure7_table(found.gemm, NotRun(found)))}
    assert why["fine-grained g128"] == ("unavailable: not built",)
    assert "experiment=figure7_gemm_kinds on an NVIDIA GPU" in why["FastGEMM W4A8"][0]


def test_reasons_stand_below_a_table_once_with_their_number():
    columns = (Column("cell", "cell"), Column("measured", "measured", "{:.1f}", absent="not run", explained=True),
               Column("paper", "paper", "{:.1f}", absent="not reported"))  # fmt: skip
    rows = (("a", None, 1.0), ("b", 2.0, None), ("c", None, None), ("d", None, 3.0))
    reasons = (("first",), (), ("second", "first"), ("second",))
    table = Table("t", "T", columns, rows, ("A note.",), reasons)
    assert table.texts() == [
        ["a", "not run (1)", "1.0"], ["b", "2.0", "not reported"], ["c", "not run (1, 2)", "not reported"],
        ["d", "not run (2)", "3.0"],
    ]  # fmt: skip
    assert table.render("md").splitlines()[-3:] == ["A note.  ", "(1) not run: first.  ", "(2) not run: second."]
    assert "footnotesize (2) not run: second." in table.render("tex")
    assert table.render("terminal").endswith("(1) not run: first.\n(2) not run: second.\n")
    assert table.render("csv").splitlines() == [
        "cell,measured,paper,not_run", "a,,1.0,first", "b,2.0,,", "c,,,second; first", "d,,3.0,second",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="reasons for 1 of 4 rows"):
        Table("t", "T", columns, rows, reasons=(("first",),))
