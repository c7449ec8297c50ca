"""Choosing a student before any is trained: by how alike it sees a batch, untrained, to the untrained teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.measures.relations import similarity_preserving
from stillhouse.parts.stages import stages_of
from stillhouse.parts.taps import taps
from stillhouse.protocols import Network
from stillhouse.run.seeds import preserved, reseed


def reinitialised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of the model with freshly drawn weights and statistics, wherever a module has `reset_parameters` (all of
    PyTorch's have); parameters that belong to no such module are kept."""
    fresh = copy.deepcopy(model)
    with preserved():
        reseed(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return fresh


@torch.no_grad()
def relation_scores(teacher: nn.Module, candidates: Sequence[nn.Module], image: Tensor) -> Float[Tensor, " candidates"]:
    """-M_rel of each candidate (Dong et al. 2023, equations 4 and 5): the similarity-preserving distance between the
    deepest features of two networks on one batch, both as they are (usually untrained). Higher is better.

    Needs no equal widths. Raises RoleError for a network without stages.
    """
    def deepest(model: nn.Module, who: str) -> Tensor:
        found = list(stages_of(model, image))
        require(bool(found), f"no stage was found in the {who} ({type(model).__name__})", RoleError)
        modes = [(m, m.training) for m in model.modules()]
        try:
            with taps(model, found[-1:]) as features:
                model.eval()(image)
                return features[found[-1]]
        finally:
            for module, training in modes:
                module.training = training

    of_teacher = deepest(teacher, "teacher")
    return -torch.stack([similarity_preserving(of_teacher, deepest(c, "candidate")) for c in candidates])


def choose(teacher: nn.Module, factories: Sequence[Network], image: Tensor, seed: int = 0) -> tuple[int, Any]:
    """The place of the best factory by `relation_scores` with the teacher's architecture at random weights, and the
    scores. No weight of the teacher or of a candidate that is later trained is read."""
    require(len(factories) >= 1, "name at least one candidate", RoleError)
    with preserved():
        reseed(seed)
        scores = relation_scores(reinitialised(teacher, seed), [f().to(image.device) for f in factories], image)
    return int(scores.argmax()), scores
