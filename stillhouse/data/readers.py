"""The user's own data by one string: a folder of pictures, arrays, text, or the name of an embedded set.

Pictures are float32 [channels, height, width] in [-1, 1], as in the embedded sets: black is -1, white is 1.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.data.audio import read_sounds
from stillhouse.data.densities import gauss2d
from stillhouse.data.digits import corrupted_digits, digits
from stillhouse.data.distilled import FILE as DISTILLED
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.grammar import grammar
from stillhouse.data.label_shift import dirichlet_proportions, draw_domains, with_styles
from stillhouse.data.sets import TensorSet
from stillhouse.data.shapes import coloured_names, coloured_shapes, shapes
from stillhouse.data.text import pack_pairs, pack_plain
from stillhouse.data.tones import tones
from stillhouse.errors import ConfigError, DataError, UnknownNameError, require
from stillhouse.protocols import OFFERS, ClassNames, Conditions, DomainImages, Samples, SpeechData, TokenPairs

GRAPHS = "graphs.safetensors"
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
KINDS = "a folder of pictures, a file .npz, .safetensors or .jsonl, or the name of an embedded set"

def _motifs(split: str = "train", n: int | None = None, seed: int = 0) -> TensorSet:
    from stillhouse.data.graphs import motifs

    return motifs(split, n, seed)



def _domain_digits(split: str = "train", n: int = 4000, size: int = 8, classes: int = 5, domains: int = 8,
                   alpha: float = 0.5, condition: float = 8.0, styles: int = 0, seed: int = 0) -> TensorSet:
    W = dirichlet_proportions(classes, domains, alpha, condition, seed)
    drawn = draw_domains(digits(size, split), W, n, seed, noise=0.05).without("label")
    return with_styles(drawn, styles, 2.0, seed, seed) if styles else drawn


def _coloured_shapes(n: int = 1280, seed: int = 0, size: int = 32, background: Any = "texture", hue: float = 30.0,
                     base: bool = False) -> TensorSet:
    drawn = coloured_shapes(n, seed, size, background, hue)
    return drawn.select((drawn.label < len(coloured_names()) // 2).nonzero().flatten()) if base else drawn


EMBEDDED: dict[str, Callable[..., TensorSet]] = {
    "coloured-shapes": _coloured_shapes,
    "coloured-shape-names": lambda: TensorSet(name=coloured_names()),
    "digits": lambda split="train", size=8: digits(size, split),
    "corrupted-digits": lambda split="unlabelled", size=8, n=250, seed=0: corrupted_digits(n, size, split, seed),
    "domain-digits": _domain_digits,
    "gauss2d": lambda n=4096, std=0.15, seed=0: gauss2d(n, std=std, seed=seed),
    "grammar": lambda split="train", n=800, seed=0: grammar(split, n, seed),
    "motifs": _motifs,
    "shapes": lambda n=1000, seed=0, size=32, background="plain", hue=0.0: shapes(n, seed, size, background=background,
                                                                                  hue=hue),
    "tones": lambda n=1500, seed=0, noise=0.1, seconds=1.0: tones(n, seed, noise, seconds),
}
"""Embedded sets by name, with the options that may follow the name."""


def read_data(
    text: str | Path,
    role_kind: Any = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    limit_broken: float = 0.0,
    verify: int = 2000,
    conditional: bool = False,
    tokenizer: Any = None,
    length: int = 512,
) -> Any:
    """The data set that `text` names, a map-style set of dicts with `fields`.

    - A folder: class subfolders give `image` and `label` (their names sorted), pictures alone give `image`. They are
      decoded when asked for (`ImageFolder`). A `DistilledSet` or `GraphSet` saved in a folder is given.
    - `.npz` or `.safetensors`: `image` (and `label`, `other`) or `x` (and `condition`). Pictures of type uint8
      are scaled from [0, 255] to [-1, 1], others kept; [n, h, w] and [n, h, w, channels] are understood.
    - `.jsonl`: one JSON object a line with texts `prompt` and `response`, or `text`. With a `tokenizer` they are
      packed into sequences of `length` tokens at most, without one they stay text for `tokenised`.
    - `.txt`, for class names: one a line. The class subfolders of a folder of pictures are names too.
    - An embedded set: `digits`, `digits16:test`, `gauss2d:n=1000,seed=1`, `grammar:validation`. A file or folder of
      that name must be written `./digits`.

    `role_kind`, a data protocol of `stillhouse.protocols`, says which fields must be there; for `Samples` a picture
    becomes `x` and, if `conditional`, its label `condition`; for `Conditions` the label alone is read; for
    `DomainImages` the class subfolders, or labels, are domains unless there is a field `domain`. `size` is the
    wanted height and width of pictures: a larger or smaller one is scaled to cover the square, then cut to its middle.
    `channels` is 1 (grey) or 3 (RGB), for a folder by default 3 if any picture has colour. `limit_broken` is the part
    of the files (or lines) that may be unreadable: they are left out with a warning. `verify` pictures of a folder are
    decoded before any work, of the others the header is read.

    Raises DataError: nothing at that path, an empty folder, a broken file above the limit, values that are not
    finite, a missing field, a single class where labels are needed, a pickle. Raises UnknownNameError for an embedded
    set that does not exist or an option it does not have, ConfigError for an impossible `size` or `channels`.
    """
    require(size is None or size >= 1, f"size must be at least 1 pixel, not {size}")
    require(channels in (None, 1, 3), f"channels is 1 (grey) or 3 (RGB), not {channels}")
    require(0 <= limit_broken < 1, f"limit_broken is a fraction in [0, 1), not {limit_broken}")
    text = str(text)
    path = Path(text).expanduser()
    data: Any
    if embedded_name(text) is not None:
        data = read_embedded(text, size)
    elif path.suffix.lower() in PICKLES:
        raise DataError(f"{path} is a pickle, or may hold one: reading it could run any program hidden in it, so it is "
                        "refused. Load it once where you trust it, and write the arrays with numpy.savez(…, image=…, "
                        "label=…) or safetensors")
    elif not path.exists():
        raise _nothing(text)
    elif path.is_dir() and role_kind is SpeechData:
        data = read_sounds(path, size)
    elif path.is_dir():
        saved = [path / name for name in (DISTILLED, GRAPHS) if (path / name).is_file()]
        data = _saved_set(saved[0]) if saved else read_folder(
            path, size=size, channels=channels, limit_broken=limit_broken, verify=verify)
    elif path.name in (DISTILLED, GRAPHS):
        data = _saved_set(path)
    elif path.suffix.lower() in (".npz", ".safetensors"):
        data = read_arrays(path)
    elif path.suffix.lower() == ".txt" and role_kind is ClassNames:
        data = read_names(path)
    elif path.suffix.lower() == ".jsonl":
        data = read_jsonl(path, limit_broken)
    else:
        raise DataError(f"{path} has an ending that is not read here ('{path.suffix}'); give {KINDS}")
    if isinstance(data, TensorSet) and "image" in data.data:
        data = data.with_fields(image=_coloured(_resized(data.image, size), channels, text))
    if tokenizer is not None and {"prompt", "text"} & set(data.fields):
        data = tokenised(data, tokenizer, length)
    return for_role(data, role_kind, text, conditional)


def for_role(data: Any, role_kind: Any, name: str = "the data", conditional: bool = False) -> Any:
    """`data` with its fields named as `role_kind` wants them. Raises DataError for one that is missing."""
    if role_kind is None:
        return data
    if role_kind is Samples or role_kind is Conditions:
        renamed = {"label": "condition"} if (conditional or role_kind is Conditions) else {}
        if "x" not in data.fields:
            renamed["image"] = "x"
        data = _renamed(data, {old: new for old, new in renamed.items() if new not in data.fields})
    if role_kind is Conditions:
        data = _without_samples(data)
    if role_kind is ClassNames and isinstance(data, ImageFolder) and data.classes:
        data = TensorSet(name=[c.replace("_", " ") for c in data.classes])
    if role_kind is DomainImages and "domain" not in data.fields and "label" in data.fields:
        data = _renamed(data, {"label": "domain"})
    needed = OFFERS.get(role_kind, ())
    if role_kind is TokenPairs and {"prompt", "text"} & set(data.fields):
        return data
    absent = [field for field in needed if field not in data.fields]
    if "label" in absent and isinstance(data, ImageFolder):
        raise DataError(f"{name} has no labels, and its role needs them: put the pictures of each class into a "
                        "subfolder named after it")
    if absent:
        raise DataError(f"{name} has no field '{absent[0]}', which its role ({role_kind.__name__}) needs; it has "
                        f"{', '.join(data.fields)}")
    if "label" in needed:
        labels = torch.as_tensor(data.labels if isinstance(data, ImageFolder) else data.label)
        if labels.dim() == 1 and len(labels.unique()) < 2:
            raise DataError(f"every sample of {name} has the label {int(labels[0])}: at least two classes are needed "
                            "where labels are learned from")
    return data


# ---------------------------------------------------------------------------------- a folder of pictures


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
            item[self.names["image"]] = self._picture(index)
        if self.labels is not None:
            item[self.names["label"]] = int(self.labels[index])
        return item

    def column(self, name: str) -> Tensor:
        """The labels, under the name that they have here; pictures are not decoded for one field."""
        require(self.labels is not None and name == self.names["label"], f"the pictures have no field '{name}' that "
                "could be read without decoding them", DataError)
        assert self.labels is not None
        return self.labels

    def _picture(self, index: int) -> Tensor:
        for place in self._in_turn(index):
            path = self.paths[place]
            if path in self.broken:
                continue
            try:
                return decode(path, self.size, self.channels)
            except DataError as error:
                self.broken[path] = str(error)
                _tolerate(self.broken, self.total, self.limit_broken)
        raise DataError(f"no readable picture is left to stand in for {self.paths[index]}")

    def _in_turn(self, index: int) -> Iterable[int]:
        """`index`, then the pictures after it that have the same label, around the end."""
        for place in range(index, index + len(self)):
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
        headers = list(pool.map(_header, paths))
        broken = {path: h for path, h in zip(paths, headers, strict=True) if isinstance(h, str)}
        good = [h for h in headers if isinstance(h, Header)]
        channels = channels or (3 if any(h.colour for h in good) else 1)
        fine = [path for path in paths if path not in broken]
        chosen = fine[:: max(1, -(-len(fine) // verify))] if verify else []
        broken |= {path: why for path, why in pool.map(lambda p: (p, _reason(p, size, channels)), chosen) if why}
    _tolerate(broken, len(paths), limit_broken)
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


def decode(path: Path | str, size: int | None = None, channels: int = 3) -> Tensor:
    """One picture as float32 [channels, height, width] in [-1, 1]; transparent parts are laid on white.

    Raises DataError, with the name of the file, if it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode == "F":
                raise ValueError("floating-point pictures have no fixed range; write them as .npz")
            if picture.mode.startswith("I"):
                deep = np.asarray(picture).astype(np.float32) / 65535
                picture = Image.fromarray((deep.clip(0, 1) * 255).round().astype(np.uint8))
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            picture = picture.convert("L" if channels == 1 else "RGB")
            if size is not None:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
            values = np.array(picture)
    except Exception as error:
        raise DataError(f"cannot read the picture {path}: {type(error).__name__}: {error}") from error
    image = torch.from_numpy(values).float().div(127.5).sub(1)
    return image[None] if channels == 1 else image.permute(2, 0, 1).contiguous()


def _pictures_in(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if p.suffix.lower() in PICTURES and not p.name.startswith(".") and p.is_file())


def _header(path: Path) -> Header | str:
    from PIL import Image

    try:
        with Image.open(path) as picture:
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


def _tolerate(broken: dict[Path, str], total: int, limit: float) -> None:
    """Warn of the unreadable files, or raise DataError if they are more than `limit` of all."""
    if not broken:
        return
    named = "; ".join(list(broken.values())[:3]) + ("; …" if len(broken) > 3 else "")
    said = f"{len(broken)} of {total} pictures cannot be read: {named}"
    if len(broken) > limit * total:
        raise DataError(f"{said}. Repair or delete them, or raise limit_broken (now {limit}), the part that may be "
                        "left out")
    warnings.warn(f"{said}. They are left out", stacklevel=3)


# ---------------------------------------------------------------------------------- arrays


def _saved_set(path: Path) -> TensorSet:
    if path.name == DISTILLED:
        return DistilledSet.load(path.parent).as_data_set()
    from stillhouse.data.graphs import GraphSet

    return GraphSet.load(path.parent)


def read_arrays(path: Path | str) -> TensorSet:
    """`image` (and `label`) or `x` (and `condition`) from a .npz or .safetensors file.

    Raises DataError for pickled arrays, damaged files, wrong names or shapes, and values that are not finite.
    """
    path = Path(path).expanduser()
    arrays = _npz(path) if path.suffix.lower() == ".npz" else _safetensors(path)
    main = next((name for name in ("image", "audio", "x", "condition") if name in arrays), "")
    require(bool(main), f"{path} has no array named 'image', 'audio', 'x' or 'condition' but "
            f"{', '.join(arrays) or 'nothing'}; name them, e.g. numpy.savez(path, image=images, label=labels)",
            DataError)
    known = {name: value for name, value in arrays.items()
             if name in ("image", "audio", "x", "label", "condition", "domain", "other")}
    lengths = {name: len(value) if value.dim() else 0 for name, value in known.items()}
    require(len(set(lengths.values())) == 1, f"the arrays of {path} differ in length: {lengths}", DataError)
    require(lengths[main] > 0, f"'{main}' of {path} is empty", DataError)
    fields: dict[str, Tensor] = {}
    for name, value in known.items():
        whole = name in ("label", "domain")
        fields[name] = _labels(value, name, path) if whole else _values(value, name, path)
    return TensorSet(**fields)


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(_native(file[name]))) for name in file.files}
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise DataError(f"{path} is damaged: {error}") from error
        raise DataError(f"{path} holds pickled objects (arrays of dtype object): reading them could run any program "
                        "hidden in them, so they are refused. Save plain numeric arrays of one shape") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path} holds an array that is not numeric: {error}") from error
    except Exception as error:
        raise DataError(f"{path} is damaged or no .npz file: {type(error).__name__}: {error}") from error


def _native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's byte order, unsigned integers in a type that torch has."""
    array = array.astype(array.dtype.newbyteorder("="))
    return array.astype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or no .safetensors file: {error}") from error


def _labels(value: Tensor, name: str, path: Path) -> Tensor:
    if value.is_floating_point() and value.dim() == 1 and bool((value == value.round()).all()):
        value = value.long()
    require(value.dim() == 1 and not value.is_floating_point(), f"'{name}' of {path} must be whole numbers [n], got "
            f"{value.dtype} {tuple(value.shape)}", DataError)
    require(int(value.min()) >= 0, f"'{name}' of {path} has negative labels; number the classes from 0, and leave "
            "unlabelled samples to a file of their own", DataError)
    return value.long()


def _values(value: Tensor, name: str, path: Path) -> Tensor:
    if name == "condition" and value.dim() == 1 and not value.is_floating_point():
        return value.long()
    scaled = name in ("image", "other") and value.dtype == torch.uint8
    value = value.float()
    finite = torch.isfinite(value.flatten(1) if value.dim() > 1 else value[:, None]).all(1)
    if not finite.all():
        raise DataError(f"'{name}' of {path} has NaN or infinite values in {int((~finite).sum())} of {len(value)} "
                        f"samples, the first at index {int((~finite).nonzero()[0])}")
    if name != "image" and not scaled:
        return value
    if value.dim() == 3:
        value = value[:, None]
    elif value.dim() == 4 and value.shape[1] not in (1, 3) and value.shape[-1] in (1, 3):
        value = value.permute(0, 3, 1, 2).contiguous()
    require(value.dim() == 4, f"'{name}' of {path} must be [n, channels, height, width], got {tuple(value.shape)}; "
            "samples of another shape are named 'x'", DataError)
    return value / 127.5 - 1 if scaled else value


# ---------------------------------------------------------------------------------- text


def read_jsonl(path: Path | str, limit_broken: float = 0.0) -> TensorSet:
    """Lists `prompt` and `response`, or `text`, from a file with one JSON object a line; empty lines are skipped.

    Raises DataError, with the line's number, for what is no JSON object, a missing or empty field, in more than
    `limit_broken` of the lines, and for a file without lines.
    """
    path = Path(path).expanduser()
    rows: list[dict[str, str]] = []
    bad: list[str] = []
    wanted: tuple[str, ...] = ()
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                require(isinstance(row, dict), f"a JSON object is expected, not {type(row).__name__}", DataError)
                wanted = wanted or (("text",) if "text" in row and "prompt" not in row else ("prompt", "response"))
                absent = [f for f in wanted if f not in row]
                require(not absent, f"'{', '.join(absent)}' is missing (there is {', '.join(row)})", DataError)
                empty = [f for f in wanted if not (isinstance(row[f], str) and row[f].strip())]
                require(not empty, f"'{', '.join(empty)}' must be a text that is not empty", DataError)
                rows.append({f: row[f] for f in wanted})
            except ValueError as error:
                bad.append(f"line {number}: {error}")
    total = len(rows) + len(bad)
    require(total > 0, f"{path} has no lines", DataError)
    if bad:
        said = f"{len(bad)} of {total} lines of {path} cannot be used: {'; '.join(bad[:3])}{'; …' * (len(bad) > 3)}"
        require(len(bad) <= limit_broken * total, f"{said}. Each line is an object like "
                '{"prompt": "…", "response": "…"} or {"text": "…"}', DataError)
        warnings.warn(f"{said}. They are left out", stacklevel=2)
    return TensorSet(**{f: [row[f] for row in rows] for f in wanted})


def read_names(path: Path | str) -> TensorSet:
    """Class names from a text file, one a line in the order of the labels; empty lines are skipped.

    Raises DataError for a file without names.
    """
    path = Path(path).expanduser()
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    require(bool(names), f"{path} holds no class names; write one a line", DataError)
    return TensorSet(name=names)


def tokenised(data: Any, tokenizer: Any, length: int = 512, prompt_length: int | None = None) -> TensorSet:
    """The texts of `read_jsonl` as a TokenPairs set, by a `transformers` tokenizer.

    Prompt and response go into one sequence of at most `length` tokens, the prompt into at most `prompt_length` (half
    of them by default); plain `text` is joined and cut into windows of `length`.
    """
    if "text" in data.fields:
        return pack_plain(data.text, tokenizer, length)
    pairs = list(zip(data.prompt, data.response, strict=True))
    return pack_pairs(pairs, tokenizer, length, prompt_length or length // 2)


# ---------------------------------------------------------------------------------- embedded sets


def embedded_name(text: str) -> str | None:
    """The embedded set that a string names, None if it names none."""
    head = text.split(":", 1)[0]
    if head in EMBEDDED:
        return head
    base = re.sub(r"\d+$", "", head)
    return base if base in ("digits", "corrupted-digits") else None


def read_embedded(text: str, size: int | None = None) -> TensorSet:
    """An embedded set by its name, its options after a colon: `digits16:test`, `gauss2d:n=1000,seed=1`.

    Raises UnknownNameError for another name or option.
    """
    name = embedded_name(text)
    if name is None:
        raise UnknownNameError(f"there is no embedded set '{text}'; there are {', '.join(EMBEDDED)}")
    head, _, rest = text.partition(":")
    make = EMBEDDED[name]
    known = inspect.signature(make).parameters
    options = parse_options(rest, "split") if rest else {}
    if head != name:
        options["size"] = int(head.removeprefix(name))
    if size is not None and "size" in known:
        options.setdefault("size", size)
    for option in options:
        require(option in known, f"'{name}' has no option '{option}'; it has {', '.join(known)}", UnknownNameError)
    for option in set(options) - {"split"}:
        words = isinstance(known[option].default, str)
        require(words or isinstance(options[option], int | float), f"'{option}' of '{name}' is a number, not "
                f"{options[option]!r}", DataError)
    return make(**options)


def parse_options(text: str, first: str | None = None) -> dict[str, Any]:
    """`a=1,b=x` as a dict: whole numbers, numbers, true/false/none, else strings. `first` names a value without `=`.

    Raises ConfigError for anything else.
    """
    options: dict[str, Any] = {}
    for i, part in enumerate(text.split(",")):
        name, equals, value = part.strip().partition("=")
        if not equals and i == 0 and first is not None and name:
            name, value = first, name
        elif not (equals and name.strip().isidentifier() and value.strip()):
            raise ConfigError(f"'{part}' is not an option of the form name=value (in '{text}')")
        require(name.strip() not in options, f"'{name.strip()}' is given twice in '{text}'")
        options[name.strip()] = _literal(value.strip())
    return options


def _literal(value: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


# ---------------------------------------------------------------------------------- shared


def _nothing(text: str) -> DataError | UnknownNameError:
    head = text.split(":", 1)[0]
    near = difflib.get_close_matches(head, EMBEDDED, n=1, cutoff=0.6)
    if near and "/" not in text and not Path(text).suffix:
        return UnknownNameError(f"there is no file or embedded set '{text}'; did you mean '{near[0]}'? Embedded are "
                                f"{', '.join(EMBEDDED)}")
    return DataError(f"there is nothing at {Path(text).expanduser()} (seen from {Path.cwd()}); give {KINDS} "
                     f"({', '.join(EMBEDDED)})")


def _renamed(data: Any, names: dict[str, str]) -> Any:
    if isinstance(data, ImageFolder):
        data.names = {own: names.get(field, field) for own, field in data.names.items()}
        return data
    return TensorSet(**{names.get(field, field): value for field, value in data.data.items()})


def _without_samples(data: Any) -> Any:
    if isinstance(data, ImageFolder):
        data.names.pop("image", None)
        return data
    return data.without("x") if set(data.fields) - {"x"} else data


def _resized(image: Tensor, size: int | None) -> Tensor:
    """Scaled so that the shorter side is `size`, then cut to the middle square."""
    height, width = image.shape[-2:]
    if size is None or (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    tall, wide = max(size, round(height * scale)), max(size, round(width * scale))
    image = F.interpolate(image, (tall, wide), mode="bilinear", antialias=True, align_corners=False)
    top, left = (tall - size) // 2, (wide - size) // 2
    return image[..., top : top + size, left : left + size].contiguous()


def _coloured(image: Tensor, channels: int | None, name: str) -> Tensor:
    have = image.shape[1]
    if channels is None or have == channels:
        return image
    if have == 1:
        return image.expand(-1, channels, -1, -1).contiguous()
    require(have == 3, f"{name} has pictures of {have} channels, which cannot be made {channels}", DataError)
    luma = image.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (image * luma).sum(1, keepdim=True)
