"""T5's tokenizer: the published tokenizer.json as it is, and tokens of real prompts for the golden inputs."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.engines.bundle.manifest import TokenizerSpec
from latentrt.engines.errors import CheckpointError, NotInstalledError, library_failed
from latentrt.export.sources.diffusers_folder import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE, SENTENCEPIECE = "tokenizer.json", "spiece.model"
LONGEST = 512  # tokens that its text encoder was trained on
MARKS = {"eos_token": "</s>", "pad_token": "<pad>"}
# What its text encoder is shown at export: weights that reach far for one token do so where it is in a sentence. Of
# the kinds that people write: a paragraph, nothing, signs and numbers, words of other languages.
PROMPTS = (
    "A cinematic photograph of an old lighthouse keeper standing on wet black rocks at dusk, wearing a heavy yellow "
    "raincoat and holding a brass lantern whose warm light falls on his weathered face, while behind him enormous "
    "waves break against the white tower and a flock of seagulls circles below dark storm clouds; the lighthouse beam "
    "cuts through the rain towards a small fishing boat far out on the grey-green sea. In the foreground there are "
    "coiled ropes, a broken lobster trap, orange buoys and a sleeping grey cat under an overturned wooden boat. The "
    "style is that of a 1970s film still: shot on 35mm with shallow depth of field, soft grain, muted teal and amber "
    'colours, volumetric light, intricate detail, and a sign on the door that reads "Closed until the storm is '
    "over, please ring the bell!\" in hand-painted letters. The keeper's dog, a brown and white spaniel, looks "
    "straight into the camera. It is raining hard, the stones shine, and the smoke from the chimney of the cottage is "
    "torn away by the wind before it can rise above the roof, where two children look out of the upper window.",
    "",
    "masterpiece, best quality, 8k, 1girl, solo, (blue eyes:1.2), long hair, #anime, 50% off @ $19.99 & more... "
    'f/1.8, 4:3, "HELLO WORLD" [sign] -- v2.0_final!!! <html> \\o/ 3d render; octane',
    "Ein roter Fuchs sitzt auf einem grünen Hügel, une montagne enneigée à l'arrière-plan, un château très ancien, "
    "niño pequeño con sombrero, 美しい桜, красный круг",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnigramTokenizer:
    """A unigram tokenizer as it was published. max_length: with the end token, of the longest row"""

    content: bytes
    tokenizer: Tokenizer
    config: dict[str, Any]
    max_length: int
    end_id: int
    pad_id: int

    def write(self, root: Path, relative: str) -> TokenizerSpec:
        """Write tokenizer.json at root/relative and return what the manifest says about it."""
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return TokenizerSpec(
            file=relative, max_length=self.max_length, begin_id=None, end_id=self.end_id, pad_id=self.pad_id
        )

    def write_files(self, folder: Path) -> None:
        """Write the files that transformers reads, for other tools that open the bundle."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.content)
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config, indent=1), encoding="utf-8")

    def dimensions(self) -> dict[str, int]:
        """Name the id that golden inputs are filled up with."""
        return {"text_padding": self.pad_id}

    def texts(self) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of prompts of several kinds, each with its end."""
        return tuple(tuple(self.tokenizer.encode(prompt).ids) for prompt in PROMPTS)


def read_unigram(folder: Path, *, rows: int | None = None) -> UnigramTokenizer:
    """Read a folder with tokenizer.json, or with a model of sentencepiece that transformers can turn into one.

    rows: how many tokens the text encoder has vectors for; None if it is not known
    Raises CheckpointError.
    """
    from tokenizers import Tokenizer

    for path in sorted(folder.glob("*.json")):  # the library's own words name neither the file nor how to fix it
        read_json(path)
    content = _content(folder)
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.encode("a")  # it may be read, and fail then
    except BaseException as error:  # the library raises bare Exception
        if not library_failed(error):
            raise
        raise CheckpointError(f"{folder / FILE} is not a tokenizer ({error}); download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if json.loads(content)["model"].get("type") != "Unigram":
        raise CheckpointError(f"{folder / FILE} is not a unigram tokenizer, as T5's is; download the whole checkpoint")
    config = _config(folder)
    end, pad = (_id(folder, tokenizer, _name(config.get(role) or word)) for role, word in MARKS.items())
    _require_end(folder, tokenizer, end)
    _require_rows(folder, tokenizer, rows)
    return UnigramTokenizer(
        content=content,
        tokenizer=tokenizer,
        config={**config, "tokenizer_class": "T5TokenizerFast"},
        max_length=_max_length(config),
        end_id=end,
        pad_id=pad,
    )


def _content(folder: Path) -> bytes:
    if (folder / FILE).is_file():
        return (folder / FILE).read_bytes()
    if not (folder / SENTENCEPIECE).is_file():
        raise CheckpointError(f"{folder} holds neither {FILE} nor {SENTENCEPIECE}; add one of them")
    if importlib.util.find_spec("sentencepiece") is None:
        raise NotInstalledError(
            f"{folder} has no {FILE}, and its {SENTENCEPIECE} is read by sentencepiece, which is not installed",
            install="pip install sentencepiece",
        )
    from transformers import T5TokenizerFast

    try:
        read = T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a damaged file or a missing library leads to
        raise CheckpointError(
            f"{folder} holds a tokenizer only as {SENTENCEPIECE}, which transformers cannot read "
            f"({' '.join(str(error).split())[:200]}); add the checkpoint's {FILE} beside it"
        ) from None
    return str(read.backend_tokenizer.to_str(pretty=False)).encode()


def _config(folder: Path) -> dict[str, Any]:
    files = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    return {key: value for path in files if path.is_file() for key, value in read_json(path).items()}


def _name(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _id(folder: Path, tokenizer: Tokenizer, word: str) -> int:
    found = tokenizer.token_to_id(word)
    if found is None:
        raise CheckpointError(
            f"{folder}: the tokenizer has no token '{word}', which its config names; download it again"
        )
    return found


def _require_end(folder: Path, tokenizer: Tokenizer, end: int) -> None:
    """Refuse a tokenizer that puts anything but its end around a text."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    if whole != [*plain, end]:
        raise CheckpointError(
            f"{folder / FILE}: found the tokens {whole} for 'a', expected {[*plain, end]}, with its end and no begin; "
            "other tokenizers are not supported"
        )


def _require_rows(folder: Path, tokenizer: Tokenizer, rows: int | None) -> None:
    word, largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if rows is not None and largest >= rows:
        raise CheckpointError(
            f"{folder}: the word '{word}' has the id {largest} and the text encoder has vectors for {rows} tokens "
            "(vocab_size); give the text encoder that was saved with this tokenizer"
        )


def _max_length(config: dict[str, Any]) -> int:
    length = config.get("model_max_length")
    return min(length, LONGEST) if isinstance(length, int) and length > 1 else LONGEST
