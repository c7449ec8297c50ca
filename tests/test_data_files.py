"""Sounds, graphs and picture folders of a user, read through the string that is typed."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.data import arrays
from stillhouse.data.audio import SoundFolder, read_sound, read_wav
from stillhouse.data.readers import read_data
from stillhouse.data.sets import collate, fetch
from stillhouse.errors import DataError, UnknownNameError
from stillhouse.protocols import Graphs, Images, SpeechData


def tone(rate=16000, seconds=0.05, pitch=440.0):
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)).astype("float32")


@pytest.fixture
def sounds(tmp_path):
    """Two classes with two files each, .flac and .wav, one in stereo."""
    soundfile = pytest.importorskip("soundfile")
    for i, (name, ending) in enumerate((("dog", "flac"), ("dog", "wav"), ("cat", "flac"), ("cat", "wav"))):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        values = tone(pitch=200.0 * (i + 1))
        soundfile.write(tmp_path / "set" / name / f"{i}.{ending}", np.stack([values, values], 1) if i == 0 else values,
                        16000)
    return tmp_path / "set"


# ------------------------------------------------------------------------------------------- sound


def test_sounds_of_several_kinds_in_class_folders(sounds):
    data = read_data(sounds, SpeechData)
    assert data.audio.shape == (4, 800) and data.classes == ("cat", "dog") and data.label.tolist() == [0, 0, 1, 1]
    for place, i in enumerate((2, 3, 0, 1)):
        np.testing.assert_allclose(data.audio[place], tone(pitch=200.0 * (i + 1)), atol=1 / 32768)


@pytest.mark.parametrize(("width", "kind", "zero"), [(1, "u1", 128), (2, "<i2", 0), (4, "<i4", 0)])
def test_wav_is_read_as_soundfile_reads_it(tmp_path, width, kind, zero):
    soundfile = pytest.importorskip("soundfile")
    top = 2 ** (8 * width - 1) - 1
    values = (np.random.default_rng(0).uniform(-1, 1, (300, 2)) * top + zero).astype(kind)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(width), file.setframerate(8000)
        file.writeframes(values.tobytes())
    own, rate = read_sound(tmp_path / "a.wav")
    assert rate == 8000 and torch.equal(own, read_wav(tmp_path / "a.wav")[0])
    other = soundfile.read(tmp_path / "a.wav", dtype="float32")[0].mean(1)
    np.testing.assert_allclose(own, other, atol=1 / 32768, rtol=0)


def test_other_wav_files_are_read_too(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for subtype in ("PCM_24", "FLOAT"):
        soundfile.write(tmp_path / "a.wav", tone(), 16000, subtype=subtype)
        np.testing.assert_allclose(read_sound(tmp_path / "a.wav")[0], tone(), atol=1e-6)


def test_rates_are_brought_together(sounds):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(sounds / "dog" / "slow.wav", tone(8000), 8000)
    with pytest.raises(DataError, match="different rates .*:rate=16000"):
        read_data(sounds, SpeechData)
    for given in ({"text": sounds, "rate": 16000}, {"text": f"{sounds}:rate=16000"}):
        data = read_data(given.pop("text"), SpeechData, **given)
        assert data.audio.shape == (5, 800)
        np.testing.assert_allclose(data.audio[4, 100:-100], tone()[100:-100], atol=0.01)
    with pytest.raises(UnknownNameError, match="no option 'speed'"):
        read_data(f"{sounds}:speed=3", SpeechData)


def test_broken_and_uneven_sounds(sounds):
    (sounds / "cat" / "bad.flac").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"1 of 5 sounds cannot be read.*bad\.flac.*limit_broken"):
        read_data(sounds, SpeechData)
    with pytest.warns(UserWarning, match="left out"):
        data = read_data(sounds, SpeechData, limit_broken=0.2)
    assert len(data) == 4 and data.summary().read == 4 and data.summary().total == 5
    (sounds / "cat" / "bad.flac").unlink()
    pytest.importorskip("soundfile").write(sounds / "cat" / "short.wav", tone(seconds=0.01), 16000)
    with pytest.raises(DataError, match=r"2 different lengths \(160 to 800 samples\).*size"):
        read_data(sounds, SpeechData)
    assert read_data(sounds, SpeechData, size=300).audio.shape == (5, 300)


def test_many_sounds_stay_on_disk(sounds, monkeypatch):
    small = read_data(sounds, SpeechData, size=500)
    monkeypatch.setattr(arrays, "IN_MEMORY", 4000)
    large = read_data(sounds, SpeechData, size=500)
    assert isinstance(large, SoundFolder) and large.fields == ("audio", "label")
    both = fetch(large, [3, 1]), fetch(small, [3, 1])
    assert torch.equal(both[0]["audio"], both[1]["audio"]) and torch.equal(both[0]["label"], both[1]["label"])


# ------------------------------------------------------------------------------------------- graphs


def tu(folder, **changed):
    """Two graphs, a triangle and a pair, in the text files of the TU collection."""
    files = {"A": "1, 2\n2, 1\n2, 3\n3, 2\n1, 3\n3, 1\n4, 5\n5, 4\n", "graph_indicator": "1\n1\n1\n2\n2\n",
             "graph_labels": "-1\n1\n", "node_labels": "3\n5\n3\n5\n9\n", **changed}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        if text is not None:
            (folder / f"TOY_{name}.txt").write_text(text)
    return folder


def test_raw_graphs(tmp_path):
    tu(tmp_path / "set" / "raw")
    for given in (tmp_path / "set", tmp_path / "set" / "raw"):
        data = read_data(f"pyg:{given}", Graphs)
        assert data.label.tolist() == [0, 1] and [x.tolist() for x in data.node_label] == [[0, 1, 0], [1, 2]]
        assert data.edge_index[1].tolist() == [[0, 1], [1, 0]] and data.edge_index[0].shape == (2, 6)
    plain = read_data(f"pyg:{tu(tmp_path / 'plain', node_labels=None)}", Graphs)
    assert [x.tolist() for x in plain.node_label] == [[2, 2, 2], [1, 1]] and plain.node_classes == 11


def test_raw_graphs_are_those_of_torch_geometric(tmp_path):
    pytest.importorskip("torch_geometric")
    from torch_geometric.io import read_tu_data

    tu(tmp_path / "raw", edge_labels="".join(f"{k}\n" for k in (0, 0, 1, 1, 0, 0, 1, 1)))
    ours = read_data(f"pyg:{tmp_path}", Graphs)
    data, slices, _ = read_tu_data(str(tmp_path / "raw"), "TOY")
    assert ours.edge_classes == 2 and slices["edge_index"].tolist() == [0, 6, 8]
    triples = torch.cat([torch.cat(ours.edge_index, 1), torch.cat(ours.edge_label)[None]]).T.tolist()
    theirs = torch.cat([data.edge_index, data.edge_attr.argmax(1)[None]]).T.tolist()
    assert [sorted(triples[:6]), sorted(triples[6:])] == [sorted(theirs[:6]), sorted(theirs[6:])]
    assert slices["x"].tolist() == [0, 3, 5] and torch.equal(ours.label, data.y)


@pytest.mark.parametrize(("changed", "says"), [
    ({"graph_labels": None}, "TOY_graph_labels.txt is missing"),
    ({"A": "1, 9\n"}, "a node that is not among the 5"), ({"A": "1, 4\n"}, "an edge between two graphs"),
    ({"A": "1, x\n"}, "damaged: whole numbers"), ({"node_labels": "1\n"}, "1 lines for 5 nodes"),
    ({"graph_indicator": "1\n1\n1\n2\n3\n"}, "names graph 3 of 2"), ({"A": "1\n"}, "1 numbers a line, not 2"),
])
def test_raw_graphs_that_cannot_be_used(tmp_path, changed, says):
    with pytest.raises(DataError, match=says):
        read_data(f"pyg:{tu(tmp_path / 'set', **changed)}", Graphs)


def test_processed_graphs_are_refused_and_written_anew(tmp_path):
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Data

    from stillhouse.data.graph_files import graphs_of

    (tmp_path / "set" / "processed").mkdir(parents=True)
    (tmp_path / "set" / "processed" / "data.pt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds pickles.*pyg:.*graphs_of\(dataset, folder\)"):
        read_data(tmp_path / "set", Graphs)
    edges = torch.tensor([[0, 1], [1, 0]])
    dataset = [Data(x=torch.eye(3)[[i % 3, 1]], edge_index=edges, y=torch.tensor([i % 2])) for i in range(6)]
    graphs_of(dataset, tmp_path / "ours")
    data = read_data(tmp_path / "ours", Graphs)
    assert data.label.tolist() == [0, 1] * 3 and len(data.node_label) == 6 and data.node_classes == 4
    with pytest.raises(DataError, match="no folder"):
        read_data(f"pyg:{tmp_path}/absent", Graphs)


# ------------------------------------------------------------------------------------------- pictures


def test_parts_of_a_set_are_not_taken_for_classes(tmp_path):
    for part in ("train", "test"):
        for name in ("bee", "cow"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (4, 4)).save(tmp_path / part / name / "a.png")
    with pytest.raises(DataError, match=r"parts test, train of a data set, not classes; give the one you want: .*test"):
        read_data(tmp_path, Images)
    assert read_data(tmp_path / "train", Images).classes == ("bee", "cow")


def test_a_batch_of_a_folder_is_its_items(tmp_path):
    rng = np.random.default_rng(0)
    for i, (mode, ending) in enumerate((("RGB", "png"), ("L", "png"), ("RGB", "jpg"), ("L", "jpg"))):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (9, 7 + i, 3) if mode == "RGB" else (9, 7 + i), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i}.{ending}")
    for channels in (1, 3):
        data = read_data(tmp_path, Images, size=6, channels=channels)
        batch, items = data.batch([3, 0, 2, -1]), collate([data[i] for i in (3, 0, 2, 3)])
        assert all(torch.equal(batch[name], items[name]) for name in items) and set(batch) == set(items)
        assert batch["image"].shape == (4, channels, 6, 6)
    data.size = None
    with pytest.raises(DataError, match="sizes came together in one batch"):
        data.batch([0, 1])


def test_a_folder_knows_what_was_left_out(tmp_path):
    for i in range(3):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
    assert str(read_data(tmp_path, Images).summary()) == "all 3 pictures can be read"
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.warns(UserWarning):
        found = read_data(tmp_path, Images, limit_broken=0.3).summary()
    assert (found.total, found.read) == (4, 3) and list(found.broken) == [tmp_path / "bad.png"]
    assert "1 of 4 pictures cannot be read" in str(found)
