"""The command `still`: list, show, run, verify, compare, report, taps, tour. Nothing imports torch until it has to."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg, configure

from stillhouse import __version__, catalog
from stillhouse.errors import ConfigError, Interrupted, RoleError, StillError, UnknownNameError

Slug = Annotated[str, arg(metavar="SLUG", help="name of a system, as `still list` shows it")]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the command line; leaves with 0, 1 (it failed), 2 (wrong usage) or 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sys.exit(_explain(error))


def _explain(error: BaseException) -> int:
    """Print one paragraph about `error`; the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print(f"still: {error or 'interrupted'}", file=sys.stderr)
        return 130
    text = str(error)
    if not isinstance(error, StillError):
        text = f"{type(error).__name__}: {text} (this was not foreseen; --debug shows where it happened)"
    print(textwrap.fill(f"still: {text}", 100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    return 2 if isinstance(error, UnknownNameError | ConfigError) else 1


def _dispatch(words: list[str]) -> None:
    if words[:1] == ["run"] and len(words) > 1 and not words[1].startswith("-"):
        _run(words[1], words[2:])
        return
    commands: dict[str, Callable[..., Any]] = {
        "list": list_systems, "show": show, "run": run_help, "verify": verify, "compare": compare, "report": report,
        "taps": taps, "tour": tour, "version": version,
    }
    tyro.extras.subcommand_cli_from_dict(
        commands, args=words or ["--help"], prog="still", config=(FlagCreatePairsOff,),
        description="Published systems of distillation and learning without labels, on your models and data.")


# -------------------------------------------------------------------------------- list and show


def list_systems(family: str | None = None, built: bool = False, json: bool = False) -> None:
    """List the systems, whether they are built, and how their claims came out.

    Args:
        family: only this family, e.g. compression
        built: only those that are built
        json: as a JSON list of objects
    """
    if family is not None and family not in catalog.FAMILIES:
        raise UnknownNameError(f"there is no family '{family}'; the families are {', '.join(catalog.FAMILIES)}")
    chosen = [s for s in catalog.systems().values()
              if (family is None or s.family == family) and (s.built or not built)]
    if json:
        print(_json([{"number": s.number, "slug": s.slug, "family": s.family, "title": s.title, "year": s.year,
                      "arxiv": s.arxiv, "built": s.built, "verdict": s.verdict} for s in chosen]))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("no.", "slug", "family", "state", "claims", "title"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for s in chosen:
        state, verdict = ("[green]built[/]" if s.built else "[dim]planned[/]"), _coloured(s.verdict)
        table.add_row(f"{s.number:03d}", s.slug, s.family, state, verdict, f"{_plain(s.title)} ({s.year})")
    console = _console()
    console.print(table)
    console.print(f"{len(chosen)} systems, {sum(s.built for s in chosen)} built. More on one: still show SLUG")


def _console() -> Any:
    """A console that breaks no line of a table when its output is read by a program."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=240)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _coloured(verdict: str) -> str:
    colours = {"holds": "green", "leans": "yellow", "fails": "red"}
    return f"[{colours.get(verdict.split(' ')[0], 'dim')}]{verdict}[/]" if verdict else ""


def show(slug: Positional[Slug]) -> None:
    """Show what a system does: what it distils into what, equations, roles, config, claims, how to run it."""
    system = catalog.find(slug)
    print(f"{system.number:03d} {system.slug}: {system.title} ({system.year}), arXiv {system.arxiv}")
    if not system.built:
        print("\nPlanned, not built yet.")
        return
    module = catalog.load(system.slug)
    from stillhouse.protocols import ROLES

    print(f"\n{system.moves}\n\n{inspect.getdoc(module)}\n\nRoles")
    roles = _roles(module)
    for name, parameter in roles.items():
        need = "" if parameter.default is inspect.Parameter.empty else " (may be left out)"
        print(f"  --{name:<12} {_kind(parameter)}: {ROLES.get(name, '')}{need}\n{'':17}{_offers(module, name)}")
    print("\nConfig (the published defaults; `EMBEDDED` is the small experiment's)")
    print(textwrap.indent(inspect.getsource(module.Config).split("def ")[0].rstrip(), "  "))
    print(textwrap.indent(f"EMBEDDED = {module.EMBEDDED}", "  ", lambda line: True))
    _show_claims(system, module)
    flags = " ".join(f"--{n} …" for n, p in roles.items() if p.default is inspect.Parameter.empty)
    print(f"\nRun it\n  still run {system.slug}{'':<12} the embedded experiment\n  still run {system.slug} {flags}\n"
          f"  from {system.module} import distill, Config")


def _show_claims(system: catalog.System, module: Any) -> None:
    outcome = system.outcome
    print("\nClaims" + ("" if outcome else " (not measured yet)"))
    measured = {c["sentence"]: c for c in outcome["claims"]} if outcome else {}
    for claim in module.CLAIMS:
        found = measured.get(claim.sentence)
        line = f"  - {claim.sentence}"
        if found and found["mean"] is not None:
            low, high = (("-inf" if v is None else f"{v:.3g}") for v in found["interval"])
            line += f": {found['verdict']} (slack {found['mean']:.3g}, 95% interval {low} to {high})"
        elif found:
            line += f": {found['verdict']}"
        print(line)
    if outcome:
        print(f"  measured over seeds {outcome['seeds']}" + (" (the source has changed since)"
              if outcome["hash"] != system.hash else ""))
    if system.remarks:
        print("\n" + textwrap.fill(system.remarks, 100, initial_indent="  ", subsequent_indent="  "))


def _roles(module: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(module.distill).parameters
    return {name: p for name, p in parameters.items() if name not in ("config", "run")}


def _kind(parameter: inspect.Parameter) -> str:
    return str(parameter.annotation).removesuffix(" | None").removeprefix("stillhouse.protocols.")


def _offers(module: Any, role: str) -> str:
    """First line of the docstring of the protocol that a role is annotated with."""
    import typing

    hint = typing.get_type_hints(module.distill)[role]
    kinds = [k for k in (hint, *typing.get_args(hint)) if getattr(k, "__module__", "") == "stillhouse.protocols"]
    return (inspect.getdoc(kinds[0]) or "").splitlines()[0] if kinds else ""


# -------------------------------------------------------------------------------- run


def run_help(slug: Positional[Slug]) -> None:
    """Run a system: alone its embedded experiment, with roles given (--teacher … --data …) on your own models.

    `still run SLUG --help` shows that system's roles and settings.
    """
    _run(slug, [])


def _run(slug: str, words: list[str]) -> None:
    system = catalog.find_built(slug)
    words = _with_saved_words(words)
    module = catalog.load(system.slug)
    roles = _roles(module)
    given = {name for name in roles if any(w == f"--{name}" or w.startswith(f"--{name}=") for w in words)}
    options = _parse(system, module, roles, words, bool(given))
    from stillhouse.run import DryRunEnded, Run, fingerprint

    resuming = options.resume is not None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (resuming or options.out):
        raise ConfigError("several processes need one folder between them: give --out")
    folder = Path(options.resume) if resuming else Path(options.out) if options.out else _free_folder(system.slug)
    kwargs: dict[str, Any] = {}
    if given:
        kwargs = _resolve(module, roles, {n: getattr(options, n) for n in roles if getattr(options, n) is not None},
                          options)
    elif options.config != module.EMBEDDED and any(w.startswith("--config.") for w in words):
        raise ConfigError(f"the embedded experiment of {system.slug} keeps its own config, so that its arms stay "
                          f"comparable; --config goes with roles ({', '.join('--' + n for n in roles)})")
    run = Run.open(None if options.dry_run else folder, system=system.slug, seed=options.seed, device=options.device,
                   config=options.config, resume=resuming, precision=options.precision, workers=options.workers,
                   fingerprint={n: fingerprint(v) for n, v in kwargs.items()}, deterministic=options.deterministic,
                   checkpoint_seconds=options.checkpoint_seconds, quiet=options.quiet, dry=options.dry_run,
                   full=options.full)
    if run.first and not options.dry_run and not resuming:
        (folder / "command.json").write_text(json.dumps(words), encoding="utf-8")
    try:
        with run:
            if given:
                _move(kwargs, run.device)
                target = module.distill(**kwargs, config=options.config, run=run)
                if run.first:
                    _save(target, folder, system.slug)
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


def _parse(system: catalog.System, module: Any, roles: dict[str, inspect.Parameter], words: list[str],
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

    def option(kind: Any, default: Any, text: str) -> tuple[Any, Any]:
        return Annotated[kind, arg(help=text)], dataclasses.field(default=default)

    fields: list[tuple[str, Any, Any]] = [
        (name, *option(str | None, None, f"{ROLES.get(name, '')} ({_kind(p)}): {_offers(module, name)}"))
        for name, p in roles.items()]
    fields += [(name, *rest) for name, rest in {
        "config": option(module.Config, presets[chosen], "settings of the system"),
        "preset": option(str, chosen, f"where the settings start from: {' or '.join(presets)}"),
        "arch": option(str | None, None, "module:callable that builds the network for .safetensors weights"),
        "size": option(int | None, None, "side length to which pictures of a folder are resized"),
        "conditional": option(bool, False, "labels of pictures become the conditions of a diffusion model"),
        "limit_broken": option(float, 0.0, "part of the files or lines of a data set that may be unreadable"),
        "tokenizer": option(str | None, None, "folder of a tokenizer; default: that of the first model given as hf:"),
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
    kind = dataclasses.make_dataclass("Options", fields)
    description = f"{system.title} ({system.year}). {system.moves}. Without roles: the embedded experiment."
    return tyro.cli(configure(FlagCreatePairsOff)(kind), args=words, prog=f"still run {system.slug}",
                    description=description)


def _resolve(module: Any, roles: dict[str, inspect.Parameter], given: dict[str, str], options: Any) -> dict[str, Any]:
    """Models and data for the roles, from what was typed."""
    absent = [n for n, p in roles.items() if p.default is inspect.Parameter.empty and n not in given]
    if absent:
        raise RoleError(f"these roles are needed too: {', '.join('--' + n for n in absent)}. `still show "
                        f"{module.__name__.rpartition('.')[2].replace('_', '-')}` says what each must offer.")
    import typing

    from stillhouse import protocols
    from stillhouse.data.readers import read_data
    from stillhouse.hub.models import resolve_model
    from stillhouse.zoo import MODELS

    hints = typing.get_type_hints(module.distill)
    resolved: dict[str, Any] = {}
    for name, text in given.items():
        kinds = [k for k in (hints[name], *typing.get_args(hints[name])) if k is not type(None)]
        several = any(typing.get_origin(k) in (list, tuple, typing.get_origin(Sequence[int])) for k in kinds)
        inner = [a for k in kinds for a in typing.get_args(k)] if several else kinds
        kind = next((k for k in inner if _is_data(k) or k in protocols.PROBES or k == protocols.Network), inner[0])
        texts = text.split(",") if several else [text]
        if _is_data(kind):
            tokenizer = _tokenizer(given, options) if kind is protocols.TokenPairs else None
            values = [read_data(t, kind, size=options.size, limit_broken=options.limit_broken, tokenizer=tokenizer,
                                conditional=options.conditional)
                      for t in texts]
        elif inspect.isclass(kind) and hasattr(kind, "load") and kind not in protocols.PROBES:
            values = [kind.load(t) for t in texts]
        else:
            values = [resolve_model(t, kind, arch=options.arch, zoo=MODELS, seed=options.seed) for t in texts]
        resolved[name] = values if several else values[0]
    return resolved


def _tokenizer(given: dict[str, str], options: Any) -> Any:
    """The tokenizer named by --tokenizer, or that of the first model given as hf:…; None if there is neither."""
    named = [options.tokenizer] if options.tokenizer else [
        text.removeprefix("hf:") for text in given.values() if text.startswith("hf:")]
    if not named:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(named[0], local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RoleError(f"there is no tokenizer in {named[0]} ({str(error).splitlines()[0]}); give --tokenizer FOLDER"
                        ) from error


def _is_data(kind: Any) -> bool:
    from stillhouse.protocols import OFFERS

    return kind in OFFERS


def _move(kwargs: dict[str, Any], device: Any) -> None:
    from stillhouse.protocols import modules_of

    for value in kwargs.values():
        for module in modules_of(value):
            module.to(device)


def _free_folder(slug: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{slug}-{number}").exists():
        number += 1
    return folder


def _save(target: Any, folder: Path, slug: str) -> None:
    """Keep the target and say where it is."""
    from stillhouse.store import save_tree

    where = folder / "target"
    if hasattr(target, "state_dict") and not hasattr(target, "save"):
        path = save_tree(where / "model.safetensors", dict(target.state_dict()))
        use = f"stillhouse.store.load_tree({str(path)!r}) gives the weights for load_state_dict"
    else:
        target.save(where)
        own = hasattr(target, "load")
        use = f"load it with {type(target).__name__}.load({str(where)!r})" if own else (
            f"stillhouse.hub.models.resolve_model({str(where)!r}) reads it back")
    print(f"{slug}: the result is in {where}\n  {use}\n  curves and pictures: still report {folder}")


def _table(module: Any, arms: dict[str, dict[str, float]], folder: Path) -> None:
    """Arms by metrics, and how each claim stands with this one seed."""
    from rich.table import Table

    metrics = list(dict.fromkeys(m for values in arms.values() for m in values))
    table = Table("arm", *metrics, box=None, pad_edge=False)
    for arm, values in arms.items():
        table.add_row(arm, *(f"{values[m]:.4g}" if m in values else "" for m in metrics))
    console = _console()
    console.print(table)
    for claim in module.CLAIMS:
        try:
            slack = float(claim.slack(arms))
        except KeyError:
            continue
        mark = "[dim]report[/]" if claim.report else "[green]holds[/]" if slack > 0 else "[red]does not hold[/]"
        console.print(f"  {mark} with this seed: {_plain(claim.sentence)} (slack {slack:.3g})")
    console.print(f"one seed proves little; five: still verify {_slug(module)}\nreport: still report {folder}")


def _slug(module: Any) -> str:
    return next(s.slug for s in catalog.systems().values() if s.number == module.NUMBER)


# -------------------------------------------------------------------------------- taps


EXAMPLES = ("classifier", "encoder", "causal-lm", "denoiser")


def taps(model: Positional[str], role: Literal["classifier", "encoder", "causal-lm", "denoiser"] = "encoder",
         shape: tuple[int, ...] = (3, 32, 32), arch: str | None = None) -> None:
    """List what can be read inside a model: the path and output shape of every module, in the order of their calls.

    Args:
        model: module:callable, hf:FOLDER, diffusers:FOLDER, file.safetensors, zoo:NAME or an embedded network
        role: what the model is, which says what one example looks like
        shape: of one picture or sample, e.g. 3 224 224; of token ids, the length: 16
        arch: module:callable that builds the network, for weights in a file
    """
    if not shape or min(shape) < 1:
        raise ConfigError(f"--shape takes positive sizes of one example, not {' '.join(map(str, shape))}")
    import torch

    from stillhouse import protocols
    from stillhouse.hub.models import resolve_model
    from stillhouse.parts.taps import list_taps
    from stillhouse.zoo import MODELS

    kind = {"classifier": protocols.Classifier, "encoder": protocols.Encoder, "causal-lm": protocols.CausalLM,
            "denoiser": protocols.Denoiser}[role]
    network = resolve_model(model, kind, arch=arch, zoo=MODELS)
    example: Any = torch.zeros(1, *shape)
    if role == "causal-lm":
        example = {"input_ids": torch.zeros(1, shape[-1], dtype=torch.long)}
    elif role == "denoiser":
        example = {"x_t": example, "t": torch.full((1,), 0.5)}
    try:
        found = list_taps(network, example)
    except StillError:
        raise
    except Exception as error:
        raise RoleError(f"{model} could not process one example of shape {shape} as {role}: {type(error).__name__}: "
                        f"{error}. Give --shape, and --role one of {', '.join(EXAMPLES)}") from error
    from rich.table import Table

    kinds = {path: type(module).__name__ for path, module in network.named_modules()}
    table = Table("path", "output (first is the batch)", "module", box=None, pad_edge=False)
    for path, size in found.items():
        table.add_row(path or "(the model)", " x ".join(map(str, size)), kinds[path])
    _console().print(table)


# -------------------------------------------------------------------------------- verify, report, tour, version


def verify(slugs: Positional[tuple[Slug, ...]] = (), all: bool = False, seeds: int = 5, first_seed: int = 0,
           full: bool = False, workers: int = 2, out: Path | None = None) -> None:
    """Measure the claims of systems over several seeds and write the outcomes to results/.

    Finished seeds and arms are kept in the cache, so an interrupted verification goes on where it was.

    Args:
        slugs: the systems to verify
        all: every built system
        seeds: how many seeds
        first_seed: the first of them; outcomes are written only from 0 (use 100 and up while tuning)
        full: the extended arms as well
        workers: worker processes, one thread each
        out: folder of the outcomes instead of results/
    """
    from stillhouse.verify import verify as measure

    names = [s.slug for s in catalog.systems().values() if s.built] if all else list(slugs)
    if not names:
        raise ConfigError("name at least one system, or give --all")
    if seeds < 1:
        raise ConfigError(f"--seeds must be 1 or more, not {seeds}")
    where = out or (catalog.results_folder() if first_seed == 0 else None)
    outcomes = measure(names, range(first_seed, first_seed + seeds), full, where, workers)
    for outcome in outcomes:
        _print_outcome(outcome)
    if any(outcome["crashed"] for outcome in outcomes):
        raise StillError("some arms crashed; their messages are above")


def _print_outcome(outcome: dict[str, Any]) -> None:
    from rich.table import Table

    from stillhouse.evaluate.claims import interval

    console = _console()
    console.print(f"\n[bold]{outcome['slug']}[/]: {_coloured(outcome['verdict'])}, seeds {outcome['seeds']}, "
                  f"{sum(outcome['seconds']) / len(outcome['seconds']):.0f} s a seed")
    metrics = list(dict.fromkeys(m for values in outcome["arms"].values() for m in values))
    table = Table("arm", *metrics, box=None, pad_edge=False)
    for arm, values in outcome["arms"].items():
        cells = []
        for m in metrics:
            seen = [v for v in values.get(m, []) if v is not None]
            mean, low, high = interval(seen) if seen else (0.0, 0.0, 0.0)
            cells.append(f"{mean:.4g} ± {(high - low) / 2:.2g}" if seen else "")
        table.add_row(arm, *cells)
    console.print(table)
    for claim in outcome["claims"]:
        slack = " ".join("nan" if v is None else f"{v:.3g}" for v in claim["slack"])
        console.print(f"  {_coloured(claim['verdict'])}: {_plain(claim['sentence'])} (slack {slack})")
    for where, text in outcome["crashed"].items():
        console.print(f"  [red]crashed[/] {where}: {_plain(text)}")


def compare(slugs: Positional[tuple[Slug, ...]], seeds: int = 3, ground: str | None = None, workers: int = 2,
            out: Path | None = None) -> None:
    """Compare systems that share a ground: the same models, data, budget and measures; one table and one picture.

    Baselines of the ground enter too. Systems that share no ground are refused, with the reason.

    Args:
        slugs: the systems to compare
        seeds: how many paired seeds
        ground: the ground, where the systems share several
        workers: worker processes, one thread each
        out: folder of the picture and the figures; default: runs/compare-GROUND
    """
    from stillhouse.compare import compare as measure
    from stillhouse.compare import write

    if seeds < 1:
        raise ConfigError(f"--seeds must be 1 or more, not {seeds}")
    comparison = measure(slugs, range(seeds), ground, workers)
    picture = write(comparison, out or Path("runs") / f"compare-{comparison['ground']}")
    _print_comparison(comparison)
    print(f"picture: {picture}")


def _print_comparison(comparison: dict[str, Any]) -> None:
    from rich.table import Table

    from stillhouse.compare import gains
    from stillhouse.evaluate.claims import interval

    console, (headline, *_) = _console(), comparison["better"]
    console.print(f"\n[bold]{comparison['title']}[/]. {comparison['sentence']} Seeds {comparison['seeds']}.\n")
    reference = comparison["baselines"][-1]
    table = Table("", *comparison["better"], f"{headline}: better than {reference} by", box=None, pad_edge=False)
    for arm, values in comparison["arms"].items():
        cells = []
        for metric in comparison["better"]:
            mean, low, high = interval([v for v in values.get(metric, []) if v is not None])
            cells.append(f"{mean:.4g} ± {(high - low) / 2:.2g}")
        gain, low, high = gains(comparison, arm)
        table.add_row(arm, *cells, "" if arm == reference else f"{gain:.3g} ({low:.3g} to {high:.3g})")
    console.print(table)


def report(folder: Positional[Path] = Path("runs"), out: Path | None = None) -> None:
    """Write one self-contained HTML page about the systems, their outcomes and the runs in a folder.

    Args:
        folder: a run folder, or a folder of run folders
        out: the page to write; default: report.html in that folder
    """
    from stillhouse.report import write_report

    print(f"report: {write_report(folder, out or folder / 'report.html')}")


def tour(out: Path = Path("runs/tour"), seed: int = 0, quiet: bool = False) -> None:
    """The main job on the embedded digits, a short tour through the other built systems, and a report.

    Args:
        out: folder for the runs and the report
        seed: seed of everything random
        quiet: no progress
    """
    from stillhouse.tour import tour as go

    go(out, seed, quiet)


def version() -> None:
    """Print the version."""
    print(__version__)


