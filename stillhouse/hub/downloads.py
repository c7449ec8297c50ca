"""Where a model of the hub of Hugging Face lies on this machine: in a folder, in the cache, or yet to be fetched."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from stillhouse.errors import MissingExtraError, StillError, UnknownNameError
from stillhouse.hub.refusals import check_whole, only_pickles

WANTED = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHTS = ["*.safetensors"]
UNWANTED = ["*/*", "consolidated*", "*.fp16.safetensors", "*.bf16.safetensors"]
SECONDS = 2.0
"""How long the hub has to answer before it counts as out of reach."""


def local_folder(name: str, weights: bool = True) -> Path:
    """The folder that `name` is, or the snapshot of the hub's model of that name: from the cache if it is there, else
    fetched (safetensors, if `weights`, configuration and tokenizer alone) after one attempt to reach the hub.

    Raises UnknownNameError where there is neither, within about two seconds without internet.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UnknownNameError(f"there is no folder {folder} (seen from {Path.cwd()})")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingExtraError("hf:… needs transformers; install it with: pip install 'stillhouse[hf]'") from error

    wanted = [*WANTED, *WEIGHTS] if weights else WANTED

    def snapshot(offline: bool) -> Path:
        return Path(hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=UNWANTED,
                                          local_files_only=offline))

    cached = "not in"
    try:
        found = snapshot(offline=True)
        if _usable(found, name, weights):
            return found
        cached = "only partly in"
    except ValueError as error:
        raise UnknownNameError(f"'{name}' is no folder here (seen from {Path.cwd()}) and no name that a model of the "
                               f"hub can have: {_first(error)}") from error
    except OSError:
        pass
    here = f"'{name}' is no folder here (seen from {Path.cwd()}), {cached} the cache of Hugging Face"
    get = f"run `hf download {name}` where there is internet and give the folder"
    if hub.constants.HF_HUB_OFFLINE:
        raise UnknownNameError(f"{here}, and HF_HUB_OFFLINE forbids to fetch it. Check the name, or {get}")
    if not _answers(hub, f"{hub.constants.ENDPOINT}/api/models/{name}"):
        raise UnknownNameError(f"{here}, and {hub.constants.ENDPOINT} did not answer within {SECONDS:.0f} seconds: "
                               f"there seems to be no internet. Check the name, or {get}")
    try:
        return snapshot(offline=False)
    except Exception as error:
        raise UnknownNameError(f"{here}, and could not be fetched: {_first(error)} Check the name, or {get}") from error


def _usable(folder: Path, name: str, weights: bool) -> bool:
    """Whether a snapshot in the cache has all that is needed, or pickles alone, which are to be refused by name."""
    try:
        check_whole(folder, name)
    except StillError:
        return False
    return not weights or any(folder.glob("*.safetensors")) or bool(only_pickles(folder))


def _answers(hub: Any, url: str) -> bool:
    """Whether anything answers at `url`. Looking a host up cannot be timed out, hence the thread."""
    answered, done = threading.Event(), threading.Event()

    def ask() -> None:
        try:
            hub.get_session().head(url, timeout=SECONDS)
            answered.set()
        except Exception:  # no route, no such host, too slow, a proxy in the way: all the same here
            pass
        finally:
            done.set()

    threading.Thread(target=ask, daemon=True).start()
    done.wait(SECONDS)
    return answered.is_set()


def _first(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
