"""Decoding from latents to pixels: pieces against the frames there are, frames against what blocks take and give."""

from __future__ import annotations

from toolchain.formats.consistency.shapes import result, shape_in
from toolchain.formats.manifest import Component, Manifest, Piece, Stage
from toolchain.ir.feeds import Given


def check_decoding(manifest: Manifest) -> None:
    """Follow frames through the stages, from the geometry's latents to its pixels.

    Raises:
        ValueError: names the stage.
    """
    if manifest.decoding is None:
        return
    g, vae = manifest.geometry, manifest.components["vae"]
    frames = [g.latent_frames, g.latent_channels, g.latent_height, g.latent_width]
    stages = manifest.decoding.stages
    for i, stage in enumerate(stages):
        where = f"decoding.stages.{i}"
        frames = _Followed(where, vae, stage, frames).given("pixels" if i == len(stages) - 1 else "frames")
    wanted = [g.frames, 3, g.height, g.width]
    if frames != wanted:
        raise ValueError(f"decoding.stages: they give {frames} as frames, colors, rows, columns; by geometry, {wanted}")


class _Followed:
    """A stage, and the frames ``[T, C, H, W]`` that it is given."""

    def __init__(self, where: str, vae: Component, stage: Stage, frames: list[int]) -> None:
        self.where, self.vae, self.stage, self.frames = where, vae, stage, frames

    def given(self, gives: Given) -> list[int]:
        """Shape of what the stage gives."""
        stage, there = self.stage, self.frames[0]
        taken = sum(p.takes for p in stage.pieces)
        if not stage.pieces or not taken - stage.pieces[-1].takes < there <= taken:
            raise ValueError(f"{self.where}.pieces: they take {taken} frames in all, but there are {there}")
        rest = [self._piece(i, piece, gives) for i, piece in enumerate(stage.pieces)]
        if any(sizes != rest[0] for sizes in rest):
            raise ValueError(f"{self.where}.pieces: their frames differ in size")
        return [sum(p.gives for p in stage.pieces), *rest[0]]

    def _piece(self, place: int, piece: Piece, gives: Given) -> list[int]:
        """Channels, rows and columns of what a piece gives."""
        stage, vae, tiles, where = self.stage, self.vae, self.stage.tiles, f"{self.where}.pieces.{place}"
        inputs = [i for i in vae.inputs if i.rate == stage.rate and i.feed.kind == "frames"]
        outputs = [o for o in vae.results(gives) if o.rate == stage.rate]
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(f"{where}: the blocks of rate '{stage.rate}' do not take frames and give {gives}")
        own = [b for b in vae.blocks if b.rate == stage.rate]
        takers = [(b, p) for b in own for p in b.inputs if p.source == f"inputs.{inputs[0].name}"]
        if not takers:
            raise ValueError(f"{where}: no block takes '{inputs[0].name}'")
        taken = self._frames(shape_in(vae, *takers[0], piece.function), where)
        given = self._frames(shape_in(vae, *result(vae, outputs[0].source), piece.function), where)
        size = self.frames[2:] if tiles is None else [tiles.height, tiles.width]
        if taken != [piece.takes, self.frames[1], *size]:
            raise ValueError(
                f"{where}: '{piece.function}' takes {taken} as frames, channels, rows, columns, but is given "
                f"{[piece.takes, self.frames[1], *size]}"
            )
        # only the last one takes frames that are filled up, and gives fewer than its function does
        if piece.gives > given[0] or (piece.gives < given[0] and place < len(stage.pieces) - 1):
            raise ValueError(f"{where}.gives: {piece.gives}, but '{piece.function}' gives {given[0]} frames")
        return given[1:] if tiles is None else [given[1], *(n * tiles.scale for n in self.frames[2:])]

    def _frames(self, shape: list[int], where: str) -> list[int]:
        """A port's shape as frames, channels, rows, columns."""
        if self.stage.layout == "clip" and len(shape) == 5 and shape[0] == 1:
            return [shape[2], shape[1], *shape[3:]]
        if self.stage.layout == "frames" and len(shape) == 4:
            return shape
        raise ValueError(f"{where}: {shape} is no layout '{self.stage.layout}'")
