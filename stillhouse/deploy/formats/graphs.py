"""Targets as graphs that need no Python class: ONNX, and the files of torch.export."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.deploy.formats.views import Job, Made, View, compare
from stillhouse.errors import MissingExtraError, RoleError, require

OPSET = 18
"""The oldest opset that is written unless another is asked for."""


def to_onnx(job: Job) -> Made:
    """Write model.onnx, and compare it in onnxruntime."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"ONNX needs onnx, onnxscript and onnxruntime ({error}); install them with: pip install"
                                " 'stillhouse[export]'") from error
    require(job.opset is None or 18 <= job.opset <= 23, f"--opset lies between 18 and 23, not {job.opset}")
    view, path = job.view, job.folder / "model.onnx"
    traced = trace(view)
    try:
        with _quiet():
            program: Any = torch.onnx.export(traced, (), dynamo=True, opset_version=job.opset or OPSET, verbose=False,
                                             input_names=list(view.fields), output_names=list(view.outputs))
            program.save(str(path))
    except Exception as error:
        raise RoleError(f"this network cannot be written as ONNX: {_operation(error)}. Use --to torch-export, whose "
                        "graph keeps every operation of torch, or --to safetensors") from error
    _name_axes(onnx, path, view)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RoleError(f"onnxruntime does not take the graph: {_operation(error)}. Try a lower --opset (18), or --to "
                        "torch-export") from error
    checks = compare(view, lambda batch: [torch.from_numpy(out) for out in session.run(
        None, {name: value.numpy() for name, value in zip(view.fields, batch, strict=True)})])
    example = ", ".join(f'"{name}": {_filled(value, "np")}'
                        for name, value in zip(view.fields, view.batch(1), strict=True))
    code = ("import numpy as np\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession(\"model.onnx\")\n"
            f"outputs = session.run(None, {{{example}}})")
    return Made(checks, 1e-4, code, (_signature(view), *_notes(job)))


def to_torch_export(job: Job) -> Made:
    """Write model.pt2, and compare it as torch.export.load reads it."""
    view, path = job.view, job.folder / "model.pt2"
    torch.export.save(trace(view), path)
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        checks = compare(view, lambda batch: loaded(*batch))
    given = ", ".join(_filled(value, "torch") for value in view.batch(1))
    code = f'import torch\n\nmodel = torch.export.load("model.pt2").module()\noutput = model({given})'
    return Made(checks, 1e-5, code, (
        _signature(view), "The file is a zip of a graph in JSON, weights as raw bytes and one example input in torch's "
        "own format, which is a pickle. torch.export.load is to be used on files that you trust.", *_notes(job)))


def trace(view: View) -> Any:
    """The view as a torch.export.ExportedProgram. Raises RoleError, naming what cannot be traced."""
    moving = tuple(dict.fromkeys(view.axes[name], torch.export.Dim.DYNAMIC) for name in view.fields)
    named = [p for p in inspect.signature(view.module.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    shapes: Any = moving if len(named) >= len(moving) else (*moving[: len(named)], moving[len(named):])
    try:
        with _quiet(), torch.no_grad(), _moving_lengths():
            return torch.export.export(view.module, view.batch(3), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise RoleError(f"{type(view.module).__name__} cannot be traced by torch.export: {_operation(error)}. What "
                        "depends on the values of tensors (if, .item(), numpy) must leave the forward pass; --to "
                        "safetensors takes any network") from error


def _name_axes(onnx: Any, path: Path, view: View) -> None:
    """Call the axes that may vary by their names."""
    model = onnx.load(str(path), load_external_data=False)
    names: dict[str, str] = {}
    for put in model.graph.input:
        for axis, name in view.axes[put.name].items():
            dim = put.type.tensor_type.shape.dim[axis]
            names[dim.dim_param] = name
            dim.dim_param = name
    for put in model.graph.output:
        for dim in put.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def _signature(view: View) -> str:
    def said(name: str, value: Tensor) -> str:
        sizes = [view.axes[name].get(i, str(n)) for i, n in enumerate(value.shape)]
        return f"`{name}` {str(value.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"

    takes = ", ".join(said(name, value) for name, value in zip(view.fields, view.batch(3), strict=True))
    return f"It takes {takes} and gives {', '.join(f'`{name}`' for name in view.outputs)}."


def _notes(job: Job) -> Iterator[str]:
    if job.row == "QuantizedModel":
        yield "Weights are stored decoded, in float32: the packed ones are in the safetensors export."
    if job.row == "Density":
        yield "Of the density it holds the log-probability, not the sampling."
    if job.row == "FewStepSampler":
        yield "All steps of the sampler are in the graph; `noise` is standard normal" + (
            ", and so is `renoise`, what is added between steps." if "renoise" in job.view.fields else ".")
    if "image" in job.about.example:
        yield ("Pictures go in as the student took them, values in [-1, 1] where the data was read by Stillhouse; the "
               "model's own normalisation and size are inside the graph.")


def _filled(value: Tensor, library: str) -> str:
    if value.is_floating_point():
        return f"{library}.zeros({tuple(value.shape)}, dtype={library}.float32)"
    return f"{library}.ones({tuple(value.shape)}, dtype={library}.int64)"


def _operation(error: Exception) -> str:
    """The operation that an error of the exporter names, and its first line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{error}\n{cause}"
    named = re.search(r"(aten[.:]+\w+|[\w.]+::\w+|call_function \w+)", text)
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    hint = (" (resizing with antialiasing: give pictures of the model's own size, for which there is no resizing)"
            if "bilinear2d_aa" in text or "antialias" in text else "")
    return (f"it stops at {named[1]}{hint}: " if named else "") + first


@contextlib.contextmanager
def _moving_lengths() -> Iterator[None]:
    """Let `len(tensor)` in code of Stillhouse stay a size that varies: Python's own would fix it to the example's."""
    def length(value: Any) -> Any:
        return value.shape[0] if isinstance(value, Tensor) else len(value)

    own = [vars(m) for name, m in list(sys.modules.items()) if name.startswith("stillhouse.") and m is not None]
    own = [names for names in own if "len" not in names and names is not globals()]
    for names in own:
        names["len"] = length
    try:
        yield
    finally:
        for names in own:
            del names["len"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own warnings, which speak of its inside."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
