"""A quantized recipe from plan to bundle: two errors with two limits, what is written down, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import toolchain
from toolchain.accuracy.diff import compare_bundles
from toolchain.accuracy.explain import explain_block
from toolchain.accuracy.verify import verify
from toolchain.errors import AccuracyError, SoraCompileError
from toolchain.formats.recipe_file import load_recipe
from toolchain.planning.plan import plan
from toolchain.system.disk import readable_size

INT8 = "transformer.passes=[token-merge, {quantize: {scheme: int8}}, partition]"
MIXED = """transformer.passes=[token-merge, {quantize: {scheme: int4, rules: [
    {match: "*.mlp.*", scheme: int8, symmetric: false}, {match: "caption.*", scheme: float}]}}, partition]"""


def compiled(project: Path, out: Path, *overrides: str, **options: Any) -> toolchain.Bundle:
    recipe = load_recipe(project / "recipe.yaml", overrides)
    return toolchain.compile_recipe(recipe, out, base=project, **options)


@pytest.mark.slow
def test_the_two_errors(project: Path, tmp_path: Path, run_cli: Any) -> None:
    bundle = compiled(project, tmp_path / "int8", "target=onnx", INT8)
    blocks = {b.name: b for b in bundle.manifest.components["transformer"].blocks}
    pair = blocks["pair_0"]
    assert pair.accuracy is not None
    assert pair.quantization is not None
    for function in ("base", "merged"):
        assert pair.accuracy[function].relative_error < 1e-5  # as of an artifact in float32
        assert 1e-4 < pair.quantization[function].relative_error < 3e-2
        assert pair.quantization[function].limit == 0.1
    assert set(pair.quantized.values()) == {"int8-f32"}
    assert pair.weight_bytes["int8-f32"] > pair.weight_bytes["float32"]
    assert blocks["final"].quantized == {}  # delicate
    assert blocks["final"].quantization is None
    # what is shown adds up: by block and, for the component, by scheme
    shown = json.loads(run_cli("inspect", bundle.path, "--json", cwd=project).out)["components"]["transformer"]
    each = {kind: sum(b.weight_bytes.get(kind, 0) for b in blocks.values()) for kind in ("float32", "int8-f32")}
    assert shown["bytes_by_storage"] == each
    assert sum(each.values()) < shown["artifact_bytes"] == sum(f.bytes for b in blocks.values() for f in b.files)
    sizes = ", ".join(f"{kind} {readable_size(size)}" for kind, size in sorted(each.items(), key=lambda kv: -kv[1]))
    assert f"({sizes}) in artifacts of" in " ".join(run_cli("inspect", bundle.path, cwd=project).out.split())
    # whoever looks at the bundle later sees both
    found = verify(bundle)
    assert not found.failed
    prices = {c.function: c.price for c in found.checks if c.block == "pair_0"}
    assert prices == {f: a.relative_error for f, a in pair.quantization.items()}
    explained = explain_block(bundle, "transformer/pair_0", base=project)
    assert all(r.own is None or r.own < 1e-5 for e in explained for r in e.rows)
    mixed = compiled(project, tmp_path / "mixed", "target=onnx", MIXED, "gate.max_quantization_error.transformer=0.5")
    difference = next(b for b in compare_bundles(bundle, mixed).blocks if b.block == "transformer/pair_0")
    assert difference.a_price is not None
    assert difference.b_price is not None
    assert difference.a_price < difference.b_price


@pytest.mark.slow
def test_direct_is_the_same(project: Path, tmp_path: Path) -> None:
    limit = "gate.max_quantization_error.transformer=0.5"
    made = [
        compiled(project, tmp_path / str(direct), "target=onnx", MIXED, limit, direct=direct).manifest
        for direct in (False, True)
    ]
    files = [[f for b in m.components["transformer"].blocks for f in b.files] for m in made]
    assert files[0] == files[1]


@pytest.mark.slow
def test_what_costs_too_much(project: Path, tmp_path: Path) -> None:
    with pytest.raises(AccuracyError) as error:
        compiled(project, tmp_path / "b", "target=onnx", INT8, "gate.max_quantization_error.transformer=1e-6")
    said = str(error.value)
    assert said.startswith("transformer: block '")
    assert "quantization costs a relative error of" in said
    assert said.endswith("or raise gate.max_quantization_error.transformer")
    assert not (tmp_path / "b").exists()


def test_a_plan_knows_the_bytes(project: Path) -> None:
    sizes = {}
    for name, passes in {"plain": "transformer.passes=[token-merge, partition]", "int8": INT8}.items():
        recipe = load_recipe(project / "recipe.yaml", ["target=onnx", passes])
        (pair,) = (b for b in plan(recipe, base=project).components["transformer"].blocks if b.name == "pair_0")
        sizes[name] = pair.weight_bytes
    assert 0.25 < sizes["int8"] / sizes["plain"] < 0.35


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["target=onnx", INT8.replace("int8", "palette")],
            "which target 'onnx' with precision float32 cannot; for the matrix of a linear layer, it takes float32",
        ),
        (
            ["target=onnx", INT8.replace("int8", "int4, block: 128")],
            "blocks of 128 do not divide its",
        ),
        (
            ["target=coreml", INT8.replace("quantize: {", "quantize: {rules: [{match: zzz, scheme: int4}], ")],
            "matches no",
        ),
        (["target=coreml", INT8, "gate.max_quantization_error={vea: 1}"], "did you mean 'vae'?"),
    ],
    ids=["a palette in ONNX", "blocks", "a pattern", "a component"],
)
def test_refusals(project: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(SoraCompileError) as error:
        plan(load_recipe(project / "recipe.yaml", overrides), base=project)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_inspect_says_how_weights_are_stored(project: Path, run_cli: Any) -> None:
    arguments = ("plan", "recipe.yaml", "--set", "target=coreml", "--set", INT8)
    ran = run_cli(*arguments, "--json", cwd=project)
    assert ran.code == 0, ran.err
    part = json.loads(ran.out)["components"]["transformer"]
    assert sum(part["bytes_by_storage"].values()) == part["weight_bytes"]
    assert set(part["bytes_by_storage"]) == {"float16", "int8-f16"}
    ran = run_cli(*arguments, cwd=project)
    assert "int8-f16" in ran.out
