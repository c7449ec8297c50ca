"""Embedded expert trajectories for the systems that distil data sets. None has seen the test pictures."""

from __future__ import annotations

from stillhouse.data.augment import DSA_DIGITS
from stillhouse.data.digits import digits
from stillhouse.models.convnets import ConvNet
from stillhouse.protocols import Network
from stillhouse.recipes.trajectories import Trajectories, record_trajectories
from stillhouse.run import Run
from stillhouse.zoo.cache import cached


def digits_network(width: int = 16) -> Network:
    """A factory of the ConvNets (2 blocks, instance norm) that the experts on 8x8 digits are."""
    return lambda: ConvNet(1, 10, width, depth=2, image_size=8)


def digits_experts(count: int = 12, epochs: int = 40, lr: float = 0.1, width: int = 16,
                   strategy: str = DSA_DIGITS) -> Trajectories:
    """Trajectories of `count` such ConvNets on the 1,200 pictures of "train": plain SGD, batch 256, DSA.

    About 97 % on "test" at the end of 40 epochs.
    """
    recipe = {"what": "ConvNets on digits/train", "count": count, "epochs": epochs, "lr": lr, "width": width,
              "strategy": strategy, "version": 1}

    def build() -> list:
        run = Run(seed=1000)
        run.say(f"training {count} expert networks on digits (kept for later runs) …")
        return record_trajectories(digits_network(width), digits(8, "train"), count=count, epochs=epochs, lr=lr,
                                   strategy=strategy, fill=-1.0, run=run).experts

    return Trajectories(cached("digits-experts", recipe, build))
