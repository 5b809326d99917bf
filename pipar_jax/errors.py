"""The errors that pipar_jax raises, under one root.

A message is one complete line: what happened, where (host, stage, micro-batch, field), the expected
and the actual value, and a remedy. Binaries print it without a traceback.
"""


class PiparError(Exception):
    """Root of the errors that pipar_jax raises.

    Attributes:
      of_user: Whether the user's own code failed; the traceback of the error's cause is then
        logged.
      again: Whether joining again may help: the coordinator was lost, or will take the host later.
      taken: Whether the coordinator had admitted the host before.
    """

    of_user: bool = False
    again: bool = False
    taken: bool = False


class ConfigError(PiparError):
    """A field of the configuration is not valid."""


class DataError(PiparError):
    """A data set or a shard cannot be read or does not match the model."""


class PlanError(PiparError):
    """A plan, an action's text or a schedule is malformed."""


class ScheduleError(PlanError):
    """A schedule cannot finish: it deadlocks or waits for an action that no host performs."""


class JoinError(PiparError):
    """A host could not join a run: unreachable, refused, or with a different configuration."""


class PeerError(PiparError):
    """A peer was lost, missed its deadline or reported a failure."""


class ProtocolError(PeerError):
    """A peer violated the protocol or sent data that the plan does not allow."""


class RunError(PiparError):
    """A run failed on this host, not because of a peer."""


class DiskError(RunError):
    """A file or folder cannot be written: a full disk, a quota, a missing permission."""


class Interrupted(PiparError):
    """A run was asked to end, and ended after a round with a checkpoint: it can be resumed."""
