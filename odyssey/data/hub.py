"""Where the hub keeps each data set, and copies of it in a directory with the layout of the hub's own cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubDataset:
    """repository: on the hub. config: of the repository, None for its only one."""

    repository: str
    config: str | None = None


# lm-eval's own data sets for these tasks (its MMLU subjects are configurations of one repository), and the texts.
HUB_DATASETS = {
    "lambada_openai": HubDataset("EleutherAI/lambada_openai", "default"),
    "piqa": HubDataset("baber/piqa"),
    "winogrande": HubDataset("allenai/winogrande", "winogrande_xl"),
    "arc_easy": HubDataset("allenai/ai2_arc", "ARC-Easy"),
    "hellaswag": HubDataset("Rowan/hellaswag"),
    "mmlu": HubDataset("cais/mmlu", "all"),
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": HubDataset("allenai/c4"),
}


@dataclass(frozen=True)
class Snapshot:
    """A data set's files of one revision in a hub cache."""

    dataset: HubDataset
    path: Path

    @property
    def origin(self) -> str:
        return f"hub cache:{self.dataset.repository}@{self.path.name[:12]}"

    def digest(self) -> str:
        """SHA-256 over names and contents."""
        digest = hashlib.sha256()
        for file in sorted(file for file in self.path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(self.path)}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()


def find_snapshot(root: str | Path | None, name: str) -> Snapshot | None:
    """The copy of a data set of HUB_DATASETS in `root`, when that is a cache of the hub (HF_HUB_CACHE) or the directory
    around one (HF_HOME): the revision that `main` names, else the latest. None where there is none."""
    if root is None or name not in HUB_DATASETS:
        return None
    dataset = HUB_DATASETS[name]
    for base in (Path(root).expanduser(), Path(root).expanduser() / "hub"):
        folder = base / f"datasets--{dataset.repository.replace('/', '--')}"
        reference = folder / "refs" / "main"
        snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
        named = [path for path in snapshots if reference.is_file() and path.name == reference.read_text().strip()]
        if snapshots:
            return Snapshot(dataset, max(named or snapshots, key=lambda path: path.stat().st_mtime))
    return None
