"""Several teachers as one: their outputs on a batch, and what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import RoleError, require
from stillhouse.measures.divergences import log_probs


def answers(teachers: Sequence[Any], image: Tensor) -> Float[Tensor, "teachers batch classes"]:
    """The logits of every teacher, computed under inference mode; the result may enter a loss.

    The teachers are called as they are: freeze them (`stillhouse.run.frozen`) before. Raises RoleError where there is
    none, or where they differ in their classes.
    """
    require(len(teachers) >= 1, "an ensemble needs at least one teacher", RoleError)
    with torch.inference_mode():
        each = [teacher(image) for teacher in teachers]
    widths = [z.shape[-1] for z in each]
    require(len(set(widths)) == 1, f"teachers of one ensemble need the same classes; theirs are {widths}", RoleError)
    return torch.stack(each)


def mean_log_probs(logits: Float[Tensor, "teachers batch classes"], temperature: float = 1.0
                   ) -> Float[Tensor, "batch classes"]:
    """log of the mean of the teachers' probabilities: a linear mixture, and itself a set of logits."""
    log_p = log_probs(logits, temperature)
    return log_p.logsumexp(0) - torch.tensor(len(logits), dtype=log_p.dtype).log()
