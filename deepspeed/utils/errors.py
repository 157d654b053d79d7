"""The exceptions this package raises on purpose.

Every layer raises these and none catches them. One message has four parts: the thing as the user spelled it, its
value, the rule it breaks, and the way out; the rank where ranks can differ.

The original raises ValueError in some places and AssertionError in others for what a user can cause, and user code
catches either, so ours are both.
"""


class DeepSpeedError(ValueError, AssertionError):
    """Something a user can cause and mend. Base of every error this package raises on purpose."""


class DeepSpeedConfigError(DeepSpeedError):
    """A configuration that contradicts itself, the machine or the model."""


class ShardError(DeepSpeedError, RuntimeError):
    """A sharded tensor was used where only a full one makes sense."""


class RankMismatchError(DeepSpeedError, RuntimeError):
    """Ranks that must agree (configuration, model, data shapes, order of collectives) do not."""


class TrainingStateError(DeepSpeedError, RuntimeError):
    """A call out of order: `step` before `backward`, an engine used after `destroy`, ..."""


class NotAvailableError(DeepSpeedError, NotImplementedError):
    """A documented feature that this version validates but does not have yet."""


class LaunchError(DeepSpeedError, RuntimeError):
    """A job cannot be started: a program is not installed, a host cannot be reached."""


class ElasticityError(DeepSpeedConfigError):
    """Elastic batch sizes cannot be computed."""


class ElasticityConfigError(ElasticityError):
    """The `elasticity` section is missing, off, or contradicts itself."""


class ElasticityIncompatibleWorldSize(ElasticityError):  # noqa: N818 - the public name
    """No batch of the elastic configuration fits this many GPUs."""


class TierError(DeepSpeedError, OSError):
    """Bytes could not be moved to or from where they rest: disk full, folder gone, file short or damaged."""


class CheckpointError(DeepSpeedError, RuntimeError):
    """A checkpoint that cannot be written, read or trusted, or does not fit the model it is loaded into."""


class DamagedError(CheckpointError):
    """A block of a checkpoint's file whose bytes are not those that were written; others of the file may be whole."""
