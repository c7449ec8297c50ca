"""The run-time checker of annotations that conftest.py installs: an int passes for a float.

A Denoiser may be anything: from Python 3.12 on, isinstance of a protocol does not see the buffers of a module.
"""

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

from stillhouse.protocols import Denoiser

checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=BeartypeHintOverrides({Denoiser: object})))
