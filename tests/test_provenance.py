"""Signatures, bills of materials and model cards of bundles, and links that leave one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from support import GOLDEN

import toolchain
from toolchain.errors import BundleError, RecipeError
from toolchain.formats.bom import bill_of_materials
from toolchain.formats.signature import SIGNATURE_FILE, sign_bundle, verify_signature
from toolchain.ui.card import model_card


def _fill(part: Any, root: Path) -> None:
    """Make the files that a manifest names, and correct what it says of them."""
    if isinstance(part, dict) and part.keys() >= {"path", "bytes", "sha256"}:
        content = part["path"].encode().ljust(part["bytes"])
        (root / part["path"]).parent.mkdir(parents=True, exist_ok=True)
        (root / part["path"]).write_bytes(content)
        part |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for own in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _fill(own, root)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle whose manifest is a real one, and whose files are small."""
    root = tmp_path / "bundle"
    root.mkdir()
    manifest = json.loads((GOLDEN / "manifest_v1.json").read_text())
    _fill(manifest, root)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public one."""
    return _keys(tmp_path_factory.mktemp("keys"))


def _keys(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)
    return folder / "key", folder / "key.pub"


def test_a_signature_is_one_that_others_verify(path: Path, keys: tuple[Path, Path]) -> None:
    import model_signing

    private, public = keys
    manifest = (path / "manifest.json").read_bytes()
    signature = sign_bundle(path, private)
    assert signature == path / SIGNATURE_FILE
    assert (path / "manifest.json").read_bytes() == manifest
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public).verify(path, signature)
    verify_signature(path, public)
    toolchain.load_bundle(path).check_files()
    moved = path.rename(path.with_name("moved"))
    verify_signature(moved, public)
    sign_bundle(moved, private)  # again: the old signature is no part of what is signed
    verify_signature(moved, public)


def _first_file(path: Path) -> Path:
    return path / next(toolchain.load_bundle(path).files()).path


@pytest.mark.parametrize(
    "change",
    [
        lambda path: _first_file(path).write_bytes(b"x"),
        lambda path: _first_file(path).unlink(),
        lambda path: (path / "more").write_bytes(b""),
        lambda path: (path / ".gitignore").write_bytes(b""),
        lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes() + b"\n"),
        lambda path: (path / "link").symlink_to(path / "manifest.json"),
    ],
    ids=["changed", "removed", "added", "added for git", "manifest", "link"],
)
def test_what_was_changed_is_found(path: Path, keys: tuple[Path, Path], change: Callable[[Path], Any]) -> None:
    private, public = keys
    sign_bundle(path, private)
    change(path)
    with pytest.raises(BundleError, match="not as it was signed") as caught:
        verify_signature(path, public)
    assert "\n" not in str(caught.value)


def test_signatures_of_others(path: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not signed"):
        verify_signature(path, keys[1])
    sign_bundle(path, keys[0])
    with pytest.raises(BundleError, match="not as it was signed"):
        verify_signature(path, _keys(tmp_path)[1])
    for content in (b"", b"{}", b"\xff", (path / SIGNATURE_FILE).read_bytes()[:-9]):
        (path / SIGNATURE_FILE).write_bytes(content)
        with pytest.raises(BundleError, match="not as it was signed"):
            verify_signature(path, keys[1])


def test_keys_that_are_none(path: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"noise")
    for key in (tmp_path / "noise", keys[1], tmp_path / "absent"):
        with pytest.raises(RecipeError, match="--key"):
            sign_bundle(path, key)
    sign_bundle(path, keys[0])
    with pytest.raises(RecipeError, match="--key"):
        verify_signature(path, tmp_path / "noise")


def test_a_damaged_bundle_is_not_signed(path: Path, keys: tuple[Path, Path]) -> None:
    _first_file(path).write_bytes(b"x")
    with pytest.raises(BundleError, match="checksum"):
        sign_bundle(path, keys[0])
    assert not (path / SIGNATURE_FILE).exists()


def test_commands(run_cli: Any, path: Path, keys: tuple[Path, Path]) -> None:
    ran = run_cli("sign", path, "--key", keys[0], cwd=path.parent)
    assert (ran.code, ran.err) == (0, "")
    assert run_cli("verify-signature", path, "--key", keys[1], cwd=path.parent).code == 0
    (path / "more").write_bytes(b"")
    ran = run_cli("verify-signature", path, "--key", keys[1], cwd=path.parent)
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1 and "more" in ran.err
    assert run_cli("sign", path, cwd=path.parent).code == 2
    assert run_cli("verify-signature", path, "--identity", "a@b.c", cwd=path.parent).code == 2
    for command in ("bom", "card"):
        ran = run_cli(command, path, "--license", "transformer=Apache-2.0", "-o", "out", cwd=path.parent)
        assert (ran.code, ran.err) == (0, "")
        assert (path.parent / "out").read_text() == run_cli(
            command, path, "--license", "transformer=Apache-2.0", cwd=path.parent
        ).out
        assert run_cli(command, path, "--license", "unet=MIT", cwd=path.parent).code == 2
        assert run_cli(command, path, "--license", "MIT", cwd=path.parent).code == 2


def test_the_bill_of_materials_is_one(path: Path) -> None:
    bundle = toolchain.load_bundle(path)
    text = bill_of_materials(bundle, {"transformer": "Apache-2.0"})
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    data = json.loads(text)
    models = {c["name"]: c for c in data["components"] if c["type"] == "machine-learning-model"}
    assert models.keys() == bundle.manifest.components.keys()
    assert models["transformer"]["licenses"] == [{"expression": "Apache-2.0"}]
    listed = [f for c in models.values() for f in c["components"]]
    listed += [c for c in data["components"] if c["type"] == "file"]
    assert {f["name"]: f["hashes"][0]["content"] for f in listed} == {f.path: f.sha256 for f in bundle.files()}
    assert {t["name"]: t["version"] for t in data["metadata"]["tools"]["components"]} == bundle.manifest.tools


def test_the_bill_of_materials_comes_from_the_manifest_and_the_recipe(path: Path, tmp_path: Path) -> None:
    text = bill_of_materials(toolchain.load_bundle(path))
    assert "licenses" not in text
    (tmp_path / "other").mkdir()
    for name in ("manifest.json", "recipe.yaml"):
        shutil.copy(path / name, tmp_path / "other")
    assert bill_of_materials(toolchain.load_bundle(tmp_path / "other")) == text
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    other = bill_of_materials(toolchain.load_bundle(path))
    assert json.loads(other)["serialNumber"] != json.loads(text)["serialNumber"]


def test_the_card(path: Path) -> None:
    bundle = toolchain.load_bundle(path)
    components = bundle.manifest.components
    card = model_card(bundle, dict.fromkeys(components, "Apache-2.0"))
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "sora-compile",
        "pipeline_tag": "text-to-video",
        "tags": [bundle.manifest.model, bundle.manifest.target.name],
    }
    for name, component in components.items():
        errors = [a.relative_error for b in component.blocks for a in (b.accuracy or {}).values()]
        row = next(line for line in body.splitlines() if line.startswith(f"| {name} "))
        assert (f"{max(errors):.2g}" if errors else "not measured") in row
    assert "license" not in model_card(bundle).split("---\n", 2)[1]
    recipe = {name: {"license": "MIT"} for name in bundle.manifest.components}
    (bundle.path / bundle.manifest.recipe.path).write_text(yaml.safe_dump(recipe))
    assert "license: mit" in model_card(bundle).split("---\n", 2)[1]
    assert bill_of_materials(bundle, {"transformer": "Apache-2.0"}).count('"expression": "MIT"') == len(recipe) - 1


def test_links_that_leave_a_bundle_are_refused(path: Path, tmp_path: Path) -> None:
    file = _first_file(path)
    outside = tmp_path / "outside"
    shutil.copy(file, outside)
    file.unlink()
    os.link(outside, file)
    toolchain.load_bundle(path).check_files()  # a hard link is a file like any other; caches are shared so
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(BundleError, match="is a link that leaves the bundle"):
        toolchain.load_bundle(path)
    file.unlink()
    shutil.copy(outside, file)
    (path / "within").symlink_to(file.name)
    toolchain.load_bundle(path).check_files()
    (path / "within").unlink()
    (path / "folder").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(BundleError, match="'folder' is a link"):
        toolchain.load_bundle(path)
