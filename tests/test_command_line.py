"""The command line's promises: one clear line for what is wrong, before any work starts."""

import json
import os
import subprocess
import sys

import pytest
from helpers.checkpoints import write_checkpoint

from odyssey.config import register_schemas
from odyssey.errors import ConfigError
from odyssey.overrides import check_command_line


@pytest.fixture(autouse=True)
def _schemas():
    register_schemas()


def _check(project_root, *arguments):
    check_command_line(list(arguments), project_root / "conf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=odyssy"], "method=odyssy: unknown; allowed: .*odyssey"),
        (["model=llama9"], "model=llama9: unknown; allowed: .*llama2-7b.*tiny"),
        (["experiment=nope"], "experiment=nope: unknown; allowed: .*quickstart"),
        (["foo=1"], "foo: unknown key; keys: method, model"),
        (["method.foo=1"], "method.foo: unknown key; method=odyssey takes: bits, "),
        (["method.lwc.foo=1"], "method.lwc.foo: unknown key; method.lwc takes: epochs"),
        (["method=fp16", "method.bits=4"], "method.bits: unknown key; method=fp16 takes: no keys"),
        (["-m", "method=fp16,rtn", "method.clipping=none"], "method.clipping: unknown key"),
        (["method.bits=abc"], "method.bits=abc: .*could not be converted to Integer"),
        (["method.bits=12"], "method.bits must be 2..8"),
        (["method.clipping=bogus"], "method.clipping must be one of none, search, learned"),
        (["seed=x"], "seed=x: .*Integer"),
        (["device=tpu"], "device=tpu: allowed: auto, cpu, cuda"),
        (["accuracy.perplexity.window=1"], "accuracy.perplexity.window=1: must be at least 2"),
        (["accuracy=none", "accuracy.perplexity.window=9"], "accuracy.perplexity.window: a group above"),
        (["calibration.dataset=pile"], "calibration.dataset=pile: allowed: auto, wikitext2, c4"),
        (["calibration.dataset=wikitext2", "calibration.path=x"], "calibration.path: cannot be combined"),
        (["calibration.dataset=file"], "calibration.path: must name a file"),
        (["calibration.num_samples=0"], "calibration.num_samples=0: must be at least 1"),
        (["latency.engine=vroom"], "latency.engine=vroom: allowed: none, transformers"),
        (["method=fp16", "accuracy.simulate=true"], "accuracy.simulate=true: method=fp16"),
        (["method=fp16,rtn"], "several values need a sweep; add -m"),
        (["nonsense"], "nonsense: not of the form key=value"),
        (["model.path=/a=b"], """/a=b: not of the form .* needs quotes: 'model.path="/a=b"'$"""),
        (["model.path=/a${b}"], "model.path: Interpolation key 'b' not found"),
        (["-m", "method=glob(*)"], r"method=glob\(\*\): glob\(\) is not supported; name the options"),
        (["model=null"], "model=null: cannot be null; name one of its options"),
        (["-m", "method=null,rtn"], "method=null: cannot be null"),
        (["~method"], "method: Missing mandatory value"),
        (["+foo=1"], "foo: unknown key"),
        (["+method.foo=1"], "method.foo: unknown key"),
        (["method=rtn", "method.name=odyssey"], "method.name=odyssey: these are another .* use method=odyssey"),
        (['output_dir="~/x"'], "output_dir=~/x: ~ stands for nothing here"),
        (["output_dir="], "output_dir=: must not be empty"),
        (["model.path="], "model.path=: must not be empty"),
        (["method=gptq", "method.checkpoint="], "method.checkpoint=: must not be empty"),
        (["model.name=../x"], "model.name=../x: names a directory under output_dir"),
        (["model.name=.."], "model.name=..: names a directory under output_dir"),
        (["timeout_s=inf"], "timeout_s=inf: must be finite"),
        (["timeout_s=1e12"], r"timeout_s=1e\+12: must be at most"),
        (["tracking.timeout_s=inf"], "tracking.timeout_s=inf: must be finite"),
        (["method.lwc.learning_rate=inf"], "method.lwc.learning_rate=inf: must be finite"),
        (["seed=-1"], "seed=-1: must be 0 to"),
        (["calibration.seed=9223372036854775808"], "calibration.seed=9223372036854775808: must be 0 to"),
    ],
)
def test_what_is_refused_and_how(project_root, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _check(project_root, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-m", "experiment=quickstart"],
        ["model=llama2-70b", "method.bits=3", "method.clipping=none"],
        ["-m", "method=fp16,rtn,odyssey", "model=tiny,llama-7b", "calibration.num_samples=8"],
        ["model=local", "model.path=somewhere", "accuracy.perplexity.path=text.txt"],
        ["tracking=wandb", "latency=transformers", "accuracy=none"],
        ['model.path="/a b/c=d (e)"', "seed=9223372036854775807", "++device=cpu", "accuracy.perplexity=null"],
    ],
)
def test_what_is_taken(project_root, arguments):
    _check(project_root, *arguments)


def _run(project_root, *arguments, **variables):
    return subprocess.run(
        [sys.executable, str(project_root / "run.py"), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
    )  # fmt: skip


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_an_output_dir_that_is_a_file_is_one_line(project_root, tmp_path, mode):
    (tmp_path / "file").touch()
    done = _run(project_root, *mode, "device=cpu", f"output_dir={tmp_path / 'file' / 'out'}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: output_dir={tmp_path / 'file' / 'out'}: cannot be made")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", [[], ["-m"]])
def test_a_directory_below_that_cannot_be_written_is_one_line(project_root, tmp_path, mode):
    (tmp_path / ("sweeps" if mode else "tiny")).touch()
    done = _run(project_root, *mode, "method=fp16", "accuracy=none", "device=cpu", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert str(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1


TEXT = "The quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workspace")
    write_checkpoint(directory / "model", layers=2)
    (directory / "text.txt").write_text(TEXT)
    return directory


def _arguments(workspace, *more):
    return [
        f"model.path={workspace / 'model'}", f"output_dir={workspace / 'out'}", "device=cpu",
        f"calibration.path={workspace / 'text.txt'}", "calibration.num_samples=2", "calibration.seqlen=64",
        f"accuracy.perplexity.path={workspace / 'text.txt'}", "accuracy.perplexity.window=64", *more,
    ]  # fmt: skip


def test_a_cell_from_start_to_record_and_again(project_root, workspace):
    arguments = _arguments(workspace, "method.lwc.epochs=1", "latency=transformers", "latency.input_len=16",
                           "latency.output_len=4", "latency.repeats=2", "tracking=wandb")  # fmt: skip
    first = _run(project_root, *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    (path,) = (workspace / "out" / "model").glob("odyssey-*/record.json")
    record = json.loads(path.read_text())
    assert record["outcome"] == "ok"
    assert record["model"]["name"] == "model"
    assert record["config"]["method"]["bits"] == 4
    result = record["accuracy"]["perplexity"]["file"]
    assert result["value"] > 1
    assert (result["windows"], result["tokens"]) == (2700 // 64, 2700 // 64 * 64)
    assert record["method"]["arithmetic"] == "integer"
    assert record["environment"]["packages"]["torch"]
    assert record["size"]["bits_per_weight"] > 4
    assert len(record["latency"]["total_ms"]["samples"]) == 2
    assert record["latency"]["reference"]["total_ms"]["median"] > 0
    assert (workspace / "out" / record["quantization"]["checkpoint"] / "odyssey.json").is_file()
    assert list(path.parent.glob("wandb/offline-run-*/*.wandb"))

    changed = path.stat().st_mtime_ns
    second = _run(project_root, *arguments)
    assert second.returncode == 0
    assert "record found, nothing to do" in second.stdout
    assert path.stat().st_mtime_ns == changed

    # Another measurement of the same integers takes the finished checkpoint.
    third = _run(project_root, *_arguments(workspace, "method.lwc.epochs=1", "accuracy.perplexity.max_windows=2"))
    assert third.returncode == 0, third.stderr
    records = [json.loads(file.read_text()) for file in (workspace / "out" / "model").glob("odyssey-*/record.json")]
    assert len({record["quantization"]["job"] for record in records}) == 1
    assert len(list((workspace / "out" / "model" / "checkpoints").iterdir())) == 1


def test_a_sweep_goes_on_after_a_failure_and_says_so(project_root, workspace):
    models = f"model.path={workspace / 'absent'},{workspace / 'model'}"
    arguments = [models, *_arguments(workspace)[1:], "method=rtn"]
    sweep = _run(project_root, "-m", *arguments)
    assert sweep.returncode == 1
    outcomes = {}
    for file in (workspace / "out").glob("*/*/record.json"):
        record = json.loads(file.read_text())
        if record["config"]["method"]["name"] == "rtn":
            outcomes[file.parent.parent.name] = record["outcome"]
    assert outcomes == {"absent": "missing-model", "model": "ok"}
    assert sweep.stdout.index("model rtn: running") > sweep.stdout.index("absent rtn: running")
    assert "1 of 2 cells did not end ok" in sweep.stdout
    (plot,) = (workspace / "out" / "sweeps").glob("*/overview.png")
    assert plot.stat().st_size > 5000


def test_a_config_error_is_one_line_and_exit_code_2(project_root, tmp_path):
    """A Transformers that cannot be imported stands in the way: the seconds that it takes are not spent on an error."""
    (tmp_path / "transformers.py").write_text("raise ImportError('needed before any work starts')")
    result = _run(project_root, "method.bits=99", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == "error: method.bits must be 2..8, not 99; method=fp16 leaves the weights as they are\n"


def test_a_failed_cell_exits_with_1_and_leaves_a_record(project_root, workspace):
    result = _run(project_root, *_arguments(workspace, "method=rtn", "accuracy.perplexity.window=200",
                                            f"accuracy.perplexity.path={workspace / 'gone.txt'}"))  # fmt: skip
    assert result.returncode == 1
    assert "missing-data" in result.stderr
    assert "gone.txt: no such file" in result.stderr
    records = [json.loads(file.read_text()) for file in (workspace / "out" / "model").glob("rtn-*/record.json")]
    failed = [record for record in records if record["outcome"] == "missing-data"]
    # What was finished before the failure is in the record.
    assert len(failed) == 1
    assert failed[0]["quantization"]["checkpoint"]
