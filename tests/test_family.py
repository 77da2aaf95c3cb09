"""A second model family, unknown to the toolchain: it compiles and plays without a change there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from entry_points import registered
from safetensors.torch import save_file
from toy_family.family import checkpoint_shapes

import toolchain
from toolchain.accuracy.eager import EagerPipeline
from toolchain.accuracy.golden_video import psnr
from toolchain.build.calibration import calibrate
from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.ir.calibration import Calibration
from toolchain.planning.plan import plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.player.video import to_bytes
from toolchain.system.store import Store
from toolchain.weights.digests import tensor_digests

ROOT = Path(__file__).parents[1]
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"vocabulary": 512},
    "transformer": {"channels": 5, "width": 12, "text": 7, "words": 6, "layers": 3},
    "vae": {},
}
PROMPT = "a wooden train"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return made(tmp_path, monkeypatch)


def made(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a checkpoint of the toy, which is registered as an installed package would be."""
    groups = {"sora_compile.models": {"toy": "tests.toy_family.family:ToyFamily"}}
    patch.syspath_prepend(str(registered(folder / "site", "toy-family", groups)))
    generator = torch.Generator().manual_seed(0)
    for component, shapes in checkpoint_shapes(CONFIGS).items():
        own = folder / component
        own.mkdir()
        (own / "config.json").write_text(json.dumps(CONFIGS[component]))
        save_file(
            {n: torch.randn(s, generator=generator) / s[-1] ** 0.5 for n, s in shapes.items()},
            own / "model.safetensors",
        )
    shutil.copy(ROOT / "recipes/tiny/text_encoder/spiece.model", folder / "text_encoder")
    return folder


def recipe(target: str = "onnx", **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "toy",
        "model": "toy",
        "video": {"frames": 5, "height": 16, "width": 24, "fps": 8},
        "sampler": {"steps": 4, "guidance": 2.0},
        "target": target,
        "gate": {"golden": {"prompt": PROMPT}},
    }
    return parse_recipe(data | {c: {"checkpoint": c} for c in CONFIGS} | changes)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "least_db"), [("onnx", 60.0), ("executorch", 60.0), ("coreml", 40.0)])
def test_a_family_of_a_third_party_compiles_and_plays(toy: Path, target: str, least_db: float) -> None:
    bundle = toolchain.compile_recipe(recipe(target), toy / "bundle", base=toy)
    found = bundle.manifest
    assert found.model == "toy"
    assert found.golden is not None
    assert found.golden.psnr_db >= least_db
    assert (found.geometry.latent_height, found.geometry.latent_width, found.geometry.latent_frames) == (4, 6, 5)
    assert list(found.components["transformer"].load_order) == ["step"]
    assert [b.name for b in found.components["transformer"].blocks] == ["start", "layer_0", "layer_1", "layer_2", "end"]
    assert len({b.structure for b in found.components["transformer"].blocks}) == 3
    toolchain.play(bundle, PROMPT, toy / "video.mp4")
    assert (toy / "video.mp4").stat().st_size > 0
    toolchain.verify(bundle).require()


@pytest.mark.slow
def test_the_passes_know_no_family(toy: Path) -> None:
    """Token merging of a third party's layers, and a leap: played as the eager pipeline computes it."""
    changes = {
        "transformer": {"checkpoint": "transformer", "passes": ["token-merge", "partition"]},
        "sampler": {"steps": 6, "guidance": 1.5, "leap": 3, "merged_steps": 2},
    }
    whole = recipe(**changes)
    bundle = toolchain.compile_recipe(whole, toy / "bundle", base=toy)
    assert [s.function for s in bundle.manifest.sampler.steps] == ["merged", "merged", "base", "base"]
    played = to_bytes(toolchain.Player(bundle, warn=lambda _: None).video(PROMPT, 3))
    assert psnr(played, to_bytes(EagerPipeline(whole, toy).video(PROMPT, 3))) >= 60.0


@pytest.mark.slow
def test_fused_and_split_tensors_are_stamped_as_lowered(toy: Path) -> None:
    files = {}
    for direct in (False, True):
        bundle = toolchain.compile_recipe(recipe(gate={"mode": "none"}), toy / f"b{direct}", base=toy, direct=direct)
        files[direct] = [
            (f.path, f.sha256) for c in bundle.manifest.components.values() for b in c.blocks for f in b.files
        ]
    assert files[False] == files[True]


def test_what_the_family_refuses_is_refused_when_the_recipe_is_loaded(toy: Path) -> None:
    with pytest.raises(RecipeError, match=r"^video: height and width must be multiples of 4$"):
        recipe(video={"frames": 5, "height": 18, "width": 24})


def test_tiles_of_a_family_that_decodes_whole_frames(toy: Path) -> None:
    asked = recipe(vae={"checkpoint": "vae", "tiles": {"height": 8, "width": 8, "overlap": 0}})
    with pytest.raises(RecipeError, match=r"^vae\.tiles: model 'toy' does not decode in tiles; leave it out$"):
        toolchain.plan(asked, base=toy)


def test_a_family_that_is_not_there_names_the_nearest(toy: Path) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(model="tov")
    assert str(error.value) == "model: no model is called 'tov'; did you mean 'toy'?"


def test_the_toolchain_names_no_family() -> None:
    folder = ROOT / "toolchain"
    own = folder / "models/open_sora_v1_2"
    files = [p for p in folder.rglob("*.py") if own not in p.parents]
    named = [str(p) for p in files for word in ("open_sora", "stdit", "STDiT", "T5Encoder") if word in p.read_text()]
    assert named == []


def test_fused_and_packed_weights_have_the_statistics_of_their_inputs(toy: Path) -> None:
    planned = plan_resolved(resolve(recipe(), toy, checkpoints=True))
    found = {}
    for component in ("transformer", "vae"):
        digests = tensor_digests(planned.components[component].resolved.checkpoint)
        asked = Calibration(inputs=2)
        found[component] = calibrate(planned, component, Store(toy / "store"), digests, asked=asked)
    sources = [w.source for pair in planned.components["transformer"].pairs for w in pair.plain.weights.values()]
    fused = [source for source in sources if len(source.tensors) == 3 and len(source.shape) == 2]
    assert len(fused) == 3
    for source in fused:
        columns = found["transformer"].statistic(source, "importance")
        assert columns.shape == source.shape
        assert float(columns.min()) > 0
        assert torch.equal(columns[0], columns[-1])
        assert {run.function for run, _ in found["transformer"].ranges(source)} == {"base"}
    (packed,) = (m.source for m in found["vae"].measured)
    assert packed.narrow == ((1, 0, packed.shape[1]),)
    assert found["vae"].statistic(packed, "importance").shape == packed.shape
