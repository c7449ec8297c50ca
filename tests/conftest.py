"""Shapes stated in annotations of the measures and of the diffusion floor are checked at run time in tests."""

import os

import pytest
from jaxtyping import config, install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
install_import_hook(["stillhouse.measures", "stillhouse.diffusion"], "shapes.checked")


@pytest.fixture(autouse=True)
def _unchecked_where_marked(request, monkeypatch):
    """Tests of our own messages for wrong shapes are marked `unchecked`."""
    if request.node.get_closest_marker("unchecked"):
        monkeypatch.setattr(config, "jaxtyping_disable", True)
