"""Small networks for denoising: they predict whatever their wrapper, `NetworkDenoiser`, says they predict."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import RoleError, require


class FourierTime(nn.Module):
    """sin and cos of t at octaves 2^0, ..., 2^(count - 1) half-turns."""

    frequencies: Tensor

    def __init__(self, count: int = 8):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(count))

    def forward(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch features"]:
        angle = t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat([angle.sin(), angle.cos()], 1)


class MLPDenoiser(nn.Module):
    """An MLP on [x_t, Fourier features of t, class embedding], for samples of any small shape.

    `depth` hidden layers of `width` with SiLU; the embedding of time and class is added in every layer. `classes`
    classes plus the null class `classes`; 0 is unconditional. `outputs` samples are stacked along axis 1 (2 for the
    joint parameterisation). `bottleneck` is the middle hidden layer.
    """

    def __init__(self, shape: tuple[int, ...] = (2,), width: int = 64, depth: int = 3, classes: int = 0,
                 outputs: int = 1, frequencies: int = 8):
        super().__init__()
        require(width >= 1 and depth >= 1 and outputs >= 1, "width, depth and outputs must be at least 1, got "
                f"{width}, {depth} and {outputs}")
        self.shape, self.classes, self.outputs = tuple(shape), classes, outputs
        dim = math.prod(shape)
        self.time = FourierTime(frequencies)
        self.embed = nn.Linear(2 * frequencies, width)
        self.class_embed = nn.Embedding(classes + 1, width) if classes else None
        self.layers = nn.ModuleList(nn.Linear(width if i else dim, width) for i in range(depth))
        self.activations = nn.ModuleList(nn.SiLU() for _ in range(depth))
        self.bottleneck = self.activations[depth // 2]
        self.leave = nn.Linear(width, outputs * dim)

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        embedding = self.embed(self.time(t.to(x_t.dtype)))
        if self.class_embed is not None:
            if condition is None:
                condition = torch.full((len(x_t),), self.classes, device=x_t.device)
            embedding = embedding + self.class_embed(condition)
        elif condition is not None:
            raise RoleError("this MLPDenoiser was built without classes and cannot take a condition")
        h = x_t.flatten(1)
        for layer, activation in zip(self.layers, self.activations, strict=True):
            h = activation(layer(h) + embedding)
        return self.leave(h).view(len(x_t), self.outputs * self.shape[0], *self.shape[1:])
