"""Calibration activations carried from block to block, in memory or, when they would not fit, on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch

# Share of the free memory that all activation stores of a run may take before they go to disk.
MEMORY_SHARE = 0.3


class ActivationStore(Sequence):
    """`count` samples of float32 [1, seqlen, hidden_size]; reading moves a sample to `device`.

    With `file` the samples live in that file (plain float32, sample after sample) and only one is in memory at a time.
    """

    def __init__(
        self, count: int, seqlen: int, hidden_size: int, device: torch.device, file: Path | None = None
    ) -> None:
        self.shape = (1, seqlen, hidden_size)
        self.device = device
        self._sample_bytes = 4 * seqlen * hidden_size
        self._count = count
        self._memory: list[torch.Tensor | None] = [None] * count
        self._file = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("w+b")
            self._file.truncate(count * self._sample_bytes)
            # The name is given up at once: the space returns when the process ends, however it ends.
            file.unlink()

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if self._file is None:
            return self._memory[index].to(self.device)
        self._file.seek(index * self._sample_bytes)
        data = np.fromfile(self._file, dtype=np.float32, count=self._sample_bytes // 4)
        return torch.from_numpy(data).reshape(self.shape).to(self.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(self._count))

    def __setitem__(self, index: int, sample: torch.Tensor) -> None:
        sample = sample.detach().float()
        if tuple(sample.shape) != self.shape:
            raise ValueError(f"sample has shape {tuple(sample.shape)}, expected {self.shape}")
        if self._file is None:
            # The memory copy stays with the computing device only when that is the CPU.
            self._memory[index] = sample.cpu().clone()
        else:
            self._file.seek(index * self._sample_bytes)
            sample.cpu().contiguous().numpy().tofile(self._file)

    def close(self) -> None:
        """Give back the memory or the disk space."""
        self._memory = [None] * self._count
        if self._file is not None:
            self._file.close()


def stores_fit_in_memory(stores: int, count: int, seqlen: int, hidden_size: int) -> bool:
    """Whether `stores` activation stores of that size fit in MEMORY_SHARE of the memory that is free now."""
    needed = stores * count * seqlen * hidden_size * 4
    return needed <= MEMORY_SHARE * psutil.virtual_memory().available
