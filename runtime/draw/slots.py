"""Where in a workspace's model rows the pictures of some slots are: a group of rows after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import EXTRA_EMBEDDINGS
from latentrt.engines.workspace.contract import IDS, Workspace, WorkspaceShape, own_buffer


def rows_of(slots: slice, parts: int, *, shape: WorkspaceShape) -> Iterator[tuple[slice, Array]]:
    """Give the model rows of n slots, and which of the n * parts rows of an array belong there, in as few pieces.

    parts: 1 for the prompts alone, 2 with the negative prompts, 3 with the prompts again, for skip-layer guidance
    shape: of the workspace. What is for a slot is for all its rows, which are one behind another with those of the
        other slots of a video. Raises EngineError if one of the slots is not there.
    """
    count, owners = slots.stop - slots.start, shape.slot_of_row
    if slots.stop > shape.pictures:
        raise EngineError(f"slots: found {slots.start} to {slots.stop}, expected some of {shape.pictures}")
    mine = np.flatnonzero((owners >= slots.start) & (owners < slots.stop))
    own = owners[mine] - slots.start
    if len(mine) == shape.rows:
        yield slice(0, len(mine) * parts), np.concatenate([part * count + own for part in range(parts)])
        return
    for part in range(parts):
        start = part * shape.rows + int(mine[0])
        yield slice(start, start + len(mine)), part * count + own


def write_rows(workspace: Workspace, name: str, array: Array, slots: slice) -> None:
    """Write what the pictures in some slots have by model rows: (n, 2 n or 3 n, …), the prompts' rows first."""
    parts = len(array) // (slots.stop - slots.start)
    for rows, piece in rows_of(slots, parts, shape=workspace.shape):
        workspace.write(name, array[piece], rows)


def encode_rows(workspace: Workspace, program: str, inputs: Mapping[str, Array], slots: slice, *, parts: int) -> None:
    """Have a text encoder write the text of the pictures in some slots, where they are drawn.

    inputs: its own by name, some texts for each row, the prompts' first; parts: the groups of these, see `rows_of`
    """
    texts = len(inputs[IDS])
    each = texts // (parts * (slots.stop - slots.start))
    for rows, piece in rows_of(slots, parts, shape=workspace.shape):
        own = (piece[:, None] * each + np.arange(each)).reshape(-1)
        for name, array in inputs.items():
            workspace.write(own_buffer(program, name), array if name == EXTRA_EMBEDDINGS else array[own])
        workspace.run(program, rows)
