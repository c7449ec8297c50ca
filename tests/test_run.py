import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stillhouse import store
from stillhouse.data.sets import TensorSet
from stillhouse.errors import (
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
    ResumeError,
    RoleError,
    StageError,
    StoreError,
)
from stillhouse.protocols import Classifier
from stillhouse.run import DryRunEnded, Run, begin, frozen
from stillhouse.run.schedules import cosine, linear, piecewise, set_lr, warmup, warmup_cosine


def pictures(n=22, classes=3):
    g = torch.Generator().manual_seed(1)
    return TensorSet(image=torch.randn(n, 1, 4, 4, generator=g), label=torch.arange(n) % classes)


def network(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, classes))


def loss_of(net, batch):
    return nn.functional.cross_entropy(net(batch["image"]), batch["label"])


def train(run, steps=8, evaluate=False, body=None, batch=8, net=None, **options):
    run = begin(run)
    net = net or network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    seen = []
    for content in run.loop("train", pictures(), batch=batch, steps=steps, net=net, optimizer=optimizer, **options):
        set_lr(optimizer, 1e-2 * cosine(run.progress))
        seen.append(content["index"].tolist())
        if body:
            body(run)
        run.update(optimizer, ce=loss_of(net, content))
        if evaluate:
            with run.aside("evaluate", net):
                assert not net.training
                torch.randn(3), net(pictures().image)
    return net, seen


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stop_at(k):
    def body(run):
        if run.k == k:
            run.stop()
    return body


# ------------------------------------------------------------------------------------ steps and data


def test_a_step_is_a_function_of_its_number():
    (a, seen), (b, again), (c, other) = train(Run(quiet=True)), train(Run(quiet=True)), train(Run(quiet=True, seed=1))
    assert equal(a, b) and seen == again
    assert not equal(a, c) and seen != other


def test_an_epoch_shows_every_sample_once_and_its_last_batch_is_odd():
    run = Run(quiet=True)
    seen, last, epochs = [], [], []
    for batch in run.loop("x", pictures(), batch=8, epochs=2):
        seen.append(batch["index"].tolist())
        last.append(run.last_of_epoch)
        epochs.append(run.epoch)
    assert [len(s) for s in seen] == [8, 8, 6, 8, 8, 6]
    assert sorted(i for s in seen[:3] for i in s) == sorted(i for s in seen[3:] for i in s) == list(range(22))
    assert seen[:3] != seen[3:]
    assert last == [False, False, True] * 2 and epochs == [0, 0, 0, 1, 1, 1]
    assert [len(b["index"]) for b in run.loop("y", pictures(), batch=8, epochs=1, drop_last=True)] == [8, 8]


class Noisy:
    """A set read item by item whose items draw random numbers."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        return {"image": pictures().image[index] + torch.randn(1, 4, 4), "label": index % 3}


def test_prefetching_workers_change_nothing():
    def images(workers, **options):
        run = Run(quiet=True, workers=workers)
        return torch.cat([b["image"] for b in run.loop("x", Noisy(), batch=8, steps=7, **options)])

    assert torch.equal(images(0), images(1)) and torch.equal(images(0), images(2))
    assert not torch.equal(images(0)[:8], images(0, shuffle=False)[:8])


def test_several_streams_and_extra_draws():
    run = Run(quiet=True)
    data = {"real": pictures(10), "condition": TensorSet(condition=torch.arange(7))}
    sizes, drawn = [], []
    for batch in run.loop("x", data, batch={"real": 4, "condition": 3}, steps=4):
        sizes.append((len(batch["real"]["image"]), len(batch["condition"]["condition"])))
        drawn.append((run.draw(pictures(), 5)["index"].tolist(), run.draw(pictures(), 5)["index"].tolist()))
    assert sizes == [(4, 3), (4, 3), (2, 1), (4, 3)]
    assert len({tuple(d) for pair in drawn for d in pair}) == 8


def test_a_source_that_cannot_seek_is_streamed():
    def numbers():
        class Source:
            def __iter__(self):
                return ({"image": torch.full((1,), float(i))} for i in range(5))
        return Source()

    run = Run(quiet=True)
    seen = [b["image"].flatten().tolist() for b in run.loop("x", numbers(), batch=2, steps=4)]
    assert seen == [[0, 1], [2, 3], [4, 0], [1, 2]]


@pytest.mark.parametrize("data, options, message", [
    (TensorSet(image=torch.zeros(0, 1)), {"batch": 2, "steps": 1}, "is empty"),
    (pictures(), {"steps": 1}, "needs batch"),
    (pictures(), {"batch": 0, "steps": 1}, "at least 1"),
    (pictures(), {"batch": 2}, "needs steps or epochs"),
    (None, {"epochs": 1}, "need one map-style"),
    (pictures(), {"batch": 2, "steps": 1, "epochs": 1}, "both steps and epochs"),
    (pictures(4), {"batch": 8, "steps": 1, "drop_last": True}, "leaves nothing"),
])
def test_loops_that_cannot_work_are_refused_at_once(data, options, message):
    with pytest.raises((DataError, ConfigError), match=message):
        Run(quiet=True).loop("x", data, **options)


def test_a_number_cannot_be_held():
    run = Run(quiet=True)
    for value in (0.5, 3, "text", [1.0]):
        with pytest.raises(TypeError, match=r"run.state\(phi"):
            run.loop("x", steps=1, phi=value)


def test_names_are_unique_and_scopes_separate_them():
    run = Run(quiet=True)
    streams = []
    for scope in ("a", "b"):
        with run.scope(scope):
            for _ in run.loop("x", steps=1):
                streams.append(torch.randn(2))
    assert not torch.equal(*streams)
    list(run.loop("x", steps=1))
    with pytest.raises(StageError, match="used twice"):
        run.loop("x", steps=1)


def test_a_bare_break_is_an_interruption_and_finish_is_an_end(tmp_path):
    def go(run, how):
        counts = []
        for k in run.loop("first", steps=9):
            counts.append(k)
            if k == 2:
                if how == "finish":
                    run.finish()
                elif how == "finish, break":
                    run.finish()
                    break
                else:
                    break
        for k in run.loop("second", steps=2):
            counts.append(k)
        return counts

    with pytest.raises(StageError, match=r"left by `break` after step 2"):
        go(Run(quiet=True), "break")
    for how in ("finish", "finish, break"):
        folder = tmp_path / how
        assert go(Run(folder, quiet=True), how) == [0, 1, 2, 0, 1]
        assert go(Run(folder, quiet=True), how) == []


# ------------------------------------------------------------------------------------ resume


def journey(run, stop=None):
    """Several stages with all that can outlive a step; returns everything it makes."""
    run = begin(run)
    teacher, student = network(), network()
    history = run.once("reference", lambda: {"loss": torch.randn(()), "name": "x", "list": [1, 2.5]})
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    critic = nn.Linear(3, 1)
    slow = torch.optim.SGD(critic.parameters(), lr=1e-2, momentum=0.9)
    average = nn.Linear(16, 8)
    state = run.state(phi=0.0, best=torch.zeros(2), names=["a"], queue=[])
    free = torch.zeros(3, requires_grad=True)
    images = torch.optim.SGD([free], lr=0.1)
    for batch in run.loop("match", pictures(), batch=8, steps=7, student=student, average=average, critic=critic,
                          state=state, optimizers=[optimizer, slow, images], free=free):
        if stop is not None and run.k == stop:
            run.stop()
        state.phi += run.shared_rand()
        state.queue = [*state.queue[-2:], batch["image"][: 1 + run.k % 2].clone()]
        with torch.no_grad():
            average.weight.lerp_(student[1].weight, 0.1)
        z = student(batch["image"])
        run.update((optimizer, images), clip=1.0, kd=(z - teacher(batch["image"]).detach() - free).square().mean())
        run.update(slow, critic=critic(z.detach()).mean() + run.randn(len(z), 1).mean())
    widened = nn.Sequential(student, nn.Linear(3, 3))
    second = torch.optim.Adam(widened.parameters(), lr=1e-2)
    for k in run.loop("rounds", steps=3, widened=widened, second=second, state=state):
        for batch in run.loop("client", pictures(), batch=11, epochs=1):
            run.update(second, ce=loss_of(widened, batch))
        state.phi += k
        if k == 1:
            run.finish()
    final = nn.Linear(2, 2)
    return [widened.state_dict(), average.state_dict(), critic.state_dict(), state.state_dict(), free.detach(),
            final.state_dict(), history, torch.randn(2), second.state_dict()]


def test_stopped_and_resumed_after_every_step_it_ends_the_same(tmp_path):
    expected = store.digest_of(journey(Run(quiet=True)))
    stops = 0
    while True:
        with Run(tmp_path, quiet=True, checkpoint_steps=1) as run:
            run.stop()
            try:
                result = journey(run)
                break
            except Interrupted:
                stops += 1
    assert stops == 9
    assert store.digest_of(result) == expected
    assert store.digest_of(journey(Run(tmp_path, quiet=True))[:-1]) == store.digest_of(journey(Run(quiet=True))[:-1])


def test_finished_stages_keep_only_what_later_ones_need(tmp_path):
    journey(Run(tmp_path, quiet=True))
    (first,) = store.find_checked(tmp_path / "stages" / "match", "done")
    (second,) = store.find_checked(tmp_path / "stages" / "rounds", "done")
    assert "second" in store.load_checked(second)["held"]
    assert set(store.load_checked(first)["held"]) >= {"student", "state", "free"}
    assert not store.find_checked(tmp_path / "stages" / "match", "step")


def test_an_optimizer_used_by_two_stages_survives_a_resume_between_them(tmp_path):
    def go(run, stop=False):
        run = begin(run)
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for name in ("a", "b"):
            if stop and name == "b":
                raise RuntimeError
            for batch in run.loop(name, pictures(), batch=8, steps=3, net=net, optimizer=optimizer):
                run.update(optimizer, ce=loss_of(net, batch))
        return net

    with pytest.raises(RuntimeError):
        go(Run(tmp_path, quiet=True), stop=True)
    assert equal(go(Run(tmp_path, quiet=True)), go(Run(quiet=True)))


HARNESS = Path(__file__).with_name("harness_kill.py")


def test_killed_at_any_moment_it_ends_the_same(tmp_path):
    """Twenty SIGKILLs at random moments, and two while a checkpoint is being written."""
    done = subprocess.run([sys.executable, str(HARNESS), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["kills"] >= 20 and outcome["kills while writing"] == 2
    assert set(outcome["digests"]) == {outcome["expected"]} and len(outcome["digests"]) >= 2


def test_sigint_in_mid_step_finishes_the_step_and_saves(tmp_path):
    def interrupt(run):
        if run.k == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with Run(tmp_path, quiet=True) as run, pytest.raises(Interrupted, match="after step 4 of 8"):
        train(run, body=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    (saved,) = store.find_checked(tmp_path / "stages" / "train", "step")
    assert store.load_checked(saved)["k"] == 4
    assert equal(train(Run(tmp_path, quiet=True))[0], train(Run(quiet=True))[0])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def interrupt(run):
        if run.k == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with Run(tmp_path, quiet=True, checkpoint_steps=1) as run, pytest.raises(KeyboardInterrupt):
        train(run, body=interrupt)
    assert equal(train(Run(tmp_path, quiet=True))[0], train(Run(quiet=True))[0])


def test_evaluation_leaves_no_trace():
    assert equal(train(Run(quiet=True), evaluate=True)[0], train(Run(quiet=True))[0])


def test_tied_weights_come_back_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.last.weight = self.first.weight

        def forward(self, image):
            return self.last(torch.relu(self.first(image.flatten(1))))

    with Run(tmp_path, quiet=True) as run, pytest.raises(Interrupted):
        train(run, net=Tied(), body=stop_at(2))
    net, _ = train(Run(tmp_path, quiet=True), net=(tied := Tied()))
    torch.manual_seed(0)
    assert net is tied and net.first.weight is net.last.weight
    (done,) = store.find_checked(tmp_path / "stages" / "train", "done")
    assert done.stat().st_size < 3 * 4 * 16 * 16 + 4000


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    for damage in ("cut", "altered", "both"):
        folder = tmp_path / damage
        with Run(folder, quiet=True, checkpoint_steps=2) as run, pytest.raises(Interrupted):
            train(run, body=stop_at(4))
        older, newer = store.find_checked(folder / "stages" / "train", "step")
        for path in [newer, older] if damage == "both" else [newer]:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 255
            path.write_bytes(data if damage == "altered" else data[: len(data) // 2])
        run = Run(folder)
        assert equal(train(run)[0], train(Run(quiet=True))[0])
        said = capsys.readouterr().err
        assert newer.name in said and "going back" in said
        assert ("goes on from step 4" in said) == (damage != "both")


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    def crash(run):
        if run.k == 6:
            run._flush(run._stages[0])
            raise RuntimeError

    with Run(tmp_path, quiet=True, checkpoint_steps=4) as run, pytest.raises(RuntimeError):
        train(run, body=crash)
    log = tmp_path / "stages" / "train" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 6
    train(Run(tmp_path, quiet=True))
    assert [json.loads(line)["k"] for line in log.read_text().splitlines()] == list(range(8))


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, monkeypatch):
    write = store._write
    calls = []

    def full(path, tree):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        write(path, tree)

    monkeypatch.setattr(store, "_write", full)
    with Run(tmp_path, quiet=True, checkpoint_steps=1) as run, pytest.raises(StoreError, match="no space left"):
        train(run)
    monkeypatch.setattr(store, "_write", write)
    assert [store.load_checked(p)["k"] for p in store.find_checked(tmp_path / "stages" / "train")] == [2, 3]
    assert equal(train(Run(tmp_path, quiet=True))[0], train(Run(quiet=True))[0])


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        Run.open(tmp_path / "file" / "run", system="x", quiet=True)

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="no permission"):
        Run.open(tmp_path / "run", system="x", quiet=True)


def test_a_resume_with_something_else_is_refused_by_name(tmp_path):
    def reopen(folder=tmp_path, resume=True, **changed):
        given = {"system": "x", "config": {"lr": 0.1, "steps": 5}, "seed": 0, "fingerprint": {"teacher": "abc"}}
        return Run.open(folder, resume=resume, quiet=True, **{**given, **changed})

    with pytest.raises(ResumeError, match="no run in"):
        reopen()
    reopen(resume=False)
    reopen()
    with pytest.raises(ResumeError, match="already holds a run"):
        reopen(resume=False)
    with pytest.raises(ResumeError, match=r"config.lr was 0.1 and is now 0.2"):
        reopen(config={"lr": 0.2, "steps": 5})
    with pytest.raises(ResumeError, match=r"fingerprint.teacher was 'abc' and is now 'def'"):
        reopen(fingerprint={"teacher": "def"})
    with pytest.raises(ResumeError, match="seed was 0 and is now 1"):
        reopen(seed=1)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ResumeError, match="damaged"):
        reopen()


def test_a_changed_model_is_refused_by_name(tmp_path):
    with Run(tmp_path, quiet=True) as run, pytest.raises(Interrupted):
        train(run, body=stop_at(2))
    with pytest.raises(ResumeError, match="saved state of 'net' does not fit"):
        train(Run(tmp_path, quiet=True), net=network(classes=4))


def test_a_loss_that_is_not_finite_is_named_and_the_checkpoint_is_from_before(tmp_path):
    def go(run):
        run = begin(run)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in run.loop("train", pictures(), batch=8, steps=40, net=net, optimizer=optimizer):
            zero = torch.log(torch.tensor(0.0)) * (run.k == 25) if run.k == 25 else 0.0
            run.update(optimizer, ce=loss_of(net, batch), gan=net(batch["image"]).mean() + zero)

    with Run(tmp_path, quiet=True, checkpoint_steps=3) as run, pytest.raises(NonFiniteError, match=r"'gan'.*step 25"):
        go(run)
    for path in store.find_checked(tmp_path / "stages" / "train"):
        held = store.load_checked(path)["held"]
        assert all(torch.isfinite(v).all() for v in held["net"].values())


# ------------------------------------------------------------------------------------ updates


def test_gradients_reach_only_the_optimizer_they_are_for():
    run = Run(quiet=True)
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    for _ in run.loop("x", steps=1):
        run.backward(critic(generator(torch.randn(4, 2))).mean(), into=optimizer)
        assert all(p.grad is None for p in critic.parameters())
        assert all(p.grad is not None for p in generator.parameters())
        before = generator.weight.clone()
        run.step(optimizer)
        assert not torch.equal(before, generator.weight) and generator.weight.grad is None
    with pytest.raises(ConfigError, match="no gradient"):
        run.update(optimizer, x=torch.zeros(()))


def test_hand_made_gradients_and_clipping():
    run = Run(quiet=True)
    x = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0)
    x.backward(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    run.step(optimizer, clip=1.0)
    torch.testing.assert_close(x.detach(), -torch.tensor([0.6, 0.8, 0, 0]))


def test_split_gives_the_gradient_of_the_whole_batch():
    run, net = Run(quiet=True), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in run.loop("x", pictures(), batch=7, steps=1):
        run.backward(loss_of(net, batch), into=optimizer)
        whole = net[1].weight.grad.clone()
        optimizer.zero_grad()
        sizes = []
        for part in run.split(batch, 3):
            sizes.append(len(part["image"]))
            run.backward(loss_of(net, part), into=optimizer)
        assert sizes == [3, 3, 1]
        torch.testing.assert_close(net[1].weight.grad, whole)


def test_schedules():
    assert (cosine(0), cosine(1), linear(0.25)) == (1, 0, 0.75) and abs(cosine(0.5) - 0.5) < 1e-12
    assert (warmup(0.05, 0.1), warmup(0.5, 0.1), warmup(0, 0)) == (0.5, 1, 1)
    assert warmup_cosine(0.1, 0.1) == 1 and abs(warmup_cosine(0.55, 0.1) - 0.5) < 1e-12
    assert piecewise(0.6, [(0.5, 0.1), (0.75, 0.1)]) == 0.1
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr_scale": 0.1}], lr=1)
    set_lr(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.05]


# ------------------------------------------------------------------------------------ arms, checks, objects


def test_arms_start_alike_and_are_not_run_twice(tmp_path):
    ran = []

    def arm(name):
        def measure():
            ran.append(name)
            run = begin(current)
            start = torch.randn(3).sum()
            draws = [torch.randn(1).item() for _ in run.loop("x", steps=2)]
            return {"start": start, "draw": draws[-1]}
        return measure

    current = Run(tmp_path, quiet=True)
    first = current.arms({"a": arm("a"), "b": arm("b")}, extended={"c": arm("c")})
    assert first["a"] == first["b"] and set(first) == {"a", "b"}
    assert ran == ["a", "b"]
    current = Run(tmp_path, quiet=True, full=True)
    assert current.arms({"a": arm("a"), "b": arm("b")}, extended={"c": arm("c")})["c"] == first["a"]
    assert ran == ["a", "b", "c"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_crashed_arm_is_named_and_the_others_go_on():
    def crash():
        for _ in run.loop("x", steps=3):
            raise ValueError("broken")
        return {}

    def fine():
        return {"k": float(sum(run.loop("x", steps=3)))}

    run = Run(quiet=True, keep_going=True)
    assert run.arms({"a": crash, "b": fine}) == {"a": {}, "b": {"k": 3.0}}
    assert run.crashed == {"a": "ValueError: broken"}
    run = Run(quiet=True)
    with pytest.raises(ValueError):
        run.arms({"a": crash})


def test_check_reports_by_role():
    run = Run(quiet=True)
    net = network()
    net[2].p = 0.9
    run.check(Classifier, pictures(), teacher=net, student=network(), extra=None)
    assert net.training
    with pytest.raises(RoleError, match="teacher has 3, student has 4"):
        run.check(Classifier, pictures(), teacher=network(), student=network(classes=4))
    with pytest.raises(RoleError, match=r"student \(Linear\) could not process one batch.*\(4, 1, 4, 4\)"):
        run.check(Classifier, pictures(), student=nn.Linear(3, 3))
    with pytest.raises(RoleError, match="teacher must be a Classifier"):
        run.check(Classifier, pictures(), teacher="resnet")
    with pytest.raises(RoleError, match="not finite"):
        bad = network()
        nn.init.constant_(bad[1].weight, float("nan"))
        run.check(Classifier, pictures(), teacher=bad)
    with pytest.raises(DataError, match="no field 'image' \\(it has x\\)"):
        run.check(Classifier, TensorSet(x=torch.zeros(3, 1)), teacher=network())
    with pytest.raises(DataError, match="first at index 5"):
        image = pictures().image
        image[5, 0, 0, 0] = float("inf")
        run.check(Classifier, TensorSet(image=image), teacher=network())


def test_labels_that_are_read_must_be_there_and_have_a_class():
    run = Run(quiet=True)
    data = pictures()
    batch = run.check(Classifier, data, labels=True, student=network())
    assert batch["image"].shape == (4, 1, 4, 4) and batch["label"].tolist() == [0, 1, 2, 0]
    with pytest.raises(DataError, match="no field 'label'"):
        run.check(Classifier, data.without("label"), labels=True, student=network())
    for y, text in ((3, "between 0 and 3"), (-1, "between -1 and 2")):
        label = data.label.clone()
        label[-1] = y
        wrong = data.with_fields(label=label)
        run.check(Classifier, wrong, student=network())
        with pytest.raises(RoleError, match=f"labels lie {text}, but student has 3 classes, 0 to 2"):
            run.check(Classifier, wrong, labels=True, student=network())
    with pytest.raises(DataError, match="whole numbers"):
        run.check(Classifier, data.with_fields(label=data.label.float()), labels=True, student=network())
    run.check(Classifier, data.with_fields(label=data.label[:, None] - 100), labels=True, student=network())


def test_labels_of_sets_that_would_decode_all_to_tell_are_checked_at_the_start():
    class Slow:
        reads = 0

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            Slow.reads += 1
            return {"image": torch.zeros(1, 4, 4), "label": i % 3}

    Run(quiet=True).check(Classifier, Slow(), labels=True, student=network())
    assert Slow.reads <= 8
    with pytest.raises(RoleError, match="student has 2 classes"):
        Run(quiet=True).check(Classifier, Slow(), labels=True, student=network(classes=2))


def test_check_and_frozen_leave_models_as_found():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
    net[2].bias.requires_grad_(False)
    before = store.digest_of(dict(net.state_dict()))
    torch.manual_seed(3)
    Run(quiet=True).check(Classifier, pictures(), net=net)
    with pytest.raises(ValueError), frozen(net, [net]):
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        raise ValueError
    assert net.training and net[2].weight.requires_grad and not net[2].bias.requires_grad
    assert store.digest_of(dict(net.state_dict())) == before


def test_dry_run_measures_a_few_steps_and_saves_nothing(tmp_path, capsys):
    with pytest.raises(DryRunEnded, match="3 steps"):
        train(Run(tmp_path, dry=True), steps=50)
    assert "for 50 steps" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_absent_device_and_unknown_options_are_refused():
    with pytest.raises(ConfigError, match=r"'cuda:7' is not available; this machine has: cpu"):
        Run(device="cuda:7")
    with pytest.raises(ConfigError, match="not available"):
        Run(device="toaster")
    with pytest.raises(ConfigError, match="precision"):
        Run(precision="float8")


def test_bf16_runs_and_resumes(tmp_path):
    with Run(tmp_path, quiet=True, precision="bf16") as run, pytest.raises(Interrupted):
        train(run, body=stop_at(3))
    with Run(tmp_path, quiet=True, precision="bf16") as run:
        resumed = train(run)[0]
    with Run(quiet=True, precision="bf16") as run:
        whole = train(run)[0]
    assert equal(resumed, whole) and not equal(whole, train(Run(quiet=True))[0])


def test_pictures_are_kept(tmp_path):
    run = Run(tmp_path, quiet=True)
    run.picture("some digits", torch.randn(7, 1, 4, 4))
    import matplotlib.figure

    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2])
    run.picture("../curve", figure)
    names = sorted(p.name for p in (tmp_path / "stages" / "pictures").iterdir())
    assert names == ["..%2Fcurve.png", "some digits.png"]
    with pytest.raises(DataError, match="a picture is"):
        run.picture("x", torch.zeros(3))
