"""W&B offline, without an account: what a run holds, read back from disk; and that no failure of it costs a cell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import write_checkpoint
from helpers.records import cell_record, gemm_result
from helpers.sweeps import ROOT, sweep_environment

from experiments.tracked import scalars, track_cell, track_sweep
from odyssey.config import TrackingConfig
from odyssey.record import write_json
from odyssey.tracking import TrackingJob, track

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def cell(tmp_path):
    """A quantized cell's record, directory and output directory."""
    record = cell_record("odyssey", "testbed", value=36.5, dataset="wikitext2", digest="abc", bits=4)
    record["quantization"] = {"checkpoint": "testbed/checkpoints/odyssey-1"}
    record["size"] = {"disk_bytes": 2_000_000, "bits_per_weight": 4.1}
    directory = tmp_path / "testbed" / "odyssey-abc"
    write_json(directory / "record.json", record)
    write_json(tmp_path / "testbed" / "checkpoints" / "odyssey-1" / "odyssey.json", {"job": "1", "layers": {}})
    return record, directory, tmp_path


def _inspect(run_file: Path) -> tuple[dict, list[dict]]:
    """The summary of an offline run and its records, as wandb's own reader gives them."""
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
    summary = subprocess.run([*command, "--summary", run_file], capture_output=True, text=True, check=True).stdout
    lines = subprocess.run([*command, run_file], capture_output=True, text=True, check=True).stdout.splitlines()
    return json.loads(summary), [json.loads(line) for line in lines]


def _run_file(directory: Path) -> Path:
    (found,) = directory.glob("wandb/offline-run-*/*.wandb")
    return found


def _table(run_file: Path, name: str) -> list[dict]:
    (file,) = (run_file.parent / "files" / "media" / "table").glob(f"{name}_*.table.json")
    content = json.loads(file.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_a_cells_run_read_back(cell):
    record, directory, output_dir = cell
    assert track_cell(TrackingConfig(backend="wandb"), record, directory, output_dir, "sweep-1")
    run_file = _run_file(directory)
    summary, records = _inspect(run_file)
    text = json.dumps(summary)
    assert '"testbed OdysseyLLM"' in text
    values = summary["summary"]
    assert values["accuracy.perplexity.wikitext2.value"] == 36.5
    assert values["size.bits_per_weight"] == 4.1
    assert values["outcome"] == "ok"
    assert summary["config"]["method"]["bits"] == 4
    logged = json.dumps(records)
    assert '"sweep-1"' in logged
    # The artifact's manifest names the record and the checkpoint's manifest, by their content.
    assert "record-abc" in logged
    assert '"record.json"' in logged
    assert '"odyssey.json"' in logged

    (row,) = _table(run_file, "table2_perplexity")
    assert row["measured"] == 36.5
    assert row["method"] == "OdysseyLLM"
    assert row["commit"] == "0123456"
    images = list((run_file.parent / "files" / "media" / "images").rglob("*.png"))
    assert images
    assert all(image.read_bytes().startswith(PNG) for image in images)


def test_a_sweeps_run_has_the_tables_of_all_cells_and_the_figures(tmp_path):
    cells = []
    for number, (method, value) in enumerate((("fp16", 36.0), ("rtn", 37.0), ("odyssey", 36.5))):
        record = cell_record(method, "testbed", value=value, digest=str(number))
        record["size"] = {"disk_bytes": 10**6 * (number + 1), "bits_per_weight": 16 / (number + 1)}
        cells.append((record, tmp_path / "testbed" / f"{method}-{number}"))
    failed = cell_record("gptq", "testbed", outcome="oom", digest="9")
    gemm = cell_record("fp16", "gemm", digest="g")
    gemm["config"]["accuracy"]["perplexity"] = None
    gemm["gemm"] = {"file": "gemm.json"}
    kinds = [(64, 64, 1, kernel, time, True) for kernel, time in (("fastgemm", 1.0), ("grouped", 3.0))]
    write_json(tmp_path / "gemm" / "fastgemm-g" / "gemm.json", gemm_result(kinds))
    cells += [(failed, tmp_path / "testbed" / "gptq-9"), (gemm, tmp_path / "gemm" / "fastgemm-g")]
    sweep = tmp_path / "sweeps" / "monday"
    sweep.mkdir(parents=True)
    assert track_sweep(TrackingConfig(backend="wandb", group="mine"), cells, sweep, "monday")
    run_file = _run_file(sweep)
    summary, records = _inspect(run_file)
    assert summary["summary"]["cells"] == 5
    assert summary["summary"]["ok"] == 4
    assert '"mine"' in json.dumps(records)
    rows = [row for row in _table(run_file, "table2_perplexity") if row["model"] == "testbed"]
    measured = {row["method"]: row["measured"] for row in rows}
    assert measured == {"FP16": 36.0, "RTN": 37.0, "OdysseyLLM": 36.5, "GPTQ": None}
    assert any(row["paper"] == 5.73 for row in _table(run_file, "table2_perplexity"))
    assert {row["outcome"] for row in _table(run_file, "overview")} == {"ok", "oom"}
    assert _table(run_file, "figure7_gemm_kinds")
    names = {path.name.rpartition("_0_")[0] for path in (run_file.parent / "files" / "media" / "images").rglob("*.png")}
    assert {"figure7_gemm_kinds", "overview"} <= names


def test_what_a_tracker_cannot_do_is_one_line(cell, tmp_path, capsys):
    record, directory, output_dir = cell
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where wandb wants a directory")
    before = (directory / "record.json").read_bytes()
    assert not track_cell(TrackingConfig(backend="wandb", dir=str(blocked)), record, directory, output_dir, None)
    assert not track_cell(TrackingConfig(backend="wandb", timeout_s=0.01), record, directory, output_dir, None)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "cannot be written" in errors[0]
    assert "tracking.dir" in errors[0]
    assert "tracking.timeout_s=0.01" in errors[1]
    assert (directory / "record.json").read_bytes() == before


def test_online_without_an_account_is_one_line(cell, tmp_path, capsys, monkeypatch):
    record, directory, output_dir = cell
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    # A port that nobody listens on in place of W&B's server.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracking = TrackingConfig(backend="wandb", mode="online", timeout_s=60)
    assert not track_cell(tracking, record, directory, output_dir, None)
    assert capsys.readouterr().err.count("\n") == 1


def test_a_job_survives_its_way_through_a_pipe():
    job = TrackingJob(TrackingConfig(backend="wandb"), "d", "n", None, "cell", scalars={"a": 1.5, "outcome": "ok"})
    assert TrackingJob.from_json(job.to_json()) == job


def test_figures_that_json_cannot_hold_do_not_fail_a_cell(capsys):
    job = TrackingJob(TrackingConfig(backend="wandb"), "d", "n", None, "cell", config={"path": Path("x")})
    assert not track(job)
    assert "not logged" in capsys.readouterr().err


def test_scalars_of_a_record():
    record = {
        "accuracy": {"perplexity": {"file": {"value": 12.5, "windows": 3, "nll": [1.0], "simulated": False}}},
        "timings": {"total_s": 2.0},
        "config": {"seed": 0},
    }
    assert scalars(record) == {
        "accuracy.perplexity.file.value": 12.5, "accuracy.perplexity.file.windows": 3, "timings.total_s": 2.0,
    }  # fmt: skip


def test_tracking_none_imports_no_wandb(tmp_path):
    """A wandb that cannot be imported stands in the way: a cell with tracking=none does not meet it."""
    (tmp_path / "wandb.py").write_text("raise ImportError('this machine has no wandb')")
    environment = sweep_environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    write_checkpoint(tmp_path / "model", layers=1)
    (tmp_path / "text.txt").write_text("Waltz, bad nymph, for quick jigs vex. " * 4)
    command = [
        sys.executable, str(ROOT / "run.py"), "method=fp16", f"model.path={tmp_path / 'model'}", "device=cpu",
        f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    measured = [f"accuracy.perplexity.path={tmp_path / 'text.txt'}", "accuracy.perplexity.window=64"]
    done = subprocess.run([*command, *measured], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    tracked = subprocess.run([*command, "accuracy=none", "tracking=wandb"], capture_output=True, text=True,
                             check=False, env=environment)  # fmt: skip
    assert tracked.returncode == 0
    assert "this machine has no wandb" in tracked.stderr
