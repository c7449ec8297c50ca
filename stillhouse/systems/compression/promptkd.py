"""PromptKD: what a large CLIP has learned of a domain is moved into the image encoder of a small one by prompts.

Stage 1: the teacher learns deep prompts from a few labelled pictures of the base classes, held near its frozen self
(`recipes.prompt_tuning`). Its text encoder then gives one vector per class, base and novel, w_c = g_T(name_c) / |.|,
and is needed no more: teacher and student both classify with W = (w_c).

Stage 2, on unlabelled pictures x of all classes, with u_T = f_T(x) / |.|, s_T and s_S the frozen logit scales, P the
student's deep visual prompts and h its projector into the teacher's space:

    z_T = s_T u_T W^T,      z_S = s_S u_S W^T,      u_S = h(f_S(x; P)) / |.|
    L = w_kd tau^2 sum_b KL(softmax(z_T / tau) || softmax(z_S / tau)) / (B C)

trains P and h alone; the student's weights stay as they are and its text encoder is never called. What comes out is an
image classifier with W inside.

Li et al. 2024. Deviations: the frozen text reference of stage 1 averages unit vectors (the release averages them before
they are normalised); the learning rate falls by the step, not by the epoch; without augmentation (`smallest=1`) the
teacher's logits are computed once. For comparison, `vectors="student"` keeps the student's own text encoder and has no
projector, which is plain distillation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.sets import TensorSet, column
from stillhouse.errors import DataError, RoleError, require
from stillhouse.evaluate.base_novel import base_to_novel, of_classes
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.probes import extract
from stillhouse.hub.dual_encoders import VectorClassifier
from stillhouse.measures.divergences import kl
from stillhouse.parts.class_vectors import TEMPLATES, class_vectors
from stillhouse.parts.heads import feature_width, mlp
from stillhouse.parts.prompts import DeepPrompts
from stillhouse.protocols import ClassNames, DualEncoder, Images, LabelledImages
from stillhouse.recipes import prompt_tuning
from stillhouse.recipes.prompt_tuning import base_classes, tune, warmed_cosine
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import resized_crop
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch

NUMBER = 1

CLAIMS = [
    Claim("the tuned teacher is better on novel classes than the student's zero-shot, without which there is nothing "
          "to move", lambda a: a["teacher"]["novel"] - a["zero-shot"]["novel"]),
    Claim("the student with distilled prompts beats its own zero-shot, harmonic mean of base and novel classes",
          lambda a: a["promptkd"]["hm"] - a["zero-shot"]["hm"]),
    Claim("and the student whose prompts are tuned on the few labels itself",
          lambda a: a["promptkd"]["hm"] - a["tuned on labels"]["hm"]),
    Claim("unlabelled pictures of all classes serve the novel classes at least as well as those of base classes alone",
          lambda a: a["promptkd"]["novel"] - a["base pictures"]["novel"]),
    Claim("soft targets beat the teacher's hard pseudo-labels",
          lambda a: a["promptkd"]["hm"] - a["hard labels"]["hm"], report=True),
    Claim("the teacher's class vectors beat the student's own text encoder",
          lambda a: a["promptkd"]["hm"] - a["own text encoder"]["hm"], report=True),
    Claim("deep prompts beat prompts at the input alone",
          lambda a: a["promptkd"]["hm"] - a["input prompts"]["hm"], report=True),
    Claim("prompts with the projector beat the projector alone",
          lambda a: a["promptkd"]["hm"] - a["projector alone"]["hm"], report=True),
    Claim("a teacher tuned on few labels teaches more than an untuned one",
          lambda a: a["promptkd"]["hm"] - a["untuned teacher"]["hm"], report=True),
    Claim("the regularisers of stage 1 protect the teacher's novel classes",
          lambda a: a["teacher"]["novel"] - a["unregularised teacher"]["teacher_novel"], report=True),
    Claim("the student reaches its teacher", lambda a: a["promptkd"]["hm"] - a["teacher"]["hm"], report=True),
]


@dataclass(frozen=True)
class Config:
    tuning: prompt_tuning.Config = field(default_factory=prompt_tuning.Config)  # stage 1; epochs=0: none
    epochs: int = 20  # passes over the unlabelled pictures in stage 2
    batch: int = 8  # B, pictures a step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9, or AdamW
    lr: float = 0.005  # learning rate after the warm-up; a cosine
    warmup: float = 0.05  # part of the steps with the learning rate warmup_lr: one epoch of 20
    warmup_lr: float = 1e-5  # learning rate of the warm-up
    weight_decay: float = 5e-4  # lambda
    depth: int = 9  # J, layers with their own visual prompts, at most all; 3 across data sets; 0: projector alone
    tokens: int = 4  # prompts a layer
    temperature: float = 1.0  # tau
    weight: float = 1000.0  # w_kd, of the KL divided by the number of logits; 200 for aircraft, flowers and textures
    target: Literal["soft", "hard"] = "soft"  # the teacher's probabilities, or its most probable class
    vectors: Literal["teacher", "student"] = "teacher"  # whose class vectors the student classifies with
    smallest: float = 0.08  # smallest area of a random crop, as a part of the picture, with flips; 1: no views

    def __post_init__(self) -> None:
        check_training(self.epochs, self.batch, self.lr, self.warmup, self.weight_decay)
        require(self.warmup_lr > 0 and self.weight > 0, "warmup_lr and weight must be above 0, got "
                f"{self.warmup_lr} and {self.weight}")
        require(self.depth >= 0 and self.tokens >= 1, f"depth must be 0 or more and tokens 1 or more; got {self.depth} "
                f"and {self.tokens}")
        require(self.temperature > 0, f"temperature must be above 0, not {self.temperature}")
        require(self.target in ("soft", "hard"), f"target is 'soft' or 'hard', not {self.target!r}")
        require(self.vectors in ("teacher", "student"), f"vectors is 'teacher' or 'student', not {self.vectors!r}")
        require(self.vectors == "teacher" or self.depth > 0, "with vectors='student' there is no projector, and with "
                "depth=0 no prompt: nothing would be trained")
        require(0 < self.smallest <= 1, f"smallest is a part of the area in (0, 1], not {self.smallest}")


EMBEDDED = Config(  # the weights of stage 1 are 25 and 10 by sqrt(width / 768), as entries of unit vectors are larger
    tuning=prompt_tuning.Config(optimizer="adamw", lr=0.005, text_weight=9.0, image_weight=3.5, smallest=1.0),
    epochs=10, batch=32, optimizer="adamw", lr=0.005, depth=4, smallest=1.0)


def distill(
    teacher: DualEncoder,
    student: DualEncoder,
    unlabelled: Images,
    classes: ClassNames,
    labelled: LabelledImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> VectorClassifier:
    """A classifier for all `classes`: the student's image encoder, as it was, with new prompts and a projector.

    `labelled` are pictures of some classes, from which the teacher's prompts are learned; a teacher that has prompts
    already needs none with `tuning.epochs=0`.
    """
    run = begin(run)
    names = checked(teacher, student, unlabelled, classes, labelled, config, run)
    tuned: Any = teacher
    if config.tuning.epochs:
        assert labelled is not None
        with run.scope("teacher"):
            tuned = tune(teacher, labelled, names, config.tuning, run)
    with frozen(tuned, student):
        template = getattr(tuned, "template", config.tuning.template)
        W = run.once("class vectors", lambda: class_vectors(tuned, names, [template]))
        expert = VectorClassifier(tuned, W, tuned.scale, names)
        target, trained = to_train(student, W, names, unlabelled, config, run)
        stored = None
        if config.smallest == 1:
            stored = run.once("teacher logits", lambda: extract(expert, unlabelled, device=run.device)).to(run.device)
        optimizer = optimizer_for([p for part in trained for p in part.parameters()], config.optimizer, config.lr,
                                  config.weight_decay)
        for batch in run.loop("student", unlabelled, batch=config.batch, epochs=config.epochs, trained=trained,
                              drop_last=len(unlabelled) >= config.batch, optimizer=optimizer):
            set_lr(optimizer, warmed_cosine(run.progress, config))
            x = batch["image"] if stored is not None else resized_crop(batch["image"], run, config.smallest)
            with torch.no_grad():
                z_T = expert(x) if stored is None else stored[batch["index"]]
            run.update(optimizer, kd=distance(z_T, target(x), config))
    return target.eval()


def distance(z_T: Float[Tensor, "B C"], z_S: Float[Tensor, "B C"], config: Config) -> Tensor:
    """w_kd times the tempered KL (or the cross-entropy with the teacher's class), divided by the number of logits."""
    if config.target == "hard":
        return config.weight * F.cross_entropy(z_S, z_T.argmax(1)) / z_S.shape[1]
    return config.weight * kl(z_T, z_S, config.temperature) / z_S.shape[1]


def to_train(student: Any, W: Tensor, names: list[str], unlabelled: Images, config: Config,
             run: Run) -> tuple[VectorClassifier, list[nn.Module]]:
    """The classifier on the student's image encoder, and the parts of it that learn."""
    prompts: DeepPrompts | None = None
    projector: nn.Module | None = None
    if config.depth:
        prompts = DeepPrompts(min(config.depth, len(student.vision.layers)), config.tokens, student.vision.width)
    if config.vectors == "teacher":
        example = first_batch(unlabelled)["image"].to(run.device)
        projector = mlp(feature_width(student, example), W.shape[1], W.shape[1], norm=True)
    else:
        W = run.once("own class vectors", lambda: class_vectors(student, names, config.tuning.templates))
    target = VectorClassifier(student.vision, W, student.scale, names, prompts, projector).to(run.device)
    return target, [part.train() for part in (prompts, projector) if part is not None]


def checked(teacher: Any, student: Any, unlabelled: Any, classes: Any, labelled: Any, config: Config,
            run: Run) -> list[str]:
    """The class names, after everything that was given has been looked at."""
    run.check(DualEncoder, unlabelled, teacher=teacher, student=student)
    first_batch(classes, ("name",))
    names = [str(classes[i]["name"]) for i in range(len(classes))]
    require(len(names) >= 2 and len(set(names)) == len(names), f"classes needs two different names or more; got "
            f"{', '.join(names[:3])}{', …' * (len(names) > 3)}", DataError)
    for role, model in (("teacher", teacher), ("student", student)):
        wanted = role == "student" or config.tuning.epochs > 0
        require(not wanted or hasattr(model, "vision"), f"{role} ({type(model).__name__}) does not offer the layers "
                "that prompts go into; a teacher with prompts of its own needs --config.tuning.epochs 0", RoleError)
    if labelled is not None:
        run.check(DualEncoder, labelled, teacher=teacher)
        base_classes(labelled, names)
    require(labelled is not None or not config.tuning.epochs, "stage 1 needs pictures with labels: give labelled, or "
            "tuning.epochs=0 for a teacher that knows the domain already", DataError)
    return names


def tiny() -> dict[str, Any]:
    """CLIPs of one and two layers of width 8, four classes of which two are labelled."""
    from stillhouse.hub.dual_encoders import adapt_dual
    from stillhouse.models.dual_encoders import clip, word_tokenizer

    names = ["red circle", "green square", "blue ring", "white star"]
    tokenizer = word_tokenizer([*TEMPLATES, *names], length=12)
    torch.manual_seed(0)
    teacher, student = (adapt_dual(clip(tokenizer, features, 8, layers, 2, 4, 8, 8, 1, 12), tokenizer).eval()
                        for features, layers in ((12, 2), (8, 2)))
    image = torch.randn(16, 3, 8, 8)
    return {"teacher": teacher, "student": student, "unlabelled": TensorSet(image=image),
            "classes": TensorSet(name=names), "labelled": TensorSet(image=image[:6], label=torch.arange(6) % 2),
            "config": Config(tuning=prompt_tuning.Config(epochs=2, batch=3, tokens=2, depth=2, smallest=0.5), epochs=2,
                             batch=8, depth=2, tokens=2, weight=10.0, smallest=0.5)}


# -------------------------------------------------------------------- the embedded experiment


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Sixteen classes of drawn shapes in a domain that neither dual encoder has seen; 4 labels per base class for the
    teacher and for the baseline that tunes the student's prompts itself. All trained arms: the same optimiser, and as
    many steps as stage 2."""
    from stillhouse.zoo import dual_encoders as zoo

    g = zoo.shapes_domain(run.seed)
    student: Any = zoo.shapes_student().to(run.device)
    classes: Any = TensorSet(name=g.names)
    settled = dataclasses.replace(EMBEDDED, tuning=dataclasses.replace(EMBEDDED.tuning, epochs=0))

    def scores(model: nn.Module) -> dict[str, float]:
        return base_to_novel(model, g.test, g.base, g.novel, run.device)

    def vectors_of(dual: Any, templates: tuple[str, ...]) -> VectorClassifier:
        with frozen(dual):
            return VectorClassifier(dual, class_vectors(dual, g.names, templates), dual.scale, g.names)

    def tuned(**changes: Any) -> Any:
        config = dataclasses.replace(EMBEDDED.tuning, **changes)
        return zoo.tuned_teacher(run.seed, config).to(run.device)

    def promptkd(teacher: Callable[[], Any] = tuned, data: Any = g.unlabelled, show: bool = False,
                 **changes: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            expert = teacher()
            target = distill(expert, student, data.without("label"), classes, None,
                             dataclasses.replace(settled, **changes), run)
            if show:
                run.picture("a row of test pictures for each class", surest(target, g.test, run.device), columns=8)
            template = getattr(expert, "template", EMBEDDED.tuning.template)
            return {**scores(target), "teacher_novel": scores(vectors_of(expert, (template,)))["novel"]}
        return measure

    def on_labels() -> dict[str, float]:
        steps = settled.epochs * (len(g.unlabelled) // settled.batch)
        per_epoch = -(-len(g.labelled) // EMBEDDED.tuning.batch)
        config = dataclasses.replace(EMBEDDED.tuning, epochs=steps // per_epoch, lr=0.02, text_weight=6.0,
                                     image_weight=2.5)
        found = tune(student, g.labelled, g.names, config, run)
        return scores(vectors_of(found, (found.template,)))

    base_only = g.unlabelled.select(of_classes(column(g.unlabelled, "label"), g.base))
    twice = settled.epochs * len(g.unlabelled) // len(base_only)
    plain = {"text_weight": 0.0, "image_weight": 0.0, "logit_weight": 0.0}
    return run.arms(
        {"teacher": lambda: scores(vectors_of(tuned(), (EMBEDDED.tuning.template,))),
         "zero-shot": lambda: scores(vectors_of(student, TEMPLATES)),
         "tuned on labels": on_labels,
         "promptkd": promptkd(show=True),
         "base pictures": promptkd(data=base_only, epochs=twice)},
        extended={"hard labels": promptkd(target="hard"),
                  "own text encoder": promptkd(vectors="student"),
                  "input prompts": promptkd(depth=1),
                  "projector alone": promptkd(depth=0),
                  "untuned teacher": promptkd(teacher=lambda: zoo.shapes_teacher().to(run.device)),
                  "unregularised teacher": promptkd(teacher=lambda: tuned(**plain))})


def surest(target: VectorClassifier, data: Any, device: torch.device, columns: int = 8) -> Tensor:
    """The test pictures of the highest probability of each class, a row for each."""
    p = extract(target, data, device=device).softmax(1)
    return torch.cat([data.image[p[:, c].argsort(descending=True)[:columns]] for c in range(p.shape[1])])
