"""Dataset distillation by matching gradients step by step (DC, Zhao, Mopuri and Bilen 2021; DSA, Zhao and Bilen 2021).

The baseline of the trajectory methods. For random networks on their first steps of training, the synthetic pictures of
each class are moved so that their loss gradient points where that of a real batch of the class points:

    min_S  sum_c D( grad_theta L(A(S_c); theta), grad_theta L(A(T_c); theta) ),    theta <- theta - eta grad L(S; theta)

with the same siamese augmentation A on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.augment import DSA_GROUPS, DSA_PAPER, dsa_of
from stillhouse.data.coresets import random_per_class
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.sets import as_tensor_set
from stillhouse.errors import require
from stillhouse.measures.matching import gradient_distance
from stillhouse.parts.unroll import FlatNetwork, sgd_step
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.run import Run, begin


@dataclass(frozen=True)
class GradientMatching:
    """Settings; the defaults are those of the papers for one picture per class."""

    ipc: int = 1  # synthetic pictures per class
    steps: int = 1000  # matching steps
    restart: int = 1  # matching steps with one network before a fresh one is drawn
    network_steps: int = 1  # updates of the network on the synthetic set after each matching step
    network_lr: float = 0.01  # eta, their learning rate
    lr_img: float = 0.1  # learning rate of the pictures
    momentum: float = 0.5  # of the pictures
    batch_real: int = 256  # real pictures per class and step
    distance: str = "cosine"  # D: "cosine" (per output unit) or "squared"
    dsa: str = DSA_PAPER  # augmentation groups, joined by "_"; "" for none (that is DC)
    fill: float = 0.0  # value of pixels from outside of a picture
    lr: float = 0.01  # learning rate that is handed on with the set

    def __post_init__(self) -> None:
        require(self.ipc >= 1 and self.steps >= 0 and self.restart >= 1 and self.batch_real >= 1,
                "ipc, restart and batch_real must be at least 1, steps at least 0")
        require(all(g in DSA_GROUPS for g in self.dsa.split("_") if self.dsa),
                f"dsa joins some of {', '.join(DSA_GROUPS)} by '_', got '{self.dsa}'")


def match_gradients(
    network: Network,
    labelled: LabelledImages,
    config: GradientMatching = GradientMatching(),
    run: Run | None = None,
) -> DistilledSet:
    """Distil `labelled` into `config.ipc` pictures per class. Every process does the same work."""
    run = begin(run)
    run.check(Classifier, labelled, labels=True, network=network())
    real = as_tensor_set(labelled)
    chosen = random_per_class(real.label, config.ipc)
    images = nn.Parameter(real.image[chosen].to(run.device, copy=True))
    labels = real.label[chosen].to(run.device)
    members = {c: (real.label == c).nonzero().flatten() for c in labels.unique().tolist()}
    optimizer = torch.optim.SGD([images], config.lr_img, config.momentum)
    flat = FlatNetwork(network().to(run.device).train())
    now: Any = run.state(theta=flat.flatten())
    size = real.image.shape[-2:]
    train = sgd_step(lambda theta, n, inputs: F.cross_entropy(flat(theta, inputs[1]), labels))
    for k in run.loop("match", steps=config.steps, images=images, optimizer=optimizer, now=now):
        if k % config.restart == 0:
            with run.aside("fresh network", grad=True):
                now.theta = flat.flatten(network()).to(run.device)
        total = torch.zeros((), device=run.device)
        for c, where in members.items():
            drawn = torch.randint(len(where), (config.batch_real,), generator=run.shared)
            augment = dsa_of(config.dsa, size, run.shared_rand(), torch.rand(1, 3, generator=run.shared), config.fill)
            batch = augment(real.image[where[drawn]].to(run.device))
            target = _gradient(flat, now.theta, batch, torch.full((len(batch),), c, device=run.device))
            own = _gradient(flat, now.theta, augment(images[labels == c]), labels[labels == c], keep=True)
            total = total + gradient_distance(own, target, config.distance)
        run.update(optimizer, match=total)
        with torch.no_grad():
            for n in range(config.network_steps if (k + 1) % config.restart else 0):
                augment = dsa_of(config.dsa, size, run.shared_rand(), torch.rand(len(images), 3, generator=run.shared),
                                 config.fill)
                (now.theta,) = train(n, (now.theta,), (torch.tensor(config.network_lr), augment(images)))
    return DistilledSet(images.detach().cpu(), labels.cpu(), config.lr)


def _gradient(flat: FlatNetwork, theta: Tensor, image: Tensor, label: Tensor, keep: bool = False) -> list[Tensor]:
    """Loss gradient with respect to each parameter, in the parameters' shapes."""
    parameters = {name: p.detach().requires_grad_() for name, p in flat.split(theta).items()}
    loss = F.cross_entropy(flat.call(parameters, image), label)
    return list(torch.autograd.grad(loss, list(parameters.values()), create_graph=keep))
