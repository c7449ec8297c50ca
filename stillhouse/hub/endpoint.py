"""Teachers behind an interface: an OpenAI-compatible completions endpoint, or a plain Python function.

An endpoint is asked for the log-probabilities of the tokens of a prompt (`echo`, `logprobs`), one request a sequence:
vLLM and others give them; interfaces for chat alone do not, but they answer (`Endpoint.complete`). Every answer is kept
on disk under the hash of its question as it comes, so nothing is asked twice.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.data.readers import parse_options
from stillhouse.errors import (
    ConfigError,
    DataError,
    EndpointError,
    MissingExtraError,
    RoleError,
    StillError,
    UnknownNameError,
    require,
)
from stillhouse.hub.cached import WHOLE
from stillhouse.protocols import CausalLM, TopKTeacher
from stillhouse.store import cache_folder, digest_of, write_text

OPTIONS = ("model", "tokenizer", "top_k", "budget", "tokens", "timeout", "retries", "key_env", "parallel", "vocabulary",
           "token_ids", "chat", "kept")
PROBE = "The quick brown fox jumps over 13 lazy dogs, doesn't it? Größe: naïve café."
LONGEST_PAUSE = 120.0


class Endpoint(nn.Module):
    """A TopKTeacher and writer of answers behind `base`, e.g. http://127.0.0.1:8000/v1; see `load_endpoint`.

    `tokenizer` (of `transformers`) must be the endpoint's, and the student's; it is compared with a probe text before
    the first sequence. Without one only `complete` works. `budget` bounds the requests that this object sends, repeats
    included, `tokens` the tokens that it is charged for; `timeout` is seconds a request; `retries` come after 429, 5xx
    and timeouts, after 2^i `pause` seconds and some jitter, or what Retry-After says. The key is read from the
    environment variable `key_env` at every request and kept nowhere. `token_ids` sends prompts as ids and asks for ids;
    without it they go as text, which must be split in the same way by both sides. `chat` lets `complete` use
    chat/completions. `kept` is the folder of answers.
    """

    identity: Tensor

    def __init__(self, base: str, model: str, tokenizer: Any = None, *, top_k: int = 20, budget: int | None = 1000,
                 tokens: int | None = None, timeout: float = 30.0, retries: int = 4, key_env: str = "OPENAI_API_KEY",
                 parallel: int = 4, vocabulary: int | None = None, token_ids: bool = True, chat: bool = False,
                 kept: Path | str | None = None, pause: float = 0.5):
        super().__init__()
        require(re.match(r"https?://[^\s@]+$", base) is not None, f"'{base}' is no address of an endpoint; it begins "
                "with http:// or https:// and holds no password")
        require(min(top_k, parallel) >= 1 and retries >= 0 and timeout > 0 and pause >= 0,
                "top_k and parallel are at least 1, retries at least 0, timeout above 0")
        require(all(n is None or n >= 1 for n in (budget, tokens, vocabulary)), "budget, tokens and vocabulary are at "
                "least 1, or none")
        base = base.rstrip("/")
        self.base = base if re.search(r"/v\d+$", base) else f"{base}/v1"
        self.model, self.tokenizer, self.k, self.budget, self.tokens = model, tokenizer, top_k, budget, tokens
        self.timeout, self.retries, self.key_env, self.parallel, self.pause = timeout, retries, key_env, parallel, pause
        self.token_ids, self.chat = token_ids, chat
        self.vocabulary = vocabulary or (len(tokenizer) if tokenizer is not None else 0)
        self.kept = Path(kept or cache_folder() / "endpoints").expanduser()
        self.sent = self.charged = 0
        self._reached = False
        self._ids: dict[str, int | None] = {}
        self._probing, self._counting, self._jitter = threading.Lock(), threading.Lock(), random.Random()
        words = digest_of(self.base, model, top_k, self.vocabulary)
        self.register_buffer("identity", torch.tensor(list(bytes.fromhex(words)), dtype=torch.uint8))

    def top_k(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch length k"], Int[Tensor, "batch length k"]]:
        """See `TopKTeacher`. Raises EndpointError, RoleError where the endpoint has another tokenizer."""
        require(self.tokenizer is not None, "log-probabilities need the endpoint's tokenizer; give tokenizer=FOLDER",
                RoleError)
        self._check_tokenizer()
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        texts = [row[keep.bool()].tolist() for row, keep in zip(input_ids.cpu(), real.cpu(), strict=True)]
        log_p = torch.full((*input_ids.shape, self.k), -torch.inf)
        index = torch.zeros(log_p.shape, dtype=torch.long)
        for row, (keep, rows) in enumerate(zip(real.cpu(), self._each(self._of_text, texts), strict=True)):
            for place, known in zip(keep.nonzero().flatten().tolist(), rows, strict=True):
                for i, (token, value) in enumerate(known):
                    log_p[row, place, i], index[row, place, i] = value, token
        return log_p.to(input_ids.device), index.to(input_ids.device)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise RoleError(WHOLE)

    def complete(self, prompts: Sequence[str], max_tokens: int = 256, temperature: float = 0.0) -> list[str]:
        """The endpoint's answer to each prompt."""
        require(len(prompts) > 0, "no prompts were given", DataError)
        require(max_tokens >= 1 and temperature >= 0, "max_tokens is at least 1 and temperature at least 0")

        def one(prompt: str) -> str:
            body = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
            if self.chat:
                body["messages"] = [{"role": "user", "content": prompt}]
                return self._asked("chat/completions", body,
                                   lambda found: _text(found["choices"][0]["message"], "content"))
            return self._asked("completions", {**body, "prompt": prompt},
                               lambda found: _text(found["choices"][0], "text"))

        return self._each(one, prompts)

    # ------------------------------------------------------------------ log-probabilities

    def _of_text(self, ids: list[int]) -> list[list[tuple[int, float]]]:
        """For each token the (id, log-probability) of what may come next, falling."""
        special = set() if self.token_ids else set(self.tokenizer.all_special_ids)
        plain = [i for i, token in enumerate(ids) if token not in special]
        if not plain:
            return [[] for _ in ids]
        low, high = plain[0], plain[-1] + 1  # a text cannot carry the special tokens around it
        sent = ids[low:high]
        prompt: Any = sent if self.token_ids else self.tokenizer.decode(sent)
        rows = self._asked("completions", self._echo(prompt), lambda found: self._aligned(found["choices"][0], sent))
        known = [[(int(t), float(v)) for t, v in row] for row in rows]
        return [[]] * low + known + [[]] * (len(ids) - high)

    def _echo(self, prompt: Any) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": self.k,
                "temperature": 1.0}
        return {**body, "return_tokens_as_token_ids": True} if self.token_ids else body

    def _aligned(self, choice: dict[str, Any], ids: list[int]) -> list[list[tuple[int, float]]]:
        found = choice["logprobs"]
        tokens, tops = [self._id(t) for t in found["tokens"]], list(found["top_logprobs"])
        if isinstance(choice.get("prompt_logprobs"), list):  # of vLLM: by id, so nothing is ambiguous
            known = [{f"token_id:{t}": v["logprob"] for t, v in row.items()} if row else None
                     for row in choice["prompt_logprobs"]]
            tops[: len(known)] = known
        start = next((s for s in range(max(len(tokens) - len(ids), 0) + 1) if len(tokens) - s >= len(ids) and all(
            a is None or a == b for a, b in zip(tokens[s:], ids, strict=False))), None)
        if start is None:
            raise ValueError(f"{len(ids)} tokens were sent and others came back ({found['tokens'][:6]}, …); an "
                             "endpoint that does not echo its prompt cannot be used" if len(tokens) < len(ids) else
                             f"the text is split into other tokens there ({found['tokens'][:6]}, …)")
        after = tops[start + 1 : start + 1 + len(ids)]
        after += [None] * (len(ids) - len(after))
        require(len(ids) == 1 or any(after[:-1]), "it names no likeliest tokens for those of the prompt", EndpointError)
        return [self._row(row) for row in after]

    def _row(self, top: dict[str, float] | None) -> list[tuple[int, float]]:
        found: dict[int, float] = {}
        for token, value in (top or {}).items():
            place = self._id(token)
            value = float(value)
            if place is not None and place != -1 and math.isfinite(value):
                if not 0 <= place < self.vocabulary or value > 1e-3:
                    raise ValueError(f"token {place} of {self.vocabulary} with log-probability {value}")
                found[place] = min(value, 0.0)
        return sorted(found.items(), key=lambda pair: -pair[1])[: self.k]

    def _id(self, token: str) -> int | None:
        """The id that a token is written as; None for a text that several tokens have, -1 for one that none has."""
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        return self._ids.get(token, -1)

    def _check_tokenizer(self) -> None:
        """Compare the tokens of a probe text, and learn from them how the endpoint writes tokens."""
        with self._probing:
            if self._ids:
                return
            own = [list(self.tokenizer(PROBE, add_special_tokens=special)["input_ids"]) for special in (True, False)]
            words = self._asked("completions", self._echo(PROBE), lambda found: [
                str(t) for t in found["choices"][0]["logprobs"]["tokens"]])
            for form in _forms(self.tokenizer):
                self._ids = form
                seen = [self._id(t) for t in words]
                if any(_same(seen[s : s + len(ids)], ids) for ids in own for s in (0, 1)):
                    return
            self._ids = {}
            ours = self.tokenizer.convert_ids_to_tokens(own[0])
            raise RoleError(f"the endpoint splits a text into other tokens ({words[:8]}, …) than the tokenizer given "
                            f"({ours[:8]}, …). Its log-probabilities are only of use for a student with its own "
                            "tokenizer; give that as tokenizer=FOLDER, or distil through its answers: still cache "
                            "api:… --data prompts.jsonl --answers")

    # ------------------------------------------------------------------ requests

    def _each(self, ask: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(ask, items))

    def _asked(self, path: str, body: dict[str, Any], read: Callable[[dict[str, Any]], Any]) -> Any:
        """What `read` takes out of the answer, which is kept if it can."""
        name = digest_of(self.base, path, body)
        where = self.kept / name[:2] / f"{name}.json"
        if where.is_file():
            try:
                return json.loads(where.read_text(encoding="utf-8"))
            except ValueError:
                where.unlink()
        found = self._posted(path, body)
        try:
            taken = read(found)
        except StillError as error:
            raise EndpointError(f"{self.base} ({self.model}) gave an answer that cannot be used: {error}") from None
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(f"{self.base} ({self.model}) gave an answer that cannot be used: "
                                f"{type(error).__name__}: {self._safe(str(error))}. It must be that of an "
                                "OpenAI-compatible completions endpoint, with logprobs of the prompt where these are "
                                "asked for") from None
        write_text(where, json.dumps(taken))
        return taken

    def _posted(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        requests = _library()
        key = os.environ.get(self.key_env, "")

        def signed(request: Any) -> Any:
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        for attempt in range(self.retries + 1):
            self._count()
            pause = self.pause * 2**attempt * (1 + self._jitter.random() / 2)
            try:
                answer = requests.post(f"{self.base}/{path}", json=body, auth=signed, timeout=self.timeout,
                                       allow_redirects=False)
            except requests.exceptions.RequestException as error:
                said = f"{self.base} cannot be reached ({type(error).__name__}, timeout {self.timeout:g} s)"
                if not (self._reached or isinstance(error, requests.exceptions.ReadTimeout)):
                    raise EndpointError(f"{said}. Is the server running, and the address right?") from None
            else:
                self._reached = True
                if answer.status_code == 200:
                    return self._charged(answer)
                said = f"{self.base} answered {answer.status_code}: {self._safe(answer.text[:300])}"
                if answer.status_code != 429 and answer.status_code < 500:
                    hint = f". Is the key in ${self.key_env} right?" if answer.status_code in (401, 403) else ""
                    raise EndpointError(said + hint)
                pause = _retry_after(answer.headers.get("Retry-After"), pause)
            if attempt < self.retries:
                time.sleep(min(pause, LONGEST_PAUSE))
        raise EndpointError(f"{said}; given up after {self.retries + 1} tries. What it had answered is kept: the same "
                            "command goes on")

    def _count(self) -> None:
        with self._counting:
            used = [f"{n} {what}" for n, most, what in ((self.sent, self.budget, "requests"),
                                                        (self.charged, self.tokens, "tokens")) if most and n >= most]
            require(not used, f"the budget of {' and '.join(used)} is used up. All answers are kept in {self.kept}: "
                    "the same command with a new budget goes on", EndpointError)
            self.sent += 1

    def _charged(self, answer: Any) -> dict[str, Any]:
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EndpointError(f"{self.base} gave an answer that is no JSON object: {self._safe(answer.text[:100])}")
        usage = found.get("usage")
        self.charged += int((usage or {}).get("total_tokens") or 0) if isinstance(usage, dict) else 0
        return found

    def _safe(self, text: str) -> str:
        """`text` without the key."""
        key = os.environ.get(self.key_env, "")
        return text.replace(key, "…") if key else text


class CallableTeacher(nn.Module):
    """A TopKTeacher of a plain function (input_ids, attention_mask) -> (log_p, index), both [batch, length, k]; what
    it returns is checked. `name` stands for it in the records of a run."""

    identity: Tensor

    def __init__(self, fn: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]], vocabulary: int, name: str = ""):
        super().__init__()
        require(callable(fn) and vocabulary >= 1, "a function and the size of its vocabulary are needed")
        self.fn, self.vocabulary = fn, vocabulary
        words = digest_of(name or getattr(fn, "__qualname__", type(fn).__name__), vocabulary)
        self.register_buffer("identity", torch.tensor(list(bytes.fromhex(words)), dtype=torch.uint8))

    def top_k(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch length k"], Int[Tensor, "batch length k"]]:
        """See `TopKTeacher`. Raises RoleError for a function that returns something else."""
        with torch.no_grad():
            log_p, index = self.fn(input_ids, attention_mask)
        require(log_p.shape == index.shape and log_p.dim() == 3 and log_p.shape[:2] == input_ids.shape,
                f"the function returned {tuple(log_p.shape)} and {tuple(index.shape)} for ids "
                f"{tuple(input_ids.shape)}; both are [batch, length, k]", RoleError)
        require(not torch.isnan(log_p).any() and float(log_p.max()) <= 1e-3, "the function returned values that are no "
                "log-probabilities (NaN, or above 0)", RoleError)
        require(bool(((index >= 0) & (index < self.vocabulary)).all()), f"the function returned ids outside of "
                f"[0, {self.vocabulary})", RoleError)
        return log_p, index.long()

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise RoleError(WHOLE)


def load_endpoint(text: str, kind: Any = None) -> Endpoint:
    """The teacher of `api:BASE_URL:model=NAME,tokenizer=FOLDER[,top_k=20,budget=1000,timeout=30,…]` (`OPTIONS`).

    Raises ConfigError for another form, UnknownNameError for an option that there is not, RoleError for a role that
    log-probabilities cannot fill or a folder without a tokenizer.
    """
    found = re.match(r"(https?://\S+?):(\w+=.*)$", text)
    if found is None:
        raise ConfigError(f"'api:{text}' is not of the form api:BASE_URL:model=NAME,tokenizer=FOLDER, e.g. "
                          "api:http://127.0.0.1:8000/v1:model=my-model,tokenizer=./my-model")
    options = parse_options(found[2])
    for option in options:
        require(option in OPTIONS, f"an endpoint has no option '{option}'; it has {', '.join(OPTIONS)}",
                UnknownNameError)
    require("model" in options, "the endpoint's model is not named; give model=NAME")
    require(kind in (None, TopKTeacher, CausalLM), "an endpoint gives log-probabilities of tokens, and this role needs "
            f"a {getattr(kind, '__name__', kind)}; it fits the systems whose teacher may be a TopKTeacher (`still show "
            "SLUG`)", RoleError)
    numbers = {"top_k": int, "budget": int, "tokens": int, "timeout": float, "retries": int, "parallel": int,
               "vocabulary": int}
    for name in set(options) & set(numbers):
        fine = isinstance(options[name], int | float) and not isinstance(options[name], bool)
        none = options[name] is None and name in ("budget", "tokens", "vocabulary")
        require(none or (fine and options[name] == numbers[name](options[name])), f"{name} is a number, not "
                f"{options[name]!r}")
    folder = options.pop("tokenizer", None)
    model = str(options.pop("model"))
    return Endpoint(found[1], model, None if folder is None else _tokenizer(str(folder)), **options).eval()


def write_answers(teacher: Endpoint, prompts: Sequence[str], path: Path | str, max_tokens: int = 256,
                  temperature: float = 0.0) -> int:
    """Write one line {"prompt": …, "response": …} for each prompt that is answered, for `--data`; how many were.

    Raises EndpointError where the endpoint or the budget fails (answers so far are kept, and not asked for again).
    """
    answers = teacher.complete(prompts, max_tokens, temperature)
    lines = [json.dumps({"prompt": p, "response": a}, ensure_ascii=False) for p, a in zip(prompts, answers, strict=True)
             if a.strip()]
    require(bool(lines), "every answer was empty", DataError)
    write_text(path, "\n".join(lines) + "\n")
    return len(lines)


def _same(seen: list[int | None], ids: list[int]) -> bool:
    """Whether these are the same tokens, as far as `seen` is sure of them (None where not), which must be for half."""
    known = [a == b for a, b in zip(seen, ids, strict=False) if a is not None]
    return len(seen) == len(ids) and all(known) and 2 * len(known) >= len(ids)


def _forms(tokenizer: Any) -> list[dict[str, int | None]]:
    """The ways in which endpoints write a token as text; None for texts that several tokens share."""
    ids = range(len(tokenizer))
    before = tokenizer.decode([tokenizer.convert_tokens_to_ids(t) for t in tokenizer.tokenize("a")])
    first = [tokenizer.convert_tokens_to_ids(t) for t in tokenizer.tokenize("a")]
    words = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    alone = [tokenizer.decode([i]) for i in ids]
    within = [tokenizer.decode([*first, i])[len(before) :] for i in ids]
    forms: list[dict[str, int | None]] = []
    for form in (words, alone, within):
        count: dict[str, int] = {}
        for word in form:
            count[word] = count.get(word, 0) + 1
        forms.append({word: i if count[word] == 1 else None for i, word in enumerate(form)})
    return forms


def _text(holder: dict[str, Any], name: str) -> str:
    if not isinstance(holder[name], str):
        raise TypeError(f"'{name}' is no text")
    return holder[name]


def _retry_after(text: str | None, otherwise: float) -> float:
    """Seconds that the header Retry-After asks to wait."""
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        date = email.utils.parsedate_tz(text) if text else None
        return otherwise if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _tokenizer(folder: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("a tokenizer needs transformers; install it with: pip install 'stillhouse[hf]'"
                                ) from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RoleError(f"there is no tokenizer in {folder} ({str(error).splitlines()[0]})") from error


def _library() -> Any:
    try:
        import requests
    except ImportError as error:
        raise MissingExtraError("api:… needs requests; install it with: pip install 'stillhouse[api]'") from error
    return requests
