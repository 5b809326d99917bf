"""Exceptions of the user's code, in one line with the line that raised them."""

from __future__ import annotations

import pathlib
import site
import sysconfig
import traceback

_HOME = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ("comms", "pipar_jax", "stages")


def describe(error: BaseException) -> str:
    """Returns an error's type and text in one line, and the user's line that raised it.

    Args:
      error: The exception, whose traceback begins in the frame that caught it.
    """
    text = " ".join(str(error).split())
    place = _place(error)
    return f"{type(error).__name__}{f': {text}' if text else ''}{f' ({place})' if place else ''}"


def _place(error: BaseException) -> str:
    """Returns file, line and function of the innermost frame of the user's own code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and not _is_ours(frame.filename)
    ]
    if not frames:
        return ""
    own = [frame for frame in frames if not _is_library(frame.filename)]
    frame = own[-1] if own else frames[0]  # the user's function may itself be installed
    inside = "" if frame.name == "<module>" else f", in {frame.name}"
    return f"{frame.filename}:{frame.lineno}{inside}"


def _is_ours(file: str) -> bool:
    path = pathlib.Path(file)
    return path.is_relative_to(_HOME) and path.relative_to(_HOME).parts[0] in _PACKAGES


def _is_library(file: str) -> bool:
    paths = sysconfig.get_paths()
    places = {paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]}
    places.update([*site.getsitepackages(), site.getusersitepackages()])
    return any(pathlib.Path(file).is_relative_to(place) for place in places)
