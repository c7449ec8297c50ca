"""Runs a multi-stage loop in child processes that are killed; prints what they ended with. See test_run.py."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

from test_run import journey  # noqa: E402

from stillhouse import store  # noqa: E402
from stillhouse.run import Run  # noqa: E402


def child(folder, work):
    """Fork, do `work` in the child, return its process id. (This process itself never trains: autograd's threads do
    not survive a fork.)"""
    pid = os.fork()
    if pid == 0:
        try:
            work(folder)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def job(folder):
    with Run(folder, quiet=True, checkpoint_steps=1) as run:
        result = journey(run)
    (folder / "digest").write_text(store.digest_of(result[:-1]))


def undisturbed(folder):
    (folder / "digest").write_text(store.digest_of(journey(Run(quiet=True))[:-1]))


def dying_writer(folder, call, after_writing):
    """Do the job, but die during the `call`-th checkpoint: half written, or written and not yet renamed."""
    write, calls = store._write, [0]

    def write_and_die(path, tree):
        calls[0] += 1
        write(path, tree)
        if calls[0] == call:
            if not after_writing:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    store._write = write_and_die
    job(folder)


def wait(pid):
    return os.waitpid(pid, 0)[1]


def main(base):
    base.mkdir(exist_ok=True)
    assert wait(child(base, undisturbed)) == 0
    expected = (base / "digest").read_text()
    start = time.monotonic()
    assert wait(child(base / "whole", job)) == 0
    span = time.monotonic() - start
    digests, kills, writing = [(base / "whole" / "digest").read_text()], 0, 0
    rng = random.Random(0)
    folder, number = base / "killed 0", 0
    for call, after in ((3, False), (6, True)):
        status = wait(child(folder, lambda f, c=call, a=after: dying_writer(f, c, a)))
        writing += os.WIFSIGNALED(status)
    while kills < 20:
        pid = child(folder, job)
        time.sleep(rng.uniform(0.0, 0.4 * span))
        os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            assert status == 0
            digests.append((folder / "digest").read_text())
            number += 1
            folder = base / f"killed {number}"
    assert wait(child(folder, job)) == 0
    digests.append((folder / "digest").read_text())
    print(json.dumps({"expected": expected, "digests": digests, "kills": kills, "kills while writing": writing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
