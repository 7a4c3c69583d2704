"""Perplexity of the small LLaMA quantized here and by the reference libraries, with the same calibration tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import odyssey
from baselines.awq import AwqMethod, AwqSettings
from baselines.gptq import GptqMethod, GptqSettings
from baselines.smoothquant import SmoothQuantMethod, SmoothQuantSettings
from odyssey.accuracy.perplexity import perplexity
from odyssey.methods import settings_dict
from odyssey.quantization.pipeline import quantize_checkpoint

pytestmark = [pytest.mark.reference, pytest.mark.timeout(2400)]
WINDOWS, WITHIN = 24, 0.002
TITLE = f"Perplexity on the first {WINDOWS} windows"
ALPHA = 0.8


@pytest.fixture(scope="module")
def measured(testbed, tmp_path_factory):
    """measured(method object) -> perplexity of the model quantized with it; each is quantized once."""
    values: dict[str, float] = {}

    def measure(method) -> float:
        key = f"{method.name} {method.settings}"
        if key not in values:
            directory = tmp_path_factory.mktemp("quantized")
            quantize_checkpoint(
                testbed.source, method, settings_dict(method.settings), testbed.tokens, directory,
                device=torch.device("cpu"),
            )  # fmt: skip
            values[key] = evaluate(testbed, odyssey.load_quantized(directory))
        return values[key]

    return measure


def evaluate(testbed, model) -> float:
    return perplexity(model, testbed.tokenizer, testbed.text, max_windows=WINDOWS)["value"]


def compare(report, case: str, ours: float, theirs: float, within: float = WITHIN) -> None:
    report.add(TITLE, case, ours=ours, theirs=theirs, **{"relative difference": ours / theirs - 1})
    assert ours == pytest.approx(theirs, rel=within)


def llm_compressor(testbed, recipe) -> float:
    """Perplexity of the model that llm-compressor leaves behind, with its own fake quantization in float32."""
    from datasets import Dataset
    from llmcompressor import oneshot

    model = AutoModelForCausalLM.from_pretrained(testbed.source.path, dtype=torch.float32).eval()
    rows = testbed.tokens.tokens
    dataset = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    oneshot(
        model=model, processor=testbed.tokenizer, dataset=dataset, recipe=recipe, max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows), shuffle_calibration_samples=False,
    )  # fmt: skip
    return evaluate(testbed, model)


def test_gptq_and_auto_gptq(measured, report):
    theirs = measured(GptqMethod(GptqSettings(backend="auto-gptq")))
    ours = measured(GptqMethod(GptqSettings()))
    compare(report, "GPTQ W4A16-g128, auto-gptq", ours, theirs)


def test_gptq_and_llm_compressor(testbed, measured, report):
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    scheme: QuantizationScheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.actorder = "weight"
    theirs = llm_compressor(testbed, [GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])])
    ours = measured(GptqMethod(GptqSettings(act_order=True)))
    compare(report, "GPTQ W4A16-g128, act-order with static groups, llm-compressor", ours, theirs)


def test_awq_and_autoawq(measured, report):
    theirs = measured(AwqMethod(AwqSettings(backend="autoawq")))
    ours = measured(AwqMethod(AwqSettings()))
    compare(report, "AWQ W4A16-g128, autoawq", ours, theirs)


def test_smoothquant_and_llm_compressor(testbed, measured, report):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    recipe = [
        SmoothQuantModifier(smoothing_strength=ALPHA),
        QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ]
    theirs = llm_compressor(testbed, recipe)
    ours = measured(SmoothQuantMethod(SmoothQuantSettings(alpha=ALPHA)))
    compare(report, f"SmoothQuant W8A8, alpha {ALPHA}, llm-compressor", ours, theirs)
