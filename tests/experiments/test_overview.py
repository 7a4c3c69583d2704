import io

import pandas as pd
import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.overview import overview, overview_markdown, plot_overview, print_overview
from odyssey.record import write_json


def _record(method, outcome="ok", value=None, size=None, **config):
    record = {
        "outcome": outcome,
        "reason": None if outcome == "ok" else "out of luck",
        "config": {"model": {"name": "tiny"}, "method": {"name": method, **config}},
        "method": {"label": "W4A8"},
        "timings": {"total_s": 2.0},
    }
    if value is not None:
        record["accuracy"] = {"perplexity": {"embedded": {"value": value}}}
    if size is not None:
        record["size"] = {"disk_bytes": size, "bits_per_weight": 4.1}
    return record


RECORDS = [
    _record("odyssey", value=21.5, size=2e6, clipping="learned", compensation="gptq"),
    _record("odyssey", value=22.5, size=2e6, clipping="none", compensation="none"),
    _record("rtn", outcome="killed"),
    _record("fp16", value=20.0, size=7e6),
]


def test_rows_in_the_papers_order_with_ablations_named():
    frame = overview(RECORDS)
    # The killed cell has no data set and stands apart from the rows that are compared.
    measured = frame[frame["dataset"] == "embedded"]
    assert list(measured["method"]) == ["FP16", "OdysseyLLM", "OdysseyLLM (vanilla)"]
    assert list(measured["perplexity"]) == [20.0, 21.5, 22.5]
    assert list(measured["size_mb"]) == [7.0, 2.0, 2.0]
    killed = frame[frame["outcome"] == "killed"].iloc[0]
    assert killed["perplexity"] is None
    assert killed["note"] == "out of luck"


def test_simulated_figures_are_labelled():
    record = _record("rtn", value=3.0)
    record["method"]["arithmetic"] = "simulated"
    assert overview([record]).iloc[0]["note"] == "simulated"


def test_a_ratio_stands_beside_both_its_speeds():
    record = _record("odyssey", value=3.0, size=2e6, clipping="learned", compensation="gptq")
    record["latency"] = {
        "total_tokens_per_s": 90.4, "speedup_over_reference": 0.45, "reference": {"total_tokens_per_s": 201.2},
    }  # fmt: skip
    record["quantization"] = {"seconds": 73.6}
    frame = overview([record, _record("fp16", value=2.0, size=7e6)])
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_overview(frame, console)
    (row,) = [line.split() for line in console.export_text().splitlines() if "OdysseyLLM" in line]
    assert row == ["OdysseyLLM", "W4A8", "3.000", "2.00", "4.10", "90", "201", "0.45x", "73.6"]


def test_tables_show_every_figure():
    frame = overview(RECORDS)
    markdown = overview_markdown(frame)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_overview(frame, console)
    text = console.export_text()
    for figure in ("20.000", "21.500", "22.500", "7.00", "killed"):
        assert figure in markdown
        assert figure in text


def test_plot_is_written_only_when_there_is_something_to_plot(tmp_path):
    assert plot_overview(overview(RECORDS), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.svg").read_text().count("OdysseyLLM") == 2
    assert not plot_overview(overview([_record("rtn", outcome="oom")]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("missing", ["method", "timings"])
def test_records_of_cells_that_died_early(missing):
    record = _record("rtn", outcome="killed")
    del record[missing]
    assert overview([record]).iloc[0]["outcome"] == "killed"


def test_command_line_draws_from_records_on_disk(tmp_path, capsys):
    for number, record in enumerate(RECORDS):
        write_json(tmp_path / "tiny" / f"cell-{number}" / "record.json", record)
    assert main(["overview", str(tmp_path), "--format", "csv", "--plot", str(tmp_path / "plot.png")]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert sorted(table["perplexity"].dropna()) == [20.0, 21.5, 22.5]
    assert (tmp_path / "plot.svg").is_file()
    assert main(["overview", str(tmp_path / "nothing")]) == 1
    assert "no records under" in capsys.readouterr().err
