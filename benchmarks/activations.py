"""Rounding activations with fixed scales: what groups of steps and a calibration are worth, and XNNPACK's way of it.

    python benchmarks/activations.py                 # the miniature's videos, by groups and by calibration
    python benchmarks/activations.py --executorch    # one layer of full width, static against dynamic

The miniature is run in eager mode, which rounds as Core ML does: transformer weights in int8, and activations of its
linear layers with scales for 1, 3 and 5 groups of steps. Scales are learned either as a recipe's calibration does, on
random latents and texts, or on what the layers meet while videos of other prompts are made. Figures are the peak
signal-to-noise ratio of 8-bit frames against the float32 pipeline's, the mean of four videos; ``weights alone``
rounds no activation.

The layer multiplies [1440, 1152] by [1152, 4608]. XNNPACK's static kernel takes an output in int8, too, with a fixed
scale; ``dynamic`` is what quantized linear layers are lowered to otherwise. Times are the least of several, each as a
share of float32's.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

TEACHING = (
    "a blue square moves up on a green background",
    "a small green triangle moves slowly down on a black background",
    "a large yellow circle moves right to left on a red background",
    "a white square moves quickly left to right on a blue background",
)
JUDGED = (
    "a red circle moves left to right on a blue background",
    "a yellow triangle moves up on a white background",
    "a large green square moves down on a black background",
    "a small blue circle moves right to left on a yellow background",
)
GROUPS = (1, 3, 5)
CALIBRATED = 8
"""Random inputs of each function."""
Ranges = Mapping[tuple[str, str], float]
"""Largest numbers that came into layers, by weight and function."""


class Miniature:
    """The shipped miniature with its transformer's functions divided into groups of steps."""

    def __init__(self, groups: int) -> None:
        from toolchain.accuracy.eager import EagerPipeline
        from toolchain.formats.recipe_file import load_recipe
        from toolchain.planning.plan import capture_forms
        from toolchain.planning.resolve import resolve
        from toolchain.weights.block_weights import read_named

        quantize = f"{{quantize: {{scheme: int8, activations: {{groups: {groups}}}, calibration: {{}}}}}}"
        recipe = load_recipe("tiny", ["target=coreml", f"transformer.passes=[{quantize}, partition]"])
        build = resolve(recipe, Path(), checkpoints=True)
        self.family, self.pipeline = build.family, EagerPipeline.of(build)
        definition = self.family.define(recipe, build.configs)["transformer"]
        (rewrite,) = build.components["transformer"].passes.rewrites
        self.graph = rewrite(capture_forms(definition.forms[0]))
        part = build.components["transformer"]
        read = read_named(part.checkpoint, definition.expected, definition.aliases).__getitem__
        from toolchain.ir.activations import without_scales

        self.exact = {n: w.source.value(read) for n, w in without_scales(self.graph.weights).items()}
        kept = {n: self.graph.weights[n].storage for n in self.exact}
        self.stored = {n: kept[n].decode(kept[n].encode(v)) for n, v in self.exact.items()}

    def ranges(self, runs: Callable[[], None]) -> Ranges:
        """What comes into layers while ``runs`` call the unrounded functions."""
        from toolchain.accuracy.statistics import Watch
        from toolchain.ir.activations import unrounded
        from toolchain.ir.blocks import materialise

        found: dict[tuple[str, str], float] = {}

        def watched(function: str, gm: Any) -> Callable[..., Any]:
            module = materialise(unrounded(gm), self.exact)
            watch = Watch(dict(module.named_parameters()), ())

            def call(*args: torch.Tensor) -> Any:
                with watch:
                    results = module(*args)
                for name, met in watch.take_ranges().items():
                    found[name, function] = max(found.get((name, function), 0.0), -met.low, met.high)
                return results

            return call

        self._set({f: watched(f, gm) for f, gm in self.graph.functions.items()})
        runs()
        return found

    def round(self, ranges: Ranges | None) -> None:
        """Run on stored weights from now on, and on activations rounded with scales for ``ranges``."""
        from toolchain.ir.activations import ScaleSource, scale_of, unrounded
        from toolchain.ir.blocks import materialise

        scales = {}
        for name, weight in self.graph.weights.items():
            source, layer = weight.source, f"{name.rpartition('.')[0]}.weight"
            if isinstance(source, ScaleSource) and ranges is not None:
                met = [v for (of, f), v in ranges.items() if of == layer and source.function in (None, f)]
                scales[name] = torch.tensor(scale_of(max(met)))
        functions = self.graph.functions.items()
        made = {f: gm if ranges is not None else unrounded(gm) for f, gm in functions}
        self._set({f: materialise(gm, self.stored | scales) for f, gm in made.items()})

    def random_runs(self) -> None:
        """As a recipe's calibration: random inputs at timesteps of the function's group."""
        steps = self.pipeline.steps
        for function in self.graph.functions:
            times = [s.t for s in steps if s.function == function]
            for k in range(CALIBRATED):
                generator = torch.Generator().manual_seed(k)
                now = times[(2 * k + 1) * len(times) // (2 * CALIBRATED)]
                values = []
                for spec in self.graph.inputs_of(function):
                    value = self.family.sample_input(spec, generator)
                    values.append(torch.full(spec.shape, now) if spec.feed.kind == "timestep" else value)
                self.pipeline._functions[function](*values)

    def real_runs(self) -> None:
        """What is met while videos are made."""
        for seed, prompt in enumerate(TEACHING):
            self.pipeline.denoise(*self.pipeline.encode(prompt), 100 + seed)

    def videos(self) -> list[torch.Tensor]:
        return [self.pipeline.video(prompt, seed) for seed, prompt in enumerate(JUDGED)]

    def _set(self, functions: Mapping[str, Any]) -> None:
        self.pipeline._functions = dict(functions)


def psnr(video: torch.Tensor, exact: torch.Tensor) -> float:
    a, b = (((v.clamp(-1, 1) + 1) * 127.5 + 0.5).floor() for v in (video, exact))
    return 20 * math.log10(255) - 10 * math.log10(float((a - b).square().mean()))


def miniature() -> None:
    exact = Miniature(1).pipeline
    truth = [exact.video(prompt, seed) for seed, prompt in enumerate(JUDGED)]

    def row(name: str, model: Miniature) -> None:
        found = [psnr(v, t) for v, t in zip(model.videos(), truth, strict=True)]
        print(f"| {name} | {sum(found) / len(found):.1f} | {min(found):.1f} | {max(found):.1f} |", flush=True)

    print("| activations | mean, dB | worst | best |\n|---|---|---|---|")
    for groups in GROUPS:
        model = Miniature(groups)
        if groups == 1:
            model.round(None)
            row("float32: weights alone", model)
        for name, runs in (("random inputs", model.random_runs), ("videos", model.real_runs)):
            model.round(model.ranges(runs))
            row(f"int8, {groups} groups, calibrated on {name}", model)


def executorch() -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators below)

    ops = torch.ops.quantized_decomposed
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(1152, 4608).requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 34)
    scale = layer.weight.abs().amax(1) / 127
    values = (layer.weight / scale[:, None]).round().to(torch.int8)

    class Layer(nn.Module):
        def __init__(self, kind: str, taught: torch.Tensor) -> None:
            super().__init__()
            self.kind = kind
            self.register_buffer("values", values)
            self.register_buffer("scale", scale)
            self.register_buffer("zero", torch.zeros(4608, dtype=torch.int64))
            self.weight, self.bias = layer.weight, layer.bias
            self.ins = float(taught.abs().max()) / 127
            self.outs = float(layer(taught).abs().max()) / 127

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.kind == "float32":
                return nn.functional.linear(x, self.weight, self.bias)
            weight = ops.dequantize_per_channel(self.values, self.scale, self.zero, 0, -127, 127, torch.int8)
            if self.kind == "dynamic":
                s, z = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
                q = ops.quantize_per_token(x, s, z, -128, 127, torch.int8)
                x = ops.dequantize_per_token(q, s, z, -128, 127, torch.int8, torch.float32)
                return nn.functional.linear(x, weight, self.bias)
            return self._fixed(nn.functional.linear(self._fixed(x, self.ins), weight, self.bias), self.outs)

        def _fixed(self, x: torch.Tensor, step: float) -> torch.Tensor:
            q = ops.quantize_per_tensor(x, step, 0, -128, 127, torch.int8)
            result: torch.Tensor = ops.dequantize_per_tensor(q, step, 0, -128, 127, torch.int8)
            return result

    sizes = {"tokens alike": torch.ones(1440, 1), "tokens of different size": torch.randn(1440, 1, generator=generator)}
    print("| what comes in | layer | relative error | time |\n|---|---|---|---|")
    for name, size in sizes.items():
        taught, x = (torch.randn(1440, 1152, generator=generator) * size.exp() for _ in range(2))
        exact, least = layer(x), {}
        for kind in ("float32", "dynamic", "static"):
            program = torch.export.export(Layer(kind, taught), (x,), strict=True)
            made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "layer.pte"
                path.write_bytes(made.buffer)
                method = Runtime.get().load_program(path).load_method("forward")
                found = method.execute([x])[0].clone()
                least[kind] = min(_seconds(functools.partial(method.execute, [x])) for _ in range(40))
            error = float((found - exact).norm() / exact.norm())
            print(f"| {name} | {kind} | {error:.1e} | {least[kind] / least['float32']:.2f} |", flush=True)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executorch", action="store_true")
    torch.set_grad_enabled(False)
    if parser.parse_args().executorch:
        executorch()
    else:
        miniature()


if __name__ == "__main__":
    main()
