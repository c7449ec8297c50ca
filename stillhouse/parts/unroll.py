"""Differentiating through a training run: networks as functions of one flat vector, and unrolled optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.errors import ConfigError, RoleError, require

Tensors = tuple[Tensor, ...]
Step = Callable[[int, Tensors, Tensors], Tensors]
"""`step(n, state, inputs)` -> next state: one differentiable optimiser step. It must not change its arguments."""


class FlatNetwork:
    """Any module as a function of its flat parameter vector: `f(theta, image)`.

    The module is a template: its parameters are never read after the start nor written, its buffers are copied for
    every call (running statistics are not part of a trajectory), tied parameters appear once. It runs in the mode it
    is in.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.names = [name for name, _ in module.named_parameters()]
        self.shapes = [p.shape for p in module.parameters()]
        self.sizes = [p.numel() for p in module.parameters()]
        require(bool(self.names), f"{type(module).__name__} has no parameters", RoleError)

    @property
    def size(self) -> int:
        """Length of the parameter vector."""
        return sum(self.sizes)

    def flatten(self, module: nn.Module | None = None) -> Float[Tensor, " parameters"]:
        """The parameters of `module` (by default the template) as one detached vector."""
        found = dict((module or self.module).named_parameters())
        require(list(found) == self.names, "the module has other parameters than the template", RoleError)
        return torch.cat([p.detach().reshape(-1) for p in found.values()])

    def split(self, theta: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        """Views of `theta` by parameter name."""
        require(theta.shape == (self.size,), f"expected a vector of {self.size} parameters, got {tuple(theta.shape)}",
                RoleError)
        parts = theta.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def load(self, theta: Float[Tensor, " parameters"], module: nn.Module) -> nn.Module:
        """Copy `theta` into `module` and return it."""
        own = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.split(theta).items():
                own[name].copy_(value)
        return module

    def call(self, parameters: dict[str, Tensor], *inputs: Any) -> Any:
        """The network with `parameters` by name."""
        buffers = {name: b.detach().clone() for name, b in self.module.named_buffers()}
        return functional_call(self.module, {**parameters, **buffers}, inputs)

    def __call__(self, theta: Float[Tensor, " parameters"], *inputs: Any) -> Any:
        return self.call(self.split(theta), *inputs)


def sgd_step(loss: Callable[[Tensor, int, Tensors], Tensor], momentum: float = 0.0) -> Step:
    """One step of SGD on `loss(theta, n, inputs)` as a `Step`.

    theta_{n+1} = theta_n - alpha_n v_n,  v_n = momentum v_{n-1} + grad loss(theta_n), v_{-1} = 0.
    The state is (theta,), or (theta, v) with momentum; inputs[0] is alpha: one number, or one for each step.
    Under `torch.no_grad` the step is taken without keeping its graph.
    """
    require(0.0 <= momentum < 1.0, f"momentum must lie in [0, 1), not {momentum}")

    def step(n: int, state: Tensors, inputs: Tensors) -> Tensors:
        kept = torch.is_grad_enabled()
        with torch.enable_grad():
            theta = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(theta, n, inputs), theta, create_graph=kept)
        velocity = momentum * state[1] + gradient if momentum else gradient
        alpha = inputs[0] if inputs[0].dim() == 0 else inputs[0][n]
        moved = theta - alpha * velocity
        return (moved, velocity) if momentum else (moved,)

    return step


def unroll(
    step: Step, state: Tensors, steps: int, inputs: Tensors = (), window: int | None = None, flat: bool = False
) -> Tensors:
    """`steps` differentiable steps from `state`; the result carries gradients to `inputs` and to `state`.

    With `window` only the last so many steps do (truncated back-propagation). With `flat` no graph is kept: the states
    are stored and each step is taken again on the way back, so memory grows by one state a step instead of one graph,
    the gradients are the same, and time grows by about a third. Then every tensor that shall receive a gradient must be
    in `inputs` (a closure's would get none), and what a step draws outside of torch's global generators must be drawn
    before.
    """
    require(steps >= 0, f"steps must be 0 or more, not {steps}", ConfigError)
    require(window is None or window >= 0, f"window must be 0 or more, not {window}", ConfigError)
    first = 0 if window is None else max(0, steps - window)
    with torch.no_grad():
        for n in range(first):
            state = step(n, state, inputs)
    if flat and steps > first:
        return _Replay.apply(step, range(first, steps), len(state), *state, *inputs)
    for n in range(first, steps):
        state = step(n, state, inputs)
    return state


class _Replay(torch.autograd.Function):
    """Steps without a graph; the backward pass takes each again from its stored state."""

    @staticmethod
    def forward(ctx: Any, step: Step, numbers: range, count: int, *tensors: Tensor) -> Tensors:
        state, inputs = tensors[:count], tensors[count:]
        ctx.step, ctx.numbers, ctx.count, ctx.states, ctx.draws = step, numbers, count, [], []
        ctx.save_for_backward(*inputs)
        for n in numbers:
            ctx.states.append(tuple(s.detach() for s in state))
            ctx.draws.append(_generators())
            state = step(n, state, inputs)
        return tuple(s.detach() for s in state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[3 + ctx.count :]
        inputs = tuple(x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True))
        wanted = [x for x in inputs if x.requires_grad]
        totals = [torch.zeros_like(x) for x in wanted]
        with torch.random.fork_rng():
            for n, stored, draws in zip(reversed(ctx.numbers), reversed(ctx.states), reversed(ctx.draws), strict=True):
                _set_generators(draws)
                with torch.enable_grad():
                    state = tuple(s.detach().requires_grad_() for s in stored)
                    following = ctx.step(n, state, inputs)
                found = torch.autograd.grad(following, [*state, *wanted], gradients, allow_unused=True)
                gradients = tuple(torch.zeros_like(s) if g is None else g for s, g in zip(state, found, strict=False))
                for total, g in zip(totals, found[len(state) :], strict=True):
                    if g is not None:
                        total += g
        each = iter(totals)
        return None, None, None, *gradients, *(next(each) if need else None for need in needed)


def _generators() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_generators(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
