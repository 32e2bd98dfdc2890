"""Tables that commands write into the pages, each between two marks: `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import re


def place(page: str, name: str, table: str) -> str:
    """Return a page with a table between the two marks of its place."""
    return re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}\n{table.rstrip()}\n\n{m[2]}", page, flags=re.S
    )
