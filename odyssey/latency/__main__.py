"""End-to-end latency of several methods, models and batch sizes, with random weights, in one process.

    python -m odyssey.latency --models llama2-7b,llama2-13b --batch-sizes 1,4,16 --json FILE.json
    python -m odyssey.latency --models tiny --device cpu --input-len 32 --output-len 8

A model is a name of conf/model whose sizes are built in, "tiny", or a directory with config.json. The file is written
after every batch size, so that a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

DOCUMENT_FORMAT, DOCUMENT_VERSION = "odyssey-end-to-end", 1


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    # Imported here: a wrong option is answered before torch is loaded.
    from odyssey.errors import OdysseyError

    try:
        document = _measure(options)
    except (OdysseyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: what --json has is kept", file=sys.stderr)
        return 130
    return 0 if any(row["outcome"] == "ok" for row in document["rows"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m odyssey.latency", description="Time methods end to end.")
    parser.add_argument("--models", default="llama2-7b", type=_names, help="names or directories (%(default)s)")
    parser.add_argument(
        "--methods", default="fp16,w8a8,w4a16-g128,w4a8,w4a8-g128", type=_names, help="formats (%(default)s)"
    )
    parser.add_argument("--peers", default="", type=_words, help="transformers-fp16, transformers-compiled-fp16")
    parser.add_argument("--batch-sizes", default="1", type=_numbers, help="(%(default)s)")
    parser.add_argument("--input-len", default=1024, type=_number, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--output-len", default=128, type=_number, help="tokens that are generated (%(default)s)")
    parser.add_argument("--warmup", default=1, type=_count, help="whole runs that do not count (%(default)s)")
    parser.add_argument("--repeats", default="5", type=_numbers, help="runs, one number or one per batch (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="(float16, on CPU float32)")
    parser.add_argument("--seed", default=0, type=int, help="of the prompts (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    return parser


def _words(text: str) -> list[str]:
    # A name that is given twice would be timed and counted twice.
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _names(text: str) -> list[str]:
    names = _words(text)
    if not names:
        raise argparse.ArgumentTypeError("give at least one name")
    return names


def _number(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, at least 0")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(word) for word in text.split(",")]


def _measure(options: argparse.Namespace) -> dict:
    import torch

    from odyssey import environment
    from odyssey.errors import ConfigError, UnsupportedError
    from odyssey.latency.ceilings import measure_ceilings
    from odyssey.latency.cells import refuse_published_on_cpu
    from odyssey.latency.monitor import GpuMonitor
    from odyssey.latency.sweep import Bench, Case, random_entries
    from odyssey.progress import Progress
    from odyssey.record import write_json

    if len(options.repeats) not in (1, len(options.batch_sizes)):
        raise ConfigError(
            f"--repeats: {len(options.repeats)} numbers for {len(options.batch_sizes)} batch sizes; "
            "give one, or one for each"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda: no CUDA device is visible; use --device cpu")
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = getattr(torch, options.dtype or ("float16" if on_gpu else "float32"))
    if len(set(options.batch_sizes)) < len(options.batch_sizes):
        raise ConfigError(f"--batch-sizes {','.join(map(str, options.batch_sizes))}: give each once")
    configs = {}
    for model in options.models:
        if _name(model) in configs:
            raise ConfigError(f"--models {model}: rows of another model have the name {_name(model)}; rename one")
        configs[_name(model)] = _config(model)
    for model in options.models:
        if not (on_gpu or model == "tiny" or Path(model).is_dir()):
            refuse_published_on_cpu(model, options.device, "--device cpu")
    if options.json:
        # Before the measurement rather than behind it.
        if options.json.is_dir():
            raise ConfigError(f"--json {options.json}: is a directory; name a file")
        options.json.parent.mkdir(parents=True, exist_ok=True)
    monitor = GpuMonitor(device)
    document = {
        "format": DOCUMENT_FORMAT,
        "format_version": DOCUMENT_VERSION,
        "started": _now(),
        "device": str(device),
        "environment": environment.describe(),
        "protocol": {
            "input_len": options.input_len,
            "output_len": options.output_len,
            "warmup": options.warmup,
            "repeats": dict(zip(map(str, options.batch_sizes), _repeats(options), strict=True)),
            "weights": "random",
            "interleaved": True,
            "clock": "host clock around synchronized phases; steps by CUDA events" if on_gpu else "host clock",
        },
        "before": monitor.idle_state(),
        "ceilings": None,
        "rows": [],
    }
    if document["before"]["busy"]:
        print(f"warning: the GPU is busy before the run: {document['before']}", file=sys.stderr)
    ceilings = measure_ceilings(device, dtype)
    document["ceilings"] = ceilings.to_dict()
    for name, config in configs.items():
        entries = random_entries(config, options.methods, options.peers, device, dtype)
        bench = Bench(
            name, config, entries, device=device, dtype=dtype, monitor=monitor, ceilings=ceilings, seed=options.seed
        )
        for batch_size, repeats in zip(options.batch_sizes, _repeats(options), strict=True):
            case = Case(batch_size, options.input_len, options.output_len, options.warmup, repeats)
            rows = bench.run(case, Progress())
            document["rows"] += rows
            document["finished"] = _now()
            if options.json:
                write_json(options.json, document)
            _print(rows)
        bench.close()
    return document


def _repeats(options: argparse.Namespace) -> list[int]:
    return options.repeats * len(options.batch_sizes) if len(options.repeats) == 1 else options.repeats


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model


def _config(model: str):
    from odyssey.engine.shapes import known_config
    from odyssey.models.architecture import LlamaFamily
    from odyssey.models.embedded import TINY_PATH

    directory = Path(model) if Path(model).is_dir() else TINY_PATH if model == "tiny" else None
    return known_config(model) if directory is None else LlamaFamily.from_directory(directory).config


def _print(rows: list[dict]) -> None:
    for row in rows:
        head = f"{row['model']:>12} {row['method']:>26} batch {row['batch_size']:<3}"
        if row["outcome"] != "ok":
            print(f"{head} {row['outcome']}: {row['reason']}", flush=True)
            continue
        decode = "" if row["decode_ms_per_token"] is None else f"{row['decode_ms_per_token']:8.3f} ms/token"
        share = "" if row["share_of_floor"] is None else f"  floor {row['floor_ms']:8.1f} ({row['share_of_floor']:.0%})"
        throttled = row["gpu"].get("throttle_reasons")
        notes = f"  throttled: {', '.join(throttled)}" if throttled else ""
        print(
            f"{head} {row['total_ms']:9.1f} ms = prefill {row['prefill_ms']:8.1f} + {decode}{share}{notes}", flush=True
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
