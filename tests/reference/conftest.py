"""Comparisons of the baselines with the libraries that people know, on real weights and activations.

They need the reference environment (`make reference-env`, then `make reference`) and the small LLaMA of the evaluation
data. What they measure is written to outputs/reference/report.json and report.md.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from odyssey.data.calibration import CalibrationTokens, sample_calibration
from odyssey.data.texts import Corpus, load_corpus
from odyssey.environment import git_commit
from odyssey.models.architecture import LlamaFamily
from odyssey.models.load import load_tokenizer
from odyssey.models.reader import CheckpointReader
from odyssey.models.source import ModelSource, resolve_model
from odyssey.quantization.method import BlockCalibration

PACKAGES = ("auto-gptq", "autoawq", "llmcompressor", "compressed-tensors", "torch", "transformers", "numpy")
IMPORTED = ("auto_gptq", "awq", "llmcompressor")
CPU = torch.device("cpu")
REPORT_DIRECTORY = Path("outputs") / "reference"


@pytest.fixture(autouse=True, scope="session")
def reference_packages() -> None:
    missing = [name for name in IMPORTED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: make reference-env, then make reference")


@dataclass
class Testbed:
    """The small LLaMA, calibration tokens (16 x 512) and its test text."""

    source: ModelSource
    tokens: CalibrationTokens
    text: Corpus
    architecture: LlamaFamily = field(init=False)
    reader: CheckpointReader = field(init=False)

    def __post_init__(self) -> None:
        self.architecture = LlamaFamily.from_directory(self.source.path)
        self.reader = CheckpointReader(self.source.path)
        self.tokenizer = load_tokenizer(self.source)
        self._inputs: dict[int, list[torch.Tensor]] = {}

    def block(self, index: int) -> nn.Module:
        return self.architecture.load_block(self.reader, index, CPU)

    @torch.no_grad()
    def inputs(self, index: int) -> list[torch.Tensor]:
        """The full-precision inputs of a block, one [1, 512, hidden] per sample."""
        if index not in self._inputs:
            if index == 0:
                rows = self.tokens.tokens.split(1)
                embed = self.architecture.embedder(self.reader, CPU)
                self._inputs[0] = [embed(row) for row in rows]
            else:
                block, forward = self.block(index - 1), self.architecture.block_forward(CPU)
                self._inputs[index] = [forward(block, hidden) for hidden in self.inputs(index - 1)]
        return self._inputs[index]

    def calibration(self, index: int) -> BlockCalibration:
        return BlockCalibration(
            inputs=self.inputs(index), reference_inputs=self.inputs(index), targets=self.inputs(index + 1),
            forward=self.architecture.block_forward(CPU), linear_groups=self.architecture.linear_groups,
            input_norms=self.architecture.input_norms, device=CPU,
        )  # fmt: skip


@pytest.fixture(scope="session")
def testbed(evaluation_data: Path) -> Testbed:
    source = resolve_model("testbed-28m", path=str(evaluation_data / "models" / "testbed-28m"))
    texts = evaluation_data / "data" / "wikitext2"
    train = load_corpus("file", "train", path=str(texts / "wiki.train.shuffled_articles.tokens"))
    tokens = sample_calibration(train, load_tokenizer(source), num_samples=16, seqlen=512, seed=0)
    return Testbed(source, tokens, load_corpus("file", "test", path=str(texts / "wiki.test.tokens")))


class Report:
    """Rows of figures, one per comparison."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, comparison: str, case: str, **figures) -> None:
        self.rows.append({"comparison": comparison, "case": case, **figures})
        print(f"\n{comparison}, {case}: {figures}")


_REPORT = Report()


@pytest.fixture(scope="session")
def report() -> Report:
    return _REPORT


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    """Write the report. What other tests left in an earlier one is kept: a part can be run again by itself."""
    outcomes = {
        result.nodeid: outcome
        for outcome in ("passed", "failed", "error")
        for result in terminalreporter.stats.get(outcome, ())
        if "tests/reference/" in result.nodeid
    }
    if not outcomes:
        return
    directory = Path(os.environ.get("ODYSSEY_REFERENCE_REPORT", REPORT_DIRECTORY))
    directory.mkdir(parents=True, exist_ok=True)
    file, commit = directory / "report.json", git_commit()
    earlier = json.loads(file.read_text()) if file.is_file() else {"tests": {}, "rows": []}
    rows = {(row["comparison"], row["case"]): row for row in earlier["rows"]}
    rows |= {(row["comparison"], row["case"]): {**row, "commit": commit} for row in _REPORT.rows}
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "cpu_threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "tests": dict(sorted({**earlier["tests"], **outcomes}.items())),
        "rows": sorted(rows.values(), key=lambda row: row["comparison"]),
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
    (directory / "report.md").write_text(_markdown(content))
    terminalreporter.write_line(f"report: {directory / 'report.md'}")


def _markdown(content: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    outcomes = list(content["tests"].values())
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "error") if name in outcomes)
    commits = ", ".join(sorted({str(row["commit"]) for row in content["rows"]}))
    lines = [
        "# The baselines against the reference libraries", "",
        f"Written by `make reference` on {content['date'][:10]} at commit {commits}: {counts}. "
        f"Python {content['python']}, {versions}. What is compared, and why it differs where it does, is in "
        "docs/baselines.md.",
    ]  # fmt: skip
    for comparison in dict.fromkeys(row["comparison"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["comparison"] == comparison]
        keys = [key for key in rows[0] if key not in ("comparison", "case", "commit")]
        lines += ["", f"## {comparison}", "", "| case | " + " | ".join(key.replace("_", " ") for key in keys) + " |"]
        lines.append("|---|" + "---:|" * len(keys))
        for row in rows:
            cells = " | ".join(_figure(row.get(key)) for key in keys)
            lines.append(f"| {row['case']} | {cells} |")
    return "\n".join(lines) + "\n"


def _figure(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
