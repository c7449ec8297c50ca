"""Runs cases in one process and in two (gloo), and prints how far their results are apart. See test_processes.py.

Usage: harness_processes.py FOLDER CASE…, where a case is the name of a function below or `system:<slug>`.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401  (imported before the processes part)
import torch

torch.set_num_threads(1)

from torch import nn  # noqa: E402

from stillhouse import store  # noqa: E402
from stillhouse.data.sets import TensorSet  # noqa: E402
from stillhouse.run import Run, begin  # noqa: E402


def pictures(n=21):
    g = torch.Generator().manual_seed(1)
    return TensorSet(image=torch.randn(n, 1, 4, 4, generator=g), label=torch.arange(n) % 3,
                     length=torch.arange(n) % 5 + 1)


def trained(run, loss, batch=9, steps=8, data=None, clip=None):
    run = begin(run)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for content in run.loop("x", data or pictures(), batch=batch, steps=steps, net=net, optimizer=optimizer):
        run.update(optimizer, clip=clip, loss=loss(run, net, content))
    return {"net": dict(net.state_dict()), "log": torch.tensor([line["loss"] for line in run.history])}


def mean_loss(run):
    """A mean over samples, the last batch of an epoch (3 of 21) split unevenly."""
    return trained(run, lambda r, net, b: nn.functional.cross_entropy(net(b["image"]), b["label"]), clip=0.3)


def contrastive(run):
    """Every sample against the whole batch, on both sides, with per-sample noise."""
    def loss(run, net, b):
        view = b["image"] + 0.1 * run.randn(*b["image"].shape)
        a, z = (nn.functional.normalize(run.gather(net(v)), dim=1) for v in (b["image"], view))
        return nn.functional.cross_entropy(a @ z.T / 0.2, torch.arange(len(a)))
    return trained(run, loss)


def token_mean(run):
    """A mean over a number of tokens that differs between samples and processes."""
    def loss(run, net, b):
        z = net(b["image"])
        per_token = z.square().sum(1) * b["length"]
        return run.mean(per_token.sum(), b["length"].sum())
    return trained(run, loss)


def decisions(run):
    """Decisions shared by the batch, an extra draw, a shard of outer samples without a batch, streams."""
    run = begin(run)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    streams = {"a": pictures(20), "b": pictures(12)}
    for content in run.loop("x", streams, batch={"a": 4, "b": 2}, steps=6, net=net, optimizer=optimizer):
        j = run.shared_randint(0, 4)
        more = run.draw(pictures(), 6)["image"]
        time = run.rand(len(content["a"]["image"]))
        loss = (net(content["a"]["image"])[:, j] * time).mean() + net(content["b"]["image"])[:, 1 - j // 2].mean()
        run.update(optimizer, loss=loss + net(more).square().mean() * run.shared_rand())
    for _ in run.loop("y", steps=3, net=net, optimizer=optimizer):
        losses = [net(pictures(4).image + e).square().mean() for e in run.shard([0.1, 0.2, 0.3, 0.4])]
        run.update(optimizer, loss=torch.stack(losses).mean())
    fresh = nn.Linear(3, 3)
    drawn = run.once("drawn", lambda: torch.rand(3))
    return {"net": dict(net.state_dict()), "fresh": dict(fresh.state_dict()), "once": drawn}


def interrupted(run):
    """Only one process is told to stop; both stop after the same step, and a resume ends the same."""
    if run.folder is None:
        return mean_loss(run)
    from stillhouse.errors import Interrupted

    first = Run(run.folder / "stopped", quiet=True)
    def loss(r, net, b):
        if r.k == 3 and os.environ.get("RANK") == "1":
            r.stop()
        return nn.functional.cross_entropy(net(b["image"]), b["label"])
    try:
        trained(first, loss, clip=0.3)
        raise AssertionError("was not stopped")
    except Interrupted:
        pass
    resumed = trained(Run(run.folder / "stopped", quiet=True), loss, clip=0.3)
    whole = mean_loss(Run(quiet=True))
    return {"net": resumed["net"], "log": whole["log"]}


def token_exits(run):
    """OFA-KD into a transformer, whose exit branches have no BatchNorm, under mixup and cutmix."""
    from stillhouse.models.vit import SmallViT
    from stillhouse.systems.compression import ofa_kd

    given = ofa_kd.tiny()
    config = ofa_kd.Config(steps=5, batch=6, lr=0.05, mixup=0.8, cutmix=1.0)
    student = SmallViT(classes=4, image_size=8, width=8, depth=2, heads=2)
    return ofa_kd.distill(given["teacher"], student, given["labelled"], config, run).state_dict()


def system(slug):
    def case(run):
        import importlib
        import pkgutil

        from stillhouse import systems
        from stillhouse.testing import target_tree

        (path,) = (m.name for m in pkgutil.walk_packages(systems.__path__, "stillhouse.systems.")
                   if m.name.endswith("." + slug.replace("-", "_")))
        module = importlib.import_module(path)
        return target_tree(module.distill(**module.tiny(), run=run))
    return case


def flat(tree):
    """The numbers of a tree as one vector."""
    return torch.cat([v.reshape(-1).double() for v in store.pack(tree)[1].values()])


def process(folder, name, rank, size, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    case = system(name.split(":")[1]) if ":" in name else globals()[name]
    run = Run(folder if size > 1 and ":" not in name else None, quiet=True)
    result = case(run)
    store.save_tree(folder / f"{size}-{rank}.safetensors", {"flat": flat(result)})
    if size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main(base, names):
    apart = {}
    for name in names:
        folder = base / name.replace(":", " ")
        children = []
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank, size in ((0, 1), (0, 2), (1, 2)):
            pid = os.fork()
            if pid == 0:
                try:
                    process(folder, name, rank, size, port)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0], name
        one, two, other = (store.load_tree(folder / f"{f}.safetensors")["flat"] for f in ("1-0", "2-0", "2-1"))
        apart[name] = [(one - two).abs().max().item() / one.abs().max().item(),
                       (two - other).abs().max().item()]
    print(json.dumps(apart))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
