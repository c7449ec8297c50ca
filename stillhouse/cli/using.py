"""`still predict` and `still eval`: what a finished run gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from stillhouse.cli import tables
from stillhouse.errors import ConfigError


def predict(run: Positional[str], data: str | None = None, out: Path | None = None, batch: int = 64,
            device: str = "cpu", arch: str | None = None, size: int | None = None, samples: int = 16, seed: int = 0,
            conditions: str | None = None, temperature: float = 0.0, tokens: int | None = None,
            tokenizer: str | None = None, columns: str = "", quiet: bool = False) -> None:
    """Write what the result of a run says about data: classes, clusters, features, answers; or what it draws.

    Args:
        run: folder of a finished run
        data: what to predict on, as for `still run`; not needed by samplers, densities and scenes
        out: the file to write; default: in the run's folder
        batch: samples at a time
        device: cpu, cuda, cuda:1, mps or auto
        arch: module:callable that builds the network, where it was given as one
        size: side length to which pictures of a folder are resized, and of scenes; default: as trained on
        samples: how many are drawn
        seed: what is drawn depends on it
        conditions: of what is drawn: labels such as 0,1,2 or data with labels
        temperature: of drawn answers; 0 takes the most probable token
        tokens: most tokens of an answer
        tokenizer: folder of a tokenizer, where the result was saved without
        columns: which columns of a table are which fields, e.g. image=img,label=kind
        quiet: no progress
    """
    from stillhouse.data.readers import parse_columns
    from stillhouse.deploy import predict as making
    from stillhouse.deploy.targets import read_about
    from stillhouse.run import processes

    about = read_about(run)
    words = _tokenizer(run, about, tokenizer)
    target = _loaded(run, arch)
    sort = making.sort_of(target, about)
    content = None
    if data is not None and sort in ("samples", "scenes", "data"):
        if sort != "data":
            raise ConfigError(f"a result of {about.system} takes no --data; give --samples" if sort == "samples" else
                              f"a result of {about.system} takes no --data")
    elif data is not None:
        content = making.read_for(data, about, size=size, columns=parse_columns(columns) if columns else None)
    elif sort in ("classes", "clusters", "features", "text", "speech"):
        raise ConfigError(f"give --data: what the result of {about.system} is to predict on")
    where = out or Path(run) / making.FILES.get(sort, "")
    path = making.predict(
        target, about, content, where, batch=batch, device=processes.connect(device), samples=samples, seed=seed,
        conditions=None if conditions is None else making.read_conditions(conditions), temperature=temperature,
        tokens=tokens, tokenizer=words, size=size or 64, quiet=quiet)
    print(f"written: {path}" + (f" and {path.with_suffix('.png')}" if sort in ("samples", "scenes", "density")
                                and path.with_suffix(".png").is_file() else ""))


def evaluate(run: Positional[str], data: str, out: Path | None = None, batch: int = 64, device: str = "cpu",
             arch: str | None = None, size: int | None = None, steps: int = 1000, seed: int = 0,
             tokenizer: str | None = None, columns: str = "") -> None:
    """Score the result of a run on labelled or held-out data.

    Args:
        run: folder of a finished run
        data: what to score on, as for `still run`
        out: a .json file to write the scores to as well
        batch: samples at a time
        device: cpu, cuda, cuda:1, mps or auto
        arch: module:callable that builds the network, where it was given as one
        size: side length to which pictures of a folder are resized; default: as trained on
        steps: training steps of each fresh network, for a distilled set
        seed: of what is drawn
        tokenizer: folder of a tokenizer, where the result was saved without
        columns: which columns of a table are which fields, e.g. image=img,label=kind
    """
    from stillhouse.data.readers import parse_columns
    from stillhouse.deploy import predict as making
    from stillhouse.deploy.scores import score
    from stillhouse.deploy.targets import place_of, read_about
    from stillhouse.hub.models import builder
    from stillhouse.run import processes
    from stillhouse.store import write_text
    from stillhouse.zoo import MODELS

    about = read_about(run)
    if steps < 1:
        raise ConfigError(f"--steps must be 1 or more, not {steps}")
    content = making.read_for(data, about, labelled=True, size=size, tokenizer=_tokenizer(run, about, tokenizer),
                              columns=parse_columns(columns) if columns else None)
    target = _loaded(run, arch)
    network = builder(place_of(run), arch, MODELS) if about.target == "DistilledSet" else None
    scores = score(target, about, content, batch=batch, device=processes.connect(device), seed=seed, network=network,
                   steps=steps)
    if out is not None:
        write_text(out, json.dumps({"data": data, **scores}, indent=1))
    print_scores(scores, data)


def print_scores(scores: dict[str, Any], data: str) -> None:
    """A small table, with what each score is."""
    from rich.table import Table

    from stillhouse.deploy.scores import MEANING

    table = Table("score", "value", f"on {tables.plain(data)}", box=None, pad_edge=False)
    for name, value in scores.items():
        if isinstance(value, float | int):
            table.add_row(name, f"{value:.4g}", MEANING.get(name, ""))
    each = scores.get("per_class", {})
    for name in sorted(each, key=each.get)[:10]:
        table.add_row(f"  {tables.plain(name)}", f"{each[name]:.4g}", "accuracy on this class" + (
            f" (the lowest 10 of {len(each)})" if len(each) > 10 else ""))
    tables.console().print(table)


def next_commands(folder: Path, target: Any, about: Any) -> list[tuple[str, str]]:
    """What can be done with a result now: (what for, the command)."""
    from stillhouse.deploy.predict import sort_of
    from stillhouse.errors import StillError

    try:
        sort = sort_of(target, about)
    except StillError:
        sort = ""
    again = ""
    if "text" in (about.network or {}) and _is_code(about.network["text"]):
        again = f" --arch {about.network['text']}"
    found = []
    if sort == "data":
        found.append(("train on it", f"still run SLUG --labelled {folder / 'target'}"))
    elif sort in ("samples", "scenes", "density"):
        found.append(("pictures and samples", f"still predict {folder}{again}"))
    elif sort:
        found.append(("predictions", f"still predict {folder} --data DATA{again}"))
    if sort and sort != "scenes":
        found.append(("scores", f"still eval {folder} --data LABELLED{again}"))
    if sort:
        found.append(("for other libraries", f"still export {folder} --to {_format(sort, about)}{again}"))
    return found


def _format(sort: str, about: Any) -> str:
    """The format that most users of a result will want, of those in which it is written."""
    from stillhouse.deploy.export import TABLE, row_of

    works = [name for name, cell in TABLE[row_of(about)].items() if cell.works]
    known = "DiffusersNetwork" in json.dumps(about.network)
    wanted = {"text": "hf", "data": "hf", "samples": "diffusers" if known else "onnx"}.get(sort, "onnx")
    return wanted if wanted in works else works[0]


def _is_code(text: str) -> bool:
    from stillhouse.hub.models import EMBEDDED

    return text.partition(":")[0] not in {*EMBEDDED, "zoo"}


def _loaded(run: str, arch: str | None) -> Any:
    from stillhouse.deploy.targets import load

    return load(run, arch)


def _tokenizer(run: str, about: Any, named: str | None) -> Any:
    from stillhouse.deploy.targets import place_of

    if named is None and not about.tokenizer:
        return None
    folder = Path(named) if named is not None else place_of(run) / "tokenizer"
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"there is no tokenizer in {folder}: {str(error).splitlines()[0]}") from error
