"""What Xcode shows of a package: its description, licence, and what its inputs and outputs are."""

from __future__ import annotations

from pathlib import Path

from targets.coreml.schema import MODEL, read_model
from toolchain.ir.labels import Labels


def label(package: Path, labels: Labels) -> tuple[Path, ...]:
    """Write ``labels`` into a package's model description; the program in it stays as it is, byte for byte.

    Returns:
        The file that was changed.
    """
    model, _ = read_model(package)
    about = model.description.metadata
    about.shortDescription, about.author = labels.title, "sora-compile"
    about.license = labels.license or ""
    if labels.source is not None:
        about.userDefined["source"] = labels.source
    # a package of one function has its ports in the description itself
    for function in model.description.functions or [model.description]:
        for port in function.input:
            port.shortDescription = labels.input(port.name)
        for port in function.output:
            port.shortDescription = labels.output(port.name)
    path = package / MODEL
    path.unlink()  # it may share its bytes with the cache's
    path.write_bytes(model.SerializeToString(deterministic=True))
    return (path,)
