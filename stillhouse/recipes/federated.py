"""Federated averaging: clients train copies of one network on data that stays with them; the server averages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import RoleError, require
from stillhouse.run import Run, frozen

ClientStep = Callable[[nn.Module, nn.Module, int, Any], None]
"""client_step(local, downloaded, i, data) trains `local` in place on client i's data; `downloaded` is frozen."""


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def average(target: nn.Module, models: Sequence[nn.Module], sizes: Sequence[int]) -> None:
    """Give `target` the average of `models`, theta = sum_i (n_i / n) theta_i with n = sum_i n_i (McMahan et al. 2017,
    algorithm 1), over all weights and buffers. It is summed in float64; whole numbers are rounded.

    Raises RoleError for networks of different structure, ConfigError for sizes that are not positive.
    """
    require(len(models) == len(sizes) and len(models) > 0, f"{len(models)} models and {len(sizes)} sizes to average")
    require(min(sizes) > 0, f"every client needs data to count; sizes are {list(sizes)}")
    states = [tensors(model) for model in models]
    total = sum(sizes)
    for name, value in tensors(target).items():
        require(all(name in state and state[name].shape == value.shape for state in states),
                f"the models to average differ in '{name}'", RoleError)
        mean = sum(state[name].double() * (n / total) for state, n in zip(states, sizes, strict=True))
        assert isinstance(mean, Tensor)
        value.copy_(mean if value.is_floating_point() else mean.round())


def fedavg(
    network: nn.Module,
    clients: Sequence[Any],
    client_step: ClientStep,
    rounds: int,
    run: Run,
    share: float = 1.0,
    **held: Any,
) -> nn.Module:
    """Rounds of federated averaging; `network` is the global model, trained in place.

    Each round a `share` of the clients joins (drawn alike on all processes); each gets a copy of the global model,
    `client_step` trains it, and `network` becomes their average weighted by their numbers of samples, so the weights
    sum to 1 whoever joins. `held` is what else outlives a round.
    """
    require(len(clients) >= 1, "federated averaging needs at least one client")
    require(0.0 < share <= 1.0, f"share is the part of the clients that joins a round, in (0, 1], not {share}")
    for _ in run.loop("rounds", steps=rounds, network=network, **held):
        joined = torch.randperm(len(clients), generator=run.shared)[: max(1, round(share * len(clients)))]
        chosen = sorted(joined.tolist())
        trained = []
        for i in chosen:
            local = copy.deepcopy(network)
            with frozen(network):
                client_step(local, network, i, clients[i])
            trained.append(local)
        average(network, trained, [len(clients[i]) for i in chosen])
    return network
