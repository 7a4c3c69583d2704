"""How models, methods and kernels look in tables and figures: order, name, colour (Okabe-Ito, safe for colour
blindness)."""

from __future__ import annotations

from experiments import paper

METHOD_ORDER = ("fp16", "rtn", "awq", "gptq", "smoothquant", "odyssey")
_NAMES = {
    "fp16": "FP16",
    "rtn": "RTN",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "smoothquant": "SmoothQuant",
    "odyssey": "OdysseyLLM",
    "trtllm-fp16": "TensorRT-LLM FP16",
    "trtllm-w8a8": "TensorRT-LLM W8A8",
    "w8a8": "W8A8",
    "w4a16-g128": "W4A16 g128",
    "w4a8": "OdysseyLLM W4A8",
    "w4a8-g128": "W4A8 g128 (fine-grained)",
    "transformers-fp16": "Transformers FP16, eager",
    "transformers-compiled-fp16": "Transformers FP16, compiled",
}
# Models of conf/model that are not the paper's.
_OTHER_MODELS = {
    "llama-30b": "LLaMA-30B",
    "llama3-8b": "Llama-3-8B",
    "llama3-70b": "Llama-3-70B",
    "llama3.1-8b": "Llama-3.1-8B",
    "llama3.1-70b": "Llama-3.1-70B",
    "mistral-7b": "Mistral-7B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "qwen2.5-14b": "Qwen2.5-14B",
    "qwen2.5-32b": "Qwen2.5-32B",
    "qwen2.5-72b": "Qwen2.5-72B",
}
# Methods of end-to-end latency by their number format, peers first.
_ENGINE_ORDER = (
    "transformers-fp16", "transformers-compiled-fp16", "fp16", "w4a16-g128", "w8a8", "w4a8-g128", "w4a8",
)  # fmt: skip
_COLOURS = {
    "fp16": "#000000",
    "rtn": "#E69F00",
    "awq": "#56B4E9",
    "gptq": "#009E73",
    "smoothquant": "#CC79A7",
    "odyssey": "#D55E00",
    "w8a8": "#CC79A7",
    "w4a16-g128": "#009E73",
    "w4a8-g128": "#56B4E9",
    "w4a8": "#D55E00",
}
# Kernels of fastgemm.bench: a kernel has the colour of the method that runs on it.
_KERNELS = {
    "fastgemm": ("FastGEMM W4A8", "#D55E00"),
    "fastgemm-ready": ("FastGEMM W4A8, weights ready", "#D55E00"),
    "fastgemm-sm80": ("FastGEMM W4A8 (mma.sync)", "#A04000"),
    "w8a8": ("W8A8", "#CC79A7"),
    "w8a8-ready": ("W8A8, weights ready", "#CC79A7"),
    "w8a8-sm80": ("W8A8 (mma.sync)", "#885577"),
    "cublas-fp16": ("cuBLAS FP16", "#000000"),
    "int-mm": ("torch._int_mm W8A8", "#0072B2"),
    "w4a16": ("torch W4A16 g128", "#009E73"),
    "grouped": ("fine-grained g128", "#56B4E9"),
    "grouped-sm80": ("fine-grained g128 (mma.sync)", "#2B6E94"),
    "asymmetric": ("asymmetric", "#E69F00"),
    "asymmetric-sm80": ("asymmetric (mma.sync)", "#8F6300"),
    "unfused": ("unpack + GEMM", "#F0E442"),
    "w4a16-humming": ("humming W4A16 g128", "#009E73"),
    "humming": ("humming W4A8", "#009E73"),
    "cutlass-w8a8": ("CUTLASS W8A8, tuned", "#56B4E9"),
    "quik-w4a4": ("QUIK W4A4", "#009E73"),
}
PAPER_COLOUR = "#BBBBBB"
COLUMN_WIDTH = 3.4  # inches, of a two-column page
PAGE_WIDTH = 7.0


def model_name(model: str) -> str:
    return paper.MODEL_NAMES.get(model) or _OTHER_MODELS.get(model, model)


def model_rank(model: str) -> tuple:
    """The paper's models in the paper's order, then others by name."""
    names = list(paper.MODEL_NAMES)
    return (names.index(model), "") if model in names else (len(names), model)


def method_name(method: str) -> str:
    return _NAMES.get(method, method)


def method_colour(method: str) -> str:
    return _COLOURS.get(method, "#999999")


def method_rank(method: str) -> int:
    """Position in tables; methods unknown to the paper come last."""
    return METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)


def engine_rank(method: str) -> int:
    """Position in tables of end-to-end latency; others come last."""
    return _ENGINE_ORDER.index(method) if method in _ENGINE_ORDER else len(_ENGINE_ORDER)


def kernel_name(kernel: str) -> str:
    return _KERNELS[kernel][0] if kernel in _KERNELS else kernel


def kernel_line(kernel: str) -> str:
    """Line style: a kernel that was promised its weights is dashed beside the one that was not."""
    return "--" if kernel.endswith("-ready") else "-"


def kernel_colour(kernel: str) -> str:
    return _KERNELS[kernel][1] if kernel in _KERNELS else "#999999"
