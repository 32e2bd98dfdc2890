"""What a service has to offer: LoRAs by their names, and the sizes that a model's engines were built for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.engines.errors import EngineError, RequestError
from latentrt.engines.workspace.contract import WorkspaceShape
from latentrt.runtime.request import Request
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.serve.web_errors import WebError

if TYPE_CHECKING:
    from latentrt.runtime.serve.models import Model


def lora_files(options: ServeOptions) -> dict[str, Path]:
    """Return the service's LoRA files by their names, which are all that a client can ask for."""
    found = sorted(options.loras.glob("*.safetensors")) if options.loras is not None else []
    return {path.stem: path for path in found if path.is_file()}


@contextmanager
def by_name(request: Request) -> Iterator[None]:
    """Have a block's refusals call a request's LoRAs by their names: where they lie is none of a client's business."""
    try:
        yield
    except RequestError as error:
        sentence = str(error)
        for file in (Path(lora.file) for lora in request.loras):
            for told in (f"'{file}'", str(file)):
                sentence = sentence.replace(told, f"'{file.stem}'")
            sentence = sentence.replace(f"{file.parent}/", "")  # of the config of PEFT's own files
        if sentence == str(error):
            raise
        raise RequestError(sentence) from error


def check_engines(size: tuple[int, int], model: Model) -> None:
    """Refuse a size that the model's engines were not built for, and name those there are. Raises WebError."""
    loaded = model.pipe.loaded
    tokens = loaded.manifest.text_tokens(loaded.manifest.denoiser)

    def require(width: int, height: int) -> None:
        shape = WorkspaceShape(pictures=1, tokens=tokens, width=width, height=height)
        loaded.opened.require(loaded.drawing.fitting(shape))

    try:
        require(*loaded.manifest.default_size)
    except EngineError:
        return  # other engines than those that draw an ordinary picture: only drawing tells what they take
    try:
        require(*size)
    except EngineError as error:
        raise WebError(f"size: {error}", code="size_not_served", param="size") from error
