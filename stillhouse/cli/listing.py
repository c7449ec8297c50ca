"""`still list` and `still show`."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from tyro.conf import Positional

from stillhouse import catalog
from stillhouse.cli import tables, words
from stillhouse.cli.words import Slug
from stillhouse.errors import UnknownNameError


def list_systems(family: str | None = None, built: bool = False, knowledge: str | None = None,
                 scheme: str | None = None, algorithm: str | None = None, json: bool = False) -> None:
    """List the systems, whether they are built, and how their claims came out.

    Args:
        family: only this family, e.g. compression
        built: only those that are built
        knowledge: only those that move response, feature or relation knowledge, a distribution, or training itself
        scheme: only offline, online or self distillation, or none (without a teacher)
        algorithm: only adversarial, multi-teacher, cross-modal, graph, attention, data-free, quantized, lifelong or nas
        json: as a JSON list of objects
    """
    if family is not None and family not in catalog.FAMILIES:
        raise UnknownNameError(f"there is no family '{family}'; the families are {', '.join(catalog.FAMILIES)}")
    chosen = [s for s in catalog.placed(knowledge, scheme, algorithm)
              if (family is None or s.family == family) and (s.built or not built)]
    if json:
        print(tables.as_json([{"number": s.number, "slug": s.slug, "family": s.family, "title": s.title, "year": s.year,
                      "arxiv": s.arxiv, "knowledge": s.knowledge, "scheme": s.scheme,
                      "algorithms": s.algorithms, "built": s.built, "verdict": s.verdict} for s in chosen]))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    mapped = bool(knowledge or scheme or algorithm)
    names = ("no.", "slug", *(("knowledge", "scheme", "algorithms") if mapped else ("family",)), "state", "claims")
    rows = []
    for s in chosen:
        place = (" ".join(s.knowledge), s.scheme, " ".join(s.algorithms)) if mapped else (s.family,)
        rows.append((f"{s.number:03d}", s.slug, *place, "built" if s.built else "planned", s.verdict))
    for i, name in enumerate(names):
        widest = max(len(name), *(len(row[i]) for row in rows)) if rows else len(name)
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=min(widest, 24), max_width=28)
    table.add_column("title", no_wrap=True, overflow="ellipsis")
    for s, (*cells, _, verdict) in zip(chosen, rows, strict=True):
        shown = "[green]built[/]" if s.built else "[dim]planned[/]"
        table.add_row(*cells, shown, tables.coloured(verdict), f"{tables.plain(s.title)} ({s.year})")
    console = tables.console()
    console.print(table)
    console.print(f"{len(chosen)} systems, {sum(s.built for s in chosen)} built. More on one: still show SLUG")


def show(slug: Positional[Slug]) -> None:
    """Show what a system does: what it distils into what, equations, roles, config, claims, how to run it."""
    system = catalog.find(slug)
    print(f"{system.number:03d} {system.slug}: {system.title} ({system.year}), arXiv {system.arxiv}")
    print(_place(system))
    if not system.built:
        print("\nPlanned, not built yet.")
        return
    module = catalog.load(system.slug)
    from stillhouse.protocols import ROLES

    print(f"\n{system.moves}\n\n{inspect.getdoc(module)}\n\nRoles")
    roles = words.roles(module)
    for name, parameter in roles.items():
        need = "" if parameter.default is inspect.Parameter.empty else " (may be left out)"
        print(f"  --{name:<12} {words.kind(parameter)}: {ROLES.get(name, '')}{need}\n{'':17}"
              f"{words.offers(module, name)}")
    print("\nConfig (the published defaults; `EMBEDDED` is the small experiment's)")
    print(textwrap.indent(inspect.getsource(module.Config).split("def ")[0].rstrip(), "  "))
    print(textwrap.indent(f"EMBEDDED = {module.EMBEDDED}", "  ", lambda line: True))
    _show_claims(system, module)
    flags = " ".join(f"--{n} …" for n, p in roles.items() if p.default is inspect.Parameter.empty)
    print(f"\nRun it\n  still run {system.slug}{'':<12} the embedded experiment\n  still run {system.slug} {flags}\n"
          f"  from {system.module} import distill, Config")


def _place(system: catalog.System) -> str:
    scheme = "no teacher" if system.scheme == "none" else f"{system.scheme} distillation"
    tags = f"; {', '.join(system.algorithms)}" if system.algorithms else ""
    return f"{' and '.join(system.knowledge)} knowledge, {scheme}{tags}"


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


