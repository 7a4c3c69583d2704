"""Accuracy tables against hand-written records with known answers, and what may not share a column."""

import hashlib

import pytest
from helpers.records import cell_record

from experiments.accuracy_tables import (
    accuracy_tasks,
    table2_c4,
    table2_lambada,
    table2_perplexity,
    table3_commonsense,
    table6_ablation,
)
from experiments.measured import MixedProtocolsError, perplexities
from odyssey.accuracy.items import pack_items


def rows_of(table, *keys):
    """Rows as dicts whose first columns have these texts."""
    found = [dict(zip((column.key for column in table.columns), row, strict=True)) for row in table.rows]
    return [row for row in found if tuple(row.values())[: len(keys)] == keys]


def table2(*records):
    return table2_perplexity(perplexities(records))


def test_table2_joins_our_figure_with_the_papers():
    table = table2(cell_record("fp16", value=5.68), cell_record("odyssey", value=6.27), cell_record("awq", value=5.8))
    (fp16,) = rows_of(table, "LLaMA-7B", "FP16", "W16A16")
    assert (fp16["measured"], fp16["paper"]) == (5.68, 5.73)
    assert fp16["difference"] == pytest.approx(-0.05)
    assert (fp16["device"], fp16["commit"], fp16["note"]) == ("Abacus 3000, float32", "0123456", None)
    (odyssey,) = rows_of(table, "LLaMA-7B", "OdysseyLLM", "W4A8")
    assert odyssey["difference"] == pytest.approx(0.10)
    (awq,) = rows_of(table, "LLaMA-7B", "AWQ")
    assert (awq["measured"], awq["paper"], awq["difference"]) == (5.8, None, None)
    (unmeasured,) = rows_of(table, "LLaMA-65B", "SmoothQuant")
    assert (unmeasured["measured"], unmeasured["paper"], unmeasured["device"]) == (None, 3.73, None)
    text = table.render("md")
    assert "| 5.800 | not reported |" in text
    assert "| not run | 3.730 |" in text


def test_table2_order_is_the_papers():
    table = table2(cell_record("odyssey", "another", value=9.0), cell_record("fp16", "llama2-7b", value=5.47))
    assert [row[:2] for row in table.rows][-2:] == [("LLaMA-2-7B", "FP16"), ("another", "OdysseyLLM")]
    assert [row[1] for row in table.rows[:3]] == ["FP16", "SmoothQuant", "OdysseyLLM"]


def test_only_the_full_recipe_is_compared_with_the_papers_method():
    table = table2(cell_record(value=6.7, compensation="none"), cell_record(value=6.2))
    assert [row["measured"] for row in rows_of(table, "LLaMA-7B", "OdysseyLLM")] == [6.2]


def test_another_format_is_another_cell():
    record = cell_record(value=8.0)
    record["method"]["label"] = "W3A8"
    (row,) = rows_of(table2(record), "LLaMA-7B", "OdysseyLLM", "W3A8")
    assert (row["measured"], row["paper"]) == (8.0, None)


def test_several_records_of_a_cell_are_all_shown_with_what_they_differ_in():
    records = [cell_record("smoothquant", value=5.9, alpha=0.5), cell_record("smoothquant", value=5.8, alpha=0.85)]
    records[1]["config"]["output_dir"] = "elsewhere"
    rows = rows_of(table2(*records), "LLaMA-7B", "SmoothQuant")
    assert [(row["measured"], row["note"]) for row in rows] == [(5.9, "method.alpha=0.5"), (5.8, "method.alpha=0.85")]


def test_another_checkpoint_of_the_same_name_is_noted():
    records = [cell_record("fp16", value=5.9), cell_record("fp16", value=5.8)]
    records[1]["model"]["fingerprint"] = "ee"
    notes = [row["note"] for row in rows_of(table2(*records), "LLaMA-7B", "FP16")]
    assert notes == ["checkpoint=ff", "checkpoint=ee"]


def test_simulated_figures_say_so():
    record = cell_record(value=6.2)
    record["accuracy"]["perplexity"]["wikitext2"]["simulated"] = True
    (row,) = rows_of(table2(record), "LLaMA-7B", "OdysseyLLM")
    assert row["note"] == "simulated"


def test_a_gpu_is_named_where_it_was_used():
    record = cell_record("fp16", value=5.7)
    record |= {"device": "cuda"}
    record["environment"]["gpu"] = {"name": "GPU 1"}
    (row,) = rows_of(table2(record), "LLaMA-7B", "FP16")
    assert row["device"] == "GPU 1, float32"


def test_a_failed_cell_shows_its_outcome_until_it_has_a_value():
    failed = cell_record("fp16", outcome="oom")
    (row,) = rows_of(table2(failed), "LLaMA-7B", "FP16")
    assert (row["measured"], row["difference"], row["note"]) == ("oom", None, "oom: the reason")
    (row,) = rows_of(table2(failed, cell_record("fp16", value=5.7)), "LLaMA-7B", "FP16")
    assert (row["measured"], row["note"]) == (5.7, None)


def test_a_cell_that_died_before_it_said_its_format():
    failed = cell_record("gptq", outcome="gated", bits=4, group_size=128, symmetric=True)
    del failed["method"], failed["model"]
    (row,) = rows_of(table2(failed), "LLaMA-7B", "GPTQ", "W4A16-g128")
    assert row["measured"] == "gated"


@pytest.mark.parametrize(
    "other",
    [{"window": 4096}, {"text": "bb"}, {"dataset": "embedded"}],
    ids=["window", "text", "data set"],
)
@pytest.mark.parametrize("build", [table2_perplexity, table6_ablation])
def test_protocols_never_share_a_column(build, other):
    records = [cell_record(value=6.2), cell_record(model="llama-13b", value=5.5, **other)]
    with pytest.raises(MixedProtocolsError, match="2 protocols cannot share a column") as caught:
        build(perplexities(records))
    assert "\n" not in str(caught.value)


def test_a_subset_of_the_windows_is_another_protocol():
    subset = cell_record("fp16", value=5.0)
    subset["config"]["accuracy"]["perplexity"]["max_windows"] = 10
    with pytest.raises(MixedProtocolsError, match="only the first 10 windows"):
        table2(subset, cell_record(value=6.2))
    # A limit that was not reached changes nothing.
    subset["config"]["accuracy"]["perplexity"]["max_windows"] = 11
    table2(subset, cell_record(value=6.2))


def test_a_model_evaluated_on_other_tokens_is_refused_and_another_tokenizer_is_not():
    with pytest.raises(MixedProtocolsError, match="llama-7b was evaluated on different tokens"):
        table2(cell_record("fp16", value=5.7), cell_record(value=6.2, tokens="t2"))
    table2(cell_record("fp16", value=5.7), cell_record("fp16", "other", value=6.2, tokens="t2"))


def test_another_data_set_has_no_figures_of_the_paper():
    table = table2(cell_record("fp16", value=5.7, dataset="embedded"))
    assert [row[3:5] for row in table.rows] == [(5.7, None)]
    assert "embedded" in table.title


def test_table6_knows_the_recipes_steps():
    records = [
        cell_record("rtn", value=6.8),
        cell_record(value=6.81, clipping="none", compensation="none"),
        cell_record(value=6.3, compensation="none"),
        cell_record(value=6.5, clipping="none"),
        cell_record(value=6.4, clipping="search"),
        cell_record(value=6.2),
        cell_record("rtn", value=7.0, symmetric=False),
        cell_record("gptq", value=5.9),
    ]
    table = table6_ablation(perplexities(records))
    ours = [(row["recipe"], row["measured"], row["paper"]) for row in rows_of(table, "LLaMA-7B", "W4A8")]
    assert ours == [
        ("vanilla", 6.8, 6.73), ("vanilla", 6.81, 6.73), ("LWC", 6.3, 6.25), ("GPTQ", 6.5, None),
        ("clip search + GPTQ", 6.4, None), ("LWC + GPTQ", 6.2, 6.17),
    ]  # fmt: skip
    (full,) = [row for row in rows_of(table, "LLaMA-7B") if row["recipe"] == "LWC + GPTQ"]
    assert full["difference"] == pytest.approx(0.03)
    assert [row["measured"] for row in rows_of(table, "LLaMA-2-7B")] == [None] * 3


TASKS = {
    "winogrande": ("acc", 0.72), "piqa": ("acc_norm", 0.80), "hellaswag": ("acc_norm", 0.78),
    "arc_easy": ("acc_norm", 0.74),
}  # fmt: skip


def test_table3_has_the_tasks_and_their_average():
    table = table3_commonsense([cell_record("odyssey", "llama-13b", tasks=TASKS)])
    rows = {row["task"]: row for row in rows_of(table, "LLaMA-13B", "OdysseyLLM")}
    assert {task: row["measured"] for task, row in rows.items()} == {
        "WinoGrande": 0.72, "PIQA": 0.80, "HellaSwag": 0.78, "ARC-e": 0.74, "average": pytest.approx(0.76),
    }  # fmt: skip
    assert rows["PIQA"]["paper"] == 0.7998
    assert rows["average"]["difference"] == pytest.approx(0.76 - 0.7617)


def test_table3_has_no_average_of_fewer_tasks():
    tasks = {task: figure for task, figure in TASKS.items() if task != "piqa"}
    (average,) = rows_of(
        table3_commonsense([cell_record("fp16", "llama-13b", tasks=tasks)]), "LLaMA-13B", "FP16", "W16A16", "average"
    )
    assert average["measured"] is None


def test_preprocessed_hellaswag_stands_beside_the_papers_task():
    table = table3_commonsense([cell_record("fp16", "m", tasks={"hellaswag_preprocessed": ("acc_norm", 0.3)})])
    assert [(row["task"], row["measured"], row["paper"]) for row in rows_of(table, "m")] == [
        ("HellaSwag (preprocessed)", 0.3, None)
    ]


def test_tasks_of_different_prompts_are_refused():
    records = [cell_record("fp16", tasks=TASKS), cell_record("odyssey", tasks=TASKS)]
    records[1]["accuracy"]["tasks"]["piqa"]["prompts_sha256"] = "0" * 64
    with pytest.raises(MixedProtocolsError, match="piqa"):
        table3_commonsense(records)


def test_lambada_is_in_percent():
    table = table2_lambada([cell_record("odyssey", tasks={"lambada_openai": ("acc", 0.7)})])
    (row,) = rows_of(table, "LLaMA-7B", "OdysseyLLM")
    assert (row["measured"], row["paper"]) == (pytest.approx(70.0), 73.49)
    assert row["difference"] == pytest.approx(-3.49)


def test_a_task_without_a_finite_figure():
    table = table2_lambada([cell_record("odyssey", tasks={"lambada_openai": ("acc", None)})])
    (row,) = rows_of(table, "LLaMA-7B", "OdysseyLLM")
    assert (row["measured"], row["difference"]) == ("not finite", None)


def with_items(record, directory, right, task="lambada_openai", answers=None):
    """The record as if it stood in `directory`, with the items of `task`."""
    items = {
        task: {str(n): {"answer": a, "acc": r} for n, (r, a) in enumerate(zip(right, answers or right, strict=True))}
    }
    result = record["accuracy"]["tasks"][task]
    packed = pack_items(task, result["prompts_sha256"], items)
    path = directory / f"{record['method']['name']}" / "tasks" / f"{task}.items.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)
    result |= {
        "items_file": f"tasks/{path.name}", "items_sha256": hashlib.sha256(packed).hexdigest(), "items": len(right),
        "value": sum(right) / len(right), "stderr": 0.05,
    }  # fmt: skip
    return {**record, "path": str(path.parents[1] / "record.json")}


def lambada_records(directory, right, worse, task="lambada_openai"):
    records = [cell_record(method, tasks={task: ("acc", 0.5)}) for method in ("fp16", "odyssey")]
    return [with_items(record, directory, items, task) for record, items in zip(records, (right, worse), strict=True)]


def test_a_difference_on_the_same_items_says_what_it_is_worth(tmp_path):
    right = [n % 2 for n in range(200)]
    worse = [each and n % 10 != 1 for n, each in enumerate(right)]
    table = table2_lambada(lambada_records(tmp_path, right, worse))
    (fp16,) = rows_of(table, "LLaMA-7B", "FP16")
    assert (fp16["measured"], fp16["vs_fp16"], fp16["noise"], fp16["flips"]) == (50.0, None, None, None)
    (row,) = rows_of(table, "LLaMA-7B", "OdysseyLLM")
    assert row["vs_fp16"] == pytest.approx(-10.0)
    assert row["noise"] == "outside"
    assert row["flips"] == pytest.approx(0.1)
    assert row["mcnemar_p"] == pytest.approx(2 / 2**20)
    low, high = (float(text) for text in row["interval"].strip("[]").split(","))
    assert -16 < low < -10 < high < -5
    assert any("McNemar" in note for note in table.notes)
    text = table.render("md")
    assert "| vs FP16 | 95 % interval | noise | McNemar p | flips |" in text
    assert "| 10.0% |" in text


def test_a_difference_inside_the_noise_is_marked(tmp_path):
    right = [n % 2 for n in range(200)]
    other = [1 - each if n in (3, 4, 7) else each for n, each in enumerate(right)]
    (row,) = rows_of(table2_lambada(lambada_records(tmp_path, right, other)), "LLaMA-7B", "OdysseyLLM")
    assert (row["noise"], row["mcnemar_p"]) == ("within", 1.0)
    assert row["vs_fp16"] == pytest.approx(-0.5)


@pytest.mark.parametrize("how", ["device", "checkpoint", "items", "gone"])
def test_what_is_not_the_same_is_not_compared(tmp_path, how):
    fp16, odyssey = lambada_records(tmp_path, [1, 0, 1, 1], [1, 0, 0, 1])
    if how == "device":
        odyssey["device"], odyssey["environment"]["gpu"] = "cuda", {"name": "GPU 1"}
    elif how == "checkpoint":
        odyssey["model"]["fingerprint"] = "ee"
    elif how == "items":
        odyssey = with_items(odyssey, tmp_path, [1, 0, 1, 1, 1])
        odyssey["accuracy"]["tasks"]["lambada_openai"]["items"] = 4
    else:
        (tmp_path / "odyssey/tasks/lambada_openai.items.json.gz").unlink()
    (row,) = rows_of(table2_lambada([fp16, odyssey]), "LLaMA-7B", "OdysseyLLM")
    assert (row["vs_fp16"], row["interval"], row["noise"]) == (None, None, None)


def test_perplexities_are_compared_window_by_window():
    records = [cell_record("fp16", value=36.0), cell_record("rtn", value=37.0)]
    for record, shift in zip(records, (0.0, 0.03), strict=True):
        record["accuracy"]["perplexity"]["wikitext2"]["nll"] = [3.3 + 0.1 * (n % 5) + shift for n in range(20)]
    for table in (table2(*records), table6_ablation(perplexities(records))):
        (row,) = [row for row in rows_of(table, "LLaMA-7B") if row["vs_fp16"] is not None]
        assert row["vs_fp16"] == pytest.approx(1.0, abs=0.1)
        assert (row["noise"], row["flips"]) == ("outside", None)


def test_the_average_is_compared_when_every_task_is(tmp_path):
    records = [cell_record(method, "llama-13b", tasks=TASKS) for method in ("fp16", "odyssey")]
    for number, record in enumerate(records):
        for task in TASKS:
            record["accuracy"]["tasks"][task]["metric"] = "acc"
            right = [(n + number * (n % 50 == 0)) % 2 for n in range(400)]
            records[number] = record = with_items(record, tmp_path, right, task)
    rows = {row["task"]: row for row in rows_of(table3_commonsense(records), "LLaMA-13B", "OdysseyLLM")}
    assert rows["average"]["vs_fp16"] == pytest.approx(rows["PIQA"]["vs_fp16"]) == pytest.approx(0.02)
    assert rows["average"]["flips"] == pytest.approx(0.02)
    assert rows["average"]["mcnemar_p"] is None
    # Four tasks know more than one.
    widths = [high - low for low, high in (map(float, rows[task]["interval"].strip("[]").split(",")) for task in
              ("average", "PIQA"))]  # fmt: skip
    assert widths[0] < 0.7 * widths[1]


def test_results_of_the_first_items_are_no_figures_of_the_paper(tmp_path):
    records = lambada_records(tmp_path, [1, 0, 1, 1], [1, 0, 0, 1])
    for record in records:
        record["accuracy"]["tasks"]["lambada_openai"]["limit"] = 4
    assert {row["measured"] for row in rows_of(table2_lambada(records), "LLaMA-7B")} == {None}
    rows = rows_of(accuracy_tasks(records), "LLaMA-7B", "lambada_openai")
    assert [(row["method"], row["measured"], row["note"]) for row in rows] == [
        ("FP16", 0.75, "limit 4"), ("OdysseyLLM", 0.5, "limit 4"),
    ]  # fmt: skip


def test_every_task_has_a_row_beside_fp16_of_its_own_prompts(tmp_path):
    full = lambada_records(tmp_path / "full", [1] * 40 + [0] * 40, [1] * 20 + [0] * 60, "mmlu")
    other = cell_record("odyssey", tasks={"mmlu": ("acc", 0.3)})
    other["accuracy"]["tasks"]["mmlu"]["prompts_sha256"] = "0" * 64
    table = accuracy_tasks([*full, with_items(other, tmp_path / "other", [1] * 80, "mmlu")])
    rows = rows_of(table, "LLaMA-7B", "mmlu")
    assert [(row["method"], row["measured"], row["vs_fp16"], row["noise"]) for row in rows if row["vs_fp16"]] == [
        ("OdysseyLLM", 0.25, -0.25, "outside")
    ]
    assert len(rows) == 3
    assert {row["items"] for row in rows} == {80}


def test_c4_has_a_table_of_its_own():
    records = [cell_record("fp16", value=5.7), cell_record("odyssey", value=6.2)]
    for record, value in zip(records, (7.1, 7.6), strict=True):
        record["config"]["accuracy"]["perplexity"]["also"] = ["c4"]
        wikitext = record["accuracy"]["perplexity"]["wikitext2"]
        record["accuracy"]["perplexity"]["c4"] = {**wikitext, "value": value, "text_sha256": "cc" * 32}
    failed = cell_record("rtn", outcome="missing-data")
    failed["config"]["accuracy"]["perplexity"]["also"] = ["c4"]
    measurements = perplexities([*records, failed])
    (row,) = rows_of(table2_perplexity(measurements), "LLaMA-7B", "OdysseyLLM")
    assert (row["measured"], row["paper"]) == (6.2, 6.17)
    table = table2_c4(measurements)
    assert "C4" in table.title
    assert [row[:4] for row in table.rows] == [
        ("LLaMA-7B", "FP16", "W16A16", 7.1), ("LLaMA-7B", "RTN", "W4A8", "missing-data"),
        ("LLaMA-7B", "OdysseyLLM", "W4A8", 7.6),
    ]  # fmt: skip
    assert {row["paper"] for row in rows_of(table, "LLaMA-7B")} == {None}
    table6_ablation(measurements)


def test_a_cell_without_c4_says_so_in_its_table():
    record = cell_record("fp16", value=5.7, outcome="missing-data")
    record["config"]["accuracy"]["perplexity"]["also"] = ["c4"]
    measurements = perplexities([record])
    (row,) = rows_of(table2_perplexity(measurements), "LLaMA-7B", "FP16")
    assert row["measured"] == 5.7
    assert [row[3] for row in table2_c4(measurements).rows] == ["missing-data"]
