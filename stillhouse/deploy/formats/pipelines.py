"""Few-step samplers for `diffusers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stillhouse.deploy.formats.views import SIZES, Job, Made, deviation
from stillhouse.errors import MissingExtraError, StoreError
from stillhouse.hub.diffusers import network_and_scheduler, save_pretrained
from stillhouse.hub.folders import NETWORKS
from stillhouse.hub.pipelines import SAMPLING, save_pipeline


def to_diffusers(job: Job) -> Made:
    """Write a pipeline, or network and scheduler, and compare diffusers' own loop with the sampler's samples."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("--to diffusers needs diffusers; install it with: pip install 'stillhouse[diffusion]'"
                                ) from error
    sampler = job.target
    code, notes = _save(sampler, job.folder)
    place = next(job.folder / name for name in NETWORKS if (job.folder / name / "config.json").is_file())
    network: Any = _loaded(diffusers, place)
    scheduler: Any = _loaded(diffusers, job.folder / "scheduler")
    timesteps = network_and_scheduler(sampler)[2]
    checks = {f"samples, {n}": _compared(sampler, network.eval(), scheduler, timesteps, job, n) for n in SIZES}
    return Made(checks, 1e-4, code or _apart(place, network, scheduler, sampler), (
        f"The default is {sampler.steps} steps, at the timesteps {timesteps}.", *notes))


def _save(sampler: Any, folder: Path) -> tuple[str, tuple[str, ...]]:
    """As a whole pipeline where diffusers has one, else network and scheduler side by side; the code that loads a
    pipeline, and what there is to know."""
    try:
        save_pipeline(sampler, folder)
    except StoreError as error:
        save_pretrained(sampler, folder)
        return "", (f"It is network and scheduler, no whole pipeline: {error}.",)
    return (f'import json\nfrom pathlib import Path\n\nfrom diffusers import DiffusionPipeline\n\n'
            f'pipeline = DiffusionPipeline.from_pretrained(".")\ncall = json.loads(Path("{SAMPLING}").read_text())\n'
            "# pipeline(**call)"), (f"{SAMPLING} holds what a call of the pipeline is to be given.",)


def _apart(place: Path, network: Any, scheduler: Any, sampler: Any) -> str:
    """The code that loads network and scheduler."""
    kind, noise = type(network).__name__, type(scheduler).__name__
    times = "len(timesteps)" if sampler.mode == "ddim" else "timesteps=timesteps"
    return (f'import json\nfrom pathlib import Path\n\nfrom diffusers import {kind}, {noise}\n\n'
            f'network = {kind}.from_pretrained("{place.name}")\nscheduler = {noise}.from_pretrained("scheduler")\n'
            f'timesteps = json.loads(Path("timesteps.json").read_text())\nscheduler.set_timesteps({times})')


def _loaded(diffusers: Any, place: Path) -> Any:
    path = next(p for p in (place / "config.json", place / "scheduler_config.json") if p.is_file())
    name = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
    return getattr(diffusers, name).from_pretrained(place)


@torch.no_grad()
def _compared(sampler: Any, network: Any, scheduler: Any, timesteps: list[int], job: Job, n: int) -> float:
    """The deviation of the samples that a loop of diffusers makes from the same noise."""
    batch = job.view.batch(n)
    conditional = "condition" in job.view.fields
    condition = batch[-1] if conditional else None
    scheduler.set_timesteps(len(timesteps)) if sampler.mode == "ddim" else scheduler.set_timesteps(timesteps=timesteps)
    x, first = batch[0] * scheduler.init_noise_sigma, torch.Generator().manual_seed(n)
    given: dict[str, Any] = {} if sampler.mode == "ddim" else {"generator": first}
    if sampler.mode == "ddim" and sampler.clip is not None:
        given["use_clipped_model_output"] = True
    for k in scheduler.timesteps:
        out = _called(network, scheduler.scale_model_input(x, k), k, condition)
        x = scheduler.step(out, k, x, **given).prev_sample
    second = torch.Generator().manual_seed(n)
    wanted = sampler(batch[0], condition, lambda like: torch.randn(like.shape, generator=second))
    return deviation(x, wanted)


def _called(network: Any, x: Any, k: Any, condition: Any) -> Any:
    if condition is None:
        return network(x, k).sample
    if type(network).__name__ == "UNet2DConditionModel":
        return network(x, k, encoder_hidden_states=condition).sample
    return network(x, k.expand(len(x)) if k.dim() == 0 else k, class_labels=condition).sample[:, : x.shape[1]]
