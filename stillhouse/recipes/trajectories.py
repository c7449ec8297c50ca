"""Expert trajectories: the weights of networks after every epoch of ordinary training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.augment import dsa_of
from stillhouse.errors import DamagedFileError, DataError, require
from stillhouse.parts.unroll import FlatNetwork
from stillhouse.protocols import Classifier, LabelledImages, Network
from stillhouse.run import Run, begin
from stillhouse.store import load_tree, save_tree


@dataclass
class Trajectories:
    """`experts[i]` is float32 [epochs + 1, parameters]: the flat weights at the start and after every epoch.

    A saved buffer has one file per expert and is memory-mapped on loading, so it may be larger than memory.
    """

    experts: list[Float[Tensor, "snapshots parameters"]]

    def __post_init__(self) -> None:
        require(bool(self.experts), "a buffer of trajectories needs at least one expert", DataError)
        shapes = {tuple(e.shape) for e in self.experts}
        require(len(shapes) == 1 and self.experts[0].dim() == 2,
                f"trajectories must all be [snapshots, parameters] of one shape, got {sorted(shapes)}", DataError)

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"weights": self.experts[i]}

    @property
    def epochs(self) -> int:
        return self.experts[0].shape[0] - 1

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.experts[0].shape[1]

    def save(self, folder: Path | str) -> Path:
        """One file per expert. Raises StoreError where the folder cannot be written."""
        for i, expert in enumerate(self.experts):
            save_tree(Path(folder) / f"expert-{i:04d}.safetensors", expert)
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str) -> Trajectories:
        """Read a buffer written by `save`. Raises DataError if there is none, DamagedFileError if one is damaged."""
        files = sorted(Path(folder).glob("expert-*.safetensors"))
        require(bool(files), f"there are no expert trajectories in {folder}; record them first", DataError)
        experts = [load_tree(path) for path in files]
        for path, expert in zip(files, experts, strict=True):
            if not isinstance(expert, Tensor):
                raise DamagedFileError(f"{path} does not hold a trajectory")
        return cls(experts)


def record_trajectories(
    network: Network,
    labelled: LabelledImages,
    *,
    count: int = 100,
    epochs: int = 50,
    lr: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch: int = 256,
    strategy: str = "",
    fill: float = 0.0,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
    run: Run | None = None,
) -> Trajectories:
    """Train `count` fresh networks on `labelled` and keep their weights at the start and after every epoch.

    The defaults are those of MTT (Cazenavette et al. 2022): plain SGD without momentum and decay, constant learning
    rate. `strategy` and `fill` name the DSA groups as in `stillhouse.data.augment.dsa_of`; an `optimizer` factory takes
    the place of SGD. Each expert is a stage of the run, so an interrupted recording goes on where it was.
    """
    run = begin(run)
    require(count >= 1 and epochs >= 1, f"give at least one expert and one epoch, not {count} and {epochs}")
    run.check(Classifier, labelled, labels=True, network=network())
    make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay))
    experts = []
    for i in run.track(range(count), "experts"):
        with run.scope(f"expert {i}"):
            expert = network().to(run.device).train()
            flat = FlatNetwork(expert)
            path = run.state(weights=flat.flatten().repeat(epochs + 1, 1))
            sgd = make(list(expert.parameters()))
            held: dict[str, Any] = {"expert": expert, "optimizer": sgd, "path": path}
            for real in run.loop("train", labelled, batch=batch, epochs=epochs, **held):
                image = real["image"]
                augment = dsa_of(strategy, (image.shape[-2], image.shape[-1]), run.shared_rand(),
                                 run.rand(len(image), 3), fill)
                run.update(sgd, ce=F.cross_entropy(expert(augment(image)), real["label"]))
                if run.last_of_epoch:
                    path.weights[run.epoch + 1] = flat.flatten()
            experts.append(path.weights.cpu())
    return Trajectories(experts)
