"""hydra.launcher.*: what is refused before any work starts, what a cell asks of Slurm, what Slurm's words mean."""

import subprocess

import pytest

from experiments.launchers import settings as module
from experiments.launchers.settings import LocalSettings, SlurmSettings, parse_settings, visible_gpus
from experiments.launchers.slurm import Request, request_for
from experiments.launchers.slurm_queue import JobState, expand_tasks, job_states, outcome_of
from experiments.sweep import retry_command
from odyssey.config import register_schemas
from odyssey.errors import ConfigError
from odyssey.overrides import check_command_line
from odyssey.preflight import Prediction

GIB = 2**30
LOCAL, SLURM = "hydra_plugins.odyssey_launchers.LocalLauncher", "hydra_plugins.odyssey_launchers.SlurmLauncher"


@pytest.fixture(autouse=True)
def _slurm_is_here(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda program: f"/usr/bin/{program}")


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        (LOCAL, {"jobs": 0}, "hydra.launcher.jobs=0: allowed: auto, or a number of at least 1"),
        (LOCAL, {"jobs": "many"}, "hydra.launcher.jobs=many"),
        (LOCAL, {"gpus": 2}, r"hydra.launcher.gpus=2: must be a list such as \[0,1\]"),
        (LOCAL, {"partition": "a"}, "hydra.launcher.partition: unknown key; it takes: gpus, jobs"),
        (SLURM, {"cpus": 0}, "hydra.launcher.cpus=0: must be a whole number of at least 1"),
        (SLURM, {"time_min": 1.5}, "hydra.launcher.time_min=1.5"),
        (SLURM, {"memory_factor": 0}, "hydra.launcher.memory_factor=0: must be more than 0"),
        (SLURM, {"gpus": "two"}, "hydra.launcher.gpus=two: allowed: auto, or a number of at least 0"),
        (SLURM, {"setup": "module load"}, "setup must be a list"),
    ],
)
def test_what_is_refused(target, values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings({"_target_": target, **values})
    assert "\n" not in str(caught.value)


def test_what_is_taken():
    assert parse_settings({"_target_": LOCAL, "jobs": "auto", "gpus": [0, 1]}) == LocalSettings("auto", [0, 1])
    assert parse_settings({"_target_": SLURM, "partition": "p"}) == SlurmSettings(partition="p")
    assert parse_settings({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}) is None
    assert parse_settings({}) is None


def test_slurm_without_slurm_says_so(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda program: None)
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        parse_settings({"_target_": SLURM})


def test_the_composed_launchers_have_the_keys_of_their_settings(project_root):
    register_schemas()
    for name, kind in (("local", LocalSettings), ("slurm", SlurmSettings)):
        line = check_command_line(["-m", "method=fp16,rtn", f"hydra/launcher={name}"], project_root / "conf")
        assert parse_settings(line.launcher) == kind()
        assert line.settings == ["method=fp16", "method=rtn"]
        assert line.is_sweep
    assert not check_command_line(["method=rtn"], project_root / "conf").is_sweep
    with pytest.raises(ConfigError, match="hydra.launcher.nodes"):
        check_command_line(["-m", "method=rtn", "hydra.launcher.nodes=2"], project_root / "conf")


@pytest.mark.parametrize(
    ("visible", "listed", "found"),
    [("0,2", "", ["0", "2"]), ("", "0\n1\n", []), ("-1", "0\n", []), (None, "0\n1\n", ["0", "1"]), (None, None, [])],
)
def test_the_gpus_of_this_machine(monkeypatch, visible, listed, found):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def nvidia_smi(command, **options):
        if listed is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, listed)

    monkeypatch.setattr(module.subprocess, "run", nvidia_smi)
    assert visible_gpus() == found


def _prediction(host_gib=10.0, seconds=60.0):
    return Prediction("odyssey", "m", 0, int(host_gib * GIB), 0, seconds)


def test_what_a_cell_asks_for_comes_from_its_prediction():
    settings = SlurmSettings(partition="cpu", gpu_partition="gpu")
    assert request_for(_prediction(), "cpu", settings) == Request("cpu", 0, 15, 30)
    assert request_for(_prediction(10.1, 3600 * 1.1), "auto", settings) == Request("gpu", 1, 16, 240)
    fixed = SlurmSettings(memory_gb=7, time_min=90, gpus=2)
    assert request_for(_prediction(100, 10**6), "cuda", fixed) == Request(None, 2, 7, 90)
    assert request_for(_prediction(), "cuda", SlurmSettings(gpus=0, partition="cpu")).partition == "cpu"


@pytest.mark.parametrize(
    ("text", "tasks"), [("3", [3]), ("0-2", [0, 1, 2]), ("0,4-6%2", [0, 4, 5, 6]), ("N/A", []), ("", [])]
)
def test_array_indices(text, tasks):
    assert expand_tasks(text) == tasks


def test_states_are_read_from_scontrol(monkeypatch):
    shown = (
        "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobName=a JobState=RUNNING Reason=None ExitCode=0:0 NodeList=n1\n"
        "JobId=7 ArrayJobId=7 ArrayTaskId=1-2%1 JobState=PENDING Reason=JobArrayTaskLimit NodeList=(null)\n"
    )
    single = "JobId=9 JobName=b JobState=COMPLETED Reason=None ExitCode=0:0 NodeList=n1\n"
    answers = {"7": shown, "9": single, "5": ""}
    monkeypatch.setattr(
        "experiments.launchers.slurm_queue.subprocess.run",
        lambda command, **options: subprocess.CompletedProcess(command, 0, answers[command[-1]]),
    )
    states = job_states(["5", "7", "9"])
    assert set(states) == {"7_0", "7_1", "7_2", "9"}
    assert states["7_0"].text() == "running on n1"
    assert states["7_2"].text() == "pending (JobArrayTaskLimit)"
    assert states["9"].name == "COMPLETED"


@pytest.mark.parametrize(
    ("state", "log", "outcome"),
    [
        (JobState("OUT_OF_MEMORY"), "", "oom"),
        (JobState("FAILED", exit_code="0:9"), "slurmstepd: error: Exceeded job memory limit", "oom"),
        (JobState("CANCELLED"), "StepId=3.0 exceeded memory limit (9 > 8), being killed", "oom"),
        (JobState("TIMEOUT"), "", "timeout"),
        (JobState("FAILED"), "error: *** JOB 3 ON n CANCELLED AT x DUE TO TIME LIMIT ***", "timeout"),
        (JobState("FAILED", exit_code="140:0"), "", "timeout"),
        (JobState("CANCELLED"), "", "interrupted"),
        (JobState("NODE_FAIL", exit_code="1:0"), "", "crash"),
        (None, "", "crash"),
    ],
)
def test_what_slurms_word_makes_of_a_cell(tmp_path, state, log, outcome):
    file = tmp_path / "log.out"
    file.write_text(log)
    found, reason = outcome_of(state, "3_1", file)
    assert found == outcome
    assert "3_1" in reason


def test_the_command_that_runs_failed_cells_again():
    arguments = ["-m", "method=fp16,rtn", "model.path=/a b/${method.name}", "retry=none", "force=true"]
    command = retry_command(arguments)
    assert command == "python run.py -m method=fp16,rtn 'model.path=/a b/${method.name}' retry=failed"
