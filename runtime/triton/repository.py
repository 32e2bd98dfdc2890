"""A model of Triton's Python backend on disk: its configuration, its code, and the bundle that it draws from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec

from latentrt.engines.bundle.files import Bundle, check_file, disk_errors, inside
from latentrt.engines.bundle.manifest import ENGINE_RECORD, MANIFEST
from latentrt.engines.bundle.staging import publish, staged
from latentrt.engines.errors import RequestError
from latentrt.runtime.draw.job import require_pictures
from latentrt.runtime.triton.tensors import INPUTS, NEEDED, OUTPUTS, Tensor

CONFIG, CODE, BUNDLE = "config.pbtxt", "model.py", "bundle"
MODEL, CLASS = "latentrt.runtime.triton.model", "TritonPythonModel"
SOURCE = f'"""Written by latentrt export-triton."""\n\nfrom {MODEL} import {CLASS}\n\n__all__ = ["{CLASS}"]\n'


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the model is told in its configuration.

    backend: as in `Pipeline.load`; device_kind: KIND_CPU, KIND_GPU (an instance for each GPU) or KIND_AUTO
    slots, waiting, slo: as in `BatcherOptions`, for each instance
    threads: of the CPU that an instance may use; None for the backend's own choice
    store: a URL from which engines come that the bundle does not hold for a machine; None for no such
    loras: a folder of the server with safetensors files that calls may name; None for no LoRAs
    """

    backend: str = "auto"
    device_kind: str = "KIND_AUTO"
    slots: int = 8
    waiting: int = 64
    slo: float | None = None
    threads: int | None = None
    store: str | None = None
    loras: str | None = None


def write_model(
    bundle: Path,
    repository: Path,
    options: ModelOptions,
    *,
    name: str | None = None,
    version: int = 1,
    link: bool = False,
    force: bool = False,
) -> Path:
    """Put a bundle into a repository as a version of a model; return the model's directory. In one step, or not at all.

    name: the model's; None for the bundle's own
    link: point to the bundle where it is, instead of copying the files that it names
    force: replace a model that is there, all its versions included. Without it, a further version is added to a model
        of the same configuration, and nothing is replaced
    Raises RequestError and BundleError.
    """
    opened = Bundle.open(bundle)
    require_pictures(opened.manifest)
    target = repository / _checked(name or opened.name)
    with staged(target, "triton") as directory:
        _refuse(target, opened, version, options, force=force)
        with disk_errors(target):
            shutil.rmtree(directory)  # what a killed process left
            directory.mkdir()
            _fill(directory, opened, version, options, link=link, name=target.name)
        if target.exists() and not force:
            publish(directory / str(version), target / str(version))
            shutil.rmtree(directory)
        else:
            publish(directory, target, overwrite=force)
    return target


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name, flags=re.ASCII):
        raise RequestError(f"name: found '{name}', expected letters, digits, _, . and -, as in shapes-fp16")
    return name


def _refuse(target: Path, bundle: Bundle, version: int, options: ModelOptions, *, force: bool) -> None:
    """Raise RequestError where something is in the way."""
    if target.is_symlink() or (target.exists() and not (target / CONFIG).is_file()):
        raise RequestError(f"repository: '{target}' is no model of Triton's; choose another --name")
    if bundle.root.resolve().is_relative_to(target.resolve()):
        raise RequestError(f"bundle: '{bundle.root}' is part of the model '{target}'; name its source")
    if force or not target.exists():
        return
    if (target / str(version)).exists():
        raise RequestError(
            f"repository: '{target}' has a version {version}; add another with --model-version, or pass --force"
        )
    if (target / CONFIG).read_text(encoding="utf-8") != config(target.name, options):
        raise RequestError(f"repository: '{target}' has another configuration; choose another --name, or pass --force")


def _fill(directory: Path, bundle: Bundle, version: int, options: ModelOptions, *, link: bool, name: str) -> None:
    own = directory / str(version)
    place = own / BUNDLE / bundle.name
    place.parent.mkdir(parents=True)
    if link:
        place.symlink_to(bundle.root.resolve(), target_is_directory=True)
    else:
        _copy(bundle, place)
    (own / CODE).write_text(SOURCE, encoding="utf-8")
    (directory / CONFIG).write_text(config(name, options), encoding="utf-8")


def _copy(bundle: Bundle, target: Path) -> None:
    """Copy what a bundle and its engines name, after comparing it with its record."""
    for name in bundle.manifest.files:
        _copy_file(bundle.path(name, check="hash"), target / name)
    _copy_file(inside(bundle.root, MANIFEST), target / MANIFEST)
    for directory, record in bundle.engine_directories().items():
        there = target / "engines" / directory.name
        for name, file in record.files.items():
            _copy_file(check_file(directory, name, file, check="hash"), there / name)
        _copy_file(inside(directory, ENGINE_RECORD), there / ENGINE_RECORD)


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def config(name: str, options: ModelOptions) -> str:
    """Return config.pbtxt, in protobuf's text format."""
    inputs = [_tensor(one, tensor, optional=one != NEEDED) for one, tensor in INPUTS.items()]
    outputs = [_tensor(one, tensor) for one, tensor in OUTPUTS.items()]
    told = {key: value for key, value in msgspec.to_builtins(options).items() if value is not None}
    parameters = [
        f"parameters {{ key: {_text(key)} value {{ string_value: {_text(str(value))} }} }}"
        for key, value in told.items()
        if key != "device_kind"
    ]
    lines = [
        f"name: {_text(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        *(f"input {one}" for one in inputs),
        *(f"output {one}" for one in outputs),
        f"instance_group {{ kind: {options.device_kind} }}",
        *parameters,
    ]
    return "\n".join(lines) + "\n"


def _tensor(name: str, tensor: Tensor, *, optional: bool = False) -> str:
    dims = ", ".join(map(str, tensor.dims))
    further = " optional: true" if optional else ""
    return f"{{ name: {_text(name)} data_type: {tensor.kind} dims: [ {dims} ]{further} }}"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
