"""The tour, each loop cut to three steps: that every stop still fits the systems' signatures and settings."""

import pytest

from stillhouse import catalog
from stillhouse.run import Run
from stillhouse.tour import STOPS, tour


def test_every_family_with_a_built_system_has_a_stop():
    families = {s.family for s in catalog.systems().values() if s.built}
    assert {catalog.find(slug).family for slug in [*STOPS, "ssld"]} == families


def test_the_tour_ends_in_a_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    loop = Run.loop

    def short(self, name, data=None, *, steps=None, epochs=None, **rest):
        limit = {"steps": min(steps, 3)} if steps is not None else {"epochs": epochs}
        return loop(self, name, data, **limit, **rest)

    monkeypatch.setattr(Run, "loop", short)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    page = tour(tmp_path / "tour", quiet=True)
    said = capsys.readouterr().out
    assert "small, distilled" in said and "still show ssld" in said and str(page) in said.replace("\n", "")
    text = page.read_text()
    assert "The main job" in text
    for slug in STOPS:
        if catalog.find(slug).built:
            assert f": {catalog.find(slug).moves}" in " ".join(said.split()) and f"<td>{slug}</td>" in text
