"""A bundle with functions for the conditional half of guidance: what it says of them, and running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import toolchain
from toolchain.accuracy.verify import verify
from toolchain.formats.recipe_file import load_recipe
from toolchain.player.opening import load_engine, target_of
from toolchain.player.runner import ComponentRunner


@pytest.mark.slow
def test_from_recipe_to_half_a_batch(project: Path, tmp_path: Path) -> None:
    sets = ["target=onnx", "transformer.passes=[guidance-split, partition]", "sampler.merged_steps=0"]
    bundle = toolchain.compile_recipe(load_recipe(project / "recipe.yaml", sets), tmp_path / "bundle", base=project)
    part = bundle.manifest.components["transformer"]
    blocks = {b.name: b for b in part.blocks}
    half = "base_conditional"
    assert part.passes == "guidance-split partition"
    assert {n: b.functions for n, b in blocks.items()} == {
        "caption": ["base"],
        **{name: ["base", half] for name in ("embed", "pair_0", "final")},
    }
    assert blocks["caption"].other_shapes == {}
    assert blocks["pair_0"].other_shapes == {half: {"t_mlp": [1, 1, 384], "x": [1, 30, 64], "x_out": [1, 30, 64]}}
    for block in (blocks[n] for n in ("embed", "pair_0", "final")):
        assert block.accuracy is not None
        assert block.memory is not None
        assert block.accuracy[half].relative_error < 1e-5
        assert block.memory[half].activations < block.memory["base"].activations
    assert not verify(bundle).failed

    engines: dict[tuple[str, str], Any] = {}

    def call(name: str, function: str, values: Any) -> Any:
        block = blocks[name.partition("/")[2]]
        if (name, function) not in engines:
            target = target_of(bundle.manifest, "transformer")
            engines[name, function] = load_engine(bundle, "transformer", block, function, target)
        return engines[name, function](function, values)

    runner = ComponentRunner(bundle, "transformer", call)
    generator = torch.Generator().manual_seed(0)
    shapes = {i.feed.kind: i.shape for i in part.inputs}
    y = torch.randn(1, *shapes["text_embedding"][1:], generator=generator)
    mask = (torch.arange(shapes["token_mask"][1]) < 7).float()[None]
    latents = torch.randn(1, *shapes["latents"][1:], generator=generator)
    runner.run("prompt", {"text_embedding": y, "token_mask": mask}, part.default_function)
    now = {"latents": latents, "timestep": torch.tensor(700.0)}
    both = runner.run("step", now, "base")["prediction"]
    found = [runner.run("step", now, half)["prediction"] for _ in range(2)]  # the prompt's values are still there
    again = runner.run("step", now, "base")["prediction"]
    assert found[0].shape == (1, *both.shape[1:])
    assert (both[:1] - both[1:]).norm() > 1e-3 * both.norm()
    for one in found:
        torch.testing.assert_close(one, both[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, both)
