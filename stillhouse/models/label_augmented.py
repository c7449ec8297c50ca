"""A classifier beside a joint classifier of class and transformation (Lee et al. 2020), and what both can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.transformations import copies, transformations
from stillhouse.errors import DamagedFileError, RoleError, StoreError, require
from stillhouse.measures.joint_labels import aggregated_logits, conditional_logits
from stillhouse.parts.feature_taps import feature_tap
from stillhouse.store import load_tree, save_tree

FILE = "joint.safetensors"
Inference = Literal["distilled", "single", "aggregated"]
INFERENCES: tuple[Inference, ...] = ("distilled", "single", "aggregated")


class LabelAugmented(nn.Module):
    """A classifier u(f(x)) with a joint head sigma: R^d -> R^(N M) on the same features f(x), those that go into its
    last linear layer.

    Calling it gives what `inference` says: "distilled", the classifier's own logits in one pass; "single", those of
    sigma on the picture as it is, given that it is not transformed, in one pass; "aggregated", the mean of sigma's
    logits over all M copies of a picture. `save` writes the classifier alone as model.safetensors, so that it can be
    used without the rest.
    """

    def __init__(self, classifier: nn.Module, joint: nn.Linear, kind: str, inference: Inference = "distilled"):
        super().__init__()
        self.kind, self.transformations = kind, transformations(kind)
        require(inference in INFERENCES, f"inference is one of {', '.join(INFERENCES)}, not {inference!r}")
        require(joint.out_features % len(self.transformations) == 0, f"a joint head of {joint.out_features} outputs "
                f"does not fit {len(self.transformations)} transformations", RoleError)
        self.classifier, self.joint = classifier, joint
        self.inference: Inference = inference

    @property
    def count(self) -> int:
        """M, the number of transformations."""
        return len(self.transformations)

    def both(self, image: Float[Tensor, "n channels height width"]
             ) -> tuple[Float[Tensor, "n classes"], Float[Tensor, "n joint"]]:
        """Logits of the classifier and of the joint head, in one pass."""
        with feature_tap(self.classifier) as features:
            logits = self.classifier(image)
            return logits, self.joint(features())

    def single(self, image: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        """The joint head's logits of the classes, given that the picture is as it is."""
        return conditional_logits(self.both(image)[1], self.count)

    def aggregated(self, image: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        """Logits of P_agg, from M copies of every picture."""
        return aggregated_logits(self.both(copies(image, self.transformations))[1], self.count)

    def forward(self, image: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n classes"]:
        if self.inference == "distilled":
            return self.classifier(image)
        return self.single(image) if self.inference == "single" else self.aggregated(image)

    def save(self, folder: Path | str) -> Path:
        """Write the classifier's weights and the joint head into `folder`; `LabelAugmented.load(folder, network)` reads
        them."""
        folder = Path(folder)
        save_tree(folder / FILE, {"weight": self.joint.weight.detach(), "bias": self.joint.bias.detach(),
                                  "kind": self.kind, "inference": self.inference})
        save_tree(folder / "model.safetensors", dict(self.classifier.state_dict()))
        return folder

    @classmethod
    def load(cls, folder: Path | str, network: nn.Module) -> LabelAugmented:
        """Read what `save` wrote, in eval mode; the weights go into `network`.

        Raises StoreError where the folder holds none or the network has other weights, DamagedFileError for a file that
        is not as it was written.
        """
        folder = Path(folder)
        weights, saved = load_tree(folder / "model.safetensors"), load_tree(folder / FILE)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise StoreError(f"the network given does not have the weights saved in {folder}: {error}") from error
        try:
            joint = nn.Linear(*saved["weight"].T.shape)
            joint.load_state_dict({"weight": saved["weight"], "bias": saved["bias"]})
            return cls(network, joint, saved["kind"], saved["inference"]).eval()
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DamagedFileError(f"{folder / FILE} does not hold a joint head ({error})") from error


def label_augmented(classifier: nn.Module, image: Float[Tensor, "n channels height width"], kind: str,
                    inference: Inference = "distilled") -> LabelAugmented:
    """A classifier with a fresh joint head for pictures like `image`. The classifier is left as it was.

    Raises RoleError where what it returns is not its last linear layer's output, DataError where the transformations do
    not fit the pictures.
    """
    modes = [(m, m.training) for m in classifier.modules()]
    copies(image[:1], transformations(kind))
    try:
        with torch.no_grad(), feature_tap(classifier) as features:
            logits = classifier.eval()(image[:1])
            last = [m for m in classifier.modules() if isinstance(m, nn.Linear)][-1]
            x = features()
            again = last(x)
            require(again.shape == logits.shape and torch.allclose(again, logits, rtol=1e-3, atol=1e-4),
                    f"{type(classifier).__name__} does not return the output of its last linear layer, so it is not "
                    "known what its classes are read from", RoleError)
    finally:
        for module, training in modes:
            module.training = training
    width, classes = x.shape[1], logits.shape[1]
    joint = nn.Linear(width, classes * len(transformations(kind))).to(last.weight)
    return LabelAugmented(classifier, joint, kind, inference)
