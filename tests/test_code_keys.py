"""Code keys: every line that decides what is built changes them, and no other line does."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toolchain.system import code
from toolchain.system.code import code_digest, digest_of_code
from toolchain.system.store import Store

ROOT = Path(__file__).parents[1]
TARGETS = ("coreml", "executorch", "onnx")

# --- plug-ins ----------------------------------------------------------------------------------------


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules are imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def changes(folder: Path, module: str, file: str, root: Path = ROOT) -> bool:
    """Whether the code key of a module changes with a file; the file is put back."""
    path = folder / file
    before, text = digest_of_code(root, module), path.read_text() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text or ''}\n# another line\n")
    after = digest_of_code(root, module)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert digest_of_code(root, module) == before
    return after != before


PACKAGE = {
    "vendor/__init__.py": "",
    "vendor/helper.py": "",
    "vendor/data/table.bin": "",
    "vendor/inner/__init__.py": "",
    "vendor/inner/target.py": "from . import near\nfrom ..helper import x\nimport beside\n",
    "vendor/inner/near.py": "",
    "vendor/inner/broken.py.txt": "def",
    "vendor/broken.py": "this is a template {{ and no Python",
    "vendor/__pycache__/helper.cpython-311.pyc": "",
    "beside.py": "import further",
    "further.py": "",
    "unrelated.py": "",
    "other/__init__.py": "",
}


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("vendor/inner/target.py", True),
        ("vendor/inner/near.py", True),
        ("vendor/helper.py", True),
        ("vendor/data/table.bin", True),
        ("vendor/broken.py", True),
        ("vendor/added.py", True),
        ("beside.py", True),
        ("further.py", True),
        ("vendor/__pycache__/helper.cpython-311.pyc", False),
        ("vendor/inner/__pycache__/added.pyc", False),
        ("unrelated.py", False),
        ("other/__init__.py", False),
        ("added.py", False),
    ],
)
def test_a_package(plugins: Path, file: str, matters: bool) -> None:
    write(plugins, PACKAGE)
    assert changes(plugins, "vendor.inner.target", file) is matters


MODULE = {
    "single.py": """
import helper, typing, os, torch
from package.part import thing
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import for_types
    from for_types_too import Name
else:
    import instead
if typing.TYPE_CHECKING:
    import for_types_as_well
def later():
    import lazily
    class Inner:
        def method(self):
            try:
                import tried
            except ImportError:
                import failing
            match later:
                case None:
                    import matched
""",
    "helper.py": "import deeper",
    "deeper.py": "import helper  # in a circle",
    "package/__init__.py": "",
    "package/part.py": "thing = 1",
    "package/data.json": "{}",
    **{
        f"{name}.py": ""
        for name in [
            "lazily",
            "tried",
            "failing",
            "matched",
            "instead",
            "for_types",
            "for_types_too",
            "for_types_as_well",
            "unrelated",
        ]
    },
}


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("single.py", True),
        ("helper.py", True),
        ("deeper.py", True),
        ("package/part.py", True),
        ("package/data.json", True),
        ("lazily.py", True),
        ("tried.py", True),
        ("failing.py", True),
        ("matched.py", True),
        ("instead.py", True),
        ("for_types.py", False),
        ("for_types_too.py", False),
        ("for_types_as_well.py", False),
        ("unrelated.py", False),
        ("single.txt", False),
    ],
)
def test_a_single_module(plugins: Path, file: str, matters: bool) -> None:
    write(plugins, MODULE)
    assert changes(plugins, "single", file) is matters


def test_a_namespace_package(plugins: Path) -> None:
    """Only its own part of it counts, and what that imports."""
    files = {
        "corp/target/__init__.py": "import corp.shared",
        "corp/target/deep.py": "",
        "corp/shared.py": "",
        "corp/other/__init__.py": "",
        "shared.py": "",
    }
    write(plugins, files)
    matters = [f for f in files if changes(plugins, "corp.target", f)]
    assert matters == ["corp/target/__init__.py", "corp/target/deep.py", "corp/shared.py"]


def test_what_is_merely_installed_beside_it(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything is installed, only what came with the plug-in is part of it."""
    write(plugins, {"single.py": "import helper, library", "helper.py": "", "library/__init__.py": ""})
    monkeypatch.setattr(code, "_installed", lambda: frozenset({plugins}))
    found = {"single": ["the-plugin"], "helper": ["the-plugin"], "library": ["a-library"]}
    monkeypatch.setattr(code, "_distributions", lambda: found)
    assert changes(plugins, "single", "helper.py")
    assert not changes(plugins, "single", "library/__init__.py")


def test_a_plugin_depends_on_what_it_imports_of_ours(plugins: Path, tree: Path) -> None:
    write(plugins, {"single.py": "import helper", "helper.py": "def f():\n    from targets.stamping import cut\n"})
    assert changes(tree, "single", "targets/stamping.py", tree)
    assert not changes(tree, "single", "targets/onnx/lower.py", tree)


def test_where_a_plugin_lies_does_not_matter(plugins: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(plugins, PACKAGE)
    before = digest_of_code(ROOT, "vendor.inner.target")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(plugins, elsewhere, dirs_exist_ok=True)
    shutil.rmtree(plugins / "vendor")
    sys.path.insert(0, str(elsewhere))
    for name in [n for n in sys.modules if n.split(".")[0] == "vendor"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    try:
        assert digest_of_code(ROOT, "vendor.inner.target") == before
    finally:
        sys.path.remove(str(elsewhere))


def test_no_such_module() -> None:
    for name in ("no_such_plugin", "targets.none", "sys"):
        with pytest.raises(ModuleNotFoundError, match=name):
            digest_of_code(ROOT, name)


# --- our own -----------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of our own packages, free to be changed."""
    for name in ("toolchain", "passes", "targets"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tree/recipes").mkdir()
    shutil.copy(ROOT / "recipes/__init__.py", tmp_path / "tree/recipes")
    return tmp_path / "tree"


ARTIFACTS = ("toolchain.build.artifacts", "toolchain.models.open_sora_v1_2.family", "passes.partition")
"""With a target: what decides artifacts."""
BUILD = ("toolchain.build.compile", *ARTIFACTS)


def keys(tree: Path) -> dict[str, str]:
    """The code keys of each target's artifacts and of its bundles."""
    named = {"artifacts": ARTIFACTS, "bundles": BUILD}
    return {f"{t} {k}": digest_of_code(tree, f"targets.{t}", *m) for t in TARGETS for k, m in named.items()}


ALL = {f"{t} {k}" for t in TARGETS for k in ("artifacts", "bundles")}
BUNDLES = {f"{t} bundles" for t in TARGETS}


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("toolchain/ui/bundles.py", set()),
        ("toolchain/ui/console.py", set()),
        ("toolchain/cli/building.py", set()),
        ("toolchain/testing.py", set()),
        ("passes/token_merge.py", set()),  # these recipes do not use it
        ("targets/stamping.py", ALL),
        ("targets/onnx/lower.py", {"onnx artifacts", "onnx bundles"}),
        ("targets/onnx/added.txt", {"onnx artifacts", "onnx bundles"}),
        ("targets/coreml/ops/norms.py", {"coreml artifacts", "coreml bundles"}),
        ("toolchain/ir/graph.py", ALL),
        ("toolchain/models/open_sora_v1_2/attention.py", ALL),
        ("toolchain/build/artifacts.py", ALL),
        ("passes/partition.py", ALL),
        ("toolchain/build/entries.py", BUNDLES),
        ("toolchain/accuracy/walk.py", BUNDLES),
    ],
)
@pytest.mark.slow
def test_a_file_of_ours(tree: Path, file: str, changed: set[str]) -> None:
    before = keys(tree)
    path = tree / file
    path.write_text((path.read_text() if path.exists() else "") + "\n# another line\n")
    after = keys(tree)
    assert {name for name in before if before[name] != after[name]} == changed


def test_our_own_tree_is_what_is_digested() -> None:
    assert code_digest("targets.onnx") == digest_of_code(ROOT, "targets.onnx")
    assert code_digest("targets.onnx") != code_digest("targets.coreml")


def test_builds_use_these_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this file calls the roots of a key are the roots."""
    from types import SimpleNamespace

    from passes.partition import Partition, PartitionConfig
    from targets.onnx import OnnxTarget
    from toolchain.build.artifacts import code_modules
    from toolchain.models.open_sora_v1_2.family import OpenSoraV12

    family = object.__new__(OpenSoraV12)
    target, passes = object.__new__(OnnxTarget), (Partition(PartitionConfig()),)
    make: Callable[..., list[str]] = code_modules
    assert set(make(SimpleNamespace(family=family, target=target, passes=passes))) == {*ARTIFACTS, "targets.onnx"}


def test_a_bundle_depends_on_what_its_artifacts_do(tmp_path: Path) -> None:
    """Its key is made of passes that are not imported; the artifacts' of those that are."""
    from toolchain.build.artifacts import code_modules
    from toolchain.build.keys import build_key, bundle_modules
    from toolchain.formats.recipe_file import load_recipe
    from toolchain.planning.resolve import completed, resolve_lightly

    light = resolve_lightly(load_recipe("tiny-int8"), tmp_path)
    whole, store = completed(light), Store()
    for name, part in whole.components.items():
        assert {*code_modules(part), "toolchain.build.compile"} - {"toolchain.build.artifacts"} <= {
            *bundle_modules(light.components[name])
        }
    assert build_key(light, store, False) == build_key(whole, store, False)


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("here", "class A: pass", "here"),
        ("here", "import b\nclass B: pass\n@b.c\nclass A: pass", None),
        ("here", "class A: pass\nA = f(A)", None),
        ("here", "if x:\n    class A: pass", None),
        ("here", "from there import *\nclass A: pass", None),
        ("here", "A = make()", None),
        ("here", "def A(): pass", None),
        ("here", "not Python", None),
        ("here", "from elsewhere import Other as A", "elsewhere"),
        ("here", "from elsewhere.deep import A", "elsewhere.deep"),
        ("package", "from .inner import A", "package.inner"),
    ],
)
def test_where_a_class_is_defined(
    module: str, text: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from toolchain.system.imports import defined_in

    for name in ("elsewhere", "package"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere/__init__.py").write_text("class Other: pass")
    (tmp_path / "elsewhere/deep.py").write_text("class A: pass")
    (tmp_path / "package/inner.py").write_text("class A: pass")
    (tmp_path / ("package/__init__.py" if module == "package" else "here.py")).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    defined_in.cache_clear()
    before = set(sys.modules)
    assert defined_in(module, "A") == found
    new = set(sys.modules) - before
    for name in new:
        del sys.modules[name]
    defined_in.cache_clear()
    assert not {"here", "elsewhere.deep"} & new


def test_what_is_remembered_of_imports_changes_no_digest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    plain = code_digest("targets.onnx", "passes.partition")
    assert [code_digest("targets.onnx", "passes.partition", store=s) for s in (store, Store(tmp_path))] == [plain] * 2
    assert [e.kind for e in store.entries()] == ["imports"]
