
import numpy as np
import pytest
import torch

from stillhouse import store
from stillhouse.errors import DamagedFileError, StoreError


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def test_a_tree_comes_back_as_it_was(tmp_path):
    base = torch.randn(4, 6)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3, dtype=torch.float64)}, 1: {}},
        "list": [1, 2.5, float("inf"), float("nan"), None, True, "text", (1, "x")],
        "ragged": [torch.arange(3), torch.arange(5), torch.zeros(0, 7)],
        "bf16": torch.randn(3).bfloat16(), "bool": torch.tensor([True, False]), "array": np.arange(4.0),
        "transposed": base.T, "row": base[1], "scalar": np.float32(0.5),
    }
    tree["scalar"] = 0.5
    loaded = store.load_tree(store.save_tree(tmp_path / "a" / "x.safetensors", tree))
    assert same(tree, loaded)
    assert store.digest_of(tree) == store.digest_of(loaded)
    loaded["row"][0] += 1
    assert store.digest_of(tree) != store.digest_of(loaded)


def test_tied_tensors_are_stored_once(tmp_path):
    w = torch.randn(1000, 100)
    one = store.save_tree(tmp_path / "one.safetensors", {"a": w})
    two = store.save_tree(tmp_path / "two.safetensors", {"a": w, "b": w})
    assert two.stat().st_size < one.stat().st_size + 500
    loaded = store.load_tree(two)
    assert torch.equal(loaded["b"], w)


def test_what_cannot_be_stored_is_named():
    with pytest.raises(TypeError, match=r"cannot store set at 't.a.0'"):
        store.pack({"a": [{1, 2}]})


def test_damage_is_noticed(tmp_path):
    path = store.save_checked(tmp_path, "step-1", {"x": torch.randn(100)})
    assert store.find_checked(tmp_path, "step") == [path]
    assert same(store.load_checked(path)["x"], store.load_tree(path)["x"])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match="cut off or altered"):
        store.load_checked(path)
    path.write_bytes(data[:50])
    with pytest.raises(DamagedFileError):
        store.load_tree(path)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(DamagedFileError, match="not written by Stillhouse"):
        store.load_tree(tmp_path / "foreign.safetensors")
    with pytest.raises(StoreError, match="no file"):
        store.load_tree(tmp_path / "absent.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = store.save_tree(tmp_path / "x.safetensors", {"v": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(StoreError, match="no space left"):
        store.save_tree(path, {"v": 2})
    assert store.load_tree(path) == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_names_cannot_leave_their_folder(tmp_path):
    assert store.inside(tmp_path, "a/b.png") == tmp_path.resolve() / "a/b.png"
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(StoreError, match="outside"):
            store.inside(tmp_path, name)
