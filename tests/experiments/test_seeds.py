"""Runs of one cell that differ in their seeds: the spread's arithmetic, what belongs together, what stands for all."""

import math
import statistics

import pytest
from helpers.records import cell_record
from helpers.sweeps import ROOT

from experiments.accuracy_tables import table2_lambada, table2_perplexity, table6_ablation
from experiments.differences import by_seed
from experiments.measured import MixedProtocolsError, perplexities
from experiments.seeds import table_seeds
from odyssey.config import register_schemas
from odyssey.overrides import check_command_line

NLL = [1.0, 1.5, 2.0, 2.5]


def run_of(seed, value=None, *, method="odyssey", shift=None, **options):
    """A record with this seed; shift: its windows' losses above FP16's."""
    if shift is not None:
        value = math.exp(statistics.mean(NLL) + shift)
    record = cell_record(method, value=value, **options)
    record["config"]["seed"] = record["config"]["calibration"]["seed"] = seed
    if shift is not None:
        (result,) = record["accuracy"]["perplexity"].values()
        result["nll"] = [loss + shift for loss in NLL]
    return record


def rows_of(*records):
    table = table_seeds(perplexities(records))
    return [dict(zip((column.key for column in table.columns), row, strict=True)) for row in table.rows]


def test_mean_and_deviation_over_seeds():
    (row,) = rows_of(run_of(2, 6.5), run_of(0, 6.1), run_of(1, 6.3))
    assert row["mean"] == pytest.approx(6.3)
    # sqrt((0.2^2 + 0 + 0.2^2) / 2)
    assert row["deviation"] == pytest.approx(0.2)
    assert (row["seeds"], row["lowest"], row["highest"]) == (3, 6.1, 6.5)
    assert (row["recipe"], row["vs_fp16"], row["above"]) == ("LWC + GPTQ", None, None)


def test_every_seed_is_compared_with_fp16_on_the_same_windows():
    fp16 = run_of(0, method="fp16", shift=0.0)
    (row,) = rows_of(fp16, run_of(0, shift=0.01), run_of(1, shift=0.03), run_of(2, shift=-0.01))
    base = math.exp(1.75)
    expected = statistics.mean(base * math.exp(shift) - base for shift in (0.01, 0.03, -0.01))
    assert row["vs_fp16"] == pytest.approx(expected)
    # The shift is the same on every window, so that each interval lies on one side of 0.
    assert row["above"] == 2
    # A seed whose windows are unknown leaves the mean without a difference rather than with one of the others.
    (row,) = rows_of(fp16, run_of(0, shift=0.01), run_of(1, 5.9))
    assert (row["vs_fp16"], row["above"]) == (None, None)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "llama-13b"},
        {"tokens": "t2", "model": "llama-13b"},
        {"method": "gptq"},
        {"compensation": "none"},
        {"epochs": 5},
    ],
    ids=["model", "tokens", "method", "recipe", "settings"],
)
def test_only_the_seeds_may_differ(other):
    records = [run_of(0, 6.1), run_of(1, 6.3), run_of(2, 7.0, **other)]
    (row,) = rows_of(*records)
    assert (row["seeds"], row["highest"]) == (2, 6.3)


def test_another_device_is_another_row():
    records = [run_of(0, 6.1), run_of(1, 6.3), run_of(0, 6.2), run_of(1, 6.4)]
    for record in records[2:]:
        record["environment"]["cpu"] = "Abacus 4000"
    assert [(row["device"], row["lowest"]) for row in rows_of(*records)] == [
        ("Abacus 3000, float32", 6.1),
        ("Abacus 4000, float32", 6.2),
    ]


def test_one_seed_is_no_spread_and_a_failed_run_is_no_seed():
    assert rows_of(run_of(0, 6.1), run_of(1, outcome="oom")) == []
    # The same seeds again are no other seed.
    assert rows_of(run_of(0, 6.1), run_of(0, 6.2)) == []


def test_protocols_are_not_averaged():
    with pytest.raises(MixedProtocolsError):
        rows_of(run_of(0, 6.1), run_of(1, 6.3), run_of(0, 6.1, window=512), run_of(1, 6.3, window=512))


@pytest.mark.parametrize("table", [table2_perplexity, table6_ablation])
def test_the_first_seed_stands_for_all_and_says_so(table):
    records = [run_of(2, 6.5), run_of(1, 6.3), run_of(5, 6.9, epochs=3)]
    built = table(perplexities(records))
    rows = [dict(zip((column.key for column in built.columns), row, strict=True)) for row in built.rows]
    shown = [(row["measured"], row["note"]) for row in rows if row["measured"] is not None]
    first, other = shown
    assert (first[0], other[0]) == (6.3, 6.9)
    assert first[1].endswith("seed 1 of 2 (table_seeds)")
    assert "method.epochs=3" in other[1]
    assert "table_seeds" not in other[1]


def test_tasks_show_every_seed():
    records = [run_of(seed, tasks={"lambada_openai": ("acc", value)}) for seed, value in ((0, 0.7), (1, 0.8))]
    rows = [row for row in table2_lambada(records).rows if row[3] is not None]
    assert len(rows) == 2
    assert [row[-1] for row in rows] == ["calibration.seed=0, seed=0", "calibration.seed=1, seed=1"]


def test_a_group_is_in_the_order_of_its_seeds():
    (runs,) = by_seed(perplexities([run_of(10, 6.1), run_of(9, 6.2)]))
    assert [each.config["seed"] for each in runs] == [9, 10]


def test_the_prepared_sweep_varies_both_seeds_together():
    register_schemas()
    cells = check_command_line(["-m", "experiment=table_seeds", "method=gptq", "model=llama-7b"], ROOT / "conf").cells
    assert [(cell.seed, cell.calibration.seed) for cell in cells] == [(seed, seed) for seed in range(5)]
