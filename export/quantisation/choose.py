"""Level by level: as much in 8 bits as loses no more than is allowed; what loses too much stays in float16."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from latentrt.engines.bundle.quantisation import QuantisedLevel
from latentrt.export.quantisation.levels import Level

Loss = Callable[[Collection[str]], float]
"""(names of nodes) -> what is lost with these in 8 bits"""


def choose_nodes(levels: Sequence[Level], loss: Loss, *, most: float) -> tuple[list[str], tuple[QuantisedLevel, ...]]:
    """Return the nodes that go into 8 bits, and what became of each level.

    most: what may be lost by all of them together
    """
    chosen, told, now = list[str](), list[QuantisedLevel](), 0.0
    for level in levels:
        whole = loss([*chosen, *level.nodes])
        kept, lost = ((), whole) if whole <= most else _blocks_to_keep(level, chosen, now, loss, most)
        blocks = level.blocks
        taken = [node for block, nodes in blocks.items() if block not in kept for node in nodes]
        chosen += taken
        now = lost
        told.append(
            QuantisedLevel(
                name=level.name, nodes=len(taken), of=len(level.nodes), noise=now, whole=whole, kept=tuple(kept)
            )
        )
    return chosen, tuple(told)


def _blocks_to_keep(
    level: Level, chosen: Sequence[str], now: float, loss: Loss, most: float
) -> tuple[tuple[str, ...], float]:
    """Return the blocks of a level that stay in float16, and what is lost by the others with all chosen before.

    Each block is tried alone: those that add least come first, for as long as their squares, which add up, allow it.
    """
    blocks = level.blocks
    alone = {block: loss([*chosen, *nodes]) for block, nodes in blocks.items()}
    order = sorted(blocks, key=alone.__getitem__)
    taken, power = list[str](), now**2
    for block in order:
        power += max(alone[block] ** 2 - now**2, 0.0)
        if not math.isfinite(power) or math.sqrt(power) > most:
            break
        taken.append(block)
    while taken:
        lost = loss([*chosen, *(node for block in taken for node in blocks[block])])
        if lost <= most:
            return tuple(block for block in blocks if block not in taken), lost
        taken.pop()
    return tuple(blocks), now
