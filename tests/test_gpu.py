"""The contract of every built system on a GPU, where there is one."""

import importlib
import os

import pytest
import torch

from stillhouse import catalog
from stillhouse.catalog import EXTRAS
from stillhouse.protocols import modules_of
from stillhouse.run import Run
from stillhouse.testing import check_system

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
INEXACT = {"prolificdreamer-vsd": "reading a grid in three dimensions has no deterministic gradient on a GPU"}
BUILT = [s.slug for s in catalog.systems().values() if s.built]


@pytest.fixture(autouse=True)
def deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("slug", BUILT)
def test_a_system_keeps_the_contract_on_a_gpu(slug):
    for extra in catalog.find(slug).extras:
        for name in EXTRAS[extra]:
            pytest.importorskip(name)
    module = importlib.import_module(catalog.find(slug).module)
    if slug not in INEXACT:
        check_system(module.distill, device="cuda")
        return
    given = module.tiny()
    for part in modules_of(given):
        part.to("cuda")
    target = module.distill(**given, run=Run(quiet=True, device="cuda"))
    assert all(value.isfinite().all() for value in target.state_dict().values() if value.is_floating_point())
