import subprocess
import sys

import pytest
import torch

from stillhouse import zoo
from stillhouse.errors import StoreError

RACE = """
import os, sys, time, torch
from stillhouse import zoo
def build():
    open(sys.argv[1], "a").write("built\\n")
    time.sleep(0.5)
    return {"w": torch.arange(3)}
assert zoo.cached("race", {"version": 1}, build)["w"].tolist() == [0, 1, 2]
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path))


def test_entries_are_built_once_per_recipe_and_draw_nothing_from_the_generators(tmp_path):
    built = []

    def build():
        built.append(1)
        return {"w": torch.randn(3), "steps": 5}

    torch.manual_seed(0)
    first = zoo.cached("x", {"steps": 5}, build)
    after = torch.randn(1)
    torch.manual_seed(0)
    assert torch.equal(zoo.cached("x", {"steps": 5}, build)["w"], first["w"])
    assert torch.equal(torch.randn(1), after)
    zoo.cached("x", {"steps": 6}, build)
    assert len(built) == 2


def test_a_damaged_entry_is_rebuilt(tmp_path, capsys):
    zoo.cached("x", {}, lambda: {"w": torch.ones(100)})
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    assert zoo.cached("x", {}, lambda: {"w": torch.ones(100)})["w"].sum() == 100
    assert "building x again" in capsys.readouterr().err


def test_two_processes_build_it_once(tmp_path):
    mark = tmp_path / "mark"
    children = [subprocess.Popen([sys.executable, "-c", RACE, str(mark)]) for _ in range(2)]
    assert [c.wait(60) for c in children] == [0, 0]
    assert mark.read_text() == "built\n"


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="set STILLHOUSE_CACHE"):
        zoo.cached("x", {}, lambda: 1)
