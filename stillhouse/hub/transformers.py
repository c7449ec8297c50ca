"""Models of the library `transformers` by name: of pictures, of text and of speech, by the role they are to play.

Weights come from safetensors alone, and no code of a model's repository is run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from stillhouse.errors import DamagedFileError, MissingExtraError, RoleError, StillError, UnknownNameError, require
from stillhouse.hub.architectures import configuration, library_class
from stillhouse.hub.downloads import local_folder
from stillhouse.hub.refusals import CODE, PICKLE, check_whole, only_pickles

OPTIONS = {"classifier": ("num_labels",), "text classifier": ("num_labels", "pooling"), "text encoder": ("pooling",)}
"""What may follow the name of a model beside `fresh`, by the kind of model."""

TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Parts of dual encoders that read pictures and have no form that classifies."""


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
        return {"class": type(self.model).__name__, "config": configuration(self.model),
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
        return prepare(image, self.channels, self.size, self.mean, self.std)

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


def prepare(image: Float[Tensor, "batch channels height width"], channels: int, size: tuple[int, int] | None,
            mean: Tensor, std: Tensor) -> Float[Tensor, "batch c h w"]:
    """Pictures in [-1, 1] with the channels, size, mean and standard deviation (for values in [0, 1]) of a model."""
    if image.shape[1] != channels:
        require(image.shape[1] == 1, f"pictures of {image.shape[1]} channels were given to a model of {channels}",
                RoleError)
        image = image.expand(-1, channels, -1, -1)
    if size is not None and tuple(image.shape[-2:]) != size:
        image = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
    return ((image + 1) / 2 - mean) / std


def load(name: str, kind: Any = None, **options: Any) -> nn.Module:
    """The model `name` of the hub, or in a folder, for the role kind.

    A CausalLM and a Seq2Seq of text are the library's own; a Classifier or Encoder is an ImageModel, a TextClassifier
    or TextEncoder a TextModel, a Whisper a SpeechToText. Without a kind the configuration says what it is.

    Options: `fresh=True` draws new weights for the configuration; `num_labels` puts a new last layer on a classifier;
    `pooling` ("mean" or "first") says how a text's features are taken. Raises RoleError for another kind of model,
    pickled weights or a repository that wants to run code; DamagedFileError for a download that was cut off;
    UnknownNameError for an option that there is not, and where nothing is found (without internet: not in the cache).
    """
    hf = _library()
    fresh = _flag(options, "fresh")
    folder, config = _config(hf, name, options, fresh)
    role, maker = _maker(hf, config, kind, name)
    _check_options(options, role, name)
    new_head = "num_labels" in options
    model, found = _made(hf, maker, folder, config, name, fresh, new_head)
    _check_loaded(model, found, role, name, new_head)
    return _fitted(hf, model, role, folder, name, options.get("pooling"), found)


def fresh(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A factory of models with the configuration of `name` and freshly drawn weights."""
    hf = _library()
    folder, config = _config(hf, name, options, fresh=True)
    _flag(options, "fresh")
    role, maker = _maker(hf, config, None, name)
    _check_options(options, role, name)

    def make() -> nn.Module:
        model = maker.from_config(config, trust_remote_code=False, dtype=torch.float32)
        return _fitted(hf, model, role, folder, name, options.get("pooling"), {"missing_keys": ()}, features=False)

    return make


def _fitted(hf: Any, model: Any, role: str, folder: Path, name: str, pooling: Any, found: dict[str, Any],
            features: bool = True) -> nn.Module:
    """The model in the adapter of its role."""
    if role in ("classifier", "encoder"):
        pooled = not any("pooler" in key for key in found["missing_keys"])
        return _pictures(hf, model, folder, features=features and role == "encoder", pooled=pooled)
    if role in ("text classifier", "text encoder"):
        from stillhouse import protocols
        from stillhouse.hub.text import wrap_text

        kind = protocols.TextEncoder if role == "text encoder" else protocols.TextClassifier
        return wrap_text(model, kind, name, pooling)
    if role == "speech to text":
        from stillhouse.hub.seq2seq import SpeechToText, feature_settings

        return SpeechToText(model, feature_settings(folder, name))
    return model


def _flag(options: dict[str, Any], name: str) -> bool:
    """Take the option `name` out of `options`."""
    value = options.pop(name, False)
    require(isinstance(value, bool), f"{name} is true or false, not '{value}'", UnknownNameError)
    return value


def _check_options(options: dict[str, Any], role: str, name: str) -> None:
    known = OPTIONS.get(role, ())
    unknown = set(options) - set(known)
    require(not unknown, f"hf:… has no option '{min(unknown, default='')}' for '{name}' ({role}); it has "
            f"{', '.join((*known, 'fresh'))}", UnknownNameError)


def _made(hf: Any, maker: Any, folder: Path, config: Any, name: str, fresh: bool,
          new_head: bool = False) -> tuple[Any, dict[str, Any]]:
    """The model in float32, with the weights of `folder` or fresh ones, and what is said of keys that do not fit."""
    if fresh:
        model = _safely(name, folder, lambda: maker.from_config(config, trust_remote_code=False, dtype=torch.float32))
        if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            model.generation_config = hf.GenerationConfig.from_pretrained(folder)
        return model, {"missing_keys": (), "unexpected_keys": ()}
    changed = {"ignore_mismatched_sizes": True} if new_head else {}
    model, found = _safely(name, folder, lambda: maker.from_pretrained(
        folder, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
        output_loading_info=True, **changed))
    bad = [key for key, value in model.named_parameters() if not torch.isfinite(value).all()]
    require(not bad, f"'{name}' holds weights that are not finite, e.g. '{(bad or [''])[0]}'", DamagedFileError)
    return model, found


def _check_loaded(model: Any, found: dict[str, Any], role: str, name: str, new_head: bool) -> None:
    """Refuse a model of which a part was left with random weights."""
    missing = sorted(found["missing_keys"])
    head = [key for key in missing if not key.startswith(f"{model.base_model_prefix}.")]
    spare = "pooler" if "encoder" in role or (new_head and role == "text classifier") else " "
    lacking = [key for key in missing if not ((new_head and key in head) or spare in key)]
    if lacking and "classifier" in role and any(key in head for key in lacking) and all(
            key in head or "pooler" in key for key in lacking):
        raise RoleError(f"'{name}' has no trained class layer ({', '.join(head)}); give one that has, or a new layer "
                        f"to be trained: hf:{name}:num_labels=N")
    require(not lacking, f"the weights of '{name}' lack {len(lacking)} tensors of {type(model).__name__} "
            f"({', '.join(lacking[:3])}, …), which would be random numbers; is config.json that of these weights?",
            RoleError)
    if found["unexpected_keys"] and "encoder" not in role:
        unused = sorted(found["unexpected_keys"])
        warnings.warn(f"{len(unused)} tensors of '{name}' are not used by {type(model).__name__} "
                      f"({', '.join(unused[:3])}, …)", stacklevel=2)


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


def _config(hf: Any, name: str, options: dict[str, Any], fresh: bool = False) -> tuple[Path, Any]:
    """The folder of a model, checked to be whole, and its configuration."""
    folder = local_folder(name, weights=not fresh)
    if not fresh:
        found = only_pickles(folder)
        require(not found, f"{(found or [folder])[0]}: {PICKLE}", RoleError)
    check_whole(folder, name)
    labels = {key: options[key] for key in ("num_labels",) if key in options}
    require(all(type(n) is int and n > 0 for n in labels.values()), "num_labels is the number of classes, not "
            f"'{options.get('num_labels')}'", UnknownNameError)
    config = _safely(name, folder, lambda: hf.AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels))
    require(fresh or any(folder.glob("*.safetensors")), f"'{name}' has no weights as safetensors. If it has others: "
            f"{PICKLE}. Without weights it is a configuration alone: hf:{name}:fresh=true", RoleError)
    return folder, config


def _maker(hf: Any, config: Any, kind: Any, name: str) -> tuple[str, Any]:
    """The kind of model and the library's class that loads it."""
    classes = config.architectures or []
    what = f"'{name}' ({', '.join([config.model_type, *classes[:1]])})"

    def has(auto: Any) -> bool:
        return type(config) in auto._model_mapping

    masked = any("MaskedLM" in c for c in classes)
    both = bool(getattr(config, "is_encoder_decoder", False))
    pictures = has(hf.AutoModelForImageClassification)
    language = has(hf.AutoModelForCausalLM) and not both
    hears = config.model_type == "whisper"
    writes = hears or (both and has(hf.AutoModelForSeq2SeqLM))
    reads = has(hf.AutoModelForMaskedLM) and not any("CausalLM" in c or "LMHead" in c for c in classes)
    wanted = getattr(kind, "__name__", "") or _guess(classes, pictures, language and not reads, writes)
    if wanted == "CausalLM":
        require(language and not masked, f"{what} is no causal language model, which this role needs", RoleError)
        return "language model", hf.AutoModelForCausalLM
    if wanted == "Seq2Seq":
        require(writes, f"{what} is no encoder-decoder that reads text or sound and writes text (T5, BART, Marian, "
                "Whisper), which this role needs", RoleError)
        return ("speech to text", hf.AutoModelForSpeechSeq2Seq) if hears else ("text to text", hf.AutoModelForSeq2SeqLM)
    if wanted in ("TextClassifier", "TextEncoder"):
        text = has(hf.AutoModelForSequenceClassification) or has(hf.AutoModelForMaskedLM)
        require(text and not both, f"{what} is no model that reads text (BERT, ModernBERT, DistilBERT, …), which this "
                "role needs", RoleError)
        trained = any("ForSequenceClassification" in c for c in classes)
        if wanted == "TextEncoder":
            return "text encoder", hf.AutoModelForSequenceClassification if trained else hf.AutoModel
        require(has(hf.AutoModelForSequenceClassification), f"{what} has no form that classifies texts", RoleError)
        return "text classifier", hf.AutoModelForSequenceClassification
    require(wanted in ("Classifier", "Encoder"), "hf:… gives models of pictures, of text and of speech; this role "
            f"needs a {wanted}, which diffusers:FOLDER or module:callable may give", RoleError)
    tower = wanted == "Encoder" and config.model_type in TOWERS
    require(pictures or tower, f"{what} is no model of pictures, which this role needs", RoleError)
    if wanted == "Encoder":
        trained = any("ForImageClassification" in c for c in classes)
        return "encoder", hf.AutoModelForImageClassification if trained else hf.AutoModel
    return "classifier", hf.AutoModelForImageClassification


def _guess(classes: list[str], pictures: bool, language: bool, writes: bool) -> str:
    """The role of a model where none is asked for."""
    if pictures:
        return "Classifier"
    if any("ForSequenceClassification" in c for c in classes):
        return "TextClassifier"
    return "Seq2Seq" if writes else "CausalLM" if language else "TextEncoder"


def _pictures(hf: Any, model: Any, folder: Path | str | None, features: bool = False,
              pooled: bool = True) -> ImageModel:
    """With the normalisation and size of the model's image processor; without one pictures stay in [-1, 1], and those
    for patch models are brought to the size that their positions are made for."""
    settings: dict[str, Any] = {}
    if folder is not None:
        try:
            settings, _ = hf.image_processing_base.ImageProcessingMixin.get_image_processor_dict(str(folder))
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


def _safely(name: str, folder: Path, read: Callable[[], Any]) -> Any:
    """Call `read`, which reads from `folder`, its errors turned into ours."""
    try:
        return read()
    except StillError:
        raise
    except ImportError as error:
        raise MissingExtraError(f"'{name}' needs a library that is not installed: {error}") from error
    except Exception as error:
        text = str(error)
        first = text.strip().splitlines()[0] if text.strip() else "no reason given"
        if "trust_remote_code" in text or "custom code" in text:
            raise RoleError(f"'{name}': {CODE}") from error
        if isinstance(error, SafetensorError) or (isinstance(error, OSError) and any(folder.glob("*.safetensors*"))):
            raise DamagedFileError(f"the weights of '{name}' are damaged or only partly there (a download that was cut "
                                   f"off, or pointers of git-lfs): {first}") from error
        raise RoleError(f"transformers cannot load '{name}': {type(error).__name__}: {first}") from error
