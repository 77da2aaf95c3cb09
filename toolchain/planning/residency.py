"""Which blocks stay in memory: Concurrent Inference with Dynamic Loading's residency (On-device Sora).

Blocks run one after the other, so one block's weights and the next one's, loaded meanwhile, are needed at
any time, and the activations of the one that runs; what the budget leaves is given to the leading blocks of the
denoising step, which then are not read again at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from toolchain.errors import RecipeError
from toolchain.ir.blocks import Block
from toolchain.planning.memory import BlockMemory


def resident_blocks(
    blocks: Sequence[Block], memory: Mapping[str, BlockMemory], budget_bytes: int | None, component: str
) -> list[str]:
    """Names of the blocks to keep loaded between runs.

    Without a budget all blocks are kept. With one, blocks that run once for a prompt are not kept, and of
    the others all if they fit beside the largest activations, else as many leading ones as fit beside these and the
    two largest blocks.

    Raises:
        RecipeError: the budget does not even hold the two largest blocks and the largest activations; names the
            block and the function that need most.
    """
    if budget_bytes is None:
        return [b.name for b in blocks]
    size = {b.name: memory[b.name].weights for b in blocks}
    demanding = max(blocks, key=lambda b: memory[b.name].activations).name
    activations = memory[demanding].activations
    weights = sum(sorted(size.values(), reverse=True)[:2])
    needed = weights + activations
    if needed > budget_bytes:
        raise RecipeError(
            f"memory_budget: {component} needs {needed / 1e6:.1f} MB: {weights / 1e6:.1f} MB for the weights of the "
            f"block that runs and the next, {activations / 1e6:.1f} MB for the activations of '{demanding}', function "
            f"'{memory[demanding].function}'; more than {budget_bytes / 1e6:.1f} MB: cut smaller blocks "
            "(partition: {max_bytes: …}), make a smaller video, or raise it"
        )
    repeated = [b for b in blocks if b.rate != "prompt"]
    if sum(size[b.name] for b in repeated) + activations <= budget_bytes:
        return [b.name for b in repeated]
    kept: list[str] = []
    room = budget_bytes - needed
    for block in repeated:
        if size[block.name] > room:
            break
        room -= size[block.name]
        kept.append(block.name)
    return kept
