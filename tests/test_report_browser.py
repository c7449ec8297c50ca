"""The report page in a real browser: it loads from a file, filters, sorts, fits a phone and needs no mouse."""

import pytest
from browser import opened

from stillhouse import catalog
from stillhouse.report import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, folder / "report.html")


def shown(tab, selector):
    return tab.eval_on_selector_all(
        selector, "all => all.filter(e => e.checkVisibility()).map(e => e.id || e.innerText)")


def test_it_loads_from_a_file_without_a_word_on_the_console(page):
    with opened(page) as tab:
        assert tab.title() == "Stillhouse report"
        assert len(shown(tab, "#table tbody tr")) == len(catalog.systems())
        assert len(shown(tab, "#cards > article")) == sum(s.built for s in catalog.systems().values())
        assert tab.eval_on_selector_all("img", "all => all.every(i => i.loading === 'lazy' || i.naturalWidth > 0)")
        assert tab.noise == []


def test_filters_and_sorting_do_what_they_say(page):
    with opened(page) as tab:
        tab.fill("#search", "unlabelled pict")
        words = [s for s in catalog.systems().values() if s.built
                 and all(w in f"{s.slug} {s.title} {s.moves}".lower() for w in ("unlabelled", "pict"))]
        assert sorted(shown(tab, "#cards > article")) == sorted(s.slug for s in words) != []
        tab.fill("#search", "")
        tab.select_option("#family", "datasets")
        members = [s for s in catalog.systems().values() if s.family == "datasets"]
        assert len(shown(tab, "#table tbody tr")) == len(members)
        assert tab.inner_text("#shown") == f"{len(members)} of {len(catalog.systems())} shown"
        tab.check("#built")
        assert len(shown(tab, "#table tbody tr")) == sum(s.built for s in members)
        tab.uncheck("#built")
        tab.select_option("#family", "")
        tab.select_option("#verdict", "holds")
        holding = [s.slug for s in catalog.systems().values() if s.verdict.split(" ")[0] == "holds"]
        assert sorted(shown(tab, "#cards > article")) == sorted(holding)
        tab.select_option("#verdict", "")

        tab.select_option("#order", "slug")
        names = shown(tab, "#cards > article")
        assert names == sorted(names)
        tab.select_option("#order", "year")
        years = [catalog.find(name).year for name in shown(tab, "#cards > article")]
        assert years == sorted(years, reverse=True)

        slugs = "all => all.map(row => row.cells[1].innerText)"
        tab.click("#table th >> text=slug")
        up = tab.eval_on_selector_all("#table tbody tr", slugs)
        assert tab.get_attribute("#table th:nth-child(2)", "aria-sort") == "ascending"
        tab.click("#table th >> text=slug")
        assert tab.eval_on_selector_all("#table tbody tr", slugs) == up[::-1]
        assert up[:3] == sorted(catalog.systems())[:3]
        assert tab.noise == []


def test_it_can_be_read_on_a_phone(page):
    with opened(page, width=400, height=800) as tab:
        tab.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        wide = tab.eval_on_selector_all("main p, main li, main h2, main h3, main figure, main svg, .bar label", """
            all => all.filter(e => e.checkVisibility() && e.getBoundingClientRect().right > 400)
                .map(e => e.outerHTML)""")
        assert wide == []
        assert tab.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 15


def test_it_can_be_used_without_a_mouse(page):
    with opened(page) as tab:
        reached = []
        for _ in range(60):
            tab.keyboard.press("Tab")
            reached.append(tab.evaluate("document.activeElement.id || document.activeElement.tagName"))
            outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"nothing shows that {reached[-1]} has the focus"
            if reached[-1] == "BUTTON":
                break
        assert {"search", "family", "verdict", "order", "built", "SUMMARY", "BUTTON"} <= set(reached)
        tab.keyboard.press("Enter")
        assert tab.get_attribute("#table th:nth-child(1)", "aria-sort") == "ascending"
        tab.focus("#cards summary")
        tab.keyboard.press("Enter")
        assert tab.eval_on_selector("#cards details", "d => d.open")
