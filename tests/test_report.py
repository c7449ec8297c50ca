import json
import re

import pytest
import torch

from stillhouse import catalog
from stillhouse.errors import StoreError
from stillhouse.report import write_report
from stillhouse.report.charts import curve, dots, forest
from stillhouse.report.tables import leaderboard, systems_table, with_tables
from stillhouse.run import Run


@pytest.fixture
def page(tmp_path, monkeypatch):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(catalog, "results_folder", lambda: results)
    outcome = {"slug": "ssld", "number": 41, "verdict": "leans", "seeds": [0, 1], "full": True, "hash": "x",
               "claims": [{"sentence": "<b>bold</b> claim", "verdict": "leans", "mean": 0.1, "interval": [-0.1, 0.3],
                           "slack": [0.0, 0.2]},
                          {"sentence": "crashed", "verdict": "fails", "mean": None, "interval": [None, None],
                           "slack": [None, None]}],
               "arms": {"a<b": {"accuracy": [0.9, 0.8]}, "gone": {"accuracy": [None, None]}},
               "crashed": {}, "seconds": [1.0, 2.0], "versions": {}}
    (results / "ssld.json").write_text(json.dumps(outcome))
    run = Run.open(tmp_path / "runs" / "mine", system="ssld", quiet=True)

    def arm():
        for k in run.loop("train", steps=30):
            run.log(loss=1.0 / (k + 1))
        run.picture("digits", torch.randn(3, 1, 4, 4))
        return {"x": 1.0}

    run.arms({"one": arm, "two": arm})
    (tmp_path / "runs" / "mine" / "summary.json").write_text(json.dumps(
        {"title": "The job", "text": "", "columns": ["n"], "rows": [["<i>"]]}))
    return write_report(tmp_path / "runs", tmp_path / "out" / "report.html").read_text()


def test_the_page_stands_alone(page):
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "url(" not in page and "@import" not in page
    assert page.count("<html") == page.count("</html>") == 1


def test_text_is_escaped(page):
    assert "&lt;b&gt;bold&lt;/b&gt; claim" in page and "a&lt;b" in page and "&lt;i&gt;" in page
    assert "<b>bold" not in page


def test_it_has_claims_arms_curves_and_pictures(page):
    assert 'class="verdict leans"' in page and "95% interval" in page
    assert page.count("data:image/png;base64,") == 2 and "train: loss" in page and page.count("<polyline") == 2
    assert len(re.findall(r"<tr data-family", page)) == 176
    assert "the source has changed since" in page


def test_an_empty_folder_gives_a_page_and_an_absent_one_an_error(tmp_path):
    write_report(tmp_path, tmp_path / "r.html")
    with pytest.raises(StoreError, match="no folder"):
        write_report(tmp_path / "absent", tmp_path / "r.html")


def test_pictures_of_numbers_are_drawn_to_scale():
    drawn = dots([("a", 1.0, 0.5, 1.5), ("a name that is much too long for its place", -1.0, -1.0, -1.0)])
    at = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    ends = [float(x) for x in re.findall(r'd="M([\d.]+) \d+H([\d.]+)"/><circle', drawn)[0]]
    assert at[1] == 156 and ends[1] == 380 and at[0] == pytest.approx(156 + 224 * 0.8, abs=0.1)
    assert "too long for its place</title>" in drawn and "a name that is much too…" in drawn
    points = re.findall(r'points="([^"]+)"', curve({"a": [(0, 0.0), (1, 1.0), (2, 0.0)]}))[0].split()
    assert [p.split(",")[1] for p in points] == ["110.0", "10.0", "110.0"]


def test_the_slack_of_a_claim_that_holds_lies_right_of_the_line():
    drawn = forest([{"sentence": "s", "verdict": "holds", "mean": 2.0, "interval": [1.0, 3.0]},
                    {"sentence": "t", "verdict": "fails", "mean": -2.0, "interval": [-4.0, 0.0]},
                    {"sentence": "u", "verdict": "fails", "mean": None, "interval": [None, None]},
                    {"sentence": "v", "verdict": "leans", "mean": 0.5, "interval": [None, None]}])
    assert [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)] == [260.0, 85.0, 310.0]
    assert "crashed" in drawn and 'd="M210.0 12H310.0"' in drawn and 'd="M10.0 30H160.0"' in drawn


def test_readme_tables_go_between_the_markers():
    both = "".join(f"<!-- {name}:begin -->outdated<!-- {name}:end -->\n" for name in ("leaderboard", "systems"))
    text = with_tables(f"before\n{both}after")
    assert text.startswith("before\n") and text.endswith("\nafter") and "outdated" not in text
    assert "`ssld`" in systems_table() and "*plain KD*" in leaderboard()
    with pytest.raises(StoreError, match="markers"):
        with_tables("nothing")
