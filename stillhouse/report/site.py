"""Hooks of mkdocs: the pages of the site that are generated, one per system and the parts of every floor.

Everything is read from source, without importing a system: docstring, roles, config and its comments by `ast`, claims
and figures from results/. In a page, `{{ source module:name }}` stands for the source of that function or class.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from stillhouse import catalog
from stillhouse.protocols import ROLES
from stillhouse.report import charts_of
from stillhouse.report.charts import forest

ROOT = catalog.PACKAGE.parent
FLOORS = {
    "errors": "Named errors", "store": "Files", "protocols": "Roles and protocols", "measures": "Measures",
    "parts": "Parts", "data": "Data", "models": "Small models", "diffusion": "Diffusion", "run": "The run",
    "evaluate": "Evaluation", "hub": "Real models", "recipes": "Recipes", "zoo": "Zoo and grounds",
    "deploy": "Results, predictions, exports", "commands": "Commands",
}
"""The pages of the house, ground floor first."""

COMMANDS = ("catalog", "verify", "compare", "report", "report.charts", "report.tables", "testing", "advice", "tour",
            "cli", "cli.caching", "cli.choosing", "cli.exporting", "cli.listing", "cli.measuring", "cli.models",
            "cli.resolving", "cli.running", "cli.tables", "cli.using", "cli.words")
GUIDES = {"guide/which-method.md": "Which method?", "guide/your-own-models.md": "Your own models and data",
          "guide/exports.md": "Exports",
          "guide/caches.md": "Teachers that are large or far away",
          "guide/write-your-own.md": "Write your own system", "guide/from-paper-to-file.md": "From paper to file",
          "guide/benchmarks.md": "Benchmarks"}


def on_config(config: Any) -> Any:
    """The navigation, since most pages are generated."""
    families: list[dict[str, Any]] = []
    for family, title in catalog.FAMILIES.items():
        built = [s for s in catalog.systems().values() if s.built and s.family == family]
        if built:
            families.append({title: [{s.slug: f"systems/{s.slug}.md"} for s in built]})
    config.nav = [
        {"Getting started": "index.md"},
        {"Guides": [{title: path} for path, title in GUIDES.items()]},
        {"Systems": ["systems/index.md", {"The map": "systems/map.md"}, {"Comparisons": "systems/comparisons.md"},
                     *families]},
        {"The house": [{title: f"floors/{floor}.md"} for floor, title in FLOORS.items()]},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the pictures they show."""
    files.append(File.generated(config, "systems/index.md", content=systems_page()))
    files.append(File.generated(config, "systems/map.md", content=map_page()))
    files.append(File.generated(config, "systems/comparisons.md", content=comparisons_page()))
    for path in sorted((catalog.results_folder() / "comparisons").glob("*/trade.png")):
        files.append(File.generated(config, f"systems/comparison-{path.parent.name}.png", abs_src_path=str(path)))
    for system in catalog.systems().values():
        if system.built:
            files.append(File.generated(config, f"systems/{system.slug}.md", content=system_page(system)))
            for i, path in enumerate(system.pictures.values(), 1):
                files.append(File.generated(config, f"systems/{system.slug}-{i}.png", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in sources, and let a floor's page end in all its modules."""
    text = re.sub(r"\{\{ source ([\w.]+):(\w+) \}\}", lambda m: source(m[1], m[2]), markdown)
    folder, _, name = page.file.src_uri.removesuffix(".md").partition("/")
    if folder == "floors":
        text += "\n## Modules\n\n" + "\n\n".join(f"::: {module}" for module in modules_of_floor(name)) + "\n"
    return text


def modules_of_floor(floor: str) -> list[str]:
    """The public modules of a floor, in order of their names."""
    if floor == "commands":
        return [f"stillhouse.{name}" for name in COMMANDS]
    if (catalog.PACKAGE / f"{floor}.py").is_file():
        return [f"stillhouse.{floor}"]
    names = sorted(p.stem for p in (catalog.PACKAGE / floor).glob("*.py") if not p.stem.startswith("_"))
    return [f"stillhouse.{floor}.{name}" for name in names]


def source(module: str, name: str) -> str:
    """The source of a top-level function or class, as a block of code. Raises KeyError if there is none."""
    text, tree = _parsed(ROOT / (module.replace(".", "/") + ".py"))
    found = next((n for n in tree.body if getattr(n, "name", None) == name), None)
    if found is None:
        raise KeyError(f"{module} has no {name}")
    return f"```python\n{ast.get_source_segment(text, found)}\n```"


def systems_page() -> str:
    """All systems by family, the built ones linked."""
    lines = ["# Systems", "", f"{sum(s.built for s in catalog.systems().values())} of {len(catalog.systems())} are "
             "built. A claim *holds* when the 95% interval of its slack over five paired seeds lies above zero, "
             "*leans* when only the mean does, and *fails* otherwise; pages say why where one fails.", ""]
    for family, title in catalog.FAMILIES.items():
        members = [s for s in catalog.systems().values() if s.family == family]
        built, planned = [s for s in members if s.built], [s for s in members if not s.built]
        lines += [f"## {title}", ""]
        if built:
            lines += ["| system | what it moves | verdict | paper |", "|---|---|---|---|"]
            lines += [f"| [{s.slug}]({s.slug}.md) | {_cell(s.moves)} | {_verdict(s.verdict or 'not measured')} | "
                      f"{_cell(s.title)} ({s.year}) |" for s in built]
            lines.append("")
        if planned:
            lines += ["Planned: " + ", ".join(f"{s.slug}" for s in planned) + ".", ""]
    return "\n".join(lines)


def map_page() -> str:
    """Where every system lies in the survey's map: knowledge by scheme, and by algorithm."""
    def links(found: list[catalog.System]) -> str:
        return ", ".join(f"[{s.slug}]({s.slug}.md)" if s.built else s.slug for s in found)

    lines = ["# The map", "", "The systems by the kind of knowledge that is moved, the scheme, and the kind of "
             "algorithm, in the words of the survey ([Gou et al. 2021](https://arxiv.org/abs/2006.05525)), and by two "
             "kinds of knowledge that it does not cover. Linked ones are built. `still list --knowledge feature "
             "--scheme self` asks the same.", ""]
    for knowledge, meaning in catalog.KNOWLEDGE.items():
        lines += [f"## {_capital(knowledge)}", "", f"{_capital(meaning)}.", "", "| scheme | systems |", "|---|---|"]
        for scheme, what in catalog.SCHEMES.items():
            here = [s for s in catalog.placed(scheme=scheme) if s.knowledge[0] == knowledge]
            if here:
                lines.append(f"| {scheme}: {what} | {links(here)} |")
        lines.append("")
    lines += ["## By algorithm", "", "| algorithm | systems |", "|---|---|"]
    lines += [f"| {name}: {what} | {links(catalog.placed(algorithm=name))} |"
              for name, what in catalog.ALGORITHMS.items()]
    return "\n".join(lines) + "\n"


def comparisons_page() -> str:
    """The committed comparisons, results/comparisons/*/comparison.json."""
    parts = ["# Comparisons", "Systems that share a ground: the same models, data, budget and measures for everyone, "
             "and paired seeds. `still compare SLUG SLUG …` makes such a table of any; a system has the settings "
             "of its embedded experiment, tuned there and not for this ground."]
    for path in sorted((catalog.results_folder() / "comparisons").glob("*/comparison.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        drawn = [f'<figure markdown="0"><figcaption>{metric} ({found["better"][metric]} is better)</figcaption>{chart}'
                 "</figure>" for metric, chart in charts_of(found["arms"]).items()]
        built = {s.slug for s in catalog.systems().values() if s.built}
        entrants = [f"[{arm}]({arm}.md)" if arm in built else arm for arm in found["arms"]]
        trade = [] if not (path.parent / "trade.png").is_file() else [
            f"![accuracy against parameters and training time](comparison-{path.parent.name}.png)"]
        student = f" Figures of the student with {found['student']}." if "student" in found else ""
        parts += [f"## {found['title']}",
                  f"{found['sentence']} Seeds {', '.join(map(str, found['seeds']))}.{student}", *trade,
                  f"From the best by {next(iter(found['better']))}: {', '.join(entrants)}.",
                  '<div class="figures" markdown="0">\n' + "\n".join(drawn) + "\n</div>"]
    return "\n\n".join(parts) + "\n"


def system_page(system: catalog.System) -> str:
    """One system: what it does, how it is called, its settings, and what came out when it was measured."""
    path = system.sources[0]
    text, tree = _parsed(path)
    distill = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "distill")
    extras = f" Needs `pip install 'stillhouse[{','.join(system.extras)}]'`." if system.extras else ""
    parts = [f"# {system.slug}", f"*{system.title}* ({system.year}), [arXiv {system.arxiv}]"
             f"(https://arxiv.org/abs/{system.arxiv}). {_capital(system.moves)}.{extras}",
             "## What it does", _prose(ast.get_docstring(tree) or ""), "## Run it", _commands(system, distill),
             "## Roles", "\n".join(_roles(distill)), "## Config", "\n".join(_config(text, tree)),
             *_outcome(system), "## In Python", f"::: {system.module}.distill"]
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> str:
    """A docstring as Markdown: indented equations are code, and stars, underscores and brackets mean themselves."""
    def plain(line: str) -> str:
        parts = line.split("`")
        return "`".join(re.sub(r"([*_])", r"\\\1", part).replace("<", "&lt;") if i % 2 == 0 else part
                        for i, part in enumerate(parts))

    return "\n".join(line if line.startswith("    ") else plain(line) for line in text.splitlines())


def _commands(system: catalog.System, distill: ast.FunctionDef) -> str:
    arguments = distill.args.args
    needed = [a.arg for a in arguments[: len(arguments) - len(distill.args.defaults)]]
    flags = " ".join(f"--{name} …" for name in needed)
    lines = [f"still run {system.slug}  # the embedded experiment", f"still run {system.slug} {flags}",
             f"still verify {system.slug} --full  # measure its claims"]
    lines += [f"still compare {system.slug} …  # on the ground '{ground}'" for ground in system.grounds]
    return "```\n" + "\n".join(lines) + "\n```"


def _roles(distill: ast.FunctionDef) -> Iterator[str]:
    yield "| role | kind | what it is |\n|---|---|---|"
    arguments = distill.args.args
    first_optional = len(arguments) - len(distill.args.defaults)
    for i, argument in enumerate(arguments):
        if argument.arg in ("config", "run"):
            continue
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        may = " May be left out." if i >= first_optional else ""
        what = ROLES.get(argument.arg, "")
        yield f"| `{argument.arg}` | `{_cell(kind.removesuffix(' | None'))}` | {_cell(_capital(what))}.{may} |"


def _config(text: str, tree: ast.Module) -> Iterator[str]:
    yield ("The published defaults, and what the embedded experiment changes.\n\n"
           "| field | published | embedded | meaning |\n|---|---|---|---|")
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config").body
    embedded = _embedded(tree)
    lines = text.splitlines()
    for field in body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = field.target.id
            default = ast.unparse(field.value) if field.value else "(required)"
            changed = f"`{_cell(embedded[name])}`" if name in embedded else ""
            yield f"| `{name}` | `{_cell(default)}` | {changed} | {_cell(_comment(lines, field))} |"


def _embedded(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EMBEDDED":
            assert isinstance(node.value, ast.Call)
            return {k.arg: ast.unparse(k.value) for k in node.value.keywords if k.arg}
    return {}


def _comment(lines: list[str], node: ast.AST) -> str:
    """The comment after a field, or the lines of comment before it."""
    first, last = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    after = lines[last][node.end_col_offset:].partition("# ")[2]  # type: ignore[attr-defined]
    if after:
        return after.strip()
    before: list[str] = []
    while first > 0 and lines[first - 1].strip().startswith("#"):
        first -= 1
        before.insert(0, lines[first].strip().lstrip("# "))
    return " ".join(before)


def _outcome(system: catalog.System) -> Iterator[str]:
    outcome = system.outcome
    if outcome is None:
        yield "## Claims\n\nNot measured yet."
        return
    stale = "" if outcome["hash"] == system.hash else " The source has changed since."
    yield (f"## Claims\n\nMeasured over seeds {', '.join(map(str, outcome['seeds']))}, "
           f"{sum(outcome['seconds']) / len(outcome['seconds']):.0f} s a seed on one core.{stale}")
    rows = ["| verdict | claim | slack | 95% interval |", "|---|---|---|---|"]
    for claim in outcome["claims"]:
        low, high = ("" if v is None else f"{v:.3g}" for v in claim["interval"])
        mean = "crashed" if claim["mean"] is None else f"{claim['mean']:.3g}"
        rows.append(f"| {_verdict(claim['verdict'])} | {_cell(claim['sentence'])} | {mean} | {low} to {high} |")
    yield "\n".join(rows)
    if system.remarks:
        yield system.remarks
    yield "## Figures"
    figures = [("slack of the claims, in that order, each in its own unit", forest(outcome["claims"])),
               *charts_of(outcome["arms"]).items()]
    pictures = [f'<figure markdown="0"><figcaption>{title}</figcaption><img src="{system.slug}-{i}.png" '
                f'alt="{title}" loading="lazy"></figure>' for i, title in enumerate(system.pictures, 1)]
    drawn = [f'<figure markdown="0"><figcaption>{title}</figcaption>{chart}</figure>' for title, chart in figures]
    yield '<div class="figures" markdown="0">\n' + "\n".join([*pictures, *drawn]) + "\n</div>"


def _parsed(path: Path) -> tuple[str, ast.Module]:
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ").replace("<", "&lt;")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _verdict(verdict: str) -> str:
    return f'<b class="{verdict.split()[0]}">{verdict}</b>'
