"""Deep prompts: learnable tokens put into the layers of a frozen transformer by hooks, which leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.errors import RoleError, require


class DeepPrompts(nn.Module):
    """`tokens` [depth, count, width]: for each of the first `depth` layers its own tokens, drawn from N(0, std^2).

    `first` [count, width] are the values that the first layer's tokens start from, e.g. embeddings of words.
    """

    def __init__(self, depth: int, count: int, width: int, std: float = 0.02,
                 first: Float[Tensor, "count width"] | None = None):
        super().__init__()
        require(min(depth, count) >= 0 and width >= 1, f"depth and count must be 0 or more, got {depth} and {count}")
        tokens = std * torch.randn(depth, count, width)
        if first is not None and depth:
            require(tuple(first.shape) == (count, width), f"first has shape {tuple(first.shape)}, expected "
                    f"{(count, width)}", RoleError)
            tokens[0] = first.detach()
        self.tokens = nn.Parameter(tokens)

    def forward(self) -> Float[Tensor, "depth count width"]:
        return self.tokens


@contextlib.contextmanager
def appended(prompts: Float[Tensor, "depth count width"] | None, layers: Sequence[nn.Module],
             entry: nn.Module | None = None) -> Iterator[None]:
    """Within the `with`, the tokens stand after all others in the first `depth` of the `layers`.

    They are added to what goes into `entry` (a normalisation before the first layer; None: the first layer itself),
    so after the positions and without one; every later layer gets its own in place of what the one before made of its.
    Behind the last layer they are cut off. Visual prompts of Jia et al. 2022 ("deep"), at the end as in Khattak et al.
    2023. Raises RoleError for more prompts than layers. All hooks are removed, on exceptions too.
    """
    if prompts is None or prompts.shape[0] * prompts.shape[1] == 0:
        yield
        return
    count = prompts.shape[1]
    _check(prompts, layers)

    def add(hidden: Tensor) -> Tensor:
        return torch.cat([hidden, _each(prompts[0], hidden)], 1)

    def swap(j: int) -> Any:
        return lambda hidden: torch.cat([hidden[:, :-count], _each(prompts[j], hidden)], 1)

    def cut(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output[:, :-count]
        return (output[0][:, :-count], *output[1:])

    with _removed([_before(layers[0] if entry is None else entry, add),
                   *(_before(layers[j], swap(j)) for j in range(1, len(prompts))),
                   layers[-1].register_forward_hook(cut)]):
        yield


@contextlib.contextmanager
def replaced(prompts: Float[Tensor, "depth count width"] | None, layers: Sequence[nn.Module], embedding: nn.Module,
             start: int = 1) -> Iterator[None]:
    """Within the `with`, the tokens stand at the positions from `start` on (1: after the beginning of sequence).

    They take the place of what `embedding` (the table of words) gives there, so they do get positions, and in the
    layers 2 to `depth` the place of the tokens before them (CoOp, Zhou et al. 2022; deep: Khattak et al. 2023).
    Raises RoleError for more prompts than layers. All hooks are removed, on exceptions too.
    """
    if prompts is None or prompts.shape[0] * prompts.shape[1] == 0:
        yield
        return
    end = start + prompts.shape[1]
    _check(prompts, layers)

    def put(j: int) -> Any:
        def place(hidden: Tensor) -> Tensor:
            require(hidden.shape[1] >= end, f"a text of {hidden.shape[1]} tokens has no room for {prompts.shape[1]} "
                    f"context tokens from position {start} on", RoleError)
            return torch.cat([hidden[:, :start], _each(prompts[j], hidden), hidden[:, end:]], 1)
        return place

    with _removed([embedding.register_forward_hook(lambda module, inputs, output: put(0)(output)),
                   *(_before(layers[j], put(j)) for j in range(1, len(prompts)))]):
        yield


def _each(tokens: Tensor, hidden: Tensor) -> Tensor:
    return tokens.to(hidden.dtype).expand(len(hidden), -1, -1)


def _check(prompts: Tensor, layers: Sequence[nn.Module]) -> None:
    require(len(prompts) <= len(layers), f"prompts for {len(prompts)} layers were given to a transformer of "
            f"{len(layers)}", RoleError)


def _before(module: nn.Module, change: Any) -> RemovableHandle:
    """A hook that changes the hidden states a module is called with, its first argument or `hidden_states`."""
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@contextlib.contextmanager
def _removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Prompted(nn.Module):
    """A dual encoder with learned prompts: itself one, to be frozen and learned from.

    `template` holds the words that the text prompts stand for, followed by `{}`; texts must follow it.
    """

    def __init__(self, dual: Any, visual: DeepPrompts, textual: DeepPrompts, template: str):
        super().__init__()
        self.dual, self.visual, self.textual, self.template = dual, visual, textual, template

    @property
    def scale(self) -> Tensor:
        return self.dual.scale

    def encode_image(self, image: Tensor, prompts: Tensor | None = None) -> Float[Tensor, "batch features"]:
        return self.dual.encode_image(image, self.visual() if prompts is None else prompts)

    def encode_text(self, texts: Sequence[str], prompts: Tensor | None = None) -> Float[Tensor, "texts features"]:
        return self.dual.encode_text(texts, self.textual() if prompts is None else prompts)

    def forward(self, image: Tensor) -> Float[Tensor, "batch features"]:
        return self.encode_image(image)
