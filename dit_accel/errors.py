"""Every error the package raises on purpose, so that a caller can catch one base class."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DitAccelError(Exception):
    """Base class of all errors raised by dit_accel."""


class ConfigError(DitAccelError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class UnsupportedError(DitAccelError, TypeError):
    """The object handed over cannot be accelerated; the message lists why."""


class AlreadyAcceleratedError(DitAccelError, RuntimeError):
    """The transformer already carries a live acceleration."""


class PlanError(DitAccelError, ValueError):
    """A plan contradicts itself or the tensors it is run on."""


class NotSeenError(DitAccelError, LookupError):
    """What is asked of a run has not happened in it; the message says what has."""


class NonFiniteError(DitAccelError, ArithmeticError):
    """A latent became NaN or infinite; the message names the step."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Say ' Did you mean X?' for the closest option, or list them all when none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(options)}." if options else ""
