"""Cells with latency=engine: checkpoints, random weights, what stands beside them, and what is refused."""

from __future__ import annotations

import pytest
from helpers.cells import cell_config
from helpers.checkpoints import write_checkpoint

from odyssey.cell import Cell
from odyssey.config import (
    AccuracyConfig,
    LatencyConfig,
    ModelConfig,
    RootConfig,
    register_schemas,
    validate,
)
from odyssey.errors import ConfigError
from odyssey.latency.__main__ import main

SHORT = {"engine": "odyssey", "input_len": 8, "output_len": 4, "warmup": 0, "repeats": 2}


def _config(tmp_path, model, method="rtn", latency=None, **changes) -> RootConfig:
    return cell_config(tmp_path, model, method, latency=LatencyConfig(**{**SHORT, **(latency or {})}), **changes)


def _run(config):
    return Cell(config, {}, "digest").run()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("cells") / "model")


def test_a_checkpoint_takes_turns_with_the_unquantized_model_and_random_formats(model, tmp_path):
    record = _run(_config(tmp_path, model, latency={"against": ["fp16", "w8a8", "w4a8"]}))
    assert record["outcome"] == "ok", record["reason"]
    latency = record["latency"]
    assert [(row["method"], row["weights"]) for row in latency["rows"]] == [
        ("w4a8", "checkpoint"), ("fp16", "checkpoint"), ("w8a8", "random"),
    ]  # fmt: skip
    assert latency["dummy_weights"] is False
    assert len(latency["total_ms"]["samples"]) == 2
    assert latency["total_tokens_per_s"] > 0
    # The time of a later token is what is left of a run behind its first one, as in the row.
    phases = zip(latency["total_ms"]["samples"], latency["prefill_ms"]["samples"], strict=True)
    assert latency["decode_ms_per_token"]["samples"] == [(total - prefill) / 3 for total, prefill in phases]
    assert latency["decode_ms_per_token"]["median"] == pytest.approx(
        latency["rows"][0]["decode_ms_per_token"], abs=1e-3
    )
    ours, reference = latency["rows"][:2]
    assert latency["speedup_over_reference"] == reference["total_ms"] / ours["total_ms"]
    assert latency["rows"][0]["interleaved_with"] == ["w4a8", "fp16", "w8a8"]
    assert latency["ceilings"]["read_bytes_per_s"] > 0
    assert "load_s" not in record["timings"]


def test_random_weights_need_nothing_but_the_configuration(model, tmp_path):
    (tmp_path / "config-only").mkdir()
    (tmp_path / "config-only" / "config.json").write_text((model / "config.json").read_text())
    latency = {"dummy_weights": True, "against": ["fp16"]}
    record = _run(_config(tmp_path, tmp_path / "config-only", latency=latency))
    assert record["outcome"] == "ok", record["reason"]
    assert [(row["method"], row["weights"]) for row in record["latency"]["rows"]] == [
        ("w4a8", "random"), ("fp16", "random"),
    ]  # fmt: skip
    assert record["model"] == {"name": "config-only", "origin": "random weights"}
    assert record["latency"]["dummy_weights"] is True
    assert "size" not in record


def test_a_model_that_does_not_fit_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.setattr("odyssey.latency.sweep.available_bytes", lambda device: 2**30)
    config = _config(tmp_path, None, latency={"dummy_weights": True})
    config.model = ModelConfig(name="llama2-70b", hub_id="x/y")
    record = _run(config)
    assert record["outcome"] == "unsupported"
    assert "there are 1.0 GiB" in record["reason"]


def test_a_published_model_is_not_built_on_a_cpu_that_nobody_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("odyssey.latency.cells.measure_ceilings", lambda *_: pytest.fail("it went on"))
    config = _config(tmp_path, None, latency={"dummy_weights": True}, device="auto")
    config.model = ModelConfig(name="llama2-7b", hub_id="x/y")
    record = _run(config)
    assert record["outcome"] == "unsupported"
    assert "run it on a GPU, or say device=cpu" in record["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "tiny,llama2-7b"], "run it on a GPU, or say --device cpu"),
        (["--models", "tiny", "--json", "."], "--json .: is a directory"),
        (["--models", "tiny", "--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_the_command_refuses_before_it_measures(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("odyssey.latency.ceilings.measure_ceilings", lambda *_: pytest.fail("it went on"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_long_a_run_is_unsupported(model, tmp_path):
    record = _run(_config(tmp_path, model, latency={"input_len": 250, "output_len": 10}))
    assert record["outcome"] == "unsupported"
    assert "256 positions" in record["reason"]


def test_this_projects_checkpoints_are_not_for_vllm(model, tmp_path):
    record = _run(_config(tmp_path, model, latency={"engine": "vllm"}))
    assert record["outcome"] == "unsupported"
    assert "times what vLLM reads" in record["reason"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency": {"against": ["w5a8"]}}, "latency.against=w5a8: allowed: fp16, w8a8"),
        ({"latency": {"peers": ["vroom"]}}, "latency.peers=vroom: allowed: transformers-fp16"),
        ({"latency": {"engine": "transformers", "against": ["fp16"]}}, "takes turns with latency.engine=odyssey only"),
        ({"latency": {"engine": "transformers", "dummy_weights": True}}, "latency.dummy_weights=true: only with"),
        (
            {"latency": {"dummy_weights": True}, "accuracy": AccuracyConfig(tasks=["piqa"])},
            "random weights have no accuracy",
        ),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    from omegaconf import OmegaConf

    from odyssey.config import typed_config

    register_schemas()
    config = OmegaConf.structured(_config(tmp_path, tmp_path, **changes))
    with pytest.raises(ConfigError, match=message):
        validate(typed_config(OmegaConf.create(OmegaConf.to_container(config))))
