"""The outlier variant of a checkpoint computes the same function, and its activations have the outliers."""

from __future__ import annotations

import torch
from helpers.checkpoints import write_checkpoint
from helpers.outliers import CONSUMERS, write_outlier_checkpoint
from safetensors.torch import load_file

from odyssey.models.load import load_model
from odyssey.models.source import resolve_model

CHANNELS, FACTOR = (3, 100), 64.0


def test_the_variant_computes_the_same_with_larger_activations(tmp_path):
    source = write_checkpoint(tmp_path / "source", layers=2, shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    variant = write_outlier_checkpoint(source, tmp_path / "variant", CHANNELS, FACTOR)
    models = [load_model(resolve_model("m", path=str(path))) for path in (source, variant)]
    inputs: list[dict[str, torch.Tensor]] = [{}, {}]
    for model, seen in zip(models, inputs, strict=True):
        for norm in CONSUMERS:
            name = f"model.layers.1.{norm}"
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, seen=seen, norm=norm: seen.__setitem__(norm, output.detach())
            )
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, outliers = (model(tokens).logits for model in models)
    # Powers of two: the same but for weights that become subnormal in float16.
    torch.testing.assert_close(outliers, plain, rtol=1e-3, atol=1e-3)
    expected = torch.ones(128)
    expected[list(CHANNELS)] = FACTOR
    for norm in CONSUMERS:
        torch.testing.assert_close(inputs[1][norm], inputs[0][norm] * expected, rtol=1e-3, atol=1e-3)
    assert {tensor.dtype for tensor in load_file(variant / "model.safetensors").values()} == {torch.float16}
