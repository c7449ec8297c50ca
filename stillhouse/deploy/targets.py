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
from stillhouse.errors import DamagedFileError, StoreError, require
from stillhouse.hub.architectures import TARGET, describe
from stillhouse.hub.models import builder, fit_role, load_weights, resolve_model
from stillhouse.hub.refusals import read_json
from stillhouse.parts.surgeon import FILE as PRUNED
from stillhouse.protocols import PROBES
from stillhouse.store import save_tree, write_text
from stillhouse.zoo import MODELS

WEIGHTS = "model.safetensors"


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
    """What is known of the target of `slug` from what its `distill` was given."""
    hints = typing.get_type_hints(catalog.load(slug).distill)
    name = next((n for n in TRAINED if roles.get(n) is not None), None)
    about = About(slug, made_from=dict(made_from or {}), seed=seed)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        about.config = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    if name is not None:
        kinds = [k for k in (hints[name], *typing.get_args(hints[name])) if isinstance(k, type) and k in PROBES]
        about.kind = kinds[0].__name__ if kinds else ""
        about.network = describe(roles[name])
    for value in roles.values():
        if not hasattr(value, "__getitem__") or not hasattr(value, "__len__") or isinstance(value, nn.Module | list):
            continue
        about.classes = about.classes or list(getattr(value, "classes", ()))
        for field, content in value[0].items() if len(value) else ():
            if isinstance(content, Tensor) and field not in about.example:
                about.example[field] = list(content.shape)
    return about


def save(target: Any, folder: Path | str, about: About, tokenizer: Any = None) -> Path:
    """Write a target into `folder`: weights, what its own `save` writes, and target.json. Returns the folder."""
    folder = Path(folder)
    if hasattr(target, "save"):
        target.save(folder)
    else:
        save_tree(folder / WEIGHTS, dict(target.state_dict()))
    about.target = type(target).__name__
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
        about.tokenizer = True
    write_text(folder / TARGET, json.dumps(dataclasses.asdict(about), indent=1, ensure_ascii=False))
    return folder


def place_of(folder: Path | str) -> Path:
    """The folder of the target itself, given it or its run's. Raises StoreError where there is no target."""
    folder = Path(folder).expanduser()
    for place in (folder, folder / "target"):
        if (place / TARGET).is_file():
            return place
    hint = "is the run not finished? Go on with: still run SLUG --resume FOLDER" if folder.is_dir() else (
        f"there is no such folder (seen from {Path.cwd()})")
    raise StoreError(f"{folder} holds no saved result ({TARGET}): {hint}")


def read_about(folder: Path | str) -> About:
    """What target.json says. Raises StoreError where there is none, DamagedFileError where it is broken."""
    place = place_of(folder)
    said = read_json(place / TARGET)
    known = {f.name for f in dataclasses.fields(About)}
    try:
        return About(**{name: value for name, value in said.items() if name in known})
    except TypeError as error:
        raise DamagedFileError(f"{place / TARGET} is not as it was written: {error}") from error


def load(folder: Path | str, arch: str | None = None) -> Any:
    """The target of a finished run, ready for use, from the run's folder or its `target`.

    A network that was given as `module:callable` is built by `arch` only: no code that a file names is run.
    Raises StoreError where there is no target, DamagedFileError where files do not fit each other, ConfigError where
    `arch` is needed, UnknownNameError for a system that this version does not have.
    """
    place, about = place_of(folder), read_about(folder)
    kind = target_class(about)
    if (place / PRUNED).is_file():
        return resolve_model(place)
    build = builder(place, arch, MODELS)
    if not hasattr(kind, "load"):
        model = load_weights(build(), place / WEIGHTS)
        protocol = next((p for p in PROBES if p.__name__ == about.kind), None)
        return fit_role(model, protocol, str(place)).eval()
    return kind.load(place, *_network_for(kind.load, build))


def target_class(about: About) -> Any:
    """The class of a target: what the `distill` of its system is annotated to return, an nn.Module or another."""
    kind = typing.get_type_hints(catalog.load(about.system).distill)["return"]
    require(about.target == kind.__name__ or issubclass(kind, nn.Module), f"{TARGET} says that the result is a "
            f"{about.target}, but {about.system} gives a {kind.__name__}", DamagedFileError)
    return kind


def _network_for(read: Callable[..., Any], build: Callable[[], nn.Module]) -> list[Any]:
    """What a `load(folder, network)` wants beside the folder: nothing, a network, a part of it by the parameter's name,
    or a factory."""
    wanted = list(inspect.signature(read).parameters.items())[1:]
    if not wanted or wanted[0][1].default is not inspect.Parameter.empty:
        return []
    name, parameter = wanted[0]

    def part() -> nn.Module:
        model = build()
        return getattr(model, name, model)

    return [part if "Callable" in str(parameter.annotation) else part()]


