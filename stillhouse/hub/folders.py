"""A network and its scheduler from a folder that `diffusers` saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, UnknownNameError, require
from stillhouse.hub.refusals import PICKLE, only_pickles, read_json

NETWORKS = ("unet", "transformer", "network")
KNOWN = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


def denoiser_from(folder: Path | str) -> NetworkDenoiser:
    """The Denoiser in a folder of a `diffusers` pipeline (unet or transformer, and scheduler), or one in which
    Stillhouse saved a few-step sampler for `diffusers`.

    Raises UnknownNameError for a folder that does not exist, RoleError for a class that is not understood or pickled
    weights, DamagedFileError, MissingExtraError without `diffusers`.
    """
    folder = Path(folder).expanduser()
    require(folder.is_dir(), f"there is no folder {folder} (seen from {Path.cwd()}); bring a model of the hub here "
            f"where there is internet: hf download NAME --local-dir {folder.name}", UnknownNameError)
    place = next((folder / name for name in NETWORKS if (folder / name / "config.json").is_file()), None)
    if place is None or not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise RoleError(f"{folder} needs a network ({', '.join(NETWORKS)}) with its config.json, and a scheduler/ with "
                        "scheduler_config.json: save both there with save_pretrained")
    name = read_json(place / "config.json").get("_class_name")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    require(name in KNOWN, f"{place} holds a {name}; understood are {', '.join(KNOWN)}", RoleError)
    found = only_pickles(place)
    require(not found, f"{(found or [place])[0]}: {PICKLE}", RoleError)
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers:… needs diffusers; install it with: pip install 'stillhouse[diffusion]'"
                                ) from error
    from stillhouse.hub.diffusers import from_diffusers

    maker: Any = getattr(diffusers, str(scheduler), None)
    require(isinstance(maker, type) and issubclass(maker, diffusers.SchedulerMixin),
            f"{folder} has a scheduler '{scheduler}', which diffusers does not know", RoleError)
    try:
        network = getattr(diffusers, str(name)).from_pretrained(place, use_safetensors=True, local_files_only=True)
        return from_diffusers(network, maker.from_pretrained(folder / "scheduler", local_files_only=True))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RoleError):
            raise
        raise DamagedFileError(f"diffusers cannot read {folder}: {error}") from error
