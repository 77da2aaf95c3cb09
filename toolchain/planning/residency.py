"""Which blocks stay in memory: Concurrent Inference with Dynamic Loading's residency (On-device Sora).

Blocks run one after the other, so one block's weights and the next one's, loaded meanwhile, are needed at
any time; what the budget leaves is given to the leading blocks of the denoising step, which then are not
read again at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from toolchain.errors import RecipeError
from toolchain.ir.blocks import Block


def resident_blocks(blocks: Sequence[Block], budget_bytes: int | None, component: str) -> list[str]:
    """Names of the blocks to keep loaded between runs, by the bytes of their weights.

    Without a budget all blocks are kept. With one, blocks that run once for a prompt are not kept, and of
    the others all if they fit, else as many leading ones as fit beside the two largest.

    Raises:
        RecipeError: the budget does not even hold the two largest blocks.
    """
    if budget_bytes is None:
        return [b.name for b in blocks]
    size = {b.name: b.weight_bytes for b in blocks}
    needed = sum(sorted(size.values(), reverse=True)[:2])
    if needed > budget_bytes:
        raise RecipeError(
            f"memory_budget: {component} needs {needed / 1e6:.1f} MB for the block that runs and the next, "
            f"more than {budget_bytes / 1e6:.1f} MB; cut smaller blocks (partition: {{max_bytes: …}}) or raise it"
        )
    kept: list[str] = []
    repeated = [b for b in blocks if b.rate != "prompt"]
    if sum(size[b.name] for b in repeated) <= budget_bytes:
        return [b.name for b in repeated]
    room = budget_bytes - needed
    for block in repeated:
        if size[block.name] > room:
            break
        room -= size[block.name]
        kept.append(block.name)
    return kept
