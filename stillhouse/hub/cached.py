"""A cache of outputs (`stillhouse.run.caches`) in the place of the teacher that made it.

Inputs are looked up by their content, so a system needs to know nothing of it; one that changes its inputs at random
gets an error that says so.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.kept import Kept, Table, keys_of, token_keys
from stillhouse.data.readers import parse_options
from stillhouse.errors import RoleError, UnknownNameError, require
from stillhouse.protocols import OFFERS
from stillhouse.run.caches import KINDS
from stillhouse.store import digest_of

WHOLE = ("this teacher knows the likeliest tokens alone, and here whole logits are asked for. It fits the systems "
         "whose teacher may be a TopKTeacher; `still show SLUG` says which kind a role takes")


class Cached(nn.Module):
    """What is kept in a folder, by input. The result of every look-up is that of the teacher, on the input's device.

    Raises DataError for no cache, or one that is not finished; RoleError for an input that is not in it.
    """

    identity: Tensor

    def __init__(self, folder: Path | str):
        super().__init__()
        self.kept = Kept(folder)
        self.role: str = self.kept.about["role"]
        self.table = Table(self.kept.keys())
        words = digest_of(self.kept.about, [b["file"] for b in self.kept.manifest["blocks"]])
        self.register_buffer("identity", torch.tensor(list(bytes.fromhex(words)), dtype=torch.uint8))

    def rows(self, keys: Int[Tensor, "n 2"], what: str) -> list[dict[str, Any]]:
        """The kept rows of these keys."""
        place, found = self.table.to(keys.device).find(keys)
        if not bool(found.all()):
            about = self.kept.about
            samples = f"{self.kept.rows // about['views']} samples, {_views(about['views'])}"
            raise RoleError(f"{int((~found).sum())} of {len(found)} {what} are not in the cache {self.kept.folder}: it "
                            f"was made of {samples}. A system that changes its inputs at random (a view, noise, texts "
                            "that the student wrote) cannot use it: switch that off, or make the cache with --views K "
                            "and train on with_views(data, K), or give the teacher itself")
        return self.kept.take(place.cpu())

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The kept vector of each picture [batch, …], or of each text where `x` are token ids."""
        texts = self.role.startswith("text-")
        rows = self.rows(token_keys(x, attention_mask) if texts else keys_of(x), "texts" if texts else "pictures")
        return _stacked(rows, "out", x.device)


class CachedSpeech(Cached):
    """A SpeechEncoder: `last_hidden_state` and, in `hidden_states`, the layers that were kept (None elsewhere)."""

    def forward(self, audio: Tensor, output_hidden_states: bool = False, **_: Any) -> Any:  # type: ignore[override]
        rows = self.rows(keys_of(audio), "sounds")
        layers = {int(n.partition(".")[2]): _stacked(rows, n, audio.device) for n in rows[0] if n.startswith("hidden.")}
        states = [layers.get(i) for i in range(max(layers, default=-1) + 1)]
        return SimpleNamespace(last_hidden_state=_stacked(rows, "out", audio.device), hidden_states=tuple(states))


class CachedTopK(Cached):
    """A TopKTeacher: the kept log-probabilities, at the cache's `temperature`, of every real token."""

    def __init__(self, folder: Path | str):
        super().__init__(folder)
        self.vocabulary = int(self.kept.about["vocabulary"])
        self.temperature = float(self.kept.about["temperature"])

    def top_k(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch length k"], Int[Tensor, "batch length k"]]:
        rows = self.rows(token_keys(input_ids, attention_mask), "texts")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        shape = (*input_ids.shape, rows[0]["index"].shape[-1])
        log_p = torch.full(shape, -torch.inf, device=input_ids.device)
        index = torch.zeros(shape, dtype=torch.long, device=input_ids.device)
        log_p[real.bool()] = torch.cat([_log_p(row) for row in rows]).to(input_ids.device)
        index[real.bool()] = torch.cat([torch.tensor(row["index"]) for row in rows]).long().to(input_ids.device)
        return log_p, index

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise RoleError(WHOLE)


def load_cached(text: str, kind: Any = None) -> Cached:
    """The teacher of `cache:FOLDER[:temperature=T]`, checked for its role kind.

    Log-probabilities at another temperature than 1 are refused unless the option says that they are wanted.
    """
    folder, _, words = text.rpartition(":") if "=" in text.rpartition(":")[2] else (text, "", "")
    options = parse_options(words) if words else {}
    for name in options:
        require(name == "temperature", f"'cache:{folder}' has no option '{name}'; it has temperature", UnknownNameError)
    kept = Kept(folder)
    role = kept.about["role"]
    require(role in KINDS, f"{folder} keeps what a {role} made, which is data, not a teacher: read it with "
            "stillhouse.run.caches.Pairs", RoleError)
    wanted = getattr(kind, "__name__", KINDS[role].__name__)
    given = KINDS[role].__name__
    fits = wanted == given or (wanted == "TopKTeacher" and given == "CausalLM")
    require(fits, f"the cache {folder} keeps outputs of a {role}, and this role needs a {wanted}; make one with "
            f"--role {next((n for n, k in KINDS.items() if k.__name__ == wanted), 'causal-lm')}", RoleError)
    require(kind not in OFFERS, "a cache is a teacher, not data", RoleError)
    if role == "causal-lm":
        made = CachedTopK(folder)
        asked = float(options.get("temperature", 1.0))
        require(made.temperature == asked, f"the cache {folder} keeps log-probabilities at temperature "
                f"{made.temperature:g}, and {asked:g} is asked for; make one with --temperature {asked:g}, or say that "
                f"you want these: cache:{folder}:temperature={made.temperature:g}", RoleError)
        return made.eval()
    require(not options, f"'cache:{folder}' keeps no log-probabilities, so it has no temperature", UnknownNameError)
    return (CachedSpeech(folder) if role == "speech-encoder" else Cached(folder)).eval()


def _stacked(rows: list[dict[str, Any]], name: str, device: torch.device) -> Tensor:
    return torch.stack([torch.tensor(row[name]) for row in rows]).float().to(device)


def _log_p(row: dict[str, Any]) -> Tensor:
    value = torch.tensor(row["log_p"])
    if value.dtype is not torch.uint8:
        return value.float()
    known = value < 255
    return (-value.float() * torch.tensor(row["log_p.scale"])[:, None]).masked_fill(~known, -torch.inf)


def _views(views: int) -> str:
    return "as they are" if views == 1 else f"in {views} fixed views each"
