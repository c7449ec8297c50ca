"""The last map of a classifier, and its head on single places of it: what the model says of a part of a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, UnknownNameError, require
from stillhouse.parts.stages import Shape, feature_map, grid_of
from stillhouse.parts.taps import taps

LocalHead = Callable[[Float[Tensor, "*samples channels"]], Float[Tensor, "*samples classes"]]
"""Local features in, class logits of each out."""


def last_map(model: nn.Module, image: Tensor, path: str = "") -> tuple[str, Shape]:
    """Path and shape, (channels, height, width) or (tokens, width), of the last features with places, for pictures like
    `image`: what comes out of the last module that returns a map of more than one place, or tokens.

    `path` names the module instead. The model is left as it was. Raises RoleError where there is none,
    UnknownNameError for a path that the model does not have.
    """
    calls = _calls(model, image, [path] if path else [])
    shapes: dict[str, Shape] = {}
    for name, _, out in calls:
        shapes.pop(name, None)
        if _has_places(out, len(image[:2])):
            shapes[name] = tuple(out.shape[1:])
    require(bool(shapes), f"{path or type(model).__name__} gives neither a map of more than one place nor tokens for "
            f"pictures of {tuple(image.shape[1:])}; name the module that does, or give larger pictures", RoleError)
    name = list(shapes)[-1]
    return name, shapes[name]


def local_head(model: nn.Module, image: Tensor, path: str) -> LocalHead:
    """A classifier's head as a function of single vectors of its map at `path`: the layers behind the pooling.

    It is checked on `image`: on the mean over the places, or on the class token, it must give the model's own logits.
    The layers are shared, so freeze the model while it is used. Raises RoleError where the model has no such head, as
    one that flattens its map.
    """
    calls = _calls(model, image, [])
    found = [out for name, _, out in calls if name == path]
    require(bool(found), f"{type(model).__name__} has no module '{path}' that is called", UnknownNameError)
    features, logits = found[-1], calls[-1][2]
    position = next(i for i, (_, _, out) in enumerate(calls) if out is features)
    vectors = [name for name, given, out in calls[position + 1 :]
               if given is not None and given.dim() == 2 and out.dim() == 2 and not list(
                   model.get_submodule(name).children())]
    layers = [model.get_submodule(name) for name in vectors]

    def head(x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        for layer in layers:
            flat = layer(flat)
        return flat.unflatten(0, x.shape[:-1])

    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        try:
            model.eval()
            for pooled in _poolings(features):
                try:
                    out = head(pooled)
                except RuntimeError:
                    continue
                if layers and out.shape == logits.shape and torch.allclose(out, logits, rtol=1e-3, atol=1e-4):
                    return head
        finally:
            for module, training in modes:
                module.training = training
    raise RoleError(f"the head of {type(model).__name__} cannot be put on single places of '{path}': its layers behind "
                    f"it ({', '.join(vectors) or 'none'}) do not give its logits on the pooled map. Name another map")


def _poolings(features: Tensor) -> list[Tensor]:
    if features.dim() == 4:
        return [features.mean((2, 3))]
    prefix = grid_of(features.shape[1])[1]
    first = [features[:, 0]] if prefix else []
    return [*first, features.mean(1), feature_map(features).mean((2, 3))]


def _has_places(out: Tensor, n: int) -> bool:
    if len(out) != n:
        return False
    return (out.dim() == 4 and out.shape[2] * out.shape[3] > 1) or (out.dim() == 3 and grid_of(out.shape[1])[0] > 1)


def _calls(model: nn.Module, image: Tensor, paths: list[str]) -> list[tuple[str, Tensor | None, Tensor]]:
    """Path, first input and first output of every module that returns a tensor, as they return; the model's own, ""
    with what it returns, comes last. The model is left as it was."""
    names = paths or [name for name, _ in model.named_modules()]
    calls: list[tuple[str, Tensor | None, Tensor]] = []
    modes = [(m, m.training) for m in model.modules()]
    handles: list[Any] = []
    try:
        with torch.no_grad(), taps(model, names) as features:
            for name in names:
                def note(module: nn.Module, given: tuple[Any, ...], out: Any, name: str = name) -> None:
                    if name in features:
                        calls.append((name, given[0] if given and isinstance(given[0], Tensor) else None,
                                      features[name]))

                handles.append(model.get_submodule(name).register_forward_hook(note))
            model.eval()(image[:2])
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return calls
