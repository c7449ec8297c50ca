"""A teacher of which only the answers are known: counted, bounded, never differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import RoleError, require

Answer = Literal["logits", "probabilities", "label"]


class QueriesUsedUp(RoleError):
    """The teacher's budget does not cover this batch; nothing of it was asked."""


class BlackBox(nn.Module):
    """A classifier behind an interface: pictures in, its answers out as logits, without gradient.

    `teacher` is a module or any function of pictures. `answer` says what is seen of it: its "logits"; its
    "probabilities", as their logarithms; or the "label" alone, as a logit of 0 for it and -`margin` for the others.
    A function may give what `answer` names itself: rows of probabilities, or labels [batch] where `classes` is given.

    `queries` and `bytes` (of the pictures sent) are counted in buffers, so a resumed run goes on counting. `budget`
    bounds the queries. The module is called as it is (freeze it before); it holds no parameters of its own.
    Raises QueriesUsedUp before a batch that the budget does not cover, RoleError for answers of the wrong shape.
    """

    queries: Tensor
    bytes: Tensor

    def __init__(self, teacher: Callable[[Tensor], Any], answer: Answer = "logits", budget: int | None = None,
                 classes: int | None = None, margin: float = 20.0):
        super().__init__()
        require(answer in ("logits", "probabilities", "label"), "answer is 'logits', 'probabilities' or 'label', not "
                f"{answer!r}")
        require(budget is None or budget >= 1, f"budget is at least 1 query, or none; got {budget}")
        require(callable(teacher), f"the teacher must be callable, not {type(teacher).__name__}", RoleError)
        self.teacher, self.answer, self.budget, self.classes, self.margin = teacher, answer, budget, classes, margin
        for name in ("queries", "bytes"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))

    @property
    def left(self) -> int | None:
        """How many queries the budget still covers; None without one."""
        return None if self.budget is None else self.budget - int(self.queries)

    def forward(self, image: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        left = self.left
        require(left is None or len(image) <= left, f"{len(image)} queries were wanted, the budget of {self.budget} "
                f"leaves {left}; raise it or ask for fewer", QueriesUsedUp)
        self.queries += len(image)
        self.bytes += image.numel() * image.element_size()
        with torch.inference_mode():
            given = self.teacher(image)
        require(isinstance(given, Tensor) and given.dim() in (1, 2) and len(given) == len(image), "a teacher answers "
                f"with one row a picture; {len(image)} pictures gave {tuple(getattr(given, 'shape', ()))}", RoleError)
        return self._seen(given.clone())

    def _seen(self, given: Tensor) -> Tensor:
        if given.dim() == 1:
            require(self.answer == "label" and self.classes is not None, "a teacher that answers with labels alone "
                    "needs answer='label' and the number of classes", RoleError)
            return as_logits(given.long(), int(self.classes or 0), self.margin)
        if self.answer == "label":
            return as_logits(given.argmax(-1), given.shape[-1], self.margin)
        if self.answer == "probabilities":
            known = bool((given >= 0).all()) and bool((given.sum(-1) - 1).abs().max() < 1e-3)
            return given.clamp_min(1e-12).log() if known else given.log_softmax(-1)
        return given


def as_logits(label: Int[Tensor, " batch"], classes: int, margin: float = 20.0) -> Float[Tensor, "batch classes"]:
    """0 for the label and -margin for every other class: softmax gives the label all but classes e^-margin."""
    return margin * (F.one_hot(label, classes).to(torch.get_default_dtype()) - 1)
