"""Every error that this package raises on purpose.

    CircuitBreakersError
    ├── ArtifactError (ValueError)            a broken, altered or unknown breaker artifact
    ├── BreakerMismatchError (ValueError)     a sound artifact for another model or engine
    ├── ModelError (ValueError)               a model cannot be found, converted or read
    ├── DataError (ValueError)                a training data file has a bad line
    ├── CalibrationError (ValueError)         too little data for the claimed false-positive rate
    ├── EvaluationError (RuntimeError)        a suite failed, or could not be judged in full
    ├── ConfigError (ValueError)              a setting out of range or without effect
    ├── AuditError (RuntimeError)             the audit log's database does not answer
    ├── PolicyRequestError (ValueError)       a request asks for a policy that it may not have
    ├── UnsupportedEngineError (RuntimeError) vLLM's version or mode is outside the tested range
    ├── NotReadyError (RuntimeError)          the guard could not be proven live
    ├── RemoteServerError (RuntimeError)      a server that was asked does not answer as it should
    └── UnguardedOutputError (RuntimeError)   the engine gave out a token that was not passed

A message says what was got, what was expected, and the cure. A trip is a decision, not an error.
"""

__all__ = [
    "ArtifactError",
    "AuditError",
    "BreakerMismatchError",
    "CalibrationError",
    "CircuitBreakersError",
    "ConfigError",
    "DataError",
    "EvaluationError",
    "ModelError",
    "NotReadyError",
    "PolicyRequestError",
    "RemoteServerError",
    "UnguardedOutputError",
    "UnsupportedEngineError",
]


class CircuitBreakersError(Exception):
    """Base of all errors of this package."""


class ArtifactError(CircuitBreakersError, ValueError):
    """A breaker artifact is broken, altered or of another version."""


class BreakerMismatchError(CircuitBreakersError, ValueError):
    """A sound artifact that does not fit the model or the engine it is loaded into."""


class ModelError(CircuitBreakersError, ValueError):
    """A model cannot be found, converted or read."""


class DataError(CircuitBreakersError, ValueError):
    """A data file has a bad line; the message names file and line."""


class CalibrationError(CircuitBreakersError, ValueError):
    """The calibration data cannot support the claimed false-positive rate."""


class EvaluationError(CircuitBreakersError, RuntimeError):
    """A suite failed, or some of its texts could not be judged."""


class ConfigError(CircuitBreakersError, ValueError):
    """A setting is out of range or cannot take effect."""


class AuditError(CircuitBreakersError, RuntimeError):
    """The database of the audit log does not answer, or refuses what it was given."""


class PolicyRequestError(CircuitBreakersError, ValueError):
    """A request asks for a policy that is not there, or that would loosen its own."""


class UnsupportedEngineError(CircuitBreakersError, RuntimeError):
    """The vLLM version or engine mode is outside the tested range."""


class NotReadyError(CircuitBreakersError, RuntimeError):
    """The guard could not be proven live."""


class RemoteServerError(CircuitBreakersError, RuntimeError):
    """A server that was asked does not answer, or not as it should."""


class UnguardedOutputError(CircuitBreakersError, RuntimeError):
    """The engine gave out a token that the guard has not passed; the request is aborted."""
