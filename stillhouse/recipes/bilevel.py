"""Two problems in one: the inner parameters w minimise a training loss, the outer ones alpha a validation loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Loss = Callable[[State], Tensor]
"""A loss as a function of the inner parameters by name; the outer ones are read where they are."""


def unrolled_gradient(train_loss: Loss, validation_loss: Loss, w: State, alpha: Sequence[Tensor], xi: float
                      ) -> tuple[Tensor, list[Tensor]]:
    """L_val(w', alpha) and its gradient in alpha, through one step w' = w - xi grad_w L_train(w, alpha) (Liu et al.
    2019, equations 6 and 7):

        grad_alpha L_val(w', alpha) - xi grad^2_{alpha, w} L_train(w, alpha) grad_{w'} L_val(w', alpha).

    The product with the mixed second derivative is exact (the paper takes a finite difference). xi = 0 is the
    first-order gradient. Neither w nor alpha is changed.
    """
    alpha = list(alpha)
    inner = {name: p.detach().requires_grad_() for name, p in w.items()}
    gradient: tuple[Tensor, ...] = ()
    moved = inner
    if xi:
        gradient = torch.autograd.grad(train_loss(inner), list(inner.values()), create_graph=True)
        moved = {name: (p - xi * g).detach().requires_grad_() for (name, p), g in zip(inner.items(), gradient,
                                                                                      strict=True)}
    value = validation_loss(moved)
    direct = torch.autograd.grad(value, [*alpha, *moved.values()])
    found = list(direct[: len(alpha)])
    if xi:
        inner_product = torch.stack([(g * v).sum() for g, v in zip(gradient, direct[len(alpha) :], strict=True)]).sum()
        mixed = torch.autograd.grad(inner_product, alpha)
        found = [d - xi * m for d, m in zip(found, mixed, strict=True)]
    return value.detach(), found
