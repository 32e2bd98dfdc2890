"""Writes tests/data/sentencepiece.json: a small model that sentencepiece trained, as tokenizer.json, and its own ids.

    pip install sentencepiece   # 0.2.2, beside the packages of pyproject.toml
    python -m tests.sentencepiece_golden

Its normalizer is a table of sentencepiece's, with a few of NFKC's rules.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from latentrt.export.sources.unigram import PROMPTS, read_unigram
from tests.tiny_t5 import SENTENCES

TARGET = Path(__file__).parent / "data" / "sentencepiece.json"
RULES = {"ﬁ": "fi", "①": "1", "Ａ": "A", "\u00a0": " ", "\t": " ", "\n": " ", "²": "2", "e\u0301": "é", "\u200b": ""}
TEXTS = (*PROMPTS, *SENTENCES, "ﬁne ① Ａbc cafe\u0301  x", "it's 50%\u200b off\u00a0²", "a\tb\nc", "  ", "x" * 40)


def main() -> None:
    """Train, convert and record."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
        rules = (f"{_points(old)}\t{_points(new)}\n" for old, new in RULES.items())
        (folder / "rules").write_text("".join(rules), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus"),
            model_prefix=str(folder / "spiece"),
            vocab_size=230,
            model_type="unigram",
            normalization_rule_tsv=str(folder / "rules"),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            character_coverage=1.0,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
        document = {
            "sentencepiece": sentencepiece.__version__,
            "tokenizer": json.loads(read_unigram(folder).content),
            "ids": [[text, processor.encode(text)] for text in TEXTS],
        }
    TARGET.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


def _points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


if __name__ == "__main__":
    main()
