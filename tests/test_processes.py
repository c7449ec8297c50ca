import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness_processes.py")
CASES = ["mean_loss", "contrastive", "token_mean", "decisions", "interrupted", "leaves", "related", "token_exits"]
SYSTEMS = ["ssld", "dmd2", "mtt", "lls-ddfa", "quantized-distillation", "wcord", "prolificdreamer-vsd", "scan",
           "meal-v2", "distillweighted", "msdcrd", "sla", "bd-kd", "rad", "kd-data-pruning", "nonresidual-kd",
           "fantastic-gains", "unic", "guided-self-distillation", "mekd", "sd-label-noise", "mdcs", "born-again",
           "diswot", "progressive-distillation", "consistency-models", "real-nvp", "promptkd", "fedx", "mirage",
           "simclrv2", "distillm", "dphubert", "amd"]
GROUPS = 3
"""Several systems share a start of Python; ofa-kd and kd-survey are the cases token_exits and leaves."""


def apart(tmp_path, cases):
    done = subprocess.run([sys.executable, str(HARNESS), str(tmp_path), *cases], capture_output=True, text=True,
                          timeout=240, cwd=HARNESS.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(tmp_path, cases):
    """As a part of what another seed changes, in float64, but for losses and the like that are logged in float32."""
    for case, (one_two, ranks) in apart(tmp_path, cases).items():
        assert one_two < 1e-4, f"{case}: one process and two differ by {one_two} of what another seed changes"
        assert ranks == 0, f"{case}: the two processes hold different results"


def test_two_processes_give_what_one_gives(tmp_path):
    check(tmp_path, CASES)


@pytest.mark.parametrize("group", range(GROUPS))
def test_systems_give_with_two_processes_what_they_give_with_one(tmp_path, group):
    check(tmp_path, [f"system:{slug}" for slug in SYSTEMS[group::GROUPS]])
