"""A network's own past: copies of it in a queue, which answer together, and calls that leave no trace on a network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.errors import RoleError, require

Norm = Literal["batch", "running"]


def traceless(module: nn.Module, *inputs: Any, state: Mapping[str, Tensor] | None = None) -> Any:
    """`module(*inputs)` with the tensors of `state` in place of its own, by name (its own where there are none); all
    buffers are copies, so that running statistics stay what they are. Gradients flow as usual."""
    given = dict(state or {})
    buffers = {name: given.get(name, b).detach().clone() for name, b in module.named_buffers()}
    return functional_call(module, {**given, **buffers}, inputs)


def listening(module: nn.Module, norm: Norm) -> nn.Module:
    """A frozen copy in eval mode, which draws no random numbers; with `norm` "batch" its BatchNorm layers use the
    statistics of the batch, with "running" their own."""
    require(norm in ("batch", "running"), f"norm is 'batch' or 'running', not {norm!r}")
    made = copy.deepcopy(module).requires_grad_(False).eval()
    for part in made.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train(norm == "batch")
    return made


class Snapshots:
    """The last `size` states of a module (all parameters and buffers), oldest out first, each with a score.

    `push` copies the module as it is; `answers` gives every snapshot's output on a batch, without gradient, without a
    change of any buffer and without a random number. Held by `run.loop`, the snapshots are part of the state.
    """

    def __init__(self, module: nn.Module, size: int, norm: Norm = "batch"):
        require(size >= 1, f"there must be room for at least one snapshot, not {size}")
        self.size, self.norm = size, norm
        self.template = listening(module, norm)
        self.kept: list[dict[str, Tensor]] = []
        self.scores: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.kept)

    @torch.no_grad()
    def push(self, module: nn.Module, score: Tensor | float = 0.0) -> None:
        """Raises RoleError for a module of another structure."""
        state = {name: value.detach().clone() for name, value in self._tensors(module)}
        require(state.keys() == dict(self._tensors(self.template)).keys(), "the snapshots are of another module",
                RoleError)
        first = next(iter(state.values()))
        self.kept = [*self.kept, state][-self.size :]
        self.scores = [*self.scores, torch.as_tensor(score, dtype=torch.float32, device=first.device).detach().clone()
                       ][-self.size :]

    @torch.no_grad()
    def follow(self, module: nn.Module, decay: float) -> None:
        """Move the newest snapshot a step of 1 - decay towards the module (an EMA of it from then on); what is not a
        floating tensor is copied."""
        require(bool(self.kept) and 0 <= decay <= 1, f"there must be a snapshot, and decay lie in [0, 1]; got {decay}")
        for name, value in self._tensors(module):
            kept = self.kept[-1][name]
            kept.lerp_(value, 1 - decay) if kept.is_floating_point() else kept.copy_(value)

    @torch.no_grad()
    def answers(self, *inputs: Any) -> Float[Tensor, "snapshots batch classes"]:
        """Raises RoleError where nothing was pushed yet."""
        require(bool(self.kept), "there is no snapshot yet", RoleError)
        return torch.stack([traceless(self.template, *inputs, state=state) for state in self.kept])

    @staticmethod
    def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
        return [*module.named_parameters(), *module.named_buffers()]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [dict(state) for state in self.kept], "scores": list(self.scores)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        like = dict(self._tensors(self.template))
        device = next(iter(like.values())).device
        self.kept = [{name: value.to(device) for name, value in state.items()} for state in saved["kept"]]
        self.scores = [score.to(device) for score in saved["scores"]]
        for state in self.kept:
            wrong = [n for n, value in like.items() if n not in state or state[n].shape != value.shape]
            require(not wrong, f"the saved snapshots are of another module: '{(wrong or [''])[0]}' differs", RoleError)
