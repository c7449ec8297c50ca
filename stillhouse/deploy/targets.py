"""What a run returns, on disk: saved with all that is needed to use it again, and read back."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import stillhouse
from stillhouse import catalog
from stillhouse.diffusion.denoise import NetworkDenoiser
from stillhouse.errors import DamagedFileError, StillError, StoreError, require
from stillhouse.hub.architectures import TARGET, describe, remembered
from stillhouse.hub.models import builder, fit_role, load_weights, resolve_model
from stillhouse.hub.refusals import read_json
from stillhouse.parts.ensembles import FILE as ENSEMBLE
from stillhouse.parts.ensembles import Ensemble
from stillhouse.parts.heads import Projected
from stillhouse.parts.surgeon import FILE as PRUNED
from stillhouse.protocols import PROBES
from stillhouse.run.seeds import preserved
from stillhouse.store import save_tree, write_text
from stillhouse.zoo import MODELS

WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"


@dataclasses.dataclass
class About:
    """What target.json says of a target.

    `kind` is the protocol of the role that was trained ("Classifier", "Denoiser", …), `example` the shape of each field
    of one sample of the data, `classes` the names of the classes by label, `made_from` the words given for the roles,
    `network` the description of the network (`hub.architectures`), `tokenizer` whether one lies beside the weights.
    """

    system: str
    target: str = ""
    kind: str = ""
    network: dict[str, Any] | None = None
    example: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    classes: list[str] = dataclasses.field(default_factory=list)
    made_from: dict[str, str] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    tokenizer: bool = False
    stillhouse: str = stillhouse.__version__


TRAINED = ("student", "network", "teacher")
"""The roles whose network a target may consist of, the likeliest first."""


def about_run(slug: str, roles: Mapping[str, Any], config: Any, seed: int = 0,
              made_from: Mapping[str, str] | None = None) -> About:
    """What is known of the target of `slug` from what its `distill` was given.

    A student that may be a classifier or an encoder is an encoder where neither labels nor a teacher's classes (`ce`,
    `kd`) are learned from.
    """
    hints = typing.get_type_hints(catalog.load(slug).distill)
    name = next((n for n in TRAINED if roles.get(n) is not None), None) if "scenes" not in roles else None
    about = About(slug, made_from=dict(made_from or {}), seed=seed)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        about.config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if name is not None:
        kinds = [k for k in (hints[name], *typing.get_args(hints[name])) if isinstance(k, type) and k in PROBES]
        named = [k.__name__ for k in kinds]
        if named == ["Classifier", "Encoder"] and not any(getattr(config, term, 1) for term in ("ce", "kd")):
            named.reverse()
        about.kind = named[0] if named else _of_factory(name, roles, hints)
        about.network = describe(roles[name])
    for value in roles.values():
        if not hasattr(value, "__getitem__") or not hasattr(value, "__len__") or isinstance(value, nn.Module | list):
            continue
        names = getattr(value, "classes", ())
        about.classes = about.classes or ([str(n) for n in names] if isinstance(names, list | tuple) else [])
        for field, content in value[0].items() if len(value) else ():
            if isinstance(content, Tensor) and field not in about.example:
                about.example[field] = list(content.shape)
    return about


def _of_factory(name: str, roles: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    """What a network that a factory made is, where it is itself the result: known from the data it learned from."""
    if name != "network" or hints["return"] is not nn.Module:
        return ""
    kinds = {"LabelledImages": "Classifier", "TokenPairs": "CausalLM", "LabelledTexts": "TextClassifier"}
    given = [k.__name__ for role, value in roles.items() if value is not None
             for k in (hints[role], *typing.get_args(hints[role])) if hasattr(k, "__name__")]
    return next((kinds[k] for k in given if k in kinds), "")


def save(target: Any, folder: Path | str, about: About, tokenizer: Any = None) -> Path:
    """Write a target into `folder`: weights, what its own `save` writes, and target.json. Returns the folder."""
    folder = Path(folder)
    if hasattr(target, "save"):
        target.save(folder)
    else:
        save_tree(folder / WEIGHTS, dict(target.state_dict()))
    about.target = type(target).__name__
    if isinstance(target, nn.Module) and (remembered(target) or not hasattr(target, "save")):
        about.network = describe(target) or about.network
    settings = getattr(target, "generation_config", None)
    if settings is not None:
        write_text(folder / GENERATION, settings.to_json_string(use_diff=False))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
        about.tokenizer = True
    note(about, folder)
    return folder


def note(about: About, folder: Path | str) -> Path:
    """Write target.json, in place of the one before."""
    return write_text(Path(folder) / TARGET, json.dumps(dataclasses.asdict(about), indent=1, ensure_ascii=False))


def place_of(folder: Path | str) -> Path:
    """The folder of the target itself, given it or its run's. Raises StoreError where there is no target."""
    folder = Path(folder).expanduser()
    for place in (folder, folder / "target"):
        if (place / TARGET).is_file():
            return place
    raise StoreError(f"{folder} holds no saved result ({TARGET}): {_lacking(folder)}")


def _lacking(folder: Path) -> str:
    """Why a folder holds no result, and what to do."""
    if not folder.is_dir():
        return f"there is no such folder (seen from {Path.cwd()})"
    if not (folder / "run.json").is_file():
        return ("it is no folder of a run, or of one that is not finished. Give one that `still run` made, or in which "
                "deploy.targets.save wrote")
    run = read_json(folder / "run.json")
    if not run.get("fingerprint"):
        return ("it was an embedded experiment, which measures its arms and keeps no model. Give roles: still run "
                f"{run.get('system')} --help")
    return f"the run is not finished. Go on with: still run {run.get('system')} --resume {folder}"


def read_about(folder: Path | str) -> About:
    """What target.json says. Raises StoreError where there is none, DamagedFileError where it is broken."""
    place = place_of(folder)
    said = read_json(place / TARGET)
    fields = {f.name: f for f in dataclasses.fields(About)}
    try:
        about = About(**{name: value for name, value in said.items() if name in fields})
    except TypeError as error:
        raise DamagedFileError(f"{place / TARGET} is not as it was written: {error}") from error
    for name, empty in vars(About("")).items():
        value = getattr(about, name)
        require(isinstance(value, type(empty)) or (name == "network" and isinstance(value, dict | None)),
                f"{place / TARGET} is not as it was written: '{name}' is {value!r}", DamagedFileError)
    return about


def load(folder: Path | str, arch: str | None = None) -> Any:
    """The target of a finished run, ready for use, from the run's folder or its `target`.

    A network that was given as `module:callable` is built by `arch` only: no code that a file names is run.
    Raises StoreError where there is no target, DamagedFileError where files do not fit each other, ConfigError where
    `arch` is needed, UnknownNameError for a system that this version does not have.
    """
    place, about = place_of(folder), read_about(folder)
    kind = target_class(about)
    try:
        with preserved():
            return _loaded(place, about, kind, arch)
    except StillError:
        raise
    except Exception as error:
        raise DamagedFileError(f"the files in {place} do not fit each other: {type(error).__name__}: {error}"
                               ) from error


def _loaded(place: Path, about: About, kind: Any, arch: str | None) -> Any:
    if (place / PRUNED).is_file():
        return resolve_model(place)
    if hasattr(kind, "load"):
        return _settled(kind.load(place, *_network_for(kind, lambda: builder(place, arch, MODELS)(), arch)))
    protocol = next((p for p in PROBES if p.__name__ == about.kind), None)
    if (place / ENSEMBLE).is_file():
        build = builder(place, arch, MODELS)
        return Ensemble.load(place, lambda: fit_role(build(), protocol, str(place))).eval()
    model: Any = load_weights(fit_role(builder(place, arch, MODELS)(), protocol, str(place)), place / WEIGHTS)
    if (place / GENERATION).is_file() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(read_json(place / GENERATION))
    return model.eval()


def _settled(target: Any) -> Any:
    for network in networks_of(target):
        network.eval()
    return target


def networks_of(target: Any) -> list[nn.Module]:
    """The networks that a target consists of: itself, or those inside a sampler, clustering or quantised model."""
    if isinstance(target, nn.Module):
        return [target]
    parts = getattr(target, "samplers", getattr(target, "__dict__", {}))
    return [network for part in parts.values() if isinstance(part, nn.Module) or hasattr(part, "denoiser")
            for network in networks_of(part)]


def made_by(about: About) -> Any:
    """What the `distill` of the system is annotated to return; of several kinds the one that the target is named as, or
    else a network."""
    hint = typing.get_type_hints(catalog.load(about.system).distill)["return"]
    kinds = [k for k in typing.get_args(hint) if isinstance(k, type)] or [hint]
    named = [k for k in kinds if k.__name__ == about.target]
    return next(iter(named or [k for k in kinds if issubclass(k, nn.Module)] or kinds))


def target_class(about: About) -> Any:
    """The class of a target: what the `distill` of its system is annotated to return, an nn.Module or another."""
    kind = made_by(about)
    require(about.target == kind.__name__ or issubclass(kind, nn.Module), f"{TARGET} says that the result is a "
            f"{about.target}, but {about.system} gives a {kind.__name__}", DamagedFileError)
    return kind


def _network_for(kind: Any, build: Callable[[], nn.Module], arch: str | None) -> list[Any]:
    """What `kind.load(folder, network)` wants beside the folder: nothing, a network, or a factory of them.

    Of a denoiser that is the network inside, of an encoder with a projection head the encoder, of a dual encoder the
    pictures' side.
    """
    wanted = list(inspect.signature(kind.load).parameters.items())[1:]
    optional = bool(wanted) and wanted[0][1].default is not inspect.Parameter.empty
    if not wanted or (optional and arch is None):
        return []
    name, parameter = wanted[0]

    def part() -> nn.Module:
        model = build()
        inner = (name == "network" and isinstance(model, NetworkDenoiser)) or name == "vision" or (
            name == "encoder" and isinstance(model, Projected) and kind is not Projected)
        return getattr(model, name, model) if inner else model

    return [part if "Callable" in str(parameter.annotation) else part()]
