"""Few-step samplers as whole pipelines of `diffusers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stillhouse.diffusion.samplers import FewStepSampler
from stillhouse.errors import StoreError, require
from stillhouse.hub.diffusers import TextToImage, network_and_scheduler
from stillhouse.store import write_text

SAMPLING = "sampling.json"
"""What a call of the pipeline is to be given: a pipeline's own default number of steps cannot be saved with it."""


def save_pipeline(sampler: FewStepSampler, folder: Path | str) -> Path:
    """Write a sampler as a folder that `DiffusionPipeline.from_pretrained` loads, with its scheduler, and the arguments
    that make it take the sampler's steps in `sampling.json`.

    An unconditional UNet2DModel becomes a DDIMPipeline (mode "ddim") or a DDPMPipeline with an LCMScheduler (mode
    "renoise"), a consistency model a ConsistencyModelPipeline, the network of a TextToImage a StableDiffusionPipeline
    with its text encoder, tokenizer and VAE. Raises StoreError, with the reason, for others:
    `hub.diffusers.save_pretrained` writes their network and scheduler.

    These pipelines start from noise of standard deviation 1, a sampler from that of its last noise level; they are the
    same where the schedule ends in pure noise. A schedule that ends below 0.99 is refused.
    """
    folder = Path(folder)
    pipeline, call = _pipeline(sampler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    write_text(folder / SAMPLING, json.dumps(call, indent=1))
    return folder


def _pipeline(sampler: FewStepSampler) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the arguments of its call."""
    import diffusers

    model, scheduler, timesteps = network_and_scheduler(sampler)
    denoiser: Any = sampler.denoiser
    kind = type(model).__name__
    if sampler.mode == "consistency":
        require(kind == "UNet2DModel", f"a ConsistencyModelPipeline takes a UNet2DModel, not a {kind}", StoreError)
        return diffusers.ConsistencyModelPipeline(model, scheduler), {"num_inference_steps": None,
                                                                      "timesteps": timesteps}
    last = float(denoiser.process.sigma(torch.ones(1, dtype=torch.float64)))
    require(last > 0.99, f"the schedule ends at the noise level {last:.3g}, and a pipeline starts from 1", StoreError)
    _plain_steps(scheduler, timesteps)
    call: dict[str, Any] = {"num_inference_steps": len(timesteps)}
    if isinstance(denoiser, TextToImage):
        _fits_text(model)
        pipeline = diffusers.StableDiffusionPipeline(
            denoiser.vae, denoiser.text_encoder, denoiser.tokenizer, model, scheduler, None, None,
            requires_safety_checker=False)
        return pipeline, {**call, "guidance_scale": 1.0}
    require(kind == "UNet2DModel", f"a pipeline around a {kind} needs what makes pictures of its latents; read "
            "the teacher as a whole pipeline (diffusers:FOLDER with model_index.json)", StoreError)
    require(model.config.class_embed_type is None and not model.config.num_class_embeds, "diffusers has no pipeline "
            "for a class-conditional UNet2DModel", StoreError)
    if sampler.mode == "renoise":
        return diffusers.DDPMPipeline(model, scheduler), call
    clipped = {"use_clipped_model_output": True} if sampler.clip is not None else {}
    return diffusers.DDIMPipeline(model, scheduler), {**call, **clipped}


def _fits_text(model: Any) -> None:
    require(type(model).__name__ == "UNet2DConditionModel" and model.config.addition_embed_type is None, "only the "
            "network of a Stable Diffusion 1 or 2 is written as a pipeline", StoreError)


def _plain_steps(scheduler: Any, timesteps: list[int]) -> None:
    """Refuse timesteps that a pipeline would not take when it is given their number alone."""
    scheduler.set_timesteps(len(timesteps))
    own = [int(t) for t in scheduler.timesteps]
    require(own == timesteps, f"a pipeline that is asked for {len(timesteps)} steps takes {own}, not {timesteps}; a "
            "sampler with uniform times can be written", StoreError)
