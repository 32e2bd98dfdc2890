"""Where in a workspace's model rows the pictures of some slots are: a group of rows after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import EXTRA_EMBEDDINGS
from latentrt.engines.workspace.contract import IDS, Workspace, own_buffer


def rows_of(slots: slice, parts: int, *, pictures: int) -> Iterator[tuple[slice, slice]]:
    """Give the model rows of n slots, and which of the n * parts rows of an array belong there, in as few pieces.

    parts: 1 for the prompts alone, 2 with the negative prompts, 3 with the prompts again, for skip-layer guidance
    pictures: how many slots there are in all
    """
    count = slots.stop - slots.start
    if count == pictures:
        yield slice(0, count * parts), slice(0, count * parts)
        return
    for part in range(parts):
        start = part * pictures + slots.start
        yield slice(start, start + count), slice(part * count, (part + 1) * count)


def write_rows(workspace: Workspace, name: str, array: Array, slots: slice) -> None:
    """Write what the pictures in some slots have by model rows: (n, 2 n or 3 n, …), the prompts' rows first."""
    parts = len(array) // (slots.stop - slots.start)
    for rows, piece in rows_of(slots, parts, pictures=workspace.shape.pictures):
        workspace.write(name, array[piece], rows)


def encode_rows(workspace: Workspace, program: str, inputs: Mapping[str, Array], slots: slice, *, parts: int) -> None:
    """Have a text encoder write the text of the pictures in some slots, where they are drawn.

    inputs: its own by name, some texts for each row, the prompts' first; parts: the groups of these, see `rows_of`
    """
    texts = len(inputs[IDS])
    each = texts // (parts * (slots.stop - slots.start))
    for rows, piece in rows_of(slots, parts, pictures=workspace.shape.pictures):
        own = slice(piece.start * each, piece.stop * each)
        for name, array in inputs.items():
            workspace.write(own_buffer(program, name), array if name == EXTRA_EMBEDDINGS else array[own])
        workspace.run(program, rows)
