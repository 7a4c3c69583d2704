"""accuracy.simulate=true: labelled in record and table, and the same figures as the integers up to single roundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.cells import cell_config
from helpers.checkpoints import write_checkpoint
from helpers.tasks import requests_of

from experiments.accuracy_tables import accuracy_tasks, table2_perplexity
from experiments.measured import perplexities
from odyssey.cell import Cell
from odyssey.config import AccuracyConfig, DataConfig, PerplexityConfig
from odyssey.methods import build_method, settings_class
from odyssey.models.load import load_tokenizer
from odyssey.models.source import resolve_model
from odyssey.quantization.checkpoint import load_quantized
from odyssey.quantization.pipeline import quantize_checkpoint


@pytest.fixture
def cell(small_root, tmp_path):
    """cell(simulate) -> record of rtn on a small random model, as a table finds it."""
    model = write_checkpoint(tmp_path / "model", weight_std=0.3)
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (7 * i * i + i) % 26) for i in range(1500)))

    def run(simulate):
        accuracy = AccuracyConfig(
            perplexity=PerplexityConfig(path=str(text), window=128), tasks=["piqa", "lambada_openai"], limit=12,
            simulate=simulate,
        )  # fmt: skip
        config = cell_config(tmp_path, model, accuracy=accuracy, data=DataConfig(root=str(small_root)))
        directory = tmp_path / f"simulate-{simulate}"
        plain = {"method": {"name": "rtn", "symmetric": True}, "model": {"name": "local", "path": str(model)},
                 "accuracy": {"perplexity": {"max_windows": None}, "simulate": simulate}}  # fmt: skip
        return {**Cell(config, plain, "digest", directory).run(), "path": str(directory / "record.json")}

    return run


def test_the_simulation_is_labelled_and_agrees(cell):
    integer, simulated = cell(False), cell(True)
    assert (integer["outcome"], simulated["outcome"]) == ("ok", "ok")
    assert (integer["method"]["arithmetic"], simulated["method"]["arithmetic"]) == ("integer", "simulated")
    assert integer["quantization"]["job"] == simulated["quantization"]["job"]
    for record, label in ((integer, False), (simulated, True)):
        results = [*record["accuracy"]["perplexity"].values(), *record["accuracy"]["tasks"].values()]
        assert [result["simulated"] for result in results] == [label] * 3
    values = [record["accuracy"]["perplexity"]["file"]["value"] for record in (integer, simulated)]
    assert values[1] == pytest.approx(values[0], rel=5e-3)
    for task, result in integer["accuracy"]["tasks"].items():
        assert simulated["accuracy"]["tasks"][task]["prompts_sha256"] == result["prompts_sha256"]
        assert abs(simulated["accuracy"]["tasks"][task]["metrics"]["acc"]["value"] - result["value"]) <= 1 / 12 + 1e-9
    tables = table2_perplexity(perplexities([integer, simulated])), accuracy_tasks([integer, simulated])
    for table in tables:
        notes = [row[-1] or "" for row in table.rows]
        assert sum("simulated" in note for note in notes) == len(notes) / 2


def test_likelihoods_of_the_simulation(evaluation_data, tmp_path):
    """testbed-28m: as far from the integers as these are from themselves in another batch, by single steps of the
    activations' grid."""
    from odyssey.accuracy.adapter import HarnessModel

    source = resolve_model("testbed-28m", path=str(evaluation_data / "models/testbed-28m"))
    method = build_method("rtn", settings_class("rtn")())
    quantize_checkpoint(source, method, {}, None, tmp_path / "rtn", device=torch.device("cpu"), seed=0)
    requests = requests_of("arc_easy", 0, 10, evaluation_data / "data", tmp_path / "cache")
    scores = []
    for backend in ("integer", "simulate"):
        model = load_quantized(tmp_path / "rtn", backend=backend)
        found = HarnessModel(model, load_tokenizer(source), 8).loglikelihood(requests)
        scores.append(np.array([value for value, _ in found]))
    difference = np.abs(scores[1] - scores[0])
    assert np.median(difference) < 0.05
    assert difference.max() < 0.02 * np.abs(scores[0]).max()
