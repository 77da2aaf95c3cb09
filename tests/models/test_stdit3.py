"""STDiT3 against the golden vectors, outputs and intermediates, and against itself as it is lowered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.models.open_sora_v1_2.stdit3 import LoweredSTDiT3, STDiT3, STDiT3Config

CASES = ["a", "b", "c", "c_allones", "e", "f_nomask"]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def run(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = model(**inputs)
    return out


# --- against the goldens -----------------------------------------------------------------------------


def test_keys_are_the_official_ones(small_model: Any, facts: dict[str, Any]) -> None:
    assert {k: list(v.shape) for k, v in small_model.state_dict().items()} == facts["keys"]


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_loading_is_strict(small_config: STDiT3Config, small_weights: dict[str, torch.Tensor], change: str) -> None:
    weights = dict(small_weights)
    if change == "missing":
        del weights["rope.freqs"]
    elif change == "extra":
        weights["pos_embed.inv_freq"] = torch.zeros(16)
    else:
        weights["t_block.1.bias"] = torch.zeros(385)
    with pytest.raises(RuntimeError, match=r"rope\.freqs|pos_embed\.inv_freq|t_block\.1\.bias"):
        STDiT3(small_config).load_state_dict(weights)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_golden(small_model: Any, golden_case: Any, case: str) -> None:
    inputs, golden = golden_case(f"stdit3_case_{case}")
    out = run(small_model, inputs)
    assert out.dtype == torch.float32
    assert relative(out, golden["out"]) <= 1e-5


class Recorder:
    """Inputs and outputs of every module, call by call."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: dict[str, list[tuple[tuple[Any, ...], Any]]] = defaultdict(list)
        self._hooks = [m.register_forward_hook(self._recording(name)) for name, m in model.named_modules()]

    def _recording(self, name: str) -> Any:
        def hook(_: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.seen[name].append((args, out))

        return hook

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def argument(self, name: str, index: int = 0, call: int = 0) -> torch.Tensor:
        value: torch.Tensor = self.seen[name][call][0][index]
        return value

    def output(self, name: str, call: int = 0) -> torch.Tensor:
        value: torch.Tensor = self.seen[name][call][1]
        return value


def intermediates(seen: Recorder, inputs: Mapping[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """Ours in the official code's shapes: it keeps ``[B·T, S, C]`` and ``[B·S, T, C]``, we ``[B, T·S, C]``."""
    batch, frames = inputs["x"].shape[0], inputs["x"].shape[2]
    mask = inputs["mask"].repeat(batch // inputs["mask"].shape[0], 1)
    text = seen.output("y_embedder.y_proj")
    mid = {
        "pos_embed": seen.output("pos_embed"),
        "t_embedder": seen.output("t_embedder")[:, 0],
        "fps_embedder": seen.output("fps_embedder")[:, 0],
        "t_mlp": seen.output("t_block")[:, 0],
        "t": seen.argument("final_layer", 1)[:, 0],
        "y_embedder": text[:, None],
        "y_packed": text[mask != 0][None],
        "y_lens": mask.sum(1),
        "x_embedder": seen.output("x_embedder"),
        "x_after_pos": seen.argument("spatial_blocks.0"),
        "before_final_layer": seen.argument("final_layer"),
        "final_layer_out": seen.output("final_layer"),
    }
    if "x_mask" in inputs:
        t0 = {"t0_embedder": seen.output("t_embedder", 1), "t0_mlp": seen.output("t_block", 1)}
        t0["t0"] = seen.argument("final_layer", 2)
        mid |= {k: v[:, 0] for k, v in t0.items()}

    def by_frame(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(batch * frames, -1, x.shape[-1])

    def by_place(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(batch, frames, -1, x.shape[-1]).transpose(1, 2).reshape(-1, frames, x.shape[-1])

    for i in range(depth):
        for kind, grouped in (("spatial", by_frame), ("temporal", by_place)):
            path = f"{kind}_blocks.{i}"
            mid[f"{kind}_{i}_attn_in"] = grouped(seen.argument(f"{path}.attn"))
            mid[f"{kind}_{i}_attn_out"] = grouped(seen.output(f"{path}.attn"))
            mid[f"{kind}_{i}_cross_out"] = seen.output(f"{path}.cross_attn")
            mid[f"{kind}_{i}_out"] = seen.output(path)
    return mid


@pytest.mark.parametrize("case", ["a", "c"])
def test_intermediates_are_golden(small_model: Any, golden_case: Any, case: str) -> None:
    inputs, golden = golden_case(f"stdit3_case_{case}")
    with Recorder(small_model) as seen:
        run(small_model, inputs)
    ours = intermediates(seen, inputs, small_model.config.depth)
    wanted = {k.removeprefix("mid."): v for k, v in golden.items() if k.startswith("mid.")}
    assert ours.keys() == wanted.keys()
    errors = {k: relative(ours[k], wanted[k]) for k in wanted}
    assert {k: e for k, e in errors.items() if not e <= 1e-5} == {}


# --- masks -------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(mask=st.lists(st.lists(st.booleans(), min_size=12, max_size=12).filter(any), min_size=2, max_size=2))
def test_masked_text_is_packed_text(small_model: Any, golden_case: Any, mask: list[list[bool]]) -> None:
    """Padding, wherever it is, changes nothing: the prompt's real tokens alone give the same."""
    inputs, _ = golden_case("stdit3_case_a")
    keep = torch.tensor(mask)
    padded = run(small_model, inputs | {"mask": keep.long()})
    for i in range(2):
        alone = {k: inputs[k][i : i + 1] for k in ("x", "timestep")}
        packed = run(small_model, inputs | alone | {"y": inputs["y"][i : i + 1][:, :, keep[i]], "mask": None})
        assert relative(padded[i : i + 1], packed) <= 1e-5


def test_no_mask_is_a_mask_of_ones(small_model: Any, golden_case: Any) -> None:
    inputs, _ = golden_case("stdit3_case_f_nomask")
    ones = torch.ones(1, 12, dtype=torch.long)
    assert torch.equal(run(small_model, inputs), run(small_model, inputs | {"mask": ones}))


def test_no_condition_is_a_frame_mask_of_ones(small_model: Any, golden_case: Any) -> None:
    inputs, _ = golden_case("stdit3_case_c_allones")
    assert inputs["x_mask"].all()
    assert relative(run(small_model, inputs), run(small_model, inputs | {"x_mask": None})) <= 1e-6


# --- the lowered form --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["b", "c", "e"])
def test_lowered_form_is_the_model(small_model: Any, golden_case: Any, case: str) -> None:
    inputs, golden = golden_case(f"stdit3_case_{case}")
    batch, _, frames, height, width = inputs["x"].shape
    sizes = {"batch": batch, "frames": frames, "height": height, "width": width}
    pixels = {"height_px": int(inputs["height"]), "width_px": int(inputs["width"])}
    form = LoweredSTDiT3(small_model, **sizes, **pixels, frame_conditions="x_mask" in inputs)
    values = {
        "y": inputs["y"][:, 0],
        "mask": inputs["mask"].repeat(batch // inputs["mask"].shape[0], 1).float(),
        "fps": inputs["fps"].repeat(batch),
        "x_mask": inputs.get("x_mask", torch.empty(0)).float(),
    }
    args = [(inputs | values)[i.name] for i in form.inputs()]
    assert [a.shape for a in args] == [i.shape for i in form.inputs()]
    with torch.no_grad():
        out, null_text = getattr(form, form.entry)(*args)
    assert relative(out, golden["out"]) <= 1e-5
    assert torch.equal(null_text, small_model.y_embedder.y_embedding)


# --- sizes -------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 4),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    patch=st.integers(1, 3),
    sigma=st.booleans(),
    conditions=st.booleans(),
)
def test_any_size_goes_through(
    batch: int, frames: int, height: int, width: int, patch: int, sigma: bool, conditions: bool
) -> None:
    shape = {"hidden_size": 8, "num_heads": 2, "depth": 1, "caption_channels": 4, "model_max_length": 3}
    config = STDiT3Config.from_json(shape | {"patch_size": [1, patch, patch], "pred_sigma": sigma, "in_channels": 2})
    inputs: dict[str, Any] = {
        "x": torch.randn(batch, 2, frames, height, width),
        "timestep": torch.full((batch,), 500.0),
        "y": torch.randn(batch, 1, 3, 4),
        "x_mask": torch.ones(batch, frames, dtype=torch.bool) if conditions else None,
    }
    inputs |= {k: torch.tensor([v]) for k, v in (("fps", 24.0), ("height", 8.0 * height), ("width", 8.0 * width))}
    out = run(STDiT3(config).eval(), inputs)
    assert out.shape == (batch, 4 if sigma else 2, frames, height, width)
    assert out.isfinite().all()


def test_bfloat16_as_the_official_script_runs_it(small_config: STDiT3Config, small_weights: Any) -> None:
    model = STDiT3(small_config).eval()
    model.load_state_dict(small_weights)
    x, y, one = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 1, 12, 32), torch.tensor([32.0])
    inputs = {"x": x, "timestep": one, "y": y, "fps": one, "height": one, "width": one}
    want = run(model, inputs)
    out = run(model.to(torch.bfloat16), inputs)
    assert out.dtype == torch.float32
    assert relative(out, want) <= 0.1


# --- configuration -----------------------------------------------------------------------------------


def test_defaults_are_the_published_model() -> None:
    with torch.device("meta"):
        model = STDiT3(STDiT3Config())
    pair = sum(p.numel() for k, p in model.named_parameters() if "_blocks.27." in k)
    assert 42.4e6 < pair < 42.6e6
    assert sum(p.numel() for p in model.parameters()) > 28 * pair


def test_foreign_keys_of_a_config_are_passed_over() -> None:
    assert STDiT3Config.from_json({"architectures": ["STDiT3"], "depth": 3, "torch_dtype": "float32"}).depth == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": [2, 2, 2]}, r"patch_size \[2, 2, 2\]"),
        ({"patch_size": [1, 2, 4]}, r"only \[1, p, p\]"),
        ({"hidden_size": 60, "num_heads": 7}, "hidden_size 60 does not divide into 7 heads"),
        ({"hidden_size": 60, "num_heads": 20}, "heads of even size"),
        ({"hidden_size": 18, "num_heads": 1}, "not a multiple of 4"),
        ({"skip_y_embedder": True}, "skip_y_embedder"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STDiT3Config.from_json(change)


@pytest.mark.parametrize("left_out", ["fps", "height", "width"])
def test_video_size_is_needed(small_model: Any, golden_case: Any, left_out: str) -> None:
    inputs, _ = golden_case("stdit3_case_e")
    with pytest.raises(ValueError, match="fps, height and width"):
        run(small_model, {k: v for k, v in inputs.items() if k != left_out})
