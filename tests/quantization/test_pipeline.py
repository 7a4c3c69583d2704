import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

import odyssey
from baselines.rtn import RtnMethod, RtnSettings
from baselines.smoothquant import SmoothQuantMethod, SmoothQuantSettings
from odyssey.data.calibration import CalibrationTokens
from odyssey.errors import InvalidCheckpointError, UnsupportedError
from odyssey.methods import settings_dict
from odyssey.models.load import load_model
from odyssey.models.source import resolve_model
from odyssey.quantization import activations
from odyssey.quantization.checkpoint import MANIFEST_NAME, read_manifest, shard_name
from odyssey.quantization.grid import dequantize, round_to_nearest
from odyssey.quantization.pipeline import job_digest, quantize_checkpoint
from odyssey.quantization.recipe import OdysseyMethod, OdysseySettings

CPU = torch.device("cpu")
LAYERS = 3


def _settings():
    settings = OdysseySettings()
    settings.lwc.epochs = 2
    return settings


def _calibration(samples=4, seqlen=48):
    tokens = torch.randint(256, (samples, seqlen), generator=torch.Generator().manual_seed(3))
    return CalibrationTokens(tokens, {"dataset": "random"})


def _quantize(source, output, method=None, settings=None, calibration=None):
    settings = settings or _settings()
    method = method or OdysseyMethod(settings)
    return quantize_checkpoint(
        source, method, settings_dict(settings), calibration or _calibration(), output, device=CPU, seed=5
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = write_checkpoint(tmp_path_factory.mktemp("source"), layers=LAYERS, shard_size="200KB")
    return resolve_model("random", path=str(directory))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    return output, _quantize(source, output)


def _tensors(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def test_every_decoder_linear_is_quantized_and_nothing_else(finished, source):
    output, report = finished
    layers = report.manifest["layers"]
    assert len(layers) == 7 * LAYERS
    assert all(layer["weight_bits"] == 4 and layer["group_size"] == -1 for layer in layers.values())
    tensors = _tensors(output)
    model = load_model(source)
    state = model.state_dict()
    for name, tensor in tensors.items():
        if ".weight_" not in name:
            assert torch.equal(tensor.float(), state[name])
    kept = {name for name in state if not any(name == f"{layer}.weight" for layer in layers)}
    assert kept == {name for name in tensors if ".weight_" not in name}


def _inputs_and_outputs(model, tokens):
    """Of every decoder block, the samples one by one."""
    inputs, outputs = [[] for _ in model.model.layers], [[] for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda module, args, index=index: inputs[index].append(args[0]))
        layer.register_forward_hook(lambda module, args, output, index=index: outputs[index].append(output))
    with torch.no_grad():
        for sample in tokens:
            model(sample[None])
    return inputs, outputs


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_chains_are_what_the_two_models_compute(tmp_path, family):
    """SmoothQuant changes norms, too; 8 bits, so that blocks of any chain but the right one would show."""
    seen = []

    class Spy(SmoothQuantMethod):
        def quantize_block(self, block, calibration):
            chains = (calibration.inputs, calibration.reference_inputs, calibration.targets)
            seen.append([[sample.clone() for sample in chain] for chain in chains])
            return super().quantize_block(block, calibration)

    directory = write_checkpoint(tmp_path / "source", layers=LAYERS, family=family, dtype=torch.bfloat16)
    source, settings, calibration = resolve_model("m", path=str(directory)), SmoothQuantSettings(), _calibration()
    _quantize(source, tmp_path / "made", Spy(settings), settings, calibration)
    original, original_outputs = _inputs_and_outputs(load_model(source), calibration.tokens)
    quantized, _ = _inputs_and_outputs(odyssey.load_quantized(tmp_path / "made"), calibration.tokens)
    expected = [quantized, original, original_outputs]
    for index in range(LAYERS):
        for found, model in zip(seen[index], expected, strict=True):
            torch.testing.assert_close(torch.cat(found), torch.cat(model[index]), rtol=1e-5, atol=1e-5)
    difference = (torch.cat(quantized[1]) - torch.cat(original[1])).abs().max()
    assert difference > 1e-2


def test_the_seed_and_every_other_part_of_a_job_count(source):
    settings = settings_dict(_settings())
    method = OdysseyMethod(_settings())
    digest = job_digest(source, method, settings, _calibration(), 5)
    assert digest == job_digest(source, OdysseyMethod(), settings, _calibration(), 5)
    others = [
        job_digest(replace(source, fingerprint="0" * 16), method, settings, _calibration(), 5),
        job_digest(source, RtnMethod(), settings, _calibration(), 5),
        job_digest(source, method, {**settings, "bits": 3}, _calibration(), 5),
        job_digest(source, method, settings, _calibration(seqlen=47), 5),
        job_digest(source, method, settings, None, 5),
        job_digest(source, method, settings, _calibration(), 6),
    ]
    assert len({digest, *others}) == 7


def test_size_counts_the_bits(finished):
    output, report = finished
    size = report.manifest["size"]
    bits = 0
    weights = 0
    for name, tensor in _tensors(output).items():
        if ".weight_" in name:
            bits += 8 * tensor.numel() * tensor.element_size()
        if name.endswith("weight_packed"):
            weights += 2 * tensor.numel()
    assert size["quantized_weights"] == weights
    assert size["bits_per_weight"] == pytest.approx(bits / weights)
    assert size["disk_bytes"] == sum(file.stat().st_size for file in output.glob("*.safetensors"))


def test_loaded_model_computes_with_the_stored_integers(finished, source):
    output, _ = finished
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        integer = odyssey.load_quantized(output)(tokens).logits
        simulated = odyssey.load_quantized(output, backend="simulate")(tokens).logits
        unquantized = load_model(source)(tokens).logits
    # A last-bit difference before a rounding to int8 moves one activation by one step, so the two differ by single
    # int8 steps in places; both must be far closer to each other than to the unquantized model.
    between = (integer - simulated).norm() / integer.norm()
    from_source = (integer - unquantized).norm() / unquantized.norm()
    assert between < 0.05 * from_source
    assert 0 < from_source < 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_not_quantized_is_loaded_in_float32_on_a_cpu_or_as_asked(finished, dtype):
    model = odyssey.load_quantized(finished[0], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float32}
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == (dtype or torch.float32)


def test_rtn_checkpoint_holds_the_rounded_weights(source, tmp_path):
    settings = RtnSettings(bits=4)
    quantize_checkpoint(source, RtnMethod(settings), settings_dict(settings), None, tmp_path, device=CPU)
    model, original = odyssey.load_quantized(tmp_path), load_model(source)
    for index in range(LAYERS):
        layer = model.model.layers[index].mlp.up_proj
        weight = original.model.layers[index].mlp.up_proj.weight
        assert torch.equal(layer.dequantized(), dequantize(round_to_nearest(weight, settings_scheme(settings))))


def settings_scheme(settings):
    return RtnMethod(settings).scheme


def test_a_second_call_does_nothing(finished, source):
    output, _ = finished
    before = {file: file.stat().st_mtime_ns for file in output.iterdir()}
    report = _quantize(source, output)
    assert report.resumed_blocks == LAYERS
    assert {file: file.stat().st_mtime_ns for file in output.iterdir()} == before


def test_another_job_is_not_taken_for_finished(finished, source, tmp_path):
    output, _ = finished
    for file in output.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = _settings()
    settings.lwc.epochs = 1
    report = _quantize(source, tmp_path, settings=settings)
    assert report.resumed_blocks == 0
    assert read_manifest(tmp_path)["job"] != read_manifest(output)["job"]


# A run for every argument of `run`, each in a process of its own. They are forked from one that has imported the
# libraries, which takes seconds, and has computed nothing yet.
_RUNS = """
import multiprocessing, os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_pipeline as t
from odyssey.models.source import resolve_model
from odyssey.quantization.recipe import OdysseyMethod

source, output = resolve_model("random", path={source!r}), Path({output!r})

{run}

processes = [multiprocessing.get_context("fork").Process(target=run, args=(each,)) for each in {arguments}]
for process in processes:
    process.start()
for process in processes:
    process.join()
print("exit codes", *(process.exitcode for process in processes))
"""
_KILLED_RUN = """
class Killed(OdysseyMethod):
    blocks = 0
    def quantize_block(self, block, calibration):
        if self.blocks == self.survive:
            os.kill(os.getpid(), signal.SIGKILL)
        self.blocks += 1
        return super().quantize_block(block, calibration)

def run(survive):
    method = Killed(t._settings())
    method.survive = survive
    t._quantize(source, output / str(survive), method=method)
"""
_WHOLE_RUN = """
def run(number):
    print("resumed", t._quantize(source, output).resumed_blocks, flush=True)
"""


def _run_in_processes(run: str, arguments: list[int], source, output) -> tuple[list[str], list[int]]:
    """What the runs printed, by line, and their exit codes."""
    script = _RUNS.format(run=run, arguments=arguments, paths=sys.path, source=str(source.path), output=str(output))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *printed, codes = done.stdout.splitlines()
    return printed, [int(code) for code in codes.removeprefix("exit codes").split()]


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory):
    """What runs that were killed in their first, second and third block have left, and their exit codes."""
    output = tmp_path_factory.mktemp("killed")
    _, codes = _run_in_processes(_KILLED_RUN, list(range(LAYERS)), source, output)
    return output, codes


@pytest.mark.parametrize("survive", range(LAYERS))
def test_a_killed_run_resumes_with_identical_integers(finished, source, killed, survive):
    directory, codes = killed[0] / str(survive), killed[1]
    assert codes[survive] == -signal.SIGKILL
    assert not (directory / MANIFEST_NAME).exists()
    report = _quantize(source, directory)
    assert report.resumed_blocks == survive
    expected, resumed = _tensors(finished[0]), _tensors(directory)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name


def test_two_processes_make_one_checkpoint(finished, source, tmp_path):
    printed, codes = _run_in_processes(_WHOLE_RUN, [0, 1], source, tmp_path)
    assert codes == [0, 0]
    resumed = [line.split()[-1] for line in printed if line.startswith("resumed")]
    assert sorted(resumed) == ["0", str(LAYERS)]
    expected, made = _tensors(finished[0]), _tensors(tmp_path)
    assert all(torch.equal(tensor, made[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("method", [OdysseyMethod, SmoothQuantMethod])
def test_models_with_biases_and_changed_norms_resume_too(tmp_path, method):
    directory = write_checkpoint(tmp_path / "qwen", layers=2, family="qwen2", dtype=torch.bfloat16)
    source = resolve_model("qwen", path=str(directory))
    settings = _settings() if method is OdysseyMethod else SmoothQuantSettings()
    _quantize(source, tmp_path / "whole", method(settings), settings)
    for file in (tmp_path / "whole").iterdir():
        if file.name not in (MANIFEST_NAME, shard_name(1)):
            (tmp_path / "resumed").mkdir(exist_ok=True)
            (tmp_path / "resumed" / file.name).write_bytes(file.read_bytes())
    assert _quantize(source, tmp_path / "resumed", method(settings), settings).resumed_blocks == 1
    whole, resumed = _tensors(tmp_path / "whole"), _tensors(tmp_path / "resumed")
    assert any(name.endswith("q_proj.bias") for name in whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_rotary_frequencies_of_old_checkpoints_do_not_stop_a_resumed_run(tmp_path):
    directory = write_checkpoint(tmp_path / "source", layers=2)
    tensors = load_file(directory / "model.safetensors")
    frequencies = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.ones(16) for index in range(2)}
    save_file({**tensors, **frequencies}, directory / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model("old", path=str(directory))
    _quantize(source, tmp_path / "made")
    whole = _tensors(tmp_path / "made")
    (tmp_path / "made" / MANIFEST_NAME).unlink()
    (tmp_path / "made" / shard_name(1)).unlink()
    assert _quantize(source, tmp_path / "made").resumed_blocks == 1
    resumed = _tensors(tmp_path / "made")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not frequencies.keys() & whole.keys()


def test_a_damaged_block_is_made_again(finished, source, tmp_path):
    for file in finished[0].iterdir():
        if file.name != MANIFEST_NAME:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = tmp_path / shard_name(1)
    victim.write_bytes(victim.read_bytes()[:-100])
    assert _quantize(source, tmp_path).resumed_blocks == 1
    expected, repaired = _tensors(finished[0]), _tensors(tmp_path)
    assert all(torch.equal(tensor, repaired[name]) for name, tensor in expected.items())


def test_activations_on_disk_give_the_same_integers(finished, source, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "MEMORY_SHARE", 0.0)
    report = _quantize(source, tmp_path)
    assert report.activations_on_disk
    expected, spilled = _tensors(finished[0]), _tensors(tmp_path)
    assert all(torch.equal(tensor, spilled[name]) for name, tensor in expected.items())
    assert not (tmp_path / "targets").exists()


def test_activation_store_round_trip(tmp_path):
    for file in (None, tmp_path / "store"):
        store = activations.ActivationStore(3, 4, 5, CPU, file)
        samples = [torch.randn(1, 4, 5) for _ in range(3)]
        for index in (2, 0, 1):
            store[index] = samples[index]
        store[1] = samples[1] * 2
        assert torch.equal(store[0], samples[0])
        assert torch.equal(store[1], samples[1] * 2)
        assert len(list(store)) == 3
        with pytest.raises(IndexError):
            store[3]
        with pytest.raises(ValueError, match="expected"):
            store[0] = torch.zeros(1, 5, 5)
        store.close()


def test_loading_to_a_gpu_that_is_not_there_is_refused(finished, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="device=cuda: no CUDA device is visible"):
        odyssey.load_quantized(finished[0], device="cuda")


def test_load_errors_name_the_file(finished, tmp_path):
    with pytest.raises(InvalidCheckpointError, match=MANIFEST_NAME):
        odyssey.load_quantized(tmp_path)
    for file in finished[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / MANIFEST_NAME).read_text())
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(UnsupportedError, match="format version 99"):
        odyssey.load_quantized(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    (tmp_path / shard_name(2)).unlink()
    with pytest.raises(InvalidCheckpointError, match=f"{shard_name(2)}: missing shard"):
        odyssey.load_quantized(tmp_path)
