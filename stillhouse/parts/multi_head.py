"""One network, several tasks: linear heads on the penultimate feature of a classifier, beside its own."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import require
from stillhouse.parts.feature_taps import feature_tap, tapped_width


class MultiHead(nn.Module):
    """A classifier with further linear heads, of `classes[i]` outputs each, on the feature that goes into its last
    linear layer (or on the output of the module at path `where`).

    Calling it runs the classifier once and gives its own logits and those of every head. The classifier is trained in
    place and needs nothing of this afterwards; `heads` are the modules to throw away. Raises RoleError for a classifier
    without a linear layer where no path is given.
    """

    def __init__(self, classifier: nn.Module, classes: Sequence[int], image: Tensor, where: str = "penultimate"):
        super().__init__()
        require(all(n >= 1 for n in classes), f"every head needs one class or more, got {list(classes)}")
        width = tapped_width(classifier, image, where)
        self.classifier, self.where = classifier, where
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes).to(image.device)

    def forward(self, image: Float[Tensor, "batch channels height width"]
                ) -> tuple[Float[Tensor, "batch classes"], list[Tensor]]:
        with feature_tap(self.classifier, self.where) as tap:
            logits = self.classifier(image)
            feature = tap()
        return logits, [head(feature) for head in self.heads]
