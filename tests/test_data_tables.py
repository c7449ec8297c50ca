"""Tables: parquet, CSV, JSONL and `datasets` sets, read through the string a user types."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stillhouse.data import arrays
from stillhouse.data.arrays import MappedSet
from stillhouse.data.readers import parse_columns, read_data
from stillhouse.data.sets import column, fetch
from stillhouse.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from stillhouse.protocols import (
    ClassNames,
    Conditions,
    DomainImages,
    Images,
    LabelledImages,
    LabelledTexts,
    Samples,
    SourceTargets,
    SpeechData,
    TokenPairs,
)
from stillhouse.run import Run

datasets = pytest.importorskip("datasets")
MAP = {"image": "img", "label": "fine_label"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))


def png(value, size=(6, 6), mode="L"):
    held = io.BytesIO()
    Image.new(mode, size, value).save(held, "PNG")
    return held.getvalue()


def pictures(n=8, **more):
    """A set as the hub has them: pictures as bytes, labels with names, under other names than ours."""
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["bee", "cow"]),
                                  **{name: datasets.Value("string") for name in more}})
    return datasets.Dataset.from_dict({"img": [{"bytes": png(10 * i), "path": None} for i in range(n)],
                                       "fine_label": [i % 2 for i in range(n)], **more}, features=features)


def check_pictures(data, n=8):
    assert len(data) == n and data.classes == ("bee", "cow") and set(data.fields) == {"image", "label"}
    batch = fetch(data, [3, 0])
    assert batch["label"].tolist() == [1, 0] and batch["index"].tolist() == [3, 0]
    grey = (torch.tensor([30.0, 0]) / 127.5 - 1)[:, None, None, None]
    torch.testing.assert_close(batch["image"], grey.expand(2, 1, 6, 6))
    assert column(data, "label").tolist() == [i % 2 for i in range(n)]


# ------------------------------------------------------------------------------------------- parquet and hf:


def test_parquet_with_a_column_map(tmp_path):
    pictures().to_parquet(tmp_path / "a.parquet")
    check_pictures(read_data(str(tmp_path / "a.parquet"), LabelledImages, columns=MAP))
    with pytest.raises(DataError, match=r"no column 'image'.*\(Images\) needs; there are img, fine_label.*--columns "):
        read_data(tmp_path / "a.parquet", Images)
    with pytest.raises(DataError, match="no column 'picture'.*there are img, fine_label"):
        read_data(tmp_path / "a.parquet", Images, columns={"image": "picture"})
    assert read_data(tmp_path / "a.parquet", Images, columns={"image": "img"}).fields == ("image",)
    assert read_data(tmp_path / "a.parquet", Samples, columns=MAP, conditional=True)[3]["condition"] == 1
    assert read_data(tmp_path / "a.parquet", DomainImages, columns=MAP)[3]["domain"] == 1
    assert read_data(tmp_path / "a.parquet", Conditions, columns=MAP)[3] == {"index": 3, "condition": 1}
    assert read_data(tmp_path / "a.parquet", ClassNames, columns=MAP).name == ["bee", "cow"]


def test_a_parquet_file_that_changed_is_read_again(tmp_path):
    pictures(4).to_parquet(tmp_path / "a.parquet")
    assert len(read_data(tmp_path / "a.parquet", LabelledImages, columns=MAP)) == 4
    pictures(6).to_parquet(tmp_path / "a.parquet")
    assert len(read_data(tmp_path / "a.parquet", LabelledImages, columns=MAP)) == 6


def test_saved_sets_and_their_splits(tmp_path):
    pictures().save_to_disk(tmp_path / "one")
    check_pictures(read_data(f"hf:{tmp_path}/one", LabelledImages, columns=MAP))
    both = datasets.DatasetDict({"train": pictures(), "test": pictures(4)})
    both.save_to_disk(tmp_path / "two")
    check_pictures(read_data(f"hf:{tmp_path}/two", LabelledImages, columns=MAP))
    check_pictures(read_data(f"hf:{tmp_path}/two:split=test", LabelledImages, columns=MAP), 4)
    check_pictures(read_data(f"hf:{tmp_path}/two:test", LabelledImages, columns=MAP), 4)
    with pytest.raises(UnknownNameError, match="no split 'dev'; it has train, test"):
        read_data(f"hf:{tmp_path}/two:split=dev")
    with pytest.raises(UnknownNameError, match="no option 'shard'; it has split, config"):
        read_data(f"hf:{tmp_path}/two:shard=1")
    with pytest.raises(DataError, match="was saved by datasets; write hf:"):
        read_data(tmp_path / "two", Images)


def test_folders_of_parquet_files_by_split_and_config(tmp_path):
    for name, n in (("train-00000-of-00002", 4), ("train-00001-of-00002", 4), ("test-00000-of-00001", 4)):
        (tmp_path / "set" / "plain").mkdir(parents=True, exist_ok=True)
        pictures(n).to_parquet(tmp_path / "set" / "plain" / f"{name}.parquet")
    for given, n in ((f"hf:{tmp_path}/set", 8), (f"hf:{tmp_path}/set:split=test,config=plain", 4)):
        assert len(read_data(given, LabelledImages, columns=MAP)) == n
    with pytest.raises(DataError, match="no parquet files in .*fancy.*folders are: plain"):
        read_data(f"hf:{tmp_path}/set:config=fancy")


def test_names_scripts_and_damage(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match="nothing is downloaded.*hf download nobody/nothing --repo-type dataset"):
        read_data("hf:nobody/nothing", Images)
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises(DataError, match=r"is a script \(scripted.py\).*refused"):
        read_data(f"hf:{tmp_path}/scripted", Images)
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="damaged"):
        read_data(tmp_path / "bad.parquet", Images)
    pictures().save_to_disk(tmp_path / "cut")
    next((tmp_path / "cut").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match="damaged or only partly"):
        read_data(f"hf:{tmp_path}/cut", Images, columns=MAP)


def test_a_set_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "datasets--me--set" / "snapshots" / ("0" * 40)
    blob = tmp_path / "hub" / "datasets--me--set" / "blobs" / "b"
    snapshot.mkdir(parents=True), blob.parent.mkdir()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    pictures().to_parquet(blob)
    (snapshot / "train-00000-of-00001.parquet").symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    check_pictures(read_data("hf:me/set", LabelledImages, columns=MAP))


def test_rows_stay_on_disk_and_resume_is_exact(tmp_path):
    """Of a file of 40 MB a few rows are read: the table is mapped and almost nothing is allocated for it."""
    pa = pytest.importorskip("pyarrow")
    wide = np.random.default_rng(0).normal(size=(1000, 10000)).astype("float32")
    datasets.Dataset.from_dict({"x": wide}, features=datasets.Features(
        {"x": datasets.Sequence(datasets.Value("float32"))})).save_to_disk(tmp_path / "big")
    before = pa.total_allocated_bytes()
    data = read_data(f"hf:{tmp_path}/big", Samples, verify=4)
    assert torch.equal(data[777]["x"], torch.from_numpy(wide[777]))
    assert type(data.rows.data).__name__ == "MemoryMappedTable" or data.rows.cache_files
    assert pa.total_allocated_bytes() - before < wide.nbytes / 4

    def order(steps, folder):
        with Run(tmp_path / folder, quiet=True) as run:
            return [b["index"].tolist() for b in run.loop("read", data, batch=4, steps=steps)]

    assert order(6, "a")[:3] == order(3, "b")


# ------------------------------------------------------------------------------------------- CSV and JSONL


def test_csv_of_paths_stays_in_its_folder(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(4):
        (tmp_path / "set" / f"{i}.png").write_bytes(png(10 * i))
    (tmp_path / "secret.png").write_bytes(png(1))
    rows = "".join(f"{i}.png,{'bee' if i % 2 == 0 else 'cow'}\n" for i in range(4))
    (tmp_path / "set" / "a.csv").write_text(f"img,fine_label\n{rows}")
    check_pictures(read_data(tmp_path / "set" / "a.csv", LabelledImages, columns=MAP), 4)
    for bad in ("../secret.png", str(tmp_path / "secret.png")):
        (tmp_path / "set" / "b.csv").write_text(f"image,label\n0.png,0\n{bad},1\n")
        with pytest.raises(DataError, match="points outside its folder"):
            read_data(tmp_path / "set" / "b.csv", Images)
    (tmp_path / "set" / "c.csv").write_text("image,label\n0.png,0\nabsent.png,1\n")
    with pytest.raises(DataError, match=r"1 of 2 rows.*no file .*absent\.png.*limit_broken"):
        read_data(tmp_path / "set" / "c.csv", Images)
    with pytest.warns(UserWarning, match="left out"):
        data = read_data(tmp_path / "set" / "c.csv", Images, limit_broken=0.5)
    assert (data.summary().total, data.summary().read, len(data)) == (2, 1, 1)


def test_tables_that_cannot_be_used(tmp_path):
    def write(*rows, name="a.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return tmp_path / name

    with pytest.raises(DataError, match=r"'x' has NaN"):
        read_data(write({"x": [1.0, 2.0]}, {"x": [float("nan"), 1.0]}), Samples)
    with pytest.raises(DataError, match="every sample .* label 1: at least two"):
        read_data(write({"image": [[1, 2], [3, 4]], "label": 1}), LabelledImages)
    with pytest.raises(DataError, match=r"2 different sizes \(1x1x2, 1x2x2\).*--size"):
        read_data(write({"image": [[1, 2], [3, 4]]}, {"image": [[1, 2]]}), Images)
    assert fetch(read_data(tmp_path / "a.jsonl", Images, size=2), [0, 1])["image"].shape == (2, 1, 2, 2)
    with pytest.raises(DataError, match=r"1 of 2 lines.*line 2: it has no label"):
        read_data(write({"image": [[1]], "label": 0}, {"image": [[1]], "label": -1}), LabelledImages)
    assert read_data(tmp_path / "a.jsonl", Images).fields == ("image",)
    with pytest.raises(DataError, match="whole numbers or names, one has 0.5"):
        read_data(write({"image": [[1]], "label": 0.5}), LabelledImages)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match="has no rows"):
        read_data(tmp_path / "a.csv", Images)
    (tmp_path / "a.csv").write_text("prompt,response\nw,x,y\na,b\n\xff,b\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"2 of 3 rows of .*line 2: it has 3 values for 2 columns.*line 4.*UTF-8"):
        read_data(tmp_path / "a.csv", TokenPairs)
    with pytest.raises(ConfigError, match="columns go with a table"):
        read_data("digits", Images, columns=MAP)


def test_rows_found_broken_later_are_replaced_by_one_of_their_class(tmp_path):
    table = pictures().to_list()
    table[3]["img"]["bytes"] = b"no picture"
    features = pictures().features
    datasets.Dataset.from_list(table, features=features).save_to_disk(tmp_path / "set")
    data = read_data(f"hf:{tmp_path}/set", LabelledImages, columns=MAP, verify=2, limit_broken=0.2)
    with pytest.warns(UserWarning, match="1 of 8 rows"):
        item = data[3]
    assert item["index"] == 3 and item["label"] == 1 and torch.equal(item["image"], data[5]["image"])
    assert "row 3" in data.summary().broken


def test_tokens_and_sounds_in_tables(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    datasets.Dataset.from_dict({"ids": [[5, 6, 7], [8, 9]], "label": [0, 1]}).to_parquet(tmp_path / "ids.parquet")
    data = read_data(tmp_path / "ids.parquet", TokenPairs, columns={"input_ids": "ids"})
    batch = fetch(data, [0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["target_mask"].tolist() == batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert read_data(tmp_path / "ids.parquet", LabelledTexts, columns={"input_ids": "ids"}, length=2)[0][
        "input_ids"].tolist() == [5, 6]
    held = io.BytesIO()
    soundfile.write(held, np.full((80, 2), 0.5, "float32"), 8000, format="FLAC")
    datasets.Dataset.from_dict({"audio": [{"bytes": held.getvalue(), "path": None}] * 2}).cast_column(
        "audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "sounds")
    assert read_data(f"hf:{tmp_path}/sounds", SpeechData)[1]["audio"].tolist() == [0.5] * 80
    assert read_data(f"hf:{tmp_path}/sounds", SpeechData, rate=16000)[0]["audio"].shape == (160,)
    assert read_data(f"hf:{tmp_path}/sounds", SpeechData, size=100)[0]["audio"].shape == (100,)


def test_texts_in_tables(tmp_path):
    datasets.Dataset.from_dict({"q": ["a", "b"], "a": ["x", "y"]}).to_parquet(tmp_path / "a.parquet")
    data = read_data(tmp_path / "a.parquet", TokenPairs, columns={"prompt": "q", "response": "a"})
    assert data[1] == {"index": 1, "prompt": "b", "response": "y"}
    assert read_data(tmp_path / "a.parquet", SourceTargets, columns={"source": "q", "target": "a"}).target == ["x", "y"]
    with pytest.raises(DataError, match="no column 'input_ids'.*source and target"):
        read_data(tmp_path / "a.parquet", SourceTargets)


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    pictures().to_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for given in (tmp_path / "a.parquet", f"hf:{tmp_path}"):
        with pytest.raises(MissingExtraError, match=r"pip install 'stillhouse\[data\]'"):
            read_data(given, Images)


def test_column_maps():
    assert parse_columns("image=img, label = fine label") == {"image": "img", "label": "fine label"}
    for wrong in ("image", "image=", "=img", "image=a,image=b"):
        with pytest.raises(ConfigError):
            parse_columns(wrong)


# ------------------------------------------------------------------------------------------- arrays larger than memory


def test_large_safetensors_stay_on_disk_and_give_the_same(tmp_path, monkeypatch):
    image = torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8)
    save_file({"img": image, "label": torch.arange(30) % 3}, tmp_path / "a.safetensors")
    given = {"columns": {"image": "img"}, "size": 6, "channels": 1}
    small = read_data(tmp_path / "a.safetensors", LabelledImages, **given)
    monkeypatch.setattr(arrays, "IN_MEMORY", 100)
    large = read_data(tmp_path / "a.safetensors", LabelledImages, **given)
    assert isinstance(large, MappedSet) and large.columns["image"].dtype == torch.uint8
    for name in ("image", "label"):
        torch.testing.assert_close(large.batch([7, 2])[name], small.batch([7, 2])[name])
    torch.testing.assert_close(large[29]["image"], small[29]["image"])
    assert read_data(tmp_path / "a.safetensors", Samples, conditional=True, **given).fields == ("condition", "x")
    with Run(quiet=True) as run:
        assert sum(len(b["index"]) for b in run.loop("read", large, batch=4, epochs=1)) == 30
    bad = torch.zeros(30, 5)
    bad[17, 2] = float("nan")
    save_file({"x": bad}, tmp_path / "b.safetensors")
    monkeypatch.setattr(arrays, "BLOCK", 20)
    with pytest.raises(DataError, match="1 of 30 samples, the first at index 17"):
        read_data(tmp_path / "b.safetensors", Samples)


def anonymous():
    """Bytes of memory of this process that no file stands behind."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("the memory of a process is read from /proc")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])


def test_a_file_larger_than_the_budget_is_not_loaded(tmp_path, monkeypatch):
    x = torch.arange(4000).float()[:, None].repeat(1, 5000)
    save_file({"x": x}, tmp_path / "a.safetensors")
    size = x.nbytes
    del x
    monkeypatch.setattr(arrays, "IN_MEMORY", 1 << 20)
    before = anonymous()
    data = read_data(tmp_path / "a.safetensors", Samples)
    rows = [float(data[i]["x"].mean()) for i in (3, 3999, 1234)]
    assert rows == [3, 3999, 1234] and anonymous() - before < size / 4
