"""The run: stages whose every step is a function of its number, and what survives being killed between two of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import stillhouse
from stillhouse.errors import ConfigError, Interrupted, NonFiniteError, ResumeError, StageError, require
from stillhouse.run import check as checking
from stillhouse.run import pictures, processes, reading
from stillhouse.run.held import State, collect, is_optimizer, restore, validate
from stillhouse.run.records import StageRecord, identify, place
from stillhouse.run.seeds import Moment, derive, preserved, reseed
from stillhouse.store import DamagedFileError, load_tree, save_tree, write_text

FLUSH_EVERY = 20
DRY_STEPS = 3
EVALUATIONS = 10


class DryRunEnded(Exception):
    """`--dry-run` has checked its input and measured a few steps."""


@dataclasses.dataclass
class Stage:
    """One loop in progress."""

    name: str
    path: str
    steps: int
    held: dict[str, Any]
    record: StageRecord | None
    per_epoch: int = 0
    k: int = 0
    total: int = 0
    low: int = 0
    high: int = 0
    parts: float = 1.0
    draws: int = 0
    finishing: bool = False
    children: set[str] = dataclasses.field(default_factory=set)
    pending: list[tuple[int, str, Any, float, bool]] = dataclasses.field(default_factory=list)

    @property
    def inner(self) -> str:
        return f"{self.path} {self.k}"

    @property
    def share(self) -> float:
        """This process's part of the step's batch."""
        return (self.high - self.low) / self.total if self.total else 1.0 / processes.size()


class Run:
    """A run of one system: `loop`, `update`, `log`, and the rest for those who need it.

    Without a folder nothing is saved. Use it as a context manager so that Ctrl-C saves before it stops.
    `deterministic` makes resumes exact on a GPU too, where some operations are otherwise not. `evaluate` gives named
    scores of a model; they are logged as eval_… about ten times a stage, of the `student` that it holds.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
        precision: str = "float32",
        deterministic: bool = False,
        full: bool = False,
        keep_going: bool = False,
        quiet: bool = False,
        dry: bool = False,
        workers: int = 0,
        checkpoint_seconds: float = 60.0,
        checkpoint_steps: int | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        require(precision in ("float32", "bf16"), f"precision is 'float32' or 'bf16', not {precision!r}")
        require(workers >= 0, f"workers must be 0 or more, not {workers}")
        self.folder = None if folder is None else Path(folder)
        self.seed, self.precision, self.full, self.keep_going = seed, precision, full, keep_going
        self.dry, self.workers = dry, workers
        self.checkpoint_seconds, self.checkpoint_steps = checkpoint_seconds, checkpoint_steps
        self.evaluate = evaluate
        if deterministic:
            torch.use_deterministic_algorithms(True)
        self.device = processes.connect(device)
        self.quiet = quiet or processes.rank() > 0
        self._autocast: Any = None
        self.history: list[dict[str, Any]] = []
        self.seconds: dict[str, float] = {}
        self.crashed: dict[str, str] = {}
        self._path: list[str] = []
        self._arm: list[str] = []
        self._stages: list[Stage] = []
        self._used: set[str] = set()
        self._left: Stage | None = None
        self._finished: list[tuple[Stage, dict[str, weakref.ref]]] = []
        self._between: dict[str, list[str]] = {}
        self._stopping = False
        self._handlers: dict[int, Any] = {}
        self._saved_at = time.monotonic()
        self._enter_moment("begin")

    @classmethod
    def open(cls, folder: Path | str | None = None, *, system: str = "", config: Any = None,
             resume: bool | None = False, fingerprint: dict[str, str] | None = None, **options: Any) -> Run:
        """A run that knows what it is: a folder with another system, config, seed, teacher or data is refused.

        `resume` True continues the run in `folder`, False demands that there be none, None takes either.
        Raises ResumeError with the name of what differs, StoreError where the folder cannot be written.
        """
        run = cls(folder, **options)
        identity = {
            "system": system,
            "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type)
            else config,
            "seed": run.seed, "precision": run.precision, "fingerprint": fingerprint or {},
            "versions": {"stillhouse": stillhouse.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
        }
        if run.folder is not None and processes.rank() == 0:
            identify(run.folder, identity, resume)
        return run

    # ---------------------------------------------------------------- context: signals and precision

    def __enter__(self) -> Run:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        if self.precision == "bf16":
            self._autocast = torch.autocast(self.device.type, torch.bfloat16)
            self._autocast.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._autocast is not None:
            self._autocast.__exit__(*error)
            self._autocast = None

    def _forget_casts(self) -> None:
        """Autocast keeps its copies of weights until its region ends; ours spans the run, and the weights change."""
        if self._autocast is not None:
            torch.clear_autocast_cache()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stopping or not self._stages or self.folder is None:
            raise Interrupted("stopped")
        self._stopping = True
        self.say("stopping after this step (again to stop at once) …")

    def say(self, text: str) -> None:
        """A line for the person watching, on one process only."""
        if not self.quiet:
            tqdm.write(text, file=sys.stderr)

    # ---------------------------------------------------------------- moments: seeds

    def _enter_moment(self, *parts: object, alike: bool = False) -> None:
        """Reseed everything from (seed, parts). Within a step the libraries' own draws differ between processes,
        unless they must be `alike` (initial weights)."""
        self._moment = Moment(self.seed, *parts)
        self._forget_casts()
        rank = 0 if alike or not self._stages else processes.rank()
        reseed(derive(self.seed, *parts, *([f"rank {rank}"] if rank else [])))

    def begin(self) -> Run:
        """Called first in every `distill`: what it draws before its first stage depends on the seed and scope only."""
        self._enter_moment("begin", self._here, alike=True)
        return self

    @property
    def _here(self) -> str:
        parent = [self._stages[-1].inner] if self._stages else []
        return "/".join(parent + self._path)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return processes.rank() == 0

    @property
    def begun(self) -> bool:
        """Whether any stage or `once` has been entered."""
        return bool(self._used)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the stages inside, so that a procedure can be used several times in one run."""
        self._path.append(name)
        self._enter_moment("begin", self._here)
        try:
            yield
        finally:
            self._path.pop()
            self._enter_moment("after", self._here, name)

    @contextlib.contextmanager
    def arm(self, name: str) -> Iterator[None]:
        """One arm of an experiment: the same seeds, streams and initial weights as every other arm."""
        if self._stages:
            raise StageError("run.arm cannot be used inside run.loop")
        outside = self._path, self._used, self._arm, self._finished
        self._path, self._used, self._finished = [], set(), []
        self._arm = [*self._arm, name]
        self._enter_moment("begin", self._here)
        try:
            yield
        finally:
            self._path, self._used, self._arm, self._finished = outside
            self._stages, self._left = [], None
            self._enter_moment("after", self._here)

    def arms(self, core: dict[str, Callable[[], dict[str, float]]],
             extended: dict[str, Callable[[], dict[str, float]]] | None = None) -> dict[str, dict[str, float]]:
        """Run the arms (`extended` ones only in a full run); each finished arm's metrics are kept for a resume.

        With `keep_going`, an arm that raises is left empty and its message stands in `run.crashed`.
        """
        chosen = {**core, **((extended or {}) if self.full else {})}
        results: dict[str, dict[str, float]] = {}
        for name, measure in chosen.items():
            with self.arm(name):
                try:
                    results[name] = self._measured(name, measure)
                except Exception as error:
                    if not self.keep_going:
                        raise
                    self.crashed[name] = f"{type(error).__name__}: {error}"
                    results[name] = {}
        return results

    def _measured(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        where = None if self.folder is None else place(self.folder, self._folder_path())
        if where is not None and (where / "metrics.json").exists():
            saved = json.loads((where / "metrics.json").read_text(encoding="utf-8"))
            self.seconds[name] = saved["seconds"]
            return saved["metrics"]
        self.say(f"arm: {name}")
        start = time.monotonic()
        metrics = {key: float(value) for key, value in measure().items()}
        self.seconds[name] = time.monotonic() - start
        if where is not None and processes.rank() == 0:
            write_text(where / "metrics.json", json.dumps({"metrics": metrics, "seconds": self.seconds[name]}))
            for state in where.rglob("*.safetensors"):
                state.unlink(missing_ok=True)
        return metrics

    def _folder_path(self, *names: str) -> list[str]:
        return [*(f"arm {name}" for name in self._arm), *self._path, *names]

    # ---------------------------------------------------------------- stages

    def loop(
        self,
        name: str,
        data: Any = None,
        *,
        batch: Any = None,
        steps: int | None = None,
        epochs: int | None = None,
        drop_last: bool = False,
        shuffle: bool = True,
        **held: Any,
    ) -> Iterator[Any]:
        """A stage of `steps` steps (or `epochs`), holding by reference what outlives a step.

        `data` is a map-style set of dicts (yields batches with `index`), a dict of such sets with a dict of batch
        sizes (yields a dict of batches), a source that can only be iterated, or None (yields the step number).
        A finished stage of a resumed run is restored in place and skipped; one in progress goes on where it was.

        Raises StageError for a name used twice, TypeError for a held number, DataError for empty data.
        """
        validate(held)
        path = "/".join(filter(None, [self._here, name]))
        record = None
        if self.folder is not None and not self._stages:
            record = StageRecord(place(self.folder, self._folder_path(name)))
        stage = Stage(name, path, 0, held, record)
        orders = self._orders(data, batch, path, drop_last, shuffle)
        if orders:
            stage.per_epoch = next(iter(orders.values())).per_epoch
        if epochs is not None:
            require(steps is None, f"stage '{path}' was given both steps and epochs; give one of them")
            require(len(orders) == 1, f"epochs of stage '{path}' need one map-style data set; give steps instead")
            steps = epochs * stage.per_epoch
        require(steps is not None and steps >= 0, f"stage '{path}' needs steps or epochs, 0 or more; got {steps}")
        stage.steps = int(steps or 0)
        self._claim(name)
        return self._iterate(stage, data, batch, orders)

    def _claim(self, name: str) -> None:
        if self._left is not None:
            raise StageError(f"stage '{self._left.path}' was left by `break` after step {self._left.k} and counts as "
                             "interrupted; call run.finish() to end a stage early")
        used = self._stages[-1].children if self._stages else self._used
        key = "/".join([*self._path, name])
        if key in used:
            raise StageError(f"the name '{key}' is used twice here, so its random streams would be equal and a resume "
                             "could not tell them apart; use another name or `with run.scope(…)`")
        used.add(key)

    def _orders(self, data: Any, batch: Any, path: str, drop_last: bool, shuffle: bool) -> dict[str, reading.Order]:
        if data is None:
            return {}
        sets = data if isinstance(data, dict) else {"": data}
        if not isinstance(data, dict) and not reading.is_map_style(data):
            require(hasattr(data, "__iter__"), f"data of stage '{path}' must be a map-style set or iterable, "
                    f"not {type(data).__name__}")
            return {}
        orders = {}
        for key, part in sets.items():
            reading.require_map_style(part, f"data '{key}' of stage '{path}'" if key else f"data of stage '{path}'")
            size = batch[key] if isinstance(batch, dict) else batch
            require(size is not None, f"stage '{path}' needs batch=… for its data")
            orders[key] = reading.Order(len(part), int(size), self.seed, f"{path}|{key}" if key else path,
                                        drop_last, shuffle)
        if len(sets) > 1 and processes.size() > 1:
            for key, order in orders.items():
                odd = 0 if drop_last else order.n % order.batch
                require(order.batch % processes.size() == 0 and odd % processes.size() == 0,
                        f"several streams on {processes.size()} processes need batches that divide evenly; '{key}' has "
                        f"{order.batch} (last one {odd}); use drop_last or other sizes")
        return orders

    def _batches(self, stage: Stage, data: Any, batch: Any, orders: dict[str, reading.Order],
                 start: int) -> Iterator[tuple[Any, int]]:
        if data is None:
            return ((k, 0) for k in range(start, stage.steps))
        if not orders:
            if start:
                self.say(f"stage '{stage.path}': this source cannot seek, so the resume is not exact")
            elif stage.record is not None:
                self.say(f"stage '{stage.path}': the data can only be streamed; a resumed run will not be exact")
            return reading.stream(data, int(batch), start)
        workers = self.workers if not self._stages[:-1] else 0
        sets = data if isinstance(data, dict) else {"": data}
        readers = {key: reading.batches(sets[key], order, start, stage.steps, workers)
                   for key, order in orders.items()}
        if not isinstance(data, dict):
            return readers[""]
        return (({key: pair[0] for key, pair in zip(readers, row, strict=True)}, row[0][1])
                for row in zip(*readers.values(), strict=True))

    def _iterate(self, stage: Stage, data: Any, batch: Any, orders: dict[str, reading.Order]) -> Iterator[Any]:
        start = 0
        if stage.record is not None:
            done = stage.record.load_done(self.say)
            if done is not None:
                self._bring_back(stage, done)
                self._remember(stage)
                self._enter_moment("after", stage.path)
                return
            saved = stage.record.load_checkpoint(self.say)
            if saved is not None:
                self._bring_back(stage, saved)
                start = saved["k"]
                self.say(f"stage '{stage.path}' goes on from step {start} of {stage.steps}")
            if processes.rank() == 0:
                stage.record.cut_log(saved["log"] if saved else 0)
        outer = not self._stages
        self._stages.append(stage)
        self._saved_at = began = time.monotonic()
        bar = tqdm(total=stage.steps, initial=start, desc=stage.name, leave=False, mininterval=0.5,
                   disable=True if self.quiet or not outer or stage.steps < 2 else None)
        try:
            for k, (content, total) in enumerate(self._batches(stage, data, batch, orders, start), start=start):
                if k >= stage.steps:
                    break
                stage.k, stage.total, stage.parts, stage.draws = k, total, 1.0, 0
                stage.low, stage.high = processes.bounds(total)
                stage.children.clear()
                self._enter_moment(stage.path, k)
                yield reading.to_device(content, self.device)
                bar.update()
                if stage not in self._stages:
                    raise StageError(f"stage '{stage.path}' was continued after its run.arm had ended")
                if outer:
                    self._after_step(stage, k + 1 - start, time.monotonic() - began)
                if stage.finishing:
                    break
            self._complete(stage)
        except GeneratorExit:
            if stage.finishing:
                self._complete(stage)
            elif stage in self._stages and outer:
                self._left = stage
            raise
        finally:
            bar.close()
            if stage in self._stages:
                self._stages.remove(stage)
                self._enter_moment("after", stage.path)

    def _look(self, stage: Stage) -> None:
        """Log the scores of the student at ten steps of a stage, which are a function of the number of its steps."""
        student = stage.held.get("student")
        due = (stage.k + 1) * EVALUATIONS // stage.steps > stage.k * EVALUATIONS // stage.steps
        if self.evaluate is None or self.dry or not due or not isinstance(student, nn.Module):
            return
        with self.aside("evaluate", student):
            scores = self.evaluate(student)
        self.log(**{f"eval_{name}": value for name, value in scores.items()})

    def _after_step(self, stage: Stage, count: int, elapsed: float) -> None:
        self._look(stage)
        if (stage.k + 1) % FLUSH_EVERY == 0:
            self._flush(stage)
        if count == 5 and not self.dry:
            self._announce(stage, elapsed / count)
        if self.dry and count >= min(DRY_STEPS, stage.steps):
            self._flush(stage)
            self._announce(stage, elapsed / count, always=True)
            raise DryRunEnded(f"checked; {count} steps of '{stage.path}' ran, nothing was saved")
        stopping = self._stopping if processes.size() == 1 else processes.any_of(self._stopping, self.device)
        if stopping:
            self._complete(stage) if stage.finishing else self._save(stage)
            processes.wait(self.device)
            raise Interrupted(f"stopped after step {stage.k + 1} of {stage.steps} of stage '{stage.path}'")
        due = time.monotonic() - self._saved_at >= self.checkpoint_seconds if self.checkpoint_steps is None else (
            (stage.k + 1) % self.checkpoint_steps == 0)
        if stage.record is not None and processes.size() > 1:
            due = processes.any_of(due and processes.rank() == 0, self.device)
        if due and stage.record is not None and not stage.finishing and stage.k + 1 < stage.steps:
            self._save(stage)

    def _announce(self, stage: Stage, per_step: float, always: bool = False) -> None:
        expected = per_step * stage.steps
        if always or expected > 60:
            memory = pictures.peak_memory(self.device)
            self.say(f"stage '{stage.path}': {per_step * 1000:.3g} ms a step, about {_human(expected)} for "
                     f"{stage.steps} steps, {memory}; --config.steps shortens it where the system has it")

    def _save(self, stage: Stage) -> None:
        self._flush(stage)
        self._saved_at = time.monotonic()
        if stage.record is not None and processes.rank() == 0:
            held = {name: collect(value) for name, value in stage.held.items()}
            stage.record.save_checkpoint(stage.k + 1, {"k": stage.k + 1, "held": held,
                                                       "log": stage.record.log_length()})

    def _complete(self, stage: Stage) -> None:
        self._flush(stage)
        if stage.record is None:
            return
        if processes.rank() == 0:
            held = {name: collect(value) for name, value in stage.held.items()}
            stage.record.save_done({"k": stage.k + 1, "held": held, "log": stage.record.log_length()})
        self._thin(stage)
        self._remember(stage)

    def _bring_back(self, stage: Stage, saved: dict[str, Any]) -> None:
        for name, value in stage.held.items():
            if name in saved["held"]:
                restore(value, saved["held"][name], name)
            elif value is not None and not is_optimizer(value):
                raise ResumeError(f"the saved state of stage '{stage.path}' has no '{name}': the code changed since. "
                                  "Start a new run in another folder.")

    def _remember(self, stage: Stage) -> None:
        optimizers = {n: weakref.ref(v) for n, v in stage.held.items() if is_optimizer(v)}
        stage.held = {}
        self._finished.append((stage, optimizers))

    def _thin(self, finished: Stage) -> None:
        """Drop from earlier final states the optimizers that are gone or that `finished` has saved anew."""
        now = {id(v) for v in finished.held.values() if is_optimizer(v)}
        for stage, optimizers in self._finished:
            spent = [n for n, ref in optimizers.items() if ref() is None or id(ref()) in now]
            if spent and stage.record is not None and processes.rank() == 0:
                stage.record.drop(self.say, spent)
            for name in spent:
                del optimizers[name]

    def finish(self) -> None:
        """End the innermost stage after this step; unlike `break` alone, this is recorded."""
        if not self._stages:
            raise StageError("run.finish() was called outside of run.loop")
        self._stages[-1].finishing = True

    def stop(self) -> None:
        """Save after the current (or next) step and stop there by raising Interrupted, as Ctrl-C does."""
        self._stopping = True

    def state(self, **values: Any) -> State:
        """A namespace of numbers, strings and tensors that a stage can hold: `s = run.state(phi=0.0)`."""
        return State(**values)

    def once(self, name: str, fn: Callable[[], Any]) -> Any:
        """The result of `fn()`, computed once: a resumed run reads it back.

        It must be a tree of tensors, arrays, numbers and strings. Within a loop it belongs to the step and is
        computed again with it.
        """
        self._claim(name)
        path = "/".join(filter(None, [self._here, name]))
        file = None
        if self.folder is not None and not self._stages:
            file = place(self.folder, self._folder_path(name)) / "once.safetensors"
            if file.exists():
                try:
                    result = load_tree(file)
                    self._enter_moment("after", path)
                    return reading.to_device(result, self.device)
                except DamagedFileError as error:
                    self.say(f"{error}; computing it again")
        self._enter_moment("once", path, alike=True)
        result = fn()
        if file is not None and processes.rank() == 0:
            save_tree(file, result)
        self._enter_moment("after", path)
        return result

    def track(self, iterable: Iterable[Any], name: str, total: int | None = None) -> Iterator[Any]:
        """Go through `iterable` with a progress bar."""
        return iter(tqdm(iterable, desc=name, total=total, leave=False, disable=self.quiet or None))

    # ---------------------------------------------------------------- where we are

    def _current(self) -> Stage:
        if not self._stages:
            raise StageError("this is only known inside run.loop")
        return self._stages[-1]

    @property
    def k(self) -> int:
        """Number of the current step, from 0."""
        return self._current().k

    @property
    def steps(self) -> int:
        """Number of steps of the current stage."""
        return self._current().steps

    @property
    def progress(self) -> float:
        """k / steps."""
        stage = self._current()
        return stage.k / max(stage.steps, 1)

    @property
    def epoch(self) -> int:
        stage = self._current()
        return stage.k // stage.per_epoch if stage.per_epoch else 0

    @property
    def last_of_epoch(self) -> bool:
        """Whether this is the last step of an epoch (without map-style data: of the stage)."""
        stage = self._current()
        return (stage.k + 1) % stage.per_epoch == 0 if stage.per_epoch else stage.k + 1 == stage.steps

    # ---------------------------------------------------------------- updates

    def backward(self, loss: Tensor, into: Optimizer | Sequence[Optimizer], retain_graph: bool = False) -> None:
        """Add the gradients of `loss` to the parameters of these optimizers, and to no others."""
        parameters = [p for optimizer in _several(into) for p in _parameters(optimizer) if p.requires_grad]
        if not loss.requires_grad:
            raise ConfigError("the loss does not depend on anything that is trained: it has no gradient. Was it "
                              "computed under no_grad, or are all parameters frozen?")
        scale = self._stages[-1].parts if self._stages else 1.0
        torch.autograd.backward(loss if scale == 1.0 else loss * scale, inputs=parameters, retain_graph=retain_graph)

    def step(self, optimizer: Optimizer, clip: float | None = None) -> None:
        """Average the gradients over the processes, clip their global norm, step, clear."""
        parameters = _parameters(optimizer)
        processes.average_gradients(parameters, self._stages[-1].share if self._stages else 1.0 / processes.size())
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        self._forget_casts()
        optimizer.zero_grad(set_to_none=True)

    def update(self, optimizers: Optimizer | Sequence[Optimizer], *, clip: float | None = None,
               **terms: Tensor) -> None:
        """One step on the sum of the named loss terms, which are logged.

        A term that is not finite raises NonFiniteError with its name, at the latest before the next checkpoint.
        """
        require(bool(terms), "run.update needs at least one named loss term, e.g. run.update(optimizer, kd=loss)")
        for name, value in terms.items():
            self._note(name, value, watched=True)
        self.backward(torch.stack([v.reshape(()) for v in terms.values()]).sum() if len(terms) > 1
                      else next(iter(terms.values())).reshape(()), into=optimizers)
        for optimizer in _several(optimizers):
            self.step(optimizer, clip=clip)

    def split(self, batch: dict[str, Any], n: int) -> Iterator[dict[str, Any]]:
        """The batch in parts of at most `n` samples; `backward` weighs each part by its size.

        Right only where the loss is a mean over samples.
        """
        stage, total = self._current(), len(next(iter(batch.values())))
        for start in range(0, total, n):
            part = {name: value[start : start + n] for name, value in batch.items()}
            stage.parts = len(next(iter(part.values()))) / total
            yield part
        stage.parts = 1.0

    def log(self, **values: Any) -> None:
        """Log numbers or 0-d tensors, with the step if within a loop. Tensors stay on their device until flushed."""
        for name, value in values.items():
            self._note(name, value, watched=False)
        if not self._stages:
            line = {"stage": self._here, **{n: float(v) for n, v in values.items()}}
            self.history.append(line)
            if self.folder is not None and processes.rank() == 0:
                file = place(self.folder, self._folder_path()) / "log.jsonl"
                lines = self._between.setdefault(str(file), [])
                lines.append(json.dumps(line) + "\n")
                write_text(file, "".join(lines))

    def _note(self, name: str, value: Any, watched: bool) -> None:
        if not self._stages:
            return
        if isinstance(value, Tensor):
            require(value.numel() == 1, f"'{name}' must be one number, not a tensor of shape {tuple(value.shape)}")
            value = value.detach()
        stage = self._stages[-1]
        outermost = self._stages[0]
        label = name if stage is outermost else f"{stage.path.removeprefix(outermost.path)}|{name}"
        outermost.pending.append((outermost.k, label, value, stage.share, watched))

    def _flush(self, stage: Stage) -> None:
        if not stage.pending:
            return
        entries, stage.pending = stage.pending, []
        values = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device).reshape(())
                              for _, _, v, _, _ in entries])
        if processes.size() > 1:
            values = processes.summed(values * torch.tensor([e[3] for e in entries], device=self.device))
        rows: dict[int, dict[str, Any]] = {}
        bad = None
        for (k, name, _, _, watched), value in zip(entries, values.tolist(), strict=True):
            rows.setdefault(k, {"stage": stage.path, "k": k})[name] = value
            if watched and bad is None and not _finite(value):
                bad = name, k, value
        lines = list(rows.values())
        self.history.extend(lines)
        if stage.record is not None and processes.rank() == 0:
            stage.record.append(lines)
        if bad is not None:
            raise NonFiniteError(f"the term '{bad[0]}' of stage '{stage.path}' is {bad[2]} at step {bad[1]}. The last "
                                 "checkpoint is from before. Usual causes: too large a learning rate (lower it, or "
                                 "clip), a log of zero, bf16 where float32 is needed.")

    # ---------------------------------------------------------------- draws and processes

    @property
    def shared(self) -> torch.Generator:
        """A CPU generator, equal on all processes, for decisions that the whole batch shares."""
        return self._moment.generator("shared", torch.device("cpu"))

    def shared_rand(self) -> float:
        """One uniform number, the same on all processes."""
        return torch.rand((), generator=self.shared).item()

    def shared_randint(self, low: int, high: int) -> int:
        """One whole number of [low, high), the same on all processes."""
        return int(torch.randint(low, high, (), generator=self.shared).item())

    def randn(self, n: int, *shape: int) -> Tensor:
        """Standard normal draws [n, *shape], one per sample: made for the whole batch, this process's part given."""
        return self._per_sample(n, lambda total, g: torch.randn(total, *shape, generator=g, device=self.device))

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(*x.shape).to(x.dtype)

    def rand(self, n: int, *shape: int) -> Tensor:
        """Uniform draws of [0, 1), [n, *shape], one per sample."""
        return self._per_sample(n, lambda total, g: torch.rand(total, *shape, generator=g, device=self.device))

    def randint(self, low: int, high: int, n: int, *shape: int) -> Tensor:
        """Whole numbers of [low, high), [n, *shape], one per sample."""
        return self._per_sample(
            n, lambda total, g: torch.randint(low, high, (total, *shape), generator=g, device=self.device))

    def _per_sample(self, n: int, make: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        generator = self._moment.generator("samples", self.device)
        if processes.size() == 1:
            return make(n, generator)
        stage = self._stages[-1] if self._stages else None
        if stage is not None and stage.total and stage.high - stage.low == n:
            return make(stage.total, generator)[stage.low : stage.high]
        low = processes.rank() * n
        return make(n * processes.size(), generator)[low : low + n]

    def draw(self, data: Any, n: int) -> dict[str, Any]:
        """Another batch of (globally) `n` samples, without replacement, as a function of the step."""
        stage = self._current()
        stage.draws += 1
        path = f"{stage.path}|draw {stage.draws}"
        order = reading.Order(len(data), n, self.seed, f"{path}|{stage.k}")
        indices, total = order.samples(0)
        content = reading.read(data, indices, self.seed, path, stage.k, first=processes.bounds(total)[0])
        return reading.to_device(content, self.device)

    def gather(self, x: Tensor) -> Tensor:
        """`x` of all processes, concatenated along the first dimension in order, with gradient."""
        if processes.size() == 1:
            return x
        gathered = processes.Gather.apply(x, self._current().share)
        assert isinstance(gathered, Tensor)
        return gathered

    def mean(self, total: Tensor, count: Tensor | float) -> Tensor:
        """total / count, both added up over the processes: a mean over a count that depends on the data."""
        if processes.size() == 1:
            return total / count if not isinstance(count, Tensor) else total / count.clamp_min(1e-12)
        counted = torch.as_tensor(count, dtype=total.dtype, device=total.device)
        averaged = processes.GlobalMean.apply(total, counted, self._current().share)
        assert isinstance(averaged, Tensor)
        return averaged

    def shard(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's part of outer samples that have no batch dimension (experts, particles)."""
        require(len(items) % processes.size() == 0,
                f"{len(items)} outer samples cannot be split evenly over {processes.size()} processes")
        low, high = processes.bounds(len(items))
        return items[low:high]

    # ---------------------------------------------------------------- looking on

    @contextlib.contextmanager
    def aside(self, name: str, *models: nn.Module, grad: bool = False) -> Iterator[None]:
        """Evaluation that leaves no trace: eval mode, no gradient, its own random stream, all of it undone after."""
        modes = [(module, module.training) for model in models for module in model.modules()]
        moment = self._moment
        with preserved(), torch.set_grad_enabled(grad):
            self._moment = Moment(self.seed, *moment.parts, "aside", name)
            reseed(derive(self.seed, *map(str, moment.parts), "aside", name))
            for model in models:
                model.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training
                self._moment = moment

    def picture(self, name: str, content: Any, columns: int | None = None) -> None:
        """Keep a picture: a tensor [n, c, h, w] (shown as a grid) or a matplotlib figure."""
        if self.folder is not None and processes.rank() == 0:
            pictures.save(place(self.folder, self._folder_path()) / "pictures", name, content, columns)

    def check(self, protocol: Any, data: Any, labels: bool = False, **roles: Any) -> dict[str, Any]:
        """Send one real batch through each role before any work, and return it; see `stillhouse.run.check`."""
        with preserved():
            return checking.check(protocol, data, self.device, roles, labels)


def begin(run: Run | None) -> Run:
    """The first line of every `distill`: an unsaved run if none was given, and fresh seeds."""
    return (run if run is not None else Run()).begin()


def _several(optimizers: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    return [optimizers] if isinstance(optimizers, Optimizer) else optimizers


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _finite(value: float) -> bool:
    return value - value == 0.0


def _human(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

