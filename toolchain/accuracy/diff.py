"""Two bundles side by side: what they say, how large they are, how exact, and what their artifacts give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.accuracy import goldens
from toolchain.errors import BundleError, SoraCompileError
from toolchain.formats import manifest as m
from toolchain.formats.bundle import Bundle, load_bundle
from toolchain.formats.loading import events_of
from toolchain.player.opening import open_engine, signatures
from toolchain.system.store import key_of

LEFT_OUT = ("accuracy", "quantization", "activations", "goldens", "files", "sha256", "bytes", "structure")
"""Compared by themselves, or no difference of their own."""
MISSING = "-"


@dataclass(frozen=True)
class Difference:
    """A key of the manifest that differs, with both values; :data:`MISSING` where there is none."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class BlockDifference:
    """A block of both bundles. ``outputs`` is the relative error of B's artifact against A's on A's goldens, by
    function, or None where they cannot be compared, ``reason`` saying why."""

    block: str
    a_bytes: int
    b_bytes: int
    same: bool
    a_error: float | None
    b_error: float | None
    a_price: float | None
    b_price: float | None
    """What quantization costs."""
    outputs: dict[str, float] | None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """What differs between two bundles."""

    a: Path
    b: Path
    differences: tuple[Difference, ...]
    blocks: tuple[BlockDifference, ...]

    @property
    def same(self) -> bool:
        return not self.differences and all(b.same for b in self.blocks)


def compare_bundles(a: Bundle | str | Path, b: Bundle | str | Path) -> Comparison:
    """Compare two bundles; artifacts whose files differ are both executed on A's goldens.

    Raises:
        BundleError: one of them is damaged.
    """
    first, second = (x if isinstance(x, Bundle) else load_bundle(x) for x in (a, b))
    for bundle in (first, second):
        bundle.check_files()
    left, right = (_plain(x.manifest) for x in (first, second))
    return Comparison(first.path, second.path, tuple(_differences("", left, right)), tuple(_blocks(first, second)))


def _plain(manifest: m.Manifest) -> dict[str, Any]:
    """A manifest without what is compared by itself, blocks by their names."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in LEFT_OUT}
        if isinstance(value, list) and value and all(isinstance(v, dict) and "name" in v for v in value):
            return {v["name"]: clean(v) for v in value}
        return value

    data: dict[str, Any] = clean(manifest.model_dump(mode="json"))
    plan, made = manifest.loading.plan, manifest.loading.made_from
    data["loading"]["plan"] = f"{sum(1 for _ in events_of(plan))} events, {key_of(dict(plan))[:8]}"
    if made is not None:
        data["loading"]["made_from"] |= {"run": key_of(dict(made.run))[:8]}
    return data


def _differences(key: str, a: Any, b: Any) -> Iterator[Difference]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys((*a, *b)):
            yield from _differences(f"{key}.{name}" if key else name, a.get(name, MISSING), b.get(name, MISSING))
    elif a != b:
        yield Difference(key, a, b)


def _blocks(first: Bundle, second: Bundle) -> Iterator[BlockDifference]:
    for component in first.manifest.components.keys() & second.manifest.components.keys():
        others = {b.name: b for b in second.manifest.components[component].blocks}
        for block in first.manifest.components[component].blocks:
            if block.name in others:
                yield _block(first, second, component, block, others[block.name])


def _block(first: Bundle, second: Bundle, component: str, a: m.BlockEntry, b: m.BlockEntry) -> BlockDifference:
    same = [f.sha256 for f in a.files] == [f.sha256 for f in b.files]
    outputs, reason = None, ""
    if not same:
        try:
            outputs = _outputs(first, second, component, a, b)
        except SoraCompileError as e:
            reason = str(e)
    a_bytes, b_bytes = (sum(f.bytes for f in x.files) for x in (a, b))
    return BlockDifference(
        f"{component}/{a.name}",
        a_bytes,
        b_bytes,
        same,
        a_error=_worst(a.accuracy),
        b_error=_worst(b.accuracy),
        a_price=_worst(a.quantization),
        b_price=_worst(b.quantization),
        outputs=outputs,
        reason=reason,
    )


def _worst(figures: Mapping[str, m.Accuracy] | None) -> float | None:
    return max((x.relative_error for x in (figures or {}).values()), default=None)


def _outputs(first: Bundle, second: Bundle, component: str, a: m.BlockEntry, b: m.BlockEntry) -> dict[str, float]:
    """Relative error of B's artifact against A's, by function, on A's goldens."""
    like = [x for x in (a, *first.manifest.components[component].blocks) if x.structure == a.structure]
    own = next((x for x in like if x.goldens is not None), None)  # inputs of one structure do for all of it
    if own is None or own.goldens is None:
        raise BundleError(f"'{first.path}' has no goldens for this block")
    ports = signatures(a)
    if {f: s.names() for f, s in ports.items()} != {f: s.names() for f, s in signatures(b).items()} or any(
        [p.shape for p in (*x.inputs, *x.outputs)] != [p.shape for p in (*y.inputs, *y.outputs)]
        for x, y in zip(ports.values(), signatures(b).values(), strict=True)
    ):
        raise BundleError("their functions or shapes differ")
    engines = [open_engine(first, component, a), open_engine(second, component, b)]
    path = first.path / own.goldens.path
    return {f: goldens.relative_error_between(path, ports[f], f, *engines) for f in own.accuracy or ()}
