"""hydra/launcher=slurm on a real Slurm: limits, preemption, cancelling, what is asked for."""

import json
import re
import subprocess
import time

import pytest
from helpers.checkpoints import write_checkpoint
from helpers.sweeps import assert_same_results, integers, outcomes, records, run, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

TEXT = "How vexingly quick daft zebras jump. " * 120
FIRST_BLOCK = "out/model/checkpoints/odyssey-*/block-00000.safetensors"
SLURM = ["hydra/launcher=slurm", "hydra.launcher.cpus=1", "hydra.launcher.poll_s=1"]


@pytest.fixture
def workspace(tmp_path):
    write_checkpoint(tmp_path / "model", layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def _arguments(workspace, output: str, *more: str) -> list[str]:
    text = workspace / "text.txt"
    return [
        "-m", f"model.path={workspace / 'model'}", f"output_dir={workspace / output}", "device=cpu",
        f"calibration.path={text}", "calibration.num_samples=4", "calibration.seqlen=64",
        f"accuracy.perplexity.path={text}", "accuracy.perplexity.window=64", *more,
    ]  # fmt: skip


def _wait_for(condition, what: str, seconds: float = 240):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.2)
    return found


def _job_id(sweep, seen: list[str]) -> str:
    for line in sweep.stdout:
        seen.append(line)
        if match := re.match(r"Slurm job (\d+):", line):
            return match[1]
    raise AssertionError("".join(seen) + sweep.stderr.read())


def _shown(job: str) -> dict[str, str]:
    text = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", text))


def test_four_cells_one_over_time_one_over_memory(slurm, workspace, report):
    methods = "method=fp16,rtn,gptq,odyssey"
    limits = ["hydra.launcher.time_min=4", "hydra.launcher.signal_delay_s=60", "hydra.launcher.max_requeues=0",
              "hydra.launcher.memory_gb=2"]  # fmt: skip
    arguments = _arguments(workspace, "slurm", methods, *SLURM, *limits)
    swept = run(arguments, faults="gptq=hog,odyssey=hang")
    assert swept.returncode == 1, swept.stdout + swept.stderr
    assert outcomes(workspace / "slurm") == {"fp16": "ok", "rtn": "ok", "gptq": "oom", "odyssey": "timeout"}
    found = records(workspace / "slurm")
    assert "raise memory_gb" in found["gptq"]["reason"]
    assert "raise time_min" in found["odyssey"]["reason"]
    assert any("odyssey: running" in line for line in found["odyssey"]["log_tail"])
    assert "2 of 4 cells did not end ok" in swept.stdout
    assert "retry=failed" in swept.stdout
    finished = {method: found[method]["path"].stat().st_mtime_ns for method in ("fp16", "rtn")}

    again = run([*arguments, "retry=failed"])
    assert again.returncode == 0, again.stdout + again.stderr
    assert set(outcomes(workspace / "slurm").values()) == {"ok"}
    found = records(workspace / "slurm")
    assert {method: found[method]["path"].stat().st_mtime_ns for method in finished} == finished
    # What was finished before the limit was not done twice.
    assert found["odyssey"]["quantization"]["resumed_blocks"] >= 1

    here = run(_arguments(workspace, "here", methods))
    assert here.returncode == 0, here.stderr
    assert_same_results(workspace / "here", workspace / "slurm", ("fp16", "rtn", "gptq", "odyssey"))
    report(
        "Four cells, one over its time limit, one over its memory",
        "Outcomes: fp16 ok, rtn ok, gptq oom, odyssey timeout; after `retry=failed` all ok, with the digests, integers "
        "and perplexities of the same cells run without Slurm.",
    )


def test_a_preempted_job_goes_on_at_the_block_it_reached(slurm, workspace, report):
    arguments = _arguments(workspace, "slurm", "method=odyssey", "method.lwc.epochs=30", *SLURM,
                           "hydra.launcher.time_min=60")  # fmt: skip
    sweep, seen = start(arguments, faults="odyssey=hang"), []
    job = _job_id(sweep, seen)
    shards = "slurm/model/checkpoints/odyssey-*/block-*.safetensors"
    first = _wait_for(lambda: sorted(workspace.glob(shards)), "the first block")[0]
    written = first.stat().st_mtime_ns
    # The fault holds the cell at its first block, once.
    _wait_for(lambda: "T" in _process_states("odyssey.cell"), "the cell's stop")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    _wait_for(lambda: _shown(job).get("Restarts") == "1", "the requeue")
    output, errors = sweep.communicate()
    assert sweep.returncode == 0, "".join(seen) + output + errors
    record = records(workspace / "slurm")["odyssey"]
    assert record["outcome"] == "ok"
    assert record["quantization"]["resumed_blocks"] >= 1
    assert first.stat().st_mtime_ns == written

    here = run(_arguments(workspace, "here", "method=odyssey", "method.lwc.epochs=30"))
    assert here.returncode == 0, here.stderr
    assert_same_results(workspace / "here", workspace / "slurm", ("odyssey",))
    assert len(integers(record, workspace / "slurm")) > 40
    report(
        "Preempted and queued again",
        f"The job came back after one requeue and found {record['quantization']['resumed_blocks']} of 3 blocks; its "
        "integers and perplexity are those of a run without interruption.",
    )


def _process_states(word: str) -> str:
    """States of the running processes whose command has `word`, one letter each."""
    shown = subprocess.run(["ps", "-eo", "stat=,args="], capture_output=True, text=True, check=True).stdout
    return "".join(line[0] for line in shown.splitlines() if word in line)


def test_a_cancelled_job_is_that_cells_outcome(slurm, workspace):
    sweep, seen = start(_arguments(workspace, "out", "method=rtn,odyssey", *SLURM), faults="odyssey=hang"), []
    job = _job_id(sweep, seen)
    _wait_for(lambda: list(workspace.glob(FIRST_BLOCK)), "the first block")
    subprocess.run(["scancel", f"{job}_1"], check=True)
    output, errors = sweep.communicate()
    assert sweep.returncode == 1
    found = records(workspace / "out")
    assert found["rtn"]["outcome"] == "ok"
    assert found["odyssey"]["outcome"] == "interrupted"
    assert "cancelled" in found["odyssey"]["reason"], output + errors


def test_a_killed_job_without_a_word_does_not_hang_the_sweep(slurm, workspace):
    sweep, seen = start(_arguments(workspace, "out", "method=odyssey", *SLURM), faults="odyssey=hang"), []
    job = _job_id(sweep, seen)
    _wait_for(lambda: list(workspace.glob(FIRST_BLOCK)), "the first block")
    subprocess.run(["scancel", "--signal=KILL", job], check=True)
    sweep.communicate(timeout=120)
    assert sweep.returncode == 1
    record = records(workspace / "out")["odyssey"]
    assert record["outcome"] in ("crash", "interrupted")
    assert job in record["reason"]
    assert record["log_tail"]


def test_each_cell_asks_for_what_its_preflight_predicts(slurm, workspace):
    """Two arrays: the cell that needs a GPU asks for one, in its partition, and for the memory of CUDA's libraries."""
    arguments = [argument for argument in _arguments(workspace, "out") if argument != "device=cpu"]
    sweep = run([*arguments, "method=fp16", "device=cpu,cuda", *SLURM, "hydra.launcher.gpu_partition=gpu",
                 "hydra.launcher.partition=cpu", "hydra.launcher.memory_factor=2"])  # fmt: skip
    assert sweep.returncode == 1
    on_cpu, on_gpu = (_shown(match) for match in re.findall(r"Slurm job (\d+):", sweep.stdout))
    assert (on_cpu["Partition"], on_gpu["Partition"]) == ("cpu", "gpu")
    assert "TresPerNode" not in on_cpu
    assert on_gpu["TresPerNode"] == "gres:gpu:1"
    assert _gigabytes(on_gpu["MinMemoryNode"]) > _gigabytes(on_cpu["MinMemoryNode"]) >= 1
    by_device = {}
    for path in workspace.glob("out/*/*/record.json"):
        record = json.loads(path.read_text())
        by_device[record["config"]["device"]] = record["outcome"]
    assert by_device == {"cpu": "ok", "cuda": "unsupported"}


def _gigabytes(text: str) -> float:
    return float(text[:-1]) / {"G": 1, "M": 1024}[text[-1]]


def test_ctrl_c_leaves_the_jobs_and_says_so(slurm, workspace):
    import signal

    sweep, seen = start(_arguments(workspace, "out", "method=rtn", *SLURM)), []
    job = _job_id(sweep, seen)
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert f"scancel {job}" in errors
    _wait_for(lambda: outcomes(workspace / "out").get("rtn") == "ok", "the job's end")
    again = run(_arguments(workspace, "out", "method=rtn", *SLURM))
    assert again.returncode == 0
