"""The video autoencoder against golden vectors of the official code, and its lowered forms against itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from toolchain.ir.graph import Graph, LoweredForm, capture, compute_nodes, leaf_of
from toolchain.ir.legalise import Legalise, LegaliseConfig
from toolchain.models.open_sora_v1_2.attention import AttentionLeaf
from toolchain.models.open_sora_v1_2.vae import OpenSoraVAE, OpenSoraVAEConfig
from toolchain.models.open_sora_v1_2.vae_conv import CausalConv3d, channels_to_frames
from toolchain.models.open_sora_v1_2.vae_lowered import (
    LoweredSpatialDecoder,
    LoweredSpatialEncoder,
    LoweredTemporalDecoder,
    LoweredTemporalEncoder,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5
CASES = (1, 17, 22, 34)
RULES = ("bmm", "conv3d-taps")

Tensors = Mapping[str, torch.Tensor]


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference; shapes must agree."""
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())


def stored(name: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(GOLDEN / f"{name}.safetensors")
    return tensors


@pytest.fixture(scope="module", autouse=True)
def one_thread_without_gradients() -> Iterator[None]:
    """Threads that wait for one another cost far more than these small models do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((GOLDEN / "vae.json").read_text())
    return data


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return stored("vae_weights")


@pytest.fixture(scope="module")
def model(facts: dict[str, Any], weights: Tensors) -> OpenSoraVAE:
    model = OpenSoraVAE(OpenSoraVAEConfig.from_json(facts)).eval()
    model.load_state_dict(weights, strict=True)
    return model


@pytest.fixture(scope="module")
def full_size() -> OpenSoraVAE:
    with torch.device("meta"):
        return OpenSoraVAE(OpenSoraVAEConfig())


def case(frames: int) -> dict[str, torch.Tensor]:
    return stored(f"vae_case_f{frames}")


# --- the model


def test_keys_and_shapes_are_the_official_ones(model: OpenSoraVAE, facts: dict[str, Any]) -> None:
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == facts["keys"]


def test_defaults_are_the_published_sizes(full_size: OpenSoraVAE, facts: dict[str, Any]) -> None:
    temporal = {k: list(v.shape) for k, v in full_size.temporal_vae.state_dict().items()}
    assert temporal == facts["VAE_Temporal_SD_full_size_keys"]
    assert sum(p.numel() for p in full_size.temporal_vae.parameters()) == facts["VAE_Temporal_SD_params"]
    # the size that diffusers gives for its SDXL autoencoder
    assert sum(p.numel() for p in full_size.spatial_vae.parameters()) == 83_653_863
    assert torch.device("meta") == next(full_size.parameters()).device


@pytest.mark.parametrize("frames", CASES)
def test_encode_is_the_official(model: OpenSoraVAE, frames: int) -> None:
    golden = case(frames)
    x_z, noise = golden["spatial_enc.x_z_sampled"], golden["temporal_enc.noise"]
    spatial_mean, spatial_logvar = model.spatial_moments(golden["in.x"])
    mean, logvar = model.temporal_moments(x_z)
    spatial_latent = x_z.transpose(1, 2).flatten(0, 1) / model.config.spatial_scaling
    spatial_noise = (spatial_latent - spatial_mean) * torch.exp(-0.5 * spatial_logvar)
    got = {
        "spatial_enc.mean": spatial_mean,
        "spatial_enc.logvar": spatial_logvar,
        "temporal_enc.mean": mean,
        "temporal_enc.logvar": logvar,
        "encode.z": model.encode(golden["in.x"], spatial_noise=spatial_noise, noise=noise),
        "encode.z_mean": model.encode_temporal(x_z),
    }
    errors = {name: relative(value, golden[name]) for name, value in got.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("frames", CASES)
def test_decode_is_the_official(model: OpenSoraVAE, frames: int) -> None:
    golden = case(frames)
    assert relative(model.decode_temporal(golden["in.z"], frames), golden["decode.temporal"]) < TOLERANCE
    assert relative(model.decode(golden["in.z"], frames), golden["decode.x"]) < TOLERANCE


def outputs_of(root: nn.Module, run: Callable[[], object]) -> dict[str, torch.Tensor]:
    """What every module under ``root`` last returned, by path."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, out: torch.Tensor) -> None:
            found[name] = out

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in root.named_modules()]
    run()
    for handle in handles:
        handle.remove()
    return found


def test_intermediates_are_the_official(model: OpenSoraVAE) -> None:
    golden = case(17)
    z, x_z = golden["in.z"], golden["decode.temporal"][:, :, 0]
    temporal = outputs_of(model.temporal_vae, lambda: model.decode_temporal(z, 17))
    spatial = outputs_of(model.spatial_vae.module, lambda: model.spatial_vae.decode(x_z))
    # the convolution before its channels become frames; the identity that is not called
    temporal |= {f"decoder.conv_blocks.{i}": temporal[f"decoder.conv_blocks.{i}.conv"] for i in (1, 2)}
    temporal |= {"decoder.conv_blocks.0": temporal["decoder.block_res_blocks.1.3"]}
    temporal |= {f"decoder.block_res_blocks.{i}.last": temporal[f"decoder.block_res_blocks.{i}.3"] for i in range(4)}
    errors = {}
    for name, reference in golden.items():
        kind, _, path = name.partition(".")
        if kind in ("tmid", "smid"):
            errors[name] = relative((temporal if kind == "tmid" else spatial)[path], reference)
    assert len(errors) == 19
    assert max(errors.values()) < TOLERANCE, errors


def test_parts_of_the_published_exporter_are_equal(model: OpenSoraVAE) -> None:
    """On-device Sora cuts the temporal decoder by hand; its parts end where layers of ours do."""
    golden = stored("vae_fork_temporal_parts_f17")
    got = outputs_of(model.temporal_vae.decoder, lambda: model.decode_temporal(case(17)["in.z"], 17))
    ends = {
        "part1": "res_blocks.3",
        "part2_1": "conv_blocks.2",
        "part2_2": "conv_blocks.1",
        "part2_3_1": "block_res_blocks.1.0",
        "part2_3_2": "block_res_blocks.1.1",
        "part2_3_3": "block_res_blocks.1.2",
        "part2_3_4": "block_res_blocks.1.3",
        "part2_4": "block_res_blocks.0.3",
        "part3": "conv_out",
    }
    assert set(golden) == set(ends)
    got["conv_out"] = got["conv_out"][:, :, 3:]
    errors = {part: relative(got[end], golden[part]) for part, end in ends.items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_latent_sizes_are_the_official(full_size: OpenSoraVAE, facts: dict[str, Any]) -> None:
    for name, expected in facts["official_latent_sizes"].items():
        frames, size = name.split("f_")
        height, width = map(int, size.split("x"))
        assert list(full_size.latent_size(int(frames), height, width)) == expected, name


def test_chunks_cover_the_video() -> None:
    config = OpenSoraVAEConfig()
    assert config.chunks(68) == ((5, 17),) * 4
    assert config.chunks(22) == ((5, 17), (2, 5))
    assert config.chunks(1) == ((1, 1),)
    with pytest.raises(ValueError, match="0 frames"):
        config.chunks(0)


def test_decode_refuses_a_wrong_number_of_frames(model: OpenSoraVAE) -> None:
    with pytest.raises(ValueError, match="18 frames have 6 latent frames, not 5"):
        model.decode(torch.zeros(1, 4, 5, 2, 2), 18)


def test_official_config_loads_and_variants_are_refused(facts: dict[str, Any]) -> None:
    official = {"model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17, "vae_2d": {"micro_batch_size": 4}}
    assert OpenSoraVAEConfig.from_json(official) == OpenSoraVAEConfig()
    for part, change, message in (
        ("spatial", {"act_fn": "relu"}, "only silu"),
        ("spatial", {"norm_num_groups": 5}, "do not divide"),
        ("spatial", {"down_block_types": ["AttnDownBlock2D"] * 4}, "only 4 times DownEncoderBlock2D"),
        ("spatial", {"use_quant_conv": False}, "use_quant_conv"),
        ("spatial", {"latent_channels": 8}, "in_out_channels"),
        ("temporal", {"temporal_downsample": [True]}, "need one less"),
        ("temporal", {"embed_dim": 8}, "needs 8 values"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenSoraVAEConfig.from_json({**facts, part: {**facts[part], **change}})


# --- leaves


def taps_of(conv: CausalConv3d) -> nn.Module:
    legal = conv.legal("conv3d-taps")
    assert legal is not None and legal.sources is not None
    assert all(p.is_meta for p in legal.leaf.parameters())
    state = conv.state_dict()
    legal.leaf.load_state_dict({k: s.of(state[s.tensor]) for k, s in legal.sources.items()}, assign=True)
    return legal.leaf


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "conv",
    [
        CausalConv3d(3, 5, 3),
        CausalConv3d(3, 5, 3, bias=False),
        CausalConv3d(3, 5, 1),
        CausalConv3d(3, 5, 3, time_stride=2),
        CausalConv3d(3, 5, 3, time_up=2),
    ],
    ids=["plain", "no bias", "pointwise", "time stride", "time up"],
)
def test_taps_compute_what_conv3d_does(conv: CausalConv3d, batch: int) -> None:
    taps = taps_of(conv)
    for frames in (2, 3, 6):
        x = torch.randn(batch, 3, frames, 4, 5)
        assert relative(taps(x), conv(x)) < 1e-6


def test_no_other_rule_changes_a_convolution() -> None:
    assert CausalConv3d(3, 5, 3).legal("bmm") is None


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_become_frames_in_the_official_order(batch: int) -> None:
    x = torch.randn(batch, 6, 4, 2, 3)
    video = channels_to_frames(x, 2)
    assert video.shape == (batch, 3, 8, 2, 3)
    for c in range(3):
        for t in range(4):
            for i in range(2):
                assert torch.equal(video[:, c, t * 2 + i], x[:, c * 2 + i, t])


# --- lowered forms


def forms(model: OpenSoraVAE, height: int = 4, width: int = 6) -> dict[str, LoweredForm]:
    """One of each, for frames as the second micro chunk of 22 has them."""
    return {
        "temporal decoder": LoweredTemporalDecoder(model, latents=2, frames=5, height=height, width=width, batch=2),
        "spatial decoder": LoweredSpatialDecoder(model, frames=2, height=height, width=width),
        "temporal encoder": LoweredTemporalEncoder(model, frames=5, height=height, width=width, batch=2),
        "spatial encoder": LoweredSpatialEncoder(model, frames=2, height_px=height * 8, width_px=width * 8),
    }


def eager(model: OpenSoraVAE, name: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if name == "temporal decoder":
        return (model.decode_temporal(x, 5),)
    if name == "spatial decoder":
        return (model.spatial_vae.decode(x),)
    return model.temporal_moments(x) if name == "temporal encoder" else model.spatial_vae.module.moments(x)


NAMES = ("temporal decoder", "spatial decoder", "temporal encoder", "spatial encoder")


def with_weights(graph: Graph, weights: Tensors) -> nn.Module:
    """The captured function with the checkpoint's numbers, through the graph's weight sources."""
    gm = graph.functions["base"]
    values = {name: source.of(weights[source.tensor]) for name, source in graph.weights.items()}
    return gm.load_state_dict(values, strict=True, assign=True) and gm


@pytest.mark.parametrize("rules", [(), RULES], ids=["as written", "legalised"])
@pytest.mark.parametrize("name", NAMES)
def test_captured_form_computes_what_the_model_does(
    model: OpenSoraVAE, weights: Tensors, name: str, rules: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        skeleton = OpenSoraVAE(model.config)
    graph = capture(forms(skeleton)[name])
    graph = Legalise(LegaliseConfig(rules=rules))(graph)
    x = torch.randn(graph.inputs[0].shape, generator=torch.Generator().manual_seed(0))
    got = with_weights(graph, weights)(x)
    expected = eager(model, name, x)
    assert len(got) == len(expected) == len(graph.outputs)
    for value, reference in zip(got, expected, strict=True):
        assert relative(value, reference) < TOLERANCE


class Ranks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most dimensions of any tensor that an operator returns, and what norms are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most, self.norms = 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        self.most = max(self.most, *(r.dim() for r in results if isinstance(r, torch.Tensor)))
        if "group_norm" in str(func):
            self.norms.add(args[0].dim())
        return out


@pytest.mark.parametrize("rules", [(), RULES], ids=["as written", "legalised"])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_has_more_than_five_dimensions(full_size: OpenSoraVAE, name: str, rules: tuple[str, ...]) -> None:
    """Core ML knows no sixth, and its norm adds one for the groups."""
    graph = Legalise(LegaliseConfig(rules=rules))(capture(forms(full_size)[name]))
    with Ranks() as ranks:
        graph.functions["base"](torch.empty(graph.inputs[0].shape, device="meta"))
    assert ranks.most <= 5
    assert ranks.norms == {3}


@pytest.mark.parametrize("name", NAMES)
def test_full_size_is_captured_without_weights(full_size: OpenSoraVAE, name: str) -> None:
    """And with the weights of its own part only, under their official names."""
    graph = capture(forms(full_size, 24, 24)[name])
    assert graph.component == "vae"
    assert all(p.is_meta for p in graph.functions["base"].parameters())
    tensors = {s.tensor for s in graph.weights.values()}
    half, part = name.split()
    own = "post_quant_conv." if part == "decoder" else "quant_conv."
    root = "spatial_vae.module." if half == "spatial" else "temporal_vae."
    expected = {k for k in full_size.state_dict() if k.startswith((f"{root}{part}.", root + own))}
    assert tensors == expected | ({"scale", "shift"} if name == "temporal decoder" else set())


def interface(graph: Graph) -> list[tuple[str, list[str]]]:
    """Every unit in order, with the names of the values that leave it."""
    gm = graph.functions["base"]
    units: dict[str, list[str]] = {}
    for node in compute_nodes(gm):
        (unit,) = node.meta["unit"]
        assert unit not in units or unit == list(units)[-1], f"{unit} is not in one piece"
        leaving = [u for u in node.users if u.meta.get("unit") != node.meta["unit"]]
        units.setdefault(unit, []).extend([str(node.meta.get("wire"))] if leaving else [])
    return list(units.items())


def test_units_are_layers_in_order_and_hand_on_x(full_size: OpenSoraVAE) -> None:
    units = {name: interface(capture(form)) for name, form in forms(full_size).items()}
    decoder = units["spatial decoder"]
    assert decoder[:4] == [
        ("spatial.conv_in", ["x"]),
        ("spatial.mid_block.resnets.0", ["x"]),
        ("spatial.mid_block.attentions.0", ["x"]),
        ("spatial.mid_block.resnets.1", ["x"]),
    ]
    assert ("spatial.up_blocks.2.upsamplers.0", ["x"]) in decoder
    assert decoder[-2:] == [("spatial.up_blocks.3.resnets.2", ["x"]), ("spatial.conv_out", ["pixels"])]
    temporal = units["temporal decoder"]
    assert [u for u, _ in temporal[3:11]] == [
        "temporal.res_blocks.2",
        "temporal.res_blocks.3",
        *(f"temporal.block_res_blocks.3.{i}" for i in range(4)),
        "temporal.conv_blocks.2",
        "temporal.block_res_blocks.2.0",
    ]
    assert temporal[0] == ("temporal.conv_in", ["x"]) and temporal[-1] == ("temporal.conv_out", ["x_z"])
    assert {n: len(u) for n, u in units.items()} == {
        "temporal decoder": 24,
        "spatial decoder": 20,
        "temporal encoder": 24,
        "spatial encoder": 16,
    }
    for name in NAMES:
        assert all(names == ["x"] for _, names in units[name][:-1]), name
        assert not name.endswith("encoder") or all("_encoder." in u for u, _ in units[name])


def test_every_weight_is_in_a_leaf_with_a_kind(full_size: OpenSoraVAE) -> None:
    kinds = set()
    for form in forms(full_size).values():
        gm = capture(form).functions["base"]
        for node in compute_nodes(gm):
            if node.op == "call_module":
                leaf = leaf_of(gm, node)
                assert leaf is not None and leaf.kind, node
                kinds.add(leaf.kind)
                assert isinstance(leaf, AttentionLeaf) == (leaf.kind == "pixel_attention")
    assert kinds == {
        *("conv2d", "conv3d", "downsample", "upsample", "group_norm", "pixel_attention", "latent_scale", "pad")
    }


def test_impossible_sizes_are_refused(model: OpenSoraVAE) -> None:
    with pytest.raises(ValueError, match="17 frames does not have 4 latent frames"):
        LoweredTemporalDecoder(model, latents=4, frames=17, height=4, width=6)
    with pytest.raises(ValueError, match="size F is 0"):
        LoweredSpatialDecoder(model, frames=0, height=4, width=6)


@pytest.mark.slow
def test_taps_run_in_executorch(tmp_path: Path) -> None:
    """Conv3d lowers there too and fails only when it is run, so run what takes its place."""
    exir = pytest.importorskip("executorch.exir")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    conv = CausalConv3d(4, 8, 3, time_up=2)
    x = torch.randn(2, 4, 3, 4, 5)
    program = torch.export.export(taps_of(conv), (x,), strict=False).run_decompositions({})
    edge = exir.to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path = tmp_path / "taps.pte"
    path.write_bytes(edge.to_executorch().buffer)
    (out,) = Runtime.get().load_program(path).load_method("forward").execute((x,))
    assert relative(out, conv(x)) < TOLERANCE
