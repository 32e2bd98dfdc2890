"""A tiny T5 encoder and its tokenizer, in the layout of SD 3's third text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What its vocabulary is learned from; the words of the other tests are in it.
SENTENCES = (
    "a red circle on a blue square",
    "a photograph of an old lighthouse at dusk, soft light, 35mm film",
    "the quick brown fox jumps over the lazy dog",
    "masterpiece, best quality, intricate detail, 8k",
    "zwei rote Kreise auf einem grünen Hügel, café à la crème, niño",
    "it's the keeper's dog, isn't it? yes! no... (maybe) [sign] #1 & 50%",
)
SIZES: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
    "use_cache": False,
}
VOCABULARY = 300


def save_t5(folder: Path, *, seed: int = 0, loudness: float = 1.0, **sizes: Any) -> Path:
    """Save a tiny T5 encoder. Returns the folder.

    loudness: what the weights that lead into the residual stream are multiplied by, embeddings included: the norms
        that follow leave nothing of it
    sizes: what differs from SIZES
    """
    import torch
    from transformers import T5Config, T5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = T5EncoderModel(T5Config(**{"vocab_size": VOCABULARY, **SIZES, **sizes})).eval()
        with torch.no_grad():
            model.shared.weight *= loudness
            for block in model.encoder.block:
                block.layer[0].SelfAttention.o.weight *= loudness
                block.layer[1].DenseReluDense.wo.weight *= loudness
            for name, weight in model.named_parameters():
                if "layer_norm" in name:
                    weight += 0.1 * torch.randn(weight.shape)
    model.save_pretrained(folder)
    return folder


def save_unigram(folder: Path, *, normalised: bool = True) -> Path:
    """Learn a unigram vocabulary and save it as tokenizer.json, as T5's is published. Returns the folder.

    normalised: whether it has a normalizer, which transformers 5 does not read
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    if normalised:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY - 20, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in range(3)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=True)
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 3,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
