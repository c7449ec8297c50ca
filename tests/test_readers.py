import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stillhouse.data.digits import digits
from stillhouse.data.distilled import DistilledSet
from stillhouse.data.readers import decode, parse_options, read_data
from stillhouse.data.sets import fetch
from stillhouse.errors import ConfigError, DataError, StillError, UnknownNameError
from stillhouse.protocols import Conditions, Graphs, Images, LabelledImages, Samples, TokenPairs
from stillhouse.run import Run


def picture(path, value=128, size=(6, 6), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def classes(tmp_path):
    """Three classes with two pictures each, the grey level 40 x label + picture."""
    for label, name in enumerate(("bee", "cow", "yak")):
        for i in range(2):
            picture(tmp_path / "set" / name / f"{i}.png", 40 * label + i)
    return tmp_path / "set"


def torn(path):
    """A picture whose header is whole and whose pixels are not all there."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:700])
    return path


# ------------------------------------------------------------------------------------------- folders


def test_class_folders_give_sorted_labels(classes):
    data = read_data(str(classes), LabelledImages)
    assert (data.fields, data.classes, len(data)) == (("image", "label"), ("bee", "cow", "yak"), 6)
    batch = fetch(data, range(6))
    assert batch["label"].tolist() == [0, 0, 1, 1, 2, 2] and batch["index"].tolist() == list(range(6))
    grey = torch.tensor([0, 1, 40, 41, 80, 81])
    torch.testing.assert_close(batch["image"][:, 0, 3, 3], grey / 127.5 - 1)
    assert batch["image"].shape == (6, 1, 6, 6)


def test_pictures_are_decoded_when_asked_for(classes):
    data = read_data(classes, LabelledImages, verify=0)
    (classes / "cow" / "0.png").unlink()
    assert data[0]["image"].shape == (1, 6, 6)
    with pytest.raises(DataError, match=r"1 of 6 pictures cannot be read.*cow/0\.png"):
        data[2]


def test_a_folder_trains_in_a_loop_as_any_set(classes):
    seen = []
    with Run(quiet=True) as run:
        for batch in run.loop("read", read_data(classes), batch=3, epochs=1):
            seen += batch["label"].tolist()
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]


def test_flat_folder_has_no_labels(tmp_path):
    picture(tmp_path / "a.png"), picture(tmp_path / "b.JPG")
    (tmp_path / "notes.txt").write_text("not a picture")
    data = read_data(str(tmp_path), Images)
    assert data.fields == ("image",) and len(data) == 2 and set(data[0]) == {"index", "image"}
    with pytest.raises(DataError, match="has no labels.*subfolder"):
        read_data(str(tmp_path), LabelledImages)


def test_colour_and_size(tmp_path):
    picture(tmp_path / "a.png", 10)
    picture(tmp_path / "b.png", (255, 0, 0), (9, 6), "RGB")
    with pytest.raises(DataError, match=r"2 different sizes \(6x6, 9x6\).*size="):
        read_data(tmp_path)
    both = read_data(tmp_path, size=4)
    assert both[0]["image"].shape == both[1]["image"].shape == (3, 4, 4)
    assert both[1]["image"][:, 0, 0].tolist() == [1, -1, -1]
    assert read_data(tmp_path, size=4, channels=1)[1]["image"].shape == (1, 4, 4)


def test_size_keeps_proportions_and_the_middle(tmp_path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert bool((decode(tmp_path / "a.png", 4, 1) == 1).all())


def test_unusual_pictures(tmp_path):
    Image.fromarray(np.full((3, 3), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert bool((decode(tmp_path / "deep.png", None, 1) == 1).all())
    Image.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert bool((decode(tmp_path / "clear.png") == 1).all())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", None, 1).shape == (1, 8, 4)
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff.*\.npz"):
        decode(tmp_path / "float.tiff")


@pytest.mark.parametrize("torn_at", ["header", "pixels"])
def test_unreadable_pictures_are_named_counted_and_limited(classes, torn_at):
    bad = classes / "cow" / "torn.png"
    torn(bad) if torn_at == "pixels" else bad.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 of 7 pictures cannot be read.*torn\.png.*limit_broken"):
        read_data(classes, size=6)
    with pytest.raises(DataError, match="limit_broken"):
        read_data(classes, size=6, limit_broken=0.1)
    with pytest.warns(UserWarning, match=r"1 of 7 pictures.*torn\.png.*left out"):
        data = read_data(classes, LabelledImages, size=6, limit_broken=0.2)
    assert len(data) == 6 and list(data.broken) == [bad] and data.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_picture_found_torn_later_is_replaced_by_one_of_its_class(classes):
    torn(classes / "cow" / "1a.png")
    data = read_data(classes, size=6, limit_broken=0.2, verify=0)
    assert len(data) == 7
    with pytest.warns(UserWarning, match="left out"):
        item = data[4]
    assert item["label"] == 1 and item["index"] == 4
    torch.testing.assert_close(item["image"], data[2]["image"])
    with pytest.raises(DataError, match="1 of 7"):
        read_data(classes, size=6, limit_broken=0.1, verify=0)[4]


def test_folders_that_cannot_be_used(tmp_path, classes):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        read_data(tmp_path / "empty")
    (classes / "zebra").mkdir()
    with pytest.raises(DataError, match="class folder 'zebra'.*shift the labels"):
        read_data(classes)
    (classes / "zebra").rmdir()
    picture(classes / "loose.png")
    with pytest.raises(DataError, match="beside its subfolders"):
        read_data(classes)
    picture(tmp_path / "one" / "cat" / "a.png")
    with pytest.raises(DataError, match="label 0.*two classes"):
        read_data(tmp_path / "one", LabelledImages)
    assert len(read_data(tmp_path / "one", Images)) == 1


def test_folder_as_samples_and_conditions(classes):
    assert set(read_data(classes, Samples)[0]) == {"index", "x", "label"}
    assert read_data(classes, Samples, conditional=True)[5]["condition"] == 2
    conditions = read_data(classes, Conditions)
    assert conditions.fields == ("condition",) and conditions[3] == {"index": 3, "condition": 1}


# ------------------------------------------------------------------------------------------- arrays


def test_npz_pictures(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", image=raw, label=np.array([0, 1, 2, 1, 0], np.uint16))
    data = read_data(str(tmp_path / "a.npz"), LabelledImages)
    assert data.image.shape == (5, 3, 8, 8) and data.image.dtype == torch.float32 and data.label.dtype == torch.int64
    torch.testing.assert_close(data.image[1, 2], torch.from_numpy(raw[1, :, :, 2]).float() / 127.5 - 1)
    small = read_data(str(tmp_path / "a.npz"), size=4, channels=1)
    assert small.image.shape == (5, 1, 4, 4)
    np.savez(tmp_path / "grey.npz", image=np.full((2, 4, 4), 0.25, ">f8"))
    grey = read_data(str(tmp_path / "grey.npz"), Images, channels=3)
    assert grey.image.shape == (2, 3, 4, 4) and bool((grey.image == 0.25).all())


def test_safetensors_samples(tmp_path):
    whole = {"x": torch.randn(4, 2).double(), "condition": torch.arange(4, dtype=torch.int32)}
    save_file(whole, tmp_path / "a.safetensors")
    data = read_data(str(tmp_path / "a.safetensors"), Samples)
    assert set(data.fields) == {"condition", "x"}
    assert data.x.dtype == torch.float32 and data.condition.dtype == torch.int64
    assert read_data(str(tmp_path / "a.safetensors"), Conditions).fields == ("condition",)
    with pytest.raises(DataError, match="no field 'image'.*Images.*it has x, condition"):
        read_data(str(tmp_path / "a.safetensors"), Images)


@pytest.mark.parametrize(("arrays", "says"), [
    ({"x": np.array([[0.0, 1], [np.nan, 1], [np.inf, 0]])}, "NaN or infinite values in 2 of 3 samples.* at index 1"),
    ({"x_train": np.zeros((2, 2))}, "no array named 'image'.*x_train.*numpy.savez"),
    ({"image": np.zeros((3, 4, 4)), "label": np.zeros(2, int)}, "differ in length"),
    ({"image": np.zeros((0, 4, 4))}, "'image'.*is empty"),
    ({"image": np.zeros((3, 16))}, r"must be \[n, channels, height, width\]"),
    ({"image": np.zeros((2, 4, 4)), "label": np.array([0.5, 1])}, "whole numbers"),
    ({"image": np.zeros((2, 4, 4)), "label": np.array([-1, 1])}, "negative labels"),
    ({"x": np.array([{"a": 1}, None], object)}, "pickled objects.*refused"),
    ({"x": np.array(["a", "b"])}, "not numeric"),
])
def test_arrays_that_cannot_be_used(tmp_path, arrays, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=says):
        read_data(str(tmp_path / "a.npz"))


def test_single_class_where_labels_are_needed(tmp_path):
    np.savez(tmp_path / "a.npz", image=np.zeros((3, 4, 4)), label=np.full(3, 7))
    assert len(read_data(tmp_path / "a.npz", Images)) == 3
    with pytest.raises(DataError, match="label 7.*two classes"):
        read_data(tmp_path / "a.npz", LabelledImages)


def test_a_pickle_in_an_npz_runs_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.savez(tmp_path / "a.npz", x=np.array([Trap()], object))
    with pytest.raises(DataError, match="pickle"):
        read_data(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_damaged_arrays(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x10not an archive at all")
    with pytest.raises(DataError, match="damaged"):
        read_data(str(tmp_path / name))


def test_a_distilled_set_is_read_back(tmp_path):
    DistilledSet(torch.randn(4, 1, 8, 8), torch.arange(4)).save(tmp_path / "out")
    for given in (tmp_path / "out", tmp_path / "out" / "distilled.safetensors"):
        assert read_data(given, LabelledImages).label.tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------- text


class Letters:
    """A tokenizer whose tokens are characters."""

    eos_token_id, pad_token_id = 0, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}


def lines(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_jsonl_pairs_are_tokenised_now_or_later(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "ab", "response": "cü", "source": 1}, "",
                 {"prompt": "x", "response": "y"})
    data = read_data(str(path), TokenPairs)
    assert data.fields == ("prompt", "response") and data[0] == {"index": 0, "prompt": "ab", "response": "cü"}
    packed = read_data(str(path), TokenPairs, tokenizer=Letters(), length=8)
    assert packed.input_ids.tolist() == [[97, 98, 99, 252, 0], [120, 121, 0, 0, 0]]
    assert packed.target_mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]


def test_jsonl_plain_text(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "de"})
    assert read_data(path, TokenPairs).text == ["abc", "de"]
    packed = read_data(path, TokenPairs, tokenizer=Letters(), length=3)
    assert packed.input_ids.tolist() == [[97, 98, 99], [0, 100, 101]]


@pytest.mark.parametrize(("row", "says"), [
    ("{broken", "1 of 2 lines.*line 2"),
    ("[1, 2]", "line 2: a JSON object is expected, not list"),
    ({"prompt": "a", "answer": "b"}, r"line 2: 'response' is missing \(there is prompt, answer\)"),
    ({"prompt": "a", "response": "  "}, "line 2: 'response' must be a text"),
    ({"prompt": "a", "response": 3}, "line 2: 'response' must be a text"),
])
def test_lines_that_cannot_be_used(tmp_path, row, says):
    path = lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, row)
    with pytest.raises(DataError, match=says):
        read_data(path)
    with pytest.warns(UserWarning, match="left out"):
        assert len(read_data(path, limit_broken=0.5)) == 1


def test_jsonl_without_lines_or_in_another_encoding(tmp_path):
    with pytest.raises(DataError, match="has no lines"):
        read_data(lines(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff\xfe"}')
    with pytest.raises(DataError, match="line 1.*utf-8"):
        read_data(tmp_path / "b.jsonl")


# ------------------------------------------------------------------------------------------- names and paths


@pytest.mark.parametrize(("text", "n", "shape"), [
    ("digits", 1200, (1, 8, 8)), ("digits:test", 597, (1, 8, 8)), ("digits16:unlabelled", 1000, (1, 16, 16)),
    ("digits:split=labelled,size=12", 200, (1, 12, 12)), ("corrupted-digits16:n=30", 30, (1, 16, 16)),
])
def test_embedded_pictures(text, n, shape):
    data = read_data(text, Images)
    assert len(data) == n and data.image.shape[1:] == shape


def test_embedded_sets():
    assert torch.equal(read_data("digits", size=16).image, digits(16, "train").image)
    assert read_data("gauss2d:n=50,seed=3", Samples).x.shape == (50, 2)
    assert read_data("digits:test", Samples, conditional=True).fields == ("x", "condition")
    assert read_data("grammar:validation,n=9", TokenPairs).input_ids.shape == (9, 24)


def test_graphs_by_name_and_read_back(tmp_path):
    graphs = read_data("motifs:test,n=6", Graphs)
    assert len(graphs) == 6
    graphs.save(tmp_path / "out")
    for given in (tmp_path / "out", tmp_path / "out" / "graphs.safetensors"):
        again = read_data(given, Graphs)
        assert again.label.tolist() == graphs.label.tolist() and torch.equal(again.edge_index[3], graphs.edge_index[3])


@pytest.mark.parametrize(("text", "says"), [
    ("digit", "did you mean 'digits'"), ("digits:tset", "no split 'tset'"), ("digits:colour=3", "no option 'colour'"),
    ("gauss2d:40", "no option 'split'"), ("nowhere/pictures", "nothing at"), ("digits.png", "nothing at"),
])
def test_names_and_paths_that_do_not_exist(text, says):
    with pytest.raises((UnknownNameError, DataError), match=says):
        read_data(text)


@pytest.mark.parametrize("name", ["a.pt", "a.pkl", "a.PTH"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match="pickle.*safetensors"):
        read_data(tmp_path / name)


def test_other_files_and_settings(tmp_path):
    (tmp_path / "a.doc").write_text("1,2")
    with pytest.raises(DataError, match=r"'\.doc'.*\.npz"):
        read_data(tmp_path / "a.doc")
    for wrong in ({"size": 0}, {"channels": 2}, {"limit_broken": 1.0}):
        with pytest.raises(ConfigError):
            read_data("digits", **wrong)


def test_options():
    assert parse_options("a=1,b=0.5,c=x,d=true,e=none") == {"a": 1, "b": 0.5, "c": "x", "d": True, "e": None}
    assert parse_options("test,n=3", "split") == {"split": "test", "n": 3}
    for wrong in ("a", "a=", "a=1,a=2", "=3"):
        with pytest.raises(StillError):
            parse_options(wrong)
