"""Pictures of a run, and what it costs in memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from stillhouse.errors import DataError, require


def save(folder: Path, name: str, content: Any, columns: int | None = None) -> Path:
    """Write `<name>.png`: an image tensor [n, c, h, w] as a grid (scaled to its own range), or a figure."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{quote(name, safe=' ,=+()')}.png"
    if not isinstance(content, Tensor):
        content.savefig(path, dpi=120, bbox_inches="tight")
        return path
    require(content.dim() == 4 and content.shape[1] in (1, 3),
            f"a picture is a tensor [n, 1 or 3, h, w] or a matplotlib figure; got shape {tuple(content.shape)}",
            DataError)
    import matplotlib.image

    pixels = grid(content.detach().float().cpu(), columns)
    scale = max(1, 320 // max(pixels.shape[:2]))
    large = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    matplotlib.image.imsave(path, large.numpy(), vmin=0, vmax=1)
    return path


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """[n, c, h, w] -> [H, W, 3] in [0, 1], one pixel between pictures."""
    low, high = images.amin(), images.amax()
    images = ((images - low) / (high - low).clamp_min(1e-8)).expand(-1, 3, -1, -1)
    n, _, h, w = images.shape
    columns = columns or min(n, 10)
    rows = -(-n // columns)
    canvas = torch.ones(rows * (h + 1) - 1, columns * (w + 1) - 1, 3)
    for i, picture in enumerate(images):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        canvas[top : top + h, left : left + w] = picture.permute(1, 2, 0)
    return canvas


def scatter(**points: Tensor) -> Any:
    """A figure of named sets of points in the plane, at most 1,000 of each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    axes = figure.add_subplot()
    for name, x in points.items():
        axes.scatter(x[:1000, 0].tolist(), x[:1000, 1].tolist(), s=4, alpha=0.5, label=name)
    axes.set_aspect("equal")
    axes.legend()
    return figure


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the device"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB of memory"
