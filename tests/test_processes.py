import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("harness_processes.py")
CASES = ["mean_loss", "contrastive", "token_mean", "decisions", "interrupted"]
SYSTEMS = ["system:ssld", "system:dmd2", "system:mtt", "system:lls-ddfa", "system:quantized-distillation",
           "system:wcord", "system:prolificdreamer-vsd", "system:scan", "system:meal-v2",
           "system:distillweighted",
           "system:msdcrd", "system:sla", "system:bd-kd", "system:rad", "system:kd-data-pruning",
           "system:nonresidual-kd", "token_exits",
           "system:fantastic-gains", "system:unic"]


def apart(tmp_path, cases):
    done = subprocess.run([sys.executable, str(HARNESS), str(tmp_path), *cases], capture_output=True, text=True,
                          timeout=240, cwd=HARNESS.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_give_what_one_gives(tmp_path):
    """Float32 sums in another order differ by about 1e-7; twenty steps with momentum keep that below 1e-5."""
    for case, (one_two, ranks) in apart(tmp_path, CASES).items():
        assert one_two < 1e-5, f"{case}: one process and two differ by {one_two}"
        assert ranks == 0, f"{case}: the two processes hold different results"


@pytest.mark.parametrize("case", SYSTEMS)
def test_systems_give_with_two_processes_what_they_give_with_one(tmp_path, case):
    ((one_two, ranks),) = apart(tmp_path, [case]).values()
    assert one_two < 1e-4 and ranks == 0
