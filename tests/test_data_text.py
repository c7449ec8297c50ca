"""Texts from disk: documents, lines and tables, as they are and as token ids, in memory and larger than it."""

import json

import pytest
import torch

from stillhouse.data import arrays, text_files
from stillhouse.data.arrays import MappedSet
from stillhouse.data.readers import read_data
from stillhouse.data.sets import fetch
from stillhouse.data.text import tokenised_targets, tokenised_texts
from stillhouse.errors import ConfigError, DataError, UnknownNameError
from stillhouse.protocols import Images, LabelledTexts, SourceTargets, Texts, TokenPairs

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of whole words, saved and loaded as a user's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    every = ("<pad>", "<end>", "<start>", "<unk>", "red", "green", "blue", "ring", "square")
    known = {word: i for i, word in enumerate(every)}
    tokenizer = Tokenizer(models.WordLevel(known, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=[
        ("<start>", 2), ("<end>", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                                bos_token="<start>", unk_token="<unk>")
    folder = tmp_path_factory.mktemp("words")
    made.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def rows(path, *given):
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


def test_texts_become_rows_with_special_tokens(words):
    data = tokenised_texts(["red ring", "blue", "green red blue square"], words, 5, torch.tensor([1, 0, 1]))
    assert data.input_ids.tolist() == [[2, 4, 7, 1, 0], [2, 6, 1, 0, 0], [2, 5, 4, 6, 1]]
    assert data.attention_mask.sum(1).tolist() == [4, 3, 5] and data.label.tolist() == [1, 0, 1]
    pairs = tokenised_targets([("red", "blue ring"), ("ring", "red")], words, 8)
    assert pairs.input_ids.tolist() == [[2, 4, 1], [2, 7, 1]]
    assert pairs.target_ids.tolist() == [[2, 6, 7, 1], [2, 4, 1, -100]]
    with pytest.raises(DataError, match="no texts"):
        tokenised_texts([], words)


def test_documents_and_lines(tmp_path, words):
    (tmp_path / "a.txt").write_text("red ring\n\nblue square\n")
    assert read_data(tmp_path / "a.txt", Texts).text == ["red ring\n\nblue square\n"]
    assert read_data(f"{tmp_path}/a.txt:lines=true", Texts).text == ["red ring", "blue square"]
    assert read_data(f"{tmp_path}/a.txt:lines=true", Texts, tokenizer=words).input_ids.tolist() == [[2, 4, 7, 1],
                                                                                                      [2, 6, 8, 1]]
    assert read_data(tmp_path / "a.txt", TokenPairs, tokenizer=words, length=2).input_ids.tolist() == [[4, 7], [6, 8]]
    (tmp_path / "b.txt").write_text("green")
    for kind in (Texts, None):
        assert read_data(tmp_path, kind).text[1] == "green"
    assert len(read_data(f"{tmp_path}:lines=true", TokenPairs)) == 3
    with pytest.raises(UnknownNameError, match="no option 'split'; it has lines"):
        read_data(f"{tmp_path}/a.txt:split=train", Texts)
    with pytest.raises(ConfigError, match="lines is true or false"):
        read_data(f"{tmp_path}/a.txt:lines=3", Texts)
    with pytest.raises(DataError, match="plain text, but its role .SourceTargets. needs"):
        read_data(tmp_path / "a.txt", SourceTargets)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="1 of 3 texts.*c.txt.*limit_broken"):
        read_data(tmp_path, Texts)
    with pytest.raises(DataError, match="holds no pictures"):
        read_data(tmp_path, Images)


def test_labelled_texts_and_targets(tmp_path, words):
    path = rows(tmp_path / "a.jsonl", {"text": "red", "label": "warm"}, {"text": "blue", "label": "cold"},
                {"text": "blue ring", "label": "cold"})
    data = read_data(path, LabelledTexts, tokenizer=words)
    assert data.label.tolist() == [1, 0, 0] and data.classes == ("cold", "warm")
    assert data.input_ids.shape == (3, 4) and set(data.fields) == {"input_ids", "attention_mask", "label"}
    assert set(read_data(path, Texts, tokenizer=words).fields) == {"input_ids", "attention_mask"}
    with pytest.raises(DataError, match="at least two classes"):
        read_data(rows(tmp_path / "b.jsonl", {"text": "red", "label": 1}), LabelledTexts, tokenizer=words)
    path = rows(tmp_path / "c.jsonl", {"text": "red", "label": 1}, {"text": "red", "label": None})
    with pytest.raises(DataError, match="1 of 2 lines.*line 2: it has no label"):
        read_data(path, LabelledTexts)
    (tmp_path / "d.csv").write_text("source,target\nred,blue ring\nring,red\n")
    assert read_data(tmp_path / "d.csv", SourceTargets, tokenizer=words).target_ids.tolist() == [[2, 6, 7, 1],
                                                                                                 [2, 4, 1, -100]]


@pytest.mark.parametrize(("kind", "row"), [
    (TokenPairs, {"text": "red ring blue"}),
    (TokenPairs, {"prompt": "red ring", "response": "blue"}),
    (Texts, {"text": "red ring blue"}),
    (LabelledTexts, {"text": "red", "label": "a"}),
    (SourceTargets, {"source": "red ring", "target": "blue"}),
])
def test_a_large_corpus_is_tokenised_once_and_mapped(tmp_path, monkeypatch, words, kind, row):
    given = [row, {**row, "text": "green", "label": "b"}, *[row] * 5]
    given = [{k: v for k, v in r.items() if k in row} for r in given]
    path = rows(tmp_path / "a.jsonl", *given)
    small = read_data(path, kind, tokenizer=words, length=6)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrays, "IN_MEMORY", 10)
    monkeypatch.setattr(text_files, "CHUNK", 2)
    large = read_data(path, kind, tokenizer=words, length=6)
    assert isinstance(large, MappedSet) and len(large) == len(small) and set(large.fields) == set(small.fields)
    batch, whole = fetch(large, [2, 0, 1]), fetch(small, [2, 0, 1])
    for name in small.fields:
        width = whole[name].shape[-1]
        assert batch[name].dtype == whole[name].dtype and torch.equal(batch[name][..., :width], whole[name]), name
    (kept,) = (tmp_path / "cache" / "texts").iterdir()
    stamp = (kept / "input_ids.bin").stat().st_mtime_ns
    read_data(path, kind, tokenizer=words, length=6)
    assert (kept / "input_ids.bin").stat().st_mtime_ns == stamp
    for change in ({"length": 7}, {}):
        if not change:
            rows(path, *given, row, row)
        read_data(path, kind, tokenizer=words, **{"length": 6, **change})
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 3


def test_an_interrupted_tokenisation_leaves_nothing_behind(tmp_path, monkeypatch, words):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrays, "IN_MEMORY", 10)
    path = rows(tmp_path / "a.jsonl", *[{"text": "red ring blue"}] * 9)
    with monkeypatch.context() as broken:
        broken.setattr(text_files.store, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            read_data(path, TokenPairs, tokenizer=words, length=4)
    assert not list((tmp_path / "cache" / "texts").iterdir())
    assert len(read_data(path, TokenPairs, tokenizer=words, length=4)) == 9


def test_broken_rows_of_a_large_corpus_are_counted(tmp_path, monkeypatch, words):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arrays, "IN_MEMORY", 10)
    path = rows(tmp_path / "a.jsonl", *[{"text": "red ring blue"}] * 9, {"text": " "})
    with pytest.raises(DataError, match="1 of 10 lines.*line 10"):
        read_data(path, TokenPairs, tokenizer=words, length=4)
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out"):
            data = read_data(path, TokenPairs, tokenizer=words, length=4, limit_broken=0.1)
        assert (data.summary().total, data.summary().read) == (10, 9)
