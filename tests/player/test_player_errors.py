"""What can be wrong with a bundle or a command line: an exit code, one line, and no file left behind.

The bundles here are described as real ones are, but their artifacts hold no program: all that is refused is
refused before one is opened, in seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hollow import hollow_bundle

import toolchain
from toolchain.cli import app
from toolchain.errors import BundleError
from toolchain.formats.bundle import Bundle
from toolchain.ir.target import EngineUnavailableError
from toolchain.player import Player


@pytest.fixture(scope="module")
def originals(recipe_data: dict[str, Any], source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hollow bundles by target. Read only."""
    folder = tmp_path_factory.mktemp("hollow")
    targets = ("executorch", "coreml")
    return {t: hollow_bundle(recipe_data | {"target": t}, source, folder / t) for t in targets}


@pytest.fixture
def hollow(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A hollow bundle to spoil."""
    return Path(shutil.copytree(originals["executorch"], tmp_path / "bundle"))


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    """Edit a bundle's manifest as JSON."""
    data = json.loads((folder / "manifest.json").read_text())
    edit(data)
    (folder / "manifest.json").write_text(json.dumps(data))


@dataclass(frozen=True)
class Failed:
    code: int
    line: str


@pytest.fixture
def play(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Failed]:
    """Run ``sora-compile play BUNDLE --prompt fox -o out.mp4``, which must fail with one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def play(bundle: Path, *options: str, output: str = "out.mp4") -> Failed:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            app(["play", str(bundle), "--prompt", "fox", "-o", output, *options], standalone_mode=False)
        said = capfd.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith("sora-compile: ")
        assert "internal error" not in line
        assert said.out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return Failed(int(str(end.value.code)), line.removeprefix("sora-compile: "))

    return play


FILES = ["transformer/pair_0.pte", "text_encoder/layer_1.pte", "spiece.model", "recipe.yaml"]


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.slow
def test_a_flipped_bit(name: str, hollow: Path, play: Callable[..., Failed]) -> None:
    file = hollow / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    failed = play(hollow)
    assert failed.code == 2
    assert f"'{name}' is not what was built (checksum); build the bundle again" in failed.line


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, hollow: Path, play: Callable[..., Failed]) -> None:
    (hollow / name).unlink()
    failed = play(hollow)
    assert failed.code == 2
    assert f"'{name}' is missing; build the bundle again" in failed.line


def test_a_truncated_file(hollow: Path, play: Callable[..., Failed]) -> None:
    file = hollow / FILES[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert "checksum" in play(hollow).line


@pytest.mark.slow
def test_a_program_that_is_none(hollow: Path, run_cli_process: Any, tmp_path: Path) -> None:
    """Its digest is right, so only its engine can tell. What the runtime itself writes is not shown."""
    ran = run_cli_process("play", hollow, "--prompt", "fox", "-o", "out.mp4", cwd=tmp_path)
    (line,) = ran.err.splitlines()
    said = "'text_encoder/embed' cannot be loaded, tried 2 times: 'embed.pte' is not a program that ExecuTorch can load"
    assert line.startswith(f"sora-compile: {said}")
    assert (ran.code, ran.out) == (4, "")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae/*.pte", "transformer/tables.safetensors", "text_encoder/spiece.model"])
def test_one_bit_of_a_compiled_bundle(name: str, bundle: Bundle, tmp_path: Path, play: Callable[..., Failed]) -> None:
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    file = next(copy.glob(name))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    failed = play(copy)
    assert failed.code == 2
    assert f"'{file.relative_to(copy)}' is not what was built (checksum)" in failed.line


# --- the manifest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"prefetch": {"ahead": 2}}], ids=["same-keys", "new-keys"])
def test_a_newer_manifest(more: dict[str, Any], hollow: Path, play: Callable[..., Failed]) -> None:
    version = json.loads((hollow / "manifest.json").read_text())["format_version"]
    change(hollow, lambda m: m.update(format_version=version + 1, **more))
    failed = play(hollow)
    assert failed.code == 2
    assert f"has manifest version {version + 1}, this program knows {version}; update sora-compile" in failed.line


PLACES: dict[str, Callable[[Any, str], object]] = {
    "artifact": lambda m, path: m["components"]["vae"]["blocks"][0].update(artifact=path),
    "file": lambda m, path: m["components"]["vae"]["blocks"][0]["files"][0].update(path=path),
    "tables": lambda m, path: m["components"]["transformer"]["tables_file"].update(path=path),
    "tokenizer": lambda m, path: m["text"]["tokenizer"].update(path=path),
    "recipe": lambda m, path: m["recipe"].update(path=path),
}


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "vae/../../secret", "..\\secret", "c:/secret", ""])
@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_leaves_the_bundle(place: str, path: str, hollow: Path, play: Callable[..., Failed]) -> None:
    (hollow.parent / "secret").write_text("secret")
    change(hollow, lambda m: PLACES[place](m, path))
    failed = play(hollow)
    assert failed.code == 2
    assert f"path '{path}' leaves the bundle" in failed.line
    assert "manifest.json' is damaged" in failed.line


def test_no_component_but_the_transformer(hollow: Path, play: Callable[..., Failed]) -> None:
    def remove(manifest: Any) -> None:
        del manifest["components"]["text_encoder"], manifest["components"]["vae"]
        manifest.update(text=None, decoding=None)
        sections = manifest["loading"]["plan"]["sections"]
        for section in sections:
            section["events"] = [e for e in section["events"] if next(iter(e.values())).startswith("transformer/")]
        manifest["loading"]["plan"]["sections"] = [s for s in sections if s["events"]]
        manifest["loading"].update(made_from=None, prediction=None)  # they are of all components

    change(hollow, remove)
    failed = play(hollow)
    assert failed.code == 2
    assert "has no text_encoder, vae; a video needs all components, add them to the recipe" in failed.line


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": "one"}', "null", '{"name": 1}'])
def test_a_manifest_that_is_none(text: str, hollow: Path, play: Callable[..., Failed]) -> None:
    (hollow / "manifest.json").write_text(text)
    failed = play(hollow)
    assert failed.code == 2
    assert "manifest.json' is damaged" in failed.line


def test_a_manifest_that_is_not_text(hollow: Path, play: Callable[..., Failed]) -> None:
    (hollow / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "is not a bundle" in play(hollow).line


@pytest.mark.parametrize("kind", ["nothing", "empty", "file", "checkpoint"])
def test_not_a_bundle(kind: str, source: Path, tmp_path: Path, play: Callable[..., Failed]) -> None:
    place = tmp_path / "place"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("file")
    elif kind == "checkpoint":
        shutil.copytree(source / "transformer", place)
    failed = play(place)
    assert failed.code == 2
    assert failed.line == f"'{place}' is not a bundle: no readable manifest.json in it"


def test_an_unknown_target(hollow: Path, play: Callable[..., Failed]) -> None:
    change(hollow, lambda m: m["target"].update(name="executorc"))
    failed = play(hollow)
    assert failed.code == 2
    assert "no target is called 'executorc'; did you mean 'executorch'?" in failed.line


def test_an_engine_that_this_machine_lacks(
    originals: dict[str, Path], play: Callable[..., Failed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(*_: object) -> None:
        raise EngineUnavailableError("runs on the moon only")

    monkeypatch.setattr("targets.coreml.CoreMLTarget.engine", engine)
    failed = play(originals["coreml"])
    assert failed.code == 6
    assert "runs on the moon only" in failed.line


# --- the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["out.avi", "out", "out.mp4.txt", "bundle"])
def test_output_is_not_an_mp4(output: str, hollow: Path, play: Callable[..., Failed]) -> None:
    failed = play(hollow, output=output)
    assert failed.code == 2
    assert failed.line == f"-o {output}: expected the name of an .mp4 file"


@pytest.mark.parametrize("output", ["missing/out.mp4", "bundle/manifest.json/out.mp4"])
def test_output_folder_is_missing(output: str, hollow: Path, play: Callable[..., Failed]) -> None:
    failed = play(hollow, output=output)
    assert failed.code == 6
    assert failed.line == f"-o {output}: its folder does not exist or cannot be written"


def test_output_is_looked_at_first(tmp_path: Path, play: Callable[..., Failed]) -> None:
    """Before a bundle of gigabytes is checked."""
    assert play(tmp_path / "nothing", output="out.avi").line.startswith("-o out.avi")


@pytest.mark.parametrize("options", [("--trace", "missing/trace.json"), ("--frames", "bundle/manifest.json")])
def test_other_outputs_are_looked_at_first(
    options: tuple[str, str], hollow: Path, tmp_path: Path, play: Callable[..., Failed]
) -> None:
    (hollow / FILES[0]).unlink()
    failed = play(hollow, *options)
    assert failed.code in (2, 6)
    assert options[1] in failed.line


def test_a_damaged_bundle_as_json(hollow: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (hollow / FILES[0]).unlink()
    with pytest.raises(SystemExit) as end:
        app(["play", str(hollow), "--prompt", "fox", "-o", "out.mp4", "--json"], standalone_mode=False)
    said = capfd.readouterr()
    answer = json.loads(said.out)
    assert (end.value.code, answer["exit_code"]) == (2, 2)
    assert said.err.splitlines() == [f"sora-compile: {answer['error']}"]


def test_the_library_raises_the_same(hollow: Path) -> None:
    (hollow / FILES[0]).unlink()
    with pytest.raises(BundleError, match="is missing"):
        Player(hollow)
    with pytest.raises(BundleError, match="is missing"):
        toolchain.play(hollow, "fox", hollow.parent / "out.mp4")
