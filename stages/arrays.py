"""Names for numpy arrays, of which ``stages`` has few: data, and outputs that were fetched."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy.typing as npt

HostArray: TypeAlias = npt.NDArray[Any]
"""An array of any shape and element type."""
