"""Core ML packages: made, read back, and looked into."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from targets.coreml import CoreMLConfig, CoreMLTarget
from toolchain.errors import LoweringError

pytestmark = pytest.mark.slow

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")


@pytest.fixture(scope="module")
def target() -> CoreMLTarget:
    return CoreMLTarget()


@pytest.fixture(scope="module")
def odd(target: CoreMLTarget, cut_small: Any, coreml_bundle: Any) -> tuple[Any, dict[str, Path]]:
    """Five frames in float16, as the command built them."""
    manifest = json.loads((coreml_bundle.path / "manifest.json").read_text())
    blocks = manifest["components"]["transformer"]["blocks"]
    return cut_small(target.forms, frames=5), {b["name"]: coreml_bundle.path / b["artifact"] for b in blocks}


@pytest.fixture(scope="module")
def even(target: CoreMLTarget, cut_small: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """Two frames in float16, the first given as condition; lowered here."""
    cut = cut_small(target.forms, frames=2, conditions=True)
    folder = tmp_path_factory.mktemp("even")
    artifacts = {b.name: target.lower(b, cut.weights(b), folder / f"{b.name}.mlpackage") for b in cut.blocks}
    assert {n: a.functions for n, a in artifacts.items() if "pair" in n} == {"pair_0": ("base", "merged")}
    return cut, {n: a.path for n, a in artifacts.items()}


@pytest.fixture(params=["odd", "even"])
def case(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def programs(package: Path) -> dict[str, list[Any]]:
    """Every function's operators, as read from the saved package."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.utils.load_spec(str(package))
    program = load(spec, spec.specificationVersion, file_weights_dir=str((package / WEIGHTS).parent))
    return {name: list(function.operations) for name, function in program.functions.items()}


def test_packages_are_what_the_blocks_say(target: CoreMLTarget, case: Any) -> None:
    cut, paths = case
    assert paths.keys() == {b.name for b in cut.blocks}
    for block in cut.blocks:
        target.check(paths[block.name], block)
        assert {p.name for p in paths[block.name].iterdir()} == {"Data", "Manifest.json"}


def test_functions(case: Any) -> None:
    _, paths = case
    functions = {name: sorted(programs(path)) for name, path in paths.items()}
    assert functions.pop("pair_0") == ["base", "merged"]
    assert set(map(tuple, functions.values())) == {("base",)}


def test_weights_are_stored_once(case: Any) -> None:
    cut, paths = case
    for block in cut.blocks:
        stored = (paths[block.name] / WEIGHTS).stat().st_size
        assert 2 * block.parameters <= stored + 200  # a handful of numbers are stored in the program itself
        assert stored <= 1.25 * 2 * block.parameters + 1000


def test_attention_is_one_operator(case: Any) -> None:
    for operators in programs(case[1]["pair_0"]).values():
        kinds = Counter(op.op_type for op in operators)
        assert kinds["scaled_dot_product_attention"] == 4
        assert not {"softmax", "matmul", "einsum"} & kinds.keys()


def test_gelu_is_the_tanh_one(case: Any) -> None:
    gelus = {
        name: [op for ops in programs(path).values() for op in ops if op.op_type == "gelu"]
        for name, path in case[1].items()
    }
    assert {name: len(ops) for name, ops in gelus.items()} == {"caption": 1, "embed": 0, "pair_0": 4, "final": 0}
    assert {op.mode.val for ops in gelus.values() for op in ops} == {"TANH_APPROXIMATION"}
    assert not any(op.op_type in ("tanh", "erf") for ops in programs(case[1]["pair_0"]).values() for op in ops)


def upstream(value: Any) -> Iterator[Any]:
    """The values that ``value`` was computed from by arithmetic, itself included."""
    yield value
    if value.op is not None and value.op.op_type in ("mul", "reshape", "expand_dims", "cast"):
        for operand in (value.op.inputs.get(k) for k in ("x", "y")):
            if operand is not None:
                yield from upstream(operand)


def test_angles_are_float32(case: Any) -> None:
    """977 times a frequency is beyond float16; the sines and cosines of it would be noise."""
    operators = programs(case[1]["embed"])["base"]
    angles = [op.x for op in operators if op.op_type in ("sin", "cos")]
    conditioned = "x_mask" in {p.name for p in case[0].block("embed").inputs}
    assert len(angles) == (6 if conditioned else 4)
    for angle in angles:
        assert {
            v.dtype.__name__ for v in upstream(angle) if "float" in v.dtype.__name__ or "fp" in v.dtype.__name__
        } == {"fp32"}


def test_ports_are_float16_but_for_exact_ones(case: Any) -> None:
    from targets.coreml.check import interfaces

    inputs, outputs = interfaces(case[1]["embed"])["base"]
    assert {name: dtype for name, _, dtype in inputs if dtype != "float16"} == {"timestep": "float32", "fps": "float32"}
    assert {dtype for _, _, dtype in outputs} == {"float16"}


def test_float32(cut_small: Any, tmp_path: Path) -> None:
    target = CoreMLTarget(CoreMLConfig(precision="float32"))
    cut = cut_small(target.forms)
    for name in ("caption", "embed", "final"):
        block = cut.block(name)
        artifact = target.lower(block, cut.weights(block), tmp_path / f"{name}.mlpackage")
        target.check(artifact.path, block)
        assert (artifact.path / WEIGHTS).stat().st_size >= 4 * block.parameters - 400
        dtypes = {v.dtype.__name__ for op in programs(artifact.path)["base"] for v in op.outputs}
        assert "fp16" not in dtypes


# --- determinism -------------------------------------------------------------------------------------

LOWER = """
import sys
sys.path[:0] = {path!r}
import json, support
from pathlib import Path
from safetensors.torch import load_file
from targets.coreml import CoreMLTarget
weights = {{k: v for k, v in load_file(support.GOLDEN / "stdit3_weights.safetensors").items()
           if "_blocks." not in k or "_blocks.0." in k}}
cut = support.Cut(support.FACTS["config"] | {{"depth": 1}}, weights, CoreMLTarget().forms, frames=5)
for name in ("pair_0", "caption"):
    block = cut.block(name)
    CoreMLTarget().lower(block, cut.weights(block), Path(sys.argv[1]) / f"{{name}}.mlpackage")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_bytes_are_the_same_in_other_processes(tmp_path: Path) -> None:
    folders = {seed: tmp_path / f"with-seed-{seed}" for seed in ("1", "22")}
    running = []
    for seed, folder in folders.items():
        folder.mkdir()
        args = [sys.executable, "-c", LOWER.format(path=sys.path), str(folder)]
        running.append(subprocess.Popen(args, env={**os.environ, "PYTHONHASHSEED": seed}, stderr=subprocess.DEVNULL))
    assert [p.wait(timeout=300) for p in running] == [0, 0]
    first, second = (contents(folder) for folder in folders.values())
    assert len(first) == 6 and first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


# --- what check finds --------------------------------------------------------------------------------


def test_check_finds_a_missing_function(target: CoreMLTarget, odd: Any, cut_small: Any) -> None:
    plain = cut_small(target.forms, merged=False).block("pair_0")
    with pytest.raises(
        LoweringError, match=r"'pair_0': package has functions \['base', 'merged'\], expected \['base'\]"
    ):
        target.check(odd[1]["pair_0"], plain)


def test_check_finds_another_shape(target: CoreMLTarget, odd: Any, cut_small: Any) -> None:
    taller = cut_small(target.forms, height=6).block("final")
    with pytest.raises(LoweringError, match=r"'final', function 'base': inputs are .*\(2, 30, 64\).* expected .*45"):
        target.check(odd[1]["final"], taller)


def test_check_finds_another_port(target: CoreMLTarget, odd: Any, cut_small: Any) -> None:
    conditioned = cut_small(target.forms, conditions=True).block("final")
    with pytest.raises(LoweringError, match=r"'final', function 'base': inputs are .* expected .*x_mask"):
        target.check(odd[1]["final"], conditioned)


def test_check_finds_another_type(odd: Any) -> None:
    target = CoreMLTarget(CoreMLConfig(precision="float32"))
    with pytest.raises(LoweringError, match=r"inputs are .*float16.* expected .*float32"):
        target.check(odd[1]["final"], odd[0].block("final"))


@pytest.mark.parametrize("damage", ["no model", "truncated model", "no weights", "no package"])
def test_check_finds_damage(target: CoreMLTarget, odd: Any, tmp_path: Path, damage: str) -> None:
    package = tmp_path / "final.mlpackage"
    shutil.copytree(odd[1]["final"], package)
    if damage == "no model":
        (package / MODEL).unlink()
    elif damage == "truncated model":
        (package / MODEL).write_bytes((package / MODEL).read_bytes()[:-100])
    elif damage == "no weights":
        (package / WEIGHTS).unlink()
    else:
        shutil.rmtree(package)
    with pytest.raises(LoweringError, match=r"'final\.mlpackage' is not a package that can be read back"):
        target.check(package, odd[0].block("final"))


def test_an_operator_that_it_does_not_know_names_the_block(target: CoreMLTarget, tmp_path: Path) -> None:
    from test_executorch import SingularValues, toy_block

    with pytest.raises(LoweringError, match=r"block 'toy', function 'base': Core ML cannot lower it: .*svd"):
        target.lower(toy_block(SingularValues(), 3, 3), {}, tmp_path / "toy.mlpackage")
    assert list(tmp_path.iterdir()) == []
