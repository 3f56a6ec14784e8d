"""The errors that gyrokv raises. Each is also the builtin error that a caller would expect."""

from __future__ import annotations


class GyroKVError(Exception):
    """Root of the errors defined here. Plain bad arguments raise ValueError or TypeError."""


class FormatError(GyroKVError, ValueError):
    """An unknown format, a row that contradicts itself, or a head size that a format cannot hold."""


class CapacityError(GyroKVError, ValueError):
    """More tokens than a cache may hold, or positions that it no longer holds. The cache is unchanged."""


class CacheFileError(GyroKVError, ValueError):
    """A file that is not a saved cache, is damaged, or was written with another definition of a format."""


class Unsupported(GyroKVError, NotImplementedError):
    """No backend can run a problem; the message lists every backend with every reason (see ``dispatch.explain``)."""


class FallbackError(GyroKVError, RuntimeError):
    """In strict mode: something outside gyrokv asked for the dense values of a packed cache."""


class EvaluationError(GyroKVError, ValueError):
    """A measurement that would mean nothing: too little text, NaN, a cache that was not read, nothing quantised."""
