"""A bundle's model card: Markdown with the front matter that model hubs read, from its manifest and recipe."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from toolchain.formats.bom import all_licenses, component_files, stored_bytes
from toolchain.formats.bundle import Bundle
from toolchain.formats.manifest import Component
from toolchain.formats.yaml_text import QuotingDumper
from toolchain.system.disk import readable_size
from toolchain.ui.bundles import proof
from toolchain.ui.phrases import by_storage


def model_card(bundle: Bundle, licenses: Mapping[str, str] | None = None) -> str:
    """The card: what the bundle is, its sizes, what was measured, how to play it and to build it again.

    Args:
        licenses: SPDX expressions by component, as :func:`toolchain.formats.bom.bill_of_materials` takes them.

    Raises:
        RecipeError: the bundle has no such component.
    """
    licenses = all_licenses(bundle, licenses or {})
    m = bundle.manifest
    g = m.geometry
    size = readable_size(sum(f.bytes for f in bundle.files()))
    lines = [
        f"# {_plain(m.name)}",
        "",
        f"{_plain(m.model)}, compiled for {_plain(m.target.name)} by sora-compile: {g.frames} frames of "
        f"{g.width}×{g.height} at {g.fps}/s, {len(m.sampler.steps)} calls of the denoiser, {size}.",
        "",
        "| component | precision | parameters | weights | files | largest relative error | of quantization | licence |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, own, licenses.get(name)) for name, own in m.components.items()),
        "",
        f"Gate `{m.gate.mode}`: {proof(m)}. Errors are against eager float32, the worst of a component's blocks and "
        "functions; those of quantization say what storing weights in few bits costs by itself.",
        "",
        "## Use",
        "",
        "```sh",
        "sora-compile inspect BUNDLE",
        'sora-compile play BUNDLE --prompt "…" -o video.mp4',
        "```",
        "",
        "## Build it again",
        "",
        f"The recipe is in the bundle. With the checkpoints that it names, and {_tools(m.tools)}:",
        "",
        "```sh",
        f"sora-compile BUNDLE/{m.recipe.path} -o rebuilt",
        "sora-compile diff BUNDLE rebuilt",
        "```",
    ]
    return f"---\n{_front(bundle, licenses)}---\n\n" + "\n".join(lines) + "\n"


def _front(bundle: Bundle, licenses: Mapping[str, str]) -> str:
    """The front matter. A hub takes one licence: none where components differ, or one of them has none."""
    m = bundle.manifest
    own = {licenses.get(name) for name in m.components}
    one = own.pop() if len(own) == 1 else None
    data = {
        **({"license": one.lower()} if one else {}),
        "library_name": "sora-compile",
        "pipeline_tag": "text-to-video",
        "tags": [m.model, m.target.name],
    }
    text: str = yaml.dump(data, Dumper=QuotingDumper, sort_keys=False, allow_unicode=True)
    return text


def _row(name: str, component: Component, license_: str | None) -> str:
    cells = (
        name,
        component.precision,
        f"{sum(b.parameters for b in component.blocks):,}",
        by_storage(stored_bytes(component)),
        readable_size(sum(f.bytes for f in component_files(component))),
        _worst([a.relative_error for b in component.blocks for a in (b.accuracy or {}).values()]),
        _worst([a.relative_error for b in component.blocks for a in (b.quantization or {}).values()])
        if any(b.quantized for b in component.blocks)
        else "none",
        license_ or "not stated",
    )
    return f"| {' | '.join(map(_plain, cells))} |"


def _worst(errors: list[float]) -> str:
    return f"{max(errors):.2g}" if errors else "not measured"


def _tools(tools: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in tools.items())


def _plain(text: str) -> str:
    """Text of others within a line of Markdown: no line, cell, tag or link of its own."""
    return " ".join(text.split()).translate({ord(c): f"\\{c}" for c in "|<>[]`"})
