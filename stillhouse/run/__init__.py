"""The run: processes, stages, updates, checkpoints, resume, logging, progress, pictures."""

from stillhouse.run.core import DryRunEnded, Run, begin
from stillhouse.run.held import State
from stillhouse.run.objects import fingerprint, frozen
from stillhouse.run.schedules import set_lr

__all__ = ["DryRunEnded", "Run", "State", "begin", "fingerprint", "frozen", "set_lr"]
