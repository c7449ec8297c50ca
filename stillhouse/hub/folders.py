"""A network and its scheduler from a folder that `diffusers` saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, UnknownNameError, require
from stillhouse.hub.refusals import PICKLE, check_whole, only_pickles, read_json

NETWORKS = ("unet", "transformer", "network")
KNOWN = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel",
         "SD3Transformer2DModel")
TEXT = ("vae", "text_encoder", "tokenizer")
"""What a pipeline of Stable Diffusion 1 or 2 has beside its network: the way into its latents, and its texts."""


def denoiser_from(folder: Path | str) -> NetworkDenoiser:
    """The Denoiser in a folder of a `diffusers` pipeline (unet or transformer, and scheduler), or one in which
    Stillhouse saved a few-step sampler for `diffusers`. A whole Stable Diffusion 1 or 2 becomes a TextToImage, which
    takes pictures into its latents and texts into its conditions.

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
    whole = name == "UNet2DConditionModel" and all((folder / part).is_dir() for part in TEXT) and not (
        folder / "text_encoder_2").is_dir()
    for part in (place, *(folder / part for part in TEXT[:2] if whole)):
        check_whole(part, str(part))
        found = only_pickles(part)
        require(not found, f"{(found or [part])[0]}: {PICKLE}", RoleError)
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("diffusers:… needs diffusers; install it with: pip install 'stillhouse[diffusion]'"
                                ) from error
    from stillhouse.hub.diffusers import TextToImage, from_diffusers

    maker: Any = getattr(diffusers, str(scheduler), None)
    require(isinstance(maker, type) and issubclass(maker, diffusers.SchedulerMixin),
            f"{folder} has a scheduler '{scheduler}', which diffusers does not know", RoleError)
    try:
        network = _filled(getattr(diffusers, str(name)), place)
        noise = maker.from_pretrained(folder / "scheduler", local_files_only=True)
        if not whole:
            return from_diffusers(network, noise)
        return TextToImage(SimpleNamespace(unet=network, scheduler=noise, **_text_parts(folder)))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RoleError | DamagedFileError):
            raise
        raise DamagedFileError(f"diffusers cannot read {folder}: {error}") from error


def _filled(kind: Any, place: Path) -> Any:
    """The model in a folder. Raises DamagedFileError where its weights lack some of those that its configuration asks
    for, which the libraries would draw at random."""
    model, found = kind.from_pretrained(place, use_safetensors=True, local_files_only=True, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    require(not missing, f"the weights in {place} lack {len(missing)} of those that its config.json asks for, e.g. "
            f"'{(missing or [''])[0]}': the two do not belong together, or the file is only partly there",
            DamagedFileError)
    return model


def _text_parts(folder: Path) -> dict[str, Any]:
    """VAE, text encoder and tokenizer of a Stable Diffusion 1 or 2. Raises RoleError for another text encoder."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    said = read_json(folder / "text_encoder" / "config.json").get("model_type")
    require(said == "clip_text_model", f"the text encoder of {folder} is a {said}; understood is that of CLIP",
            RoleError)
    return {
        "vae": _filled(AutoencoderKL, folder / "vae"),
        "text_encoder": _filled(CLIPTextModel, folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
    }
