"""Models of the library `transformers` by name: image classifiers, encoders and causal language models.

Weights come from safetensors alone, and no code of a model's repository is run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, UnknownNameError, require
from stillhouse.hub.architectures import library_class
from stillhouse.hub.refusals import CODE, PICKLE, only_pickles
from stillhouse.protocols import CausalLM


class ImageModel(nn.Module):
    """A vision model of `transformers` on pictures in [-1, 1]: class logits, or features where it has no classes.

    Pictures are brought to `mean` and `std` (those of the model's image processor, for values in [0, 1]), to the number
    of channels of the model, and to `size` (None: left as they are), all differentiably. `features` asks for features
    of a classifier too; `pooled` says whether the model's own pooling (with weights, in some) may be used for them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: list[float], std: list[float], size: tuple[int, int] | None,
                 features: bool = False, pooled: bool = True):
        super().__init__()
        self.model, self.size, self.features, self.pooled = model, size, features, pooled
        self.channels = int(getattr(model.config, "num_channels", 3))
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def spec(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {"class": type(self.model).__name__, "config": json.loads(self.model.config.to_json_string(False)),
                "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist(), "size": self.size,
                "features": self.features, "pooled": self.pooled}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> ImageModel:
        """A model as `spec` describes it, with fresh weights."""
        kind = library_class("transformers", spec["class"], "PreTrainedModel")
        size = spec["size"]
        return cls(kind(kind.config_class.from_dict(spec["config"])), spec["mean"], spec["std"],
                   None if size is None else (size[0], size[1]), spec["features"], spec["pooled"])

    def prepared(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch c h w"]:
        """The pictures as the model takes them."""
        if image.shape[1] != self.channels:
            require(image.shape[1] == 1, f"pictures of {image.shape[1]} channels were given to a model of "
                    f"{self.channels}", RoleError)
            image = image.expand(-1, self.channels, -1, -1)
        if self.size is not None and tuple(image.shape[-2:]) != self.size:
            image = F.interpolate(image, self.size, mode="bilinear", antialias=True, align_corners=False)
        return ((image + 1) / 2 - self.mean) / self.std

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        if self.features or not self.classes:
            return self.encode(image)
        return self.model(pixel_values=self.prepared(image)).logits

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a model without any."""
        return int(self.model.config.num_labels) if "ForImageClassification" in type(self.model).__name__ else 0

    def encode(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """One feature vector per picture, of the model below the classes."""
        out = self.model.base_model(pixel_values=self.prepared(image))
        pooled = getattr(out, "pooler_output", None) if self.pooled else None
        if pooled is None:
            hidden = out.last_hidden_state
            pooled = hidden[:, 0] if hidden.dim() == 3 else hidden.mean((2, 3))
        return pooled.flatten(1)


def load(name: str, kind: Any = None, **options: Any) -> nn.Module:
    """The model `name` of the hub, or in a folder, for the role kind: a CausalLM as it is, a Classifier or Encoder (or
    None: a classifier if its configuration says so, else a language model) as an ImageModel.

    `num_labels` puts a new last layer on a classifier. Raises RoleError for another kind of model, pickled weights or a
    repository that wants to run code; UnknownNameError where nothing is found (without internet: not in the cache).
    """
    hf = _library()
    config = _config(hf, name, options)
    role, maker = _maker(hf, config, kind, name)
    if role == "language":
        require(not options, f"a language model takes no options, got {options}", RoleError)
    changed = {"ignore_mismatched_sizes": True} if "num_labels" in options else {}
    model, found = _safely(name, lambda: maker.from_pretrained(
        name, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
        output_loading_info=True, **changed))
    _check_loaded(model, found, role, name, new_head="num_labels" in options)
    if role == "language":
        return model
    pooled = not any("pooler" in key for key in found["missing_keys"])
    return _pictures(hf, model, name, features=role == "encoder", pooled=pooled)


def _check_loaded(model: Any, found: dict[str, Any], role: str, name: str, new_head: bool) -> None:
    """Refuse a model of which a part was left with random weights."""
    missing = sorted(found["missing_keys"])
    head = [key for key in missing if not key.startswith(f"{model.base_model_prefix}.")]
    lacking = [key for key in missing if not ((new_head and key in head) or (role == "encoder" and "pooler" in key))]
    if lacking and role == "classifier" and lacking == head:
        raise RoleError(f"'{name}' has no trained class layer ({', '.join(head)}); give one that has, or a new layer "
                        f"to be trained: hf:{name}:num_labels=N")
    require(not lacking, f"the weights of '{name}' lack {len(lacking)} tensors of {type(model).__name__} "
            f"({', '.join(lacking[:3])}, …), which would be random numbers; is config.json that of these weights?",
            RoleError)
    if found["unexpected_keys"] and role != "encoder":
        unused = sorted(found["unexpected_keys"])
        warnings.warn(f"{len(unused)} tensors of '{name}' are not used by {type(model).__name__} "
                      f"({', '.join(unused[:3])}, …)", stacklevel=2)


def fresh(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A factory of models with the configuration of `name` and freshly drawn weights."""
    hf = _library()
    config = _config(hf, name, options)
    role, maker = _maker(hf, config, None, name)

    def make() -> nn.Module:
        model = maker.from_config(config, trust_remote_code=False)
        return model if role == "language" else _pictures(hf, model, name)

    return make


def wrap(model: Any, kind: Any, name: str) -> nn.Module:
    """A `transformers` model that was built in Python, for a role of pictures. Raises RoleError for one of text."""
    require(getattr(model, "main_input_name", "") == "pixel_values",
            f"'{name}' ({type(model).__name__}) is no model of pictures", RoleError)
    wrapped = _pictures(_library(), model, None, features=kind.__name__ == "Encoder")
    require(wrapped.classes > 0 or kind.__name__ == "Encoder", f"'{name}' ({type(model).__name__}) has no classes; "
            "give its …ForImageClassification", RoleError)
    return wrapped


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("hf:… needs transformers; install it with: pip install 'stillhouse[hf]'") from error
    return transformers


def _config(hf: Any, name: str, options: dict[str, Any]) -> Any:
    folder = Path(name).expanduser()
    if folder.is_dir():
        require((folder / "config.json").is_file(), f"the folder {folder} has no config.json; it must be one that "
                "save_pretrained wrote", RoleError)
        found = only_pickles(folder)
        require(not found, f"{(found or [folder])[0]}: {PICKLE}", RoleError)
    unknown = set(options) - {"num_labels"}
    require(not unknown, f"hf:… has no option '{min(unknown, default='')}'; it has num_labels", UnknownNameError)
    return _safely(name, lambda: hf.AutoConfig.from_pretrained(name, trust_remote_code=False, **options))


def _maker(hf: Any, config: Any, kind: Any, name: str) -> tuple[str, Any]:
    """The kind of model ("language", "classifier", "encoder") and its Auto class."""
    pictures = type(config) in hf.AutoModelForImageClassification._model_mapping
    language = type(config) in hf.AutoModelForCausalLM._model_mapping
    wanted = getattr(kind, "__name__", "")
    masked = any("MaskedLM" in a for a in config.architectures or [])
    if kind is CausalLM or (kind is None and language and not pictures):
        require(language and not masked, f"'{name}' ({config.model_type}) is no causal language model, which this role "
                "needs", RoleError)
        return "language", hf.AutoModelForCausalLM
    require(wanted in ("", "Classifier", "Encoder"), "hf:… gives classifiers and encoders of pictures and causal "
            f"language models; this role needs a {wanted}, which diffusers:FOLDER or module:callable may give",
            RoleError)
    require(pictures, f"'{name}' ({config.model_type}) is no model of pictures, which this role needs", RoleError)
    if wanted == "Encoder":
        trained = any("ForImageClassification" in a for a in config.architectures or [])
        return "encoder", hf.AutoModelForImageClassification if trained else hf.AutoModel
    return "classifier", hf.AutoModelForImageClassification


def _pictures(hf: Any, model: Any, name: str | None, features: bool = False, pooled: bool = True) -> ImageModel:
    """With the normalisation and size of the model's image processor; without one pictures stay in [-1, 1], and those
    for patch models are brought to the size that their positions are made for."""
    settings: dict[str, Any] = {}
    if name is not None:
        try:
            settings, _ = hf.image_processing_base.ImageProcessingMixin.get_image_processor_dict(name)
        except (OSError, ValueError):
            settings = {}
    channels = int(getattr(model.config, "num_channels", 3))
    mean, std = ([float(v) for v in settings.get(key) or [0.5]] for key in ("image_mean", "image_std"))
    mean, std = (v if len(v) == channels else v[:1] for v in (mean, std))
    size = (_sides(settings.get("crop_size")) if settings.get("do_center_crop", True) else None) or _sides(
        settings.get("size"))
    if size is None and hasattr(model.config, "patch_size"):
        size = _sides(getattr(model.config, "image_size", None))
    return ImageModel(model, mean, std, size, features, pooled)


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width of a size in any of the forms that configurations use."""
    if isinstance(size, dict):
        height: Any = size.get("height", size.get("shortest_edge"))
        return None if height is None else (int(height), int(size.get("width", height)))
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[-1])
    return None if size is None else (int(size), int(size))


def _safely(name: str, read: Callable[[], Any]) -> Any:
    """Call `read`, its errors turned into ours."""
    try:
        return read()
    except ImportError as error:
        raise MissingExtraError(f"'{name}' needs a library that is not installed: {error}") from error
    except Exception as error:
        text = str(error)
        first = text.strip().splitlines()[0] if text.strip() else "no reason given"
        if "trust_remote_code" in text or "custom code" in text:
            raise RoleError(f"'{name}': {CODE}") from error
        folder = Path(name).expanduser()
        if isinstance(error, SafetensorError) or (folder.is_dir() and any(folder.glob("*.safetensors*"))
                                                  and isinstance(error, OSError)):
            raise DamagedFileError(f"the weights of '{name}' are damaged or only partly there (a download that was cut "
                                   f"off, or pointers of git-lfs): {first}") from error
        if ".safetensors" in text or "pytorch_model.bin" in text:
            raise RoleError(f"'{name}' has no weights as safetensors. If it has others: {PICKLE}") from error
        require(folder.is_dir() or not name.startswith(("/", ".", "~")), f"there is no folder {folder} (seen from "
                f"{Path.cwd()})", UnknownNameError)
        if isinstance(error, OSError) and not folder.is_dir():
            raise UnknownNameError(
                f"'{name}' is no folder here (seen from {Path.cwd()}), not in the cache of Hugging Face, and could not "
                f"be fetched: {first} Check the name, or run `hf download {name}` where there is internet and give the "
                "folder") from error
        raise RoleError(f"transformers cannot load '{name}': {type(error).__name__}: {first}") from error
