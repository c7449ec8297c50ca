"""One feature vector per picture out of any model, beside what it returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, StageError, require
from stillhouse.parts.taps import taps


class FeatureTap:
    """What was tapped at the latest forward pass; calling it gives one vector per picture: of maps [n, c, h, w] the
    mean over the places, of tokens [n, tokens, d] the first, of what has more dimensions all in a row."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self) -> Float[Tensor, "n features"]:
        if self.value is None:
            raise StageError("nothing has been tapped yet; call the model first")
        x = self.value
        return x.mean((2, 3)) if x.dim() == 4 else x[:, 0] if x.dim() == 3 else x.flatten(1)


@contextlib.contextmanager
def feature_tap(model: nn.Module, where: str = "penultimate") -> Iterator[FeatureTap]:
    """Tap a model's feature at every forward pass; gradients flow through, the hook is removed at the end.

    `where` is "penultimate" (what goes into its last linear layer), "output" (what it returns), or the path of a module
    inside. Raises RoleError if a model without linear layers is asked for "penultimate", UnknownNameError for a path it
    does not have.
    """
    tap = FeatureTap()
    if where == "penultimate":
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        require(bool(linears), f"{type(model).__name__} has no linear layer, so there is nothing before it; name the "
                "feature: 'output', or the path of a module", RoleError)

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            tap.value = inputs[0]

        handle = linears[-1].register_forward_pre_hook(before)
        try:
            yield tap
        finally:
            handle.remove()
        return
    path = "" if where == "output" else where
    with taps(model, [path]) as features:
        tap_call = _Tapped(features, path)
        yield tap_call


class _Tapped(FeatureTap):
    def __init__(self, features: dict[str, Tensor], path: str):
        self.features, self.path = features, path

    def __call__(self) -> Tensor:
        self.value = self.features[self.path]
        return super().__call__()


@torch.no_grad()
def tapped_width(model: nn.Module, image: Tensor, where: str = "penultimate") -> int:
    """Length of the tapped vector for pictures like `image`; the model is left as it was."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        with feature_tap(model, where) as tap:
            model.eval()(image[:1])
            return tap().shape[1]
    finally:
        for module, training in modes:
            module.training = training
