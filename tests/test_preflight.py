"""What a cell would miss is seen before it runs: models, gated ones, texts, tasks, disk, memory, GPU, kernels."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from helpers.checkpoints import write_checkpoint
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import odyssey.preflight as preflight_module
import odyssey.preflight_inputs as inputs
from experiments.preflight_table import preflight_table, print_preflight
from odyssey.config import register_schemas, validate
from odyssey.preflight import preflight
from odyssey.sizes import Texts

H100 = {"name": "H100", "bytes": 80 * 2**30, "capability": 9.0}


@pytest.fixture
def cell(project_root):
    """cell(*overrides): the typed config of one cell."""
    register_schemas()

    def make(*overrides):
        with initialize_config_dir(str(project_root / "conf"), version_base="1.3"):
            return validate(compose("config", overrides=list(overrides)))

    return make


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without GPU and network, with much memory."""
    monkeypatch.setattr(preflight_module, "_gpus", lambda: ())
    monkeypatch.setattr(preflight_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(inputs, "hub_reachable", lambda: False)
    inputs._hub_check.cache_clear()


def _failed(root, runs_here=True) -> dict[str, str]:
    return {check.name: check.text for check in preflight(root, runs_here).checks if check.ok is False}


def _unsure(root) -> dict[str, str]:
    return {check.name: check.text for check in preflight(root).checks if check.ok is None}


def test_the_embedded_model_misses_nothing(cell):
    prediction = preflight(cell("method=odyssey", "device=cpu"))
    assert prediction.can_run
    assert all(check.ok for check in prediction.checks)
    assert prediction.gpu_bytes == 0
    assert 2e8 < prediction.host_bytes < 2e9


def test_a_local_model_that_is_not_there_or_damaged(cell, tmp_path):
    assert "no such directory" in _failed(cell(f"model.path={tmp_path / 'gone'}"))["model"]
    (tmp_path / "empty").mkdir()
    assert "no config.json" in _failed(cell(f"model.path={tmp_path / 'empty'}"))["model"]
    model = write_checkpoint(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    arguments = (f"model.path={model}", f"calibration.path={text}", f"accuracy.perplexity.path={text}", "device=cpu")
    assert _failed(cell(*arguments)) == {}
    (shard,) = model.glob("*.safetensors")
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    assert "truncated or damaged" in _failed(cell(*arguments))["model"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"num_attention_heads": 0}, "config.json: not usable"),
        ({"hidden_size": "abc"}, "not usable .*'hidden_size': .*expected int, got str"),
        ({"num_hidden_layers": None}, "not usable .*'num_hidden_layers'"),
        ({"hidden_size": -64}, "config.json: not usable"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
        ([], "config.json: not usable"),
    ],
)
def test_a_config_that_no_model_has_is_named_and_stops_no_other_cell(cell, tmp_path, content, words):
    model = write_checkpoint(tmp_path / "model")
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **content} if content else content))
    roots = [cell(f"model.path={model}", "method=rtn", "device=cpu", "accuracy=none"), cell("device=cpu")]
    failed = _failed(roots[0])
    assert set(failed) == {"model"}
    assert re.search(words, failed["model"])
    assert "\n" not in failed["model"]
    assert not print_preflight(roots)


def test_an_existing_checkpoint_has_to_be_a_quantized_one(cell, tmp_path):
    model = write_checkpoint(tmp_path / "model")
    asked = ("method=gptq", f"method.checkpoint={model}", "device=cpu", "accuracy=none")
    assert "not quantized" in _failed(cell(*asked))["model"]


def test_a_data_root_that_is_not_there(cell, tmp_path):
    assert "no such directory" in _failed(cell("device=cpu", f"data.root={tmp_path / 'gone'}"))["data.root"]
    assert "data.root" not in _failed(cell("device=cpu", f"data.root={tmp_path}"))


def test_what_this_user_may_not_enter_is_one_check_each(cell, tmp_path):
    private = tmp_path / "private"
    (private / "model").mkdir(parents=True)
    roots = [
        cell("device=cpu", "method=rtn", "accuracy=none", f"model.path={private / 'model'}"),
        cell("device=cpu", f"calibration.path={private / 'text.txt'}", f"data.root={private / 'data'}"),
    ]
    _failed(roots[0])  # what is imported on the way is not this user's, either
    private.chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        failed = [_failed(root) for root in roots]
    finally:
        if is_root:
            os.seteuid(0)
        private.chmod(0o700)
    assert [set(each) for each in failed] == [{"model"}, {"data.root", "calibration"}]
    assert "Permission denied" in failed[0]["model"]


@pytest.mark.parametrize(("named", "cores"), [("3", 3), ("2,1", 2), ("0", 5), ("", 5), ("many", 5)])
def test_the_cores_that_count(monkeypatch, named, cores):
    monkeypatch.setenv("OMP_NUM_THREADS", named)
    monkeypatch.setattr(preflight_module.os, "sched_getaffinity", lambda pid: set(range(5)))
    assert preflight_module._cores() == cores


def test_texts_and_tasks(cell, tmp_path):
    root = tmp_path / "data"
    (root / "wikitext2").mkdir(parents=True)
    (root / "wikitext2" / "wiki.test.raw").write_text("text")
    (root / "lambada").mkdir()
    (root / "lambada" / "lambada_test.jsonl").write_text("{}")
    asked = ["model=tiny", "device=cpu", "accuracy.perplexity.dataset=wikitext2", "accuracy.perplexity.also=[c4]",
             "accuracy.tasks=[lambada_openai,piqa]", "calibration.dataset=c4", f"data.root={root}"]  # fmt: skip
    unsure = _unsure(cell(*asked))
    assert set(unsure) == {"calibration", "perplexity", "piqa"}
    assert "c4: not in data.root" in unsure["perplexity"]
    assert _failed(cell("device=cpu", "calibration.path=gone.txt"))["calibration"] == "gone.txt: no such file"
    # What needs no calibration does not ask for it.
    assert _failed(cell("device=cpu", "method=rtn", "calibration.path=gone.txt")) == {}


def test_the_size_of_the_text_counts(cell, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"word " * 2_000_000)
    small = preflight(cell("method=gptq", "device=cpu"))
    large = preflight(cell("method=gptq", "device=cpu", f"calibration.path={text}"))
    assert large.host_bytes - small.host_bytes > 100 * text.stat().st_size
    assert inputs.texts(cell("calibration=c4", "accuracy=none")) == Texts(780_000_000, 0, False, True)


class _Hub:
    """huggingface_hub.HfApi with one repository of a kind."""

    def __init__(self, gated=False, error=None, access=True) -> None:
        self._info, self._error, self._access = SimpleNamespace(gated=gated), error, access

    def model_info(self, hub_id, revision, timeout):
        if self._error:
            raise self._error
        return self._info

    def auth_check(self, hub_id):
        if not self._access:
            from huggingface_hub.errors import GatedRepoError

            raise GatedRepoError("gated", response=SimpleNamespace(headers={}, status_code=403, request=None))


@pytest.mark.parametrize(
    ("hub", "ok", "words"),
    [
        (_Hub(), True, "on the hub"),
        (_Hub(gated="manual"), True, "on the hub"),
        (_Hub(gated="manual", access=False), False, "gated, no token; accept its licence"),
        (_Hub(error=TimeoutError()), None, "did not answer"),
    ],
)
def test_models_on_the_hub(cell, monkeypatch, hub, ok, words):
    monkeypatch.setattr(inputs, "hub_reachable", lambda: True)
    monkeypatch.setattr(inputs, "cached_snapshot", lambda model: None)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    (check,) = (check for check in preflight(cell("model=llama2-7b")).checks if check.name == "model")
    assert check.ok is ok
    assert words in check.text


def test_a_hub_that_cannot_be_reached_is_asked_once(cell, monkeypatch):
    asked = []
    monkeypatch.setattr(inputs, "cached_snapshot", lambda model: None)
    monkeypatch.setattr(inputs, "hub_reachable", lambda: bool(asked.append(1)))
    for method in ("rtn", "fp16"):
        failed = _failed(cell("model=llama2-7b", f"method={method}", "accuracy=none"))
        assert "cannot be reached" in failed["model"]
        assert "model.path=DIR" in failed["model"]
    assert len(asked) == 1


def test_memory_disk_and_place(cell, monkeypatch, tmp_path):
    root = cell("device=cpu", "model=llama2-7b", "method=fp16", f"output_dir={tmp_path}")
    monkeypatch.setattr(preflight_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    failed = _failed(root)
    assert {"host memory", "disk"} <= set(failed)
    # On a cluster it is the cluster's memory that counts.
    assert "host memory" not in _failed(root, runs_here=False)
    (tmp_path / "file").touch()
    assert "cannot be written" in _failed(cell("device=cpu", f"output_dir={tmp_path / 'file' / 'out'}"))["disk"]


def test_gpus_and_kernels(cell, monkeypatch, tmp_path):
    assert "none on this machine; use device=cpu or another machine" in _failed(cell("device=cuda"))["GPU"]
    # Single products have no kernels on a CPU.
    assert "none on this machine; use another machine" in _failed(cell("experiment=table5_gemm"))["GPU"]
    monkeypatch.setattr(preflight_module, "_gpus", lambda: (H100,))
    monkeypatch.setenv("FASTGEMM_LIBRARY", str(tmp_path / "gone.so"))
    assert "no such file" in _failed(cell("device=cuda"))["kernels"]
    (tmp_path / "there.so").touch()
    monkeypatch.setenv("FASTGEMM_LIBRARY", str(tmp_path / "there.so"))
    prediction = preflight(cell("device=cuda"))
    assert prediction.can_run
    assert prediction.gpu_bytes > 6e8
    dummy = ("device=cuda", "method=rtn", "latency=engine", "latency.dummy_weights=true", "accuracy=none")
    assert _failed(cell(*dummy, "model=llama2-7b")) == {}
    assert "H100" in _failed(cell(*dummy, "model=llama2-70b", "latency.against=[fp16]"))["GPU"]
    monkeypatch.setattr(preflight_module, "_gpus", lambda: (H100 | {"capability": 7.5},))
    assert "8.0" in _failed(cell("device=cuda"))["kernels"]
    # A method without integer products needs none of these kernels.
    assert "kernels" not in _failed(cell("device=cuda", "method=fp16"))


def test_random_weights_of_a_published_model_need_a_gpu_or_a_word(cell):
    root = cell("experiment=table4_latency", "model=llama2-7b", "latency.batch_size=1")
    assert "none on this machine" in _failed(root)["GPU"]
    root.device = "cpu"
    assert "GPU" not in _failed(root)


def test_gemm_cells_need_a_gpu_and_no_model(cell, monkeypatch):
    root = cell("experiment=figure7_gemm_kinds")
    assert set(_failed(root)) == {"GPU"}
    monkeypatch.setattr(preflight_module, "_gpus", lambda: (H100,))
    monkeypatch.setenv("FASTGEMM_LIBRARY", __file__)
    assert _failed(root) == {}


def test_the_table_names_each_problem_once_with_its_cells(cell, capsys, monkeypatch):
    roots = [cell("device=cpu", "calibration.path=gone.txt", f"method={name}") for name in ("gptq", "rtn", "awq")]
    assert not print_preflight(roots)
    printed = capsys.readouterr().out
    assert printed.count("gone.txt: no such file") == 1
    assert "(cell 0, 2)" in printed
    assert print_preflight(roots[1:2])
    alone = preflight(roots[1]).host_bytes
    monkeypatch.setattr(preflight_module.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(1.5 * alone)))
    assert print_preflight(roots[1:2] * 2)
    assert not print_preflight(roots[1:2] * 2, at_once=2)
    assert "hydra.launcher.jobs=2: the largest cells together need" in capsys.readouterr().out
    assert print_preflight(roots[1:2] * 2, runs_here=False, at_once=2)
    table = preflight_table([preflight(root) for root in roots], ["a=1", "b=2", "c=3"])
    place = [column.key for column in table.columns].index("settings")
    assert [row[place] for row in table.rows] == ["a=1", "b=2", "c=3"]


def test_a_model_of_unknown_sizes_says_so(cell):
    root = cell("model=llama2-7b", "model.name=other", "accuracy=none")
    prediction = preflight(root)
    assert not prediction.known
    assert "sizes: of other are not known" in "\n".join(preflight_table([prediction]).notes)


def test_resolved_settings_of_a_launched_cell_predict_the_same(cell):
    from odyssey.config import typed_config
    from odyssey.preflight import predict

    root = cell("method=awq", "device=cpu")
    again = validate(typed_config(OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(root)))))
    assert predict(again) == predict(root)
