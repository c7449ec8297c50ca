"""Pictures and texts for models that work on latents and are conditioned on text: encoded once, by the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import DataError, RoleError, require


def text_to_image_among(models: Sequence[Any]) -> Any:
    """The first model that has a way into its latents and an embedding of texts (`hub.diffusers.TextToImage`)."""
    return next((m for m in models if hasattr(m, "embed") and hasattr(m, "encode") and hasattr(m, "process")), None)


@torch.no_grad()
def encoded(data: Any, model: Any, batch: int = 16) -> TensorSet:
    """Samples for `model`: the latents of the pictures `x` [n, 3, height, width] in [-1, 1], and as conditions the
    embeddings of their `text`, where they have one. Data whose `x` has the channels of the latents is taken as it is.

    Raises RoleError for pictures of another number of channels.
    """
    wanted = int(model.vae.config.in_channels)
    channels = int(fetch(data, [0])["x"].shape[1])
    if channels == int(model.vae.config.latent_channels) and channels != wanted:
        return data
    require(channels == wanted, f"pictures of {channels} channels were given to a VAE that takes {wanted}; give "
            "pictures in colour", RoleError)
    device = next(model.parameters()).device
    rows: dict[str, list[Any]] = {}
    for start in range(0, len(data), batch):
        part = fetch(data, list(range(start, min(start + batch, len(data)))))
        rows.setdefault("x", []).append(model.encode(part["x"].to(device)).cpu())
        if "text" in part:
            rows.setdefault("condition", []).append(model.embed(part["text"]).cpu())
    return TensorSet(**{name: torch.cat(parts) for name, parts in rows.items()})


def prompts(path: Path | str, model: Any) -> TensorSet:
    """Conditions for `model`: the embeddings of the prompts in a text file, one a line. Raises DataError for a file
    without any."""
    try:
        lines = [s.strip() for s in Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines() if s.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the prompts in {path}: {error}") from error
    require(bool(lines), f"{path} holds no prompts; write one a line", DataError)
    return TensorSet(condition=model.embed(lines).cpu())
