"""One cell: quantize a model with a method, measure it, write the record. Runs in a process of its own.

`python -m odyssey.cell CONFIG.yaml RECORD.json` is started by odyssey.runner; a user starts run.py.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
import traceback
from pathlib import Path

from omegaconf import OmegaConf

from odyssey.child import die_with_parent
from odyssey.config import RootConfig, dataset_of, register_schemas, validate
from odyssey.errors import OdysseyError, UnsupportedError
from odyssey.methods import existing_checkpoint
from odyssey.outcomes import of_exception
from odyssey.record import OK, RECORD_VERSION, cell_directory, model_directory_name, write_json

GEMM_NAME = "gemm.json"


class Cell:
    """Runs the stages of a cell and collects the record as it goes, so that a failure keeps what was finished."""

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
        from odyssey.models.load import load_tokenizer
        from odyssey.models.source import resolve_model
        from odyssey.progress import Progress

        config = self.config
        self.record["environment"] = environment.describe()
        self.record["seeds"] = {"seed": config.seed, "calibration": config.calibration.seed}
        torch.manual_seed(config.seed)
        self.device = _device(config.device)
        self.record["device"] = str(self.device)
        self.progress = Progress()
        name = model_directory_name(config)
        if config.gemm.bench != "none":
            self.record["model"] = {"name": name}
            self._timed("gemm_s", self._gemm)
            return
        if config.latency.dummy_weights:
            self._timed("latency_s", self._dummy_latency)
            return
        self.existing = existing_checkpoint(config.method)
        if self.existing is not None:
            from baselines.checkpoint_import import checkpoint_source

            self.source = checkpoint_source(name, self.existing)
        else:
            self.source = resolve_model(
                config.model.name, hub_id=config.model.hub_id, path=config.model.path, revision=config.model.revision
            )
        if self.source.name != name:
            import dataclasses

            self.source = dataclasses.replace(self.source, name=name)
        self.record["model"] = {
            "name": name,
            "origin": self.source.origin,
            "fingerprint": self.source.fingerprint,
        }
        self.tokenizer = load_tokenizer(self.source)
        checkpoint = self._timed("quantization_s", self._quantize)
        measurements = {
            "perplexity_s": self._perplexity if config.accuracy.perplexity is not None else None,
            "tasks_s": self._tasks if config.accuracy.tasks else None,
            "latency_s": self._latency if config.latency.engine == "transformers" else None,
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
            model = self._timed("load_s", lambda: self._load(checkpoint))
            for key, measure in wanted.items():
                attempt(key, lambda measure=measure: measure(model))
            del model
        if config.latency.engine in ("odyssey", "vllm"):
            # These engines load the checkpoint themselves, when its memory is free again.
            attempt("latency_s", lambda: self._engine_latency(checkpoint))
        if failures:
            raise type(failures[0])("; ".join(map(str, failures)))

    def _timed(self, key: str, stage):
        started = time.monotonic()
        try:
            return stage()
        finally:
            self.record["timings"][key] = time.monotonic() - started

    def _quantize(self) -> Path | None:
        """Write (or find) the quantized checkpoint; None for fp16, which measures the source itself."""
        from odyssey.methods import build_method, settings_dict
        from odyssey.models.architecture import LlamaFamily
        from odyssey.models.reader import CheckpointReader
        from odyssey.quantization.pipeline import job_digest, quantize_checkpoint

        config = self.config
        architecture = LlamaFamily.from_directory(self.source.path, quantized=self.existing is not None)
        self.max_positions = architecture.max_positions
        method = build_method(config.method.name, config.method)
        self.record["method"] = {"name": method.name, "label": method.scheme.label, "scheme": method.scheme.to_dict()}
        if method.scheme.weight_bits == 16:
            reader = CheckpointReader(self.source.path)
            dtype = reader.read(architecture.embedding_name).dtype
            self.record["size"] = {"disk_bytes": reader.total_bytes(), "bits_per_weight": float(8 * dtype.itemsize)}
            self.record["method"]["checkpoint_dtype"] = str(dtype).removeprefix("torch.")
            return None
        settings = settings_dict(config.method)
        checkpoints = Path(config.output_dir) / self.source.name / "checkpoints"
        if self.existing is not None:
            directory, report = self._import(method.name, settings, checkpoints)
        else:
            calibration = self._calibration(architecture) if method.needs_calibration else None
            digest = job_digest(self.source, method, settings, calibration, config.seed)
            directory = checkpoints / f"{method.name}-{digest}"
            if config.force:
                _remove(directory)
            report = quantize_checkpoint(
                self.source, method, settings, calibration, directory,
                device=self.device, seed=config.seed, progress=self.progress,
            )  # fmt: skip
        self.record["quantization"] = {
            "checkpoint": os.path.relpath(directory, config.output_dir),
            "job": report.manifest["job"],
            "seconds": report.seconds,
            "block_seconds": report.block_seconds,
            "resumed_blocks": report.resumed_blocks,
            "activations_on_disk": report.activations_on_disk,
            "calibration": report.manifest["calibration"],
            "block_metrics": report.manifest["block_metrics"],
        }
        self.record["size"] = report.manifest["size"]
        return directory

    def _import(self, method: str, settings: dict, checkpoints: Path):
        """An existing checkpoint in place of one that is quantized here: (directory, report)."""
        from baselines.checkpoint_import import import_checkpoint

        directory = checkpoints / f"{method}-existing-{self.source.fingerprint}"
        if self.config.force:
            _remove(directory)
        report = import_checkpoint(self.source, method, settings, directory, self.progress)
        self.record["method"].update({key: report.manifest[key] for key in ("label", "scheme")})
        return directory, report

    def _calibration(self, architecture):
        from odyssey.data.calibration import sample_calibration
        from odyssey.data.texts import load_corpus

        group = self.config.calibration
        dataset = dataset_of(group, self.config.model, default="c4")
        corpus = load_corpus(dataset, "train", path=group.path, root=self.config.data.root)
        seqlen = self._clip_length("calibration.seqlen", group.seqlen)
        return sample_calibration(corpus, self.tokenizer, num_samples=group.num_samples, seqlen=seqlen, seed=group.seed)

    def _clip_length(self, key: str, length: int) -> int:
        if length > self.max_positions:
            print(f"{key}={length}: {self.source.name} takes {self.max_positions} tokens, using that")
        return min(length, self.max_positions)

    def _load(self, checkpoint: Path | None):
        from odyssey.models.load import load_model
        from odyssey.quantization.checkpoint import load_quantized

        if checkpoint is None:
            model = load_model(self.source, self.device)
            arithmetic = "floating point"
        else:
            backend = "simulate" if self.config.accuracy.simulate else "integer"
            model = load_quantized(checkpoint, self.device, backend=backend)
            scheme = self.record["method"]["scheme"]
            if backend == "simulate":
                arithmetic = "simulated"
            elif scheme["activation_bits"] == 8 and scheme["symmetric"]:
                arithmetic = "integer"
            else:
                arithmetic = "dequantized weights"
        self.record["model"]["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.record["method"]["arithmetic"] = arithmetic
        return model

    def _perplexity(self, model) -> None:
        from odyssey.accuracy.perplexity import perplexity
        from odyssey.data.texts import load_corpus

        group = self.config.accuracy.perplexity
        first = dataset_of(group, self.config.model, default="wikitext2")
        results = self.record.setdefault("accuracy", {}).setdefault("perplexity", {})
        failures: list[OdysseyError] = []
        for dataset in (first, *group.also):
            try:
                path = group.path if dataset == first else None
                corpus = load_corpus(dataset, "test", path=path, root=self.config.data.root)
                result = perplexity(
                    model, self.tokenizer, corpus,
                    window=self._clip_length("accuracy.perplexity.window", group.window),
                    max_windows=group.max_windows, seed=group.seed, progress=self.progress,
                )  # fmt: skip
            except OdysseyError as error:
                failures.append(error)
            else:
                results[dataset] = {**result, "simulated": self.config.accuracy.simulate}
        if failures:
            raise type(failures[0])("; ".join(map(str, failures)))

    def _tasks(self, model) -> None:
        from odyssey.accuracy.tasks import evaluate_tasks, remove_saved

        config = self.config
        if config.force:
            remove_saved(self.directory)
        identity = {
            "model": self.source.fingerprint,
            "checkpoint": self.record.get("quantization", {}).get("job"),
            "arithmetic": self.record["method"]["arithmetic"],
            "dtype": self.record["model"]["dtype"],
            "device": str(self.device),
        }
        evaluate_tasks(
            model, self.tokenizer, config.accuracy, self.record.setdefault("accuracy", {}).setdefault("tasks", {}),
            directory=self.directory, cache=Path(config.output_dir) / "cache" / "tasks", data_root=config.data.root,
            identity=identity, progress=self.progress,
        )  # fmt: skip

    def _dummy_latency(self) -> None:
        """Times random weights: no checkpoint is read, none is written."""
        from odyssey.engine import DecoderShapes, format_of
        from odyssey.latency.cells import dummy_config, measure_cell
        from odyssey.methods import build_method

        config = self.config
        name = model_directory_name(config)
        scheme = build_method(config.method.name, config.method).scheme
        self.record["model"] = {"name": name, "origin": "random weights"}
        self.record["method"] = {"name": config.method.name, "label": scheme.label, "scheme": scheme.to_dict()}
        if config.latency.engine == "vllm":
            self._vllm_latency(Path(config.model.path).expanduser() if config.model.path else None)
            return
        model_config = dummy_config(config.model.name, config.model.path)
        self._check_length(DecoderShapes.from_config(model_config).max_positions, name)
        self.record["latency"] = measure_cell(
            config.latency, model=name, config=model_config, form=format_of(scheme), checkpoint=None, source=None,
            device=self.device, seed=config.seed, progress=self.progress,
        )  # fmt: skip

    def _engine_latency(self, checkpoint: Path | None) -> None:
        """Times the cell's checkpoint in the decode engine, or in vLLM."""
        from odyssey.engine import format_of
        from odyssey.latency.cells import measure_cell
        from odyssey.models.architecture import LlamaFamily
        from odyssey.quantization.scheme import QuantScheme

        group = self.config.latency
        self._check_length(self.max_positions, self.source.name)
        if group.engine == "vllm":
            if checkpoint is not None and self.existing is None:
                raise UnsupportedError(
                    "latency.engine=vllm: times what vLLM reads, which this project's checkpoints are not; "
                    "use method=fp16, or method.checkpoint=DIR with a GPTQ or AWQ checkpoint"
                )
            self._vllm_latency(self.source.path)
            return
        directory = checkpoint or self.source.path
        self.record["latency"] = measure_cell(
            group, model=self.source.name, config=LlamaFamily.from_directory(directory).config,
            form=format_of(QuantScheme(**self.record["method"]["scheme"])), checkpoint=directory,
            source=self.source.path if self.existing is None else None, device=self.device, seed=self.config.seed,
            progress=self.progress,
        )  # fmt: skip

    def _vllm_latency(self, directory: Path | None) -> None:
        from odyssey.latency.vllm_engine import measure_vllm, require_vllm
        from odyssey.models.architecture import LlamaFamily

        require_vllm()
        if directory is None:
            raise UnsupportedError("latency.engine=vllm: needs model.path=DIR, a directory with at least config.json")
        self.record["latency"] = measure_vllm(
            self.config.latency, model=model_directory_name(self.config), directory=directory,
            vocab_size=LlamaFamily.from_directory(directory, quantized=True).config.vocab_size, device=self.device,
            seed=self.config.seed, progress=self.progress,
        )  # fmt: skip

    def _check_length(self, positions: int, name: str) -> None:
        group = self.config.latency
        if group.input_len + group.output_len > positions:
            raise UnsupportedError(
                f"latency.input_len={group.input_len} + latency.output_len={group.output_len} exceed the "
                f"{positions} positions of {name}; lower them"
            )

    def _latency(self, model) -> None:
        from odyssey.latency.transformers_engine import measure
        from odyssey.models.load import load_model

        group = self.config.latency
        self._check_length(self.max_positions, self.source.name)
        if self.existing is not None:
            raise UnsupportedError(
                f"method.checkpoint={self.existing}: latency is measured beside the unquantized model, which is not "
                "there; use latency=none"
            )
        reference = None if self.record["method"]["name"] == "fp16" else load_model(self.source, self.device)
        self.record["latency"] = measure(
            model, reference,
            batch_size=group.batch_size, input_len=group.input_len, output_len=group.output_len,
            warmup=group.warmup, repeats=group.repeats, seed=self.config.seed, progress=self.progress,
        )  # fmt: skip

    def _gemm(self) -> None:
        """Times single matrix products; the result stays beside the record, where tables and figures find it."""
        from fastgemm.bench.__main__ import EXIT_NO_GPU, EXIT_WRONG
        from fastgemm.bench.__main__ import main as bench

        group, path = self.config.gemm, self.directory / GEMM_NAME
        arguments = {
            "--shapes": ",".join(group.shapes),
            "--m": ",".join(map(str, group.m)),
            "--against": ",".join(group.against),
            "--rounds": str(group.rounds),
            "--json": str(path),
        }
        code = bench([f"{name}={value}" for name, value in arguments.items()])
        if code == EXIT_NO_GPU:
            raise UnsupportedError("gemm.bench=fastgemm: needs an NVIDIA GPU, and torch can use none on this machine")
        self.record["gemm"] = {"file": GEMM_NAME, "all_correct": code != EXIT_WRONG}
        if code not in (0, EXIT_WRONG):
            raise OdysseyError(f"gemm: python -m fastgemm.bench ended with code {code}; its last lines say why")
        if code == EXIT_WRONG:
            raise OdysseyError("gemm: a kernel's result was wrong; its rows have no time, the others are kept")


def _device(name: str):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("device=cuda: no CUDA device is visible; use device=cpu or device=auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _remove(directory: Path) -> None:
    import shutil

    if directory.is_dir():
        shutil.rmtree(directory)


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
