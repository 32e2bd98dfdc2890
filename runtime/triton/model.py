"""The model that Triton's Python backend runs: one batcher for each instance, and answers as they come.

Triton imports it in a process of its own, through the model.py of a repository; nothing else can.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import triton_python_backend_utils as triton

from latentrt.engines.errors import LatentrtError, RequestError
from latentrt.engines.spec import Array
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.serve.options import ServeOptions
from latentrt.runtime.stored import fetch_missing
from latentrt.runtime.triton.answer import Answer
from latentrt.runtime.triton.repository import BUNDLE, ModelOptions
from latentrt.runtime.triton.tensors import Asked, read

LOOK_EVERY_S = 0.05  # at clients that may be gone while their pictures wait; those that are drawn are asked each stage


class TritonPythonModel:
    """What Triton calls: `initialize`, then `execute` for each call, and `finalize`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle beside this version's model.py and draw once, so that a model that is ready has drawn."""
        from latentrt.runtime.batching.batcher import Batcher, BatcherOptions

        try:
            options = _options(args)
            (bundle,) = (Path(args["model_repository"]) / args["model_version"] / BUNDLE).iterdir()
            self._pipe = _load(bundle, options, args)
        except LatentrtError as error:
            raise triton.TritonModelException(str(error)) from error
        self._batcher = Batcher(
            self._pipe, BatcherOptions(slots=options.slots, waiting=options.waiting, slo=options.slo)
        )
        self._serving = ServeOptions(loras=None if options.loras is None else Path(options.loras))
        self._open = set[Answer]()
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrt-send")
        self._ended = threading.Event()
        self._looking = threading.Thread(target=self._look_after_all, name="latentrt-look", daemon=True)
        self._looking.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Have calls drawn. Their answers come from other threads, later."""
        for request in requests:
            self._begin(request)

    def _begin(self, request: Any) -> None:
        sender = _Sender(request.get_response_sender())

        def array_of(name: str) -> Array | None:
            tensor = triton.get_input_tensor_by_name(request, name)
            return None if tensor is None else np.asarray(tensor.as_numpy())

        answer = Answer(sender, self._beside, done=self._open.discard)
        self._open.add(answer)
        try:
            asked = read(array_of, self._serving)
            self._check_preview(asked)
            answer.begin(asked, self._batcher)
        except Exception as error:
            answer.fail(error)

    def _check_preview(self, asked: Asked) -> None:
        if asked.partials and self._pipe.manifest.latents.preview is None:
            raise RequestError("partial_images: this bundle has no latent preview; export the checkpoint again")

    def _look_after_all(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            for answer in list(self._open):
                answer.look_after()

    def finalize(self) -> None:
        """Draw what was accepted, and close everything."""
        self._batcher.drain()
        self._ended.set()
        self._looking.join()
        self._beside.shutdown()
        self._batcher.close()
        self._pipe.close()


class _Sender:
    """Triton's response sender."""

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, outputs: Mapping[str, bytes]) -> None:
        tensors = [triton.Tensor(name, np.array([value], dtype=np.object_)) for name, value in outputs.items()]
        self._sender.send(triton.InferenceResponse(output_tensors=tensors))

    def fail(self, sentence: str, code: str) -> None:
        error = triton.TritonError(sentence, getattr(triton.TritonError, code))
        self._sender.send(triton.InferenceResponse(error=error), flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def end(self) -> None:
        self._sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def _options(args: Mapping[str, str]) -> ModelOptions:
    """Return what config.pbtxt tells the model."""
    parameters = json.loads(args["model_config"])["parameters"]
    told = {name: value["string_value"] for name, value in parameters.items() if name in ModelOptions.__struct_fields__}
    try:
        return msgspec.convert(told, ModelOptions, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(f"config.pbtxt, parameters: {error}") from None


def _load(bundle: Path, options: ModelOptions, args: Mapping[str, str]) -> Pipeline:
    on_gpu = args["model_instance_kind"] == "GPU"
    device = int(args["model_instance_device_id"]) if on_gpu else 0
    backend = "cpu" if options.backend == "auto" and not on_gpu else options.backend
    if options.store is not None:
        fetch_missing(bundle, backend, store=options.store, device=device)
    return Pipeline.load(bundle, backend, device=device, threads=options.threads, warm_up=True)
