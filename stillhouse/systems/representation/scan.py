"""SCAN: what a pretext task learned about pictures is turned into a classifier whose classes nobody named.

1. Pretext: an encoder learns to tell pictures apart (SimCLR); every picture's K nearest neighbours N_x, itself among
   them, are mined once in its feature space.
2. Clustering: with p the softmax of a linear head, a random n of N_x and both pictures strongly augmented,

       L = - mean log <p(x), p(n)>  -  lambda H(mean p(x)),        H(p) = - sum_c p_c log p_c

   the first term is 0 only where both are sure of one cluster, the second keeps all clusters in use. The losses of
   several heads are added; the head (and epoch) with the lowest loss over all mined pairs, with lambda = 1, is kept.
3. Self-labelling: where max p(x) > threshold on the plain picture, its cluster is the label for cross-entropy on the
   strongly augmented one, clusters weighted by the inverse of how often they occur among the confident samples.

Van Gansbeke et al. 2020. Deviations: a first stage may train the heads alone on stored features (`head_epochs`), which
small budgets need; clustering goes on, up to `most_epochs`, until the share `guard` of the samples is confident and no
cluster is without, and without that there is no self-labelling, which would spread errors; the moves of RandAugment are
resampled once and "equalize" is left out; heads are chosen on the training pairs, and the embedded experiment lets
the learning rate of self-labelling fall along a cosine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.augment import RAND_AUGMENT, RAND_AUGMENT_GREY
from stillhouse.data.clusters import kmeans, nearest_centre
from stillhouse.data.digits import digits
from stillhouse.data.neighbours import chosen, members, nearest_neighbours
from stillhouse.data.sets import TensorSet, fetch
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.clustering import ari, clustering_accuracy, nmi
from stillhouse.evaluate.probes import extract
from stillhouse.measures.clustering import balance, consistency, mean_entropy, neighbour_loss, pseudo_labels
from stillhouse.parts.best import Best
from stillhouse.parts.ema import EMA
from stillhouse.parts.heads import ClusterNet, Projected, feature_width, projector
from stillhouse.protocols import Encoder, Images
from stillhouse.recipes import simclr
from stillhouse.recipes.views import random_view, strong_view
from stillhouse.run import Run, begin, frozen, set_lr
from stillhouse.run.check import first_batch
from stillhouse.run.schedules import cosine
from stillhouse.store import load_tree, save_tree
from stillhouse.zoo.encoders import digits_simclr

NUMBER = 160

CLAIMS = [
    Claim("self-labelling does not cost accuracy",
          lambda a: a["scan + self-label"]["accuracy"] - a["scan"]["accuracy"]),
    Claim("the clustering loss beats k-means on the features of the pretext and on pixels",
          lambda a: a["scan"]["accuracy"] - max(a["k-means, pretext"]["accuracy"], a["k-means, pixels"]["accuracy"])),
    Claim("without the entropy term it is less accurate",
          lambda a: a["scan"]["accuracy"] - a["no entropy"]["accuracy"]),
    Claim("and the mean prediction collapses: its entropy is below half of log C",
          lambda a: 0.5 - a["no entropy"]["entropy"]),
    Claim("as many more steps of the clustering loss give less than self-labelling",
          lambda a: a["scan + self-label"]["accuracy"] - a["scan, longer"]["accuracy"], report=True),
    Claim("mined neighbours beat two views of one picture as pairs",
          lambda a: a["scan"]["accuracy"] - a["views as pairs"]["accuracy"], report=True),
    Claim("k-means on the features of the pretext beats k-means on pixels",
          lambda a: a["k-means, pretext"]["accuracy"] - a["k-means, pixels"]["accuracy"], report=True),
]


@dataclass(frozen=True)
class Config:
    clusters: int = 10  # C; the number of classes, or more
    pretext_steps: int = 48_800  # SimCLR: 500 epochs of 50,000 pictures; 0: the student is trained already
    pretext_batch: int = 512  # pictures a step of the pretext
    pretext_lr: float = 0.4  # SGD with momentum 0.9, a cosine
    pretext_temperature: float = 0.1  # tau
    projection: int = 128  # width of the pretext's output, in which neighbours are mined
    neighbours: int = 20  # K; 50 for ImageNet; 0: the pairs are two views of one picture
    heads: int = 1  # linear heads, of which one is kept; 10 for ImageNet
    entropy: float = 5.0  # lambda
    head_epochs: int = 0  # of training the heads alone on stored features of `head_views` views
    head_views: int = 8  # views of every picture whose features are stored
    head_batch: int = 256  # pictures a step of the heads alone
    head_lr: float = 1e-2  # learning rate of the heads alone; Adam
    scan_epochs: int = 50  # of clustering with the whole network
    most_epochs: int = 100  # to which clustering is prolonged until self-labelling may begin
    batch: int = 128  # anchors a step of clustering
    lr: float = 1e-4  # learning rate of clustering; Adam, constant
    weight_decay: float = 1e-4  # L2, of both
    label_epochs: int = 200  # most epochs of self-labelling; 0: none
    label_batch: int = 1000  # pictures a step of self-labelling
    label_lr: float = 1e-4  # learning rate of self-labelling; Adam
    cosine: bool = False  # whether the learning rate of self-labelling falls to 0 along a cosine
    threshold: float = 0.99  # probability from which a sample is confident
    guard: float = 0.5  # part of the samples that must be confident before self-labelling; 0: no guard
    balanced: bool = True  # whether clusters weigh alike in self-labelling
    patience: int = 10  # epochs without a new most of confident samples after which self-labelling ends
    ema: float = 0.0  # decay of an average that replaces the weights after each step of self-labelling; 0: none
    operations: tuple[str, ...] = RAND_AUGMENT  # of RandAugment, from which those of a picture are drawn
    count: int = 4  # operations per picture
    view: float = 1.0  # strength of the views that are clustered
    strong: float = 1.0  # strength of the views that are self-labelled
    erase: float = 0.5  # side of the erased square as a part of the picture's, in proportion to the strength
    noise: float = 0.0  # standard deviation of noise as a part of the picture's range, in proportion to the strength
    flip: bool = True  # whether views are mirrored

    def __post_init__(self) -> None:
        counts = [self.pretext_steps, self.neighbours, self.head_epochs, self.label_epochs, self.count]
        sizes = [self.pretext_batch, self.projection, self.heads, self.head_views, self.head_batch, self.batch,
                 self.label_batch, self.patience]
        require(min(counts) >= 0 and min(sizes) >= 1, "steps, epochs, neighbours and count must be 0 or more, batches, "
                "widths, heads, views and patience 1 or more")
        require(0 <= self.scan_epochs <= self.most_epochs, "scan_epochs must lie between 0 and most_epochs "
                f"({self.most_epochs}), not {self.scan_epochs}")
        require(self.clusters >= 2, f"clusters must be 2 or more, not {self.clusters}")
        require(min(self.pretext_lr, self.head_lr, self.lr, self.label_lr, self.pretext_temperature) > 0,
                "learning rates and temperature must be above 0")
        require(min(self.entropy, self.weight_decay, self.view, self.strong, self.noise) >= 0 and 0 <= self.erase <= 1,
                "entropy, weight_decay, view, strong, noise must be 0 or more, erase between 0 and 1")
        require(0 <= self.threshold < 1 and 0 <= self.guard <= 1 and 0 <= self.ema < 1, "threshold and ema lie in "
                f"[0, 1), guard in [0, 1]; got {self.threshold}, {self.ema} and {self.guard}")


EMBEDDED = Config(pretext_steps=0, heads=10, head_epochs=60, scan_epochs=10, most_epochs=30, batch=256, lr=1e-3,
                  label_epochs=20, label_batch=300, label_lr=1e-3, cosine=True,
                  operations=RAND_AUGMENT_GREY, view=0.4, strong=0.7, erase=0.25, noise=0.05, flip=False)


@dataclass
class Clustering:
    """A network that names the cluster of a picture: the encoder, its heads and which of them to ask."""

    net: ClusterNet
    head: int = 0

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Float[Tensor, "n clusters"]:
        with frozen(self.net):
            return self.net(image)[:, self.head].softmax(-1)

    def predict(self, image: Tensor) -> Int[Tensor, " n"]:
        return self.probabilities(image).argmax(1)

    def save(self, folder: Path | str) -> Path:
        """Write the encoder's weights and the heads into `folder`."""
        folder, net = Path(folder), self.net
        save_tree(folder / "model.safetensors", dict(net.encoder.state_dict()))
        save_tree(folder / "heads.safetensors", {"heads": dict(net.heads.state_dict()), "scale": net.scale,
                                                 "count": net.count, "head": self.head})
        return folder

    @classmethod
    def load(cls, folder: Path | str, encoder: nn.Module) -> Clustering:
        """Read what `save` wrote; the weights go into `encoder`."""
        encoder.load_state_dict(load_tree(Path(folder) / "model.safetensors"))
        saved = load_tree(Path(folder) / "heads.safetensors")
        outputs, features = saved["heads"]["weight"].shape
        net = ClusterNet(encoder, features, outputs // saved["count"], saved["count"])
        net.heads.load_state_dict(saved["heads"])
        net.scale.copy_(saved["scale"])
        return cls(net, saved["head"])


def distill(
    student: Encoder,
    data: Images,
    config: Config = Config(),
    run: Run | None = None,
) -> Clustering:
    """Cluster the pictures; labels are never read.

    The student, pictures in and feature vectors out, is trained in place. As a `Projected` (an encoder with its
    projection head) its outputs are used to mine neighbours and its encoder to cluster; another student gets a
    projection head for the pretext, or is mined and clustered by the same features if `pretext_steps` is 0.
    """
    run = begin(run)
    run.check(Encoder, data, student=student)
    require(len(data) > config.neighbours, f"{len(data)} pictures have no {config.neighbours} neighbours each; lower "
            "neighbours")
    model = with_projection(student, data, config).to(run.device)
    if config.pretext_steps:
        pretext = simclr.Config(config.pretext_steps, config.pretext_batch, "sgd", config.pretext_lr, 0.0,
                                config.weight_decay, config.pretext_temperature)
        simclr.train(model, data, lambda x: random_view(x, run, 2 * config.view, config.erase, config.noise,
                                                        config.flip), pretext, run)
    mined = run.once("mine", lambda: nearest_neighbours(extract(model, data, device=run.device), config.neighbours))
    mined = mined.cpu()
    width = feature_width(model.encoder, first_batch(data)["image"].to(run.device))
    net = ClusterNet(model.encoder, width, config.clusters, config.heads).to(run.device)
    if config.head_epochs:
        train_heads(net, data, mined, config, run)

    net.train()
    state, best = run.state(head=0, confident=0.0, ready=False), Best()
    optimizer = torch.optim.Adam(net.parameters(), config.lr, weight_decay=config.weight_decay)
    for batch in run.loop("scan", data, batch=config.batch, epochs=config.most_epochs, net=net, optimizer=optimizer,
                          drop_last=len(data) >= config.batch, state=state, best=best):
        partner = members(data, mined, batch["index"], run.rand(len(batch["index"])))["image"].to(run.device)
        p, q = (net(view(x, config.view, config, run)).softmax(-1) for x in (batch["image"], partner))
        run.update(optimizer, clip=None, **terms(p, q, config, run))
        if run.last_of_epoch:
            judge(net, data, mined, config, run, state, best)
            if run.epoch + 1 >= config.scan_epochs and state.ready:
                run.finish()
    best.restore(net)
    if config.label_epochs and state.ready:
        self_label(net, state.head, data, config, run)
    elif config.label_epochs:
        run.say(f"no self-labelling: {state.confident:.0%} of the pictures are confident, or a cluster has none")
    return Clustering(net, state.head)


def with_projection(student: Any, data: Any, config: Config) -> Projected:
    if isinstance(student, Projected):
        return student
    width = feature_width(student, first_batch(data)["image"])
    return Projected(student, projector(width, width, config.projection) if config.pretext_steps else nn.Identity())


def view(images: Tensor, strength: float, config: Config, run: Run, alike: bool = False) -> Tensor:
    return strong_view(images, run, strength, config.operations, config.count, min(1.0, strength * config.erase),
                       strength * config.noise, config.flip, alike)


def terms(p: Float[Tensor, "n heads clusters"], q: Float[Tensor, "n heads clusters"], config: Config, run: Run
          ) -> dict[str, Tensor]:
    """The two terms of L, added over the heads, of the whole batch."""
    p, q = run.gather(p), run.gather(q)
    return {"consistency": consistency(p.flatten(0, 1), q.flatten(0, 1)) * p.shape[1],
            "entropy": -config.entropy * torch.stack([mean_entropy(head) for head in p.unbind(1)]).sum()}


def train_heads(net: ClusterNet, data: Any, mined: Tensor, config: Config, run: Run) -> None:
    """The heads alone, on features of several views of every picture that are stored once."""

    def stored() -> Tensor:
        with frozen(net), torch.no_grad():
            return torch.stack([torch.cat([
                net.encoder(view(fetch(data, range(i, min(i + 512, len(data))))["image"].to(run.device), config.view,
                                 config, run, alike=True)).flatten(1)
                for i in range(0, len(data), 512)]) for _ in range(config.head_views)], 1)

    features = run.once("features", stored)
    net.scale.copy_(1 / features.std().clamp_min(1e-8))
    optimizer = torch.optim.Adam(net.heads.parameters(), config.head_lr)
    for batch in run.loop("heads", TensorSet(features=features), batch=config.head_batch, epochs=config.head_epochs,
                          drop_last=len(data) >= config.head_batch, heads=net.heads, optimizer=optimizer):
        n = len(batch["index"])
        partner = chosen(mined, batch["index"].cpu(), run.rand(n)).to(run.device)
        a, b = run.randint(0, config.head_views, n, 2).unbind(1)
        p = net.classify(batch["features"][torch.arange(n), a]).softmax(-1)
        q = net.classify(features[partner, b]).softmax(-1)
        run.update(optimizer, clip=None, **terms(p, q, config, run))


def judge(net: ClusterNet, data: Any, mined: Tensor, config: Config, run: Run, state: Any, best: Best) -> None:
    """After an epoch: the loss of every head over all mined pairs. The best so far is kept, with its weights, and
    whether self-labelling could begin with it."""
    with run.aside("judge", net):
        p = extract(net, data, device=run.device).unflatten(1, (config.heads, config.clusters)).softmax(-1)
    losses = torch.stack([neighbour_loss(head, mined) for head in p.unbind(1)])
    loss, head = losses.min(0)
    if best.offer(-loss.item(), net):
        label, sure = pseudo_labels(p[:, int(head)], config.threshold)
        used = len(label[sure].unique())
        state.head, state.confident = int(head), sure.double().mean().item()
        state.ready = not config.guard or (state.confident > config.guard and used == config.clusters)
    run.log(pairs=loss.item(), confident=state.confident)


def self_label(net: ClusterNet, head: int, data: Any, config: Config, run: Run) -> None:
    """Cross-entropy of strong views with the confident clusters of the plain pictures, until there are no more."""
    net.train()
    state: Any = run.state(most=0, waited=0)
    average = EMA(net) if config.ema else None
    optimizer = torch.optim.Adam(net.parameters(), config.label_lr, weight_decay=config.weight_decay)
    for batch in run.loop("self-label", data, batch=config.label_batch, epochs=config.label_epochs, net=net,
                          drop_last=len(data) >= config.label_batch, optimizer=optimizer, state=state, average=average):
        set_lr(optimizer, config.label_lr * (cosine(run.progress) if config.cosine else 1.0))
        x = batch["image"]
        with torch.no_grad():
            label, sure = pseudo_labels(net(x)[:, head].softmax(-1), config.threshold)
        every, confident = run.gather(label), run.gather(sure.long()).bool()
        if confident.any():
            weights = balance(every, confident, config.clusters) if config.balanced else x.new_ones(config.clusters)
            weight = weights[label] * sure
            ce = F.cross_entropy(net(view(x, config.strong, config, run))[:, head], label, reduction="none")
            run.update(optimizer, ce=run.mean((weight * ce).sum(), weight.sum()))
            if average is not None:
                average.update(net, config.ema)
                net.load_state_dict(average.module.state_dict())
        if run.last_of_epoch:
            with run.aside("confident", net):
                p = extract(net, data, device=run.device).unflatten(1, (config.heads, config.clusters))[:, head]
            count = int(pseudo_labels(p.softmax(-1), config.threshold)[1].sum())
            run.log(confident=count / len(data))
            state.most, state.waited = (count, 0) if count > state.most else (state.most, state.waited + 1)
            if state.waited >= config.patience:
                run.finish()


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten())
    image = torch.rand(14, 1, 6, 6)
    return {"student": student, "data": TensorSet(image=image),
            "config": Config(clusters=3, pretext_steps=2, pretext_batch=6, pretext_lr=0.05, projection=4, neighbours=2,
                             heads=2, head_epochs=1, head_views=2, head_batch=7, head_lr=1e-3, scan_epochs=1,
                             most_epochs=2, batch=7, lr=1e-3, label_epochs=2, label_batch=7, threshold=0.34, guard=0.0,
                             ema=0.5, count=2)}


# -------------------------------------------------------------------- the embedded experiment


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """Accuracy on the 597 test pictures; all arms with the one pretext of the seed, which has seen no test picture.

    "no entropy" has one head: the choice among several would bring the entropy term back by another door.
    """
    train: Any = digits(16, "train")
    test: Any = digits(16, "test")

    def pretext() -> Projected:
        run.begin()
        return digits_simclr(16, seed=run.seed).to(run.device)

    def scan(label_epochs: int = 0, **changes: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            config = dataclasses.replace(EMBEDDED, label_epochs=label_epochs, **changes)
            found = distill(pretext(), train.without("label"), config, run)
            p, guess = (found.probabilities(data.image.to(run.device)).cpu() for data in (train, test))
            many = config.clusters > 10
            if label_epochs:
                run.picture("one row a cluster", torch.cat([
                    train.image[p[:, c].argsort(descending=True)[:10]] for c in range(config.clusters)]))
            return {**scores(guess.argmax(1), test.label, many),
                    "entropy": (mean_entropy(p) / math.log(config.clusters)).item(),
                    "confident": (p.amax(1) > config.threshold).double().mean().item()}
        return measure

    def clusters(features: Callable[[Any], Tensor]) -> dict[str, float]:
        _, centres = kmeans(features(train), EMBEDDED.clusters, 5, 300, run.seed)
        return scores(nearest_centre(features(test), centres), test.label)

    def pretext_features() -> Callable[[Any], Tensor]:
        model = pretext()
        return lambda data: F.normalize(extract(model, data, device=run.device), dim=1)

    S, L = EMBEDDED.scan_epochs, EMBEDDED.label_epochs
    return run.arms(
        {"k-means, pixels": lambda: clusters(lambda data: data.image.flatten(1)),
         "k-means, pretext": lambda: clusters(pretext_features()),
         "scan": scan(),
         "scan + self-label": scan(L),
         "no entropy": scan(entropy=0.0, guard=0.0, heads=1),
         "views as pairs": scan(neighbours=0)},
        extended={"scan, longer": scan(scan_epochs=S + L, most_epochs=S + L),
                  "fresh head": scan(head_epochs=0),
                  "one head": scan(heads=1),
                  "20 clusters": scan(clusters=20),
                  "no guard": scan(L, head_epochs=0, guard=0.0, view=1.0),
                  "no balancing": scan(L, balanced=False)})


def scores(clusters: Tensor, labels: Tensor, many_to_one: bool = False) -> dict[str, float]:
    return {"accuracy": clustering_accuracy(clusters, labels, many_to_one), "nmi": nmi(clusters, labels),
            "ari": ari(clusters, labels)}
