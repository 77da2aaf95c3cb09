"""Checkpoints: every layout in which weights are published, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from toolchain.errors import CheckpointError
from toolchain.system.store import Store
from toolchain.weights.checkpoint import Checkpoint, local_path, match, open_checkpoint, read_config
from toolchain.weights.digests import checkpoint_digest, tensor_digests
from toolchain.weights.hub import OFFLINE_VARIABLE, offline

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.0, -2.0]),
    "b.table": torch.linspace(0, 1, 12).reshape(3, 1, 4),
}
SHAPES = {k: tuple(v.shape) for k, v in WEIGHTS.items()}
COMMIT, OTHER = "a" * 40, "b" * 40


def same(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor] = WEIGHTS) -> bool:
    infos = checkpoint.infos()
    assert {k: (i.shape, i.dtype) for k, i in infos.items()} == {
        k: (tuple(v.shape), v.dtype) for k, v in weights.items()
    }
    return all(torch.equal(checkpoint.tensor(k), v) for k, v in weights.items())


# --- layouts -----------------------------------------------------------------------------------------


def single_file(folder: Path) -> str:
    save_file(WEIGHTS, folder / "weights.safetensors")
    return "weights.safetensors"


def folder_of(name: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "model").mkdir()
        path = folder / "model" / name
        save_file(WEIGHTS, path) if path.suffix == ".safetensors" else torch.save(WEIGHTS, path)
        return "model"

    return make


def sharded(index: str, location: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        suffix = "bin" if ".bin" in index else "safetensors"
        names = {k: f"part-{i % 2}.{suffix}" for i, k in enumerate(WEIGHTS)}
        for shard in set(names.values()):
            part = {k: v for k, v in WEIGHTS.items() if names[k] == shard}
            torch.save(part, folder / shard) if suffix == "bin" else save_file(part, folder / shard)
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
        return location

    return make


def torch_file(name: str, wrap: Callable[[Any], Any], **options: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        torch.save(wrap(WEIGHTS), folder / name, **options)
        return name

    return make


LAYOUTS: dict[str, Callable[[Path], str]] = {
    "file": single_file,
    "folder": folder_of("model.safetensors"),
    "diffusers folder": folder_of("diffusion_pytorch_model.safetensors"),
    "folder with a file of any name": folder_of("my-fine-tune.safetensors"),
    "folder of a torch file": folder_of("pytorch_model.bin"),
    "shards in a folder": sharded("model.safetensors.index.json", "."),
    "shards by index": sharded(
        "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"
    ),
    "torch shards": sharded("pytorch_model.bin.index.json", "."),
    "pt": torch_file("w.pt", dict),
    "pth": torch_file("w.pth", dict),
    "ckpt with a nested state_dict": torch_file("w.ckpt", lambda w: {"state_dict": dict(w), "epoch": 3}),
    "ema": torch_file("w.pt", lambda w: {"ema": dict(w)}),
    "two keys deep, beside an optimizer": torch_file(
        "w.pt",
        lambda w: {
            "ema": {"module": dict(w)},
            "epoch": 3,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}, "a": {"exp_avg": torch.zeros(2)}}},
        },
    ),
    "data parallel": torch_file("w.pt", lambda w: {f"module.{k}": v for k, v in w.items()}),
    "wrapped twice": torch_file(
        "w.pt", lambda w: {"state_dict": {f"module._orig_mod.{k}": v for k, v in w.items()}, "step": 1}
    ),
    "old torch format": torch_file("w.pt", dict, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    location = LAYOUTS[layout](tmp_path)
    checkpoint = open_checkpoint(location, tmp_path)
    assert same(checkpoint)
    assert checkpoint.location == location
    assert list(checkpoint.files()) == sorted(checkpoint.files()) and all(f.is_file() for f in checkpoint.files())
    match(checkpoint, SHAPES, "toy")


def test_one_of_several_state_dicts_is_chosen_not_guessed(tmp_path: Path) -> None:
    others = {k: v + 1 for k, v in WEIGHTS.items()}
    torch.save({"model": WEIGHTS, "ema": {f"module.{k}": v for k, v in others.items()}, "step": 7}, tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"holds several state_dicts \(model, ema\); choose one, as in .*w\.pt#ema'"
    ):
        open_checkpoint("w.pt", tmp_path)
    store = Store(tmp_path / "store")
    for key, weights in (("model", WEIGHTS), ("ema", others)):
        checkpoint = open_checkpoint(f"w.pt#{key}", tmp_path)
        assert same(checkpoint, weights) and checkpoint.location == f"w.pt#{key}"
        assert tensor_digests(checkpoint, store) == tensor_digests(checkpoint)
    with pytest.raises(CheckpointError, match=r"has no state_dict 'emma'; there are model, ema"):
        open_checkpoint("w.pt#emma", tmp_path)
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="only files of torch"):
        open_checkpoint("w.safetensors#ema", tmp_path)


def test_a_path_may_have_a_number_sign(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "take#2.safetensors")
    assert same(open_checkpoint("take#2.safetensors", tmp_path))


def test_a_prefix_that_not_all_names_have_stays(tmp_path: Path) -> None:
    weights = {"module.a": torch.ones(1), "b": torch.ones(2)}
    save_file(weights, tmp_path / "w.safetensors")
    assert same(open_checkpoint("w.safetensors", tmp_path), weights)
    save_file({f"model.{k}": v for k, v in WEIGHTS.items()}, tmp_path / "w.safetensors")
    assert same(open_checkpoint("w.safetensors", tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_types(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    weights = {k: v.to(dtype) for k, v in WEIGHTS.items()}
    save_file(weights, tmp_path / name) if name == "w.safetensors" else torch.save(weights, tmp_path / name)
    assert same(open_checkpoint(name, tmp_path), weights)


def test_paths_are_looked_for_beside_the_recipe_and_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_file({"here": torch.zeros(1)}, tmp_path / "here" / "w.safetensors")
    assert list(open_checkpoint("w.safetensors", tmp_path / "recipes").infos()) == ["here"]
    save_file({"beside": torch.zeros(1)}, tmp_path / "recipes" / "w.safetensors")
    assert list(open_checkpoint("w.safetensors", tmp_path / "recipes").infos()) == ["beside"]
    assert list(open_checkpoint(str(tmp_path / "here" / "w.safetensors"), tmp_path / "recipes").infos()) == ["here"]


def test_shipped_checkpoints_belong_to_the_package(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("shipped://tiny/transformer", tmp_path)
    assert "rope.freqs" in checkpoint.infos()
    config = read_config(checkpoint.root)
    assert config is not None and config["depth"] == 4


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    digests = {}
    for place in ("one", "two", "three"):
        (tmp_path / place).mkdir()
        digests[place] = tmp_path / place / "w.safetensors"
    save_file(WEIGHTS, digests["one"])
    save_file(WEIGHTS, digests["two"])
    save_file(WEIGHTS | {"a.bias": torch.tensor([1.0, -2.5])}, digests["three"])
    first, second, third = (
        checkpoint_digest(tensor_digests(open_checkpoint(str(p), tmp_path))) for p in digests.values()
    )
    assert first == second != third
    assert len(first) == 64


def test_config_is_read_beside_the_weights(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert read_config(open_checkpoint(".", tmp_path).root) is None
    (tmp_path / "config.json").write_text('{"depth": 3}')
    assert read_config(open_checkpoint(".", tmp_path).root) == {"depth": 3}
    for wrong in ("[1]", "{", "\xff"):
        (tmp_path / "config.json").write_bytes(wrong.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_config(open_checkpoint(".", tmp_path).root)


# --- what is not there -------------------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint 'no/where' does not exist: looked for '.*' or '.*'"):
        open_checkpoint("no/where", tmp_path)
    with pytest.raises(CheckpointError, match=r"'shipped://tniy' does not exist"):
        local_path("shipped://tniy", tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights in '\.': expected model\.safetensors, .* it holds nothing"):
        open_checkpoint(".", tmp_path)
    for i in range(10):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(CheckpointError, match=r"it holds 0\.txt, .*7\.txt, and 2 more"):
        open_checkpoint(".", tmp_path)


def test_two_files_of_other_names_are_ambiguous(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"it holds one\.safetensors, two\.safetensors"):
        open_checkpoint(".", tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"model\.gguf': expected a file of type \.safetensors, \.pt"):
        open_checkpoint("model.gguf", tmp_path)


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    sharded("model.safetensors.index.json", ".")(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json' names shards that are not there: part-1\.safetensors$"):
        open_checkpoint(".", tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["part-0.safetensors"]}'])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(".", tmp_path)


def test_an_index_that_maps_to_no_names(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(".", tmp_path)


# --- what is damaged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("kept", [0, 4, 60, -4])
def test_truncated_files(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / name
    save_file(WEIGHTS, path) if name == "w.safetensors" else torch.save(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{name}' is truncated or not .*fetch it again"):
        open_checkpoint(name, tmp_path)


@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=200))
def test_noise_is_no_safetensors_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.safetensors'"):
        open_checkpoint(str(path), path.parent)


@pytest.mark.parametrize("content", [b"", b"(", b"\x80\x02}.", b"PK\x03\x04"])
def test_noise_is_no_torch_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pt'"):
        open_checkpoint("w.pt", tmp_path)


@pytest.mark.parametrize("content", [b"text\n", b"\x80\x02.", b"q", b"q\x00", b"K"])
def test_noise_that_looks_like_a_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"w\.pt'"):
        open_checkpoint("w.pt", tmp_path)


class Payload:
    """What an attacker pickles: code that runs when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "in a state_dict"])
def test_a_pickle_that_is_not_weights_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    payload = Payload(f"touch {tmp_path / 'ran'}")
    path = tmp_path / "w.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif kind == "in a state_dict":
        torch.save({"state_dict": WEIGHTS, "callbacks": [payload]}, path)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(CheckpointError, match=r"w\.pt' holds more than weights; refused"):
        open_checkpoint("w.pt", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"model": {"a": "b"}}, torch.zeros(2)])
def test_a_torch_file_that_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt' is not a state_dict"):
        open_checkpoint("w.pt", tmp_path)


# --- what does not fit -------------------------------------------------------------------------------


def test_keys_and_shapes_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    checkpoint = open_checkpoint("w.safetensors", tmp_path)
    many = {f"layer.{i:02d}": (1,) for i in range(20)}
    expected = {"a.weight": (2, 4), "a.bias": (2,)} | {k: v for k, v in many.items() if k < "layer.02"}
    with pytest.raises(CheckpointError) as raised:
        match(checkpoint, expected, "transformer")
    assert str(raised.value) == (
        "checkpoint 'w.safetensors' does not fit transformer: 2 missing (layer.00, layer.01); "
        "1 unexpected (b.table); 1 of the wrong shape (a.weight is [2, 3], expected [2, 4]); "
        "it is of another model or size"
    )
    with pytest.raises(CheckpointError, match=r"20 missing \(layer\.00, .*layer\.07, and 12 more\)"):
        match(checkpoint, SHAPES | many, "transformer")
    with pytest.raises(CheckpointError, match=r"1 unexpected \(b\.table\); check its config$"):
        match(checkpoint, {k: v for k, v in SHAPES.items() if k != "b.table"}, "transformer")


@pytest.mark.parametrize("keys", [(0, 1), ("a.bias", 1)])
def test_keys_that_are_no_names(tmp_path: Path, keys: tuple[Any, ...]) -> None:
    torch.save({k: torch.zeros(1) for k in keys}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError):
        match(open_checkpoint("w.pt", tmp_path), SHAPES, "transformer")


# --- the hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the hub's client leaves it: main is OTHER, the tag v1 is COMMIT."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    repo = tmp_path / "hub" / "models--owner--name"
    for commit, weights in ((COMMIT, WEIGHTS), (OTHER, {"other": torch.zeros(2)})):
        for folder in ("", "part"):
            place = repo / "snapshots" / commit / folder
            place.mkdir(parents=True, exist_ok=True)
            save_file(weights, place / "model.safetensors")
            (place / "config.json").write_text(json.dumps({"commit": commit, "folder": folder}))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(OTHER)
    (repo / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


@pytest.mark.parametrize(
    ("location", "commit", "folder"),
    [
        ("hf://owner/name", OTHER, ""),
        ("hf://owner/name/", OTHER, ""),
        ("hf://owner/name@main", OTHER, ""),
        ("hf://owner/name@v1", COMMIT, ""),
        (f"hf://owner/name@{COMMIT}", COMMIT, ""),
        ("hf://owner/name/part", OTHER, "part"),
        ("hf://owner/name@v1/part", COMMIT, "part"),
    ],
)
def test_hub_locations_are_pinned_to_a_commit(hub: Path, location: str, commit: str, folder: str) -> None:
    checkpoint = open_checkpoint(location, hub)
    pinned = f"hf://owner/name@{commit}" + (f"/{folder}" if folder else "")
    assert checkpoint.location == pinned
    assert read_config(checkpoint.root) == {"commit": commit, "folder": folder}
    assert same(checkpoint, WEIGHTS if commit == COMMIT else {"other": torch.zeros(2)})
    assert open_checkpoint(pinned, hub).location == pinned


def test_offline_asks_nobody(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download

    asked: list[Any] = []

    def ask(*args: Any, **_: Any) -> Any:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.delenv(OFFLINE_VARIABLE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(file_download, "get_hf_file_metadata", ask)
    with offline():
        assert same(open_checkpoint(f"hf://owner/name@{COMMIT}", hub))
        for location in (f"hf://owner/other@{COMMIT}", f"hf://owner/name@{COMMIT}/no-such"):
            with pytest.raises(CheckpointError, match="nothing in the cache"):
                open_checkpoint(location, hub)
    assert not asked
    with pytest.raises(CheckpointError):
        open_checkpoint("hf://owner/other", hub)
    assert asked


def test_hub_shards(hub: Path) -> None:
    place = hub / "snapshots" / COMMIT
    (place / "model.safetensors").unlink()
    sharded("model.safetensors.index.json", ".")(place)
    assert same(open_checkpoint("hf://owner/name@v1", hub))
    (place / "part-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards that are not there: part-0\.safetensors"):
        open_checkpoint("hf://owner/name@v1", hub)


@pytest.mark.parametrize(
    "location", ["hf://owner/other", "hf://owner/name@v2", "hf://owner/name/nowhere", f"hf://owner/name@{'c' * 40}"]
)
def test_nothing_in_the_cache_and_no_network(hub: Path, location: str) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot fetch '{location}': .*no network and nothing in the cache"):
        open_checkpoint(location, hub)


@pytest.mark.parametrize(
    "location",
    ["hf://", "hf://name", "hf:///name", "hf://owner/", "hf://owner/na me", "hf://owner/name@", "hf://owner/name@a b"],
)
def test_malformed_hub_locations(hub: Path, location: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected hf://owner/name, hf://owner/name@revision or"):
        open_checkpoint(location, hub)


@pytest.mark.parametrize("location", ["hf://owner/na..me", "hf://-owner/name", "hf://owner/name.git"])
def test_names_that_the_hub_does_not_allow(hub: Path, location: str) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot fetch '{location}'"):
        open_checkpoint(location, hub)
