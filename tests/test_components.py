"""How components are chosen, sized and put together; their blocks by name, precision and what the bundle says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

import toolchain
from benchmarks import synthetic
from toolchain.accuracy import metrics as gate
from toolchain.accuracy.references import References, every_run, run_eager
from toolchain.build.pinning import pin, pinned_recipe
from toolchain.errors import RecipeError
from toolchain.formats.recipe import Recipe
from toolchain.formats.recipe_file import load_recipe, parse_recipe
from toolchain.ir.blocks import BlockPair
from toolchain.ir.feeds import Constant
from toolchain.ir.graph import Graph
from toolchain.ir.storage import FLOAT16, FLOAT32
from toolchain.models.family import ModelFamily, find_family
from toolchain.models.open_sora_v1_2.t5 import T5Config
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig
from toolchain.models.open_sora_v1_2.vae_config import chunk_functions
from toolchain.planning.plan import ComponentPlan, Plan, plan_resolved
from toolchain.planning.resolve import resolve
from toolchain.system.store import Store
from toolchain.weights.block_weights import BlockWeights, read_named
from toolchain.weights.checkpoint import Checkpoint, open_checkpoint

ROOT = Path(__file__).parents[1]
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    "transformer": {"hidden_size": 32, "depth": 1, "num_heads": 2, "caption_channels": 32, "model_max_length": 24},
    "vae": {
        "spatial": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
        "temporal": {
            "filters": 8,
            "num_res_blocks": 1,
            "channel_multipliers": [1, 1, 2],
            "temporal_downsample": [True, True],
            "num_groups": 4,
        },
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a model smaller than ``tiny``."""
    folder = tmp_path_factory.mktemp("source")
    for seed, (component, config) in enumerate(CONFIGS.items()):
        synthetic.write(component, folder / component, config, torch.float32, seed)
    shutil.copy(ROOT / "recipes/tiny/text_encoder/spiece.model", folder / "text_encoder")
    return folder


def small_recipe(**changes: Any) -> Recipe:
    """A recipe of the smaller model; a component that is changed to None is left out."""
    data: dict[str, Any] = {
        "name": "small",
        "model": "open-sora-v1.2",
        "video": {"frames": 22, "height": 32, "width": 48},
        "sampler": {"steps": 2},
        "target": "onnx",
    }
    for name in CONFIGS:
        own = changes.pop(name, {})
        data[name] = None if own is None else {"checkpoint": name} | own
    return parse_recipe(data | changes)


def tiny(*overrides: str) -> Recipe:
    return load_recipe("tiny", overrides)


def family_of(recipe: Recipe) -> ModelFamily:
    return find_family(recipe.model)


# --- chunks and groups -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "functions"),
    [
        (1, {"base": (1, 1)}),
        (17, {"base": (5, 17)}),
        (18, {"base": (5, 17), "tail": (1, 1)}),
        (22, {"base": (5, 17), "tail": (2, 5)}),
        (33, {"base": (5, 17), "tail": (4, 16)}),
        (34, {"base": (5, 17)}),
        (51, {"base": (5, 17)}),
        (52, {"base": (5, 17), "tail": (1, 1)}),
        (204, {"base": (5, 17)}),
    ],
)
def test_chunk_functions(frames: int, functions: dict[str, tuple[int, int]]) -> None:
    chunks = OpenSoraVAEConfig().chunks(frames)
    found = chunk_functions(chunks)
    assert found == functions
    assert set(found.values()) == set(chunks)
    recipe = tiny(f"video.frames={frames}")
    assert sum(n for n, _ in chunks) == family_of(recipe).geometry(recipe, {"transformer": {}}).latent_frames
    temporal, _ = family_of(recipe).stages(recipe, {})
    assert (temporal.rate, temporal.layout) == ("chunk", "clip")
    assert [(p.takes, p.gives) for p in temporal.pieces] == list(chunks)
    assert all(functions[p.function] == (p.takes, p.gives) for p in temporal.pieces)


def frames_per_call(recipe: Recipe) -> int:
    """Frames that the spatial VAE takes at once; all groups together give the video's."""
    _, spatial = family_of(recipe).stages(recipe, {})
    assert (spatial.rate, spatial.layout) == ("frames", "frames")
    assert {p.function for p in spatial.pieces} == {"base"}
    (together,) = {p.takes for p in spatial.pieces}
    assert [p.gives for p in spatial.pieces[:-1]] == [together] * (len(spatial.pieces) - 1)
    assert sum(p.gives for p in spatial.pieces) == recipe.video.frames
    return together


@pytest.mark.parametrize(("frames", "group"), [(1, 1), (17, 1), (22, 2), (34, 2), (51, 3), (68, 4), (102, 3), (204, 4)])
def test_frames_per_call_divide_the_frames(frames: int, group: int) -> None:
    assert frames_per_call(tiny(f"video.frames={frames}")) == group


@pytest.mark.parametrize("asked", [1, 3, 5, 17, 40])
def test_frames_per_call_as_asked(asked: int) -> None:
    assert frames_per_call(tiny(f"vae.frames_per_call={asked}")) == asked


def test_frames_per_call_of_the_transformer_alone() -> None:
    assert frames_per_call(small_recipe(text_encoder=None, vae=None)) == 2


# --- full size ---------------------------------------------------------------------------------------

PARAMETERS = {"text_encoder": 4_762_310_656, "transformer": 1_208_872_772, "vae": 83_653_863 + 309_687_144 + 8}
"""T5 v1.1 XXL's encoder; STDiT3-XL/2 with its null prompt; SDXL's autoencoder, the temporal one, and the
latents' scale and shift."""


@pytest.fixture(scope="module")
def full_size() -> tuple[Plan, int]:
    """The plan of the published model, and the bytes that planning took."""
    t5 = asdict(T5Config()) | {"feed_forward_proj": "gated-gelu", "model_type": "t5"}
    configs: dict[str, dict[str, Any]] = {"text_encoder": t5, "transformer": {}, "vae": {}}
    parts = {name: {"checkpoint": "nowhere", "config": config} for name, config in configs.items()}
    recipe = small_recipe(video={"frames": 68, "height": 240, "width": 320}, **parts)
    before = psutil.Process().memory_info().rss
    return toolchain.plan(recipe), psutil.Process().memory_info().rss - before


@pytest.mark.slow
def test_full_size_is_planned_without_weights(full_size: tuple[Plan, int]) -> None:
    plan, grown = full_size
    assert grown < 1e9  # the weights are 24 GB
    for part in plan.components.values():
        for forms in part.definition.forms:
            for form in (forms.base, *forms.others.values()):
                tensors = [*form.parameters(), *form.buffers()]
                assert tensors
                assert all(t.is_meta for t in tensors)


@pytest.mark.parametrize("component", PARAMETERS)
def test_full_size_has_the_official_weights(component: str, full_size: tuple[Plan, int]) -> None:
    definition = full_size[0].components[component].definition
    assert definition.name == component
    assert sum(torch.Size(shape).numel() for shape in definition.expected.values()) == PARAMETERS[component]


def test_full_size_blocks(full_size: tuple[Plan, int]) -> None:
    parts = full_size[0].components
    names = {n: [b.name for b in part.blocks] for n, part in parts.items()}
    assert names["text_encoder"] == ["embed", *(f"layer_{i:02d}" for i in range(24)), "final"]
    assert names["transformer"] == ["caption", "embed", *(f"pair_{i:02d}" for i in range(28)), "final"]
    assert len({b.structure() for b in parts["text_encoder"].blocks}) == 3
    assert len({b.structure() for b in parts["transformer"].blocks}) == 4
    stems = {name.partition("_")[0] for name in names["vae"]}
    assert stems == {"temporal", "spatial"}
    assert all(b.parameters * 4 <= 200e6 for b in parts["vae"].blocks)


# --- what does not fit -------------------------------------------------------------------------------


def test_text_and_transformer_must_fit() -> None:
    config = CONFIGS["transformer"] | {"caption_channels": 48}
    recipe = small_recipe(
        text_encoder={"config": CONFIGS["text_encoder"] | {"feed_forward_proj": "gated-gelu"}},
        transformer={"config": config},
        vae=None,
    )
    with pytest.raises(RecipeError) as error:
        toolchain.plan(recipe)
    assert str(error.value) == (
        "text_encoder: its outputs have 32 channels, the transformer takes 48 (caption_channels)"
    )
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("component", "config", "said"),
    [
        ("text_encoder", {"d_model": 32}, "text_encoder.config: feed_forward_proj 'relu'"),
        ("text_encoder", {"feed_forward_proj": "gated-gelu"}, "text_encoder.config: T5 config lacks vocab_size"),
        ("text_encoder", {"model_type": "umt5"}, "text_encoder.config: model_type 'umt5'"),
        ("transformer", {"hidden_size": 33}, "transformer.config: hidden_size 33"),
        ("transformer", {"num_heads": 0}, "transformer.config: "),
        ("vae", {"spatial": {"norm_num_groups": 7}}, "vae.config: 128 channels do not divide"),
        ("vae", {"temporal": {"temporal_downsample": [True]}}, "vae.config: temporal_downsample has 1 entries"),
        ("vae", {"micro_frame_size": 0}, "vae.config: micro_frame_size 0"),
        ("vae", {"shift": 1}, "vae.config: "),
    ],
)
def test_a_configuration_that_cannot_be(component: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        family_of(small_recipe()).define(small_recipe(), whole_configs() | {component: config})
    assert str(error.value).startswith(said)


def whole_configs() -> dict[str, dict[str, Any]]:
    t5 = {"feed_forward_proj": "gated-gelu", "model_type": "t5"}
    return CONFIGS | {"text_encoder": CONFIGS["text_encoder"] | t5}


def test_latents_of_other_channels_do_not_fit() -> None:
    recipe, configs = small_recipe(), whole_configs()
    assert list(family_of(recipe).define(recipe, configs)) == ["text_encoder", "transformer", "vae"]
    configs["transformer"] = configs["transformer"] | {"in_channels": 16}
    with pytest.raises(RecipeError) as error:
        family_of(recipe).define(recipe, configs)
    assert str(error.value) == "vae.config: its latents have 4 channels, the transformer takes 16 (in_channels)"


# --- what is written down ----------------------------------------------------------------------------


def resolved(plan: Plan, source: Path) -> Recipe:
    """The recipe that a bundle of this plan would hold."""
    whole = plan_resolved(resolve(plan.recipe, source, checkpoints=True))
    parts = whole.resolved.components
    return pinned_recipe(whole, {n: pin(part.checkpoint, part.recipe, Store()) for n, part in parts.items()})


def structures(plan: Plan) -> dict[str, list[tuple[str, str, str]]]:
    """Every block by name, structure and precision."""
    parts = plan.components.items()
    return {n: [(b.name, b.structure(), part.target.precision) for b in part.blocks] for n, part in parts}


@pytest.mark.parametrize(
    "changes",
    [
        {"text_encoder": None, "vae": None},
        {"text_encoder": None, "vae": {"encoder": True, "frames_per_call": 4}},
        {"text_encoder": None, "vae": {"precision": "float32"}, "target": "coreml"},
        pytest.param(
            {"text_encoder": None, "transformer": {"precision": "float32"}, "target": "coreml"},
            marks=(),
        ),
        pytest.param(
            {},
            marks=(),
        ),
    ],
    ids=["transformer", "vae", "vae-precision", "transformer-precision", "whole"],
)
@pytest.mark.slow
def test_a_resolved_recipe_builds_the_same(changes: dict[str, Any], source: Path) -> None:
    plan = toolchain.plan(small_recipe(**changes), base=source)
    again = parse_recipe(yaml.safe_load(resolved(plan, source).to_yaml()))
    assert structures(toolchain.plan(again, base=source)) == structures(plan)


# --- precision ---------------------------------------------------------------------------------------


def test_precision_by_component(source: Path) -> None:
    recipe = small_recipe(vae={"precision": "float32"}, target="coreml")
    parts = toolchain.plan(recipe, base=source).components
    assert {n: part.target.precision for n, part in parts.items()} == {
        "text_encoder": "float16",
        "transformer": "float16",
        "vae": "float32",
    }
    storages = {n: {w.storage for b in part.blocks for w in b.weights.values()} for n, part in parts.items()}
    assert storages == {"text_encoder": {FLOAT16}, "transformer": {FLOAT16}, "vae": {FLOAT32}}
    bytes_ = {n: 4 if part.target.precision == "float32" else 2 for n, part in parts.items()}
    assert {n: part.weight_bytes for n, part in parts.items()} == {
        n: bytes_[n] * part.parameters for n, part in parts.items()
    }


def test_a_precision_that_the_target_lacks(source: Path) -> None:
    with pytest.raises(RecipeError) as error:
        toolchain.plan(small_recipe(vae={"precision": "float16"}), base=source)
    assert str(error.value).startswith("vae.precision: ")


@pytest.mark.slow
def test_precision_is_recorded(source: Path, tmp_path: Path) -> None:
    recipe = small_recipe(text_encoder=None, vae={"precision": "float32"}, target="coreml", video=ONE_FRAME)
    manifest = toolchain.compile_recipe(recipe, tmp_path / "bundle", base=source).manifest
    assert {n: c.precision for n, c in manifest.components.items()} == {"transformer": "float16", "vae": "float32"}
    assert manifest.target.options["precision"] == "float16"
    assert manifest.gate.limits == {"float16": 2e-2, "float32": 1e-3}
    for name, part in manifest.components.items():
        ports = [p for b in part.blocks for p in (*b.inputs, *b.outputs)]
        exact = {p.source for b in part.blocks for p in b.inputs if p.source in ("inputs.timestep", "inputs.fps")}
        assert exact == ({"inputs.timestep", "inputs.fps"} if name == "transformer" else set())
        assert [b.weight_bytes for b in part.blocks] == [
            {part.precision: b.parameters * (2 if part.precision == "float16" else 4)} for b in part.blocks
        ]
        dtypes = {p.dtype for p in ports if getattr(p, "source", None) not in exact}
        assert dtypes == {part.precision}
        assert {i.dtype for i in part.inputs} <= {part.precision, "float32"}
    again = load_recipe(tmp_path / "bundle/recipe.yaml")
    assert again.vae is not None
    assert (again.vae.precision, again.transformer.precision) == ("float32", "float16")
    assert again.target.options["precision"] == "float16"


# --- the VAE's encoder -------------------------------------------------------------------------------

ONE_FRAME = {"frames": 1, "height": 32, "width": 48}


@pytest.mark.slow
def test_the_encoder_is_planned_when_asked_for() -> None:
    parts = {asked: toolchain.plan(tiny(f"vae.encoder={asked}")).components["vae"] for asked in ("false", "true")}
    without, blocks = parts["false"].blocks, parts["true"].blocks
    assert {b.rate for b in without} == {"chunk", "frames"}
    assert [b.name for b in blocks[: len(without)]] == [b.name for b in without]
    assert [b.structure() for b in blocks[: len(without)]] == [b.structure() for b in without]
    encoder = blocks[len(without) :]
    assert [b.rate for b in encoder] == ["encode_frames", "encode_chunk"]
    assert [b.name.partition("_encoder_")[0] for b in encoder] == ["spatial", "temporal"]
    assert len({b.name for b in blocks}) == len(blocks)
    assert [[p.name for p in b.outputs] for b in encoder] == [["mean", "logvar"]] * 2


@pytest.mark.slow
def test_the_encoder_has_a_tail_as_the_decoder_has() -> None:
    part = toolchain.plan(tiny("vae.encoder=true", "video.frames=22")).components["vae"]
    functions = {b.rate: list(b.functions) for b in part.blocks}
    assert functions == {
        "chunk": ["base", "tail"],
        "frames": ["base"],
        "encode_frames": ["base"],
        "encode_chunk": ["base", "tail"],
    }


@pytest.mark.slow
def test_the_encoder_and_the_decoder_have_references(source: Path) -> None:
    recipe = small_recipe(text_encoder=None, vae={"encoder": True})
    part = toolchain.plan(recipe, base=source).components["vae"]
    checkpoint = open_checkpoint("vae", source)
    for graph in part.graphs:
        blocks = [p.plain for p in part.pairs if p.name in graph.blocks()]

        def inputs(function: str, run: int, graph: Graph = graph) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(run)
            return {spec.name: family_of(recipe).sample_input(spec, generator) for spec in graph.inputs_of(function)}

        runs = every_run(graph.functions, 2)
        references = References(blocks, runs, inputs, {}, lambda b: BlockWeights(b, checkpoint, {}))
        for block in blocks:
            cases = references.cases(block.name)
            assert [c.function for c in cases] == [f for f in graph.functions for _ in range(2)]
            for case in cases:
                own = block.signatures[case.function]
                assert {k: tuple(v.shape) for k, v in case.outputs.items()} == {p.name: p.shape for p in own.outputs}


@pytest.mark.slow
def test_the_encoder_lowers(source: Path, tmp_path: Path) -> None:
    """Through the gate for ONNX; and its parts one after the other are the model's ``encode``."""
    video = {"frames": 17, "height": 32, "width": 48}
    recipe = small_recipe(text_encoder=None, vae={"encoder": True, "frames_per_call": 17}, video=video)
    part = toolchain.plan(recipe, base=source).components["vae"]
    checkpoint = open_checkpoint("vae", source)
    spatial, temporal = [p for p in part.pairs if "encode" in p.lowered.rate]
    pixels = torch.rand(17, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scaling = part.definition.config["spatial_scaling"]
    mean = run_through_the_gate(part, spatial, {"pixels": pixels}, checkpoint, tmp_path)["mean"]
    x_z = mean.transpose(0, 1)[None] * scaling
    moments = run_through_the_gate(part, temporal, {"x_z": x_z}, checkpoint, tmp_path)
    model = OpenSoraVAE(OpenSoraVAEConfig.from_json(part.definition.config)).eval()
    model.load_state_dict(read_named(checkpoint, part.definition.expected))
    with torch.no_grad():
        expected = model.encode(pixels.transpose(0, 1)[None])
    found = (moments["mean"] - model.shift) / model.scale
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def run_through_the_gate(
    part: ComponentPlan,
    pair: BlockPair,
    inputs: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    folder: Path,
) -> dict[str, torch.Tensor]:
    """Lower a block, hold it against PyTorch on ``inputs``, and return what its artifact computes."""
    block, reference = pair.lowered, pair.plain
    weights = dict(BlockWeights(block, checkpoint, {}))
    artifact = part.target.lower(block, weights, folder / f"{block.name}{part.target.suffix}")
    part.target.check(artifact.path, block)
    engine = part.target.engine(artifact.path, block.inputs, block.outputs)
    case = run_eager(reference, "base", BlockWeights(reference, checkpoint, {}), inputs)
    measured = gate.measure(block, artifact.functions, engine, [case], 1e-3)
    assert measured["base"].relative_error < 1e-5
    return dict(engine("base", inputs))


# --- inputs for the gate -----------------------------------------------------------------------------


def test_sample_inputs_are_such_as_a_run_has() -> None:
    recipe = tiny("vae.encoder=true", "transformer.frame_conditions=true")
    generator = torch.Generator().manual_seed(0)
    for part in toolchain.plan(recipe).components.values():
        for graph in part.graphs:
            for spec in graph.inputs:
                value = family_of(recipe).sample_input(spec, generator)
                assert value.shape == spec.shape
                assert value.dtype == spec.dtype
                if spec.feed.kind == "timestep":
                    assert 0 <= value[0].item() <= 1000
                elif spec.feed.kind == "constant":
                    assert (spec.name, set(value.tolist())) == ("fps", {spec.feed.value})
                    assert spec.feed.value == recipe.video.fps
                elif spec.feed.kind == "frame_mask":
                    assert set(value.unique().tolist()) <= {0.0, 1.0}
                elif spec.feed.kind == "pixels":
                    assert -1 <= float(value.min()) < float(value.max()) <= 1
                elif spec.feed.kind == "token_ids":
                    assert 0 <= int(value.min()) < int(value.max()) < 32
                elif spec.feed.kind == "token_mask":
                    assert bool((value[:, 1:] <= value[:, :-1]).all())
                    assert value[0, 0] == 1


@pytest.mark.slow
def test_what_feeds_the_inputs() -> None:
    recipe = tiny("vae.encoder=true", "transformer.frame_conditions=true", "video.fps=30")
    parts = toolchain.plan(recipe).components
    feeds = {n: [[(i.name, i.feed.kind) for i in g.inputs] for g in part.graphs] for n, part in parts.items()}
    assert feeds == {
        "text_encoder": [[("input_ids", "token_ids"), ("mask", "token_mask")]],
        "transformer": [
            [
                ("x", "latents"),
                ("timestep", "timestep"),
                ("y", "text_embedding"),
                ("mask", "token_mask"),
                ("fps", "constant"),
                ("x_mask", "frame_mask"),
            ]
        ],
        "vae": [[("z", "frames")], [("x_z", "frames")], [("pixels", "pixels")], [("x_z", "frames")]],
    }
    gives = {n: [g.gives for g in part.graphs] for n, part in parts.items()}
    assert gives == {
        "text_encoder": [{"y": "text_embedding"}],
        "transformer": [{"out": "prediction"}],
        "vae": [
            {"x_z": "frames"},
            {"pixels": "pixels"},
            {"mean": "mean", "logvar": "log_variance"},
            {"mean": "mean", "logvar": "log_variance"},
        ],
    }
    assert [i.feed for i in parts["transformer"].graphs[0].inputs if i.name == "fps"] == [Constant(value=30.0)]
    one = toolchain.plan(tiny("video.frames=1")).components["transformer"].graphs[0]
    assert [i.feed for i in one.inputs if i.name == "fps"] == [Constant(value=120.0)]  # as images were trained
