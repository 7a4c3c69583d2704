"""From a model's configuration to a directory with its checkpoint: a local path, the embedded model, or the hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from odyssey.errors import GatedModelError, InvalidCheckpointError, MissingModelError

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.tiktoken", "merges.txt"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# Of every tensor: pieces of a page, evenly spread from its first byte to its last.
_PIECES = 16
_PIECE_BYTES = 4096


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint on disk in Hugging Face layout.

    name:         how the model is called in outputs and tables.
    path:         the directory.
    origin:       "embedded", "local" or "hub:<id>@<commit>".
    fingerprint:  16 hex digits over the configuration, the tokenizer, the shards' headers and pieces of every tensor.
    """

    name: str
    path: Path
    origin: str
    fingerprint: str


def resolve_model(
    name: str, *, hub_id: str | None = None, path: str | None = None, revision: str = "main"
) -> ModelSource:
    """Find (and for a hub id download) a checkpoint.

    Raises MissingModelError, GatedModelError or InvalidCheckpointError, each with what to do.
    """
    if path is not None:
        directory = Path(path).expanduser().resolve()
        if not directory.is_dir():
            raise MissingModelError(
                f"model.path={path}: no such directory; give a directory with config.json and *.safetensors"
            )
        return ModelSource(name, directory, "local", checkpoint_fingerprint(directory))
    if name == "tiny":
        from odyssey.models.embedded import TINY_PATH

        return ModelSource(name, TINY_PATH, "embedded", checkpoint_fingerprint(TINY_PATH))
    if not hub_id:
        raise MissingModelError(f"model={name}: neither model.path nor model.hub_id is set; give model.path=DIR")
    directory = _download(hub_id, revision)
    # The hub's cache names a snapshot's directory after its commit.
    return ModelSource(name, directory, f"hub:{hub_id}@{directory.name}", checkpoint_fingerprint(directory))


def _download(hub_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        raise GatedModelError(
            f"model.hub_id={hub_id}: the weights are gated; accept the licence on the model's page and log in "
            "(hf auth login, or set HF_TOKEN), or give a local copy with model.path=DIR"
        ) from error
    except RevisionNotFoundError as error:
        raise MissingModelError(f"model.revision={revision}: {hub_id} has no such revision") from error
    except RepositoryNotFoundError as error:
        raise MissingModelError(
            f"model.hub_id={hub_id}: no such repository, or a private one without a token (set HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise MissingModelError(
            f"model.hub_id={hub_id}: the hub cannot be reached and the model is not in the local cache; "
            "download it on a connected machine and give model.path=DIR"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise GatedModelError(
                f"model.hub_id={hub_id}: access refused; check HF_TOKEN and the model's licence"
            ) from error
        raise MissingModelError(
            f"model.hub_id={hub_id}: download failed ({type(error).__name__}); retry, or give model.path=DIR"
        ) from error


def checkpoint_fingerprint(directory: Path) -> str:
    """Identify a checkpoint without reading all of it: 16 hex digits over config.json, the tokenizer's files, and of
    each shard its name, size, header and 16 pieces of every tensor (64 KiB; 47 MB of a 70B model), so that a model of
    which only some layers were trained or edited is another one.

    Raises InvalidCheckpointError when config.json is absent or no JSON, or a shard is a link to nowhere.
    """
    digest = hashlib.sha256()
    config = directory / "config.json"
    if not config.is_file():
        raise InvalidCheckpointError(f"{directory}: no config.json; give a directory in Hugging Face layout")
    try:
        digest.update(json.dumps(json.loads(config.read_text()), sort_keys=True).encode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidCheckpointError(f"{config}: not valid JSON ({error}); download it again") from error
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            digest.update(f"{name}:{hashlib.sha256((directory / name).read_bytes()).hexdigest()}".encode())
    for shard in sorted(directory.glob("*.safetensors")):
        if not shard.is_file():
            raise InvalidCheckpointError(f"{shard}: missing shard (a link to nowhere); download the checkpoint again")
        digest.update(f"{shard.name}:{shard.stat().st_size}".encode())
        with shard.open("rb") as file:
            for offset, length in _pieces(file, shard.stat().st_size):
                file.seek(offset)
                digest.update(file.read(length))
    return digest.hexdigest()[:16]


def _pieces(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    """Offset and length of what identifies a shard. A header that cannot be read says nothing about tensors: then the
    pieces are of the whole file, and whoever reads it says what is wrong."""
    start = 8 + int.from_bytes(file.read(8), "little")
    spans = []
    if start <= size:
        try:
            header = json.loads(file.read(start - 8))
            spans = [
                (start + first, start + last) for first, last in sorted(_data_offsets(header)) if 0 <= first <= last
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            start = 0
    else:
        start = 0
    return [(0, start), *(piece for span in spans or [(start, size)] for piece in _spread(*span))]


def _data_offsets(header: dict) -> list[tuple[int, int]]:
    return [tuple(entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"]


def _spread(first: int, last: int) -> list[tuple[int, int]]:
    if last - first <= _PIECES * _PIECE_BYTES:
        return [(first, last - first)]
    step = (last - first - _PIECE_BYTES) / (_PIECES - 1)
    return [(first + round(number * step), _PIECE_BYTES) for number in range(_PIECES)]
