"""Standard streams that a process can print to whatever becomes of them.

A stream that was closed at the start of the process is opened on /dev/null. One whose reader ends
later, as ``head`` does, is continued there: what a process does besides printing is not lost for
it, nor is the other stream.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

#: The standard streams that are written, by descriptor, as errors name them.
OUTPUTS = {1: "standard output", 2: "standard error"}
#: Remedy if one of them cannot be written.
OUTPUT_REMEDY = "send it to another file"


def open_streams() -> None:
    """Gives this process standard streams that last. Idempotent.

    Without a standard stream the next file or socket would get its descriptor and receive
    everything that is printed. Python represents such a stream by None, which code that prints does
    not expect.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor: this one
            assert opened == number
            os.set_inheritable(number, True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = _lasting(1, sys.stdout or os.fdopen(1, "w", closefd=False))
    sys.stderr = _lasting(2, sys.stderr or os.fdopen(2, "w", closefd=False))


class _Outlet(io.FileIO):
    """The descriptor of a standard stream, which outlives its reader."""

    def write(self, data: Any, /) -> int:
        """Writes bytes; without a reader they, and all that follow, go to /dev/null.

        Raises:
          OSError: The system reported another error, such as a full disk; it names the stream.
        """
        number = self.fileno()
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            return memoryview(data).nbytes
        except OSError as error:
            error.filename = OUTPUTS[number]
            raise


def _lasting(number: int, stream: TextIO) -> TextIO:
    """Returns a standard stream on an ``_Outlet``; one that is not on its descriptor as it is."""
    if not isinstance(stream, io.TextIOWrapper):  # somebody captures what is printed
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO) or isinstance(raw, _Outlet) or raw.fileno() != number:
        return stream
    stream.flush()
    outlet = _Outlet(number, "w", closefd=False)
    unbuffered = stream.buffer is raw  # python -u
    buffer: Any = outlet if unbuffered else io.BufferedWriter(outlet)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )
