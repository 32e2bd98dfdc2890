"""Makes tests/data/compel.safetensors: what compel makes of weighted prompts with the demo's text encoder.

pip install --no-deps --target COMPEL compel==2.5.1 'pyparsing>=3,<4'
PYTHONPATH=COMPEL python tests/compel_golden.py tests/data/compel.safetensors

compel is given segments and weights, so that its own syntax plays no part. Its default for weights below 1 masks words
in the attention, which exported encoders cannot do; REMOVE is its other way, and is what the runtime implements.
"""

from __future__ import annotations

import json
import sys

CASES: dict[str, list[tuple[str, float]]] = {
    "a large red circle on a plain blue background": [("a large red circle on a plain blue background", 1.0)],
    "a large (red:1.4) circle on a plain blue background": [
        ("a large ", 1.0),
        ("red", 1.4),
        (" circle on a plain blue background", 1.0),
    ],
    "a (large red:0.6) circle": [("a ", 1.0), ("large red", 0.6), (" circle", 1.0)],
    "[a small green star] on a (striped:1.5) (white:0.25) background": [
        ("a small green star", 0.909090909),
        (" on a ", 1.0),
        ("striped ", 1.5),
        ("white", 0.25),
        (" background", 1.0),
    ],
    "a (red:0) circle": [("a ", 1.0), ("red", 0.0), (" circle", 1.0)],
    "((a (red:0.5) circle))": [("a ", 1.21), ("red", 0.605), (" circle", 1.21)],
}


def main(file: str) -> None:
    """Encode every case and write the file."""
    from compel.embeddings_provider import DownweightMode, EmbeddingsProvider  # type: ignore[import-not-found]
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, CLIPTokenizer

    from latentrt.export.checkpoint import DEMO

    provider = EmbeddingsProvider(
        tokenizer=CLIPTokenizer.from_pretrained(DEMO / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(DEMO / "text_encoder").eval().requires_grad_(False),
        downweight_mode=DownweightMode.REMOVE,
    )
    tensors = {}
    for number, segments in enumerate(CASES.values()):
        texts, weights = zip(*segments, strict=True)
        tensors[str(number)] = provider.get_embeddings_for_weighted_prompt_fragments([list(texts)], [list(weights)])[0]
    save_file(tensors, file, metadata={"prompts": json.dumps(list(CASES)), "compel": "2.5.1, downweight mode REMOVE"})


if __name__ == "__main__":
    main(sys.argv[1])
