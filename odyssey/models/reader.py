"""Reading a safetensors checkpoint tensor by tensor, so that a 70B model needs the memory of one block."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from odyssey.errors import InvalidCheckpointError

INDEX_NAME = "model.safetensors.index.json"


class CheckpointReader:
    """Tensors of a checkpoint directory by name; sharded (with an index) or a single file.

    Opening checks that every shard is there and whole (its header and length); NaN and Inf are refused on reading.
    Raises InvalidCheckpointError naming the file or tensor.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._shard_of = self._locate_tensors()

    def _locate_tensors(self) -> dict[str, Path]:
        index_path = self.directory / INDEX_NAME
        if index_path.is_file():
            try:
                weight_map = json.loads(index_path.read_text())["weight_map"]
                shards = {name: self.directory / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidCheckpointError(f"{index_path}: not a valid index ({error}); download it again") from error
            names_in = {shard: self._names(shard) for shard in sorted(set(shards.values()))}
            for name, shard in shards.items():
                if name not in names_in[shard]:
                    raise InvalidCheckpointError(f"{shard}: tensor {name} is in the index but not in this shard")
            return shards
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            hint = ""
            if list(self.directory.glob("*.bin")):
                hint = " (it has pickled .bin weights: convert them with save_pretrained, which writes safetensors)"
            raise InvalidCheckpointError(f"{self.directory}: no *.safetensors files{hint}")
        return {name: file for file in files for name in self._names(file)}

    @staticmethod
    def _names(shard: Path) -> set[str]:
        if not shard.is_file():
            raise InvalidCheckpointError(f"{shard}: missing shard; download the checkpoint again")
        try:
            with safe_open(shard, framework="pt") as file:
                return set(file.keys())
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpointError(f"{shard}: truncated or damaged ({error}); download it again") from error

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        return sorted(self._shard_of)

    def read(self, name: str, *, check_finite: bool = True) -> torch.Tensor:
        """One tensor on the CPU in its stored dtype."""
        if name not in self._shard_of:
            raise InvalidCheckpointError(f"{self.directory}: tensor {name} is missing from the checkpoint")
        with safe_open(self._shard_of[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if check_finite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidCheckpointError(f"{self._shard_of[name]}: tensor {name} has NaN or Inf values")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._shard_of[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def total_bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.stat().st_size for shard in set(self._shard_of.values()))
