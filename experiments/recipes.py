"""The steps of the OdysseyLLM recipe, as the paper's ablation names them."""

from __future__ import annotations

_CLIPPING = {"none": "", "learned": "LWC", "search": "clip search"}
_COMPENSATION = {"none": "", "gptq": "GPTQ"}
RECIPE_ORDER = ("vanilla", "clip search", "LWC", "GPTQ", "clip search + GPTQ", "LWC + GPTQ")
FULL_RECIPE = RECIPE_ORDER[-1]


def recipe_name(clipping: str, compensation: str) -> str:
    """Of these settings of method=odyssey: vanilla, LWC, LWC + GPTQ, ..."""
    steps = _CLIPPING.get(clipping), _COMPENSATION.get(compensation)
    return " + ".join(step for step in steps if step) or "vanilla"


def recipe_settings(name: str) -> dict[str, str]:
    """The settings of method=odyssey whose name this is. Raises KeyError for no recipe's name."""
    return {
        recipe_name(clipping, compensation): {"clipping": clipping, "compensation": compensation}
        for clipping in _CLIPPING
        for compensation in _COMPENSATION
    }[name]


def recipe_of(config: dict) -> str | None:
    """The recipe of a cell that belongs into the ablation; None otherwise. Round to nearest is its vanilla start."""
    method = config["method"]
    if method["name"] == "rtn":
        return "vanilla" if method["symmetric"] else None
    return recipe_name(method["clipping"], method["compensation"]) if method["name"] == "odyssey" else None
