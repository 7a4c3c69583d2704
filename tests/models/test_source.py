import pytest
from helpers.checkpoints import write_checkpoint

from odyssey.errors import GatedModelError, InvalidCheckpointError, MissingModelError
from odyssey.models.source import checkpoint_fingerprint, resolve_model


def test_a_local_directory(tmp_path):
    directory = write_checkpoint(tmp_path / "model")
    source = resolve_model("mine", path=str(directory))
    assert (source.name, source.path, source.origin) == ("mine", directory.resolve(), "local")
    assert len(source.fingerprint) == 16


def test_a_fingerprint_sees_the_beginning_the_end_and_the_size_of_a_large_shard(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    content, found = bytearray(5 << 20), set()
    for position in (None, 0, (1 << 20) - 1, (4 << 20) + 1, (5 << 20) - 1):
        changed = content.copy()
        if position is not None:
            changed[position] = 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        found.add(checkpoint_fingerprint(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(content + bytes(1 << 20))
    found.add(checkpoint_fingerprint(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len(found | {checkpoint_fingerprint(tmp_path)}) == 7


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
