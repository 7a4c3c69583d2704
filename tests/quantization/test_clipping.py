"""Learned weight clipping, on small random LLaMA blocks."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.blocks import generator, heavy_tailed
from torch.nn import functional
from transformers import LlamaForCausalLM

from odyssey.quantization.clipping import (
    LearnedClippingSettings,
    learn_clipping,
    search_clipping,
)
from odyssey.quantization.fake_quant import (
    fake_quantized,
)
from odyssey.quantization.grid import round_to_nearest
from odyssey.quantization.method import BlockCalibration
from odyssey.quantization.scheme import PER_CHANNEL, QuantScheme

PAPER = LearnedClippingSettings(epochs=2, learning_rate=5e-2, schedule="constant", initialization="constant")
LINEAR_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def calibrate(model: LlamaForCausalLM, index: int, samples: int = 4, seqlen: int = 24) -> BlockCalibration:
    def forward(block, hidden):
        positions = torch.arange(hidden.shape[1])[None]
        return block(hidden, position_embeddings=model.model.rotary_emb(hidden, positions))

    hidden = [torch.randn(1, seqlen, 48, generator=generator(i)) for i in range(samples)]
    with torch.no_grad():
        for block in model.model.layers[:index]:
            hidden = [forward(block, sample) for sample in hidden]
        noise = [0.01 * torch.randn(h.shape, generator=generator(50 + i)) for i, h in enumerate(hidden)]
        targets = [forward(model.model.layers[index], sample) for sample in hidden]
    return BlockCalibration(
        inputs=[h + n for h, n in zip(hidden, noise, strict=True)],
        reference_inputs=hidden,
        targets=targets,
        forward=forward,
        linear_groups=LINEAR_GROUPS,
        input_norms={0: "input_layernorm", 2: "post_attention_layernorm"},
        device=torch.device("cpu"),
        seed=3,
    )


def block_loss(block, calibration, scales, scheme) -> float:
    """MSE of the block made of the integers on `scales`, computed apart from the learning loop."""
    weights = {
        name: round_to_nearest(block.get_submodule(name).weight.detach(), scheme, scale)
        for name, scale in scales.items()
    }
    with torch.no_grad(), fake_quantized(block, weights):
        outputs = [calibration.forward(block, hidden) for hidden in calibration.inputs]
    return float(np.mean([functional.mse_loss(o, t).item() for o, t in zip(outputs, calibration.targets, strict=True)]))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("initialization", ["constant", "search"])
def test_the_loss_goes_down_on_every_block(model, index, initialization):
    block, calibration, scheme = model.model.layers[index], calibrate(model, index), QuantScheme(3)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    ratios = {
        name: search_clipping(block.get_submodule(name).weight.detach(), scheme) for name in calibration.linear_names()
    }
    settings = replace(PAPER, epochs=8, initialization=initialization)
    result = learn_clipping(block, calibration, scheme, settings, ratios)

    assert len(result.losses) == 9
    assert min(result.losses) < 0.97 * result.losses[0]
    assert result.losses[result.best_epoch] == min(result.losses)
    # The figures are those of the integers, and no worse than the grid that learning started from.
    assert block_loss(block, calibration, result.scales, scheme) == pytest.approx(min(result.losses), rel=1e-3)
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in block.parameters())


def test_learning_never_ends_worse_than_it_started(model):
    block, calibration = model.model.layers[1], calibrate(model, 1)
    settings = replace(PAPER, learning_rate=50.0)
    result = learn_clipping(block, calibration, QuantScheme(), settings)
    assert result.losses[0] < min(result.losses[1:])
    assert result.best_epoch == 0
    for name, scales in result.scales.items():
        weight = block.get_submodule(name).weight.detach()
        expected = torch.sigmoid(torch.tensor(4.0)) * weight.abs().amax(1, keepdim=True) / 7
        torch.testing.assert_close(scales, expected)


def test_learning_is_deterministic_and_depends_on_the_seed(model):
    block, scheme = model.model.layers[0], QuantScheme()
    runs = []
    for seed in (1, 1, 2):
        calibration = calibrate(model, 0)
        calibration.seed = seed
        runs.append(learn_clipping(block, calibration, scheme, PAPER))
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses
    assert all(torch.equal(runs[0].scales[name], runs[1].scales[name]) for name in runs[0].scales)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3},
        {"schedule": "cosine"},
        {"targets": "quantized"},
        {"evaluation_samples": 2},
        {"shuffle": False},
    ],
    ids=str,
)
def test_settings_are_honoured(model, changes):
    block, calibration = model.model.layers[0], calibrate(model, 0)
    base = learn_clipping(block, calibration, QuantScheme(), PAPER)
    other = learn_clipping(block, calibration, QuantScheme(), replace(PAPER, **changes))
    assert min(other.losses) <= other.losses[0]
    assert other.losses != base.losses


def reference_learning(weight, samples, targets, bits, settings, logit):
    """Learning of one layer in float64: straight-through gradients by hand, Adam (Kingma and Ba, algorithm 1; without
    weight decay AdamW is Adam), the schedule's formula. Returns scales of the best epoch and losses."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ends = np.stack([weight.max(axis=1), weight.min(axis=1)])
    logits, first, second = (np.full_like(ends, value) for value in (logit, 0.0, 0.0))

    def grid():
        kept = np.abs(ends / (1 + np.exp(-logits)))
        return kept, kept.max(axis=0)[:, None] / qmax

    def rounded(x):
        steps = np.abs(x).max(axis=1, keepdims=True) / 127
        return np.clip(np.rint(x / steps), -128, 127) * steps

    def output(x, scales):
        return rounded(x) @ (np.clip(np.rint(weight / scales), qmin, qmax) * scales).T

    def evaluate():
        errors = [((output(x, grid()[1]) - t) ** 2).mean() for x, t in zip(samples, targets, strict=True)]
        return np.mean(errors[: settings.evaluation_samples])

    losses, best, step = [evaluate()], grid()[1], 0
    batches = [
        range(n, min(n + settings.batch_size, len(samples))) for n in range(0, len(samples), settings.batch_size)
    ]
    steps = settings.epochs * len(batches)
    for _ in range(settings.epochs):
        for batch in batches:
            rate = settings.learning_rate
            if settings.schedule == "cosine":
                rate = rate / 100 + (rate - rate / 100) * (1 + np.cos(np.pi * step / steps)) / 2
            x, target = (np.concatenate([part[n] for n in batch]) for part in (samples, targets))
            kept, scales = grid()
            upstream = 2 * (output(x, scales) - target) / target.size
            integers = np.rint(weight / scales)
            inside = (integers >= qmin) & (integers <= qmax)
            slope = np.where(inside, integers - weight / scales, np.clip(integers, qmin, qmax))
            of_scale = ((upstream.T @ rounded(x)) * slope).sum(axis=1)
            gradient = np.where(kept == kept.max(axis=0), of_scale * kept / qmax * (1 - 1 / (1 + np.exp(-logits))), 0)
            step += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            logits = logits - rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        losses.append(evaluate())
        if losses[-1] < min(losses[:-1]):
            best = grid()[1]
    return best, losses


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_matches_a_float64_computation(schedule, batch_size):
    weight = heavy_tailed(6, 20)
    samples = [torch.randn(1, 9, 20, generator=generator(i)) for i in range(5)]
    targets = [x @ weight.t() + 0.02 * torch.randn(1, 9, 6, generator=generator(9 + i)) for i, x in enumerate(samples)]
    block = torch.nn.ModuleDict({"layer": torch.nn.Linear(20, 6, bias=False)})
    block["layer"].weight.data.copy_(weight)
    calibration = BlockCalibration(
        inputs=samples, reference_inputs=[], targets=targets, forward=lambda module, x: module["layer"](x),
        linear_groups=(("layer",),), input_norms={}, device=torch.device("cpu"),
    )  # fmt: skip
    settings = LearnedClippingSettings(
        epochs=6, learning_rate=0.1, schedule=schedule, batch_size=batch_size, initialization="constant",
        initial_logit=2.0, evaluation_samples=4, shuffle=False,
    )  # fmt: skip
    result = learn_clipping(block, calibration, QuantScheme(3), settings)
    in_numpy = ([sample[0].double().numpy() for sample in part] for part in (samples, targets))
    scales, losses = reference_learning(weight.double().numpy(), *in_numpy, 3, settings, 2.0)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    np.testing.assert_allclose(result.scales["layer"].numpy(), scales, rtol=1e-4)
    assert result.best_epoch == np.argmin(losses) > 0


@pytest.mark.parametrize("scheme", [QuantScheme(4, 10), QuantScheme(4, PER_CHANNEL, True, 16)], ids=lambda s: s.label)
def test_groups_and_floating_point_activations(model, scheme):
    block, calibration = model.model.layers[0], calibrate(model, 0)
    result = learn_clipping(block, calibration, scheme, replace(PAPER, epochs=4))
    assert min(result.losses) < result.losses[0]
    assert block_loss(block, calibration, result.scales, scheme) == pytest.approx(min(result.losses), rel=1e-3)


def test_progress_and_a_loss_that_is_not_finite(model):
    block, calibration = model.model.layers[0], calibrate(model, 0)
    seen = []
    calibration.report = seen.append
    learn_clipping(block, calibration, QuantScheme(), PAPER)
    assert len(seen) == 2
    calibration.targets = [torch.full_like(target, float("nan")) for target in calibration.targets]
    with pytest.raises(ValueError, match="loss is nan"):
        learn_clipping(block, calibration, QuantScheme(), PAPER)
    with pytest.raises(ValueError, match="ratios"):
        learn_clipping(block, calibration, QuantScheme(), LearnedClippingSettings())


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "linear"},
        {"initialization": "zero"},
        {"targets": "none"},
        {"epochs": -1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
    ],
    ids=str,
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match=f"lwc.{next(iter(changes))}"):
        LearnedClippingSettings(**changes)


@pytest.mark.gpu
def test_learning_on_cuda_is_deterministic_and_agrees_with_cpu(model):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    scheme, settings = QuantScheme(3), replace(PAPER, epochs=4)
    expected = learn_clipping(model.model.layers[0], calibrate(model, 0), scheme, settings)
    cuda_model = copy.deepcopy(model).cuda()
    rotary = cuda_model.model.rotary_emb
    runs = []
    for _ in range(2):
        calibration = calibrate(model, 0)
        calibration.device = torch.device("cuda")
        for field in ("inputs", "reference_inputs", "targets"):
            setattr(calibration, field, [sample.cuda() for sample in getattr(calibration, field)])
        calibration.forward = lambda block, hidden: block(
            hidden, position_embeddings=rotary(hidden, torch.arange(hidden.shape[1], device="cuda")[None])
        )
        runs.append(learn_clipping(cuda_model.model.layers[0], calibration, scheme, settings))
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(runs[0].scales[name], runs[1].scales[name]) for name in runs[0].scales)
    assert runs[0].losses == pytest.approx(expected.losses, rel=0.05)
    assert min(runs[0].losses) < 0.97 * runs[0].losses[0]
