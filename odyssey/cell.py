"""One cell: quantize a model with a method, measure it, write the record. Runs in a process of its own.

`python -m odyssey.cell CONFIG.yaml RECORD.json` is started by odyssey.runner; a user starts run.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
import traceback
from pathlib import Path

from omegaconf import OmegaConf

from odyssey.child import die_with_parent
from odyssey.config import RootConfig, register_schemas, validate
from odyssey.errors import MissingDataError, OdysseyError, UnsupportedError
from odyssey.methods import existing_checkpoint
from odyssey.outcomes import of_exception
from odyssey.record import OK, RECORD_VERSION, cell_directory, model_directory_name, write_json


class Cell:
    """Runs the stages of a cell and collects the record as it goes, so that a failure keeps what was finished.

    The stages (odyssey/stages) read config, device, progress, directory and, but for random weights, what is known of
    the model: source (its files), existing (the checkpoint that takes the place of quantizing, or None), architecture,
    tokenizer and max_positions.
    """

    def __init__(self, config: RootConfig, plain_config: dict, digest: str, directory: Path | None = None) -> None:
        """directory: where files beside the record go; default the one that odyssey.runner would use."""
        self.config = config
        self.directory = directory or cell_directory(config, digest)
        self.record: dict = {
            "version": RECORD_VERSION,
            "digest": digest,
            "outcome": None,
            "reason": None,
            "started": _now(),
            "config": plain_config,
            "timings": {},
        }

    def run(self) -> dict:
        """Execute all stages; every failure becomes the record's outcome and reason."""
        started = time.monotonic()
        try:
            self._stages()
            self.record["outcome"] = OK
        except Exception as error:
            if not isinstance(error, OdysseyError):
                traceback.print_exc()
            self.record["outcome"], self.record["reason"] = of_exception(error)
        self.record["memory"] = _memory_peaks()
        self.record["finished"] = _now()
        self.record["timings"]["total_s"] = time.monotonic() - started
        return self.record

    def _stages(self) -> None:
        # Imported here: a config error or a found record is answered before torch is loaded.
        import torch

        from odyssey import environment
        from odyssey.models.architecture import LlamaFamily
        from odyssey.models.load import load_tokenizer
        from odyssey.progress import Progress
        from odyssey.stages.accuracy import load_measured, measure_perplexity, measure_tasks
        from odyssey.stages.gemm import time_products
        from odyssey.stages.latency import time_beside_reference, time_checkpoint, time_random_weights
        from odyssey.stages.quantization import quantize

        config = self.config
        self.record["environment"] = environment.describe()
        self.record["seeds"] = {"seed": config.seed, "calibration": config.calibration.seed}
        torch.manual_seed(config.seed)
        self.device = _device(config.device)
        self.record["device"] = str(self.device)
        self.progress = Progress()
        name = model_directory_name(config)
        self.record["model"] = {"name": name}
        if config.gemm.bench != "none":
            self._timed("gemm_s", lambda: time_products(self))
            return
        if config.latency.dummy_weights:
            self._timed("latency_s", lambda: time_random_weights(self))
            return
        root = config.data.root
        if root is not None and not Path(root).expanduser().is_dir():
            # Not when the blocks are quantized and a text is looked for; the hub's copy is not what was asked for.
            raise MissingDataError(f"data.root={root}: no such directory")
        self._find_source(name)
        self.architecture = LlamaFamily.from_directory(self.source.path, quantized=self.existing is not None)
        self.tokenizer = load_tokenizer(self.source)
        checkpoint = self._timed("quantization_s", lambda: quantize(self))
        measurements = {
            "perplexity_s": measure_perplexity if config.accuracy.perplexity is not None else None,
            "tasks_s": measure_tasks if config.accuracy.tasks else None,
            "latency_s": time_beside_reference if config.latency.engine == "transformers" else None,
        }
        wanted = {key: measure for key, measure in measurements.items() if measure is not None}
        failures: list[OdysseyError] = []

        def attempt(key: str, measure) -> None:
            try:
                self._timed(key, measure)
            except OdysseyError as error:
                # One data set that is not there costs no other measurement.
                failures.append(error)

        if wanted:
            model = self._timed("load_s", lambda: load_measured(self, checkpoint))
            for key, measure in wanted.items():
                attempt(key, lambda measure=measure: measure(self, model))
            del model
        if config.latency.engine in ("odyssey", "vllm"):
            # These engines load the checkpoint themselves, when its memory is free again.
            attempt("latency_s", lambda: time_checkpoint(self, checkpoint))
        if failures:
            raise type(failures[0])("; ".join(map(str, failures)))

    def _find_source(self, name: str) -> None:
        """The model's files: of an existing checkpoint that the method names, a directory, or the hub."""
        from odyssey.models.source import resolve_model

        model = self.config.model
        self.existing = existing_checkpoint(self.config.method)
        if self.existing is not None:
            from baselines.checkpoint_import import checkpoint_source

            found = checkpoint_source(name, self.existing)
        else:
            found = resolve_model(model.name, hub_id=model.hub_id, path=model.path, revision=model.revision)
        self.source = dataclasses.replace(found, name=name)
        self.record["model"] = {"name": name, "origin": found.origin, "fingerprint": found.fingerprint}

    def _timed(self, key: str, stage):
        started = time.monotonic()
        try:
            return stage()
        finally:
            self.record["timings"][key] = time.monotonic() - started

    def clip_length(self, key: str, length: int) -> int:
        """A sequence length that the model takes, with a word where that is less than asked."""
        if length > self.max_positions:
            print(f"{key}={length}: {self.source.name} takes {self.max_positions} tokens, using that")
        return min(length, self.max_positions)


def _device(name: str):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("device=cuda: no CUDA device is visible; use device=cpu or device=auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _memory_peaks() -> dict:
    from odyssey.environment import peak_rss_bytes

    peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_cuda_bytes": None}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peaks["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def main(config_path: str, record_path: str, digest: str) -> int:
    """Entry of the child process: run the cell that the config file describes, write its record."""
    die_with_parent()
    register_schemas()
    config = OmegaConf.load(config_path)
    plain = OmegaConf.to_container(config)
    record = Cell(_typed(config), plain, digest, Path(record_path).parent).run()
    write_json(Path(record_path), record)
    if record["outcome"] != OK:
        print(f"{record['outcome']}: {record['reason']}", flush=True)
    return 0 if record["outcome"] == OK else 1


def _typed(config) -> RootConfig:
    """The plain YAML of the parent, typed by the schema again."""
    from odyssey.config import typed_config

    return validate(typed_config(config))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
