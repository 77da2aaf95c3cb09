"""What tests share: the small golden model, checkpoints and recipes of it, the command, and built bundles."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# tests/ mirrors the tree, so with tests/ on the path its folders would hide the packages `passes` and `targets`
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process has a core to itself
else:
    # what tests build is kept for one another, and for no longer; other processes are told by the environment
    _CACHE = tempfile.TemporaryDirectory(prefix="sora-compile-tests-")
    os.environ["SORA_COMPILE_CACHE"] = _CACHE.name

import json  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from commands import Ran, RunCli, run_here, run_process, start_process  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from support import FACTS, GOLDEN, RECIPE, Cut, write_checkpoint, write_project  # noqa: E402

from toolchain.ir.leaves import LegalForm  # noqa: E402
from toolchain.models.open_sora_v1_2.stdit3 import STDiT3, STDiT3Config  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite the stored graph texts in tests/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first: a long file at the end would leave other processes idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


# --- the model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """What is known of the golden model: its config, keys and shapes."""
    return FACTS


@pytest.fixture(scope="session")
def small_config() -> STDiT3Config:
    return STDiT3Config.from_json(FACTS["config"])


@pytest.fixture(scope="session")
def small_weights() -> dict[str, torch.Tensor]:
    """The golden weights, under official names; do not edit them in place."""
    weights: dict[str, torch.Tensor] = load_file(GOLDEN / "stdit3_weights.safetensors")
    return weights


@pytest.fixture(scope="session")
def small_model(small_config: STDiT3Config, small_weights: Mapping[str, torch.Tensor]) -> Any:
    """The golden model; do not edit it."""
    model = STDiT3(small_config).eval().requires_grad_(False)
    model.load_state_dict(small_weights)
    return model


@pytest.fixture(scope="session")
def golden_case() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """A golden file's inputs (``in.NAME`` as ``NAME``) and everything else in it."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        data = load_file(GOLDEN / f"{name}.safetensors")
        inputs = {k.removeprefix("in."): v for k, v in data.items() if k.startswith("in.")}
        return inputs, {k: v for k, v in data.items() if not k.startswith("in.")}

    return read


# --- graphs as text ----------------------------------------------------------------------------------


@pytest.fixture
def hold_text(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Hold a graph's text against the stored one; ``--update-goldens`` stores it instead."""

    def hold(name: str, text: str) -> None:
        path = GOLDEN / "graphs" / f"{name}.txt"
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        stored = path.read_text(encoding="utf-8")
        assert text.splitlines() == stored.splitlines(), f"{path.name} differs; --update-goldens if it should"

    return hold


# --- checkpoints and recipes -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def one_pair(small_weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and weights of the golden model's first pair alone: what lowers in the least time."""
    weights = {k: v for k, v in small_weights.items() if "_blocks." not in k or "_blocks.0." in k}
    return FACTS["config"] | {"depth": 1}, weights


@pytest.fixture
def checkpoint_folder(tmp_path: Path, small_weights: Mapping[str, torch.Tensor]) -> Path:
    """A folder of its own with the whole golden checkpoint."""
    return write_checkpoint(tmp_path / "checkpoint", FACTS["config"], small_weights)


@pytest.fixture
def recipe_data() -> dict[str, Any]:
    """A small recipe as plain data, free to edit; its checkpoint is the folder ``checkpoint`` beside it."""
    data: dict[str, Any] = json.loads(json.dumps(RECIPE))
    return data


@pytest.fixture
def project(tmp_path: Path, one_pair: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> Path:
    """A user's folder: ``recipe.yaml`` and, beside it, its checkpoint of one pair."""
    return write_project(tmp_path / "project", one_pair)


# --- blocks and what they should compute -------------------------------------------------------------


@pytest.fixture(scope="session")
def cut_small(one_pair: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> Callable[..., Cut]:
    """Cut the model of one pair, at the sizes of the small recipe, with a target's legal forms."""

    def make(forms: tuple[LegalForm, ...], **options: Any) -> Cut:
        return Cut(*one_pair, forms, **({"frames": 5} | options))

    return make


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """Run ``sora-compile`` in this process."""
    return run_here


@pytest.fixture(scope="session")
def run_cli_process() -> RunCli:
    """Run ``sora-compile`` in a process of its own."""
    return run_process


@pytest.fixture(scope="session")
def start_cli() -> Callable[..., subprocess.Popen[str]]:
    """Start ``sora-compile`` in a process that can be sent signals as from a terminal."""
    return start_process


# --- built bundles -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A bundle that the command built, the folder it was run in, and what it said."""

    path: Path
    project: Path
    ran: Ran


def _build(folder: Path, one_pair: Any, target: str) -> Built:
    project = write_project(folder / "project", one_pair)
    args = ("recipe.yaml", "--set", f"target={target}", "-o", "bundle", "-v")
    ran = run_process(*args, cwd=project, env={"PYTHONHASHSEED": "1"})
    assert ran.code == 0, ran.err
    return Built(project / "bundle", project, ran)


@pytest.fixture(scope="session")
def executorch_bundle(tmp_path_factory: pytest.TempPathFactory, one_pair: Any) -> Built:
    """The small recipe, built for ExecuTorch. Read only."""
    return _build(tmp_path_factory.mktemp("executorch"), one_pair, "executorch")


@pytest.fixture(scope="session")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory, one_pair: Any) -> Built:
    """The small recipe, built for ONNX, which takes the least time. Read only."""
    return _build(tmp_path_factory.mktemp("onnx"), one_pair, "onnx")


@pytest.fixture(scope="session")
def coreml_bundle(tmp_path_factory: pytest.TempPathFactory, one_pair: Any) -> Built:
    """The small recipe, built for Core ML. Read only."""
    return _build(tmp_path_factory.mktemp("coreml"), one_pair, "coreml")
