"""Sweeps on this machine in which cells run out of memory, hang, die, are interrupted: the others do not notice."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.checkpoints import write_checkpoint
from helpers.sweeps import assert_same_results, outcomes, records, run, start, sweep_environment

# Each of these starts several processes that import torch.
pytestmark = pytest.mark.timeout(900)

TEXT = "Sphinx of black quartz, judge my vow. " * 20
FIRST_BLOCK = "out/model/checkpoints/{method}-*/block-00000.safetensors"


@pytest.fixture
def workspace(tmp_path):
    write_checkpoint(tmp_path / "model", layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def _arguments(workspace, *more: str, output: str = "out") -> list[str]:
    text = workspace / "text.txt"
    return [
        "-m", f"model.path={workspace / 'model'}", f"output_dir={workspace / output}", "device=cpu",
        f"calibration.path={text}", "calibration.num_samples=1", "calibration.seqlen=64",
        f"accuracy.perplexity.path={text}", "accuracy.perplexity.window=64", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_out_of_memory_timeout_and_kill_cost_no_other_cell(workspace):
    methods = "method=rtn,smoothquant,gptq,fp16"
    arguments = _arguments(workspace, methods, "timeout_s=90", "hydra.launcher.jobs=2")
    swept = run(arguments, faults="gptq=oom,smoothquant=hang,rtn=kill")
    assert swept.returncode == 1, swept.stdout + swept.stderr
    found = records(workspace / "out")
    assert {method: record["outcome"] for method, record in found.items()} == {
        "fp16": "ok", "gptq": "oom", "smoothquant": "timeout", "rtn": "crash",
    }  # fmt: skip
    assert "timeout_s=90" in found["smoothquant"]["reason"]
    assert found["smoothquant"]["timings"]["total_s"] < 120
    assert "SIGKILL" in found["rtn"]["reason"]
    assert any("quantizing" in line or "oom" in line for line in found["gptq"]["log_tail"])
    assert "3 of 4 cells did not end ok" in swept.stdout
    assert f"run only these again: python run.py -m model.path={workspace / 'model'}" in swept.stdout
    assert swept.stdout.rstrip().endswith("retry=failed")
    kept = found["fp16"]["path"].stat().st_mtime_ns

    again = run([*arguments, "retry=failed"])
    assert again.returncode == 0, again.stdout + again.stderr
    assert set(outcomes(workspace / "out").values()) == {"ok"}
    assert records(workspace / "out")["fp16"]["path"].stat().st_mtime_ns == kept
    clean = run(_arguments(workspace, methods, output="clean"))
    assert clean.returncode == 0
    assert_same_results(workspace / "clean", workspace / "out", ("fp16", "rtn", "smoothquant", "gptq"))


def _wait_for(condition, seconds: float = 400):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(workspace, ending):
    arguments = _arguments(workspace, "method=rtn,odyssey", "hydra.launcher.jobs=2")
    sweep = start(arguments, faults="odyssey=hang")
    _wait_for(lambda: list(workspace.glob("out/model/rtn-*/record.json")))
    _wait_for(lambda: list(workspace.glob(FIRST_BLOCK.format(method="odyssey"))))
    cells = [child for child in psutil.Process(sweep.pid).children(recursive=True) if child.is_running()]
    assert cells
    sweep.send_signal(ending)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "stopped: finished records are kept; run the same command again to go on" in errors
    _, alive = psutil.wait_procs(cells, timeout=10)
    assert not alive
    found = records(workspace / "out")
    assert found["rtn"]["outcome"] == "ok"
    assert found["odyssey"]["outcome"] == "interrupted"
    again = run([*arguments, "retry=failed"])
    assert again.returncode == 0, again.stderr
    assert records(workspace / "out")["odyssey"]["quantization"]["resumed_blocks"] >= 1


def test_a_killed_run_takes_its_cell_along_and_the_next_goes_on(workspace):
    arguments = _arguments(workspace, "method=odyssey")
    sweep = start(arguments, faults="odyssey=hang")
    _wait_for(lambda: list(workspace.glob(FIRST_BLOCK.format(method="odyssey"))))
    cells = psutil.Process(sweep.pid).children(recursive=True)
    sweep.kill()
    sweep.communicate()
    _, alive = psutil.wait_procs(cells, timeout=10)
    assert not alive
    # Neither a record nor one that reads as done; half of one is none.
    (directory,) = (workspace / "out" / "model").glob("odyssey-*")
    assert not (directory / "record.json").exists()
    whole = json.dumps({"outcome": "ok", "config": {}, "digest": "x"})
    (directory / "record.json").write_text(whole[: len(whole) // 2])
    again = run(arguments)
    assert again.returncode == 0, again.stderr
    assert records(workspace / "out")["odyssey"]["outcome"] == "ok"


def test_two_sweeps_of_one_cell_run_it_once(workspace):
    arguments = _arguments(workspace, "method=gptq")
    sweeps = [start(arguments), start(arguments)]
    said = "".join(sweep.communicate()[0] for sweep in sweeps)
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    assert said.count("running, log in") == 1
    assert said.count("record found, nothing to do") == 1
    # Each has its own directory, also where both start in one second.
    assert len(list((workspace / "out" / "sweeps").iterdir())) == 2


@pytest.mark.parametrize("is_parent", [True, False])
def test_a_cell_whose_parent_died_before_it_could_ask_ends(is_parent):
    script = "from odyssey.child import die_with_parent; die_with_parent(); print('goes on')"
    parent = os.getpid() if is_parent else 2**22 + 1
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env=sweep_environment(ODYSSEY_PARENT_PID=str(parent)),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == ((0, "goes on\n") if is_parent else (-signal.SIGKILL, ""))


def test_a_cell_beside_others_has_its_gpu_and_its_share_of_the_cores(workspace, monkeypatch):
    import threading
    from types import SimpleNamespace

    from experiments.launchers import local
    from experiments.sweep import SweepJob

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen, active, most, lock = [], set(), [], threading.Lock()

    def run_job(config, sweep_dir, number, *, environment, label_lines):
        gpu = environment.get("CUDA_VISIBLE_DEVICES")
        with lock:
            assert gpu == "" or gpu not in active, "two cells on one GPU"
            active.add(gpu)
            most.append(len(active - {""}))
            seen.append((number, gpu, environment["OMP_NUM_THREADS"]))
        time.sleep(0.1)
        with lock:
            active.discard(gpu)

    monkeypatch.setattr(local, "run_job", run_job)
    devices = ["auto", "cuda", "cpu", "auto", "cuda", "cpu"]
    jobs = [SweepJob(number, SimpleNamespace(device=device)) for number, device in enumerate(devices)]
    local.launch(jobs, workspace, {"jobs": 4, "gpus": [0, "GPU-7"]})
    assert sorted(number for number, _, _ in seen) == list(range(6))
    assert {gpu for number, gpu, _ in seen if devices[number] == "cpu"} == {""}
    assert {gpu for number, gpu, _ in seen if devices[number] != "cpu"} == {"0", "GPU-7"}
    assert max(most) == 2
    share = max(1, len(os.sched_getaffinity(0)) // 4)
    assert {threads for _, _, threads in seen} == {str(share)}


def test_a_cell_that_cannot_even_start_is_named_and_the_others_run(workspace, monkeypatch, capsys):
    from types import SimpleNamespace

    from experiments import sweep
    from experiments.launchers import local

    def run_job(config, sweep_dir, number, **options):
        if number == 0:
            raise OSError(30, "Read-only file system")
        ran.append(number)

    ran = []
    monkeypatch.setattr(local, "run_job", run_job)
    monkeypatch.setattr(sweep, "_exit_code", 0)
    local.launch([sweep.SweepJob(n, SimpleNamespace(device="cpu")) for n in range(3)], workspace, {"jobs": 1})
    assert ran == [1, 2]
    (error,) = sweep.sweep_errors(workspace)
    assert "cell 0: OSError" in error
