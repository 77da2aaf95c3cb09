"""The plug-in against the protocols: all that its author has to write."""

from __future__ import annotations

from pathlib import Path

from their_plugin.clamp_outputs import ClampOutputs, ClampOutputsConfig
from their_plugin.target import TorchExportTarget

from toolchain.testing.passes import check_pass
from toolchain.testing.samples import sample_graph, sample_pairs
from toolchain.testing.targets import check_target


def test_clamp_outputs() -> None:
    graphs, refuses = [sample_graph(), sample_graph(merged=True)], [sample_graph(layers=0)]
    check_pass(ClampOutputs(), graphs, keeps_base=True, refuses=refuses)
    everywhere = ClampOutputsConfig(kinds=("mlp", "self_attention"), limit=0.25)
    check_pass(ClampOutputs(everywhere), graphs, refuses=refuses)


def test_torch_export(tmp_path: Path) -> None:
    target = TorchExportTarget()
    converters = ("torch.export._trace",)
    report = check_target(target, sample_pairs(target), tmp_path, relative_error=1e-6, converters=converters)
    assert not report.skipped
