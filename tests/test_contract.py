"""Every built system keeps the contract."""

import importlib

import pytest

from stillhouse import catalog
from stillhouse.catalog import EXTRAS
from stillhouse.protocols import ROLES
from stillhouse.testing import check_system

BUILT = [s.slug for s in catalog.systems().values() if s.built]


@pytest.fixture(params=BUILT)
def module(request):
    for extra in catalog.find(request.param).extras:
        for name in EXTRAS[extra]:
            pytest.importorskip(name)
    return importlib.import_module(catalog.find(request.param).module)


def test_a_system_keeps_the_contract(module):
    check_system(module.distill)


def test_a_system_says_what_it_is(module):
    system = next(s for s in catalog.systems().values() if s.module == module.__name__)
    assert system.number == module.NUMBER
    assert module.__doc__ and module.CLAIMS and module.Config() and isinstance(module.EMBEDDED, module.Config)
    import inspect

    names = list(inspect.signature(module.distill).parameters)
    assert names[-2:] == ["config", "run"] and set(names[:-2]) <= set(ROLES)
    assert len({c.sentence for c in module.CLAIMS}) == len(module.CLAIMS)
