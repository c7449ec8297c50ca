"""The site: it builds without a warning, its code runs, its pages say what the sources say."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse import catalog

ROOT = Path(__file__).parent.parent
BUILT = [s for s in catalog.systems().values() if s.built]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out],
                          cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_system_has_a_page_with_its_claims_and_settings(site):
    for system in BUILT:
        page = (site / "systems" / f"{system.slug}.html").read_text()
        for part in ("What it does", "Roles", "Config", "Claims", "distill"):
            assert part in page, f"{system.slug} has no {part}"
        assert page.count('<svg class="forest"') == (system.outcome is not None)
        assert "{{" not in page
    index = (site / "systems" / "index.html").read_text()
    assert all(f'href="{s.slug}.html"' in index for s in BUILT)


def test_it_loads_nothing_from_elsewhere(site):
    for page in [site / "index.html", site / "systems" / "ssld.html", site / "floors" / "run.html"]:
        assert re.findall(r'(?:src|<link[^>]*href)="(https?:[^"]+)"', page.read_text()) == []


def test_it_can_be_searched_from_a_file(site):
    from browser import opened

    with opened(site / "index.html") as tab:
        tab.click("input.md-search__input")
        tab.keyboard.type("entropy")
        tab.wait_for_selector(".md-search-result__item a")
        assert tab.noise == []


def test_every_floor_lists_all_its_modules(site):
    from stillhouse.report.site import FLOORS, modules_of_floor

    rooms = {p.stem for p in catalog.PACKAGE.iterdir() if p.name[0] != "_" and (p.suffix == ".py" or p.is_dir())
             and (p.suffix or any(p.rglob("*.py")))}
    commands = {"advice", "catalog", "verify", "compare", "report", "testing", "tour", "cli", "systems"}
    assert rooms - commands == set(FLOORS) - {"commands"}
    for floor in FLOORS:
        page = (site / "floors" / f"{floor}.html").read_text()
        assert all(f'id="{module}"' in page for module in modules_of_floor(floor)), floor


def blocks(page: str) -> list[tuple[str, str]]:
    """Title (or "") and code of every Python block of a page."""
    return re.findall(r'```python(?: title="([\w.]+)")?\n(.*?)```', (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["index.md", "guide/write-your-own.md"])
def test_the_code_of_the_guides_runs_as_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict = {"__name__": "guide"}
    said = io.StringIO()
    modules = {}
    for title, code in blocks(page):
        if title:
            modules[title] = modules.get(title, "") + "\n" + code
            (tmp_path / title).write_text(modules[title])
        else:
            with contextlib.redirect_stdout(said):
                exec(compile(code, page, "exec"), names)
    for title in modules:
        sys.modules.pop(title.removesuffix(".py"), None)
    if page == "guide/write-your-own.md":
        assert "without being held by run.loop" in said.getvalue()
        assert float(re.search(r"([\d.]+)% on 597", said.getvalue())[1]) > 80
    else:
        assert (tmp_path / "runs" / "mine").is_dir()


def test_sources_and_settings_are_read_from_the_files():
    from stillhouse.report import site

    shown = site.source("stillhouse.systems.compression.ssld", "distill")
    assert shown.startswith("```python\ndef distill(") and "run.once" in shown
    with pytest.raises(KeyError, match="no_such"):
        site.source("stillhouse.systems.compression.ssld", "no_such")
    page = site.system_page(catalog.find("mtt"))
    assert "| `steps` | `5000` | `120` | outer iterations |" in page
    assert r"theta\*\_0 … theta\*\_T" in page and "t &lt; T+" in page and "\n    theta_{n+1} = theta_n" in page


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_pages_exist(page):
    from stillhouse.cli import COMMANDS

    used = set(re.findall(r"(?:^|`|  )still ([a-z]+)", (ROOT / page).read_text(), re.MULTILINE))
    assert used <= set(COMMANDS), used - set(COMMANDS)
