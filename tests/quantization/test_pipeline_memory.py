"""Peak memory of the pipeline must not grow with the number of layers."""

import json
import os
import subprocess
import sys

import pytest
from helpers.checkpoints import write_checkpoint

_CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import torch
from odyssey.environment import peak_rss_bytes
from odyssey.methods import settings_dict
from odyssey.models.source import resolve_model
from odyssey.data.calibration import CalibrationTokens
from odyssey.quantization.pipeline import quantize_checkpoint
from odyssey.quantization.recipe import OdysseyMethod, OdysseySettings

settings = OdysseySettings(clipping="search")
tokens = torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(0))
before = peak_rss_bytes()
quantize_checkpoint(resolve_model("m", path={source!r}), OdysseyMethod(settings), settings_dict(settings),
                    CalibrationTokens(tokens, {{}}), Path({output!r}), device=torch.device("cpu"))
print(json.dumps([before, peak_rss_bytes()]))
"""


def _peak_growth(tmp_path, layers):
    source = write_checkpoint(
        tmp_path / f"source{layers}", layers=layers, hidden=512, intermediate=1408, heads=8, kv_heads=4,
        shard_size="20MB",
    )  # fmt: skip
    script = _CHILD.format(paths=sys.path, source=str(source), output=str(tmp_path / f"out{layers}"))
    # Freed tensors go back to the system at once: what is measured is what the pipeline holds, not the heap's slack.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    before, after = json.loads(child.stdout.splitlines()[-1])
    return (after - before) / 1e6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_peak_memory_does_not_grow_with_the_layers(tmp_path, record_property):
    few, many = _peak_growth(tmp_path, 4), _peak_growth(tmp_path, 32)
    record_property("peak_growth_mb", {"4 layers": few, "32 layers": many})
    print(f"peak RSS above the start: 4 layers {few:.0f} MB, 32 layers {many:.0f} MB")
    assert few > 12
    # 28 more layers are 330 MB in float32. A block is 12 MB.
    assert many - few < 40
