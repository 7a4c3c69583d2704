"""Why a cell of a table has no record: what the model catalogue (conf/model), the prepared sweeps (conf/experiment),
the predictions of odyssey.footprint and the records that there are say of it.

Neither this machine nor the hub is asked, so that the same records give the same words.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.recipes import recipe_settings
from experiments.sources import Sources
from odyssey.record import OK

_CONF = Path(__file__).resolve().parents[1] / "conf"
_GIB = 2**30


@dataclass(frozen=True)
class Reason:
    """text: as it stands below a table. short: a few words for a figure, "" where "not run" says it all."""

    text: str
    short: str = ""


class NotRun:
    """Reasons for cells without a record, given what was measured."""

    def __init__(self, sources: Sources | None = None) -> None:
        sources = sources or Sources()
        self._gpu = max(_gpus(sources), key=lambda gpu: gpu[1], default=None)
        products = [each for each in sources.records if each["config"].get("gemm", {}).get("bench", "none") != "none"]
        # What failed gives way to what did not.
        last = products[-1] if products and not sources.gemm else {"outcome": OK}
        self._failed_product = "" if last["outcome"] == OK else f"{last['outcome']}: {last.get('reason')}"
        self._unavailable = {
            row["kernel"]: row["unavailable"] for each in sources.gemm for row in each["rows"] if row.get("unavailable")
        }

    def accuracy(self, experiment: str, model: str, method: str, recipe: str | None = None) -> tuple[Reason, ...]:
        """Of a cell of a prepared sweep. recipe: of method=odyssey, a name of recipes.py."""
        if not is_catalogued(model):
            return (Reason(f"conf/model has no {model}"),)
        cell = prepared_cell(experiment, model, method, recipe)
        gated = ()
        if cell.model.gated:
            owner = cell.model.hub_id.partition("/")[0]
            text = f"weights are gated: accept the licence of {owner} on the hub, then set HF_TOKEN"
            gated = (Reason(text, "gated"),)
        return (*gated, self._size(cell))

    def latency(self, experiment: str, model: str, formats: tuple[str, ...]) -> tuple[Reason, ...]:
        """Of the decode engine with random weights at batch 1; formats: those that the cell compares, beside W4A8."""
        if not is_catalogued(model):
            return (Reason(f"conf/model has no {model}"),)
        cell = prepared_cell(experiment, model, None)
        timed = dataclasses.replace(cell.latency, against=list(formats), batch_size=1)
        return (self._size(dataclasses.replace(cell, latency=timed)),)

    def timing(self, input_len: int, output_len: int, experiment: str) -> tuple[Reason, ...]:
        """Of any model in the decode engine."""
        lengths = f"{input_len} tokens in and {output_len} out"
        return (Reason(f"no record of the decode engine with {lengths}; experiment={experiment} on a GPU"),)

    def engine(self) -> tuple[Reason, ...]:
        """Of an engine of the paper that none of ours is."""
        from odyssey.latency.names import ENGINES

        ours = ", ".join(name for name in ENGINES if name != "none")
        return (Reason(f"none of the engines that this project times (latency.engine: {ours})"),)

    def product(self, kernel: str, experiment: str, *, has_size: bool = True) -> tuple[Reason, ...]:
        """Of a single matrix product. has_size: whether its size is known."""
        from fastgemm.bench.competitors import KERNELS

        if kernel not in KERNELS:
            return (Reason("none of the kernels that fastgemm.bench times"),)
        if kernel in self._unavailable:
            return (Reason(f"unavailable: {self._unavailable[kernel]}", "unavailable"),)
        if self._failed_product:
            return (Reason(self._failed_product, self._failed_product.partition(":")[0]),)
        if not has_size:
            return (Reason("the size of the paper's product is not known, so that no record can be of it"),)
        text = f"no result of fastgemm.bench with this kernel; experiment={experiment} on an NVIDIA GPU"
        return (Reason(text, "no GPU record"),)

    def _size(self, cell) -> Reason:
        needed, weights = _gpu_bytes(cell)
        if self._gpu is None:
            return Reason("no record of any GPU yet", "no GPU record")
        name, available = self._gpu
        gpu = f"{name}, {available / _GIB:.0f} GiB"
        if needed <= available:
            text = f"no GPU record of this cell yet; predicted to fit the largest GPU with a record ({gpu})"
            return Reason(text, "no GPU record")
        need = f"{needed / _GIB:.0f} GiB"
        return Reason(
            f"predicted to need {need} on one GPU (FP16 weights: {weights / _GIB:.0f} GiB), more than the largest GPU "
            f"with a record has ({gpu})",
            f"needs {need}",
        )


def _gpus(sources: Sources) -> Iterator[tuple[str, int]]:
    """Name and bytes of every GPU that a record is of."""
    for document in (*sources.records, *sources.gemm, *sources.end_to_end):
        environment = document.get("environment", {})
        gpu = environment.get("gpu")
        if isinstance(gpu, dict) and gpu.get("memory_bytes"):
            yield gpu["name"], gpu["memory_bytes"]
        elif isinstance(gpu, str) and environment.get("memory_bytes"):
            yield gpu, environment["memory_bytes"]


def is_catalogued(model: str) -> bool:
    return (_CONF / "model" / f"{model}.yaml").is_file()


@functools.cache
def _prepared(experiment: str):
    """The settings that all cells of a prepared sweep share, on a GPU."""
    from odyssey.config import register_schemas
    from odyssey.overrides import check_command_line

    register_schemas()
    (cell,) = check_command_line([f"experiment={experiment}", "hydra.mode=RUN", "device=cuda"], _CONF).cells
    return cell


def prepared_cell(experiment: str, model: str, method: str | None, recipe: str | None = None):
    """The sweep's cell of a model and method; None for the method that all cells share."""
    from omegaconf import OmegaConf

    from odyssey.config import ModelConfig
    from odyssey.methods import settings_class

    cell = _prepared(experiment)
    described = OmegaConf.load(_CONF / "model" / f"{model}.yaml")
    settings = {key: value for key, value in described.items() if key != "defaults"}
    changes = {"model": ModelConfig(**settings)}
    if method is not None:
        changes["method"] = settings_class(method)(**recipe_settings(recipe) if recipe else {})
    return dataclasses.replace(cell, **changes)


def _gpu_bytes(cell) -> tuple[int, int]:
    """What the cell is predicted to need of a GPU, and the bytes of the model's weights in FP16."""
    # Imported here: tables in which nothing is missing are drawn without loading torch.
    from odyssey.engine.shapes import known_config
    from odyssey.footprint import footprint
    from odyssey.methods import build_method
    from odyssey.sizes import ModelSizes, Texts

    sizes = ModelSizes.from_config(known_config(cell.model.name))
    scheme = build_method(cell.method.name, cell.method).scheme
    # Texts, cores and free memory of the host change nothing on the GPU.
    found = footprint(cell, sizes, scheme, texts=Texts(), on_gpu=True, cores=1, free_bytes=2**40)
    return found.gpu_bytes, sizes.checkpoint_bytes
