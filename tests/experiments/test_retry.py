"""retry=failed: what is run again, what is left alone, and what a sweep with nothing to retry ends with."""

import contextlib

import pytest
from helpers.cells import cell_config
from helpers.records import cell_record
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import odyssey.runner as runner
from experiments import sweep
from odyssey.config import (
    AccuracyConfig,
    CalibrationConfig,
    DataConfig,
    LatencyConfig,
    TrackingConfig,
    register_schemas,
)
from odyssey.errors import ConfigError
from odyssey.overrides import check_command_line
from odyssey.record import cell_digest, read_record, write_json


@pytest.fixture
def cell(project_root, tmp_path):
    """Runs one cell of the embedded model whose child is a stand-in; returns what the child was asked."""
    register_schemas()

    class Cell:
        started = 0
        outcome = "ok"

        def __call__(self, *overrides):
            with initialize_config_dir(str(project_root / "conf"), version_base="1.3"):
                config = compose("config", overrides=["method=rtn", f"output_dir={tmp_path}", *overrides])
            return runner.run_cell(config)

        def child(self, config, directory, digest, environment, line_label):
            self.started += 1
            plain = OmegaConf.to_container(config, resolve=True)
            record = {"outcome": self.outcome, "reason": "why", "config": plain, "digest": digest}
            write_json(directory / runner.RECORD_NAME, record)
            return record

    return Cell()


def test_only_cells_that_failed_are_run_again(cell, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_run_child", cell.child)
    left_out = cell("retry=failed")
    assert (left_out.record, cell.started) == (None, 0)
    assert "left out" in capsys.readouterr().out
    assert not left_out.path.parent.exists()

    cell.outcome = "oom"
    assert cell().record["outcome"] == "oom"
    cell.outcome = "ok"
    retried = cell("retry=failed")
    assert (retried.record["outcome"], retried.reused, cell.started) == ("ok", False, 2)

    again = cell("retry=failed")
    assert (again.reused, cell.started) == (True, 2)


def test_a_cell_whose_model_has_appeared_since_it_failed(cell, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "_run_child", cell.child)
    monkeypatch.setattr(runner, "_fingerprint", lambda config: "unreadable")
    cell.outcome = "missing-model"
    failed = cell()
    monkeypatch.setattr(runner, "_fingerprint", lambda config: "0123")
    cell.outcome = "ok"
    assert cell("retry=failed", "seed=1").record is None
    retried = cell("retry=failed")
    assert retried.record["outcome"] == "ok"
    assert retried.path != failed.path
    # The failure is not left behind beside the result.
    assert not failed.path.parent.exists()
    assert list(tmp_path.glob("*/*/record.json")) == [retried.path]


def test_retry_is_no_part_of_what_a_cell_is(cell, monkeypatch):
    monkeypatch.setattr(runner, "_run_child", cell.child)
    assert cell().path == cell("retry=failed").path


def test_an_interrupted_cell_leaves_a_record_that_is_retried(cell, monkeypatch):
    def interrupted(self, timeout_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.ChildProcess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cell()
    monkeypatch.setattr(runner, "_run_child", cell.child)
    (path,) = runner.Path(cell("retry=failed").path).parent.parent.glob("*/record.json")
    assert cell.started == 1
    assert read_record(path)["outcome"] == "ok"


def test_what_is_refused(project_root):
    register_schemas()
    with pytest.raises(ConfigError, match="retry=all: allowed: none, failed"):
        check_command_line(["retry=all"], project_root / "conf")
    with pytest.raises(ConfigError, match="retry=failed: cannot be combined with force=true"):
        check_command_line(["retry=failed", "force=true"], project_root / "conf")
    check_command_line(["-m", "method=fp16,rtn", "retry=failed"], project_root / "conf")


@pytest.mark.parametrize(("retry", "code"), [("failed", 0), ("none", 1)])
def test_a_sweep_without_any_record(tmp_path, monkeypatch, capsys, retry, code):
    monkeypatch.setattr(sweep, "_exit_code", -1)
    sweep.note_cell(tmp_path, 0, tmp_path / "absent" / "record.json", reused=False)
    config = OmegaConf.create({"retry": retry, "hydra": {"sweep": {"dir": str(tmp_path)}}})
    sweep.SweepSummary().on_multirun_end(config)
    assert sweep.sweep_exit_code() == code
    assert ("nothing was run" in capsys.readouterr().out) == (retry == "failed")


@pytest.mark.parametrize(
    ("error", "outcome"), [(OSError(28, "No space left on device"), "ok"), (RuntimeError("no font"), "failed")]
)
def test_a_summary_that_cannot_be_drawn_hides_no_failure(tmp_path, monkeypatch, capsys, error, outcome):
    def fail(*arguments):
        raise error

    write_json(tmp_path / "m" / "rtn-0" / "record.json", cell_record("rtn", outcome=outcome))
    sweep.note_cell(tmp_path, 0, tmp_path / "m" / "rtn-0" / "record.json", reused=False)
    monkeypatch.setattr(sweep, "_exit_code", 0)
    monkeypatch.setattr("experiments.overview.plot_overview", fail)
    config = OmegaConf.create(
        {"retry": "none", "hydra": {"sweep": {"dir": str(tmp_path)}}, "tracking": {"backend": "none"}}
    )
    with contextlib.suppress(RuntimeError):
        sweep.SweepSummary().on_multirun_end(config)
    assert sweep.sweep_exit_code() == 1
    if isinstance(error, OSError):
        assert "the overview was not written" in capsys.readouterr().err


def test_what_makes_another_cell_and_what_does_not(tmp_path):
    def digest(fingerprint="m", **changes):
        return cell_digest(cell_config(tmp_path, None, changes.pop("method", "rtn"), **changes), fingerprint)

    others = [
        {"fingerprint": "n"}, {"method": "gptq"}, {"seed": 1}, {"device": "cuda"}, {"data": DataConfig("data")},
        {"calibration": CalibrationConfig(seed=1)}, {"accuracy": AccuracyConfig(limit=3)},
        {"latency": LatencyConfig(repeats=6)},
    ]  # fmt: skip
    assert len({digest(), *(digest(**each) for each in others)}) == 1 + len(others)
    asked = {"output_dir": "x", "force": True, "retry": "failed", "timeout_s": 5.0, "preflight": True}
    assert {digest(**{key: value}) for key, value in asked.items()} == {digest()}
    assert digest(tracking=TrackingConfig("wandb")) == digest()


def test_a_cell_without_a_record_fails_its_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "_exit_code", 0)
    monkeypatch.setattr("experiments.overview.plot_overview", lambda *arguments: False)
    write_json(tmp_path / "m" / "rtn-0" / "record.json", cell_record("rtn"))
    sweep.note_cell(tmp_path, 0, tmp_path / "m" / "rtn-0" / "record.json", reused=False)
    sweep.note_error(tmp_path, 1, "cell 1: OSError: no space")
    config = OmegaConf.create(
        {"retry": "none", "hydra": {"sweep": {"dir": str(tmp_path)}}, "tracking": {"backend": "none"}}
    )
    sweep.SweepSummary().on_multirun_end(config)
    assert sweep.sweep_exit_code() == 1
    assert "error: cell 1: OSError: no space" in capsys.readouterr().err


def test_an_error_that_the_sweeps_directory_cannot_take_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_unwritten", [])
    (tmp_path / "cells").touch()
    sweep.note_error(tmp_path, 3, "cell 3: OSError: no space")
    assert sweep.sweep_errors(tmp_path) == ["cell 3: OSError: no space"]


def test_a_sweeps_summary_gives_the_log_but_the_reason_once(tmp_path, capsys):
    record = {"outcome": "gated", "reason": "log in first", "log_tail": ["looking for it", "gated: log in first"]}
    sweep._print_failures([(record, tmp_path / "model" / "cell")], 3)
    shown = capsys.readouterr().out
    assert "1 of 3 cells did not end ok" in shown
    assert "| looking for it" in shown
    assert shown.count("log in first") == 1
