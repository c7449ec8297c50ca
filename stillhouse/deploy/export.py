"""`still export`: a finished run's result as files that other libraries load, each checked by loading it back."""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from stillhouse.deploy import card
from stillhouse.deploy.formats.views import Job, Made
from stillhouse.deploy.targets import About, load, place_of, read_about
from stillhouse.errors import ConfigError, DamagedFileError, RoleError, StoreError, UnknownNameError, require
from stillhouse.run.seeds import preserved
from stillhouse.store import write_text

FORMATS = {
    "safetensors": "weights as safetensors and the network as JSON, for stillhouse.load and any reader of safetensors",
    "onnx": "model.onnx, for onnxruntime and other engines",
    "torch-export": "model.pt2, for torch.export.load",
    "hf": "a folder for from_pretrained of transformers; of a data set, one for datasets.load_from_disk",
    "diffusers": "a pipeline of diffusers, or network, scheduler and timesteps where it has none",
    "peft": "the LoRA adapter alone, for peft",
}
"""The formats, and what is written."""

WRITERS = {"safetensors": "weights:to_safetensors", "onnx": "graphs:to_onnx", "torch-export": "graphs:to_torch_export",
           "hf": "hugging_face:to_hf", "diffusers": "pipelines:to_diffusers", "peft": "adapters:to_peft"}

MARK = "export.json"
"""The file that says a folder was written by an export, and how its check came out."""


class Cell(NamedTuple):
    """Whether a target is written in a format, and what is written or why it is not."""

    works: bool
    text: str


def _yes(text: str) -> Cell:
    return Cell(True, text)


def _no(text: str) -> Cell:
    return Cell(False, text)


_FLAT, _OWN = _yes("its weights under their own names"), _yes("the files that it was saved in")
_NO_STEPS = _no("it is no few-step sampler")
_NO_LORA = _no("its network cannot carry adapters there")
_LORA = _yes("the adapter, if its network carries one")
_NO_CONFIG = _no("no configuration of transformers describes it")
_NO_NETWORK = _no("it is data, not a network")


def _row(outputs: str, safetensors: Cell, graph: bool | str, hf: Cell, diffusers: Cell = _NO_STEPS,
         peft: Cell = _NO_LORA) -> dict[str, Cell]:
    graphs = _yes(outputs) if graph is True else _no(str(graph))
    return {"safetensors": safetensors, "onnx": graphs, "torch-export": graphs, "hf": hf, "diffusers": diffusers,
            "peft": peft}


TABLE: dict[str, dict[str, Cell]] = {
    "Classifier": _row("`image` to `logits`", _FLAT, True, _yes("a classifier of transformers"), peft=_LORA),
    "Encoder": _row("`image` to `features`", _FLAT, True, _yes("a vision model of transformers"), peft=_LORA),
    "TextClassifier": _row("`input_ids`, `attention_mask` to `logits`", _FLAT, True,
                           _yes("a classifier of transformers and its tokenizer"), peft=_LORA),
    "TextEncoder": _row("`input_ids`, `attention_mask` to `features`", _FLAT, True,
                        _yes("a text model of transformers and its tokenizer"), peft=_LORA),
    "CausalLM": _row("`input_ids`, `attention_mask` to `logits`", _FLAT, True,
                     _yes("model, tokenizer and generation config"), peft=_LORA),
    "SpeechEncoder": _row("`audio` to `last_hidden_state`", _FLAT, True, _yes("a speech encoder of transformers"),
                          peft=_LORA),
    "Pruned": _row("`audio` to `last_hidden_state`", _OWN, True,
                   _no("its layers have widths of their own, which no configuration of transformers describes")),
    "Denoiser": _row("`x`, `t`, `condition` to `x0`", _FLAT, True, _NO_CONFIG,
                     _no("it is a denoiser without the times of its steps; a few-step sampler is written")),
    "Density": _row("`x` (and `u`) to `log_prob`", _FLAT, True, _NO_CONFIG),
    "Projected": _row("`image` to `features`, the projection included", _OWN, True,
                      _yes("its encoder, if that is a model of transformers")),
    "VectorClassifier": _row("`image` to `logits`", _OWN, True,
                             _no("no configuration of transformers describes learned prompts, projector and class "
                                 "vectors on a CLIP")),
    "LabelAugmented": _row("`image` to `logits`, from the head or the copies that its inference names", _OWN, True,
                           _no("no configuration of transformers describes a joint head; its model.safetensors is the "
                               "classifier alone")),
    "QuantizedModel": _row("what its network takes and gives, weights decoded", _yes("its packed file as it is"), True,
                           _yes("its network with decoded weights, if it is a model of transformers")),
    "FewStepSampler": _row("`noise` (and `renoise`, `condition`) to `x`, all steps", _OWN, True, _NO_CONFIG,
                           _yes("a pipeline, or network and scheduler, if its network is one of diffusers")),
    "SamplerLadder": _row("one rung, as a few-step sampler", _yes("one rung, as a few-step sampler"), True, _NO_CONFIG,
                          _yes("one rung, as a few-step sampler")),
    "LatentClasses": _row("`image` to `domains` and `posterior`", _OWN, True, _NO_CONFIG),
    "Clustering": _row("`image` to `probabilities` of the clusters", _OWN, True, _NO_CONFIG),
    "DistilledSet": _row("", _yes("pictures and labels, and a PNG of them"), "it is data, not a network",
                         _yes("a data set with image, label, soft_label and a picture to look at"), _NO_NETWORK,
                         _NO_NETWORK),
    "GraphSet": _row("", _yes("the graphs, also as plain tensors for torch_geometric"), "it is data, not a network",
                     _yes("a data set with one row a graph"), _NO_NETWORK, _NO_NETWORK),
    "SceneSet": _row("", _yes("parameters, and its meshes as OBJ or pictures as PNG"),
                     "a scene is looked at through cameras, it maps no input to an output", _no("it is a scene"),
                     _no("it is a scene"), _no("it is a scene")),
}
"""What each kind of result becomes in each format, or why it does not."""


@dataclass
class Exported:
    """Where an export lies, and what its check found."""

    folder: Path
    checks: dict[str, float]
    tolerance: float
    notes: tuple[str, ...] = field(default=())


def export(run: Path | str, to: str, out: Path | str | None = None, arch: str | None = None, opset: int | None = None,
           steps: int | None = None, force: bool = False) -> Exported:
    """Write the result of the finished `run` in the format `to` into `out`; by default RUN/export-FORMAT.

    What was written is loaded back and compared on an example batch before it takes its place; a failing check leaves
    everything as it was. `arch` builds a network that was given as module:callable, `opset` is that of ONNX, `steps`
    the rung of a ladder. `force` replaces an earlier export, and nothing else.

    Raises UnknownNameError for another format, RoleError for a result that is not written in it, StoreError where `run`
    is not finished or `out` exists, DamagedFileError where the check fails, MissingExtraError without a library.
    """
    check_format(to)
    place, about = place_of(run), read_about(run)
    row = row_of(about)
    refuse_senseless(row, to)
    require(opset is None or to == "onnx", f"--opset is for --to onnx, not for {to}")
    require(steps is None or row == "SamplerLadder", f"--steps picks the sampler of a ladder; this result is a "
            f"{about.target or row}")
    folder = Path(out).expanduser() if out is not None else _default(Path(run).expanduser(), to, steps)
    _check_free(folder, force)
    with preserved():
        target = load(place, arch)
        job = Job(target, row, about, place, _aside(folder), arch, opset)
        if row == "SamplerLadder":
            job.steps = _rung(target.rungs, steps)
            job.target, job.row = target[job.steps], "FewStepSampler"
        return _write(job, to, folder)


def check_format(to: str) -> None:
    """Raise UnknownNameError, with the nearest, for a format that there is not."""
    if to not in FORMATS:
        near = difflib.get_close_matches(to, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownNameError(f"there is no format '{to}'.{hint} The formats are {', '.join(FORMATS)}")


def row_of(about: About) -> str:
    """The row of `TABLE` that a result belongs to. Raises RoleError for one of which that is not known."""
    if about.target in TABLE:
        return about.target
    if about.target.startswith("Pruned"):
        return "Pruned"
    require(about.kind in TABLE, f"it is not known what a {about.target} of kind '{about.kind}' takes and gives, so it "
            f"cannot be exported; known are {', '.join(TABLE)}", RoleError)
    return about.kind


def refuse_senseless(row: str, to: str) -> None:
    """Raise RoleError, naming the formats that there are, where `row` is not written in the format `to`."""
    cell = TABLE[row][to]
    good = [name for name, other in TABLE[row].items() if other.works]
    require(cell.works, f"a {row} is not exported to {to}: {cell.text}. It is exported to {', '.join(good)}", RoleError)


def table() -> str:
    """`TABLE` in Markdown, for docs/guide/exports.md."""
    lines = [f"| result | {' | '.join(f'`{name}`' for name in FORMATS)} |", "|" + "---|" * (len(FORMATS) + 1)]
    for row, cells in TABLE.items():
        said = [cell.text if cell.works else f"no: {cell.text}" for cell in cells.values()]
        lines.append(f"| {row} | {' | '.join(said)} |")
    return "\n".join(lines)


def _default(run: Path, to: str, steps: int | None) -> Path:
    beside = run.parent if run.name == "target" else run
    return beside / f"export-{to}{'' if steps is None else f'-{steps}'}"


def _check_free(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    empty = folder.is_dir() and not any(folder.iterdir())
    ours = (folder / MARK).is_file()
    require(empty or ours, f"{folder} exists and is no earlier export, so it is not replaced; give another --out",
            StoreError)
    require(empty or force, f"{folder} exists; --force replaces this earlier export, --out writes elsewhere",
            StoreError)


def _rung(rungs: tuple[int, ...], steps: int | None) -> int:
    if steps is not None and steps not in rungs:
        raise ConfigError(f"this ladder has no sampler of {steps} steps; --steps is one of "
                          f"{', '.join(map(str, rungs))}")
    return rungs[-1] if steps is None else steps


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.tmp")


def _write(job: Job, to: str, folder: Path) -> Exported:
    """Write aside, check, add the card, and rename."""
    shutil.rmtree(job.folder, ignore_errors=True)
    module, _, name = WRITERS[to].partition(":")
    writer: Callable[[Job], Made] = getattr(import_module(f"stillhouse.deploy.formats.{module}"), name)
    try:
        job.folder.mkdir(parents=True)
        made = writer(job)
        _check(made, to)
        write_text(job.folder / "README.md", card.card(job, made, to))
        write_text(job.folder / MARK, json.dumps({"format": to, "system": job.about.system, "result": job.row,
                                                  "tolerance": made.tolerance, "deviations": made.checks}, indent=1))
        _place(job.folder, folder)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(job.folder, ignore_errors=True)
    return Exported(folder, made.checks, made.tolerance, made.notes)


def _check(made: Made, to: str) -> None:
    wrong = [f"{name}: {value:.3g}" for name, value in made.checks.items()
             if not (math.isfinite(value) and value <= made.tolerance)]
    require(bool(made.checks) and not wrong, f"what was written as {to} does not give what the result gives "
            f"({'; '.join(wrong[:3])}; allowed is {made.tolerance:g}). Nothing was kept", DamagedFileError)


def _place(aside: Path, folder: Path) -> None:
    """Put `aside` in the place of `folder`, which is an earlier export, empty, or not there."""
    before = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.replace(before)
    try:
        aside.replace(folder)
    except OSError:
        if before.exists():
            before.replace(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)
