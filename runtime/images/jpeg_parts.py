"""How many parts a JPEG has, before a decoder meets them: a few bytes each are enough to keep one busy for hours."""

from __future__ import annotations

import re

MOST_PARTS, MOST_SCANS = 1000, 100  # segments, scans among them; programs write a dozen scans
MOST_JUNK = 2**16  # bytes between segments
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
BARE = frozenset((0x01, 0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)))  # after which no length follows
SCAN, END = 0xDA, 0xD9


def is_endless(file: bytes) -> bool:
    """Tell whether a file is a JPEG of more parts than any picture has, of which each is worked through anew.

    Only the first picture of a file is looked at, which is all that is decoded.
    """
    place, parts, scans, junk = 2, 0, 0, 0
    if not file.startswith(b"\xff\xd8\xff"):
        return False
    while (found := MARKER.search(file, place)) is not None:
        kind, after = found[1][0], found.end()
        junk += 0 if scans else found.start() - place  # of a scan, it is the pixels
        if scans and kind == END:
            return False
        parts, scans = parts + 1, scans + (kind == SCAN)
        if parts > MOST_PARTS or scans > MOST_SCANS or junk > MOST_JUNK:
            return True
        place = after if kind in BARE else after + max(2, int.from_bytes(file[after : after + 2], "big"))
    return not scans and len(file) - place > MOST_JUNK
