"""Splitting one labelled set into the sets of several clients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import DataError, require


def dirichlet_partition(labels: Tensor, clients: int, beta: float, seed: int = 0, smallest: int = 1) -> list[Tensor]:
    """Indices of each client's samples, non-iid: every class is shared out by p ~ Dirichlet(beta) over the clients.

    Small beta gives each client few classes (Hsu et al. 2019; class by class as in Li et al. 2022, section 3). Every
    index occurs once. Equal for equal arguments. A draw that leaves a client with fewer than `smallest` samples is
    repeated; DataError says so after 1000 tries.
    """
    require(clients >= 1 and beta > 0, f"clients must be at least 1 and beta above 0; got {clients} and {beta}")
    require(len(labels) >= clients * smallest,
            f"{len(labels)} samples cannot give {clients} clients {smallest} each", DataError)
    y = labels.cpu().numpy()
    random = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(clients)]
        for label in np.unique(y):
            members = random.permutation(np.flatnonzero(y == label))
            shares = random.dirichlet(np.full(clients, beta))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, chosen in zip(parts, np.split(members, cuts), strict=True):
                part += chosen.tolist()
        if min(map(len, parts)) >= smallest:
            return [torch.tensor(sorted(part), dtype=torch.long) for part in parts]
    raise DataError(f"no Dirichlet({beta}) partition gave each of {clients} clients {smallest} samples in 1000 draws; "
                    "raise beta, or lower the number of clients or `smallest`")
