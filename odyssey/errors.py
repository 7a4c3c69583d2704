"""Errors that a user can act on, each with the outcome it gives a cell."""

from __future__ import annotations


class OdysseyError(Exception):
    """An expected failure: its message is one line that names the key or file and what to do."""

    outcome = "failed"


class ConfigError(OdysseyError):
    """A key, value or combination of settings that cannot be run; found before any work starts."""

    outcome = "invalid-config"


class MissingModelError(OdysseyError):
    """No such directory or hub repository, or the hub cannot be reached."""

    outcome = "missing-model"


class GatedModelError(OdysseyError):
    """The hub refuses the weights without an accepted licence and a token."""

    outcome = "gated"


class InvalidCheckpointError(OdysseyError):
    """A checkpoint that is there and cannot be used: truncated, incomplete, NaN weights."""

    outcome = "invalid-checkpoint"


class UnsupportedError(OdysseyError):
    """A model architecture, GPU or setting that this implementation does not handle."""

    outcome = "unsupported"


class MissingDataError(OdysseyError):
    """Calibration or evaluation data that is neither local nor on a reachable hub."""

    outcome = "missing-data"
