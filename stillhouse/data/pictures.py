"""Pictures from disk: a folder as a set, decoded one by one when asked for."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.data.broken import Summary, tolerate
from stillhouse.errors import DataError, require

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "training", "validation", "valid", "val", "test")

TURNED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
"""Where a JPEG or PNG file may say that it must be turned."""


class Header(NamedTuple):
    """What is known of a picture without decoding it: width and height, and whether it has colour."""

    size: tuple[int, int]
    colour: bool


class ImageFolder:
    """Pictures read from disk one by one, when they are asked for.

    `paths` and `labels` (None without classes) are parallel; `classes` are the names of the labels. A picture that
    turns out to be unreadable is replaced by the next readable one of its class, with a warning, as long as no more
    than `limit_broken` of all are: the same index always gives the same picture. `broken` maps the unreadable files
    to the reason. Items are `image` float32 [channels, size, size] in [-1, 1] and `label`; `names` renames them.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor | None, classes: Sequence[str], size: int | None,
                 channels: int, limit_broken: float = 0.0, broken: dict[Path, str] | None = None):
        self.paths, self.labels, self.classes = list(paths), labels, tuple(classes)
        self.size, self.channels, self.limit_broken = size, channels, limit_broken
        self.broken = dict(broken or {})
        self.total = len(self.paths) + len(self.broken)
        self.names = {"image": "image"} | ({} if labels is None else {"label": "label"})

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.names.values())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        item: dict[str, Any] = {"index": index}
        if "image" in self.names:
            item[self.names["image"]] = _scaled(self._picture(index)[None])[0]
        if self.labels is not None and "label" in self.names:
            item[self.names["label"]] = int(self.labels[index])
        return item

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Some items, collated."""
        where = [range(len(self))[int(i)] for i in indices]
        found: dict[str, Any] = {"index": torch.tensor(where)}
        if "image" in self.names:
            pixels = [self._picture(i) for i in where]
            sizes = sorted({tuple(p.shape[:2]) for p in pixels})
            require(len(sizes) == 1, f"pictures of {len(sizes)} sizes came together in one batch ({sizes[0]}, "
                    f"{sizes[-1]}); give the one to bring them to: size=…", DataError)
            found[self.names["image"]] = _scaled(torch.stack(pixels))
        if self.labels is not None and "label" in self.names:
            found[self.names["label"]] = self.labels[where]
        return found

    def summary(self) -> Summary:
        """How many pictures there were, and which are left out, and why."""
        return Summary(self.total, self.broken, "pictures")

    def renamed(self, names: dict[str, str]) -> ImageFolder:
        """This set, its fields called otherwise."""
        self.names = {own: names.get(field, field) for own, field in self.names.items()}
        return self

    def without(self, *fields: str) -> ImageFolder:
        """This set without some fields."""
        self.names = {own: field for own, field in self.names.items() if field not in fields}
        return self

    def column(self, name: str) -> Tensor:
        """The labels, under the name that they have here; pictures are not decoded for one field."""
        require(self.labels is not None and name == self.names.get("label"), f"the pictures have no field '{name}' "
                "that could be read without decoding them", DataError)
        assert self.labels is not None
        return self.labels

    def _picture(self, index: int) -> Tensor:
        """The pixels of a picture, or of the one that stands in for it."""
        for place in self._in_turn(index):
            path = self.paths[place]
            if path in self.broken:
                continue
            try:
                return _pixels(path, self.size, self.channels)
            except DataError as error:
                self.broken[path] = str(error)
                tolerate(self.summary(), self.limit_broken)
        raise DataError(f"no readable picture is left to stand in for {self.paths[index]}")

    def _in_turn(self, index: int) -> Iterable[int]:
        """`index`, then the pictures after it that have the same label, around the end."""
        yield index
        for place in range(index + 1, index + len(self)):
            if self.labels is None or self.labels[place % len(self)] == self.labels[index]:
                yield place % len(self)


def read_folder(
    folder: Path | str, *, size: int | None = None, channels: int | None = None, limit_broken: float = 0.0,
    verify: int = 2000,
) -> ImageFolder:
    """The pictures of a folder, or of its class subfolders (searched to any depth); see `read_data`.

    Raises DataError for a folder without pictures, an empty class, pictures both beside and in subfolders, pictures
    of several sizes without `size`, and more than `limit_broken` unreadable ones.
    """
    folder = Path(folder).expanduser()
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = [p.name for p in inner if p.name.lower() in SPLITS]
    if len(splits) > 1 and len(splits) == len(inner):
        raise DataError(f"{folder} holds the parts {', '.join(splits)} of a data set, not classes; give the one you "
                        f"want: {folder / splits[0]}")
    found = {p.name: _pictures_in(p.rglob("*")) for p in inner}
    loose = _pictures_in(folder.iterdir())
    paths = loose or [path for group in found.values() for path in group]
    require(bool(paths), f"{folder} holds no pictures ({', '.join(PICTURES)})", DataError)
    require(not (loose and any(found.values())), f"{folder} has pictures beside its subfolders as well as in them; put "
            "all into class subfolders, or none", DataError)
    empty = [] if loose else [name for name, group in found.items() if not group]
    require(not empty, f"the class folder '{next(iter(empty), '')}' of {folder} holds no pictures; fill it or delete "
            "it: leaving it out would shift the labels", DataError)
    classes = () if loose else tuple(found)
    labels = None if loose else torch.tensor([i for i, group in enumerate(found.values()) for _ in group])

    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(header, paths))
        broken = {path: h for path, h in zip(paths, headers, strict=True) if isinstance(h, str)}
        good = [h for h in headers if isinstance(h, Header)]
        channels = channels or (3 if any(h.colour for h in good) else 1)
        fine = [path for path in paths if path not in broken]
        chosen = fine[:: max(1, -(-len(fine) // verify))] if verify else []
        broken |= {path: why for path, why in pool.map(lambda p: (p, _reason(p, size, channels)), chosen) if why}
    tolerate(Summary(len(paths), broken, "pictures"), limit_broken)
    kept = [i for i, path in enumerate(paths) if path not in broken]
    require(bool(kept), f"no picture of {folder} can be read", DataError)
    sizes = {h.size for i in kept if isinstance(h := headers[i], Header)}
    if size is None and len(sizes) > 1:
        some = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
        more = ", …" if len(sizes) > 3 else ""
        raise DataError(f"the pictures of {folder} have {len(sizes)} different sizes ({some}{more}); give the one to "
                        "bring them to: size=…")
    return ImageFolder([paths[i] for i in kept], None if labels is None else labels[kept], classes, size, channels,
                       limit_broken, broken)


def decode(path: Path | str, size: int | None = None, channels: int = 3, data: bytes | None = None) -> Tensor:
    """One picture as float32 [channels, height, width] in [-1, 1]; transparent parts are laid on white.

    With `data`, the bytes of the file, `path` is what it is called. Raises DataError, with the name of the file, if it
    cannot be read.
    """
    return _scaled(_pixels(path, size, channels, data)[None])[0]


def _scaled(pixels: Tensor) -> Tensor:
    """Bytes [n, height, width(, 3)] as float32 [n, channels, height, width] in [-1, 1]."""
    image = pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return image.float().div_(127.5).sub_(1)


def _pixels(path: Path | str, size: int | None, channels: int, data: bytes | None = None) -> Tensor:
    """One picture as bytes [height, width], or [height, width, 3]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path if data is None else io.BytesIO(data)) as opened:
            picture: Image.Image = opened
            picture.load()
            if picture.format not in ("JPEG", "PNG") or not TURNED.isdisjoint(picture.info):
                ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode == "F":
                raise ValueError("floating-point pictures have no fixed range; write them as .npz")
            if picture.mode.startswith("I"):
                deep = np.asarray(picture).astype(np.float32) / 65535
                picture = Image.fromarray((deep.clip(0, 1) * 255).round().astype(np.uint8))
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            mode = "L" if channels == 1 else "RGB"
            picture = picture if picture.mode == mode else picture.convert(mode)
            if size is not None and picture.size != (size, size):
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(picture))
    except Exception as error:
        raise DataError(f"cannot read the picture {path}: {type(error).__name__}: {error}") from error


def _pictures_in(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in PICTURES and not p.name.startswith(".") and p.is_file())


def header(path: Path | str, data: bytes | None = None) -> Header | str:
    """What is known of a picture, or why it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path if data is None else io.BytesIO(data)) as picture:
            exif = picture.getexif() if picture.format != "PNG" else {}  # of a PNG it would decode the whole picture
            turned = exif.get(0x0112, 1) >= 5
            grey = picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")
            return Header(picture.size[::-1] if turned else picture.size, not grey)
    except Exception as error:
        return f"cannot read the picture {path}: {type(error).__name__}: {error}"


def _reason(path: Path, size: int | None, channels: int) -> str | None:
    try:
        decode(path, size, channels)
        return None
    except DataError as error:
        return str(error)


def resized(image: Tensor, size: int | None) -> Tensor:
    """Pictures [n, channels, height, width] with the shorter side scaled to `size`, cut to the middle square."""
    height, width = image.shape[-2:]
    if size is None or (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
    image = F.interpolate(image, (tall, wide), mode="bilinear", antialias=True, align_corners=False)
    top, left = (tall - size) // 2, (wide - size) // 2
    return image[..., top : top + size, left : left + size].contiguous()


def coloured(image: Tensor, channels: int | None, name: str) -> Tensor:
    """Pictures with 1 or 3 channels. Raises DataError, saying `name`, where that cannot be done."""
    have = image.shape[1]
    if channels is None or have == channels:
        return image
    if have == 1:
        return image.expand(-1, channels, -1, -1).contiguous()
    require(have == 3, f"{name} has pictures of {have} channels, which cannot be made {channels}", DataError)
    luma = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (image * luma).sum(1, keepdim=True)
