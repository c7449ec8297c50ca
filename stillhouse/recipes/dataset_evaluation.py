"""Judging a small data set: fresh networks are trained on it with a fixed number of steps and tested on real data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.augment import Augment
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.sets import TensorSet, as_tensor_set
from stillhouse.errors import DataError, require
from stillhouse.evaluate.classification import accuracy
from stillhouse.protocols import LabelledImages, Network
from stillhouse.run.schedules import piecewise, set_lr


def train_on(
    data: DistilledSet | LabelledImages,
    model: nn.Module,
    *,
    steps: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch: int = 256,
    augment: Augment | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Train `model` in place on `data` for `steps` steps of SGD, lr x 0.1 from the middle on (MTT's evaluation).

    Labels may be classes or probabilities. Sets of at most `batch` pictures are used whole in every step, larger ones
    in epochs. All draws come from torch's global generator: a function of the seed, equal on all processes.
    """
    require(steps >= 1 and lr > 0, f"training needs steps and a learning rate above 0, not {steps} and {lr}")
    small = data if isinstance(data, DistilledSet) else _as_distilled(as_tensor_set(data))
    require(len(small) > 0, "the set to train on is empty", DataError)
    images, labels = small.images.detach().to(device), small.labels.detach().to(device)
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay)
    everything = torch.arange(len(images), device=device)
    waiting: list[Tensor] = []
    for k in range(steps):
        where = everything
        if len(images) > batch:
            waiting = waiting or list(torch.randperm(len(images)).to(device).split(batch))
            where = waiting.pop()
        chosen = DistilledSet(images[where], labels[where], tile=small.tile).training_pictures()
        set_lr(optimizer, lr * piecewise(k / steps, [(0.5, 0.1)]))
        loss = F.cross_entropy(model(augment(chosen) if augment else chosen), labels[where])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


def evaluate_dataset(
    data: DistilledSet | LabelledImages,
    network: Network,
    test: LabelledImages,
    *,
    networks: int = 5,
    steps: int = 1000,
    lr: float | None = None,
    batch: int = 256,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    augment: Augment | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Test accuracy of `networks` fresh networks trained on `data`: {"accuracy": mean, "std": deviation, "each": list}.

    `lr` is by default the learned rate of a DistilledSet. The steps are counted in updates, so that sets of different
    size get the same training. Real test pictures go through the set's whitening. Draws as in `train_on`: call it in
    `run.once`, or within a stage in `run.aside(…, grad=True)`.
    """
    require(networks >= 1, f"give at least one network, not {networks}")
    rate = lr if lr is not None else getattr(data, "lr", None)
    require(rate is not None, "this set brings no learning rate of its own; give lr=…")
    prepared = _prepare(test, data)
    each = []
    with torch.enable_grad():
        for _ in range(networks):
            model = train_on(data, network(), steps=steps, lr=float(rate or 0.0), momentum=momentum,
                             weight_decay=weight_decay, batch=batch, augment=augment, device=device)
            each.append(accuracy(model, prepared, device=device))
    scores = torch.tensor(each, dtype=torch.double)
    return {"accuracy": scores.mean().item(), "std": scores.std(correction=0).item(), "each": each}


def evaluate_across(
    data: DistilledSet | LabelledImages, architectures: Mapping[str, Network], test: LabelledImages, **options: Any
) -> dict[str, dict[str, Any]]:
    """`evaluate_dataset` for each of several architectures by name: does the set serve networks it was not made for?"""
    return {name: evaluate_dataset(data, network, test, **options) for name, network in architectures.items()}


def _as_distilled(data: TensorSet) -> DistilledSet:
    require({"image", "label"} <= set(data.fields), f"training needs image and label, the set has {data.fields}",
            DataError)
    return DistilledSet(data.image, data.label)


def _prepare(test: LabelledImages, data: Any) -> Any:
    if not isinstance(data, DistilledSet) or data.whitening is None:
        return test
    whole = as_tensor_set(test)
    return whole.with_fields(image=data.prepare(whole.image))
