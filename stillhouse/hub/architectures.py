"""What a network is, apart from its weights: a description in JSON that goes with saved weights, and its inverse.

Nothing in a description is run. Networks of Stillhouse, `transformers` and `diffusers` are built from the names of
their classes and their configuration alone; one that a callable of the user's built is only named, and whoever loads it
says so with `arch`.
"""

from __future__ import annotations

import importlib
import json
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.errors import ConfigError, DamagedFileError, MissingExtraError, StillError, require
from stillhouse.parts.experts import Experts

TARGET = "target.json"
"""The file beside saved weights that says what they are."""

ADAPTERS = {"ImageModel": "stillhouse.hub.transformers", "DiffusersNetwork": "stillhouse.hub.diffusers",
            "TextModel": "stillhouse.hub.text", "SpeechToText": "stillhouse.hub.seq2seq",
            "CLIPDualEncoder": "stillhouse.hub.dual_encoders", "VisionModel": "stillhouse.hub.vision",
            "PygModel": "stillhouse.hub.graphs"}
"""Adapters with `spec()`, all but their weights in JSON, and `from_spec(spec)`; and where they live."""

_ORIGINS: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def remember(made: Any, text: str) -> Any:
    """Note the words from which a network, or a factory of them, was made; `made` is returned."""
    _ORIGINS[made] = text
    return made


def remembered(made: Any) -> bool:
    """Whether the words from which it was made are known."""
    return made in _ORIGINS


def built_by(factory: Callable[[], nn.Module]) -> nn.Module:
    """What a factory makes, with the words that the factory is known by."""
    made = factory()
    if remembered(factory) and not remembered(made):
        remember(made, _ORIGINS[factory])
    return made


def describe(model: Any) -> dict[str, Any] | None:
    """The description of a network or of a factory of networks; None for one that was built in Python by other means
    than a string."""
    if model in _ORIGINS:
        return {"text": _ORIGINS[model]}
    if isinstance(model, nn.Module):
        return _described(model)
    return _described(model()) if callable(model) else None


def _described(model: nn.Module) -> dict[str, Any] | None:
    name = type(model).__name__
    if name in ADAPTERS and type(model).__module__ == ADAPTERS[name]:
        adapter: Any = model
        spec = adapter.spec()
        return None if spec is None else {"adapter": name, "spec": spec}
    if isinstance(model, NetworkDenoiser):
        inner = describe(model.network)
        return inner and {"denoiser": model.spec(), "network": inner}
    if isinstance(model, Experts):
        inner = describe(model.network)
        return inner and {"experts": model.spec(), "network": inner}
    library = {c.__name__: c.__module__.partition(".")[0] for c in type(model).__mro__}
    if library.get("PreTrainedModel") == "transformers":
        hf: Any = model
        return {"transformers": name, "config": configuration(hf), "generation": generation(hf)}
    return None


def configuration(model: Any) -> dict[str, Any]:
    """The whole configuration of a `transformers` model, but for the place that it was read from."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    return config


def generation(model: Any) -> dict[str, Any] | None:
    """How a `transformers` model generates text, where it does: its end tokens, lengths and the like."""
    settings = getattr(model, "generation_config", None)
    return None if settings is None else json.loads(settings.to_json_string())


def with_generation(model: Any, settings: dict[str, Any] | None) -> Any:
    """`model`, generating as `settings` say; None leaves it as it is."""
    if settings is not None:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(settings)
    return model


def rebuild(description: Any, build: Callable[[str], nn.Module]) -> nn.Module:
    """A network as described, with fresh weights. `build` makes those that are named by words of Stillhouse's own.

    Raises ConfigError for a description that names code outside of Stillhouse, DamagedFileError for one that is none.
    """
    try:
        if "text" in description:
            return build(str(description["text"]))
        if "adapter" in description:
            return adapter(str(description["adapter"])).from_spec(description["spec"])
        if "experts" in description:
            return Experts.from_spec(rebuild(description["network"], build), description["experts"])
        if "denoiser" in description:
            return NetworkDenoiser.from_spec(rebuild(description["network"], build), description["denoiser"])
        kind = library_class("transformers", str(description["transformers"]), "PreTrainedModel")
        return with_generation(kind(kind.config_class.from_dict(description["config"])), description.get("generation"))
    except StillError:
        raise
    except Exception as error:
        raise DamagedFileError(f"the description of the network in {TARGET} cannot be followed: {type(error).__name__}:"
                               f" {error}") from error


def adapter(name: str) -> Any:
    """The adapter class of that name. Raises DamagedFileError for any other."""
    require(name in ADAPTERS, f"{TARGET} names '{name}', which is no adapter of Stillhouse", DamagedFileError)
    return getattr(importlib.import_module(ADAPTERS[name]), name)


def library_class(library: str, name: str, base: str) -> Any:
    """The class `name` of transformers or diffusers, which must derive from the library's own `base`.

    Raises DamagedFileError where it does not, MissingExtraError without the library.
    """
    extras = {"transformers": "hf", "diffusers": "diffusion"}
    try:
        found = importlib.import_module(library)
    except ImportError as error:
        raise MissingExtraError(f"this needs {library}; install it with: pip install 'stillhouse[{extras[library]}]'"
                                ) from error
    kind = getattr(found, name, None)
    ancestors = {c.__name__: c.__module__.partition(".")[0] for c in getattr(kind, "__mro__", ())}
    require(ancestors.get(base) == library, f"{library} has no model class '{name}'", DamagedFileError)
    return kind


def refuse_words(text: str) -> ConfigError:
    """The error for a network that only code named in a file could build."""
    return ConfigError(f"this network was built by '{text}'. Code that a file names is not run; if you trust it, say "
                       f"so: arch='{text}' (on the command line --arch {text})")
