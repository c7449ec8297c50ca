"""A distilled data set: a few synthetic pictures, their labels, and the learning rate to train on them with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.augment import ZCA, random_tiles
from stillhouse.data.sets import TensorSet
from stillhouse.errors import DamagedFileError, DataError, require
from stillhouse.store import load_tree, save_tree

FILE = "distilled.safetensors"


@dataclass
class DistilledSet:
    """The target of dataset distillation.

    images: float32 [n, channels, height, width], in the space in which networks are trained on them.
    labels: int64 [n], or soft labels float32 [n, classes] (probabilities).
    lr: the (learned) learning rate for training on them, or None.
    whitening: the transform that real pictures must go through before a network trained on this set sees them.
    tile: (height, width) of the random windows that are training pictures, where `images` are textures that wrap.
    """

    images: Float[Tensor, "n channels height width"]
    labels: Tensor
    lr: float | None = None
    whitening: ZCA | None = None
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        require(self.images.dim() == 4 and len(self.images) > 0,
                f"images must be [n, channels, height, width], got {tuple(self.images.shape)}", DataError)
        require(len(self.labels) == len(self.images) and self.labels.dim() in (1, 2),
                f"labels must be [n] or [n, classes] for {len(self.images)} images, got {tuple(self.labels.shape)}",
                DataError)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> int:
        return self.labels.shape[1] if self.labels.dim() == 2 else int(self.labels.max()) + 1

    @property
    def bytes(self) -> int:
        """Storage of pictures and labels, in bytes: what budgets are compared in."""
        return sum(t.numel() * t.element_size() for t in (self.images, self.labels))

    def training_pictures(self, generator: torch.Generator | None = None) -> Float[Tensor, "n channels h w"]:
        """The pictures to train on: random windows of textures, else the images as they are."""
        return self.images if self.tile is None else random_tiles(self.images, self.tile, generator)

    def as_data_set(self) -> TensorSet:
        """`image` and `label` as a TensorSet for any training code (a texture gives one window at its corner)."""
        image = self.images if self.tile is None else self.images[..., : self.tile[0], : self.tile[1]]
        return TensorSet(image=image.detach().clone(), label=self.labels.detach().clone())

    def prepare(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Real pictures in the space of this set."""
        return images if self.whitening is None else self.whitening.apply(images)

    def pictures(self) -> Float[Tensor, "n channels height width"]:
        """The images to look at: without whitening."""
        images = self.images.detach().cpu()
        return images if self.whitening is None or self.tile is not None else self.whitening.invert(images)

    def save(self, folder: Path | str) -> Path:
        """Write the set and a PNG grid of it into `folder`. Raises StoreError where that is not possible."""
        folder = Path(folder)
        whitening = None if self.whitening is None else self.whitening.state()
        save_tree(folder / FILE, {"images": self.images, "labels": self.labels, "lr": self.lr, "tile": self.tile,
                                  "whitening": whitening})
        self.save_png(folder / "pictures.png")
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> DistilledSet:
        """Read a set written by `save`. Raises StoreError if it is not there, DamagedFileError if it is not one."""
        path = Path(folder) / FILE
        tree = load_tree(path)
        try:
            whitening = None if tree["whitening"] is None else ZCA(**tree["whitening"])
            return cls(tree["images"], tree["labels"], tree["lr"], whitening, tree["tile"])
        except (KeyError, TypeError) as error:
            raise DamagedFileError(f"{path} does not hold a distilled set ({error})") from error

    def save_png(self, path: Path | str, columns: int = 10) -> None:
        """A grid of the pictures, enlarged to be seen, each channel triple or the grey mean on its common scale."""
        import matplotlib.image

        images = self.pictures().float()
        colour = images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        low, high = colour.amin(), colour.amax()
        colour = (colour - low) / (high - low).clamp_min(1e-8)
        n, _, h, w = colour.shape
        rows, columns = -(-n // columns), min(n, columns)
        canvas = torch.ones(3, rows * (h + 1) - 1, columns * (w + 1) - 1)
        for i, picture in enumerate(colour):
            top, left = i // columns * (h + 1), i % columns * (w + 1)
            canvas[:, top : top + h, left : left + w] = picture
        zoom = max(1, 320 // max(canvas.shape[1:]))
        large = canvas.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        matplotlib.image.imsave(path, large.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
