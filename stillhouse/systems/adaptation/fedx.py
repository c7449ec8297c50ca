"""FedX: clients learn one encoder without labels, distilling between two views and from the downloaded global model.

With h the encoder, z = g(h(x)) and p = q(z), two views x, x+ of a batch, an independent batch x_r of the same client,
and G the global model of the round (frozen, eval mode), a client minimises

    L = base(z, z+) + NT-Xent(p, z^G+) + JS(z, z+ | z_r) + JS(p, p+ | z^G_r)

where JS is `stillhouse.measures.relations.relational_js`. The prediction head q speaks only to the global model. The
base is the method that FedX is added to: SimCLR (NT-Xent), BYOL or MoCo. The server averages all weights and buffers,
weighted by the clients' numbers of samples.

Han et al. 2022. Deviations: the weights of the average are renormalised when only some clients join (the release does
not). BYOL's own predictor is apart from q. The momentum encoder and queue of BYOL and MoCo start anew each round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.data.digits import digits
from stillhouse.data.partition import dirichlet_partition
from stillhouse.data.sets import TensorSet
from stillhouse.errors import require
from stillhouse.evaluate.claims import Claim
from stillhouse.evaluate.probes import extract, few_per_class, linear_probe
from stillhouse.measures.contrastive import info_nce, nt_xent
from stillhouse.measures.relations import relational_js
from stillhouse.models.convnets import ConvEncoder
from stillhouse.parts.ema import EMA
from stillhouse.parts.heads import Projected, feature_width, predictor, projector
from stillhouse.parts.queues import Queue
from stillhouse.protocols import Encoder, Images, Network
from stillhouse.recipes import simclr
from stillhouse.recipes.federated import fedavg
from stillhouse.recipes.views import random_view
from stillhouse.run import Run, begin
from stillhouse.run.check import first_batch

NUMBER = 10

CLAIMS = [
    Claim("the clients' encoders drift less from the global one than in FedSimCLR",
          lambda a: a["fedsimclr"]["drift"] - a["fedx"]["drift"]),
    Claim("and less than without the two global terms",
          lambda a: a["no global"]["drift"] - a["fedx"]["drift"]),
    Claim("averaging beats training alone (linear probe)",
          lambda a: a["fedsimclr"]["probe"] - a["alone"]["probe"]),
    Claim("FedX beats FedSimCLR (linear probe, all labels)",
          lambda a: a["fedx"]["probe"] - a["fedsimclr"]["probe"], report=True),
    Claim("FedX beats FedSimCLR (linear probe, 3 labels a class)",
          lambda a: a["fedx"]["probe_3"] - a["fedsimclr"]["probe_3"], report=True),
]


@dataclass(frozen=True)
class Config:
    rounds: int = 100  # R, rounds of download, local training and averaging
    epochs: int = 10  # E, local epochs a round
    batch: int = 64  # B, pictures a step; the reference batch has as many
    share: float = 1.0  # part of the clients that joins a round
    base: Literal["simclr", "byol", "moco"] = "simclr"  # the method that FedX is added to
    global_contrast: float = 1.0  # weight of NT-Xent(p, z^G+)
    local_relation: float = 1.0  # weight of JS(z, z+ | z_r)
    global_relation: float = 1.0  # weight of JS(p, p+ | z^G_r)
    temperature: float = 0.1  # tau of all terms
    target_temperature: float = 0.1  # tau_t of the relational target
    hidden: int = 256  # width of the hidden layers of both heads
    out: int = 256  # width of z and p
    lr: float = 0.01  # learning rate of SGD with momentum 0.9
    weight_decay: float = 1e-5  # lambda
    momentum: float = 0.99  # decay of BYOL's and MoCo's momentum encoder
    queue: int = 4096  # MoCo's keys
    view: float = 1.0  # strength of the shifts, turns and light changes of a view
    erase: float = 0.25  # side of the square erased from a view, as a part of the picture's
    noise: float = 0.05  # standard deviation of a view's noise, as a part of the picture's range
    flip: bool = False  # whether views are mirrored

    def __post_init__(self) -> None:
        require(min(self.rounds, self.epochs) >= 0 and self.batch >= 1, "rounds and epochs must be 0 or more, batch at "
                f"least 1; got {self.rounds}, {self.epochs}, {self.batch}")
        require(self.base in ("simclr", "byol", "moco"), f"base is simclr, byol or moco, not {self.base!r}")
        require(min(self.global_contrast, self.local_relation, self.global_relation) >= 0, "weights must be 0 or more")
        require(min(self.temperature, self.target_temperature, self.lr) > 0, "temperatures and lr must be above 0")
        require(0 < self.share <= 1, f"share must lie in (0, 1], not {self.share}")
        require(min(self.hidden, self.out, self.queue) >= 1, "hidden, out and queue must be at least 1")
        require(0 <= self.momentum <= 1, f"momentum must lie in [0, 1], not {self.momentum}")


EMBEDDED = Config(rounds=8, epochs=2, hidden=64, out=64, lr=0.03, queue=256)
BASE_ALONE = dataclasses.replace(EMBEDDED, global_contrast=0.0, local_relation=0.0, global_relation=0.0)


def distill(
    network: Network,
    clients: list[Images],
    validation: Images | None = None,
    config: Config = Config(),
    run: Run | None = None,
) -> Projected:
    """Learn one encoder from the clients' pictures; labels are never read.

    `network` makes the encoder (pictures in, feature vectors out); the heads are added. Returns the global network,
    whose `encode` gives the features to use. With `validation`, its attribute `drift` [rounds, clients] holds the mean
    over those pictures of 1 - cos(h_local, h_global) after each client's training (NaN where a client did not join).
    """
    run = begin(run)
    require(len(clients) >= 1, "FedX needs at least one client")
    encoder = network()
    for client in clients:
        run.check(Encoder, client, network=encoder)
    if validation is not None:
        first_batch(validation, ("image",))
    width = feature_width(encoder, first_batch(clients[0], ("image",))["image"])
    model = Projected(encoder, projector(width, config.hidden, config.out), predictor(config.out, config.hidden))
    if config.base == "byol":
        model.add_module("base_predictor", predictor(config.out, config.hidden))
    model = model.to(run.device).train()
    record = run.state(drift=torch.full((config.rounds, len(clients)), torch.nan))

    def client_step(local: nn.Module, downloaded: nn.Module, i: int, data: Images) -> None:
        assert isinstance(local, Projected) and isinstance(downloaded, Projected)
        optimizer = torch.optim.SGD(local.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
        base = Base(local, config, run)
        for batch in run.loop(f"client {i}", data, batch=config.batch, epochs=config.epochs,
                              drop_last=len(data) >= config.batch):
            others = run.draw(data, config.batch)["image"]
            x, x_plus, x_r = (view(images, config, run) for images in (batch["image"], batch["image"], others))
            run.update(optimizer, clip=None, **losses(local, downloaded, base, x, x_plus, x_r, config, run))
            base.follow(local)
        if validation is not None:
            record.drift[run.k, i] = drift(local, downloaded, validation, run)

    fedavg(model, clients, client_step, config.rounds, run, config.share, record=record)
    model.__dict__["drift"] = record.drift
    return model


def losses(local: Projected, downloaded: Projected, base: Base, x: Tensor, x_plus: Tensor, x_r: Tensor,
           config: Config, run: Run) -> dict[str, Tensor]:
    """The named terms of L for one step: one forward pass of each network over all three batches together."""
    together, sizes = torch.cat([x, x_plus, x_r]), [len(x), len(x_plus), len(x_r)]
    z_all = local(together)
    z, z_plus, z_r = z_all.split(sizes)
    tau, tau_t = config.temperature, config.target_temperature
    terms = {"base": base.loss(z, z_plus, x, x_plus)}
    if config.local_relation:
        terms["local_relation"] = config.local_relation * relational_js(z, z_plus, run.gather(z_r), tau, tau_t)
    if config.global_contrast or config.global_relation:
        p, p_plus, _ = local.predict(z_all).split(sizes)
        with torch.no_grad():
            _, g_plus, g_r = downloaded(together).split(sizes)
        if config.global_contrast:
            terms["global_contrast"] = config.global_contrast * nt_xent(run.gather(p), run.gather(g_plus), tau)
        if config.global_relation:
            terms["global_relation"] = config.global_relation * relational_js(p, p_plus, run.gather(g_r), tau, tau_t)
    return terms


class Base:
    """The local loss of the method that FedX is added to, and what that method keeps within a round."""

    def __init__(self, local: Projected, config: Config, run: Run):
        self.local, self.config, self.run = local, config, run
        self.target = None if config.base == "simclr" else EMA(local)
        self.queue = Queue(config.queue, config.out).to(run.device) if config.base == "moco" else None

    def loss(self, z: Tensor, z_plus: Tensor, x: Tensor, x_plus: Tensor) -> Tensor:
        """SimCLR: NT-Xent. BYOL: 2 - 2 cos of the prediction and the target's projection, both directions added.
        MoCo: InfoNCE of z against the target's key and the queue, to which the keys are then added."""
        gather, tau = self.run.gather, self.config.temperature
        if self.target is None:
            return nt_xent(gather(z), gather(z_plus), tau)
        with torch.no_grad():
            k, k_plus = (F.normalize(t, dim=1) for t in self.target(torch.cat([x, x_plus])).chunk(2))
        if self.queue is None:
            predict = self.local.get_submodule("base_predictor")
            cosines = F.cosine_similarity(predict(z), k_plus) + F.cosine_similarity(predict(z_plus), k)
            return (4 - 2 * cosines).mean()
        result = info_nce(z, k_plus, queue=self.queue(), temperature=tau)
        self.queue.push(gather(k_plus))
        return result

    def follow(self, local: Projected) -> None:
        """After a step: the momentum encoder follows."""
        if self.target is not None:
            self.target.update(local, self.config.momentum)


def view(images: Tensor, config: Config, run: Run) -> Tensor:
    return random_view(images, run, config.view, erase=config.erase, noise=config.noise, flip=config.flip)


def drift(local: Projected, downloaded: Projected, validation: Any, run: Run) -> float:
    """Mean over the pictures of 1 - cos(h_local(x), h_global(x)), both in eval mode."""
    with run.aside("drift", local, downloaded):
        ours, theirs = (extract(m.encoder, validation, device=run.device) for m in (local, downloaded))
    return (1 - F.cosine_similarity(ours, theirs)).mean().item()


def tiny() -> dict[str, Any]:
    torch.manual_seed(0)
    image = torch.rand(30, 1, 8, 8)

    def encoder() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())

    return {"network": encoder, "clients": [TensorSet(image=image[:14]), TensorSet(image=image[14:22])],
            "validation": TensorSet(image=image[22:]),
            "config": Config(rounds=3, epochs=2, batch=4, base="moco", queue=6, hidden=8, out=8, lr=0.1)}


# -------------------------------------------------------------------- the embedded experiment


def ground(seed: int, clients: int = 5, beta: float = 0.3) -> tuple[list[Any], Any, Any]:
    """Digits of 8 pixels: the training pictures, without labels, dealt to the clients by Dirichlet(beta) over their
    labels; all training pictures and the test pictures for the probe."""
    train, test = digits(8, "train"), digits(8, "test")
    parts = dirichlet_partition(train.label, clients, beta, seed, smallest=EMBEDDED.batch)
    return [train.select(part).without("label") for part in parts], train, test


def experiment(run: Run) -> dict[str, dict[str, float]]:
    """All arms with the same clients, initial weights, rounds, batches and learning rate."""
    clients, train, test = ground(run.seed)
    few = few_per_class(train.label, 3, seed=run.seed)
    per_epoch = sum(len(c) // EMBEDDED.batch for c in clients)

    def encoder() -> nn.Module:
        return ConvEncoder(feature_dim=64, width=32)

    def probed(model: Projected) -> dict[str, float]:
        h, h_test = (extract(model.encoder, data, device=run.device) for data in (train, test))
        return {"probe": linear_probe(h, train.label, h_test, test.label),
                "probe_3": linear_probe(h[few], train.label[few], h_test, test.label)}

    def federated(config: Config = EMBEDDED, **changes: Any) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            model = distill(encoder, clients, test, dataclasses.replace(config, **changes), run)
            return {**probed(model), "drift": model.__dict__["drift"].nanmean().item()}
        return measure

    def alone() -> dict[str, float]:
        results = []
        for i, client in enumerate(clients):
            with run.scope(f"only client {i}"):
                results.append(probed(distill(encoder, [client], None, BASE_ALONE, run)))
        return {name: sum(r[name] for r in results) / len(results) for name in results[0]}

    def centralised() -> dict[str, float]:
        run.begin()
        h = encoder()
        model = Projected(h, projector(64, EMBEDDED.hidden, EMBEDDED.out)).to(run.device)
        settings = simclr.Config(
            steps=EMBEDDED.rounds * EMBEDDED.epochs * per_epoch, batch=EMBEDDED.batch, lr=EMBEDDED.lr,
            weight_decay=EMBEDDED.weight_decay, temperature=EMBEDDED.temperature, warmup=0.0, cosine=False)
        simclr.train(model, train, lambda x: view(x, EMBEDDED, run), settings, run)
        return probed(model)

    return run.arms(
        {"fedsimclr": federated(BASE_ALONE),
         "fedx": federated(),
         "no global": federated(global_contrast=0.0, global_relation=0.0),
         "alone": alone},
        extended={"no relational": federated(local_relation=0.0, global_relation=0.0),
                  "centralised": centralised,
                  "fedbyol": federated(BASE_ALONE, base="byol"),
                  "fedbyol + fedx": federated(base="byol"),
                  "fedmoco": federated(BASE_ALONE, base="moco"),
                  "fedmoco + fedx": federated(base="moco"),
                  "half of the clients": federated(share=0.5)})
