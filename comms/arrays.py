"""Names for the arrays that travel: of any element type, and of bytes."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

DType: TypeAlias = np.dtype[Any]
"""An element type, one that only ml_dtypes has among them."""
Array: TypeAlias = npt.NDArray[Any]
"""An array of any shape and element type."""
Bytes: TypeAlias = npt.NDArray[np.uint8]
"""[n] uint8."""
