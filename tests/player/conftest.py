"""What the player's tests share: a whole model in small, bundles of it, and the same model in PyTorch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import toolchain
from benchmarks import synthetic
from toolchain.accuracy.eager import EagerPipeline
from toolchain.build import entries as describe
from toolchain.formats.bundle import Bundle
from toolchain.formats.recipe import Recipe, SamplerRecipe
from toolchain.formats.recipe_file import parse_recipe
from toolchain.models.family import find_family
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig
from toolchain.planning.loading.predict import predict
from toolchain.planning.loading.run import Phase, Run
from toolchain.planning.sampling import sampling
from toolchain.player import Player

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "transformer": {"hidden_size": 32, "depth": 1, "num_heads": 2, "caption_channels": 32, "model_max_length": 32},
    "vae": {
        "spatial": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 0, "norm_num_groups": 4},
        "temporal": {
            "filters": 8,
            "num_res_blocks": 1,
            "channel_multipliers": [1, 1, 2],
            "temporal_downsample": [True, True],
            "num_groups": 4,
        },
    },
}
RECIPE: dict[str, Any] = {
    "name": "small",
    "model": "open-sora-v1.2",
    "video": {"frames": 22, "height": 40, "width": 48, "fps": 8},
    "sampler": {"steps": 4, "leap": 2, "merged_steps": 2},
    "text_encoder": {"checkpoint": "text_encoder"},
    "transformer": {"checkpoint": "transformer", "passes": ["token-merge", "partition"]},
    "vae": {"checkpoint": "vae", "frames_per_call": 4, "passes": [{"partition": {"max_bytes": "80kB"}}]},
    "target": "executorch",
}
"""Two micro chunks, 17 frames and 5; 7 latent frames, an odd number; 5 latent rows, half a patch too many."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another cost more than these small models do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: the three checkpoints, with random weights."""
    folder = tmp_path_factory.mktemp("source")
    for seed, (component, config) in enumerate(CONFIGS.items()):
        synthetic.write(component, folder / component, config, torch.float32, seed)
    shutil.copy(ROOT / "recipes/tiny/text_encoder/spiece.model", folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def recipe_data() -> dict[str, Any]:
    """The recipe as plain data; do not edit it in place."""
    return RECIPE


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return parse_recipe(RECIPE)


@pytest.fixture(scope="session")
def build(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Bundle]:
    """Compile a recipe, and take from the bundle everything but itself: the checkpoints are gone."""

    def build(recipe: Recipe) -> Bundle:
        workshop = tmp_path_factory.mktemp("workshop") / "workshop"
        shutil.copytree(source, workshop)
        built = toolchain.compile_recipe(recipe, tmp_path_factory.mktemp("built") / "bundle", base=workshop)
        shutil.rmtree(workshop)
        return toolchain.load_bundle(built.path)

    return build


@pytest.fixture(scope="session")
def bundle(build: Callable[[Recipe], Bundle], recipe: Recipe) -> Bundle:
    """The recipe's bundle. Read only."""
    return build(recipe)


Variant = Callable[..., Recipe]


@pytest.fixture(scope="session")
def variant(recipe: Recipe) -> Variant:
    """The recipe with another sampler, which no artifact depends on."""

    def make(**sampler: Any) -> Recipe:
        return recipe.model_copy(update={"sampler": SamplerRecipe.model_validate({"steps": 4} | sampler)})

    return make


@pytest.fixture(scope="session")
def player(bundle: Bundle, source: Path) -> Callable[..., Player]:
    """A player of the bundle, or of its artifacts with the sampler of another recipe."""

    def make(recipe: Recipe | None = None, *, bundle: Bundle = bundle, **listeners: Any) -> Player:
        if recipe is not None:
            # what there is to reuse, blocks say, and these are looked at where a recipe asks
            own = toolchain.plan(recipe, base=source).sampling if recipe.sampler.reuse else None
            own = own or sampling(recipe, find_family(recipe.model))
            bundle = edited(bundle, sampler=describe.sampler(recipe, own))
        return Player(bundle, **listeners)

    return make


def edited(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with parts of its manifest replaced, and loading planned for what it then calls."""
    manifest = bundle.manifest.model_copy(update=changes)
    made = bundle.manifest.loading.made_from
    assert made is not None
    run = Run.from_data(made.run)
    known = {(call.block, call.function): call for call in run.calls()}
    rounds = [(calls, len(list(alike))) for calls, alike in itertools.groupby(manifest.rounds()) if calls]
    run = Run(run.blocks, tuple(Phase("", tuple(known[call] for call in calls), times) for calls, times in rounds))
    loading = predict(run, None, made.overlap_loss, made.times).entry()
    return dataclasses.replace(bundle, manifest=manifest.model_copy(update={"loading": loading}))


@pytest.fixture(scope="session")
def edit() -> Callable[..., Bundle]:
    return edited


@pytest.fixture(scope="session")
def eager(source: Path) -> Callable[[Recipe], EagerPipeline]:
    """The recipe's pipeline in PyTorch."""
    return lambda recipe: EagerPipeline(recipe, source)


@pytest.fixture(scope="session")
def decoder(source: Path) -> OpenSoraVAE:
    """The autoencoder by itself, loaded without the toolchain."""
    model = OpenSoraVAE(OpenSoraVAEConfig.from_json(CONFIGS["vae"])).eval().requires_grad_(False)
    model.load_state_dict(load_file(source / "vae/model.safetensors"))
    return model


@pytest.fixture(scope="session")
def psnr() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Decibels between two videos in -1 … 1."""

    def measure(a: torch.Tensor, b: torch.Tensor) -> float:
        assert a.shape == b.shape
        error = float((a.double() - b.double()).square().mean())
        return 10 * math.log10(4 / error) if error else math.inf

    return measure


@pytest.fixture
def events() -> Callable[[Player], list[dict[str, Any]]]:
    """What a player's trace says of loads and runs: names as within their component, and that as ``component``."""

    def read(player: Player) -> list[dict[str, Any]]:
        found = player.trace.data({})["traceEvents"]
        parts = [(e, *e["name"].partition("/")) for e in found if e["ph"] == "X"]
        return [e | {"component": component, "name": name} for e, component, _, name in parts]

    return read
