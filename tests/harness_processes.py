"""Runs cases in one process and in two (gloo), and prints how far their results are apart, as a part of what another
seed changes, and how far those of the two processes are. See test_processes.py.

Usage: harness_processes.py FOLDER CASE…, where a case is the name of a function below or `system:<slug>`.
"""

import importlib
import json
import os
import pkgutil
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import accelerate  # noqa: F401  (imported before the processes part)
import torch
import torch._dynamo  # the first optimizer of a process would import it, in seconds

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # sums in another order differ by rounding, which Adam can make large

from torch import nn  # noqa: E402

from stillhouse import store, systems  # noqa: E402
from stillhouse.data.sets import TensorSet  # noqa: E402
from stillhouse.run import Run, begin  # noqa: E402
from stillhouse.testing import target_tree  # noqa: E402


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


def leaves(run):
    """One leaf after the other of the survey's map, on networks without normalisation."""
    from stillhouse.models.convnets import TinyConvNet
    from stillhouse.recipes.leaves import LEAVES
    from stillhouse.systems.compression import kd_survey

    def network():
        return TinyConvNet(classes=4, norm="none", width=2)

    trained = {}
    for leaf in LEAVES:
        if leaf in ("exits", "cross-modal", "data-free", "quantized"):  # three of them normalise over the batch
            continue
        torch.manual_seed(0)
        given = kd_survey.tiny()
        data, old = given["labelled"], ()
        if leaf == "lifelong":
            data, old = data.with_fields(label=data.data["label"] % 2 + 2), (0, 1)
        config = kd_survey.Config(leaf=leaf, steps=3, batch=7, lr=0.01, old=old)
        with run.scope(leaf):
            trained[leaf] = kd_survey.distill(network(), data, network(), [network(), network()], network,
                                              [network, network], config=config, run=run).state_dict()
    return trained


def related(run):
    """Knowledge that lies between the samples of a batch."""
    from stillhouse.models.convnets import TinyConvNet
    from stillhouse.recipes import knowledge

    trained = {}
    for kind in ("cka", "sp+ickd", "dist", "dkd", "none"):
        with run.scope(kind):
            teacher, student = (TinyConvNet(classes=3, norm="none", width=w) for w in (3, 2))
            config = knowledge.Config(steps=3, batch=9, kind=kind, lr=0.02)
            trained[kind] = knowledge.distill(teacher, student, pictures(), config, run).state_dict()
    return trained


def module_of(slug):
    (path,) = (m.name for m in pkgutil.walk_packages(systems.__path__, "stillhouse.systems.")
               if m.name.endswith("." + slug.replace("-", "_")))
    return importlib.import_module(path)


def system(slug):
    def case(run):
        module = module_of(slug)
        given = WITHOUT.get(slug, dict)(module.tiny())
        return target_tree(module.distill(**given, run=run))
    return case


def unnormalised():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4))


def of_diswot(given):
    from stillhouse.models.convnets import SmallVGG, TinyConvNet

    return {**given, "candidates": [lambda: TinyConvNet(classes=4, norm="none", width=2),
                                    lambda: SmallVGG(classes=4, image_size=8, width=2, norm="none")]}


def of_real_nvp(given):
    from stillhouse.models.flows import point_flow

    torch.manual_seed(0)
    return {**given, "student": point_flow(couplings=3, width=8, norm=False), "data": TensorSet(x=torch.randn(24, 2))}


def of_simclrv2(given):
    from stillhouse.parts.heads import Projected, projector

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {**given, "teacher": Projected(encoder, projector(6, 6, 8))}


WITHOUT = {
    "born-again": lambda given: {**given, "network": unnormalised, "teacher": unnormalised()},
    "fedx": lambda given: {**given, "network": lambda: unnormalised()[:-1]},
    "diswot": of_diswot,
    "real-nvp": of_real_nvp,
    "simclrv2": of_simclrv2,
    "mekd": lambda given: {**given, "config": replace(given["config"], emulation=0.0, lr=0.1)},
    "sd-label-noise": lambda given: {**given, "config": replace(given["config"], early_stopping=False)},
    "promptkd": lambda given: {**given, "config": replace(given["config"], vectors="student")},
    "consistency-models": lambda given: {**given, "config": replace(given["config"], lr=1e-3)},
    "distillm": lambda given: {**given, "config": replace(given["config"], phi=0.0, phi_step=0.0)},
}
"""What a system is given instead of its `tiny()`: no BatchNorm, no draws of a library's own, steps large enough to
tell rounding from a difference."""


def flat(tree):
    """The numbers of a tree as one vector."""
    return torch.cat([v.reshape(-1).double() for v in store.pack(tree)[1].values()])


def process(folder, name, rank, size, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    case = system(name.split(":")[1]) if ":" in name else globals()[name]
    result = {"flat": flat(case(Run(folder if size > 1 and ":" not in name else None, quiet=True)))}
    if size == 1:
        result["other seed"] = flat(case(Run(None, quiet=True, seed=1)))
    store.save_tree(folder / f"{size}-{rank}.safetensors", result)
    if size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def main(base, names):
    apart = {}
    for slug in (name.partition(":")[2] for name in names if ":" in name):
        module_of(slug).tiny()  # what it needs is imported once, before the processes part
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
        one, two, other = (store.load_tree(folder / f"{f}.safetensors") for f in ("1-0", "2-0", "2-1"))
        one, seeded, two, other = one["flat"], one["other seed"], two["flat"], other["flat"]
        unit = (one - seeded).abs().max().item() if len(one) == len(seeded) else one.abs().max().item()
        apart[name] = [(one - two).abs().max().item() / (unit or 1.0), (two - other).abs().max().item()]
    print(json.dumps(apart))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
