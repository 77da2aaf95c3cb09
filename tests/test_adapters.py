"""LoRA adapters: every style against a hand-merged reference, and everything that can be wrong with one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import RunCli
from safetensors.torch import load_file, save_file
from support import contents

from toolchain.errors import CheckpointError
from toolchain.system.store import Store
from toolchain.weights.adapters import find_adapted
from toolchain.weights.digests import are_remembered, tensor_digests

slow = pytest.mark.slow
RANK, ALPHA = 4, 6.0
ROLES = ("down", "up")
LINEAR, CONV = "blocks.0.attn.qkv", "x_embedder.proj"
SHAPES = {f"{LINEAR}.weight": (12, 8), f"{LINEAR}.bias": (12,), f"{CONV}.weight": (6, 3, 1, 2, 2), "table": (2, 6)}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
PARTS = {LINEAR: (drawn(RANK, 8, seed=10), drawn(12, RANK, seed=11))}
CONV_PARTS = {CONV: (drawn(RANK, 3, 1, 2, 2, seed=12), drawn(6, RANK, 1, 1, 1, seed=13))}

Parts = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Write = Callable[[Path, Parts], float]
"""Writes an adapter of these parts, and gives the scale that a reader has to find in it."""


def peft(prefix: str = "base_model.model.", infix: str = "", **config: Any) -> Write:
    def write(folder: Path, parts: Parts) -> float:
        folder.mkdir()
        tensors = {}
        for module, (down, up) in parts.items():
            tensors[f"{prefix}{module}.lora_A{infix}.weight"] = down
            tensors[f"{prefix}{module}.lora_B{infix}.weight"] = up
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["qkv"], **config})
        )
        return ALPHA / (math.sqrt(RANK) if config.get("use_rslora") else RANK)

    return write


def without_config(folder: Path, parts: Parts) -> float:
    peft("transformer.")(folder, parts)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "pytorch_lora_weights.safetensors")
    return 1.0


def patterned(folder: Path, parts: Parts) -> float:
    peft(alpha_pattern={"qkv": 10.0, "x_embedder.proj": 10.0})(folder, parts)
    return 10.0 / RANK


def old_diffusers(folder: Path, parts: Parts) -> float:
    folder.mkdir()
    tensors = {
        f"unet.{m}.lora.{r}.weight": t for m, (down, up) in parts.items() for r, t in (("down", down), ("up", up))
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return 1.0


def kohya(prefix: str, alpha: bool, flat: bool = True) -> Write:
    def write(folder: Path, parts: Parts) -> float:
        folder.mkdir()
        tensors = {}
        for module, (down, up) in parts.items():
            name = prefix + (module.replace(".", "_") if flat else module)
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors |= {f"{name}.alpha": torch.tensor(ALPHA)} if alpha else {}
        save_file(tensors, folder / "any-name.safetensors")
        return ALPHA / RANK if alpha else 1.0

    return write


STYLES: dict[str, Write] = {
    "PEFT": peft(),
    "PEFT with the adapter's name": peft(infix=".default"),
    "PEFT of a wrapped model": peft("base_model.model.module."),
    "PEFT, rank-stabilised": peft(use_rslora=True),
    "PEFT with an alpha by module": patterned,
    "diffusers": without_config,
    "diffusers, older": old_diffusers,
    "kohya": kohya("lora_unet_", True),
    "kohya of a text encoder": kohya("lora_te1_", True),
    "kohya without alpha": kohya("lora_transformer_", False),
    "kohya with dots": kohya("diffusion_model.", True, flat=False),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "base.safetensors")
    return tmp_path


def change(two: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """``up @ down`` in float64, summed one rank after the other."""
    down, up = (t.double().reshape(t.shape[0], -1) for t in two)
    return sum((torch.outer(up[:, r], down[r]) for r in range(RANK)), torch.zeros(())).reshape(shape)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("parts", [PARTS, PARTS | CONV_PARTS], ids=["linear", "linear and convolution"])
def test_an_adapter_is_merged_as_by_hand(base: Path, style: str, parts: Parts) -> None:
    scale = STYLES[style](base / "lora", parts)
    merged = find_adapted("base.safetensors", [("lora", 0.7)], base)
    for name, weight in WEIGHTS.items():
        module = name.removesuffix(".weight")
        expected = weight.double()
        if module in parts and name != module:
            expected = expected + 0.7 * scale * change(parts[module], SHAPES[name])
            assert not torch.equal(merged.tensor(name), weight)
            torch.testing.assert_close(merged.tensor(name).double(), expected, rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(merged.tensor(name), weight)
        assert tuple(merged.infos()[name].shape) == SHAPES[name]


def test_several_adapters_are_added_in_order_and_files_alone_will_do(base: Path) -> None:
    first, second = PARTS, {LINEAR: (drawn(RANK, 8, seed=20), drawn(12, RANK, seed=21))}
    kohya("lora_unet_", True)(base / "one", first)
    peft()(base / "two", second)
    file = "one/any-name.safetensors"
    merged = find_adapted("base.safetensors", [(file, 0.5), ("two", -1.0)], base).tensor(f"{LINEAR}.weight")
    scale = ALPHA / RANK
    expected = WEIGHTS[f"{LINEAR}.weight"].double() + scale * (
        0.5 * change(first[LINEAR], (12, 8)) - change(second[LINEAR], (12, 8))
    )
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=2e-6)


def test_halves_are_merged_in_float32(tmp_path: Path) -> None:
    """One rounding, at the end: half of a bfloat16's distance to the next would be lost by merging in its own type."""
    save_file({k: v.bfloat16() for k, v in WEIGHTS.items()}, tmp_path / "base.safetensors")
    scale = peft()(tmp_path / "lora", {m: (a.bfloat16(), b.bfloat16()) for m, (a, b) in PARTS.items()})
    merged = find_adapted("base.safetensors", [("lora", 0.01)], tmp_path)
    name = f"{LINEAR}.weight"
    parts = tuple(t.bfloat16() for t in PARTS[LINEAR])
    expected = WEIGHTS[name].bfloat16().double() + 0.01 * scale * change((parts[0], parts[1]), (12, 8))
    assert merged.infos()[name].dtype == merged.tensor(name).dtype == torch.float32
    assert merged.infos()["table"].dtype == merged.tensor("table").dtype == torch.bfloat16
    torch.testing.assert_close(merged.tensor(name).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("style", ["PEFT", "diffusers"])
def test_an_adapter_of_the_hub_is_pinned(base: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache as the hub's client leaves it, with the revision that ``main`` is at."""
    commit, repo = "c" * 40, base / "hub/models--owner--lora"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots").mkdir()
    scale = STYLES[style](repo / "snapshots" / commit, PARTS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(base / "hub"))
    merged = find_adapted("base.safetensors", [("hf://owner/lora", 1.0)], base)
    assert [layer.location for layer in merged.layers()][1:] == [f"hf://owner/lora@{commit}"]
    expected = WEIGHTS[f"{LINEAR}.weight"].double() + scale * change(PARTS[LINEAR], (12, 8))
    torch.testing.assert_close(merged.tensor(f"{LINEAR}.weight").double(), expected, rtol=1e-6, atol=2e-6)
    with pytest.raises(CheckpointError, match=r"hf://owner/other.*nothing in the cache"):
        find_adapted("base.safetensors", [("hf://owner/other", 1.0)], base)


def test_digests_change_with_what_decides_the_numbers(base: Path) -> None:
    peft()(base / "lora", PARTS)
    peft(lora_alpha=7.0)(base / "other alpha", PARTS)
    peft()(base / "other numbers", {LINEAR: (PARTS[LINEAR][0] + 1, PARTS[LINEAR][1])})
    store, name = Store(base / "store"), f"{LINEAR}.weight"

    def digests(*adapters: tuple[str, float]) -> dict[str, str]:
        return tensor_digests(find_adapted("base.safetensors", adapters, base), store)

    plain = digests()
    found = [digests((lora, 1.0)) for lora in ("lora", "other alpha", "other numbers")]
    found += [digests(("lora", 0.5)), digests(("lora", 1.0), ("lora", 1.0))]
    assert len({d[name] for d in (plain, *found)}) == 6
    assert all(
        {k: v for k, v in d.items() if k != name} == {k: v for k, v in plain.items() if k != name} for d in found
    )
    assert digests(("lora", 1.0)) == found[0]
    assert are_remembered(find_adapted("base.safetensors", [("lora", 1.0)], base), store)
    peft()(base / "new", {LINEAR: (PARTS[LINEAR][0] + 2, PARTS[LINEAR][1])})
    assert not are_remembered(find_adapted("base.safetensors", [("new", 1.0)], base), store)


# --- what is refused ---------------------------------------------------------------------------------

DOWN, UP = PARTS[LINEAR]
KEY = f"base_model.model.{LINEAR}"
WRONG: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "half of a layer": ({f"{KEY}.lora_A.weight": DOWN}, rf"'{LINEAR}' has no up matrix; the file is not whole"),
    "another component's": (
        {"base_model.model.decoder.lora_A.weight": DOWN, "base_model.model.decoder.lora_B.weight": UP},
        r"'base_model\.model\.decoder\.lora_A\.weight' belongs to no weight of the checkpoint; is the adapter of",
    ),
    "no LoRA": ({f"{KEY}.lokr_w1": DOWN}, r"tensor '.*lokr_w1' is not of a LoRA"),
    "DoRA": (
        {f"{KEY}.lora_A.weight": DOWN, f"{KEY}.lora_B.weight": UP, f"{KEY}.lora_magnitude_vector.weight": UP},
        r"lora_magnitude_vector.* is not of a LoRA",
    ),
    "a bias": (
        {f"{KEY}.lora_A.weight": DOWN, f"{KEY}.lora_B.weight": UP, f"{KEY}.lora_B.bias": UP[:, 0]},
        r"lora_B\.bias' is not of a LoRA",
    ),
    "two of one weight": (
        {f"{KEY}.lora_A.a.weight": DOWN, f"{KEY}.lora_A.b.weight": DOWN, f"{KEY}.lora_B.a.weight": UP},
        r"are both for 'blocks\.0\.attn\.qkv\.weight'; save one adapter a file",
    ),
    "ranks that differ": (
        {f"{KEY}.lora_A.weight": DOWN[:2], f"{KEY}.lora_B.weight": UP},
        r"lora_B\.weight' \[12, 4\] and '.*' \[2, 8\] do not make the \[12, 8\] of",
    ),
    "the matrices swapped": (
        {f"{KEY}.lora_A.weight": UP, f"{KEY}.lora_B.weight": DOWN},
        r"do not make the \[12, 8\]",
    ),
    "an alpha of two numbers": (
        {
            f"lora_unet_{LINEAR.replace('.', '_')}.{k}": v
            for k, v in {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.ones(2)}.items()
        },
        r"alpha' is not one number",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_adapter_of_this_checkpoint(base: Path, case: str) -> None:
    tensors, message = WRONG[case]
    save_file({k: v.clone() for k, v in tensors.items()}, base / "lora.safetensors")
    merged = find_adapted("base.safetensors", [("lora.safetensors", 1.0)], base)
    with pytest.raises(CheckpointError, match=rf"adapter 'lora\.safetensors'.*{message}") as raised:
        {name: merged.tensor(name) for name in merged.infos()}
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "adapters with use_dora are not merged here"),
        ({"fan_in_fan_out": True}, "adapters with fan_in_fan_out are not merged here"),
        ({"lora_alpha": "much"}, "is not an adapter's configuration: lora_alpha: "),
        ({"alpha_pattern": {"(a+)+$": 1.0}}, r"alpha_pattern '\(a\+\)\+\$' is not a module's name"),
    ],
)
def test_configurations_that_are_refused(base: Path, config: dict[str, Any], message: str) -> None:
    peft(**config)(base / "lora", PARTS)
    merged = find_adapted("base.safetensors", [("lora", 1.0)], base)
    with pytest.raises(CheckpointError, match=message):
        merged.tensor(f"{LINEAR}.weight")


def test_names_that_underscores_make_alike(tmp_path: Path) -> None:
    save_file({"a.b_c.weight": drawn(2, 2), "a_b.c.weight": drawn(2, 2)}, tmp_path / "base.safetensors")
    kohya("lora_unet_", True)(tmp_path / "lora", {"a.b.c": (drawn(1, 2), drawn(2, 1))})
    with pytest.raises(CheckpointError, match=r"could be of a\.b_c or a_b\.c; save it with dotted names"):
        find_adapted("base.safetensors", [("lora", 1.0)], tmp_path).tensor("a.b_c.weight")


# --- in a build --------------------------------------------------------------------------------------


@slow
def test_a_bundle_with_an_adapter_is_that_of_the_merged_checkpoint(project: Path, run_cli: RunCli) -> None:
    weights = load_file(project / "checkpoint" / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith("attn.qkv.weight"))
    out, into = weights[name].shape
    two = (drawn(RANK, into, seed=1), drawn(out, RANK, seed=2) * 0.01)
    peft()(project / "lora", {name.removesuffix(".weight"): two})
    by_hand = find_adapted("checkpoint", [("lora", 0.5)], project).tensor(name)
    (project / "merged").mkdir()
    save_file(weights | {name: by_hand}, project / "merged" / "model.safetensors")
    (project / "merged" / "config.json").write_bytes((project / "checkpoint" / "config.json").read_bytes())
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    recipe["target"] = "onnx"
    made = {}
    for folder, part in {"merged": {}, "checkpoint": {"loras": [{"checkpoint": "lora", "weight": 0.5}]}}.items():
        recipe["transformer"] |= {"checkpoint": folder, **part}
        (project / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        ran = run_cli("recipe.yaml", "-o", f"of-{folder}", "-v", cwd=project)
        assert ran.code == 0, ran.err
        made[folder] = contents(project / f"of-{folder}")
    by_hand_made, adapted = made["merged"], made["checkpoint"]
    assert by_hand_made.keys() == adapted.keys()
    assert {n for n in adapted if adapted[n] != by_hand_made[n]} <= {"manifest.json", "recipe.yaml"}
    pinned = yaml.safe_load((project / "of-checkpoint" / "recipe.yaml").read_text())["transformer"]["loras"]
    assert [(p["checkpoint"], p["weight"], len(p["sha256"])) for p in pinned] == [("lora", 0.5, 64)]
    again = run_cli("recipe.yaml", "-o", "of-checkpoint", cwd=project)
    assert again.code == 0 and "nothing has changed" in again.err
    other = f"transformer.loras.0.sha256={'a' * 64}"
    ran = run_cli("of-checkpoint/recipe.yaml", "--set", other, "-o", "x", cwd=project)
    assert ran.code == 3 and "checkpoint 'lora' has sha256" in ran.err
