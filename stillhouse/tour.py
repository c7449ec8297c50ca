"""What `make run` shows: the main job on the embedded digits, then systems of every family at a small setting."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stillhouse import catalog
from stillhouse.errors import MissingExtraError
from stillhouse.store import write_text

Rows = list[tuple[str, str]]


def tour(out: Path, seed: int = 0, quiet: bool = False) -> Path:
    """Run everything into `out` (what is finished there is not run again) and write the report; its path."""
    from stillhouse.report import write_report

    console, start = Console(), time.monotonic()
    console.print("[bold]Main job[/] (ssld): a trained digits classifier becomes a small one, from unlabelled digits")
    _main_job(out / "ssld", seed, quiet, console)
    stops = [slug for slug in STOPS if catalog.find(slug).built]
    rows: list[list[str]] = []
    for number, slug in enumerate(stops, start=1):
        console.print(f"\n[bold]{number}/{len(stops)} {slug}[/]: {catalog.find(slug).moves}")
        try:
            module = catalog.load(slug)
        except MissingExtraError as error:
            console.print(f"  skipped: {error}", markup=False)
            continue
        from stillhouse.run import Run

        with Run.open(out / slug, system=slug, seed=seed, quiet=quiet, resume=None) as run:
            for what, value in STOPS[slug](run, module):
                console.print(f"  {what}: [bold]{value}[/]")
                rows.append([slug, what, value])
    _summarise(out / "tour", "A tour through systems of every family, at their smallest useful setting",
               ["system", "measured", "value"], rows)
    page = write_report(out, out / "report.html")
    console.print(f"\nDone in {time.monotonic() - start:.0f} s. Report: {page.resolve()}\nThree commands to try next:\n"
                  "  .venv/bin/still show ssld\n  .venv/bin/still list --built\n"
                  "  .venv/bin/still run ssld --teacher module:callable --student module:callable --data FOLDER",
                  highlight=False, markup=False)
    return page


def _main_job(out: Path, seed: int, quiet: bool, console: Console) -> None:
    from stillhouse.run import Run
    from stillhouse.systems.compression import ssld

    with Run.open(out, system="ssld", seed=seed, quiet=quiet, resume=None) as run:
        arms = ssld.main_job(run)
    teacher = arms["teacher"]
    columns = ["network", "test accuracy", "parameters", "smaller by", "latency"]
    rows = [[name, f"{a['accuracy']:.1%}", f"{a['parameters']:,.0f}",
             f"{teacher['parameters'] / a['parameters']:.0f}x", f"{a['latency_ms']:.2f} ms"]
            for name, a in arms.items()]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    _summarise(out, "The main job: a small classifier from a big one and unlabelled digits", columns, rows)


def _summarise(folder: Path, title: str, columns: list[str], rows: list[list[str]]) -> None:
    """What the report shows at its top."""
    write_text(folder / "summary.json", json.dumps({"title": title, "text": "", "columns": columns, "rows": rows}))


def _dmd2(run: Any, dmd2: Any) -> Rows:
    from stillhouse.data.densities import gauss2d, ring
    from stillhouse.diffusion.denoise import NetworkDenoiser
    from stillhouse.diffusion.process import VE
    from stillhouse.evaluate.distances import energy_distance, modes_hit
    from stillhouse.models.denoisers import MLPDenoiser
    from stillhouse.run.pictures import scatter
    from stillhouse.zoo.denoisers import gauss2d_teacher

    centres, process = ring(8), VE(0.05, 5.0, rho=0)
    data: Any = gauss2d(10_000, centres, 0.15, seed=run.seed)

    def network() -> NetworkDenoiser:
        return NetworkDenoiser(MLPDenoiser((2,), 64, 3), process, "edm", sigma_data=1.4)

    config = replace(dmd2.EMBEDDED, steps=1500, fit=800, lr=1e-3, fake_lr=1e-3)
    sampler = dmd2.distill(gauss2d_teacher(process, centres, 0.15), network(), data, None, network, config, run)
    x = sampler(run.randn(2000, 2)).detach()
    run.picture("data and one-step samples", scatter(data=data.x, samples=x))
    return [("energy distance to the data in one step", f"{energy_distance(x, data.x[:5000]):.4f}"),
            ("modes hit, of 8", f"{modes_hit(x, centres, 0.45):.0f}")]


def _progressive(run: Any, pd: Any) -> Rows:
    from stillhouse.data.densities import gauss2d, ring
    from stillhouse.diffusion.denoise import NetworkDenoiser
    from stillhouse.diffusion.grids import uniform
    from stillhouse.diffusion.process import VPCosine
    from stillhouse.diffusion.samplers import FewStepSampler
    from stillhouse.evaluate.distances import energy_distance
    from stillhouse.models.denoisers import MLPDenoiser
    from stillhouse.run.pictures import scatter
    from stillhouse.zoo.denoisers import gauss2d_teacher

    process = VPCosine()
    data: Any = gauss2d(10_000, ring(8), 0.08, seed=run.seed)
    teacher = gauss2d_teacher(process, ring(8), 0.08)
    student = NetworkDenoiser(MLPDenoiser((2,), 128, 3), process, "v")
    config = replace(pd.EMBEDDED, start=16, steps=300, fit=4.0)
    ladder = pd.distill(teacher, student, data, config, run)
    z = run.randn(2000, 2)
    few, plain = ladder[2](z).detach(), FewStepSampler(teacher, uniform(2))(z)
    run.picture("data and two-step samples", scatter(data=data.x, samples=few))
    return [("energy distance to the data, 2 steps of DDIM", f"{energy_distance(plain, data.x[:5000]):.4f}"),
            ("the same, 2 steps distilled", f"{energy_distance(few, data.x[:5000]):.4f}")]


def _mtt(run: Any, mtt: Any) -> Rows:
    from stillhouse.data.coresets import random_per_class
    from stillhouse.data.digits import digits
    from stillhouse.zoo.experts import digits_network

    network, train, test = digits_network(), digits(8, "train"), digits(8, "test")
    config = replace(mtt.EMBEDDED, steps=60, experts=3, epochs=12, max_start=8, evaluate_networks=4)
    distilled = mtt.distill(network, train, config=config, run=run)
    real = train.select(random_per_class(train.label, 1))
    plain = mtt.DistilledSet(real.image, real.label, mtt.REAL_LR)
    return [(f"accuracy after training on {what}", f"{mtt.evaluate(d, network, test, config, run)['accuracy']:.1%}")
            for what, d in (("10 real digits", plain), ("10 distilled digits", distilled))]


def _distillm(run: Any, distillm: Any) -> Rows:
    from stillhouse.data.grammar import grammar
    from stillhouse.evaluate.text import judge_grammar
    from stillhouse.zoo.language import RECIPE, grammar_model, grammar_teacher

    teacher = grammar_teacher({**RECIPE, "steps": 700, "width": 48, "layers": 2, "pairs": 5000})
    student = grammar_model(32, 1, 2)
    config = replace(distillm.EMBEDDED, steps=300, fine_tuning=1.0)
    distillm.distill(teacher, student, grammar("train", 400, seed=run.seed), grammar("validation", 50, seed=run.seed),
                     config=config, run=run)
    with run.aside("judge", student, teacher):
        judged = judge_grammar(student, teacher, grammar("test", 200, seed=run.seed))
    return [(f"{name.replace('_', ' ')} of the student's answers", f"{value:.3g}")
            for name, value in list(judged.items())[:3]]


def _mirage(run: Any, mirage: Any) -> Rows:
    from stillhouse.data.graphs import motifs
    from stillhouse.models.gnn import GNN
    from stillhouse.recipes import graphs

    train, test = motifs("train", seed=run.seed), motifs("test", seed=run.seed)
    forests = mirage.distill(train, mirage.EMBEDDED, run)
    rows = []
    for what, data in (("random graphs", graphs.random_graphs(train, forests.bytes)), ("distilled forests", forests)):
        with run.scope(what):
            model = GNN("gin", train.node_classes, train.classes, width=32, layers=mirage.EMBEDDED.layers)
            graphs.train(model, data, graphs.Config(steps=150, batch=32, lr=5e-3), run)
        auc = graphs.scores(model, test)["auc"]
        rows.append((f"AUC after training on {data.bytes:,} bytes of {what}", f"{auc:.3f}"))
    return rows


def _fedx(run: Any, fedx: Any) -> Rows:
    from stillhouse.data.digits import digits
    from stillhouse.data.partition import dirichlet_partition
    from stillhouse.evaluate.probes import extract, linear_probe
    from stillhouse.models.convnets import ConvEncoder

    train, test = digits(8, "train"), digits(8, "test")
    clients: Any = [train.select(part).without("label") for part in dirichlet_partition(train.label, 3, 0.3, seed=0)]
    config = replace(fedx.EMBEDDED, rounds=2, epochs=1)
    model = fedx.distill(lambda: ConvEncoder(feature_dim=64, width=32), clients, None, config, run)
    rows = []
    for what, encoder in (("an untrained encoder", ConvEncoder(feature_dim=64, width=32)),
                          ("the encoder after 2 rounds of 3 clients", model.encoder)):
        h, h_test = extract(encoder, train, device=run.device), extract(encoder, test, device=run.device)
        rows.append((f"linear probe of {what}", f"{linear_probe(h, train.label, h_test, test.label):.1%}"))
    return rows


def _ddfa(run: Any, ddfa: Any) -> Rows:
    from stillhouse.data.clusters import kmeans
    from stillhouse.evaluate.clustering import clustering_accuracy
    from stillhouse.models.convnets import MLP

    g = ddfa.ground(run.seed)
    found = ddfa.distill(MLP(64, 8, hidden=(64,)), g.train.without("label"), g.validation.without("label"),
                         replace(ddfa.EMBEDDED, epochs=10), run)
    cell, _ = kmeans(g.test.image.flatten(1), 5, 5, 100, run.seed)
    return [(f"accuracy of {what} against the hidden classes", f"{clustering_accuracy(y, g.test.label):.1%}")
            for what, y in (("k-means", cell), ("the classes found", found.predict(g.test.image)))]


def _real_nvp(run: Any, nvp: Any) -> Rows:
    import torch

    from stillhouse.data.densities import gauss2d, ring
    from stillhouse.diffusion.process import Flow
    from stillhouse.evaluate.density import divergence_to_truth
    from stillhouse.models.flows import point_flow
    from stillhouse.zoo.denoisers import gauss2d_teacher

    centres = ring(8)
    data: Any = gauss2d(20_000, centres, 0.2, seed=run.seed)
    true = gauss2d(5000, centres, 0.2, seed=run.seed + 1).x
    truth = gauss2d_teacher(Flow(), centres, 0.2).log_density(true, torch.zeros(len(true)))
    flow = nvp.distill(point_flow(2), data, replace(nvp.POINTS, steps=500), run)
    with torch.no_grad():
        run.picture("density", nvp.density_map(flow))
        return [("nats from the true density", f"{divergence_to_truth(truth, flow.log_prob(true)):.2f}"),
                ("largest error of a round trip to the latents", f"{nvp.returned(flow, true):.0e}")]


def _vsd(run: Any, vsd: Any) -> Rows:
    import torch

    from stillhouse.data.densities import ring
    from stillhouse.data.sets import TensorSet
    from stillhouse.diffusion.process import VPCosine
    from stillhouse.evaluate.distances import modes_hit
    from stillhouse.models.scenes import SceneSet
    from stillhouse.zoo.denoisers import gauss2d_teacher

    teacher = gauss2d_teacher(VPCosine(), labels=torch.arange(8) % 2, background=0.15)
    prompt: Any = TensorSet(condition=torch.zeros(1, dtype=torch.long))
    rows = []
    for what, fake in (("SDS", "noise"), ("VSD with the exact score of the particles", "exact")):
        with run.scope(what):
            run.begin()
            config = replace(vsd.EMBEDDED, steps=500, fake=fake)
            x = vsd.distill(teacher, SceneSet("points", 128), prompt, None, config, run).scenes.theta.detach()
            rows.append((f"modes of the prompt that {what} covers, of 4", f"{modes_hit(x, ring(8)[::2], 0.45):.0f}"))
    return rows


def _dphubert(run: Any, dphubert: Any) -> Rows:
    import copy

    from stillhouse.data.tones import crops, tones
    from stillhouse.evaluate.cost import parameters
    from stillhouse.zoo.speech import RECIPE, tones_teacher

    teacher = tones_teacher({**RECIPE, "steps": 150, "clips": 400})
    data = crops(tones(300, seed=run.seed), 2000, seed=run.seed).without("word", "speaker")
    student = dphubert.distill(teacher, copy.deepcopy(teacher), data, replace(dphubert.EMBEDDED, steps=200), run)
    return [("parameters of the speech encoder", f"{parameters(teacher):,}"),
            ("parameters after pruning while distilling", f"{parameters(student):,}")]


STOPS: dict[str, Callable[[Any, Any], Rows]] = {
    "distillm": _distillm, "dphubert": _dphubert, "dmd2": _dmd2, "progressive-distillation": _progressive,
    "prolificdreamer-vsd": _vsd, "mtt": _mtt, "mirage": _mirage, "lls-ddfa": _ddfa, "real-nvp": _real_nvp,
    "fedx": _fedx,
}
"""A stop or two in every family; the main job stands for compression."""
