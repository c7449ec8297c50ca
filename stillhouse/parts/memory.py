"""The memory of contrastive distillation: the embeddings of every sample, from which negatives are taken."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import DataError, require


class ContrastMemory(nn.Module):
    """Unit vectors u (teacher) and v (student) of all `size` samples (Tian et al. 2020, section 3.3 and its release).

    `update` moves the rows of a batch: row <- normalise(momentum row + (1 - momentum) new). They begin as random unit
    vectors. `log_z` [2] is the logarithm of the normaliser of scores against u and against v, NaN until it is set
    once. All of it is state; over several processes give `update` the whole batch (`run.gather`).
    """

    u: Tensor
    v: Tensor
    log_z: Tensor

    def __init__(self, size: int, features: int, momentum: float = 0.5):
        super().__init__()
        require(size >= 2 and features >= 1, f"a memory needs 2 samples and 1 feature or more; got {size}, {features}")
        require(0 <= momentum < 1, f"momentum must lie in [0, 1), not {momentum}")
        self.momentum = momentum
        self.register_buffer("u", F.normalize(torch.randn(size, features), dim=1))
        self.register_buffer("v", F.normalize(torch.randn(size, features), dim=1))
        self.register_buffer("log_z", torch.full((2,), torch.nan))

    def __len__(self) -> int:
        return len(self.u)

    def others(self, index: Int[Tensor, " n"], drawn: Int[Tensor, "n m"]) -> Int[Tensor, "n m"]:
        """Rows other than a sample's own, all equally likely: `drawn` are whole numbers of [0, size - 1)."""
        return drawn + (drawn >= index[:, None])

    @torch.no_grad()
    def update(self, index: Int[Tensor, " n"], u: Float[Tensor, "n features"], v: Float[Tensor, "n features"]) -> None:
        """Raises DataError for an index outside of the memory."""
        require(int(index.max()) < len(self) and int(index.min()) >= 0, f"the memory has {len(self)} rows; the batch "
                f"has indices from {int(index.min())} to {int(index.max())}", DataError)
        for bank, new in ((self.u, u), (self.v, v)):
            moved = self.momentum * bank[index] + (1 - self.momentum) * new.detach().to(bank)
            bank[index] = F.normalize(moved, dim=1)

    def normalised(self, side: int) -> bool:
        """Whether Z of that side (0: scores against u, 1: against v) has been set."""
        return not bool(self.log_z[side].isnan())

    @torch.no_grad()
    def normalise(self, side: int, mean_exp: Tensor) -> None:
        """Set log Z = log(size x mean_exp), where `mean_exp` is the mean of exp(c / tau) over a batch."""
        self.log_z[side] = (mean_exp.detach() * len(self)).log()
