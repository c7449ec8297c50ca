"""Generators of small pictures from a vector of noise."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import require


class PictureGenerator(nn.Module):
    """DCGAN's generator with upsampling (the one that data-free distillation uses, Chen et al. 2019): linear to `width`
    maps of a quarter of the side, BatchNorm, then twice: double the side, conv 3x3, BatchNorm, leaky ReLU 0.2; conv
    3x3, tanh. Pictures lie in [-1, 1]; `latent` is the length of the noise, `eps` that of the later
    BatchNorms (0.8 in much code of DCGAN, which damps them)."""

    def __init__(self, latent: int, channels: int = 1, image_size: int = 16, width: int = 128,
                 eps: float = 1e-5):
        super().__init__()
        require(image_size % 4 == 0, f"a picture of {image_size} pixels has no quarter of whole pixels")
        require(latent >= 1 and width >= 2, f"latent must be 1 or more and width 2 or more; got {latent} and {width}")
        side = image_size // 4
        self.latent = latent
        self.project = nn.Sequential(nn.Linear(latent, width * side * side), nn.Unflatten(1, (width, side, side)),
                                     nn.BatchNorm2d(width))
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width, eps),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width // 2, 3, 1, 1), nn.BatchNorm2d(width // 2, eps),
            nn.LeakyReLU(0.2), nn.Conv2d(width // 2, channels, 3, 1, 1), nn.Tanh())

    def forward(self, z: Float[Tensor, "batch latent"]) -> Float[Tensor, "batch channels height width"]:
        return self.body(self.project(z))
