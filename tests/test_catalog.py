import subprocess
import sys

import pytest

from stillhouse import catalog
from stillhouse.errors import MissingExtraError, UnknownNameError


def test_the_catalog_has_all_systems_once():
    entries = list(catalog.systems().values())
    assert [s.number for s in entries] == list(range(1, 177))
    assert {s.family for s in entries} == set(catalog.FAMILIES)
    assert all(s.title and s.arxiv and 1990 < s.year < 2030 for s in entries)


def test_every_built_system_is_in_the_catalog_and_says_what_it_moves():
    found = {p.stem for p in (catalog.PACKAGE / "systems").glob("*/*.py")} - {"__init__"}
    built = {s.slug.replace("-", "_") for s in catalog.systems().values() if s.built}
    assert found == built
    assert all(s.moves for s in catalog.systems().values() if s.built)


def test_every_system_has_its_place_in_the_survey_s_map():
    for s in catalog.systems().values():
        assert s.knowledge and set(s.knowledge) <= set(catalog.KNOWLEDGE) and len(set(s.knowledge)) == len(s.knowledge)
        assert s.scheme in catalog.SCHEMES and set(s.algorithms) <= set(catalog.ALGORITHMS)
    for knowledge in catalog.KNOWLEDGE:
        assert catalog.placed(knowledge=knowledge)
    assert all(catalog.placed(scheme=scheme) for scheme in catalog.SCHEMES)
    assert all(catalog.placed(algorithm=algorithm) for algorithm in catalog.ALGORITHMS)
    assert len(catalog.placed()) == 176
    assert "quantized-distillation" in {s.slug for s in catalog.placed("response", "offline", "quantized")}
    with pytest.raises(UnknownNameError, match="no scheme 'remote'; choose one of offline"):
        catalog.placed(scheme="remote")


def test_slugs_are_found_and_misspelt_ones_answered():
    assert catalog.find("SSLD").number == 41 and catalog.find("progressive_distillation").number == 79
    with pytest.raises(UnknownNameError, match="Did you mean .*ssld"):
        catalog.find("sssld")
    with pytest.raises(UnknownNameError, match="planned but not built"):
        catalog.load(next(s.slug for s in catalog.systems().values() if not s.built))


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(catalog.EXTRAS, "hf", ("no_such_package",))
    with pytest.raises(MissingExtraError, match=r"pip install 'stillhouse\[hf\]'"):
        catalog.load("distillm")


def test_nothing_imports_torch():
    code = ("import sys, stillhouse.catalog as c; [s.verdict for s in c.systems().values()]; import stillhouse.cli; "
            "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_stale_outcomes_are_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "results_folder", lambda: tmp_path)
    system = catalog.find("ssld")
    assert system.verdict == ""
    for stored, expected in ((system.hash, "holds"), ("another", "holds (stale)")):
        (tmp_path / "ssld.json").write_text(f'{{"verdict": "holds", "hash": "{stored}"}}')
        assert system.verdict == expected
