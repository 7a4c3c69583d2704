"""Generate text with the decode engine.

    python -m odyssey.generate --checkpoint DIR --prompt "Once upon a time"
    python -m odyssey.generate --checkpoint DIR --prompt A --prompt B --max-new-tokens 64 --temperature 0.8 --top-p 0.95

DIR is a checkpoint in Hugging Face layout or one that this project quantized (outputs/<model>/checkpoints/...); "tiny"
is the embedded model.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)

    # Imported here: a wrong option is answered before torch is loaded.
    from odyssey.errors import OdysseyError

    try:
        _generate(options)
    except (OdysseyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m odyssey.generate", description="Generate text with the decode engine."
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint directory, or: tiny")
    parser.add_argument("--prompt", action="append", required=True, help="text to go on from; repeated: a batch")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many likeliest tokens, 0: all (%(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this share of probability (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on behind the end-of-sequence token")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="of what is not quantized")
    return parser


def _generate(options: argparse.Namespace) -> None:
    import torch

    from odyssey.engine import DecoderShapes, Engine, Sampling, load_weights
    from odyssey.engine.memory import predict, require
    from odyssey.engine.weights import checkpoint_format
    from odyssey.errors import MissingModelError, UnsupportedError
    from odyssey.models.architecture import LlamaFamily
    from odyssey.models.load import load_tokenizer
    from odyssey.models.source import resolve_model

    is_tiny = options.checkpoint == "tiny" and not Path("tiny").is_dir()
    if not is_tiny and not Path(options.checkpoint).expanduser().is_dir():
        raise MissingModelError(f"--checkpoint {options.checkpoint}: no such directory; give a checkpoint's, or tiny")
    source = resolve_model("tiny" if is_tiny else "local", path=None if is_tiny else options.checkpoint)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda: no CUDA device is visible; use --device cpu")
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if options.max_new_tokens < 1:
        raise UnsupportedError(f"--max-new-tokens {options.max_new_tokens}: must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise UnsupportedError(f"--seed {options.seed}: must be 0 to {2**63 - 1}")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    shapes = DecoderShapes.from_config(LlamaFamily.from_directory(source.path).config)
    tokenizer = load_tokenizer(source)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in options.prompt]
    if not all(prompts):
        raise UnsupportedError("--prompt: a prompt has no tokens; give some text")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    longest = max(map(len, prompts)) + options.max_new_tokens
    if longest > shapes.max_positions:
        raise UnsupportedError(
            f"--max-new-tokens {options.max_new_tokens}: the longest prompt and that many tokens are {longest}, "
            f"the model takes {shapes.max_positions}"
        )
    need = predict(
        shapes, checkpoint_format(source.path), batch_size=len(prompts), max_len=longest,
        element_size=dtype.itemsize if dtype else 2 if on_gpu else 4,
    )  # fmt: skip
    require(need, device, str(options.checkpoint))
    started = time.perf_counter()
    weights = load_weights(source.path, device, dtype)
    engine = Engine(weights, batch_size=len(prompts), max_len=longest)
    engine.prepare(len(prompts), sampling)
    loaded = time.perf_counter()
    single = len(prompts) == 1
    printer = _Printer(tokenizer, prompts[0]) if single else None
    results = engine.generate(
        prompts, options.max_new_tokens, sampling=sampling, seed=options.seed,
        eos_tokens=() if options.ignore_eos else _eos_tokens(source.path, weights.config),
        on_tokens=printer,
    )  # fmt: skip
    ended = time.perf_counter()
    if single:
        print()
    else:
        for prompt, result in zip(prompts, results, strict=True):
            print(f"--- {tokenizer.decode(prompt + result, skip_special_tokens=True)}")
    count = sum(map(len, results))
    dtype_name = str(weights.dtype).removeprefix("torch.")
    print(
        f"[{weights.format.name}, {dtype_name}, {weights.nbytes / 2**20:.0f} MiB of weights, "
        f"loaded in {loaded - started:.1f} s; "
        f"{count} tokens in {ended - loaded:.2f} s, {count / (ended - loaded):.1f} tokens/s]",
        file=sys.stderr,
    )


class _Printer:
    """Prints the text as it grows: decoding all tokens again keeps characters of several tokens whole."""

    def __init__(self, tokenizer, prompt: list[int]) -> None:
        self._tokenizer, self._tokens, self._shown = tokenizer, list(prompt), ""
        self([], [])

    def __call__(self, _row, tokens: list[int]) -> None:
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A character that is not complete yet decodes to the replacement character.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[len(self._shown) :], end="", flush=True)
        self._shown = text


def _eos_tokens(directory: Path, config) -> list[int]:
    """From generation_config.json where there is one, else from config.json; some models have several."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(directory).eos_token_id
    except OSError:
        ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


if __name__ == "__main__":
    sys.exit(main())
