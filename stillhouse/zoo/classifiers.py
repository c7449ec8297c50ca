"""Embedded classifiers, trained on first use and cached. None has seen the test pictures of the digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stillhouse.data.digits import digits
from stillhouse.models.convnets import MLP, SmallResNet, TinyConvNet
from stillhouse.models.vit import SmallMixer, SmallViT
from stillhouse.recipes import supervised
from stillhouse.recipes.views import random_view
from stillhouse.run import Run
from stillhouse.zoo.cache import cached


def digits_teacher(size: int = 16, width: int = 16, steps: int = 600, noise: float = 0.0) -> nn.Module:
    """A SmallResNet for digits of `size` pixels, in eval mode: trained on the 1,200 pictures of "train" with their
    labels under random views (shifted, turned, scaled, with a square erased). About 99.5 % on "test" at 16 pixels.

    `noise` gives that part of the training pictures a random label, for weaker teachers.
    """
    recipe = {"what": "SmallResNet on digits/train", "size": size, "width": width, "steps": steps, "noise": noise,
              "version": 1}

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000).begin()
        run.say(f"training the digits teacher ({steps} steps, kept for later runs) …")
        data: Any = digits(size, "train")
        wrong = torch.rand(len(data)) < noise
        data = data.with_fields(label=torch.where(wrong, torch.randint(10, (len(data),)), data.label))
        config = supervised.Config(steps=steps, batch=64, lr=0.05)
        teacher = supervised.train(SmallResNet(width=width), data, config, run,
                                   lambda x: random_view(x, run, erase=0.25))
        return dict(teacher.state_dict())

    teacher = SmallResNet(width=width)
    teacher.load_state_dict(cached("digits-teacher", recipe, build))
    return teacher.eval()


NETWORKS: dict[str, Any] = {"resnet": SmallResNet, "convnet": TinyConvNet, "vit": SmallViT, "mixer": SmallMixer,
                            "mlp": MLP}


def digits_classifier(network: str = "resnet", size: int = 16, first: int = 0, last: int = 1200, steps: int = 600,
                      noise: float = 0.0, lr: float | None = None, seed: int = 0, **options: Any) -> nn.Module:
    """A classifier of digits of `size` pixels, in eval mode, of any of the `NETWORKS` with its `options`: trained with
    labels and random views on the pictures `first` to `last` of "train" (stratified), a part `noise` of them with a
    random label.

    Transformers and mixers take AdamW (learning rate 0.003), the others SGD (0.05). `seed` gives other weights.
    """
    tokens = network in ("vit", "mixer")
    lr = lr or (3e-3 if tokens else 0.05)
    recipe = {"what": f"{network} on digits/train", "size": size, "first": first, "last": last, "steps": steps,
              "noise": noise, "lr": lr, "seed": seed, "options": options, "version": 1}

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000 + seed).begin()
        run.say(f"training a classifier of the digits ({network}, {steps} steps, kept for later runs) …")
        data: Any = digits(size, "train").select(range(first, last))
        wrong = torch.rand(len(data)) < noise
        data = data.with_fields(label=torch.where(wrong, torch.randint(10, (len(data),)), data.label))
        config = supervised.Config(steps=steps, batch=64, lr=lr, optimizer="adamw" if tokens else "sgd")
        fresh = NETWORKS[network](**options)
        return dict(supervised.train(fresh, data, config, run, lambda x: random_view(x, run, erase=0.25)).state_dict())

    model = NETWORKS[network](**options)
    model.load_state_dict(cached("digits-classifier", recipe, build))
    return model.eval()
