import re
from pathlib import Path

from stillhouse.report.tables import with_tables

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert int(re.search(r"on (\d+)% of the pictures", said)[1]) > 30
    assert (tmp_path / "runs" / "mine" / "stages").is_dir()


def test_the_tables_are_those_of_the_results():
    assert with_tables(README.read_text()) == README.read_text(), "run `make tables`"
