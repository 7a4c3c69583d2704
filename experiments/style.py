"""How methods look in every table and figure: order, name, colour (Okabe-Ito, safe for colour blindness)."""

from __future__ import annotations

METHOD_ORDER = ("fp16", "rtn", "awq", "gptq", "smoothquant", "odyssey")
_NAMES = {
    "fp16": "FP16",
    "rtn": "RTN",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "smoothquant": "SmoothQuant",
    "odyssey": "OdysseyLLM",
}
_COLOURS = {
    "fp16": "#000000",
    "rtn": "#E69F00",
    "awq": "#56B4E9",
    "gptq": "#009E73",
    "smoothquant": "#CC79A7",
    "odyssey": "#D55E00",
}


def method_name(method: str) -> str:
    return _NAMES.get(method, method)


def method_colour(method: str) -> str:
    return _COLOURS.get(method, "#999999")


def method_rank(method: str) -> int:
    """Position in tables; methods unknown to the paper come last."""
    return METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
