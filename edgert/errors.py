"""Every error that edgert raises on purpose.

    EdgertError
    ├── UsageError             an argument is wrong: names the thing, the value and the limit
    │   ├── SamplingError          a sampling parameter out of its range
    │   ├── EmptyPromptError       nothing to generate from
    │   └── ContextOverflowError   prompt (plus asked-for tokens) beyond the model's context
    ├── BundleError            a bundle is missing, damaged, or not to be trusted
    │   └── BundleVersionError     written by a newer edgert
    ├── ConversionError        a source model cannot become a bundle
    │   └── ParityError            the converted model computes something else than its source
    ├── MissingDependencyError an optional package is not installed or does not load
    ├── DeviceError            a device or device configuration cannot be used
    │   ├── UnknownDeviceError     no such device or configuration
    │   ├── CacheFullError         no room for more keys and values
    │   └── DeviceFailedError      the device failed while compiling or running
    │       ├── MissingBlobError       an NPU's submodel is not compiled yet
    │       ├── DeviceHungError        it did not answer in time
    │       └── DeviceNonsenseError    it gave NaN
    ├── PlanError              a plan does not fit the model it is meant for
    ├── QualityError           a limit on what a model may lose is not kept
    ├── ServiceError           the service cannot do it
    │   ├── UnknownModelError      no model of that name
    │   ├── BusyError              a queue is full: try again later
    │   ├── WorkerError            no worker can be brought to do it
    │   └── UnreachableError       no service answers, or it refuses this client
    └── ChatTemplateError      no chat template, or one that fails or oversteps its sandbox

Whoever embeds edgert catches `EdgertError`; the command line prints any of them as one line and exits with code 2,
or with 3 for a `QualityError`: nothing was wrong but the number.
"""

from __future__ import annotations


class EdgertError(Exception):
    """Root of the tree above."""


def cause(error: Exception) -> str:
    """What a message of OpenVINO comes down to: its last line that is not empty; source locations come before."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class UsageError(EdgertError, ValueError):
    """An argument is wrong; the message names it, its value and its limit."""


class SamplingError(UsageError):
    """A sampling parameter is outside its range."""


class EmptyPromptError(UsageError):
    """The prompt holds no token."""


class ContextOverflowError(UsageError):
    """More tokens than the model's context holds.

    Attributes:
        tokens: how many tokens were asked for.
        limit: how many the context holds.
    """

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class BundleError(EdgertError):
    """A bundle is missing, damaged, or not to be trusted."""


class BundleVersionError(BundleError):
    """The bundle's format is newer than this edgert."""


class ConversionError(EdgertError):
    """A source model cannot become a bundle."""


class ParityError(ConversionError):
    """The converted model computes something else than its source.

    Attributes:
        relative_error: the largest relative error that was found.
        limit: the largest one allowed.
    """

    def __init__(self, message: str, *, relative_error: float, limit: float) -> None:
        super().__init__(message)
        self.relative_error = relative_error
        self.limit = limit


class MissingDependencyError(EdgertError):
    """An optional package is not installed or does not load."""


class DeviceError(EdgertError):
    """A device or device configuration cannot be used."""


class UnknownDeviceError(DeviceError, ValueError):
    """No such device or configuration."""


class CacheFullError(DeviceError):
    """There is no room for more keys and values within the budget for them; nothing has run."""


class DeviceFailedError(DeviceError):
    """The device failed while compiling or running.

    Attributes:
        unit: the hardware it happened on, as in `DeviceConfig.unit`; None while the one who raises does not know.
    """

    unit: str | None = None


class MissingBlobError(DeviceFailedError):
    """A submodel for an NPU is not compiled yet, or for another compiler or driver."""


class DeviceHungError(DeviceFailedError):
    """The device did not answer in time."""


class DeviceNonsenseError(DeviceFailedError):
    """The device gave NaN."""


class PlanError(EdgertError):
    """A plan does not fit the model it is meant for."""


class QualityError(EdgertError):
    """A limit on what a model may lose against its reference is not kept.

    Attributes:
        value: what was found.
        limit: the largest value allowed.
    """

    def __init__(self, message: str, *, value: float, limit: float) -> None:
        super().__init__(message)
        self.value = value
        self.limit = limit


class ServiceError(EdgertError):
    """The service cannot do what it was asked."""


class UnknownModelError(ServiceError):
    """The service has no model of that name."""


class BusyError(ServiceError):
    """A queue is full.

    Attributes:
        retry_after_s: when it may be worth another try.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerError(ServiceError):
    """No worker can be brought to do it: each one that was started failed."""


class UnreachableError(ServiceError):
    """No service answers, or it does not let this client in."""


class ChatTemplateError(EdgertError):
    """No chat template, or one that fails or oversteps its sandbox."""
