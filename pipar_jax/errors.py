"""The errors that pipar_jax raises, under one root.

Every message is one complete line: what went wrong, where (host, stage, micro-batch, field), what
was expected, what was found and what to do. Binaries print it and leave the traceback out.
"""


class PiparError(Exception):
    """Root of the errors that pipar_jax raises.

    Attributes:
      of_user: Whether code that the user gave failed; its traceback is worth keeping then, and is
        that of the error's cause.
      again: Whether joining again may help: the coordinator was lost, or will take the host later.
      taken: Whether the coordinator had admitted the host before.
    """

    of_user: bool = False
    again: bool = False
    taken: bool = False


class ConfigError(PiparError):
    """A field of the configuration has a value that cannot work."""


class DataError(PiparError):
    """A data set or a shard cannot be read or does not fit the model."""


class PlanError(PiparError):
    """A plan, an action's text or a schedule is malformed."""


class ScheduleError(PlanError):
    """A schedule cannot finish: it deadlocks or waits for an action that nobody performs."""


class JoinError(PiparError):
    """A host could not join a run: unreachable, refused, or different from the coordinator."""


class PeerError(PiparError):
    """A peer was lost, missed its deadline or reported a failure of its own."""


class ProtocolError(PeerError):
    """A peer sent what the protocol, the plan or its place in the run does not allow."""


class RunError(PiparError):
    """A run failed on this host for a reason that is not a peer's."""


class DiskError(RunError):
    """A file or a folder cannot be written: a full disk, a quota, a missing right."""
