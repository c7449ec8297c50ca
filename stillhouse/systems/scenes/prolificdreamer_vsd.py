"""ProlificDreamer: variational score distillation, VSD (Wang et al. 2023, arXiv 2305.16213).

A diffusion model of pictures becomes 3-D scenes whose renderings it cannot tell from its own samples. The scene is a
random variable with distribution mu(theta | y), carried by n particles theta_i, and

    min_mu E_{t, c} [ (sigma_t / alpha_t) w(t) KL(q_t^mu(x_t | c, y) || p_t(x_t | y^c)) ]

is descended along its Wasserstein gradient flow. With x_t = alpha_t g(theta_i, c) + sigma_t eps, in turn:

    theta:  w(t) (eps_pre(x_t, t, y^c) - eps_phi(x_t, t, c, y)) dg/dtheta,   w = sigma_t^2, t annealed in two phases
    phi:    |eps_phi(x_t', t', c, y) - eps'|^2 on the same detached renders, t' over the whole range

eps_pre is guided and sees the prompt of the view y^c; eps_phi, the fake score, is not guided and sees the plain prompt
and the camera (left out one time in ten). It is the teacher with LoRA, a separate network, or for flat particles the
closed form; all particles share it. A fake score that says the noise itself makes this SDS: what one gets from a single
particle. Three stages: radiance fields by VSD; their surfaces by SDS on normals with strong guidance; textures of the
fixed surfaces by VSD. Flat scenes (points, pictures) have the first only.

Deviations: dense feature grids in place of hash grids, a soft rasteriser in plain tensors, no regularisers on the
geometry. A v-network keeps its own target, which weighs the same error in x0 by 1 / sigma^2.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.data.densities import blank, ring
from stillhouse.data.digits import digits
from stillhouse.data.sets import TensorSet
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.diffusion.exact import particle_x0
from stillhouse.diffusion.grids import two_phase_times
from stillhouse.diffusion.guidance import noise_predictions, null_like
from stillhouse.diffusion.process import VPCosine
from stillhouse.errors import RoleError, require
from stillhouse.evaluate import distances
from stillhouse.evaluate.claims import Claim
from stillhouse.measures.score import stop_gradient_loss
from stillhouse.measures.score_distillation import score_gradient, vsd_row
from stillhouse.models.cameras import VIEWS, Cameras
from stillhouse.models.denoisers import MLPDenoiser
from stillhouse.models.scenes import Look, Part, SceneSet
from stillhouse.parts.fake_scores import SeparateScores
from stillhouse.protocols import Conditions, Denoiser, Network
from stillhouse.recipes.fake_scores import adapted_score, fake_loss, network_score
from stillhouse.run import Run, begin, frozen
from stillhouse.run.check import first_batch
from stillhouse.run.pictures import scatter
from stillhouse.zoo.denoisers import ball_pictures, digits_teacher, gauss2d_network, gauss2d_teacher, views_teacher

NUMBER = 128
CLAIMS = [
    Claim("VSD comes ten times nearer to the class than SDS, without guidance (energy distance)",
          lambda a: 0.1 * a["SDS"]["energy"] - a["VSD"]["energy"]),
    Claim("VSD covers all four modes of the class", lambda a: a["VSD"]["modes"] - 3.5),
    Claim("SDS covers none of them: its points gather in the middle", lambda a: 0.5 - a["SDS"]["modes"], report=True),
    Claim("a learned fake score comes within 0.02 of the exact one (energy distance)",
          lambda a: 0.02 + a["VSD, exact fake score"]["energy"] - a["VSD"]["energy"], report=True),
    Claim("a frozen fake score (the teacher's null prediction) is not enough",
          lambda a: a["frozen fake score"]["energy"] - a["VSD"]["energy"], report=True),
    Claim("with a fake score for each particle, VSD falls back towards SDS",
          lambda a: a["separate fake scores"]["energy"] - 2 * a["VSD"]["energy"], report=True),
    Claim("at guidance 7.5 VSD stays nearer to the class than SDS",
          lambda a: a["SDS, guidance 7.5"]["energy"] - a["VSD, guidance 7.5"]["energy"], report=True),
    Claim("LoRA on the teacher's own network serves as fake score: ten times nearer than SDS",
          lambda a: 0.1 * a["SDS, network teacher"]["energy"] - a["VSD, LoRA"]["energy"], report=True),
    Claim("with t cut to 0.5 SDS reaches modes too, but loses their width",
          lambda a: a["VSD, two phases of t"]["in_mode_std"] - a["SDS, two phases of t"]["in_mode_std"], report=True),
    Claim("on digits VSD keeps half of the diversity, SDS less",
          lambda a: min(a["digits, VSD"]["diversity"] - 0.5, 0.5 - a["digits, SDS"]["diversity"]), report=True),
]
Fake = Literal["lora", "network", "exact", "null", "noise"]


@dataclass(frozen=True)
class Config:
    steps: int = 70_000  # theta steps of all stages; flat scenes take all of them in the first
    geometry: float = 15 / 70  # part of the steps for surfaces by SDS on normals; 0 leaves the stage out
    texture: float = 30 / 70  # part of the steps for textures by VSD; 0 leaves the stage out
    batch: int = 1  # renders a step
    fake: Fake = "lora"  # eps_phi: LoRA on the teacher, `network`, closed form, teacher's null, or the noise (SDS)
    shared: bool = True  # one fake score for all particles; False: one each (with fake="network")
    guidance: float = 7.5  # s of the teacher; the fake score is never guided
    geometry_guidance: float = 100.0  # s in the geometry stage
    times: tuple[float, float] = (0.02, 0.98)  # t of theta steps before the switch
    late: float = 0.50  # upper end of t after the switch
    switch: float = 0.2  # part of a stage after which t is cut, and the second size is rendered (scenes: 0.4)
    fake_steps: int = 1  # phi steps per theta step
    warmup: float = 0.0  # phi steps before the first theta step, as a part of the stage's steps
    free: float = 0.1  # probability that the fake score does not see its camera
    rank: int = 4  # of LoRA
    lr: float = 1e-2  # of particles, grids and surfaces (AdamW)
    mlp_lr: float = 1e-3  # of the scenes' MLPs
    fake_lr: float = 1e-4  # of the fake score
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW's betas
    decay: float = 0.01  # AdamW's weight decay
    sizes: tuple[int, int] = (64, 512)  # pixels a side before and after the switch; later stages take the second
    mesh: int = 64  # cells a side of the tetrahedral grid
    elevation: tuple[float, float] = (-10.0, 45.0)  # degrees
    distance: tuple[float, float] = (1.0, 1.5)  # of cameras, in bounding radii
    fov: tuple[float, float] = (40.0, 70.0)  # degrees

    def __post_init__(self) -> None:
        low, high = self.times
        require(min(self.steps, self.batch, self.fake_steps, self.rank) >= 1, "steps, batch, fake_steps and rank must "
                f"be at least 1, got {self}")
        require(min(self.geometry, self.texture) >= 0 and self.geometry + self.texture <= 1,
                f"geometry and texture are parts of the steps, together at most 1; got {self.geometry}, {self.texture}")
        require(0 < low <= min(high, self.late) and max(high, self.late) <= 1,
                f"times must be two of (0, 1] in order and late between, got {self.times} and {self.late}")
        require(all(0 <= v <= 1 for v in (self.switch, self.free)) and self.warmup >= 0,
                f"switch and free must be in [0, 1] and warmup 0 or more, got {self}")
        require(self.fake in ("lora", "network", "exact", "null", "noise"), f"no fake score {self.fake!r} is known")
        require(self.shared or self.fake == "network", "a fake score per particle (shared=False) needs fake='network'")
        require(min(self.sizes) >= 1 and self.mesh >= 2, f"sizes and mesh are too small: {self.sizes}, {self.mesh}")
        require(min(self.lr, self.mlp_lr, self.fake_lr) > 0 and self.decay >= 0, "learning rates must be above 0")


EMBEDDED = Config(steps=1000, batch=256, fake="network", guidance=1.0, warmup=0.2, late=0.98, lr=0.02, fake_lr=2e-3,
                  decay=0.0)


@dataclass(frozen=True)
class Stage:
    """One of the three stages: what is trained on which look, and how."""

    name: str
    steps: int
    part: Part
    look: Look
    fake: Fake
    guidance: float


def distill(
    teacher: Denoiser,
    scenes: SceneSet,
    conditions: Conditions | None = None,
    network: Network | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> SceneSet:
    """The scenes, trained in place until they become meshes, which are new.

    `conditions` holds the prompt, or the prompt and one for each of `VIEWS` (front, side, back, overhead); without it
    the teacher is asked unconditionally. A teacher with `encode(pictures)`, such as a latent diffusion model, sees the
    code of what is rendered. `network` makes the Denoiser that is fitted as fake score where fake="network".
    Raises RoleError, DataError or ConfigError, before any update, where roles or settings do not fit.
    """
    run = begin(run)
    prompts = _check(run, teacher, scenes, conditions, network, config)
    with frozen(teacher):
        for stage in stages(scenes, config):
            if stage.steps and stage.name != "nerf" and scenes.kind == "nerf":
                scenes = scenes.meshes(config.mesh)
            if stage.steps:
                with run.scope(stage.name), fake_score(teacher, network, scenes, stage, config) as fake:
                    particles_by_scores(stage, teacher, fake, scenes, prompts, config, run)
    return scenes


def stages(scenes: SceneSet, config: Config) -> list[Stage]:
    """The three stages with their steps; scenes that are meshes already skip the first."""
    geometry, texture = (0 if scenes.flat else round(part * config.steps) for part in (config.geometry, config.texture))
    first = 0 if scenes.kind == "mesh" else config.steps - geometry - texture
    return [Stage("nerf", first, "all", "colour", config.fake, config.guidance),
            Stage("geometry", geometry, "geometry", "normal", "noise", config.geometry_guidance),
            Stage("texture", texture, "texture", "colour", config.fake, config.guidance)]


def particles_by_scores(stage: Stage, teacher: Any, fake: Any, scenes: SceneSet, prompts: Tensor | None,
                        config: Config, run: Run) -> None:
    """Theta and phi steps in turn."""
    process, row, encode = teacher.process, vsd_row(stage.guidance), getattr(teacher, "encode", lambda x: x)
    adamw = partial(torch.optim.AdamW, betas=config.betas, eps=1e-15, weight_decay=config.decay)
    theta = adamw(scenes.groups(config.lr, config.mlp_lr, stage.part))
    phi = None if fake is None else adamw(fake.parameters(), lr=config.fake_lr)
    warm = round(config.warmup * stage.steps) if phi is not None else 0
    apart = isinstance(fake, SeparateScores)
    renders: Any = blank(len(scenes) * -(-config.batch // len(scenes)))
    for phase, steps in (("warm", warm), ("distil", stage.steps)):
        for batch in run.loop(phase, renders, batch=config.batch, steps=steps, scenes=scenes, fake=fake, theta=theta,
                              phi=phi):
            which, n = batch["row"] % len(scenes), len(batch["row"])
            view, particle = View.draw(n, scenes, prompts, config, run), which if apart else None
            early = stage.name == "nerf" and (phase == "warm" or run.progress < config.switch)
            size = config.sizes[0 if early else 1]
            strata = scenes.strata(size)
            jitter = run.rand(n, *strata) if strata else None
            with torch.set_grad_enabled(phase == "distil"):
                x = encode(scenes.render(which, view.cameras, size, stage.look, jitter))
            if phase == "distil":
                t = two_phase_times(run.rand(n), run.progress, config.times, config.late, config.switch)
                eps = run.randn_like(x)
                with torch.no_grad():
                    predict = predictions(stage.fake, teacher, fake, scenes, view, particle, x, t, eps)
                    gradient = score_gradient({name: predict[name]() for name in row}, row, process.sigma(t) ** 2)
                run.update(theta, vsd=x[0].numel() * stop_gradient_loss(x, gradient))
            if phi is not None:
                for _ in range(config.fake_steps):
                    run.update(phi, fake=fake_loss(fake, x.detach(), run, view.y, view.pose, particle, config.free))


@dataclass
class View:
    """How a batch of scenes is seen: the plain prompt y, that of the view y^c, the cameras and their extrinsics."""

    y: Tensor | None
    y_c: Tensor | None
    cameras: Cameras | None
    pose: Tensor | None

    @classmethod
    def draw(cls, n: int, scenes: SceneSet, prompts: Tensor | None, config: Config, run: Run) -> View:
        cameras = None if scenes.flat else Cameras.draw(run.rand(n, 4), config.elevation, config.distance, config.fov)
        y = None if prompts is None else prompts[:1].expand(n, *prompts.shape[1:])
        views = cameras is not None and prompts is not None and len(prompts) > 1
        y_c = prompts[1 + cameras.views()] if views else y  # type: ignore[index, union-attr]
        return cls(y, y_c, cameras, None if cameras is None else cameras.extrinsic())


def predictions(kind: Fake, teacher: Any, fake: Any, scenes: SceneSet, view: View, particle: Tensor | None, x: Tensor,
                t: Tensor, eps: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The noise predictions of `measures.score_distillation`, each made when it is asked for."""
    process = teacher.process
    x_t = process.noise(x, t, eps)

    def null() -> Tensor:
        return teacher(x_t, t, None if view.y is None else null_like(teacher.null_condition, view.y))

    def learned() -> Tensor:
        return fake(x_t, t, view.y, view.pose, *(() if particle is None else (particle,)))

    def closed_form() -> Tensor:
        particles = scenes.render(torch.arange(len(scenes), device=x.device))
        return particle_x0(particles, x_t, process.alpha(t), process.sigma(t))

    sources = {"lora": learned, "network": learned, "exact": closed_form, "null": null, "noise": null}
    read = noise_predictions(process, x_t, t, prompt=lambda: teacher(x_t, t, view.y_c), null=null, fake=sources[kind])
    return {**read, "noise": lambda: eps, **({"fake": lambda: eps} if kind == "noise" else {})}


@contextlib.contextmanager
def fake_score(teacher: Any, network: Network | None, scenes: SceneSet, stage: Stage, config: Config
               ) -> Iterator[Any]:
    """A new fake score for a stage; None where nothing is learned."""
    device, cameras = next(scenes.parameters()).device, not scenes.flat
    if stage.fake == "lora":
        with adapted_score(teacher, config.rank, cameras) as fake:
            yield fake.to(device)
    else:
        made = network if stage.fake == "network" else None
        yield network_score(made, cameras, 0 if config.shared else len(scenes)).to(device) if made else None


def _check(run: Run, teacher: Any, scenes: SceneSet, conditions: Any, network: Network | None, config: Config
           ) -> Tensor | None:
    """The prompts as one tensor, once everything fits."""
    require(all(hasattr(scenes, name) for name in ("flat", "render", "groups")), "scenes must be a SceneSet of "
            f"stillhouse.models.scenes, not {type(scenes).__name__}", RoleError)
    prompts = None
    if conditions is not None:
        first_batch(conditions, ("condition",))
        require(len(conditions) in (1, 1 + len(VIEWS)), f"conditions are the prompt, or the prompt and one for each of "
                f"{', '.join(VIEWS)}: 1 or {1 + len(VIEWS)} rows, not {len(conditions)}", RoleError)
        prompts = torch.stack([torch.as_tensor(conditions[i]["condition"]) for i in range(len(conditions))]
                              ).to(run.device)
    guided = config.guidance != 1 or config.fake == "null" or any(
        s.steps and s.guidance != 1 for s in stages(scenes, config))
    require(not guided or (prompts is not None and teacher.null_condition is not None),
            f"guidance {config.guidance} (on normals {config.geometry_guidance}) needs conditions and a teacher with a "
            "null condition; give both, or set the guidance to 1", RoleError)
    require(config.fake != "network" or network is not None, "fake='network' needs network=…, a factory of a Denoiser",
            RoleError)
    require(config.fake != "lora" or any(isinstance(m, nn.Linear) for m in getattr(teacher, "modules", list)()),
            "fake='lora' needs a teacher with linear layers; this one has none (an exact density?): give network=… and "
            "fake='network'", RoleError)
    require(config.fake != "exact" or (scenes.flat and not hasattr(teacher, "encode")), "the exact fake score is that "
            "of points or pictures; for other scenes and for latents choose fake='lora' or 'network'", RoleError)
    with torch.no_grad():
        which = torch.arange(min(len(scenes), 2), device=run.device)
        cameras = None if scenes.flat else Cameras.draw(torch.full((len(which), 4), 0.5, device=run.device))
        x = getattr(teacher, "encode", lambda x: x)(scenes.render(which, cameras, config.sizes[0]))
    given = {} if prompts is None else {"condition": prompts[:1].expand(len(x), *prompts.shape[1:])}
    probe: Any = TensorSet(x=x, **given)
    made: Any = network().to(run.device) if network is not None and config.fake == "network" else None
    run.check(Denoiser, probe, teacher=teacher, network=made)
    require(made is None or made.process == teacher.process, "teacher and network must share one noise process, got "
            f"{teacher.process} and {getattr(made, 'process', None)}", RoleError)
    return prompts


def tiny() -> dict[str, Any]:
    """Arguments of `distill` for the contract test: all three stages, view prompts, LoRA on a picture network."""
    torch.manual_seed(0)
    process = VPCosine()
    teacher = NetworkDenoiser(MLPDenoiser((3, 4, 4), 8, 2, classes=5), process, "v", null_condition=torch.tensor(5))
    scenes = SceneSet("nerf", 2, samples=4, resolutions=(2, 3), features=2, width=4)
    config = Config(steps=6, geometry=1 / 3, texture=1 / 3, batch=2, rank=2, warmup=0.5, sizes=(4, 4), mesh=4,
                    fake_lr=1e-2)
    return {"teacher": teacher, "scenes": scenes, "conditions": TensorSet(condition=torch.arange(5)), "config": config}


# -------------------------------------------------------------------- the embedded experiment


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """`gauss2d`: a ring of 8 modes on 15 % of broad background, the class y being every other mode; 256 points.

    All arms of it start from the same points and take the same steps, t being uniform. Guidance shifts what is aimed at
    away from the class, so the claims are made at 1. Also digits, and a coloured ball for all three stages.
    """
    process, centres, reach = VPCosine(), ring(8), 3 * 0.15
    exact = gauss2d_teacher(process, centres, labels=torch.arange(8) % 2, background=0.15)
    prompt: Any = TensorSet(condition=torch.zeros(1, dtype=torch.long))
    true = exact.sample(4000, prompt.condition.expand(4000), torch.Generator().manual_seed(run.seed))[0]

    def points(teacher: Callable[[], Any] = lambda: exact, **changes: Any) -> Callable[[], dict[str, float]]:
        def measured() -> dict[str, float]:
            given = teacher().to(run.device)
            run.begin()
            scenes, network = SceneSet("points", 256).to(run.device), partial(mlp, (2,), 64, 3)
            x = distill(given, scenes, prompt, network, replace(EMBEDDED, **changes), run).scenes.theta.detach().cpu()
            if run.folder is not None:
                run.picture("points", scatter(true=true, particles=x))
            near = distances.nearest_mode(x, centres[::2], reach) >= 0
            inside = {"in_mode_std": distances.in_mode_std(x, centres[::2], reach)} if near.any() else {}
            return {"energy": distances.energy_distance(x, true), "near": float(near.float().mean()),
                    "modes": distances.modes_hit(x, centres[::2], reach), **inside}
        return measured

    def fitted() -> NetworkDenoiser:
        return gauss2d_network(process, exact.cpu())

    return run.arms(
        {"SDS": points(fake="noise"), "VSD": points(), "VSD, exact fake score": points(fake="exact")},
        extended={
            "SDS, guidance 7.5": points(fake="noise", guidance=7.5),
            "VSD, guidance 7.5": points(guidance=7.5),
            "frozen fake score": points(fake="null"),
            "separate fake scores": points(shared=False),
            "SDS, two phases of t": points(fake="noise", late=0.5),
            "VSD, two phases of t": points(late=0.5),
            "VSD, LoRA": points(fitted, fake="lora", rank=16),
            "SDS, network teacher": points(fitted, fake="noise"),
            "digits, SDS": lambda: pictures_of_a_digit("noise", run),
            "digits, VSD": lambda: pictures_of_a_digit("network", run),
            "digits, exact fake score": lambda: pictures_of_a_digit("exact", run),
            "ball, three stages": lambda: ball(run),
            "ball, radiance fields only": lambda: ball(run, geometry=0.0, texture=0.0),
            "ball, SDS": lambda: ball(run, fake="noise"),
        },
    )


def mlp(shape: tuple[int, ...], width: int, classes: int) -> NetworkDenoiser:
    return NetworkDenoiser(MLPDenoiser(shape, width, 3, classes=classes), VPCosine(), "v")


def pictures_of_a_digit(fake: Fake, run: Run) -> dict[str, float]:
    """64 pictures of the digit 3 before the exact mixture: their diversity as a part of that of real ones, and how far
    the nearest real one is."""
    data = digits(8, "all")
    real = data.image[data.label == 3]
    run.begin()
    scenes, network = SceneSet("pictures", 64, shape=(1, 8, 8), spread=0.5), partial(mlp, (1, 8, 8), 128, 10)
    config, prompt = replace(EMBEDDED, steps=500, batch=64, fake=fake), TensorSet(condition=torch.tensor([3]))
    teacher: Any = digits_teacher(VPCosine()).to(run.device)
    found = distill(teacher, scenes.to(run.device), prompt, network, config, run)
    x = found.render(torch.arange(64)).detach().cpu()
    run.picture("digits", x[:20])
    return {"energy": distances.energy_distance(x, real), "nearest": distances.nearest_real(x, real),
            "diversity": distances.mean_distance(x) / distances.mean_distance(real)}


def ball(run: Run, **changes: Any) -> dict[str, float]:
    """Two scenes of 16 pixels after an exact teacher for views of a coloured ball: the error of the colours from new
    cameras (of a grey picture: `grey`)."""
    teacher, network = views_teacher(VPCosine()).to(run.device), partial(mlp, (3, 16, 16), 128, 4)
    config = replace(EMBEDDED, **{"steps": 120, "batch": 4, "geometry": 1 / 3, "texture": 1 / 3, "sizes": (16, 16),
                                  "mesh": 6, "elevation": (-10.0, 80.0), **changes})
    run.begin()
    prompts: Any = TensorSet(condition=torch.tensor([4, 0, 1, 2, 3]))
    found = distill(teacher, SceneSet("nerf", 2, samples=24).to(run.device), prompts, network, config, run).cpu()
    cameras = Cameras.draw(torch.rand(16, 4, generator=torch.Generator().manual_seed(1)), config.elevation)
    truth = ball_pictures(cameras, 16)
    with torch.no_grad():
        seen = found.render(torch.arange(16) % 2, cameras, 16)
    run.picture("renders", torch.cat([seen[:8], truth[:8]]), columns=8)
    return {"error": math.sqrt((seen - truth).square().mean()), "grey": math.sqrt(truth.square().mean())}
