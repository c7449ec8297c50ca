"""The user's own data by one string: pictures, arrays, tables, text, sound, graphs, or the name of an embedded set.

Pictures are float32 [channels, height, width] in [-1, 1], as in the embedded sets: black is -1, white is 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stillhouse.data.arrays import GRAPHS, read_arrays, saved_set
from stillhouse.data.audio import is_sound, read_sounds
from stillhouse.data.distilled import FILE as DISTILLED
from stillhouse.data.embedded import EMBEDDED, embedded_name, parse_options, read_embedded
from stillhouse.data.pictures import PICTURES, Header, ImageFolder, coloured, decode, read_folder, resized
from stillhouse.data.rows import ENDINGS, open_rows
from stillhouse.data.sets import TensorSet, column
from stillhouse.data.text_files import TEXT_ROLES, read_jsonl, read_names, read_texts, text_source, tokenised
from stillhouse.errors import ConfigError, DataError, UnknownNameError, require
from stillhouse.protocols import OFFERS, ClassNames, Conditions, DomainImages, Graphs, Samples, SpeechData

__all__ = [
    "EMBEDDED", "PICKLES", "PICTURES", "Header", "ImageFolder", "decode", "embedded_name", "for_role", "parse_columns",
    "parse_options", "read_arrays", "read_data", "read_embedded", "read_folder", "read_jsonl", "read_names",
    "takes_columns", "tokenised",
]

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")
KINDS = ("a folder of pictures, sounds or .txt files, a file .npz, .safetensors, .parquet, .jsonl, .csv or .txt, "
         "hf:FOLDER of a saved data set, pyg:FOLDER of raw graphs, or the name of an embedded set")
TEXTS = {"prompt", "text", "source"}
OPTIONS = {".txt": ("lines",), "folder": ("lines", "rate")}


def read_data(
    text: str | Path,
    role_kind: Any = None,
    *,
    size: int | None = None,
    channels: int | None = None,
    limit_broken: float = 0.0,
    verify: int = 2000,
    conditional: bool = False,
    tokenizer: Any = None,
    length: int = 512,
    columns: Mapping[str, str] | None = None,
    rate: int | None = None,
) -> Any:
    """The data set that `text` names, a map-style set of dicts with `fields`.

    - A folder of pictures: class subfolders give `image` and `label` (their names sorted), pictures alone give `image`.
      They are decoded when asked for (`ImageFolder`). A `DistilledSet` or `GraphSet` saved in a folder is given.
    - `.npz` or `.safetensors`: `image` (and `label`, `other`) or `x` (and `condition`). Pictures of type uint8
      are scaled from [0, 255] to [-1, 1], others kept; [n, h, w] and [n, h, w, channels] are understood. A large
      .safetensors file stays on disk.
    - `.parquet`, `.jsonl`, `.csv`, `.tsv`: one row a sample, a field from the column of its name or of the one that
      `columns` gives: {"image": "img"}. Pictures and sounds are bytes, numbers, or paths beside the file.
    - `hf:NAME_OR_FOLDER:split=…,config=…`: a data set of `datasets`: a folder it saved or one of parquet files, or the
      name of one in the local cache of the hub. Rows are read from disk when asked for.
    - Texts `prompt` and `response`, `source` and `target`, `text` (and `label`), in tables; a `.txt` file or a folder
      of them, each one text, or with `:lines=true` one text a line. With a `tokenizer` they become token ids of
      `length` at most, without one they stay text for `tokenised`.
    - For SpeechData a folder of .wav, .flac or .ogg files, brought to `rate` samples a second (also `FOLDER:rate=…`).
    - `pyg:FOLDER`: the raw text files of a set of the TU collection, as torch_geometric downloads them.
    - `.txt`, for class names: one a line. The class subfolders of a folder of pictures are names too.
    - An embedded set: `digits`, `digits16:test`, `gauss2d:n=1000,seed=1`, `grammar:validation`. A file or folder of
      that name must be written `./digits`.

    `role_kind`, a data protocol of `stillhouse.protocols`, says which fields must be there; for `Samples` a picture
    becomes `x` and, if `conditional`, its label `condition`; for `Conditions` the label alone is read; for
    `DomainImages` the class subfolders, or labels, are domains unless there is a field `domain`. `size` is the
    wanted height and width of pictures: a larger or smaller one is scaled to cover the square, then cut to its middle;
    of sounds it is the number of samples. `channels` is 1 (grey) or 3 (RGB), by default 3 if any picture has colour.
    `limit_broken` is the part of the files or rows that may be unreadable: they are left out with a warning, and
    `summary()` of the set names them. `verify` pictures or rows are decoded before any work.

    Raises DataError: nothing at that path, an empty folder, a broken file above the limit, values that are not
    finite, a missing field, a single class where labels are needed, a pickle. Raises UnknownNameError for an embedded
    set that does not exist or an option it does not have, ConfigError for an impossible `size` or `channels`,
    MissingExtraError where reading needs a library that is not installed.
    """
    require(size is None or size >= 1, f"size must be at least 1 pixel, not {size}")
    require(length >= 2, f"length must be at least 2 tokens, not {length}")
    require(channels in (None, 1, 3), f"channels is 1 (grey) or 3 (RGB), not {channels}")
    require(0 <= limit_broken < 1, f"limit_broken is a fraction in [0, 1), not {limit_broken}")
    text = str(text)
    require(not columns or takes_columns(text), f"columns go with a table or arrays; {text} has none")
    path, options = _with_options(text)
    rate = int(options.get("rate", rate or 0)) or None
    tables = {"columns": columns, "size": size, "channels": channels, "rate": rate, "tokenizer": tokenizer,
              "length": length, "limit_broken": limit_broken, "verify": verify}
    data: Any
    if text.startswith("hf:"):
        from stillhouse.data.hub_sets import open_hub_set
        from stillhouse.data.tables import read_table

        data = read_table(open_hub_set(text), role_kind, **tables)
    elif text.startswith("pyg:"):
        from stillhouse.data.graph_files import read_tu

        data = read_tu(text.removeprefix("pyg:"))
    elif embedded_name(text) is not None:
        data = read_embedded(text, size)
    elif path.suffix.lower() in PICKLES:
        raise DataError(f"{path} is a pickle, or may hold one: reading it could run any program hidden in it, so it is "
                        "refused. Load it once where you trust it, and write the arrays with numpy.savez(…, image=…, "
                        "label=…) or safetensors")
    elif not path.exists():
        raise _nothing(text)
    elif path.is_dir():
        data = _folder(path, role_kind, bool(options.get("lines")), **tables)
    elif path.name in (DISTILLED, GRAPHS):
        data = saved_set(path)
    elif path.suffix.lower() in (".npz", ".safetensors"):
        data = read_arrays(path, size=size, channels=channels, columns=columns)
    elif path.suffix.lower() == ".txt" and role_kind is ClassNames:
        data = read_names(path)
    elif path.suffix.lower() == ".txt" and (role_kind is None or role_kind in TEXT_ROLES):
        data = _documents(path, role_kind, bool(options.get("lines")), **tables)
    elif path.suffix.lower() in ENDINGS:
        from stillhouse.data.tables import read_table

        data = read_table(open_rows(path), role_kind, **tables)
    else:
        raise DataError(f"{path} has an ending that is not read here ('{path.suffix}'); give {KINDS}")
    if isinstance(data, TensorSet) and "image" in data.data:
        image = coloured(resized(data.image, size), channels, text)
        data = data if image is data.image else data.with_fields(image=image)
    return for_role(data, role_kind, text, conditional)


def for_role(data: Any, role_kind: Any, name: str = "the data", conditional: bool = False) -> Any:
    """`data` with its fields named as `role_kind` wants them. Raises DataError for one that is missing."""
    if role_kind is None:
        return data
    classes = getattr(data, "classes", ())
    if role_kind is ClassNames and "name" not in data.fields and isinstance(classes, tuple) and classes:
        data = TensorSet(name=[c.replace("_", " ") for c in classes])
    if role_kind is Samples or role_kind is Conditions:
        renamed = {"label": "condition"} if (conditional or role_kind is Conditions) else {}
        if "x" not in data.fields:
            renamed["image"] = "x"
        data = _renamed(data, {old: new for old, new in renamed.items() if new not in data.fields})
    if role_kind is Conditions:
        data = _without_samples(data)
    if role_kind is DomainImages and "domain" not in data.fields and "label" in data.fields:
        data = _renamed(data, {"label": "domain"})
    needed = OFFERS.get(role_kind, ())
    if role_kind in TEXT_ROLES and TEXTS & set(data.fields):
        needed = tuple(field for field in needed if field == "label")
    absent = [field for field in needed if field not in data.fields]
    if "label" in absent and isinstance(data, ImageFolder):
        raise DataError(f"{name} has no labels, and its role needs them: put the pictures of each class into a "
                        "subfolder named after it")
    if absent:
        raise DataError(f"{name} has no field '{absent[0]}', which its role ({role_kind.__name__}) needs; it has "
                        f"{', '.join(data.fields)}")
    if "label" in needed:
        labels = torch.as_tensor(column(data, "label"))
        if labels.dim() == 1 and len(labels.unique()) < 2:
            raise DataError(f"every sample of {name} has the label {int(labels[0])}: at least two classes are needed "
                            "where labels are learned from")
    return data


def parse_columns(text: str) -> dict[str, str]:
    """`image=img,label=fine_label` as {"image": "img", "label": "fine_label"}. Raises ConfigError for anything else."""
    found: dict[str, str] = {}
    for part in text.split(","):
        field, equals, name = (word.strip() for word in part.partition("="))
        if not (equals and field and name):
            raise ConfigError(f"'{part}' is not of the form field=column (in '{text}'), e.g. image=img")
        require(field not in found, f"'{field}' is given twice in '{text}'")
        found[field] = name
    return found


def takes_columns(text: str) -> bool:
    """Whether what `text` names has columns, or named arrays, that can be chosen from."""
    return text.startswith("hf:") or Path(text).suffix.lower() in (*ENDINGS, ".npz", ".safetensors")


def _with_options(text: str) -> tuple[Path, dict[str, Any]]:
    """A path, and the options after its last colon where the path itself has none."""
    path = Path(text).expanduser()
    head, colon, rest = text.rpartition(":")
    before = Path(head).expanduser()
    if not colon or path.exists() or not before.exists():
        return path, {}
    options = parse_options(rest)
    known = OPTIONS.get("folder" if before.is_dir() else before.suffix.lower(), ())
    for option in options:
        require(option in known, f"{before} has no option '{option}'; it has {', '.join(known) or 'none'}",
                UnknownNameError)
    wrong = [n for n, v in options.items() if not isinstance(v, bool if n == "lines" else int)]
    require(not wrong, f"'{rest}': lines is true or false, rate a number of samples a second")
    return before, options


def _folder(path: Path, role_kind: Any, lines: bool, *, size: int | None, channels: int | None, rate: int | None,
            limit_broken: float, verify: int, **texts: Any) -> Any:
    from stillhouse.data.graph_files import is_processed

    if role_kind is SpeechData or (role_kind is None and rate is not None):
        return read_sounds(path, size, rate, limit_broken)
    saved = [path / name for name in (DISTILLED, GRAPHS) if (path / name).is_file()]
    if saved:
        return saved_set(saved[0])
    if role_kind in TEXT_ROLES or (role_kind is None and lines):
        return _documents(path, role_kind, lines, limit_broken=limit_broken, **texts)
    if is_processed(path) or role_kind is Graphs:
        pickled = is_processed(path)
        raise DataError((f"{path} was processed by torch_geometric: it holds pickles, which could run any program "
                         "while they are read, so it is refused. " if pickled else f"{path} holds no {GRAPHS}. ")
                        + f"Give pyg:{path} if it has the raw text files of the TU collection, or write it once where "
                        "you trust it: stillhouse.data.graph_files.graphs_of(dataset, folder), and give that folder")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        raise DataError(f"{path} was saved by datasets; write hf:{path}")
    try:
        return read_folder(path, size=size, channels=channels, limit_broken=limit_broken, verify=verify)
    except DataError as error:
        if "holds no pictures (" not in str(error):
            raise
        if role_kind is None and is_sound(path):
            return read_sounds(path, size, rate, limit_broken)
        if role_kind is None and next(path.rglob("*.txt"), None):
            return _documents(path, role_kind, lines, limit_broken=limit_broken, **texts)
        if next(path.rglob("*.parquet"), None):
            raise DataError(f"{path} holds parquet files; write hf:{path}") from error
        raise


def _documents(path: Path, role_kind: Any, lines: bool, *, tokenizer: Any, length: int, limit_broken: float,
               columns: Any = None, **unused: Any) -> Any:
    from stillhouse.data.text_files import text_form

    source = text_source(path, lines)
    form = text_form(role_kind, {"text": "text"})
    require(form is not None, f"{path} is plain text, but its role ({getattr(role_kind, '__name__', '')}) needs "
            "pairs or labels; give a .jsonl, .csv or .parquet file with columns for them", DataError)
    return read_texts(source, form or ("text",), {"text": "text"}, role_kind=role_kind, tokenizer=tokenizer,
                      length=length, limit_broken=limit_broken)


def _nothing(text: str) -> DataError | UnknownNameError:
    head = text.split(":", 1)[0]
    near = difflib.get_close_matches(head, EMBEDDED, n=1, cutoff=0.6)
    if near and "/" not in text and not Path(text).suffix:
        return UnknownNameError(f"there is no file or embedded set '{text}'; did you mean '{near[0]}'? Embedded are "
                                f"{', '.join(EMBEDDED)}")
    return DataError(f"there is nothing at {Path(text).expanduser()} (seen from {Path.cwd()}); give {KINDS} "
                     f"({', '.join(EMBEDDED)})")


def _renamed(data: Any, names: dict[str, str]) -> Any:
    if hasattr(data, "renamed"):
        return data.renamed(names)
    return TensorSet(**{names.get(field, field): value for field, value in data.data.items()})


def _without_samples(data: Any) -> Any:
    if hasattr(data, "renamed"):
        return data.without(*({"image", "x"} & set(data.fields))) if {"image", "x"} != set(data.fields) else data
    return data.without("x") if set(data.fields) - {"x"} else data
