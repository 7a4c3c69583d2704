"""Predictions against what cells measured: committed records of testbed-28m, and cells run here."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.checkpoints import write_checkpoint
from helpers.sweeps import ROOT, run
from omegaconf import OmegaConf

from odyssey.config import register_schemas, typed_config, validate
from odyssey.preflight import predict

# A prediction is to be within this factor of the measured peak, both ways.
MEMORY_FACTOR, DISK_FACTOR = 1.5, 1.05
# Not counted by the allocator: the context of CUDA, and what lies between blocks.
CUDA_CONTEXT, FRAGMENTATION = 600_000_000, 1.1


def _prediction(record: dict, **changes):
    register_schemas()
    config = OmegaConf.merge(typed_config(OmegaConf.create(record["config"])), OmegaConf.create(changes))
    return predict(validate(config))


def _assert_within(predicted: float, measured: float, factor: float, what: str) -> None:
    assert measured / factor <= predicted <= measured * factor, f"{what}: predicted {predicted}, measured {measured}"


def _committed(device: str) -> list[Path]:
    return sorted((ROOT / "results" / device / "testbed-28m").glob("*/record.json"))


def _here(record: dict, data: Path, **changes) -> dict:
    """Settings that make a committed record's paths those of this machine."""
    changes |= {"model": {"path": str(data / "models" / "testbed-28m")}}
    texts = data / "data" / "wikitext2"
    for group, at in (("calibration", changes), ("perplexity", changes.setdefault("accuracy", {}))):
        asked = record["config"]["accuracy"]["perplexity"] if group == "perplexity" else record["config"][group]
        if asked and asked["path"]:
            at[group] = {"path": str(texts / Path(asked["path"]).name)}
    return changes


@pytest.mark.parametrize("path", _committed("cpu"), ids=lambda path: path.parent.name)
def test_committed_records_on_cpu(path, evaluation_data):
    record = json.loads(path.read_text())
    prediction = _prediction(record, **_here(record, evaluation_data))
    _assert_within(prediction.host_bytes, record["memory"]["peak_rss_bytes"], MEMORY_FACTOR, "host memory")
    assert prediction.gpu_bytes == 0
    if "quantization" in record:
        _assert_within(prediction.disk_bytes, record["size"]["disk_bytes"], DISK_FACTOR, "disk")


@pytest.mark.parametrize("path", _committed("h100"), ids=lambda path: path.parent.name)
def test_committed_records_on_a_gpu(path, evaluation_data):
    record = json.loads(path.read_text())
    if record["outcome"] != "ok" or not record["memory"].get("peak_cuda_bytes"):
        pytest.skip("the record has no peak")
    prediction = _prediction(record, **_here(record, evaluation_data, device="cuda"))
    allocated = (prediction.gpu_bytes - CUDA_CONTEXT) / FRAGMENTATION
    _assert_within(allocated, record["memory"]["peak_cuda_bytes"], MEMORY_FACTOR, "GPU memory")
    _assert_within(prediction.host_bytes, record["memory"]["peak_rss_bytes"], MEMORY_FACTOR, "host memory")


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    """A model whose blocks weigh more than the libraries' spread, and the embedded one: every method."""
    directory = tmp_path_factory.mktemp("footprint")
    write_checkpoint(directory / "wide", layers=2, hidden=1024, intermediate=2816, heads=8, kv_heads=8)
    (directory / "text.txt").write_text("How vexingly quick daft zebras jump. " * 400)
    text = directory / "text.txt"
    wide = [
        f"model.path={directory / 'wide'}", f"calibration.path={text}", f"accuracy.perplexity.path={text}",
        "accuracy.perplexity.window=128", "accuracy.perplexity.max_windows=4",
    ]  # fmt: skip
    common = ["-m", "device=cpu", "calibration.num_samples=4", "calibration.seqlen=128", f"output_dir={directory}/out"]
    for sweep in (
        [*wide, "method=rtn,smoothquant,gptq,awq"],
        [*wide, "method=odyssey", "method.lwc.epochs=1"],
        ["model=tiny", "method=fp16,gptq,odyssey", "accuracy.perplexity.max_windows=2"],
    ):
        done = run([*common, *sweep])
        assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(path.read_text()) for path in sorted(directory.glob("out/*/*/record.json"))]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cells_measured_here(measured):
    assert len(measured) == 8
    for record in measured:
        prediction, what = _prediction(record), f"{record['model']['name']} {record['method']['name']}"
        _assert_within(prediction.host_bytes, record["memory"]["peak_rss_bytes"], MEMORY_FACTOR, what)
        if "quantization" in record:
            _assert_within(prediction.disk_bytes, record["size"]["disk_bytes"], DISK_FACTOR, what)


def _published(name: str, method: str, **changes):
    register_schemas()
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [f"model={name}", f"method={method}", "device=cuda", "accuracy=none", "calibration=c4"]
        return predict(validate(OmegaConf.merge(compose("config", overrides=overrides), OmegaConf.create(changes))))


@pytest.fixture
def roomy(monkeypatch):
    """A machine with so much free memory that no activations go to disk."""
    monkeypatch.setattr("odyssey.preflight.psutil.virtual_memory", lambda: SimpleNamespace(available=10**13))


def test_a_published_model_is_known_without_its_files(roomy):
    small, large = _published("llama2-7b", "odyssey"), _published("llama2-70b", "odyssey")
    # W4A8 stores half a byte per weight, and embedding and head in two.
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    tables = 2 * 32000 * 4096
    weights = linear / 2 + 2 * tables
    download = 2 * (linear + tables)
    _assert_within(small.disk_bytes, weights + download, 1.02, "disk")
    # 70B is quantized a block at a time: it fits one 80 GB GPU, which its 138 GB of weights would not.
    assert 5e9 < small.gpu_bytes < large.gpu_bytes < 80e9
    assert small.known
    # C4's shard and three stores of 128 x 2048 activations are in host memory.
    assert small.host_bytes > 3 * 128 * 2048 * 4096 * 4


def test_activations_that_do_not_fit_are_counted_on_disk(monkeypatch):
    stores = 3 * 128 * 2048 * 4096 * 4
    found = []
    for free in (stores, 100 * stores):
        monkeypatch.setattr(
            "odyssey.preflight.psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free)
        )
        found.append(_published("llama2-7b", "gptq"))
    assert found[0].disk_bytes - found[1].disk_bytes == stores
    assert found[0].host_bytes < found[1].host_bytes


def test_measuring_decides_where_it_needs_more(roomy):
    quantizing = _published("llama2-7b", "rtn")
    original = _published("llama2-7b", "fp16", accuracy={"perplexity": {"dataset": "wikitext2"}})
    assert original.gpu_bytes > 13.4e9 > quantizing.gpu_bytes
    assert original.disk_bytes == 2 * (32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 2 * 32000 * 4096 + 65 * 4096)
