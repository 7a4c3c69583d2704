"""What goes wrong inside a cell becomes its outcome, and nothing that was finished is lost."""

import json
import re

import pytest
import torch
from helpers.cells import cell_config
from helpers.checkpoints import write_checkpoint
from helpers.sweeps import run
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from odyssey.cell import Cell
from odyssey.config import CalibrationConfig, DataConfig, LatencyConfig, RootConfig
from odyssey.errors import GatedModelError, MissingDataError
from odyssey.outcomes import of_exception, of_exit

TEXT = "Pack my box with five dozen liquor jugs. " * 40


def _config(tmp_path, model, method="rtn", **changes) -> RootConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = CalibrationConfig(path=str(tmp_path / "text.txt"), num_samples=2, seqlen=32)
    return cell_config(tmp_path, model, method, **({"calibration": calibration} | changes))


def _run(config):
    return Cell(config, {}, "digest").run()


def test_nan_weights_are_the_cells_outcome(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    file = next(iter(model.glob("*.safetensors")))
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    record = _run(_config(tmp_path, model))
    assert record["outcome"] == "invalid-checkpoint"
    assert "model.layers.2.self_attn.o_proj.weight has NaN or Inf" in record["reason"]


def test_a_data_root_that_is_not_there_is_said_before_anything_is_quantized(tmp_path):
    config = _config(tmp_path, write_checkpoint(tmp_path / "model"), data=DataConfig(str(tmp_path / "gone")))
    record = _run(config)
    assert (record["outcome"], record["reason"]) == (
        "missing-data", f"data.root={tmp_path / 'gone'}: no such directory",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_config_of_impossible_sizes_is_an_invalid_checkpoint(tmp_path):
    model = write_checkpoint(tmp_path / "model")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"num_attention_heads": 0}))
    record = _run(_config(tmp_path, model))
    assert record["outcome"] == "invalid-checkpoint"
    assert f"{model / 'config.json'}: not usable" in record["reason"]


@pytest.mark.parametrize("content", ["{", "[1]", "5"])
def test_a_manifest_that_was_damaged_is_named(tmp_path, content):
    config = _config(tmp_path, write_checkpoint(tmp_path / "model"))
    assert _run(config)["outcome"] == "ok"
    (manifest,) = tmp_path.glob("out/model/checkpoints/*/odyssey.json")
    manifest.write_text(content)
    record = _run(config)
    assert record["outcome"] == "invalid-checkpoint"
    assert record["reason"].startswith(f"{manifest}: not valid JSON")
    config.force = True
    assert _run(config)["outcome"] == "ok"


def test_a_missing_gpu_is_unsupported(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    record = _run(_config(tmp_path, write_checkpoint(tmp_path / "model"), device="cuda"))
    assert record["outcome"] == "unsupported"
    assert "device=cuda" in record["reason"]


def test_a_cell_that_fails_early_has_its_models_name(tmp_path):
    (tmp_path / "mine").mkdir()
    record = _run(_config(tmp_path, tmp_path / "mine"))
    assert record["outcome"] == "invalid-checkpoint"
    assert record["model"]["name"] == "mine"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(MemoryError(), "oom"), (torch.OutOfMemoryError("CUDA out of memory"), "oom"), (KeyError("x"), "failed")],
)
def test_errors_inside_a_method(tmp_path, monkeypatch, error, outcome):
    def quantize_block(self, block, calibration):
        raise error

    monkeypatch.setattr("baselines.rtn.RtnMethod.quantize_block", quantize_block)
    record = _run(_config(tmp_path, write_checkpoint(tmp_path / "model")))
    assert record["outcome"] == outcome
    assert record["reason"]
    assert record["memory"]["peak_rss_bytes"] > 0


def test_too_long_a_latency_run_is_unsupported(tmp_path):
    latency = LatencyConfig(engine="transformers", input_len=250, output_len=10)
    record = _run(_config(tmp_path, write_checkpoint(tmp_path / "model"), latency=latency))
    assert record["outcome"] == "unsupported"
    assert "exceed the 256 positions" in record["reason"]
    assert record["size"]["bits_per_weight"] > 4


def test_a_killed_cell_is_recorded_and_resumes(tmp_path):
    model = write_checkpoint(tmp_path / "model", layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [
        f"model.path={model}", f"output_dir={tmp_path / 'out'}", f"calibration.path={tmp_path / 'text.txt'}",
        "calibration.num_samples=4", "calibration.seqlen=64", "method.lwc.epochs=3", "device=cpu",
        f"accuracy.perplexity.path={tmp_path / 'text.txt'}", "accuracy.perplexity.window=64",
    ]  # fmt: skip
    killed = run(arguments, faults="odyssey=kill")
    assert killed.returncode == 1
    assert "crash" in killed.stderr
    (path,) = tmp_path.glob("out/model/odyssey-*/record.json")
    record = json.loads(path.read_text())
    assert record["outcome"] == "crash"
    assert "SIGKILL" in record["reason"]
    assert record["model"]["name"] == "model"
    again = run(arguments)
    assert again.returncode == 0, again.stderr
    record = json.loads(path.read_text())
    assert record["outcome"] == "ok"
    assert record["quantization"]["resumed_blocks"] >= 1


@pytest.mark.parametrize(
    ("error", "outcome", "words"),
    [
        (GatedModelError("gated: log in"), "gated", "gated: log in"),
        (MissingDataError("no text"), "missing-data", "no text"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "oom", "GPU memory.*2 GiB$"),
        (RuntimeError("CUDA error: out of memory"), "oom", "GPU memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom", "GPU"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
         "oom", "host memory"),
        (RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)"), "oom", "host memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."),
         "crash", "illegal memory access was encountered$"),
        (RuntimeError("CUDA error: unspecified launch failure"), "crash", "launch failure"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "unsupported", "torch"),
        (OSError(28, "No space left on device"), "failed", "disk space.*output_dir"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "failed",
         "disk space.*output_dir"),
        (KeyError("x"), "failed", "KeyError"),
    ],
)  # fmt: skip
def test_what_an_exception_makes_of_a_cell(error, outcome, words):
    found, reason = of_exception(error)
    assert found == outcome
    assert re.search(words, reason)
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("code", "oom_killed", "outcome", "words"),
    [
        (-9, False, "crash", "SIGKILL"),
        (-9, True, "oom", "for lack of memory"),
        (-11, False, "crash", "SIGSEGV"),
        (-6, True, "crash", "SIGABRT"),
        (3, False, "crash", "code 3"),
    ],
)
def test_what_an_exit_makes_of_a_cell(code, oom_killed, outcome, words):
    found, reason = of_exit(code, oom_killed=oom_killed)
    assert found == outcome
    assert words in reason
