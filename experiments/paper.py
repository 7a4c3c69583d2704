"""Every figure of the OdysseyLLM paper (arXiv 2311.09550) that the project compares with, each with its source.

A figure that is not here was not available to the project; tables call it "not reported" and nobody guesses it.
Models have the names of conf/model, methods those of conf/method where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

LAMBADA, WIKITEXT2, COMMONSENSE = "LAMBADA accuracy", "WikiText-2 perplexity", "common-sense accuracy"
LATENCY, ENGINE_SPEEDUP = "end-to-end latency", "speed-up of W4A8 over FP16"
QUIK_GEMM, GEMM_KINDS, ABLATION = "GEMM against QUIK", "GEMM kinds", "ablation, WikiText-2 perplexity"

MODEL_NAMES = {
    "llama-7b": "LLaMA-7B",
    "llama-13b": "LLaMA-13B",
    "llama-65b": "LLaMA-65B",
    "llama2-7b": "LLaMA-2-7B",
    "llama2-13b": "LLaMA-2-13B",
    "llama2-70b": "LLaMA-2-70B",
}
METHOD_FORMATS = {
    "fp16": "W16A16",
    "awq": "W4A16-g128",
    "gptq": "W4A16-g128",
    "smoothquant": "W8A8",
    "odyssey": "W4A8",
}


@dataclass(frozen=True)
class Reported:
    """One figure of the paper.

    quantity: one of this module's constants. key: what identifies the cell, e.g. (model, method). unit: of the value,
    "" for a bare number. source: where the paper has it.
    """

    quantity: str
    key: tuple[str, ...]
    value: float
    unit: str
    source: str


def reported(quantity: str) -> dict[tuple[str, ...], Reported]:
    """The paper's figures of one quantity by their key, in the paper's order."""
    return {figure.key: figure for figure in REPORTED if figure.quantity == quantity}


def _grid(quantity: str, unit: str, source: str, columns: tuple[str, ...], rows: dict[str, tuple]) -> list[Reported]:
    """Rows are methods, columns are models; keys are (model, method)."""
    return [
        Reported(quantity, (model, method), value, unit, source)
        for number, model in enumerate(columns)
        for method, values in rows.items()
        for value in values[number : number + 1]
    ]


_ALL_MODELS = tuple(MODEL_NAMES)
_LAMBADA = {
    "fp16": (73.74, 76.19, 79.20, 73.70, 76.64, 79.57),
    "awq": (66.80, 73.72, 78.73, 70.23, 75.80, 78.40),
    "gptq": (70.21, 75.68, 78.77, 72.31, 75.99, 79.86),
    "smoothquant": (73.49, 76.15, 78.07, 73.36, 76.05, 78.71),
    "odyssey": (73.49, 76.23, 78.56, 70.81, 76.07, 79.43),
}
_WIKITEXT2 = {
    "fp16": (5.73, 5.10, 3.51),
    "smoothquant": (5.89, 5.21, 3.73),
    "odyssey": (6.17, 5.37, 3.92),
}
COMMONSENSE_TASKS = ("WinoGrande", "PIQA", "HellaSwag", "ARC-e", "average")
_COMMONSENSE = {
    ("llama-13b", "fp16"): (0.7277, 0.8009, 0.7907, 0.7471, 0.7666),
    ("llama-13b", "smoothquant"): (0.7238, 0.8020, 0.7836, 0.7466, 0.7640),
    ("llama-13b", "odyssey"): (0.7238, 0.7998, 0.7792, 0.7441, 0.7617),
    ("llama2-70b", "fp16"): (0.7798, 0.8275, 0.8381, 0.8098, 0.8138),
    ("llama2-70b", "smoothquant"): (0.7766, 0.8303, 0.8345, 0.8127, 0.8135),
    ("llama2-70b", "odyssey"): (0.7751, 0.8313, 0.8272, 0.8060, 0.8099),
}
# Milliseconds for 1024 tokens in and 128 out.
ENGINES = ("trtllm-fp16", "trtllm-w8a8", "odyssey")
_LATENCY = {
    "llama2-7b": (1411, 1030, 751),
    "llama2-13b": (2547, 1657, 1139),
    "llama2-70b": (4177, 3087, 2263),
}
# The ratios as the paper prints them: over TensorRT-LLM FP16 and W8A8.
_LATENCY_RATIOS = {"llama2-7b": (1.87, 1.37), "llama2-13b": (2.23, 1.45), "llama2-70b": (1.83, 1.36)}
_ENGINE_SPEEDUP = {"llama2-7b": 1.9, "llama2-13b": 2.15, "llama2-70b": 1.76}
HUGGING_FACE_SPEEDUP = Reported(ENGINE_SPEEDUP, ("hugging face fp16",), 4.0, "x", "text, as an upper bound")
STAGES = ("context decoding", "self-decoding")
# (QUIK W4A4, OdysseyLLM W4A8) in milliseconds, and the speed-up as the paper prints it.
_QUIK = {"context decoding": (0.139, 0.121, 1.14), "self-decoding": (0.052, 0.012, 4.33)}
# Nanoseconds of one GEMM in self-decoding; its size is not among the figures that were available.
_GEMM_KINDS = {
    "grouped": (2.64e5, "figure 7"),
    "asymmetric": (0.87e5, "figure 7, as a summary of the paper gives it"),
    "fastgemm": (0.87e5, "figure 7"),
}
RECIPES = ("vanilla", "LWC", "LWC + GPTQ")
_ABLATION = {"llama-7b": (6.73, 6.25, 6.17), "llama2-7b": (7.13, 6.73, 6.11)}

REPORTED: tuple[Reported, ...] = (
    *_grid(LAMBADA, "%", "table 2", _ALL_MODELS, _LAMBADA),
    *_grid(WIKITEXT2, "", "table 2", _ALL_MODELS, _WIKITEXT2),
    *(
        Reported(COMMONSENSE, (*key, task), value, "", "table 3")
        for key, values in _COMMONSENSE.items()
        for task, value in zip(COMMONSENSE_TASKS, values, strict=True)
    ),
    *(
        Reported(LATENCY, (model, engine), float(value), "ms", "table 4")
        for model, values in _LATENCY.items()
        for engine, value in zip(ENGINES, values, strict=True)
    ),
    *(
        Reported(LATENCY, (model, f"odyssey over {engine}"), value, "x", "table 4")
        for model, values in _LATENCY_RATIOS.items()
        for engine, value in zip(ENGINES, values, strict=False)
    ),
    *(Reported(ENGINE_SPEEDUP, (model,), value, "x", "figure 6") for model, value in _ENGINE_SPEEDUP.items()),
    *(
        Reported(QUIK_GEMM, (stage, kernel), value, unit, "table 5")
        for stage, values in _QUIK.items()
        for kernel, value, unit in zip(
            ("quik-w4a4", "fastgemm", "fastgemm over quik-w4a4"), values, ("ms", "ms", "x"), strict=True
        )
    ),
    *(Reported(GEMM_KINDS, (kernel,), value, "ns", source) for kernel, (value, source) in _GEMM_KINDS.items()),
    *(
        Reported(ABLATION, (model, recipe), value, "", "table 6")
        for model, values in _ABLATION.items()
        for recipe, value in zip(RECIPES, values, strict=True)
    ),
)
