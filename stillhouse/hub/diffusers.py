"""Networks of the library `diffusers` as Denoisers, and few-step samplers written back for its pipelines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.diffusion.convert import Parameterisation
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.grids import trailing
from stillhouse.diffusion.process import VE, Flow, Process, VPTable, process_of
from stillhouse.diffusion.samplers import FewStepSampler
from stillhouse.errors import RoleError, StoreError, require
from stillhouse.hub.architectures import library_class
from stillhouse.store import write_text

PREDICTIONS: dict[str, Parameterisation] = {
    "epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


class DiffusersNetwork(nn.Module):
    """A network of `diffusers` called as network(x_t, t, condition).

    The condition is class labels (UNet2DModel, DiTTransformer2DModel), text embeddings [batch, tokens, width]
    (UNet2DConditionModel, PixArtTransformer2DModel), or a flat tensor of `pack_sdxl` for SDXL and of `pack_sd3` for
    SD3Transformer2DModel. A learned variance (twice the channels, as in DiT) is dropped.
    """

    def __init__(self, model: nn.Module, process: Process, timesteps: int):
        super().__init__()
        self.model = model
        self.process = process
        self.timesteps = timesteps

    def spec(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        model: Any = self.model
        return {"class": type(model).__name__, "config": json.loads(model.to_json_string()),
                "process": self.process.spec(), "timesteps": self.timesteps}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> DiffusersNetwork:
        """A network as `spec` describes it, with fresh weights."""
        kind = library_class("diffusers", spec["class"], "ModelMixin")
        return cls(kind.from_config(spec["config"]), process_of(spec["process"]), spec["timesteps"])

    def forward(
        self, x_t: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Tensor | None = None
    ) -> Float[Tensor, "batch ..."]:
        if isinstance(self.process, VE):
            timestep = 0.25 * self.timesteps * self.process.sigma(t).log()
        else:
            timestep = self.process.timestep(t) if isinstance(self.process, VPTable) else t * self.timesteps
        match type(self.model).__name__:
            case "UNet2DConditionModel":
                given: dict[str, Any] = _text_condition(self.model, condition)
            case "SD3Transformer2DModel":
                given = _sd3_condition(self.model, condition)
            case "PixArtTransformer2DModel":
                require(condition is not None, "a PixArtTransformer2DModel needs text embeddings as its condition",
                        RoleError)
                given = {"encoder_hidden_states": condition,
                         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
            case _:
                given = {"class_labels": condition}
        return self.model(x_t, timestep=timestep, **given, return_dict=False)[0][:, : x_t.shape[1]]


def from_diffusers(
    model: Any,
    scheduler: Any,
    null_condition: Tensor | None = None,
    quantise: bool = True,
) -> NetworkDenoiser:
    """A `diffusers` network and the scheduler it was trained with, as a Denoiser.

    prediction_type epsilon, sample, v_prediction and flow_prediction are understood, and flow-matching schedulers; so
    are EDM schedulers (c_noise = ln(sigma) / 4) and CMStochasticIterativeScheduler (a thousand times that), which makes
    a consistency model.
    `quantise` moves times to the scheduler's integer timesteps. The null condition of a DiT is its extra class; give
    that of other networks (for text the embedding of the empty prompt, for SDXL zeros). `features` reads the
    mid_block, of a DiT the middle block. A DiT drops labels at random in train mode: distil it in eval mode.

    Raises RoleError on a scheduler or prediction type that is not understood.
    """
    config = scheduler.config
    if type(scheduler).__name__ in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler",
                                    "CMStochasticIterativeScheduler"):
        return _edm(model, scheduler, null_condition)
    if "FlowMatch" in type(scheduler).__name__:
        process: Process = Flow()
        prediction = "flow_prediction"
    elif getattr(scheduler, "alphas_cumprod", None) is not None:
        process = VPTable(tuple(scheduler.alphas_cumprod.double().tolist()), quantise)
        prediction = config.get("prediction_type", "epsilon")
    else:
        raise RoleError(f"{type(scheduler).__name__} has no alphas_cumprod and is not a flow-matching scheduler; give "
                        "the DDPM, DDIM or FlowMatch scheduler that the network was trained with")
    if prediction not in PREDICTIONS:
        raise RoleError(f"prediction_type {prediction!r} is not understood; known are {', '.join(PREDICTIONS)}")
    if null_condition is None and type(model).__name__ == "DiTTransformer2DModel":
        null_condition = torch.tensor(int(model.config.num_embeds_ada_norm))
    return NetworkDenoiser(
        DiffusersNetwork(model, process, config.num_train_timesteps), process, PREDICTIONS[prediction],
        scale_input=False, null_condition=null_condition, bottleneck=_bottleneck(model))


def pack_sdxl(
    tokens: Float[Tensor, "batch tokens width"],
    pooled: Float[Tensor, "batch pooled"],
    time_ids: Float[Tensor, "batch 6"],
) -> Float[Tensor, "batch packed"]:
    """SDXL's three conditions as one flat tensor per sample."""
    return torch.cat([tokens.flatten(1), pooled, time_ids], 1)


def pack_sd3(
    tokens: Float[Tensor, "batch tokens width"], pooled: Float[Tensor, "batch pooled"]
) -> Float[Tensor, "batch packed"]:
    """Stable Diffusion 3's two conditions as one flat tensor per sample."""
    return torch.cat([tokens.flatten(1), pooled], 1)


def save_pretrained(sampler: FewStepSampler, folder: Path | str) -> Path:
    """Write a sampler for `diffusers`: the network in `network`, its scheduler in `scheduler`, and `timesteps.json`.

    Mode "ddim" becomes a DDIMScheduler with trailing spacing, which needs the uniform times of that many steps; mode
    "renoise" an LCMScheduler, to be called with the listed timesteps; mode "consistency" on a VE process the
    CMStochasticIterativeScheduler of a ConsistencyModelPipeline, to be called with them too. A clipping sampler needs
    the DDIM pipeline's use_clipped_model_output=True. Raises StoreError on other samplers.
    """
    folder = Path(folder)
    model, scheduler, timesteps = network_and_scheduler(sampler)
    model.save_pretrained(folder / "network")
    scheduler.save_pretrained(folder / "scheduler")
    write_text(folder / "timesteps.json", json.dumps(timesteps))
    return folder


def network_and_scheduler(sampler: FewStepSampler) -> tuple[Any, Any, list[int]]:
    """The network of a sampler, the scheduler of `diffusers` that takes its steps, and their timesteps; see
    `save_pretrained`."""
    from diffusers import DDIMScheduler, LCMScheduler

    denoiser = sampler.denoiser
    if sampler.mode == "consistency":
        return _consistency(sampler)
    if not (isinstance(denoiser, NetworkDenoiser) and isinstance(denoiser.network, DiffusersNetwork)
            and isinstance(denoiser.process, VPTable)):
        raise StoreError("only a sampler of a diffusers network on a discrete schedule can be written for diffusers; "
                         "sampler.save(folder) writes any")
    total = denoiser.process.timesteps
    timesteps = [round(t * total) - 1 for t in sampler.times[:-1]]
    if sampler.mode == "ddim" and timesteps != [round(t * total) - 1 for t in trailing(sampler.steps, total)[:-1]]:
        raise StoreError(f"a DDIMScheduler takes {sampler.steps} steps at the trailing timesteps only, not {timesteps}")
    table = torch.tensor((1.0, *denoiser.process.alphas_cumprod), dtype=torch.float64)
    shared: dict[str, Any] = {
        "num_train_timesteps": total,
        "trained_betas": (1 - table[1:] / table[:-1]).tolist(),
        "prediction_type": {v: k for k, v in PREDICTIONS.items()}[denoiser.parameterisation],
        "clip_sample": sampler.clip is not None,
        "clip_sample_range": sampler.clip or 1.0,
    }
    if sampler.mode == "ddim":
        scheduler: Any = DDIMScheduler(**shared, timestep_spacing="trailing", set_alpha_to_one=True)
    else:
        scheduler = LCMScheduler(**shared, original_inference_steps=total)
    return denoiser.network.model, scheduler, timesteps


def _edm(model: Any, scheduler: Any, null_condition: Tensor | None) -> NetworkDenoiser:
    config = scheduler.config
    consistency = type(scheduler).__name__.startswith("CM")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction") or config.get("sigma_schedule", "karras") != "karras":
        raise RoleError(f"an EDM scheduler with prediction_type {prediction!r} and sigma_schedule "
                        f"{config.get('sigma_schedule')!r} is not understood; known are epsilon, v_prediction; karras")
    process = VE(config.sigma_min, config.sigma_max, config.rho)
    return NetworkDenoiser(
        DiffusersNetwork(model, process, 1000 if consistency else 1), process,
        "edm" if prediction == "epsilon" else "trigflow", config.sigma_data, null_condition=null_condition,
        bottleneck=_bottleneck(model), boundary=consistency)


def _consistency(sampler: FewStepSampler) -> tuple[Any, Any, list[int]]:
    from diffusers import CMStochasticIterativeScheduler

    denoiser: Any = sampler.denoiser
    network, process = getattr(denoiser, "network", None), denoiser.process
    if not (isinstance(network, DiffusersNetwork) and network.timesteps == 1000 and isinstance(process, VE)
            and denoiser.parameterisation == "edm" and denoiser.boundary and sampler.clip in (None, 1.0)):
        raise StoreError("only a consistency model of a diffusers network that was read with a "
                         "CMStochasticIterativeScheduler, clipped to [-1, 1] or not at all, can be written for "
                         "diffusers; sampler.save(folder) writes any")
    total = next((n for n in (40, 1001, 10_001) if all(abs(t * (n - 1) - round(t * (n - 1))) < 1e-3
                                                       for t in sampler.times)), 1_000_001)
    scheduler: Any = CMStochasticIterativeScheduler(
        total, process.sigma_min, process.sigma_max, denoiser.sigma_data, rho=process.rho,
        clip_denoised=sampler.clip is not None)
    return network.model, scheduler, [round((1 - t) * (total - 1)) for t in sampler.times[-2::-1]]


def _text_condition(model: Any, condition: Tensor | None) -> dict[str, Any]:
    if condition is None:
        raise RoleError("a UNet2DConditionModel needs text embeddings as its condition, got None")
    if model.config.addition_embed_type != "text_time":
        return {"encoder_hidden_states": condition}
    pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
    tokens, text, ids = condition.split([condition.shape[1] - pooled - 6, pooled, 6], 1)
    tokens = tokens.reshape(len(tokens), -1, model.config.cross_attention_dim)
    return {"encoder_hidden_states": tokens, "added_cond_kwargs": {"text_embeds": text, "time_ids": ids}}


def _sd3_condition(model: Any, condition: Tensor | None) -> dict[str, Any]:
    require(condition is not None, "an SD3Transformer2DModel needs text embeddings as its condition (pack_sd3)",
            RoleError)
    assert condition is not None
    pooled = int(model.config.pooled_projection_dim)
    tokens, text = condition.split([condition.shape[1] - pooled, pooled], 1)
    return {"encoder_hidden_states": tokens.reshape(len(tokens), -1, int(model.config.joint_attention_dim)),
            "pooled_projections": text}


def _bottleneck(model: Any) -> str | None:
    if getattr(model, "mid_block", None) is not None:
        return "model.mid_block"
    blocks = getattr(model, "transformer_blocks", None)
    return f"model.transformer_blocks.{len(blocks) // 2}" if blocks else None


class TextToImage(NetworkDenoiser):
    """A StableDiffusionPipeline as the Denoiser of its latents, with the way into them.

    `encode` gives the latents of pictures, with gradient; `embed` the conditions of texts. The null condition is the
    empty text. Text encoder and VAE are part of the module, so that they are frozen and moved with it.
    Raises RoleError for a pipeline without them.
    """

    network: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(self, pipeline: Any, quantise: bool = True):
        parts = {name: getattr(pipeline, name, None) for name in ("unet", "scheduler", "vae", "text_encoder",
                                                                 "tokenizer")}
        absent = [name for name, part in parts.items() if part is None]
        if absent:
            raise RoleError(f"{type(pipeline).__name__} lacks {' and '.join(absent)}; give that of Stable Diffusion")
        inner = from_diffusers(parts["unet"], parts["scheduler"], quantise=quantise)
        super().__init__(inner.network, inner.process, inner.parameterisation, scale_input=False,
                         null_condition=torch.zeros(1), bottleneck=inner.bottleneck)
        self.vae, self.text_encoder, self.tokenizer = parts["vae"], parts["text_encoder"], parts["tokenizer"]
        self.null_condition = self.embed([""])[0]

    def encode(self, pictures: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels h w"]:
        """The scaled latents (their mean) of pictures in [-1, 1], which are brought to the pipeline's size."""
        reduced = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = getattr(self.network.model.config, "sample_size", None)
        if size is not None and pictures.shape[-1] != size * reduced:
            pictures = nn.functional.interpolate(pictures, (size * reduced,) * 2, mode="bilinear", align_corners=False)
        return self.vae.encode(pictures).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "texts tokens width"]:
        """The text embeddings that the network is conditioned on."""
        ids = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.tokenizer.model_max_length).input_ids
        return self.text_encoder(ids.to(self.text_encoder.device))[0]
