"""`still run`: the command line of a system, made from its roles and its Config."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, configure

from stillhouse import catalog
from stillhouse.cli import tables
from stillhouse.cli.resolving import move, resolve_roles, tokenizer_of
from stillhouse.cli.words import Slug, kind, offers, roles
from stillhouse.errors import ConfigError, Interrupted, UnknownNameError, require

TEXT = ("CausalLM", "Seq2Seq", "TextClassifier", "TextEncoder")
"""Roles whose models need a tokenizer."""


def run_help(slug: Positional[Slug]) -> None:
    """Run a system: alone its embedded experiment, with roles given (--teacher … --data …) on your own models.

    `still run SLUG --help` shows that system's roles and settings.
    """
    run(slug, [])


def run(slug: str, words: list[str]) -> None:
    system = catalog.find_built(slug)
    words = _with_saved_words(words)
    module = catalog.load(system.slug)
    wanted = roles(module)
    given = {name for name in wanted if any(w == f"--{name}" or w.startswith(f"--{name}=") for w in words)}
    options = _parse(system, module, wanted, words, bool(given))
    from stillhouse.deploy.targets import about_run
    from stillhouse.run import DryRunEnded, Run, fingerprint

    resuming = options.resume is not None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (resuming or options.out):
        raise ConfigError("several processes need one folder between them: give --out")
    folder = Path(options.resume) if resuming else Path(options.out) if options.out else _free_folder(system.slug)
    kwargs: dict[str, Any] = {}
    typed: dict[str, str] = {}
    watch = None
    if given:
        typed = {n: getattr(options, n) for n in wanted if getattr(options, n) is not None}
        kwargs = resolve_roles(module, wanted, typed, options)
        about = about_run(system.slug, kwargs, options.config, options.seed, typed)
        tokenizer = tokenizer_of(typed, options) if about.kind in TEXT else None
        held, watch = _evaluation(options, about, kwargs, tokenizer)
    elif options.eval is not None:
        raise ConfigError("--eval scores a result on your data; it goes with roles. The embedded experiment measures "
                          "its arms itself")
    elif options.config != module.EMBEDDED and any(w.startswith("--config.") for w in words):
        raise ConfigError(f"the embedded experiment of {system.slug} keeps its own config, so that its arms stay "
                          f"comparable; --config goes with roles ({', '.join('--' + n for n in wanted)})")
    run = Run.open(None if options.dry_run else folder, system=system.slug, seed=options.seed, device=options.device,
                   config=options.config, resume=resuming, precision=options.precision, workers=options.workers,
                   fingerprint={n: fingerprint(v) for n, v in kwargs.items()}, deterministic=options.deterministic,
                   checkpoint_seconds=options.checkpoint_seconds, quiet=options.quiet, dry=options.dry_run,
                   full=options.full, evaluate=watch)
    if run.first and not options.dry_run and not resuming:
        (folder / "command.json").write_text(json.dumps(words), encoding="utf-8")
    try:
        with run:
            if given:
                move(kwargs, run.device)
                target = module.distill(**kwargs, config=options.config, run=run)
                if run.first:
                    _keep(target, folder / "target", about, tokenizer)
                    if held is not None:
                        _score(target, folder, about, options, held, kwargs.get("network"), run.device)
            else:
                arms = module.experiment(run)
                if run.first:
                    _table(module, arms, folder)
    except DryRunEnded as ended:
        print(f"dry run: {ended}")
    except Interrupted as stop:
        if str(stop) == "stopped":
            raise
        raise Interrupted(f"{stop}; continue with: still run {system.slug} --resume {folder}") from stop


def _with_saved_words(words: list[str]) -> list[str]:
    """The words of an interrupted run, in front of those given now, if --resume is among them."""
    for i, word in enumerate(words):
        folder = words[i + 1] if word == "--resume" and i + 1 < len(words) else word.removeprefix("--resume=")
        if word == "--resume" or word.startswith("--resume="):
            saved = Path(folder) / "command.json"
            if saved.is_file():
                return [*json.loads(saved.read_text(encoding="utf-8")), *words]
    return words


def _parse(system: catalog.System, module: Any, wanted: dict[str, inspect.Parameter], words: list[str],
           own: bool) -> Any:
    """The options of one system as a dataclass made from its roles and Config, parsed by tyro."""
    from stillhouse.protocols import ROLES

    presets = getattr(module, "PRESETS", {"paper": module.Config(), "small": module.EMBEDDED})
    chosen = "paper" if own else "small"
    for i, word in enumerate(words):
        if word.startswith("--preset="):
            chosen = word.partition("=")[2]
        elif word == "--preset" and i + 1 < len(words):
            chosen = words[i + 1]
    if chosen not in presets:
        raise UnknownNameError(f"there is no preset '{chosen}' of {system.slug}; there is {', '.join(presets)}")

    def option(typed: Any, default: Any, text: str) -> tuple[Any, Any]:
        return Annotated[typed, arg(help=text)], dataclasses.field(default=default)

    fields: list[tuple[str, Any, Any]] = [
        (name, *option(str | None, None, f"{ROLES.get(name, '')} ({kind(p)}): {offers(module, name)}"))
        for name, p in wanted.items()]
    fields += [(name, *rest) for name, rest in {
        "config": option(module.Config, presets[chosen], "settings of the system"),
        "preset": option(str, chosen, f"where the settings start from: {' or '.join(presets)}"),
        "arch": option(str | None, None, "module:callable that builds the network for .safetensors weights"),
        "size": option(int | None, None, "side length to which pictures are resized; of sounds, the number of samples"),
        "columns": option(str | None, None, "which columns of a table are the fields: image=img,label=fine_label"),
        "length": option(int, 512, "most tokens of a text, or the window that plain text is cut into"),
        "conditional": option(bool, False, "labels of pictures become the conditions of a diffusion model"),
        "limit_broken": option(float, 0.0, "part of the files or lines of a data set that may be unreadable"),
        "tokenizer": option(str | None, None, "folder of a tokenizer; default: that of the first model given as hf:"),
        "eval": option(str | None, None, "labelled or held-out data: the result is scored on it, and the student too, "
                       "about ten times a stage"),
        "eval_columns": option(str, "", "which columns of the table of --eval are which fields: image=img,label=kind"),
        "out": option(str | None, None, "folder of the run; default: a new one under runs/"),
        "resume": option(str | None, None, "folder of an interrupted run to go on with"),
        "seed": option(int, 0, "seed of everything random"),
        "device": option(str, "cpu", "cpu, cuda, cuda:1, mps or auto"),
        "precision": option(Literal["float32", "bf16"], "float32", "bf16 uses autocast"),
        "deterministic": option(bool, False, "exact resume on a GPU too"),
        "full": option(bool, False, "the extended arms of the embedded experiment as well"),
        "dry_run": option(bool, False, "check the input, measure a few steps, save nothing"),
        "workers": option(int, 0, "processes that read data ahead; they change no result"),
        "checkpoint_seconds": option(float, 60.0, "time between checkpoints"),
        "quiet": option(bool, False, "no progress"),
    }.items()]
    options = dataclasses.make_dataclass("Options", fields)
    description = f"{system.title} ({system.year}). {system.moves}. Without roles: the embedded experiment."
    return tyro.cli(configure(FlagCreatePairsOff)(options), args=words, prog=f"still run {system.slug}",
                    description=description)


def _free_folder(slug: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{slug}-{number}").exists():
        number += 1
    return folder


def _evaluation(options: Any, about: Any, kwargs: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """The data of --eval, checked, and the scores of the student that are logged while it is trained."""
    if options.eval is None:
        require(not options.eval_columns, "--eval-columns say what the columns of --eval are; give --eval")
        return None, None
    from stillhouse.data.readers import parse_columns
    from stillhouse.deploy.predict import read_for
    from stillhouse.deploy.scores import check_fit, watcher
    from stillhouse.run import processes

    held = read_for(options.eval, about, labelled=True, size=options.size, tokenizer=tokenizer,
                    limit_broken=options.limit_broken, length=options.length,
                    columns=parse_columns(options.eval_columns) if options.eval_columns else None)
    student = kwargs.get("student")
    device = processes.connect(options.device)
    check_fit(student, about, held)
    return held, watcher(about, held, student, device=device)


def _score(target: Any, folder: Path, about: Any, options: Any, held: Any, network: Any, device: Any) -> None:
    """Scores of the saved target, kept beside it and printed."""
    from stillhouse.cli.using import print_scores
    from stillhouse.deploy.scores import score
    from stillhouse.deploy.targets import note
    from stillhouse.store import write_text

    scores = score(target, about, held, device=device, network=network)
    about.metrics = {name: float(value) for name, value in scores.items() if isinstance(value, float | int)}
    note(about, folder / "target")
    write_text(folder / "eval.json", json.dumps({"data": options.eval, **scores}, indent=1))
    print_scores(scores, options.eval)


def _keep(target: Any, where: Path, about: Any, tokenizer: Any = None) -> None:
    """Save the target and say where it is and how it is used."""
    from stillhouse.cli.using import next_commands
    from stillhouse.deploy.targets import save

    save(target, where, about, tokenizer)
    print(f"{about.system}: the result is in {where}\n  in Python: stillhouse.load({str(where.parent)!r})")
    for purpose, command in [*next_commands(where.parent, target, about),
                             ("curves and pictures", f"still report {where.parent}")]:
        print(f"  {purpose}: {command}")


def _table(module: Any, arms: dict[str, dict[str, float]], folder: Path) -> None:
    """Arms by metrics, and how each claim stands with this one seed."""
    from rich.table import Table

    metrics = list(dict.fromkeys(m for values in arms.values() for m in values))
    table = Table("arm", *metrics, box=None, pad_edge=False)
    for arm, values in arms.items():
        table.add_row(arm, *(f"{values[m]:.4g}" if m in values else "" for m in metrics))
    console = tables.console()
    console.print(table)
    for claim in module.CLAIMS:
        try:
            slack = float(claim.slack(arms))
        except KeyError:
            continue
        mark = "[dim]report[/]" if claim.report else "[green]holds[/]" if slack > 0 else "[red]does not hold[/]"
        console.print(f"  {mark} with this seed: {tables.plain(claim.sentence)} (slack {slack:.3g})")
    console.print(f"one seed proves little; five: still verify {_slug_of(module)}\nreport: still report {folder}")


def _slug_of(module: Any) -> str:
    return next(s.slug for s in catalog.systems().values() if s.number == module.NUMBER)
