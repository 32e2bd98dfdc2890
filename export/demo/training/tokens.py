"""The tokenizer of the demo checkpoint: byte-level CLIP pairs learned from the words of its prompts."""

from __future__ import annotations

from itertools import pairwise

from transformers import CLIPTokenizer

CONTEXT = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(prompts: list[str]) -> CLIPTokenizer:
    """Make every word of the prompts one token; all other Unicode text falls back to bytes."""
    words = sorted({word for prompt in prompts for word in prompt.replace(",", " , ").split()})
    merges = _learn_merges(words)
    letters = _byte_letters()
    entries = [*letters, *(f"{letter}</w>" for letter in letters)]
    entries += [left + right for left, right in merges]
    entries = [*dict.fromkeys(entries), START, END]
    return CLIPTokenizer(
        vocab={entry: number for number, entry in enumerate(entries)},
        merges=merges,
        model_max_length=CONTEXT,
    )


def _byte_letters() -> list[str]:
    """One printable letter for each of the 256 bytes, as in GPT-2: its own where there is one."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return [chr(byte) for byte in own] + [chr(256 + k) for k in range(len(others))]


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merge the most frequent neighbours until every word is one piece."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in split):
        counts: dict[tuple[str, str], int] = {}
        for pieces in split:
            for pair in pairwise(pieces):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=lambda pair: counts[pair])
        merges.append(best)
        split = [_merge(pieces, best) for pieces in split]
    return merges


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
