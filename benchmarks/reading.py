"""Reading a folder of pictures: `run.loop` over an `ImageFolder` against a bare torch DataLoader over PIL."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from stillhouse.data.pictures import ImageFolder, read_folder
from stillhouse.run import Run

PICTURES = 384
BATCH = 32
REPEATS = 5
SIZES = (64, 96, 128)


class Bare(Dataset):
    """The least that gives the same tensors."""

    def __init__(self, paths: list[Path], labels: list[int], size: int):
        self.paths, self.labels, self.size = paths, labels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Image.open(self.paths[index]) as opened:
            picture = opened.convert("RGB")
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(127.5).sub(1)
        return {"index": index, "image": image, "label": self.labels[index]}


def make_folder(folder: Path, n: int = PICTURES) -> None:
    """Smooth random pictures in two classes, half of them PNG and half JPEG, of 64 to 128 pixels a side."""
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        size = SIZES[i % len(SIZES)]
        where = folder / ("even", "odd")[i % 2]
        where.mkdir(exist_ok=True)
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(where / f"{i}.{('png', 'jpg')[i // 2 % 2]}")


def ours(data: ImageFolder, workers: int) -> float:
    """Pictures read in a second."""
    with Run(quiet=True, workers=workers) as run:
        start = time.perf_counter()
        count = sum(len(batch["image"]) for batch in run.loop("read", data, batch=BATCH, epochs=1))
        return count / (time.perf_counter() - start)


def bare(data: Bare, workers: int) -> float:
    """Pictures read in a second."""
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers)
    start = time.perf_counter()
    count = sum(len(batch["image"]) for batch in loader)
    return count / (time.perf_counter() - start)


def measure() -> dict[str, Any]:
    """"ours" and "bare" in pictures/s, one number a repeat, without workers; "note" says how it is with two."""
    found, two = alternate(0), alternate(2)
    return {"name": "reading an image folder", "unit": "pictures/s", **found,
            "note": f"{PICTURES} PNG and JPEG files of 64 to 128 pixels, brought to 64, batches of {BATCH}; with 2 "
                    f"workers {np.median(two['ours']):.0f} against {np.median(two['bare']):.0f}"}


def alternate(workers: int, repeats: int = REPEATS) -> dict[str, list[float]]:
    """Both, in turn, over the same files; a first repeat warms up."""
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as name:
        make_folder(Path(name))
        data = read_folder(name, size=SIZES[0])
        plain = Bare(data.paths, data.column("label").tolist(), SIZES[0])
        for repeat in range(repeats + 1):
            for own, read in (("ours", lambda: ours(data, workers)), ("bare", lambda: bare(plain, workers)))[
                    :: 1 if repeat % 2 else -1]:
                speed = read()
                if repeat:
                    found[own].append(speed)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = measure()
    mine, theirs = (float(np.median(result[own])) for own in ("ours", "bare"))
    print(f"{mine:.0f} against {theirs:.0f} {result['unit']} ({mine / theirs:.2f}); {result['note']}")
