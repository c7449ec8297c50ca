import json
import os
import signal
import subprocess
import sys
import time

import pytest

from stillhouse import catalog, verify

EXPERIMENT = '''
"""A system for this test."""
import torch
from stillhouse.evaluate.claims import Claim
NUMBER = 41
CLAIMS = [Claim("b is larger", lambda a: a["b"]["x"] - a["a"]["x"]),
          Claim("the crashing arm is fine", lambda a: a["crash"]["x"])]
EMBEDDED = None
def experiment(run):
    def arm(plus):
        for k in run.loop("x", steps=3):
            import os, time
            while plus == 1.0 and os.environ.get("WAIT_FOR") and not os.path.exists(os.environ["WAIT_FOR"]):
                time.sleep(0.05)
        return {"x": torch.rand(()).item() + plus}
    def crash():
        raise ValueError("no luck")
    return run.arms({"a": lambda: arm(0.0), "b": lambda: arm(1.0), "crash": crash}, extended={"c": lambda: arm(2.0)})
'''


@pytest.fixture
def system(tmp_path, monkeypatch):
    """`ssld` replaced by a quick system, in this process and in workers."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "stand_in"
    package.mkdir()

    def write():
        (package / "quick.py").write_text(EXPERIMENT)
        (package / "sitecustomize.py").write_text(
            "import sys\nif sys.argv[:1] and '-m' in sys.orig_argv and 'stillhouse.verify' in sys.orig_argv:\n"
            "    import stillhouse.catalog as c, importlib\n"
            "    c.load = lambda slug: importlib.import_module('quick')\n")
        monkeypatch.setenv("PYTHONPATH", str(package))
        monkeypatch.syspath_prepend(str(package))
        sys.modules.pop("quick", None)
        import importlib

        monkeypatch.setattr(catalog, "load", lambda slug: importlib.import_module("quick"))
    return write


def test_an_outcome_has_arms_claims_and_versions_and_is_kept(system, tmp_path):
    system()
    out = tmp_path / "results"
    (outcome,) = verify.verify(["ssld"], [0, 1, 2], False, out)
    saved = json.loads((out / "ssld.json").read_text())
    assert saved == {**json.loads(json.dumps(outcome)), "runs": 1}
    assert saved["seeds"] == [0, 1, 2] and len(saved["arms"]["a"]["x"]) == 3 and "c" not in saved["arms"]
    assert [c["verdict"] for c in saved["claims"]] == ["holds", "fails"] and saved["verdict"] == "fails"
    assert all(abs(s - 1) < 1e-6 for s in saved["claims"][0]["slack"]), "the arms of a seed are paired"
    assert len(set(saved["arms"]["a"]["x"])) == 3 and saved["hash"] == catalog.find("ssld").hash
    assert saved["crashed"]["seed 0, crash"] == "ValueError: no luck" and "torch" in saved["versions"]

    (full,) = verify.verify(["ssld"], [0, 1, 2], True, out)
    assert full["arms"]["a"] == outcome["arms"]["a"] and "c" in full["arms"]
    verify.verify(["ssld"], [0, 1, 2], False, out)
    kept = json.loads((out / "ssld.json").read_text())
    assert kept["full"] and kept["runs"] == 2
    verify.verify(["ssld"], [0], True, out)
    assert json.loads((out / "ssld.json").read_text())["seeds"] == [0, 1, 2]


def test_an_interrupted_verification_goes_on(system, tmp_path):
    system()
    go = tmp_path / "go"
    code = ("import sys; sys.argv=['x']; import importlib, stillhouse.catalog as c; "
            "c.load = lambda slug: importlib.import_module('quick'); from stillhouse.verify import verify; "
            "verify(['ssld'], [0], False)")
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL,
                             env={**os.environ, "WAIT_FOR": str(go)},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    folder = verify.runs_folder(catalog.find("ssld")) / "seed-0"
    finished = folder / "stages" / "arm a" / "metrics.json"
    for _ in range(600):
        if finished.exists():
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    go.write_text("the second arm may finish its step")
    child.wait(60)
    assert finished.exists() and not (folder / "core.json").exists()
    written = finished.stat().st_mtime_ns
    (outcome,) = verify.verify(["ssld"], [0], False)
    assert finished.stat().st_mtime_ns == written and set(outcome["arms"]) == {"a", "b", "crash"}


def test_pictures_of_the_arms_are_kept_by_name(tmp_path):
    run, out = tmp_path / "run", tmp_path / "results" / "ssld"
    for arm, size in (("plain", 10), ("big", verify.LARGEST + 1), ("ours", 20)):
        folder = run / "stages" / f"arm {arm}" / "pictures"
        folder.mkdir(parents=True)
        (folder / "samples.png").write_bytes(b"x" * size)
    out.mkdir(parents=True)
    (out / "9 outdated.png").write_bytes(b"")
    kept = verify.keep_pictures(run, out)
    assert [p.name for p in kept] == ["1 plain - samples.png", "2 ours - samples.png"]
    assert sorted(out.iterdir()) == kept
    verify.keep_pictures(tmp_path / "nothing", out)
    assert not out.exists()


def test_runs_are_kept_apart_when_any_code_below_changes(tmp_path, monkeypatch):
    system = catalog.systems()["ssld"]
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path)
    floor = tmp_path / "measures" / "x.py"
    floor.parent.mkdir()
    floor.write_text("a = 1")
    before = verify.runs_folder(system)
    assert verify.runs_folder(system) == before
    floor.write_text("a = 2")
    assert verify.runs_folder(system) != before


def test_numbers_that_are_not_finite_stay_readable():
    assert verify._numbers({"a": {"x": None}})["a"]["x"] != 0
    assert verify.json_number(float("nan")) is None
