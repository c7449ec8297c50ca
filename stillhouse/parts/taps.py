"""Feature taps: read what any module inside a model computes, without editing the model."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import StageError, UnknownNameError


class Features(dict[str, Tensor]):
    """The latest output of each tapped module, by its path."""

    def __missing__(self, path: str) -> Tensor:
        raise StageError(f"nothing has been recorded at '{path}' (recorded: {', '.join(self) or 'nothing'}); call the "
                         "model inside the `with`, and name the tap there")


@contextlib.contextmanager
def taps(model: nn.Module, paths: Sequence[str]) -> Iterator[Features]:
    """Record the outputs of the modules at `paths` (dotted names, "" is the model itself) at every forward pass.

    Of a tuple or a mapping the first tensor is taken. Square maps of a model that keeps its channels last (Swin of timm
    and torchvision) are given as [n, channels, height, width]. Gradients flow through. All hooks are removed at the
    end, on exceptions too. Raises UnknownNameError for a path the model does not have, with those nearest to it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3, cutoff=0.3) or list(modules)[1:6]
            raise UnknownNameError(f"the model has no module '{path}'; near to it: {', '.join(near)}. "
                                   "list_taps(model, example) shows them all")
    features = Features()
    turned = any(_channels_last(module) for module in modules.values())
    handles = []
    try:
        for path in paths:
            handles.append(modules[path].register_forward_hook(_recorder(features, path, turned)))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def list_taps(model: nn.Module, example: Any) -> dict[str, tuple[int, ...]]:
    """Path and output shape of every module that returns a tensor when `model(example)` is called, in call order.

    `example` is a tensor, or a mapping of keyword arguments. The model is left as it was.
    """
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), taps(model, [path for path, _ in model.named_modules()]) as features:
            model(**example) if isinstance(example, Mapping) else model(example)
    finally:
        for module, training in modes:
            module.training = training
    return {path: tuple(value.shape) for path, value in features.items()}


def _recorder(features: Features, path: str, turned: bool) -> Any:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        value = _first_tensor(output)
        if value is not None:
            last = turned and value.dim() == 4 and value.shape[1] == value.shape[2] != value.shape[3]
            features[path] = value.permute(0, 3, 1, 2) if last else value

    return record


def _channels_last(module: nn.Module) -> bool:
    """Whether a model of timm says so, or it is torchvision's Swin, which does not say."""
    kind = type(module)
    return str(getattr(module, "output_fmt", "")) == "NHWC" or (
        kind.__name__ == "SwinTransformer" and kind.__module__.startswith("torchvision."))


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)
