"""DDFA: a classifier of domains is turned into a classifier of classes that nobody labelled.

Pictures come from r domains in which the proportions of k hidden classes differ, W = p(y | d), while p(x | y) does not:
what shifts together across the domains belongs together. Discriminate, discretise, factorise, adjust:

    f(x) ~ p(d | x)                            the student, cross-entropy with the domains weighted alike
    q(x) = the k-means cell of f(x),  m >= k cells
    Q = p(q | d) = C W,   C = p(q | y)         non-negative factors [m, k] and [k, r], columns summing to 1
    p(y | x) = pinv(P) f(x),   P = p(d | y) = W^T with each column divided by its sum
    p_d(y | x) ~ p(y | x) p(d | y)             normalised over y; the class is its argmax

This is a topic model: cells are words, domains documents, classes topics. W is identified if it has rank k and every
class has a region of its own (anchors); if all classes occur in all domains, NMF reaches zero residual with wrong
factors, and only a solver that uses the anchors (`solver="anchors"`, successive projection) finds the right ones.

Roberts et al. 2022, "Unsupervised Learning under Latent Label Shift". Deviations: domains of unequal size are
weighted alike; NMF is the best of several starts; p(y | x) is clipped at 0 before it is adjusted (the release
keeps negative entries).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.clusters import kmeans, nearest_centre, principal_components
from stillhouse.data.digits import digits
from stillhouse.data.label_shift import dirichlet_proportions, draw_domains, with_styles
from stillhouse.data.sets import TensorSet, column
from stillhouse.data.topics import anchors, frequencies, nmf
from stillhouse.errors import DataError, RoleError, require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.clustering import clustering_accuracy, matching
from stillhouse.evaluate.probes import extract
from stillhouse.measures.label_shift import adjusted, class_posterior, identified, proportion_error
from stillhouse.models.convnets import MLP
from stillhouse.parts.best import Best
from stillhouse.parts.heads import Projected, projector
from stillhouse.protocols import Classifier, DomainImages
from stillhouse.recipes import simclr
from stillhouse.recipes.supervised import check_training, optimizer_for
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.store import load_tree, save_tree

NUMBER = 69

CLAIMS = [
    Claim("where pictures group by a style that means nothing, DDFA beats k-means on pixels by 15 points",
          lambda a: a["ddfa"]["accuracy"] - a["k-means"]["accuracy"] - 0.15),
    Claim("and k-means on principal components by 15 points",
          lambda a: a["ddfa"]["accuracy"] - a["k-means, PCA"]["accuracy"] - 0.15),
    Claim("with shuffled domains it stays within 15 points of naming the largest class",
          lambda a: a["shuffled domains"]["majority"] + 0.15 - a["shuffled domains"]["accuracy"]),
    Claim("its class proportions are nearer to the true ones than those of the clusters of k-means",
          lambda a: a["k-means"]["proportions"] - a["ddfa"]["proportions"], report=True),
    Claim("accuracy is within 10 points of what the true proportions give with the same classifier",
          lambda a: a["ddfa"]["accuracy"] - a["true proportions"]["accuracy"] + 0.1, report=True),
    Claim("on plain digits, which group by class, it beats k-means",
          lambda a: a["plain: ddfa"]["accuracy"] - a["plain: k-means"]["accuracy"], report=True),
    Claim("cells of p(d | x) beat cells of the pixels",
          lambda a: a["ddfa"]["accuracy"] - a["cells of pixels"]["accuracy"], report=True),
    Claim("knowing the domain of a picture helps to class it",
          lambda a: a["ddfa"]["accuracy"] - a["ddfa"]["unadjusted"], report=True),
]


@dataclass(frozen=True)
class Config:
    classes: int = 10  # k
    cells: int = 30  # m, cells of the k-means; 30 for CIFAR-10, 60 for CIFAR-20
    epochs: int = 100  # passes over the data of the discriminator; 25 from a pre-trained one
    batch: int = 32  # pictures a step
    optimizer: Literal["sgd", "adamw"] = "adamw"  # AdamW (without decay Adam), or SGD with momentum 0.9
    lr: float = 1e-3  # learning rate of the first epoch; 1e-5 from a pre-trained discriminator
    decay: float = 0.97  # factor of the learning rate per epoch
    weight_decay: float = 0.0  # lambda
    restarts: int = 5  # runs of k-means
    iterations: int = 100  # most steps of a run of k-means
    space: Literal["domain", "image"] = "domain"  # what is cut into cells: f(x), or the pixels
    solver: Literal["nmf", "anchors"] = "nmf"  # how Q is factorised
    starts: int = 5  # random starts of NMF, of which the one with the smallest residual is kept
    smallest: float = 0.0  # part of the samples that a cell must hold to be an anchor

    def __post_init__(self) -> None:
        check_training(self.epochs, self.batch, self.lr, 0.0, self.weight_decay)
        require(self.classes >= 2, f"classes must be 2 or more, not {self.classes}")
        require(self.cells >= self.classes, f"{self.classes} classes need as many cells; got {self.cells}")
        require(0 < self.decay <= 1, f"decay must lie in (0, 1], not {self.decay}")
        require(min(self.restarts, self.iterations, self.starts) >= 1, "restarts, iterations and starts must be 1 or "
                f"more; got {self.restarts}, {self.iterations} and {self.starts}")
        require(self.space in ("domain", "image") and self.solver in ("nmf", "anchors"), "space is domain or image and "
                f"solver nmf or anchors; got {self.space!r} and {self.solver!r}")
        require(0 <= self.smallest < 1, f"smallest is a part of the samples in [0, 1), not {self.smallest}")


EMBEDDED = Config(classes=5, cells=20, epochs=30, batch=64, lr=2e-3, weight_decay=0.1)


@dataclass
class LatentClasses:
    """The hidden classes: a discriminator of domains and the class proportions W [k, r] of each.

    `C` [m, k] is p(q | y) and `centres` [m, r] are the cells, in the space that was clustered. `identified`: whether W
    has rank k, without which p(y | x) is one solution among many.
    """

    discriminator: Any
    W: Float[Tensor, "k r"]
    C: Float[Tensor, "m k"]
    centres: Tensor

    @property
    def identified(self) -> bool:
        return identified(self.W)

    @torch.no_grad()
    def domains(self, image: Tensor) -> Float[Tensor, "n r"]:
        """f(x), the estimate of p(d | x)."""
        with frozen(self.discriminator):
            return self.discriminator(image).softmax(1)

    def posterior(self, image: Tensor) -> Float[Tensor, "n k"]:
        """p(y | x) by the pseudo-inverse; entries may be negative where f(x) is not exact."""
        return class_posterior(self.domains(image), self.W.to(image))

    def predict(self, image: Tensor, domain: Int[Tensor, " n"] | None = None) -> Int[Tensor, " n"]:
        """The most probable class of each picture; of p_d(y | x) where the domain is given."""
        posterior = self.posterior(image)
        return (posterior if domain is None else adjusted(posterior, self.W.to(image), domain)).argmax(1)

    def save(self, folder: Path | str) -> Path:
        """Write the discriminator's weights and the factors into `folder`."""
        folder = Path(folder)
        save_tree(folder / "model.safetensors", dict(self.discriminator.state_dict()))
        save_tree(folder / "classes.safetensors", {"W": self.W, "C": self.C, "centres": self.centres})
        return folder

    @classmethod
    def load(cls, folder: Path | str, discriminator: nn.Module) -> LatentClasses:
        """Read what `save` wrote; the weights go into `discriminator`."""
        discriminator.load_state_dict(load_tree(Path(folder) / "model.safetensors"))
        return cls(discriminator, **load_tree(Path(folder) / "classes.safetensors"))


def distill(
    student: Classifier,
    data: DomainImages,
    validation: DomainImages | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> LatentClasses:
    """Find `config.classes` hidden classes in pictures with their domains; labels are never read.

    The student, with one output per domain, is trained in place as the discriminator; with `validation`, the weights
    of the epoch with the lowest loss there are kept. There must be at least as many domains as classes.
    """
    run = begin(run)
    run.check(Classifier, data, student=student)
    weights = domain_weights(student, data, validation, config).to(run.device)
    assert isinstance(student, nn.Module)
    student.train()
    best = Best()
    optimizer = optimizer_for(student.parameters(), config.optimizer, config.lr, config.weight_decay)
    for batch in run.loop("discriminate", data, batch=config.batch, epochs=config.epochs, student=student, best=best,
                          drop_last=len(data) >= config.batch, optimizer=optimizer):
        set_lr(optimizer, config.lr * config.decay**run.epoch)
        domain = batch["domain"]
        ce = F.cross_entropy(student(batch["image"]), domain, reduction="none")
        run.update(optimizer, ce=(weights[domain] * ce).mean())
        if validation is not None and run.last_of_epoch:
            with run.aside("validation", student):
                logits = extract(student, validation, device=run.device)
            best.offer(-F.cross_entropy(logits, column(validation, "domain"), weights.cpu()).item(), student)
    best.restore(student)

    every = [data] if validation is None else [data, validation]
    found = run.once("factorise", lambda: factorise(student, every, config, run))
    if not identified(found["W"]):
        warnings.warn("the class proportions that were found do not tell the classes apart (their matrix has a rank "
                      f"below {config.classes}), so p(y | x) is not identified: fewer classes, more domains or larger "
                      "differences between them are needed", stacklevel=2)
    return LatentClasses(student, **found)


def factorise(student: nn.Module, every: list[Any], config: Config, run: Run) -> dict[str, Tensor]:
    """W, C and the centres of the cells, from all pictures of the sets."""
    domain = torch.cat([column(data, "domain") for data in every])
    if config.space == "domain":
        features = torch.cat([extract(student, data, device=run.device) for data in every]).softmax(1)
    else:
        features = torch.cat([extract(nn.Flatten(), data) for data in every])
    seed = run.shared_randint(0, 2**31)
    cell, centres = kmeans(features, config.cells, config.restarts, config.iterations, seed)
    Q = frequencies(cell, domain, config.cells, int(domain.max()) + 1)
    if config.solver == "anchors":
        C, W, _ = anchors(Q, config.classes, config.smallest)
    else:
        C, W = nmf(Q, config.classes, config.starts, seed=seed)
    return {"W": W.float(), "C": C.float(), "centres": centres}


def domain_weights(student: Any, data: Any, validation: Any, config: Config) -> Float[Tensor, " r"]:
    """The weight of a sample of each domain, so that all domains weigh alike; n / (r n_d)."""
    first_batch(data, ("image", "domain"))
    domain = column(data, "domain")
    require(not domain.is_floating_point() and int(domain.min()) >= 0, "domains are whole numbers from 0 on", DataError)
    counts = torch.bincount(domain)
    empty = (counts == 0).nonzero().flatten().tolist()
    require(not empty, f"domain {(empty or [0])[0]} of 0 to {len(counts) - 1} has no pictures; number the domains "
            "without gaps", DataError)
    require(len(counts) >= config.classes, f"{config.classes} classes are not identified by {len(counts)} domains; "
            "give at least as many domains, or look for fewer classes", DataError)
    require(len(data) >= config.cells, f"{len(data)} pictures cannot fill {config.cells} cells", DataError)
    outputs = extract(student, TensorSet(image=first_batch(data)["image"]), device=_device(student)).shape[1]
    require(outputs == len(counts), f"the student has {outputs} outputs, the data {len(counts)} domains; give it one "
            "output for each", RoleError)
    if validation is not None:
        first_batch(validation, ("image", "domain"))
        require(int(column(validation, "domain").max()) < len(counts), "validation has domains that data has not",
                DataError)
    return len(data) / (len(counts) * counts.float())


def _device(model: nn.Module) -> torch.device | str:
    return next((p.device for p in model.parameters()), "cpu")


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    domain = torch.arange(18) % 3
    image = torch.randn(18, 1, 4, 4) + domain[:, None, None, None]
    return {"student": student, "data": TensorSet(image=image[:12], domain=domain[:12]),
            "validation": TensorSet(image=image[12:], domain=domain[12:]),
            "config": Config(classes=2, cells=4, epochs=3, batch=4, restarts=1, starts=2)}


# -------------------------------------------------------------------- the embedded experiment


@dataclass(frozen=True)
class Ground:
    """Digits of 8 pixels in domains: 4,000 draws to learn from, 800 to validate, 2,000 to test, of disjoint pictures;
    and the class proportions of the domains."""

    train: Any
    validation: Any
    test: Any
    W: Tensor


def ground(seed: int, styles: bool = True, classes: int = 5, domains: int = 8, alpha: float = 0.5,
           condition: float = 8.0) -> Ground:
    """Class proportions of Dirichlet(alpha); with `styles`, one of three patterns (standard deviation 2) on each."""
    W = dirichlet_proportions(classes, domains, alpha, condition, seed)
    sets = []
    for i, (split, n) in enumerate((("unlabelled", 4000), ("labelled", 800), ("test", 2000))):
        drawn = draw_domains(digits(8, split), W, n, 10 * seed + i, noise=0.05)
        sets.append(with_styles(drawn, 3, 2.0, seed, 10 * seed + i) if styles else drawn)
    return Ground(sets[0], sets[1], sets[2], W.float())


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Accuracy of the aligned classes on held-out draws, and the error of the proportions under the same alignment."""
    g, plain = ground(run.seed), ground(run.seed, styles=False)
    inputs = g.train.image[0].numel()

    def discriminator(of: Ground) -> MLP:
        run.begin()
        return MLP(inputs, of.W.shape[1], hidden=(64,)).to(run.device)

    def self_supervised(of: Ground) -> MLP:
        student = discriminator(of)
        pretrain(student.body, of, run)
        return student

    def ddfa(of: Ground = g, student: Callable[[Ground], nn.Module] = discriminator, truth: bool = False,
             **changes: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            config = dataclasses.replace(EMBEDDED, **changes)
            found = distill(student(of), of.train.without("label"), of.validation.without("label"), config, run)
            if truth:
                found.W = of.W
            guess = found.predict(of.test.image.to(run.device), of.test.domain.to(run.device)).cpu()
            plain_guess = found.predict(of.test.image.to(run.device)).cpu()
            if of is g and not changes:
                run.picture("one row a class", surest(found, of.test, plain.test.image))
            return {**scores(guess, of, found.W), "unadjusted": clustering_accuracy(plain_guess, of.test.label)}
        return measure

    def clusters(features: Callable[[Ground], Callable[[Any], Tensor]], of: Ground = g) -> dict[str, float]:
        encode = features(of)
        k = len(of.W)
        cell, centres = kmeans(encode(of.train), k, EMBEDDED.restarts, EMBEDDED.iterations, run.seed)
        return scores(nearest_centre(encode(of.test), centres), of,
                      frequencies(cell, of.train.domain, k, of.W.shape[1]).float())

    mixed = Ground(shuffled(g.train, run.seed), shuffled(g.validation, run.seed), shuffled(g.test, run.seed), g.W)
    harder = {"alpha 3": ground(run.seed, alpha=3.0, condition=20.0),
              "10 classes": ground(run.seed, classes=10, domains=16)} if run.full else {}
    return run.arms(
        {"k-means": lambda: clusters(lambda of: lambda data: data.image.flatten(1)),
         "k-means, PCA": lambda: clusters(components),
         "ddfa": ddfa(),
         "true proportions": ddfa(truth=True),
         "shuffled domains": ddfa(mixed)},
        extended={"plain: k-means": lambda: clusters(lambda of: lambda data: data.image.flatten(1), plain),
                  "plain: ddfa": ddfa(plain),
                  "k-means, SimCLR": lambda: clusters(lambda of: features_of(self_supervised(of).body, run)),
                  "ddfa from SimCLR": ddfa(student=self_supervised),
                  "anchors": ddfa(solver="anchors", smallest=0.02),
                  "as many cells as classes": ddfa(cells=EMBEDDED.classes),
                  "cells of pixels": ddfa(space="image"),
                  **{f"{name}: ddfa": ddfa(of, classes=len(of.W), cells=4 * len(of.W))
                     for name, of in harder.items()}})


def scores(guess: Tensor, of: Ground, W: Tensor) -> dict[str, float]:
    """Both scores under the one alignment of clusters with classes that the test pictures give."""
    classes = matching(guess, of.test.label)
    free = [y for y in range(len(of.W)) if y not in classes.tolist()]
    aligned = torch.empty_like(W)
    for i in range(len(W)):
        y = int(classes[i]) if i < len(classes) and classes[i] >= 0 else free.pop()
        aligned[y] = W[i]
    return {"accuracy": clustering_accuracy(guess, of.test.label),
            "proportions": proportion_error(aligned, of.W).item(),
            "majority": (torch.bincount(of.test.label).max() / len(of.test)).item()}


def components(of: Ground, k: int = 16) -> Callable[[Any], Tensor]:
    """Coordinates of a picture along the `k` principal components of the training pictures."""
    mean, directions = principal_components(of.train.image.flatten(1), k)
    return lambda data: (data.image.flatten(1) - mean) @ directions


def pretrain(encoder: nn.Module, of: Ground, run: Run) -> None:
    """SimCLR on the same pictures, for as many steps as the discriminator gets."""
    steps = EMBEDDED.epochs * (len(of.train) // EMBEDDED.batch)
    config = simclr.Config(steps=steps, batch=EMBEDDED.batch, optimizer="adamw", lr=EMBEDDED.lr, temperature=0.2)
    student = Projected(encoder, projector(64, 64, 32).to(run.device))
    simclr.train(student, of.train, lambda x: random_view(x, run, noise=0.02), config, run)


def features_of(encoder: nn.Module, run: Run) -> Callable[[Any], Tensor]:
    return lambda data: extract(encoder, data, device=run.device)


def shuffled(data: TensorSet, seed: int) -> TensorSet:
    """The same pictures with their domains dealt out anew."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.with_fields(domain=data.domain[order])


def surest(found: LatentClasses, data: Any, shown: Tensor, columns: int = 10) -> Tensor:
    """The samples of the highest posterior of each class, a row of them for each, as their pictures in `shown`."""
    p = found.posterior(data.image.to(next(found.discriminator.parameters()).device)).cpu()
    return torch.cat([shown[p[:, y].argsort(descending=True)[:columns]] for y in range(p.shape[1])])
