"""Learning prompts for a dual encoder from a few labelled pictures, held near the frozen model (PromptSRC).

Deep tokens in both encoders; with f, g the unit features of pictures and class texts under the prompts, f0 those of the
frozen encoder and g0 the frozen text vectors, averaged over an ensemble of templates:

    L = CE(s f g^T, y) + l_i mean|f - f0| + l_t mean|g - g0| + KL(softmax(s f0 g0^T) || softmax(s f g^T)) / C,

the means over all entries, the KL averaged over the batch. The prompts that come out are those of all epochs, averaged
with the weights of a Gaussian over the epochs. Khattak et al. 2023, "Self-regulating Prompts", equations 3 to 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.sets import column
from stillhouse.errors import DataError, RoleError, require
from stillhouse.measures.divergences import kl
from stillhouse.parts.class_vectors import TEMPLATES, class_vectors, cosine_logits, filled
from stillhouse.parts.prompts import DeepPrompts, Prompted
from stillhouse.protocols import DualEncoder, LabelledImages
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import resized_crop
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.schedules import cosine


@dataclass(frozen=True)
class Config:
    epochs: int = 20  # passes over the labelled pictures; 0: no tuning
    batch: int = 8  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.005  # learning rate after the warm-up; a cosine over the epochs
    warmup: float = 0.05  # part of the steps with the learning rate warmup_lr: one epoch of 20
    warmup_lr: float = 1e-5  # learning rate of the warm-up
    weight_decay: float = 5e-4  # lambda
    depth: int = 9  # layers of both encoders that get tokens of their own, at most all of them
    tokens: int = 4  # visual tokens a layer
    context: str = "a photo of a"  # words that the text tokens start from: as many tokens as these words have
    templates: tuple[str, ...] = TEMPLATES  # sentences of the frozen text vectors
    text_weight: float = 25.0  # l_t
    image_weight: float = 10.0  # l_i
    logit_weight: float = 1.0  # weight of the KL
    average_at: float = 0.75  # mean of the Gaussian over the epochs, as a part of them: epoch 15 of 20
    average_width: float = 0.05  # its standard deviation as a part of the epochs; 0: the last epoch alone
    smallest: float = 0.08  # smallest area of a random crop, as a part of the picture, with flips; 1: no views

    def __post_init__(self) -> None:
        check_training(self.epochs, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.warmup_lr > 0, f"warmup_lr must be above 0, not {self.warmup_lr}")
        require(min(self.depth, self.tokens) >= 1, "depth and tokens must be 1 or more, got "
                f"{self.depth} and {self.tokens}")
        require(bool(self.context.strip()) and bool(self.templates), "context needs a word, templates one sentence")
        require(all(t.count("{}") == 1 for t in self.templates), "each template has one {} for the class name")
        require(min(self.text_weight, self.image_weight, self.logit_weight) >= 0, "weights must be 0 or more")
        require(0 < self.average_at <= 1 and self.average_width >= 0, "average_at must lie in (0, 1] and average_width "
                f"be 0 or more; got {self.average_at} and {self.average_width}")
        require(0 < self.smallest <= 1, f"smallest is a part of the area in (0, 1], not {self.smallest}")

    @property
    def template(self) -> str:
        """The sentence that the learned context begins."""
        return f"{self.context.strip()} {{}}."


def gaussian_weights(epochs: int, at: float, width: float) -> list[float]:
    """Weights of epochs 1 to `epochs`, proportional to a Gaussian of mean `at` and standard deviation `width`, both in
    parts of the epochs, summing to 1; width 0 gives the last epoch all."""
    if width == 0:
        return [float(e == epochs) for e in range(1, epochs + 1)]
    logs = [-((e / epochs - at) ** 2) / (2 * width**2) for e in range(1, epochs + 1)]
    shares = [math.exp(v - max(logs)) for v in logs]
    return [s / sum(shares) for s in shares]


def warmed_cosine(progress: float, config: Any) -> float:
    """The learning rate at k / steps: constant and small at first, then a cosine over all steps."""
    return config.warmup_lr if progress < config.warmup else config.lr * cosine(progress)


def base_classes(labelled: LabelledImages, names: Sequence[str]) -> list[int]:
    """The labels that occur. Raises DataError for fewer than two, or one that has no name."""
    first_batch(labelled, ("image", "label"))
    labels = column(labelled, "label")
    require(not labels.is_floating_point() and labels.dim() == 1, "labels are whole numbers", DataError)
    found = labels.unique().tolist()
    require(found[0] >= 0 and found[-1] < len(names), f"labels go from {found[0]} to {found[-1]}, but {len(names)} "
            "classes have names", DataError)
    require(len(found) >= 2, f"all labelled pictures are of the class {names[found[0]]}: at least two are needed",
            DataError)
    return found


def fresh(dual: Any, config: Config) -> Prompted:
    """The dual encoder with prompts that have not learned yet: random visual ones, texts from the words of `context`.

    Raises RoleError for one that cannot take prompts.
    """
    require(hasattr(dual, "vision") and hasattr(dual, "text"), f"{type(dual).__name__} does not offer the layers that "
            "prompts go into (is it prompted already? then epochs=0 leaves it as it is)", RoleError)
    words = dual.text.words(config.context)
    visual = DeepPrompts(min(config.depth, len(dual.vision.layers)), config.tokens, dual.vision.width)
    textual = DeepPrompts(min(config.depth, len(dual.text.layers)), len(words), dual.text.width, first=words)
    return Prompted(dual, visual, textual, config.template).to(words.device)


def tune(
    student: DualEncoder,
    labelled: LabelledImages,
    names: Sequence[str],
    config: Config = Config(),
    run: Run | None = None,
) -> Prompted:
    """Learn prompts on the classes that are labelled; `names` are those of all. The dual encoder itself is not changed.
    """
    run = begin(run)
    run.check(DualEncoder, labelled, student=student)
    base = base_classes(labelled, names)
    own = [names[c] for c in base]
    place = torch.full((len(names),), -1, dtype=torch.long, device=run.device)
    place[base] = torch.arange(len(base), device=run.device)
    prompted = fresh(student, config)
    visual, textual = prompted.visual, prompted.textual
    optimizer = optimizer_for([visual.tokens, textual.tokens], config.optimizer, config.lr, config.weight_decay)
    shares = gaussian_weights(config.epochs, config.average_at, config.average_width)
    average = [torch.zeros_like(visual.tokens), torch.zeros_like(textual.tokens)]
    with frozen(student):
        g0 = class_vectors(student, own, config.templates)
        scale = student.scale.detach()
        for batch in run.loop("prompts", labelled, batch=config.batch, epochs=config.epochs, visual=visual,
                              textual=textual, average=average, optimizer=optimizer):
            set_lr(optimizer, warmed_cosine(run.progress, config))
            x = batch["image"] if config.smallest == 1 else resized_crop(batch["image"], run, config.smallest)
            with torch.no_grad():
                f0 = F.normalize(student.encode_image(x), dim=-1)
            f = F.normalize(student.encode_image(x, visual()), dim=-1)
            g = F.normalize(student.encode_text(filled(config.template, own), textual()), dim=-1)
            run.update(optimizer, **losses(f, g, f0, g0, scale, place[batch["label"]], config))
            if run.last_of_epoch:
                with torch.no_grad():
                    for mean, prompts in zip(average, (visual, textual), strict=True):
                        mean.add_(prompts.tokens, alpha=shares[run.epoch])
    if config.epochs:
        with torch.no_grad():
            visual.tokens.copy_(average[0])
            textual.tokens.copy_(average[1])
    return prompted.eval()


def losses(
    f: Float[Tensor, "batch features"], g: Float[Tensor, "classes features"], f0: Float[Tensor, "batch features"],
    g0: Float[Tensor, "classes features"], scale: Tensor, label: Tensor, config: Config,
) -> dict[str, Any]:
    """The four terms, from unit features under the prompts (f, g) and without (f0, g0)."""
    z, z0 = scale * f @ g.T, cosine_logits(f0, g0, scale)
    return {"ce": F.cross_entropy(z, label), "image": config.image_weight * (f - f0).abs().mean(),
            "text": config.text_weight * (g - g0).abs().mean(), "logits": config.logit_weight * kl(z0, z) / z.shape[1]}
