"""`python -m experiments`: every command from files on disk, the report, and the prepared sweeps."""

import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from helpers.records import MEASURED_ALONE, cell_record, gemm_result

from experiments.__main__ import main
from experiments.catalogue import CATALOGUE
from experiments.sources import load_sources
from odyssey.config import register_schemas
from odyssey.errors import ConfigError
from odyssey.overrides import check_command_line
from odyssey.record import write_json

GEMM = gemm_result(
    [(64, 64, m, kernel, time, True) for m in (1, 8) for kernel, time in (("fastgemm", 1.0), ("cublas-fp16", 3.0))]
)


@pytest.fixture
def results(tmp_path):
    """results/<device>/<model>/<cell>/record.json and results/<device>/gemm/*.json."""
    directory = tmp_path / "results"
    for number, record in enumerate(
        [
            cell_record("fp16", "testbed", value=36.0, dataset="file", digest="0"),
            cell_record("rtn", "testbed", value=37.0, dataset="file", digest="1"),
            cell_record("odyssey", "testbed", value=36.5, dataset="file", digest="2"),
        ]
    ):
        write_json(directory / "cpu" / "testbed" / f"cell-{number}" / "record.json", record)
    write_json(directory / "gpu" / "gemm" / "day.json", GEMM)
    write_json(directory / "gpu" / "gemm" / "plans.json", {"rows": []})
    return directory


def test_sources_are_found_once(results, tmp_path):
    copy = tmp_path / "outputs" / "testbed" / "cell" / "record.json"
    write_json(copy, json.loads((results / "cpu/testbed/cell-0/record.json").read_text()) | {"finished": "x"})
    first = tmp_path / "again" / "testbed" / "cell" / "record.json"
    write_json(first, json.loads(copy.read_text()))
    sources = load_sources([results, tmp_path / "outputs", tmp_path / "again"])
    assert len(sources.records) == 4
    assert len(sources.gemm) == 1
    assert [Path(line.partition(":")[0]).name for line in sources.skipped] == ["plans.json"]


def test_a_damaged_record_is_named_and_left_out(results, capsys):
    path = results / "cpu" / "testbed" / "cell-0" / "record.json"
    path.write_text(path.read_text()[:100])
    assert main(["accuracy_tasks", str(results)]) == 0
    assert f"left out: {path}: not a whole record; run its cell again" in capsys.readouterr().err
    assert main(["report", str(results)]) == 0
    assert "run these cells again): cell-0." in (results / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in MEASURED_ALONE])
@pytest.mark.parametrize("format", ["terminal", "md", "tex", "csv"])
def test_every_table_in_every_format(results, capsys, name, format):
    assert main([name, str(results), "--format", format]) == 0
    text = capsys.readouterr().out
    if format == "csv":
        frame = pd.read_csv(io.StringIO(text))
        assert len(frame) >= 2
        assert any(column.startswith("measured") for column in frame.columns)
    elif format == "tex":
        rows = [line for line in text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines() if line]
        assert len({line.replace("\\&", "").count("&") for line in rows}) == 1
        assert all(line.endswith("\\\\") for line in rows)
    else:
        assert "paper" in text


@pytest.mark.parametrize("name", sorted(MEASURED_ALONE))
@pytest.mark.parametrize("format", ["terminal", "md", "tex", "csv"])
def test_a_table_of_nothing_has_no_rows(results, capsys, name, format):
    assert main([name, str(results), "--format", format]) == 0
    text = capsys.readouterr().out
    assert text
    assert format != "csv" or len(pd.read_csv(io.StringIO(text))) == 0


def test_tables_from_records_on_disk(results, capsys):
    assert main(["table2_perplexity", str(results), "--format", "csv"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out), dtype={"commit": str})
    assert dict(zip(frame["method"], frame["measured"], strict=True)) == {"FP16": 36.0, "RTN": 37.0, "OdysseyLLM": 36.5}
    assert set(frame["commit"]) == {"0123456"}


def test_mixed_protocols_are_refused_in_one_line_and_can_be_chosen_from(results, capsys):
    write_json(results / "cpu" / "llama-7b" / "cell" / "record.json", cell_record("fp16", value=5.7, digest="9"))
    assert main(["table2_perplexity", str(results)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "cannot share a column" in captured.err
    for options in (["--dataset", "wikitext2"], ["--model", "llama-7b"]):
        assert main(["table2_perplexity", str(results), "--format", "csv", *options]) == 0
        frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
        assert frame["measured"].dropna().tolist() == [5.7]
    chosen = re.search(r"([0-9a-f]{8}) file", captured.err)[1]
    for options in (
        ["--dataset", "file"],
        ["--model", "testbed", "--text", "aaaa", "--window", "2048"],
        ["--protocol", chosen],
    ):
        assert main(["table2_perplexity", str(results), "--format", "csv", *options]) == 0
        assert len(pd.read_csv(io.StringIO(capsys.readouterr().out))) == 3


def test_all_draws_what_it_can(results, tmp_path, capsys):
    assert main(["all", str(results), "--format", "csv", "--output", str(tmp_path / "tables")]) == 0
    assert {path.stem for path in (tmp_path / "tables").glob("*.csv")} == set(CATALOGUE)
    assert (tmp_path / "tables" / "figure6_speedup.png").is_file()
    assert main(["all", str(results), "--format", "csv"]) == 1
    assert "add --output DIR" in capsys.readouterr().err
    write_json(results / "cpu" / "llama-7b" / "cell" / "record.json", cell_record("fp16", value=5.7, digest="9"))
    assert main(["all", str(results), "--format", "md"]) == 1
    captured = capsys.readouterr()
    assert "table2_perplexity: records of 2 protocols" in captured.err
    assert "(the paper's table 6)" in captured.out


def test_gemm_command(results, tmp_path, capsys):
    files = sorted(map(str, (results / "gpu" / "gemm").glob("*.json")))
    assert main(["gemm", *files, "--format", "csv", "--plot", str(tmp_path / "gemm.png")]) == 0
    captured = capsys.readouterr()
    assert "plans.json: not a result of fastgemm.bench" in captured.err
    frame = pd.read_csv(io.StringIO(captured.out))
    assert frame["speedup_over_fp16"].tolist() == [3.0, 1.0, 3.0, 1.0]
    assert (tmp_path / "gemm.svg").is_file()
    assert main(["gemm", files[1]]) == 1
    assert main(["gemm", str(tmp_path / "gone.json")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_status_lists_every_cell_failures_first(tmp_path, capsys):
    write_json(tmp_path / "m" / "fp16-0" / "record.json", cell_record("fp16", "m", value=1.0))
    write_json(tmp_path / "m" / "odyssey-1" / "record.json", cell_record("odyssey", "m", outcome="oom"))
    (tmp_path / "m" / "rtn-2").mkdir()
    (tmp_path / "m" / "rtn-2" / "config.yaml").write_text("method: rtn\n")
    assert main(["status", str(tmp_path), "--format", "csv"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert frame["outcome"].tolist() == ["oom", "no record", "ok"]
    assert frame["reason"].tolist()[0] == "the reason"
    assert frame["seconds"].tolist()[::2] == [12.0, 12.0]
    assert frame["host"].tolist()[0] == "here"
    assert main(["status", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "3 cells: " in text
    assert "retry=failed" in text
    assert main(["status", str(tmp_path / "none")]) == 1


def test_report_names_figures_and_commands_that_exist(results, capsys):
    assert main(["report", str(results)]) == 0
    text = (results / "README.md").read_text()
    assert text.splitlines()[2].startswith("Generated by")
    for figure in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (results / figure).stat().st_size < 200_000
    assert len(re.findall(r"\]\(figures/", text)) == 3
    assert "| testbed | OdysseyLLM | W4A8 | 36.500 |" in text
    assert "| LLaMA-7B | FP16 | W16A16 | not run (1) | 5.730 |" in text
    assert "(1) not run: " in text
    assert "plans.json" in text
    capsys.readouterr()
    # The commands in the report are taken by the command line and draw the same rows.
    commands = re.findall(r"`python -m experiments (.+)`", text)
    assert len(commands) >= 9
    (perplexity,) = [command for command in commands if command.startswith("table2_perplexity --protocol")]
    name, *options = perplexity.split()
    assert main([name, str(results), *options, "--format", "md"]) == 0
    assert "| testbed | OdysseyLLM | W4A8 | 36.500 |" in capsys.readouterr().out


def test_report_of_nothing_has_the_papers_figures(tmp_path):
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "not run" in text
    assert "5.730" in text


def test_report_is_the_same_again(results):
    main(["report", str(results)])
    before = {path.name: path.read_bytes() for path in [results / "README.md", *(results / "figures").iterdir()]}
    main(["report", str(results)])
    after = {path.name: path.read_bytes() for path in [results / "README.md", *(results / "figures").iterdir()]}
    assert before == after


def test_missing_directories_are_named(tmp_path, capsys):
    assert main(["table6_ablation", str(tmp_path / "none")]) == 1
    assert "no such directory" in capsys.readouterr().err
    (tmp_path / "file.json").write_text("{}")
    for name in ("table6_ablation", "status"):
        assert main([name, str(tmp_path / "file.json")]) == 1
        assert "file.json: not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "experiment=table2_perplexity", "model=llama-7b"],
        ["-m", "experiment=table2_perplexity", "method=fp16"],
        ["-m", "experiment=table2_perplexity", "model=llama2-7b", "method=smoothquant", "method.alpha=0.85"],
        ["-m", "experiment=table6_ablation", "retry=failed"],
        ["-m", "experiment=testbed", "model.path=somewhere"],
        ["-m", "experiment=testbed", "model.path=somewhere", "accuracy.perplexity.path=text.txt"],
    ],
)
def test_prepared_sweeps(project_root, arguments):
    register_schemas()
    check_command_line(arguments, project_root / "conf")


def test_prepared_sweeps_refuse_what_they_cannot_take(project_root):
    register_schemas()
    with pytest.raises(ConfigError, match=r"method.alpha: unknown key"):
        check_command_line(
            ["-m", "experiment=table2_perplexity", "model=llama-7b", "method.alpha=0.85"], project_root / "conf"
        )


def test_the_commands_of_the_committed_report_draw_its_sections(capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    committed = load_sources([Path("results")])
    monkeypatch.setattr("experiments.__main__.load_sources", lambda directories: committed)
    sections = re.findall(r"^### .*?(?=^##|\Z)", (root / "results" / "README.md").read_text(), re.M | re.S)
    for section in sections:
        command = re.search(r"^`python -m experiments (.*)`$", section, re.M)[1]
        assert main([*command.split(), "--format", "md"]) == 0, command
        body = capsys.readouterr().out.split("\n", 2)[2].strip()
        assert body
        assert body in section, command
        # A long table is folded, so that the file can be read.
        assert ("<details>" in section) == (body.count("\n| ") > 40 or command.startswith("gemm ")), command
    assert len(sections) > 20
