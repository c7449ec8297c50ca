"""The named errors. Each message says what was given, what was expected and what to do."""


class StillError(Exception):
    """Base of every error that Stillhouse raises on purpose; the command line prints it as one paragraph."""


class UnknownNameError(StillError, KeyError):
    """A system, preset, zoo entry or option that does not exist."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingExtraError(StillError, ImportError):
    """A system needs an optional dependency that is not installed."""


class RoleError(StillError, ValueError):
    """A model or data set does not offer what its role needs."""


class DataError(StillError, ValueError):
    """Data that is empty, not finite, unreadable or of the wrong shape."""


class ConfigError(StillError, ValueError):
    """A setting outside its range."""


class ResumeError(StillError, RuntimeError):
    """A run cannot be continued: another config, teacher, data or seed, or no usable checkpoint."""


class StoreError(StillError, OSError):
    """A file could not be written or read: no space, no permission, damaged."""


class DamagedFileError(StoreError):
    """A stored file is not what was written: cut off, altered, or not one of ours."""


class NonFiniteError(StillError, ArithmeticError):
    """A loss term became infinite or NaN."""


class StageError(StillError, RuntimeError):
    """`run.loop`, `run.once` or `run.finish` was used in a way that could not be resumed."""


class EndpointError(StillError, RuntimeError):
    """An endpoint cannot be reached, refuses, answers with something else than was asked for, or the budget is used up.
    What it had answered is kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the step was finished and the state saved."""


def require(condition: bool, message: str, error: type[StillError] = ConfigError) -> None:
    """Raise `error(message)` unless `condition` holds."""
    if not condition:
        raise error(message)
