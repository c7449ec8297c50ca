"""DPHuBERT: a speech encoder is distilled into a copy of itself while gates learn which parts of it to remove.

The student starts as the teacher. Hard-concrete gates z multiply its convolution channels, attention heads and
feed-forward units. Stage 1 minimises over weights, projections and gates, and maximises over lambda1 and lambda2,

    L = mean over layers i of [ |h_s' - h_t|_1 - cos(h_s', h_t) ]  +  lambda1 (s - t) + lambda2 (s - t)^2

where h_s' is the student's hidden state of layer i through a linear map that starts as the identity (one for layer 0,
the output of the convolutions, and one for all transformer layers), s = 1 - E[parameters] / parameters of the teacher
is the expected sparsity, and the target t rises from 0 to `sparsity`. Then what the gates closed is removed physically:
the width of every layer was found, not designed. Stage 2 distils the smaller student once more.

Peng et al. 2023 (Interspeech), and its code for the fixed mask (0.8) and the update of the multipliers. Deviations: the
norm behind the convolutions counts removed channels as zeros, and what they add through its mean is kept as one fixed
vector, so that the cut student equals the gated one (the paper's does not); a block that loses everything keeps its
output bias, as in the count of parameters; gates on whole layers, off by default there, are left out. All clips have
one length, where the paper cuts each batch to its shortest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet, column
from stillhouse.data.tones import crops, tones
from stillhouse.errors import RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.cost import parameters
from stillhouse.evaluate.probes import extract, linear_probe
from stillhouse.measures.matching import hidden_distance
from stillhouse.parts.gates import Gates
from stillhouse.parts.heads import identity_linear
from stillhouse.parts.lagrangian import Lagrangian
from stillhouse.parts.surgeon import UNITS, Pruned, cut, gated, hidden_states, layout, magnitude_masks, unmasked
from stillhouse.protocols import SpeechData, SpeechEncoder
from stillhouse.recipes.supervised import check_training
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.schedules import warmup, warmup_linear
from stillhouse.zoo.speech import hubert, tones_teacher

NUMBER = 147

CLAIMS = [
    Claim("the expected sparsity ends within 0.03 of the target of 0.75",
          lambda a: 0.03 - abs(a["dphubert"]["expected sparsity"] - 0.75)),
    Claim("the sparsity after cutting is within 0.06 of it",
          lambda a: 0.06 - abs(a["dphubert"]["sparsity"] - 0.75)),
    Claim("word and speaker probes are right at least as often, on average, as for a narrow student of the same size",
          lambda a: a["dphubert"]["accuracy"] - a["narrow"]["accuracy"]),
    Claim("the second stage does not lower the cosine to the teacher's hidden states",
          lambda a: a["dphubert"]["cosine"] - a["dphubert"]["cosine after cutting"]),
    Claim("the second stage does not lower the accuracy of the probes",
          lambda a: a["dphubert"]["accuracy"] - a["dphubert"]["accuracy after cutting"]),
    Claim("pruning while distilling beats pruning by magnitude before (accuracy)",
          lambda a: a["dphubert"]["accuracy"] - a["one-shot"]["accuracy"], report=True),
    Claim("two stages beat one of the same number of updates (accuracy)",
          lambda a: a["dphubert"]["accuracy"] - a["one stage"]["accuracy"], report=True),
    Claim("pruning the convolutions too beats sparing them (accuracy)",
          lambda a: a["dphubert"]["accuracy"] - a["no CNN pruning"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    steps: int = 75_000  # updates of both stages
    second: float = 1 / 3  # part of the steps after the cut; 0: no second stage
    batch: int = 40  # clips a step: 640 s at 16 s a clip
    layers: tuple[int, ...] = (0, 4, 8, 12)  # matched hidden states; 0 is the projected output of the convolutions
    l1: float = 1.0  # weight of the absolute difference
    cosine: float = 1.0  # weight of the cosine
    prune: Literal["joint", "magnitude"] = "joint"  # gates trained in stage 1, or the smallest weights before it
    units: tuple[str, ...] = UNITS  # what may be pruned; empty: nothing, the student keeps its shape
    sparsity: float = 0.75  # t: part of the teacher's parameters that is to go
    sparsity_warmup: float = 0.1  # part of stage 1 in which t rises from 0
    drop: float = 0.01  # probability with which a gate is closed at the start
    lr: float = 2e-4  # peak rate of weights and projections in stage 1, linear to 0
    gate_lr: float = 0.02  # of log_alpha (descent) and of lambda1 and lambda2 (ascent)
    warmup: float = 0.3  # part of stage 1 in which the rates rise
    second_lr: float = 1e-4  # peak rate in stage 2
    second_warmup: float = 0.2  # part of stage 2
    clip: float = 10.0  # global gradient norm
    normalise: bool = False  # bring each clip to mean 0 and variance 1, as models with do_normalize want it
    cache: bool = False  # compute the teacher's hidden states once for all clips and keep them in memory

    def __post_init__(self) -> None:
        check_training(self.steps, self.batch, self.lr, self.warmup, 0.0)
        require(0 <= self.second <= 1, f"second is a fraction of the steps, not {self.second}")
        require(len(self.layers) > 0, "layers must name at least one hidden state")
        require(self.prune in ("joint", "magnitude"), f"prune is 'joint' or 'magnitude', not {self.prune!r}")
        require(set(self.units) <= set(UNITS), f"units are of {', '.join(UNITS)}, not {self.units}")
        require(0 <= self.sparsity < 1, f"sparsity must lie in [0, 1), not {self.sparsity}")
        require(0 <= self.second_warmup < 1 and 0 <= self.sparsity_warmup <= 1, "second_warmup and sparsity_warmup "
                f"are fractions of a stage, not {self.second_warmup} and {self.sparsity_warmup}")
        require(self.second_lr > 0 < self.gate_lr and self.clip > 0, "second_lr, gate_lr and clip must be above 0")
        require(0 < self.drop < 1, f"drop is a probability in (0, 1), not {self.drop}")


EMBEDDED = Config(steps=750, batch=16, layers=(0, 2, 4), sparsity_warmup=0.6, lr=2e-3, gate_lr=0.2, warmup=0.05,
                  second_lr=1e-3, second_warmup=0.05, cache=True)
LR_BY_HAND = 1.6e-2  # best of 5e-4 to 3.2e-2 for students that were not pruned while they learned


def distill(
    teacher: SpeechEncoder,
    student: SpeechEncoder,
    data: SpeechData,
    config: Config = Config(),
    run: Run | None = None,
) -> nn.Module:
    """Train and cut the student, a copy of the teacher, in place; it comes back with `save(folder)`.

    Both are a HubertModel, Wav2Vec2Model or WavLMModel of `transformers`. With no `units` to prune the student may be
    any of them with as many layers.
    """
    run = begin(run)
    check_roles(teacher, student, data, config, run)
    with frozen(teacher), unmasked(student):
        match = Matching(teacher, student, data, config, run)
        prune(match, config, run)
        polish(match, config, run)
    return match.student


def prune(match: Matching, config: Config, run: Run) -> float:
    """Stage 1 and the cut, in place; the expected sparsity s at its end."""
    student, full = match.student, parameters(match.teacher)
    if config.units and config.prune == "magnitude":
        cut(student, magnitude_masks(student, round((1 - config.sparsity) * full), config.units))
    plan = layout(student)
    groups = plan.sizes(config.units if config.prune == "joint" else ())
    gates = Gates(groups, config.drop, least={name: int(name.startswith("conv")) for name in groups}).to(run.device)
    lagrangian = Lagrangian().to(run.device)
    ratio = config.gate_lr / config.lr
    trained: list[dict[str, Any]] = [{"params": [*student.parameters(), *match.maps.parameters()]},
                                     {"params": list(gates.parameters()), "lr": config.gate_lr, "lr_scale": ratio},
                                     lagrangian.group(config.gate_lr, ratio)]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=0.0)
    steps = config.steps - round(config.second * config.steps)
    with gated(student, gates):
        for batch in run.loop("joint", match.data, batch=config.batch, steps=steps, student=student, maps=match.maps,
                              gates=gates, lagrangian=lagrangian, optimizer=optimizer):
            set_lr(optimizer, config.lr * warmup_linear(run.progress, config.warmup))
            gates.draw(run.shared)
            terms = {"distance": match.distance(batch)}
            if groups:
                s = 1 - plan.count(gates.kept()) / full
                terms["sparsity"] = lagrangian(s, config.sparsity * warmup(run.progress, config.sparsity_warmup))
                run.log(expected=s, lambda1=lagrangian.lambda1, lambda2=lagrangian.lambda2)
            run.update(optimizer, clip=config.clip, **terms)
    with torch.no_grad():
        expected = float(1 - torch.as_tensor(plan.count(gates.kept())) / full)
    if groups:
        cut(student, gates.masks())
        run.log(expected=expected, realised=1 - parameters(student) / full)
    return expected


def polish(match: Matching, config: Config, run: Run) -> None:
    """Stage 2: the same distance without gates; the projections go on."""
    trained = [*match.student.parameters(), *match.maps.parameters()]
    optimizer = torch.optim.AdamW(trained, config.second_lr, weight_decay=0.0)
    for batch in run.loop("second", match.data, batch=config.batch, steps=round(config.second * config.steps),
                          student=match.student, maps=match.maps, optimizer=optimizer):
        set_lr(optimizer, config.second_lr * warmup_linear(run.progress, config.second_warmup))
        run.update(optimizer, clip=config.clip, distance=match.distance(batch))


class Matching:
    """Teacher, student and data with what stands between them: `maps`, the projections of the student's hidden states
    (identity at the start; one for layer 0, one for all others), and the teacher's hidden states, computed when a batch
    asks for them or once for the whole set (`cache`)."""

    def __init__(self, teacher: Any, student: Any, data: Any, config: Config, run: Run):
        self.teacher, self.student, self.data, self.config = teacher, student.train(), data, config
        widths = layout(student).width, layout(teacher).width
        self.maps = nn.ModuleDict({"front": identity_linear(*widths), "deep": identity_linear(*widths)}).to(run.device)
        if config.cache:
            audio = column(data, "audio")
            kept = run.once("teacher", lambda: {"hidden": torch.cat(
                [self.targets(part.to(run.device)).cpu() for part in audio.split(128)])})
            self.data = TensorSet(audio=audio, hidden=kept["hidden"].cpu())

    @torch.no_grad()
    def targets(self, audio: Tensor) -> Float[Tensor, "batch layers frames width"]:
        """h_t"""
        states = hidden_states(self.teacher, prepared(audio, self.config), self.config.layers)
        return torch.stack(states, 1)

    def mapped(self, audio: Tensor) -> Float[Tensor, "batch layers frames width"]:
        """h_s'"""
        states = hidden_states(self.student, prepared(audio, self.config), self.config.layers)
        return torch.stack([self.maps["deep" if i else "front"](h) for i, h in
                            zip(self.config.layers, states, strict=True)], 1)

    def distance(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """L_dis"""
        targets = batch["hidden"] if self.config.cache else self.targets(batch["audio"])
        pairs = zip(self.mapped(batch["audio"]).unbind(1), targets.unbind(1), strict=True)
        return torch.stack([hidden_distance(s, t, self.config.l1, self.config.cosine) for s, t in pairs]).mean()


def prepared(audio: Tensor, config: Config) -> Tensor:
    """The clips as the models take them."""
    if not config.normalise:
        return audio
    return (audio - audio.mean(1, keepdim=True)) / (audio.var(1, unbiased=False, keepdim=True) + 1e-7).sqrt()


def check_roles(teacher: Any, student: Any, data: Any, config: Config, run: Run) -> None:
    """Raise RoleError, before any work, for models between which hidden states cannot be matched."""
    run.check(SpeechEncoder, data, teacher=teacher, student=student)
    mine, other = layout(student), layout(teacher)
    require(len(mine.heads) >= max(config.layers) <= len(other.heads), f"layers {config.layers} are matched, but the "
            f"student has {len(mine.heads)} and the teacher {len(other.heads)}", RoleError)
    if config.units:
        require(mine == other and not isinstance(student, Pruned), "the student that is pruned must be a copy of the "
                "teacher, e.g. copy.deepcopy(teacher); their widths differ. A student of another shape is distilled "
                "without pruning: units=()", RoleError)
        least = other.count({name: 0 if name[0] != "c" else 1 for name in other.sizes(config.units)})
        most = 1 - least / parameters(teacher)
        require(config.sparsity < most, f"a sparsity of {config.sparsity} is out of reach: without all of "
                f"{', '.join(config.units)} it would be {most:.3f}")


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    teacher = hubert(16, 2, 2, 12, (6, 8, 8))
    return {"teacher": teacher, "student": deepcopy(teacher), "data": TensorSet(audio=torch.randn(10, 400)),
            "config": Config(steps=8, second=0.25, batch=4, layers=(0, 1, 2), sparsity=0.6, sparsity_warmup=0.0,
                             lr=1e-2, gate_lr=2.0, warmup=0.1)}


# -------------------------------------------------------------------- the embedded experiment


class Pooled(nn.Module):
    """The mean over time of some layers' hidden states, one behind the other: what the probes see."""

    def __init__(self, model: nn.Module, layers: tuple[int, ...]):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, audio: Tensor) -> Tensor:
        return torch.cat([h.mean(1) for h in hidden_states(self.model, audio, self.layers)], 1)


def narrow(wanted: int) -> nn.Module:
    """The hand-designed student: the teacher's depth, all widths by one factor, and as many hidden units as bring the
    number of parameters nearest to the one wanted."""
    def size(width: int, units: int) -> int:
        with torch.device("meta"):
            return parameters(hubert(width, 4, 4, units, (width // 2, width, width)))

    width = next(w for w in range(64, 0, -16) if size(w, 4 * w) <= wanted or w == 16)
    empty, each = size(width, 1), size(width, 2) - size(width, 1)
    return hubert(width, 4, 4, max(1, 1 + round((wanted - empty) / each)), (width // 2, width, width))


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Every arm: 750 updates of 16 out of 1,500 unlabelled crops of half a second. Probes learn from 2,000 clips and
    are tested on 1,000 others; the cosine is that of the mapped hidden states of 250 of those to the teacher's.

    The narrow student starts at random and is as large as the pruned one turned out to be. Arms with one stage have one
    schedule over all updates. The rate of those that start from a narrow or a suddenly pruned student is their own.
    """
    teacher: Any = tones_teacher().to(run.device)
    full = parameters(teacher)
    data: Any = crops(tones(1500, seed=3 * run.seed), 2000, seed=run.seed).without("word", "speaker")
    train, test = tones(2000, seed=3 * run.seed + 1), tones(1000, seed=3 * run.seed + 2)

    def measured(match: Matching, after: str = "") -> dict[str, float]:
        encoder = Pooled(match.student, EMBEDDED.layers)
        x, y = (extract(encoder, part, device=run.device, field="audio") for part in (train, test))
        found = {task: linear_probe(x, train.data[task], y, test.data[task]) for task in ("word", "speaker")}
        audio = test.audio[:250].to(run.device)
        with run.aside("cosine", match.student):
            cosine = float(F.cosine_similarity(match.mapped(audio), match.targets(audio), dim=-1).mean())
        found |= {"accuracy": (found["word"] + found["speaker"]) / 2, "cosine": cosine}
        return {f"{name}{after}": value for name, value in found.items()}

    def arm(new: Callable[[], Any] = lambda: deepcopy(teacher), **changes: Any) -> dict[str, float]:
        """What `distill` does, measured after the cut as well."""
        config = dataclasses.replace(EMBEDDED, **changes)
        run.begin()
        student = new().to(run.device)
        check_roles(teacher, student, data, config, run)
        with frozen(teacher), unmasked(student):
            match = Matching(teacher, student, data, config, run)
            expected = prune(match, config, run)
            early = measured(match, " after cutting") if config.second else {}
            polish(match, config, run)
            size = parameters(student)
            if isinstance(student, Pruned):
                run.picture("what is kept", kept_picture(layout(teacher).sizes(), layout(student).sizes()))
            return {**measured(match), **early, "parameters": size, "sparsity": 1 - size / full,
                    "expected sparsity": expected}

    one: dict[str, Any] = {"second": 0.0}
    first = run.arms({"dphubert": arm})

    def by_hand() -> nn.Module:
        return narrow(round(first["dphubert"]["parameters"]))

    return {**first, **run.arms(
        {"narrow": lambda: arm(by_hand, units=(), lr=LR_BY_HAND, **one)},
        extended={"one-shot": lambda: arm(prune="magnitude", lr=LR_BY_HAND, **one),
                  "one stage": lambda: arm(**one),
                  "no CNN pruning": lambda: arm(units=("head", "unit")),
                  "teacher": lambda: arm(steps=0, units=())})}


def kept_picture(before: dict[str, int], after: dict[str, int]) -> Any:
    """The part of each group of structures that is left, as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(list(before), [after[name] / n for name, n in before.items()])
    axes.set(ylabel="part kept", ylim=(0, 1))
    axes.tick_params(axis="x", rotation=60)
    return figure
