"""Embedded classifiers, trained on first use and cached. None has seen the test pictures of the digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet, concatenate
from stillhouse.data.shapes import BACKGROUNDS, COLOURS, SHAPES, coloured_names, coloured_shapes, shape_pairs, shapes
from stillhouse.data.variants import balanced
from stillhouse.errors import require
from stillhouse.models.convnets import MLP, SmallResNet, SmallVGG, TinyConvNet
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
                            "mlp": MLP, "vgg": SmallVGG}


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


SPECIALISTS: dict[str, dict[str, Any]] = {
    "convnet": {"network": "convnet", "weak": (0, 1, 2, 3, 9), "few": 0.2, "steps": 450,
                "options": {"channels_in": 3, "width": 16}},
    "vgg": {"network": "vgg", "weak": (3, 4, 5, 6, 10), "few": 0.12, "steps": 350,
            "options": {"channels_in": 3, "width": 8, "image_size": 16}},
    "small convnet": {"network": "convnet", "weak": (8, 9, 10, 11, 4), "few": 0.2, "steps": 600,
                      "options": {"channels_in": 3}},
    "vit": {"network": "vit", "weak": (1, 5, 9, 6), "few": 0.3, "steps": 1800,
            "options": {"channels_in": 3, "depth": 2}},
    "mixer": {"network": "mixer", "weak": (2, 7, 8, 11), "few": 0.3, "steps": 1800,
              "options": {"channels_in": 3, "depth": 2}},
    "mlp": {"network": "mlp", "weak": (0, 4, 7, 10), "few": 0.4, "steps": 3000,
            "options": {"inputs": 768, "hidden": (128,)}},
}
"""Classifiers of the 12 classes of `shape_pairs` that differ in their architecture and in the classes that they have
seen little of."""


def specialists_data() -> TensorSet:
    """The pictures that the `SPECIALISTS` were trained on, all of them with labels."""
    return shape_pairs(4800, seed=1000)


def specialist(name: str) -> nn.Module:
    """One of the `SPECIALISTS`, in eval mode: trained with labels on `specialists_data`, of its weak classes on a
    few only."""
    spec = SPECIALISTS[name]
    recipe = {"what": "specialist on shape pairs", **spec, "n": 4800, "seed": 1000, "version": 1}
    tokens = spec["network"] in ("vit", "mixer")

    def fresh() -> nn.Module:
        return NETWORKS[spec["network"]](classes=12, **spec["options"])

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000).begin()
        run.say(f"training a specialist ({name}, {spec['steps']} steps, kept for later runs) …")
        pool = specialists_data()
        whole = torch.bincount(pool.label).tolist()
        data: Any = balanced(pool, [round(spec["few"] * n) if c in spec["weak"] else n for c, n in enumerate(whole)])
        config = supervised.Config(steps=spec["steps"], batch=64, lr=3e-3 if tokens else 0.05,
                                   optimizer="adamw" if tokens else "sgd")
        return dict(supervised.train(fresh(), data, config, run).state_dict())

    model = fresh()
    model.load_state_dict(cached("specialist", recipe, build))
    return model.eval()


def shapes_classifier(network: str = "resnet", size: int = 16, width: int = 16, n: int = 4000, steps: int = 800,
                      seed: int = 0) -> nn.Module:
    """A classifier of the 16 `coloured_shapes` of `size` pixels, in eval mode, of any of the `NETWORKS` that has a
    `width`: trained with labels and random views on `n` pictures that no experiment uses."""
    recipe = {"what": f"{network} on coloured shapes", "size": size, "width": width, "n": n, "steps": steps,
              "seed": seed, "version": 1}
    tokens = network in ("vit", "mixer")

    def fresh() -> nn.Module:
        return NETWORKS[network](channels_in=3, classes=len(coloured_names()), width=width)

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000 + seed).begin()
        run.say(f"training a classifier of the shapes ({network}, {steps} steps, kept for later runs) …")
        config = supervised.Config(steps=steps, batch=64, lr=3e-3 if tokens else 0.05,
                                   optimizer="adamw" if tokens else "sgd")
        data = coloured_shapes(n, seed=10_000, size=size)
        return dict(supervised.train(fresh(), data, config, run, lambda x: random_view(x, run)).state_dict())

    model = fresh()
    model.load_state_dict(cached("shapes-classifier", recipe, build))
    return model.eval()


SHELF = {"shape": 6, "colour": 6, "texture": 3, "digit": 10}
"""Tasks of the models on the `shelf`, and how many classes each has."""


def shelf_task(task: str, n: int = 3000, seed: int = 20_000, size: int = 16) -> TensorSet:
    """Coloured pictures with the labels of one of the `SHELF` tasks: which of six shapes on gradients and
    gratings; which of six colours on a plain ground; which kind of ground; which digit, bright on dark."""
    require(task in SHELF, f"tasks on the shelf are {', '.join(SHELF)}, not {task!r}")
    if task == "shape":
        return concatenate(shapes(n // 2, seed, size, SHAPES, background="gradient"),
                           shapes(n - n // 2, seed + 1, size, SHAPES, background="texture"))
    if task == "colour":
        drawn = shapes(n, seed, size, colours=tuple(COLOURS))
        return drawn.with_fields(label=drawn.colour)
    if task == "texture":
        grounds: Any = BACKGROUNDS
        parts = [shapes(n // 3, seed + i, size, background=b) for i, b in enumerate(grounds)]
        kinds = [part.with_fields(label=torch.full((len(part),), i)) for i, part in enumerate(parts)]
        return concatenate(*kinds)
    draw = torch.Generator().manual_seed(seed)
    source = digits(size, "train").select(torch.randint(1200, (n,), generator=draw))
    u = torch.rand(2, n, 3, 1, 1, generator=draw)
    ground, ink = 0.7 * u[0] - 1, u[1]
    image = ground + (source.image + 1) / 2 * (ink - ground)
    return TensorSet(image=image + 0.02 * torch.randn(image.shape, generator=draw), label=source.label)


def shelf(task: str, size: int = 16, width: int = 24, steps: int = 600) -> nn.Module:
    """A classifier of one of the `SHELF` tasks for coloured pictures of `size` pixels, in eval mode: a TinyConvNet of
    `width`, trained with labels and random views on pictures of `shelf_task`."""
    recipe = {"what": f"TinyConvNet on the shelf task {task}", "size": size, "width": width, "steps": steps,
              "version": 1}

    def build() -> dict[str, torch.Tensor]:
        run = Run(seed=1000).begin()
        run.say(f"training a model for the shelf ({task}, {steps} steps, kept for later runs) …")
        config = supervised.Config(steps=steps, batch=64, lr=0.05)
        fresh = TinyConvNet(3, SHELF[task], width=width)
        data: Any = shelf_task(task, size=size)
        return dict(supervised.train(fresh, data, config, run, lambda x: random_view(x, run)).state_dict())

    model = TinyConvNet(3, SHELF[task], width=width)
    model.load_state_dict(cached("shelf", recipe, build))
    return model.eval()
