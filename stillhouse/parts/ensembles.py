"""Several teachers as one: their outputs on a batch, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, RoleError, require
from stillhouse.measures.divergences import log_probs
from stillhouse.store import load_tree, save_tree, write_text


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


def vote_log_probs(logits: Float[Tensor, "teachers batch classes"], rule: str = "mean", temperature: float = 1.0,
                   scores: Float[Tensor, " teachers"] | None = None) -> Float[Tensor, "batch classes"]:
    """log p_vote of several teachers: by "mean" of their probabilities at this temperature, by "majority" (the share of
    teachers whose first choice a class is; -inf for a class without a vote) or "weighted", by the mean under
    softmax(-scores), where a score is a loss. Raises ConfigError for another rule, RoleError for missing scores."""
    if rule == "mean":
        return mean_log_probs(logits, temperature)
    if rule == "majority":
        first = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])
        return first.to(logits.dtype).mean(0).log()
    require(rule == "weighted", f"teachers vote by 'mean', 'majority' or 'weighted', not {rule!r}")
    require(scores is not None and scores.shape == logits.shape[:1], "a weighted vote needs one score per teacher",
            RoleError)
    assert scores is not None
    return (log_probs(logits, temperature) + (-scores).log_softmax(0).to(logits)[:, None, None]).logsumexp(0)


FILE = "ensemble.json"
"""The file beside the weights of a saved ensemble that says how many members it has."""


class Ensemble(nn.Module):
    """Several classifiers as one: its logits are the log of the mean of their probabilities.

    Members must have the same classes; they may be of any architecture, but `load` builds them alike.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        require(len(members) >= 1, "an ensemble needs at least one member", RoleError)
        self.members = nn.ModuleList(members)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return mean_log_probs(torch.stack([member(image) for member in self.members]))

    def save(self, folder: Path | str) -> Path:
        """Write the weights of all members and their number. Returns the folder."""
        save_tree(Path(folder) / "model.safetensors", dict(self.state_dict()))
        write_text(Path(folder) / FILE, json.dumps({"members": len(self.members)}))
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str, network: Callable[[], nn.Module]) -> Ensemble:
        """What `save` wrote; `network` builds one member. Raises DamagedFileError for files that are not as written,
        RoleError for members of another architecture."""
        file = Path(folder) / FILE
        try:
            count = json.loads(file.read_text(encoding="utf-8"))["members"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DamagedFileError(f"{file} is not as it was written: {type(error).__name__}: {error}") from error
        require(type(count) is int and 1 <= count <= 1000, f"{file} is not as it was written: it speaks of {count!r} "
                "members", DamagedFileError)
        made = cls([network() for _ in range(count)])
        state = load_tree(Path(folder) / "model.safetensors")
        try:
            made.load_state_dict(state)
        except RuntimeError as error:
            raise RoleError(f"the weights in {folder} are not those of {count} networks of this architecture: {error}"
                            ) from error
        return made
