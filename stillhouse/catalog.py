"""The 176 systems, read without torch: what they are, which are built, and what came out when they were measured."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from stillhouse.errors import MissingExtraError, UnknownNameError

PACKAGE = Path(__file__).parent

FAMILIES = {
    "compression": "Compression: a network into a smaller or better one",
    "language": "Language",
    "speech": "Speech and sound",
    "diffusion": "Diffusion: many steps into few",
    "scenes": "Scenes: score distillation and 3-D",
    "datasets": "Data sets: many samples into few",
    "representation": "Representation: learning without labels",
    "generative": "Generative models",
    "adaptation": "Adaptation: clients, domains, forgetting, anomalies",
}

KNOWLEDGE = {
    "response": "what a teacher puts out: probabilities, tokens, labels, denoised samples",
    "feature": "inner features of single samples",
    "relation": "relations among samples, layers or places",
    "distribution": "whole distributions: densities, scores, moments, a critic's game",
    "training": "how a network is trained: gradients, trajectories, weights",
}
"""Kinds of knowledge: the first three are those of the survey (Gou et al. 2021), which ends at classifiers."""

SCHEMES = {
    "offline": "a teacher trained before, frozen",
    "online": "teacher and student are trained together",
    "self": "a network learns from itself: its past, its average, its own views, layers or labels",
    "none": "there is no teacher",
}

ALGORITHMS = {
    "adversarial": "a critic or a generator plays against the student",
    "multi-teacher": "two teachers or more, or an ensemble",
    "cross-modal": "teacher and student see different modalities, or pictures and text are aligned",
    "graph": "graphs are the data or the knowledge",
    "attention": "attention is the knowledge",
    "data-free": "no real data is needed",
    "quantized": "weights of few bits",
    "lifelong": "against forgetting, or for it",
    "nas": "an architecture is searched",
}


@dataclass(frozen=True)
class System:
    """One paper. `knowledge` (the main kind first), `scheme` and `algorithms` place it in the survey's map (the tables
    above), `moves` says what is distilled into what, `extras` which optional dependencies it needs, `remarks` what the
    miniature does not show of the paper's claims, and why, `grounds` where it can be compared with others
    (`stillhouse.zoo.grounds`), with changes of its config and options of the ground's roles, `advice` for whom it is
    (`stillhouse.advice`)."""

    number: int
    slug: str
    family: str
    title: str
    year: int
    arxiv: str
    knowledge: tuple[str, ...] = ()
    scheme: str = ""
    algorithms: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    moves: str = ""
    remarks: str = ""
    grounds: dict[str, dict[str, Any]] = field(default_factory=dict)
    advice: dict[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return f"stillhouse.systems.{self.family}.{self.slug.replace('-', '_')}"

    @property
    def sources(self) -> list[Path]:
        """The files of the system, none if it is only planned."""
        where = PACKAGE / "systems" / self.family / self.slug.replace("-", "_")
        alone = where.with_suffix(".py")
        return [alone] if alone.is_file() else sorted(where.rglob("*.py"))

    @property
    def built(self) -> bool:
        return bool(self.sources)

    @property
    def hash(self) -> str:
        """A hash of the system's source, its config and claims included."""
        h = hashlib.blake2b(digest_size=8)
        for path in self.sources:
            h.update(path.read_bytes())
        return h.hexdigest()

    @property
    def outcome(self) -> dict[str, Any] | None:
        """The committed outcome, results/<slug>.json, or None where it was not measured."""
        path = results_folder() / f"{self.slug}.json"
        if not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    @property
    def pictures(self) -> dict[str, Path]:
        """Committed pictures of its first seed by title: results/<slug>/NUMBER TITLE.png."""
        return {p.stem.partition(" ")[2]: p for p in sorted((results_folder() / self.slug).glob("*.png"))}

    @property
    def verdict(self) -> str:
        """The worst verdict of its claims, with " (stale)" where the source has changed since; "" if not measured."""
        outcome = self.outcome
        if outcome is None:
            return ""
        return outcome["verdict"] + ("" if outcome["hash"] == self.hash else " (stale)")


def results_folder() -> Path:
    """Where outcomes lie: inside an installed package, beside the package in a checkout."""
    installed = PACKAGE / "results"
    return installed if installed.is_dir() else PACKAGE.parent / "results"


@cache
def systems() -> dict[str, System]:
    """All systems by slug, in the order of their numbers."""
    rows = json.loads((PACKAGE / "catalog.json").read_text(encoding="utf-8"))
    lists = ("extras", "knowledge", "algorithms")
    return {r["slug"]: System(**{**r, **{name: tuple(r.get(name, ())) for name in lists}}) for r in rows}


def placed(knowledge: str | None = None, scheme: str | None = None, algorithm: str | None = None) -> list[System]:
    """The systems at a place of the survey's map; None is any. Raises UnknownNameError for a word that it has not."""
    for given, known, what in ((knowledge, KNOWLEDGE, "kind of knowledge"), (scheme, SCHEMES, "scheme"),
                               (algorithm, ALGORITHMS, "algorithm")):
        if given is not None and given not in known:
            raise UnknownNameError(f"there is no {what} '{given}'; choose one of {', '.join(known)}")
    return [s for s in systems().values() if (knowledge is None or knowledge in s.knowledge)
            and (scheme is None or scheme == s.scheme) and (algorithm is None or algorithm in s.algorithms)]


def find(slug: str) -> System:
    """The system of that slug (underscores pass for hyphens). Raises UnknownNameError with the nearest ones."""
    known = systems()
    name = slug.strip().lower().replace("_", "-")
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UnknownNameError(f"there is no system '{slug}'.{hint} `still list` shows all of them.")


def find_built(slug: str) -> System:
    """Like `find`, but raises UnknownNameError also where the system is planned and not built yet."""
    system = find(slug)
    if not system.built:
        raise UnknownNameError(f"'{system.slug}' ({system.title}, {system.year}) is planned but not built yet. "
                               "`still list --built` shows what is.")
    return system


def load(slug: str) -> ModuleType:
    """The module of a built system. Raises UnknownNameError, or MissingExtraError with the line that installs it."""
    system = find_built(slug)
    absent = [extra for extra in system.extras if not _importable(EXTRAS[extra])]
    if absent:
        raise MissingExtraError(_install_line(system))
    try:
        return importlib.import_module(system.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("stillhouse"):
            raise
        raise MissingExtraError(f"{_install_line(system)} (no module named {error.name})") from error


EXTRAS = {"hf": ("transformers", "peft", "rouge_score"), "diffusion": ("diffusers",), "vision": ("timm", "torchvision"),
          "graph": ("torch_geometric", "mlxtend")}
"""What each extra makes importable."""


def _importable(names: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _install_line(system: System) -> str:
    extras = ",".join(system.extras) or "hf,diffusion,graph"
    return f"'{system.slug}' needs more than the core; install it with: pip install 'stillhouse[{extras}]'"
