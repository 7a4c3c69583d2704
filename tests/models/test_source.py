import pytest
import torch
from helpers.checkpoints import write_checkpoint
from safetensors.torch import save_file

from odyssey.errors import GatedModelError, InvalidCheckpointError, MissingModelError
from odyssey.models.source import checkpoint_fingerprint, resolve_model


def test_a_local_directory(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    source = resolve_model("mine", path=str(directory))
    assert (source.name, source.path, source.origin) == ("mine", directory.resolve(), "local")
    assert len(source.fingerprint) == 16


def _fingerprints(directory, contents):
    found = []
    for name, content in contents:
        (directory / name).write_bytes(content)
        found.append(checkpoint_fingerprint(directory))
    return found


def test_a_fingerprint_sees_every_tensor_of_a_shard(tmp_path):
    """A merged adapter changes some projections in the middle of a file, and neither its size nor its ends."""
    rows = torch.arange(3 * 2048, dtype=torch.float32).view(3, 2048, 1).expand(3, 2048, 64).contiguous()
    found = set()
    for changed in (None, 0, 1, 2):
        tensors = {f"layers.{number}.weight": rows[number].clone() for number in range(3)}
        if changed is not None:
            tensors[f"layers.{changed}.weight"].mul_(1.001)
        (tmp_path / "config.json").write_text("{}")
        save_file(tensors, tmp_path / "model.safetensors")
        found.add(checkpoint_fingerprint(tmp_path))
    assert len(found) == 4


def test_a_fingerprint_sees_both_ends_of_a_tensor_and_all_of_a_small_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = set()
    for name, position in (
        ("large", None),
        ("large", 0),
        ("large", -1),
        ("small", 0),
        ("small", 20_000),
        ("small", -1),
    ):
        tensors = {"large": torch.zeros(1 << 20, dtype=torch.uint8), "small": torch.zeros(60_000, dtype=torch.uint8)}
        if position is not None:
            tensors[name][position] = 1
        save_file(tensors, tmp_path / "model.safetensors")
        found.add(checkpoint_fingerprint(tmp_path))
    assert len(found) == 6


def test_a_fingerprint_sees_config_tokenizer_size_and_names(tmp_path):
    contents = [
        ("config.json", b"{}"),
        ("config.json", b'{"a": 1}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer_config.json", b'{"add_bos_token": true}'),
        ("tokenizer_config.json", b'{"add_bos_token": false}'),
        ("a.safetensors", b""),
        ("a.safetensors", bytes(100)),
        ("a.safetensors", bytes(101)),
        ("b.safetensors", b""),
    ]
    assert len(set(_fingerprints(tmp_path, contents))) == len(contents)
    # The order of keys and files that are no part of the model say nothing.
    before = checkpoint_fingerprint(tmp_path)
    assert _fingerprints(tmp_path, [("README.md", b"x"), ("config.json", b'{ "a":1 }')]) == [before, before]


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 300_000,
        (50).to_bytes(8, "little") + b"{" * 300_000,
        (2).to_bytes(8, "little") + b"[]" + bytes(300_000),
    ],
    ids=["length beyond the file", "no JSON", "no mapping"],
)
def test_a_damaged_shard_has_a_fingerprint_of_its_bytes(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    other = content[:-1] + b"?"
    assert len(set(_fingerprints(tmp_path, [("model.safetensors", each) for each in (content, other)]))) == 2


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(MissingModelError, match=r"model.path=.*no such directory"):
        resolve_model("mine", path=str(tmp_path / "absent"))


def test_a_shard_that_links_to_nowhere(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    (shard,) = directory.glob("*.safetensors")
    shard.unlink()
    shard.symlink_to(tmp_path / "pruned")
    with pytest.raises(InvalidCheckpointError, match="model.safetensors: missing shard"):
        resolve_model("mine", path=str(directory))


def _hub_fails_with(monkeypatch, error):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def _hub_error(error_class, status):
    import httpx

    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid"))
    return error_class("refused", response=response)


def test_a_gated_model_says_what_to_do(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    _hub_fails_with(monkeypatch, _hub_error(GatedRepoError, 403))
    with pytest.raises(GatedModelError, match=r"accept the licence.*HF_TOKEN"):
        resolve_model("llama2-7b", hub_id="meta-llama/Llama-2-7b-hf")


def test_an_unknown_repository(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    _hub_fails_with(monkeypatch, _hub_error(RepositoryNotFoundError, 404))
    with pytest.raises(MissingModelError, match="no such repository"):
        resolve_model("x", hub_id="nobody/nothing")


def test_no_network_and_no_cache(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    _hub_fails_with(monkeypatch, LocalEntryNotFoundError("offline"))
    with pytest.raises(MissingModelError, match=r"cannot be reached.*model.path=DIR"):
        resolve_model("x", hub_id="a/b")


def test_a_downloaded_snapshot_names_its_commit(monkeypatch, tmp_path):
    snapshot = write_checkpoint(tmp_path / "snapshots" / "0123abcd")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(snapshot))
    source = resolve_model("x", hub_id="a/b")
    assert source.origin == "hub:a/b@0123abcd"
    assert source.path == snapshot
