"""What Netron shows of a model: its description, licence, and what its inputs and outputs are."""

from __future__ import annotations

from pathlib import Path

import onnx

from toolchain.ir.labels import Labels


def label(folder: Path, labels: Labels) -> tuple[Path, ...]:
    """Write ``labels`` into the models of a block's folder; their graphs and the file of weights stay as they are.

    Returns:
        The files that were changed.
    """
    paths = sorted(folder.glob("*.onnx"))
    facts = {"component": labels.component, "license": labels.license, "source": labels.source}
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        model.doc_string = f"{labels.title}; function '{path.stem}'"
        onnx.helper.set_model_props(model, {k: v for k, v in facts.items() if v is not None})
        for port in model.graph.input:
            port.doc_string = labels.input(port.name)
        for port in model.graph.output:
            port.doc_string = labels.output(port.name)
        path.unlink()  # it may share its bytes with the cache's
        path.write_bytes(model.SerializeToString(deterministic=True))
    return tuple(paths)
