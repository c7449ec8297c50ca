"""Models of timm and torchvision by name, as classifiers and encoders of pictures."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, StillError, UnknownNameError, require
from stillhouse.hub.refusals import PICKLE
from stillhouse.hub.transformers import prepare

OPTIONS = ("pretrained", "num_classes", "weights")
SEVERAL_OUTPUTS = ("googlenet", "inception_v3")
"""Models of torchvision that give more than logits while they are trained."""


class VisionModel(nn.Module):
    """A model of timm or torchvision on pictures in [-1, 1]: class logits, or features where `classes` is 0.

    Pictures are brought to the `mean`, `std` (for values in [0, 1]) and `size` that the library states for the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, library: str, name: str, classes: int, mean: list[float], std: list[float],
                 size: tuple[int, int]):
        super().__init__()
        self.model, self.library, self.name, self.classes, self.size = model, library, name, classes, size
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def spec(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {"library": self.library, "name": self.name, "classes": self.classes,
                "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist(), "size": list(self.size)}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> VisionModel:
        """A model as `spec` describes it, with fresh weights."""
        library, name, classes = str(spec["library"]), str(spec["name"]), int(spec["classes"])
        require(library in ("timm", "torchvision"), f"'{library}' is no library of pictures that is known here",
                DamagedFileError)
        _check_name(library, name)
        model = _build(library, name, classes or None, pretrained=False)
        return cls(model if classes else _without_head(library, model), library, name, classes, spec["mean"],
                   spec["std"], (spec["size"][0], spec["size"][1]))

    def prepared(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch c h w"]:
        """The pictures as the model takes them."""
        return prepare(image, self.mean.shape[1], self.size, self.mean, self.std)

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        return self.model(self.prepared(image))

    def encode(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """One feature vector per picture: what the last layer of classes is given."""
        if not self.classes:
            return self(image)
        x, model = self.prepared(image), self.model
        if self.library == "timm":
            timm_model: Any = model
            return timm_model.forward_head(timm_model.forward_features(x), pre_logits=True)
        taken: list[Tensor] = []
        handle = _last(model)[2].register_forward_pre_hook(lambda module, args: taken.append(args[0]))
        try:
            model(x)
        finally:
            handle.remove()
        return taken[0]


def load(library: str, name: str, kind: Any = None, **options: Any) -> VisionModel:
    """The model `name` of timm or torchvision as a Classifier, or for the role kind Encoder without its last layer.

    Options: `pretrained` (default True) the library's own weights, `num_classes` a new last layer, `weights` a file
    .safetensors instead of them. Raises MissingExtraError without the library; UnknownNameError for a name or option
    that there is not, or weights that cannot be fetched; RoleError for another role, a pickle, or weights that do not
    fit; ConfigError for options that exclude each other.
    """
    wanted = getattr(kind, "__name__", "Classifier")
    require(wanted in ("Classifier", "Encoder"), f"{library}:… gives classifiers and encoders of pictures; this role "
            f"needs a {wanted}", RoleError)
    pretrained, classes, file = _checked(library, options)
    _check_name(library, name)
    model = _build(library, name, classes, pretrained)
    if file is not None:
        from stillhouse.hub.models import load_weights

        load_weights(model, file)
    return _wrapped(library, name, model, features=wanted == "Encoder").eval()


def fresh(library: str, name: str, **options: Any) -> Callable[[], VisionModel]:
    """A factory of models with freshly drawn weights; its options are those of `load` but for `weights`."""
    options.setdefault("pretrained", False)
    pretrained, classes, file = _checked(library, options)
    require(not pretrained and file is None, f"{library}:{name} is to give freshly drawn weights here; leave out "
            "pretrained and weights")
    _check_name(library, name)
    return lambda: _wrapped(library, name, _build(library, name, classes, pretrained=False), features=False)


def _checked(library: str, options: dict[str, Any]) -> tuple[bool, int | None, Path | None]:
    unknown = set(options) - set(OPTIONS)
    require(not unknown, f"{library}:… has no option '{min(unknown, default='')}'; it has {', '.join(OPTIONS)}",
            UnknownNameError)
    classes, file = options.get("num_classes"), options.get("weights")
    pretrained = options.get("pretrained", file is None)
    require(isinstance(pretrained, bool), f"pretrained is true or false, not '{pretrained}'")
    require(classes is None or (type(classes) is int and classes > 0), "num_classes is the number of classes, not "
            f"'{classes}'")
    if file is None:
        return pretrained, classes, None
    path = Path(str(file)).expanduser()
    require(not pretrained, "weights=FILE takes the place of the library's own; leave out pretrained=true")
    require(path.suffix == ".safetensors", f"{path}: weights are read from .safetensors only. Of others: {PICKLE}",
            RoleError)
    require(path.is_file(), f"there is no file {path} (seen from {Path.cwd()})", UnknownNameError)
    return False, classes, path


def _library(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(f"{library}:… needs {library} ({error}); install it with: pip install "
                                "'stillhouse[vision]'") from error


def _check_name(library: str, name: str) -> None:
    """Refuse a name that the library does not have, or that would have it look elsewhere than in itself."""
    found = _library(library)
    if library == "timm":
        known = found.list_models()
    else:
        known = [n for n in found.models.list_models(module=found.models) if n not in SEVERAL_OUTPUTS]
    require(name not in SEVERAL_OUTPUTS or library == "timm", f"torchvision's {name} gives more than logits while it "
            "is trained; timm:inception_v3 does not", RoleError)
    base = name.partition(".")[0] if library == "timm" else name
    if base not in known or ":" in name or "/" in name:
        near = difflib.get_close_matches(base, known, n=3)
        raise UnknownNameError(f"{library} has no classifier '{name}'" + (f"; near to it: {', '.join(near)}" if near
                                                                         else ""))


def _build(library: str, name: str, classes: int | None, pretrained: bool) -> nn.Module:
    """The library's model with all its layers."""
    found = _library(library)
    try:
        if library == "timm":
            return found.create_model(name, pretrained=pretrained, num_classes=classes)
        stored = found.models.get_model_weights(name).DEFAULT
        whole = len(stored.meta["categories"])
        if not pretrained:
            return found.models.get_model(name, weights=None, num_classes=classes or whole)
        model = found.models.get_model(name, weights=None, num_classes=whole)
        model.load_state_dict(stored.get_state_dict(progress=False, check_hash=True, weights_only=True))
        if classes not in (None, whole):
            parent, place, last = _last(model)
            setattr(parent, place, nn.Linear(last.in_features, classes, last.bias is not None))
        return model
    except StillError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        if not pretrained:
            raise RoleError(f"{library} cannot build '{name}': {said}") from error
        raise UnknownNameError(f"the weights of {library}'s '{name}' are not on this machine and could not be fetched, "
                               f"or there are none: {said}. Without internet give {library}:{name}:weights=FILE"
                               ".safetensors, or pretrained=false for fresh ones") from error


def _wrapped(library: str, name: str, model: nn.Module, features: bool) -> VisionModel:
    """The model with the normalisation and size that the library states for it."""
    found: Any = _library(library)
    if library == "timm":
        config = found.data.resolve_model_data_config(model)
        mean, std, size = config["mean"], config["std"], config["input_size"][-2:]
        timm_model: Any = model
        classes = int(timm_model.num_classes)
    else:
        shown = found.models.get_model_weights(name).DEFAULT.transforms()
        mean, std, size = shown.mean, shown.std, (shown.crop_size * 2)[:2]
        classes = int(_last(model)[2].out_features)
    if features:
        model, classes = _without_head(library, model), 0
    return VisionModel(model, library, name, classes, [float(v) for v in mean], [float(v) for v in std],
                       (int(size[0]), int(size[1])))


def _without_head(library: str, model: Any) -> nn.Module:
    if library == "timm":
        model.reset_classifier(0)
    else:
        parent, place, _ = _last(model)
        setattr(parent, place, nn.Identity())
    return model


def _last(model: nn.Module) -> tuple[nn.Module, str, nn.Linear]:
    """The last linear layer of a model of torchvision, with its parent and its name there."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    require(bool(found), f"{type(model).__name__} has no linear last layer, which is needed here", RoleError)
    path, last = found[-1]
    above, _, place = path.rpartition(".")
    return model.get_submodule(above), place, last
