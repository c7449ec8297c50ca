"""The model card of an export: what it is, how it was made, what was measured, and how it is loaded."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import stillhouse
from stillhouse import catalog
from stillhouse.deploy.formats.views import Job, Made
from stillhouse.errors import DamagedFileError
from stillhouse.hub.refusals import read_json
from stillhouse.protocols import modules_of

LIBRARIES = {"hf": "transformers", "diffusers": "diffusers", "peft": "peft", "onnx": "onnx"}
TASKS = {"Classifier": "image-classification", "Encoder": "image-feature-extraction",
         "TextClassifier": "text-classification", "TextEncoder": "feature-extraction", "CausalLM": "text-generation",
         "VectorClassifier": "image-classification", "LabelAugmented": "image-classification",
         "SpeechEncoder": "feature-extraction"}
DATA = ("DistilledSet", "GraphSet")


def card(job: Job, made: Made, to: str) -> str:
    """The text of README.md. Nothing stands in it that the run or the check did not give."""
    about, system = job.about, catalog.find(job.about.system)
    settings = json.dumps(about.config, indent=1, ensure_ascii=False)
    parts = [
        _front(job, to),
        f"# {system.slug}: {_what(job)}",
        f"Made by Stillhouse with the method of *{system.title}* ({system.year}), "
        f"[arXiv {system.arxiv}](https://arxiv.org/abs/{system.arxiv}): {system.moves}.",
        f"## Loading\n\nIn this folder:\n\n```python\n{made.code}\n```",
        *made.notes,
        "## What it was made from\n\n" + _made_from(job),
        "## Size\n\n" + _sizes(job),
        "## Figures\n\n" + _figures(job),
        f"## Check\n\nBefore it took its place this {to} export was loaded back and compared with the result of the "
        "run on example batches with fixed seeds. The largest difference, in parts of the largest value "
        f"(allowed: {made.tolerance:g}):\n\n" + _rows(("compared", "difference"), {
            name: f"{value:.3g}" for name, value in made.checks.items()}),
        f"## Settings\n\nSeed {about.seed}.\n\n```json\n{settings}\n```",
        "## Versions\n\n" + _rows(("library", "version"), versions(to, about.stillhouse)),
        "## Licence\n\nNot set. It depends on the licences of the models and data above; choose one and put it into "
        "the front matter before you publish.",
    ]
    return "\n\n".join(parts) + "\n"


def _front(job: Job, to: str) -> str:
    lines = ["---", "# license: choose one; it depends on the models and data that this was made from"]
    if job.row not in DATA and to in LIBRARIES:
        lines.append(f"library_name: {LIBRARIES[to]}")
    if to == "hf" and job.row in TASKS:
        lines.append(f"pipeline_tag: {TASKS[job.row]}")
    lines += ["tags:", "- stillhouse", f"- {job.about.system}", "- distillation", "---"]
    return "\n".join(lines)


def _what(job: Job) -> str:
    network: Any = job.target.model if job.row == "QuantizedModel" else job.target
    return job.row if type(network).__name__ == job.row else f"{type(network).__name__} ({job.row})"


def _made_from(job: Job) -> str:
    given = {role: f"`{words}`" for role, words in job.about.made_from.items()}
    return _rows(("role", "given as"), given) if given else "The words of its roles were not recorded."


def _sizes(job: Job) -> str:
    found: dict[str, str] = {}
    teacher = job.about.made_from.get("teacher")
    if teacher is not None and (count := parameters_in(teacher)) is not None:
        found["teacher"] = f"{count:,} numbers in its safetensors"
    networks = list(modules_of(*([job.target] if isinstance(job.target, nn.Module) else vars(job.target).values())))
    if networks:
        total = sum(p.numel() for p in {id(p): p for m in networks for p in m.parameters()}.values())
        found["this"] = f"{total:,} parameters"
    elif hasattr(job.target, "bytes"):
        found["this"] = f"{len(job.target):,} samples, {job.target.bytes:,} bytes"
    files = sum(p.stat().st_size for p in job.folder.rglob("*") if p.is_file())
    found["files of this export"] = f"{files:,} bytes"
    return _rows(("what", "size"), found)


def parameters_in(words: str) -> int | None:
    """How many numbers the safetensors of a model hold that was given as a folder or file; None where that is not
    known."""
    path = Path(words.removeprefix("hf:").removeprefix("diffusers:")).expanduser()
    files = [path] if path.suffix == ".safetensors" else [
        *path.glob("*.safetensors"), *path.glob("target/*.safetensors"), *path.glob("unet/*.safetensors"),
        *path.glob("transformer/*.safetensors")] if path.is_dir() else []
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as held:
                for name in held.keys():  # noqa: SIM118 (not a mapping)
                    count = 1
                    for n in held.get_slice(name).get_shape():
                        count *= n
                    total += count
        except (SafetensorError, OSError):
            return None
    return total or None


def _figures(job: Job) -> str:
    measured: dict[str, Any] = dict(job.about.metrics)
    for folder in (job.place, job.place.parent, job.place.parent.parent):
        if (folder / "eval.json").is_file():
            try:
                measured.update(_numbers(read_json(folder / "eval.json")))
            except DamagedFileError:
                break
            break
    if not measured:
        return "None were measured for this result."
    return _rows(("measure", "value"), {name: f"{value:.4g}" for name, value in measured.items()})


def _numbers(tree: dict[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found.update(_numbers(value, f"{before}{name} "))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[before + name] = float(value)
    return found


def versions(to: str, made_with: str) -> dict[str, str]:
    """The versions of what wrote the export, and of the Stillhouse that made the result."""
    names = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "hf": ("transformers", "datasets"),
             "diffusers": ("diffusers",), "peft": ("peft",)}.get(to, ())
    found = {"stillhouse (the run)": made_with, "stillhouse (the export)": stillhouse.__version__,
             "torch": torch.__version__, "python": platform.python_version()}
    for name in (*names, "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _rows(head: tuple[str, str], rows: dict[str, str]) -> str:
    cells = [f"| {name} | {value} |".replace("\n", " ") for name, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *cells])
