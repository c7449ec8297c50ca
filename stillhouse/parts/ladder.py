"""Ladder of projectors: every block of a student speaks to every teacher. Thrown away after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stillhouse.errors import require
from stillhouse.parts.tokens import Split


class Ladder(nn.Module):
    """For teacher t, token kind k and block b a projector P: Linear - GELU - Linear (one Linear where its hidden width
    is 0); the output is the sum over the blocks of P(x_b) (UNIC, Sariyildiz et al. 2024, section 3.2).

    `hidden` is the hidden width of all but the last block, whose is `last`. Weights are drawn from a truncated normal
    of deviation `std`, biases are 0.
    """

    def __init__(self, width: int, teachers: Sequence[int], blocks: int, hidden: int = 768, last: int = 3072,
                 std: float = 0.02):
        super().__init__()
        require(blocks >= 1 and len(teachers) >= 1, f"a ladder needs a block and a teacher, got {blocks} and "
                f"{len(teachers)}")
        require(hidden >= 0 and last >= 0, f"hidden widths must not be negative, got {hidden} and {last}")
        self.teachers = nn.ModuleList(nn.ModuleDict({kind: nn.ModuleList(
            _projector(width, last if b == blocks - 1 else hidden, out) for b in range(blocks))
            for kind in ("cls", "patch")}) for out in teachers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, rungs: Sequence[Split]) -> list[Split]:
        """One split for every teacher from the student's splits after its blocks."""
        teachers: Any = self.teachers
        return [{kind: _summed(teacher[kind], [rung[kind] for rung in rungs]) for kind in ("cls", "patch")}
                for teacher in teachers]


def _projector(width: int, hidden: int, out: int) -> nn.Sequential:
    if hidden == 0:
        return nn.Sequential(nn.Linear(width, out))
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def _summed(projectors: nn.ModuleList, inputs: Sequence[Tensor]) -> Tensor:
    parts = [projector(x) for projector, x in zip(projectors, inputs, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
