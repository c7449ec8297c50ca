"""The contract of every built system on a GPU, where there is one."""

import importlib
import os

import pytest
import torch

from stillhouse import catalog
from stillhouse.catalog import EXTRAS
from stillhouse.testing import check_system

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
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
    check_system(importlib.import_module(catalog.find(slug).module).distill, device="cuda")
