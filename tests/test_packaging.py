"""The distribution, as users install it: built from an sdist, installed elsewhere, run where other packages have the
names of ours; with every extra, and with none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Ran
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OURS = ("toolchain", "passes", "targets", "recipes")
BUILD = "import setuptools.build_meta as b, sys; print(b.build_{what}(sys.argv[1]))"
CONVERTERS = ("coremltools", "executorch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "onnx_ir")


def build(what: str, source: Path, out: Path) -> Path:
    """An sdist or a wheel of a source tree, by its build backend."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(what=what), str(out)], cwd=source, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from what an sdist holds, so that the sdist lacks nothing."""
    folder = tmp_path_factory.mktemp("distribution")
    source = folder / "source"
    source.mkdir()
    for name in OURS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    packed = build("sdist", source, folder)
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return build("wheel", folder / "unpacked" / packed.name.removesuffix(".tar.gz"), folder)


class Install:
    """The wheel in an environment of its own, with the packages of this one but those left out."""

    def __init__(self, wheel: Path, folder: Path, left_out: tuple[str, ...]) -> None:
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self._bin = folder / "venv/bin"
        here = Path(torch.__file__).parents[1]
        there = next((folder / "venv/lib").iterdir()) / "site-packages"
        for entry in here.iterdir():
            package = entry.name.partition("-")[0].partition(".")[0].lower()
            if package not in left_out and "sora_compile" not in package and entry.suffix not in (".pth", ".egg-link"):
                (there / entry.name).symlink_to(entry)
        install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
        pip = [sys.executable, "-m", "pip", "--python", str(self._bin / "python"), *install]
        done = subprocess.run(pip, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        self.project = folder / "project"
        for name in OURS:
            package = self.project / name
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("raise RuntimeError('a user\\'s own package was imported')\n")

    def run(self, *args: str) -> Ran:
        """The console script, in a folder that has packages of the same names."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [self._bin / "sora-compile", *args], cwd=self.project, env=env, capture_output=True, text=True, timeout=600
        )
        return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Install]:
    """Installed without extras."""
    return Install(wheel, tmp_path_factory.mktemp("light"), CONVERTERS)


def test_extras_name_what_the_base_leaves_out(wheel: Path) -> None:
    found = PathDistribution(zipfile.Path(wheel, f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/")).metadata
    needed = [Requirement(r) for r in found.get_all("Requires-Dist") or []]
    assert {"coreml", "executorch", "onnx", "all", "dask", "docs", "report"} <= set(
        found.get_all("Provides-Extra") or []
    )
    assert not {r.name for r in needed if r.marker is None} & set(CONVERTERS)


def test_a_full_install_compiles_with_workers(wheel: Path, tmp_path: Path) -> None:
    full = Install(wheel, tmp_path, ())
    alone = [x for part in ("text_encoder", "vae", "gate.golden") for x in ("--set", f"{part}=null")]
    ran = full.run("tiny", "--set", "target=onnx", *alone, "--no-gate", "--jobs", "2", "-o", "bundle")
    assert ran.code == 0, ran.err
    assert (full.project / "bundle/manifest.json").exists()


def test_a_light_install_plans_and_lists(light: Install) -> None:
    ran = light.run("plan", "tiny", "--set", "target=coreml")
    assert ran.code == 0, ran.err
    assert "transformer" in ran.out
    assert light.run("recipes").code == 0


@pytest.mark.parametrize("target", ["coreml", "executorch", "onnx"])
def test_what_a_light_install_lacks_is_named(light: Install, target: str) -> None:
    ran = light.run("tiny", "--set", f"target={target}", "-o", "bundle")
    assert ran.code == 6
    assert ran.err.strip().endswith(f"pip install 'sora-compile[{target}]'") and len(ran.err.splitlines()) == 1
    assert not (light.project / "bundle").exists()


def test_a_light_install_reads_bundles(light: Install, onnx_bundle: Any) -> None:
    bundle = str(onnx_bundle.path)
    assert light.run("inspect", bundle).code == 0
    assert light.run("verify", bundle, "--files-only").code == 0
    ran = light.run("verify", bundle)
    assert ran.code == 6 and ran.err.strip().endswith("pip install 'sora-compile[onnx]'")
