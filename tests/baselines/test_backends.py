"""method.backend and method.checkpoint: what is refused, and a cell that reads an existing checkpoint.

What the backends compute is compared in tests/reference.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers.cells import cell_config
from helpers.checkpoints import write_checkpoint
from helpers.packed_checkpoints import PackedLayout, quantize_checkpoint_randomly

from baselines.awq import AwqSettings
from baselines.gptq import GptqSettings
from odyssey.accuracy.perplexity import perplexity
from odyssey.cell import Cell
from odyssey.config import (
    AccuracyConfig,
    LatencyConfig,
    PerplexityConfig,
    RootConfig,
)
from odyssey.data.texts import load_corpus
from odyssey.methods import existing_checkpoint, settings_class
from odyssey.models.load import load_model, load_tokenizer
from odyssey.models.source import resolve_model
from odyssey.record import model_directory_name
from odyssey.runner import locate_cell

TEXT = "Sphinx of black quartz, judge my vow. " * 60


@pytest.fixture
def no_packages(monkeypatch):
    found = importlib.util.find_spec
    absent = ("auto_gptq", "awq")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))


@pytest.mark.parametrize(("settings", "backend"), [(GptqSettings, "auto-gptq"), (AwqSettings, "autoawq")])
def test_a_missing_package_is_named_with_the_way_to_get_it(settings, backend, no_packages):
    with pytest.raises(ValueError, match=f"backend={backend}: .*`make reference-env`.*run.py") as caught:
        settings(backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (GptqSettings, {"backend": "autoawq"}, "backend=autoawq: allowed: native, auto-gptq"),
        (AwqSettings, {"backend": "auto-gptq"}, "backend=auto-gptq: allowed: native, autoawq"),
        (GptqSettings, {"backend": "auto-gptq", "checkpoint": "dir"}, "cannot be combined with method.checkpoint"),
    ],
)
def test_impossible_backends_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.parametrize("changes", [{"bits": 3}, {"symmetric": True}, {"group_size": -1}])
def test_what_autoawq_cannot_pack_is_refused(changes, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    with pytest.raises(ValueError, match="backend=autoawq: the package packs 4 bits"):
        AwqSettings(backend="autoawq", **changes)


def config_of(tmp_path, method: str, checkpoint, **changes) -> RootConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    accuracy = AccuracyConfig(perplexity=PerplexityConfig(path=str(tmp_path / "text.txt"), window=64))
    settings = settings_class(method)(checkpoint=str(checkpoint))
    return cell_config(tmp_path, **({"method": settings, "accuracy": accuracy} | changes))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_cell_measures_an_existing_checkpoint(method, tmp_path):
    shape = {"layers": 2, "hidden": 128, "intermediate": 192}
    directory = write_checkpoint(tmp_path / "existing-7b", **shape)
    layout = PackedLayout(method, act_order=method == "gptq", zeros="random")
    weights = quantize_checkpoint_randomly(directory, layout)
    config = config_of(tmp_path, method, directory)
    assert existing_checkpoint(config.method) == str(directory)
    assert model_directory_name(config) == "existing-7b"
    record = Cell(config, {}, "digest").run()
    assert record["outcome"] == "ok", record["reason"]
    assert record["method"]["label"] == "W4A16-g32"
    assert record["method"]["scheme"]["symmetric"] is False
    assert record["method"]["arithmetic"] == "dequantized weights"
    assert record["quantization"]["calibration"] is None
    assert record["size"]["quantized_weights"] == sum(weight.size for weight in weights.values())

    original = resolve_model("original", path=str(write_checkpoint(tmp_path / "original", **shape)))
    reference = load_model(original)
    for key, weight in weights.items():
        reference.get_parameter(key).data.copy_(torch.from_numpy(weight).float())
    corpus = load_corpus("file", "test", path=str(tmp_path / "text.txt"))
    expected = perplexity(reference, load_tokenizer(original), corpus, window=64)["value"]
    assert record["accuracy"]["perplexity"]["file"]["value"] == pytest.approx(expected, rel=1e-5)


def test_another_checkpoint_is_another_cell(tmp_path):
    digests = []
    for seed in (0, 1):
        directory = write_checkpoint(tmp_path / str(seed) / "existing", layers=1, hidden=128, intermediate=192)
        quantize_checkpoint_randomly(directory, PackedLayout(), seed)
        config = config_of(tmp_path, "gptq", directory)
        # The same path, as it would be after the checkpoint was replaced.
        config.method.checkpoint = str(tmp_path / "existing")
        (tmp_path / "existing").unlink(missing_ok=True)
        (tmp_path / "existing").symlink_to(directory)
        digests.append(locate_cell(config)[0])
    assert digests[0] != digests[1]


def test_failures_are_the_cells_outcome(tmp_path):
    record = Cell(config_of(tmp_path, "gptq", tmp_path / "nowhere"), {}, "digest").run()
    assert record["outcome"] == "missing-model"
    assert "method.checkpoint=" in record["reason"]
    directory = write_checkpoint(tmp_path / "awq", layers=1, hidden=128, intermediate=192)
    quantize_checkpoint_randomly(directory, PackedLayout("awq", zeros="random"))
    record = Cell(config_of(tmp_path, "gptq", directory), {}, "digest").run()
    assert record["outcome"] == "unsupported"
    assert "use method=awq" in record["reason"]
    latency = LatencyConfig(engine="transformers", input_len=8, output_len=2)
    record = Cell(config_of(tmp_path, "awq", directory, latency=latency), {}, "digest").run()
    assert record["outcome"] == "unsupported"
    assert "latency is measured beside the unquantized model" in record["reason"]
