"""Lower once, stamp the rest: templates of the structures that several blocks share.

Lowering never sees the user's weights here: a template is built with unique random ones, and each block's
tensors are written into a copy of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from toolchain.blocks import Block
from toolchain.listener import Listener
from toolchain.target import Artifact, Target, Template, UnboundTemplateError, unique_weights


class Templates:
    """Turns blocks into artifacts. A structure that only one block has is lowered directly.

    Args:
        blocks: all blocks that will be built.
        scratch: folder for templates; removed by whoever made it.
        direct: lower every block by itself, which is the reference for stamping.
    """

    def __init__(
        self, target: Target, blocks: Sequence[Block], scratch: Path, listener: Listener, direct: bool
    ) -> None:
        self._target, self._scratch, self._listener = target, scratch, listener
        self._uses = Counter(b.structure() for b in blocks)
        self._direct = direct
        self._templates: dict[str, Template | None] = {}

    def build(self, block: Block, weights: Mapping[str, torch.Tensor], out: Path) -> Artifact:
        """The artifact of ``block`` at ``out``.

        Raises:
            LoweringError: as :meth:`toolchain.target.Target.lower`.
        """
        structure = block.structure()
        if self._direct or self._uses[structure] == 1:
            return self._target.lower(block, weights, out)
        if structure not in self._templates:
            self._templates[structure] = self._template(block, structure)
        template = self._templates[structure]
        if template is None:
            return self._target.lower(block, weights, out)
        return self._target.stamp(template, weights, out)

    def _template(self, block: Block, structure: str) -> Template | None:
        weights = unique_weights(block)
        artifact = self._target.lower(block, weights, self._scratch / f"{structure}{self._target.suffix}")
        try:
            return self._target.bind(artifact, weights)
        except UnboundTemplateError as e:
            self._listener.remark(f"block '{block.name}' and its like are lowered one by one: {e}")
            return None
