"""Running a bundle's artifacts against its goldens: no checkpoint, no recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolchain.accuracy import goldens
from toolchain.errors import AccuracyError, BundleError
from toolchain.formats import manifest as m
from toolchain.formats.bundle import Bundle, load_bundle
from toolchain.ir.target import Target
from toolchain.listener import Listener
from toolchain.player.opening import open_engine, signatures, target_of


@dataclass(frozen=True)
class Check:
    """A function of a block, or the whole video: what it has now, had when it was built, and must have.

    Numbers are relative errors, for the video (``block`` is ``video``) dB; then more is better.
    """

    component: str
    block: str
    function: str
    now: float
    built: float
    limit: float
    price: float | None = None
    """What quantization costs, as measured when it was built."""

    @property
    def passed(self) -> bool:
        return self.now >= self.limit if self.block == VIDEO else self.now <= self.limit


VIDEO = "video"


@dataclass(frozen=True)
class Verification:
    """What was checked. ``unchecked`` blocks have no goldens, as their structure was executed in another block."""

    bundle: Path
    checks: tuple[Check, ...]
    unchecked: tuple[str, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if not c.passed)

    def require(self) -> None:
        """Refuse a bundle of which a check failed.

        Raises:
            AccuracyError: names the first block and function that failed.
        """
        for c in self.failed:
            if c.block == VIDEO:
                where, figures, then = "golden video", f"{c.now:.3g} dB, under", ""
            else:
                where = f"{c.component}: block '{c.block}', function '{c.function}'"
                figures, then = f"relative error {c.now:.3g}, over", f"; see verify --explain {c.component}/{c.block}"
            raise AccuracyError(f"{where}: {figures} the limit {c.limit:.3g} (it was {c.built:.3g} when built){then}")


def verify(
    bundle: Bundle | str | Path, *, goldens_of: Bundle | str | Path | None = None, listener: Listener | None = None
) -> Verification:
    """Hold every file of a bundle against its digest, then execute every artifact on its goldens.

    Args:
        goldens_of: take the goldens of another bundle with the same blocks: of yesterday's build, say.
        listener: told of progress.

    Raises:
        BundleError: a file is missing or altered, or the bundle has no goldens.
        LoweringError: an artifact cannot be loaded or fails when run.
        EngineUnavailableError: this machine has no engine for the bundle's target.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    other = goldens_of if isinstance(goldens_of, Bundle) or goldens_of is None else load_bundle(goldens_of)
    listener = listener or Listener()
    bundle.check_files()
    if other is not None:
        other.check_files()
    source = other or bundle
    checks: list[Check] = []
    unchecked: list[str] = []
    for name, component in bundle.manifest.components.items():
        target = target_of(bundle.manifest, name)
        listener.start(name, [b.name for b in component.blocks])
        for block in component.blocks:
            listener.working(name, block.name, "execute")
            golden = _of(source, name, block)
            if golden.goldens is None or golden.accuracy is None:
                unchecked.append(f"{name}/{block.name}")
            else:
                checks += _block(bundle, name, block, target, golden, source.path / golden.goldens.path)
            listener.finished(name, block.name, None)
    if not checks:
        raise BundleError(
            f"'{source.path}' has no goldens, since nothing was executed when it was built "
            f"(gate: {source.manifest.gate.mode}); its files are whole"
        )
    video = source.manifest.golden
    if video is not None:
        from toolchain.accuracy.golden_video import compare

        found = compare(bundle, video, source.path)
        checks.append(Check("pipeline", VIDEO, "", float(f"{found:.4g}"), video.psnr_db, video.limit_db))
    return Verification(bundle.path, tuple(checks), tuple(unchecked))


def _of(source: Bundle, component: str, block: m.BlockEntry) -> m.BlockEntry:
    """The block of another bundle that stands for ``block``.

    Raises:
        BundleError: it has none, or one with other functions or shapes.
    """
    blocks = source.manifest.components[component].blocks if component in source.manifest.components else []
    for found in blocks:
        if found.name == block.name and signatures(found) == signatures(block):
            return found
    raise BundleError(f"'{source.path}' has no goldens for {component}/{block.name}: its blocks or shapes are others")


def _block(
    bundle: Bundle, component: str, block: m.BlockEntry, target: Target, golden: m.BlockEntry, path: Path
) -> Iterator[Check]:
    assert golden.accuracy is not None
    engine = open_engine(bundle, component, block, target)
    for function, found in goldens.run(path, signatures(block), list(golden.accuracy), engine, 0.0).items():
        built = golden.accuracy[function]
        price = golden.quantization[function].relative_error if golden.quantization else None
        yield Check(component, block.name, function, found.relative_error, built.relative_error, built.limit, price)
