"""How much of a device's inputs others can tell: measures of images and of dependence. No jax."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from comms.arrays import Array

#: Of the structural similarity: the side of a window, and the constants of its authors.
WINDOW, K1, K2 = 7, 0.01, 0.03
#: Fewer samples have no bias-corrected distance correlation.
FEWEST_SAMPLES = 4


def squared_error(images: Array, others: Array) -> NDArray[np.float64]:
    """Returns each image's mean squared error.

    Args:
      images: [images, height, width, channels].
      others: The same shape.

    Returns:
      [images].
    """
    difference = images.astype(np.float64) - others
    return np.asarray(np.square(difference).reshape(len(images), -1).mean(axis=1))


def structural_similarity(images: Array, others: Array) -> NDArray[np.float64]:
    """Returns each image's structural similarity (SSIM) to another one.

    Wang, Bovik, Sheikh and Simoncelli (2004), with uniform windows of 7 x 7 pixels, or as large as
    the image, and the sample's variance in each; the mean over windows and channels.

    Args:
      images: [images, height, width, channels], of values from 0 to 1.
      others: The same shape.

    Returns:
      [images]: 1 for equal images, about 0 for unrelated ones.
    """
    first, second = images.astype(np.float64), others.astype(np.float64)
    height, width = min(WINDOW, images.shape[1]), min(WINDOW, images.shape[2])

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        windows = np.lib.stride_tricks.sliding_window_view(values, (height, width), axis=(1, 2))
        return np.asarray(windows.mean(axis=(-2, -1)))

    pixels = height * width
    sample = pixels / max(pixels - 1, 1)
    a, b = mean(first), mean(second)
    variances = sample * (mean(first**2) - a**2 + mean(second**2) - b**2)
    covariance = sample * (mean(first * second) - a * b)
    c1, c2 = K1**2, K2**2
    index = (2 * a * b + c1) * (2 * covariance + c2) / ((a**2 + b**2 + c1) * (variances + c2))
    return np.asarray(index.mean(axis=(1, 2, 3)))


def distance_correlation(x: Array, y: Array) -> float:
    """Returns the bias-corrected squared distance correlation of two samples of arrays.

    Szekely and Rizzo (2013). Plain distance correlation tends to 1 for arrays of many numbers, even
    if they are independent; the expectation of this one is then about 0, and it may be negative.

    Args:
      x: [samples, …].
      y: [samples, …], the same number of samples.

    Returns:
      At most 1; 0 if all samples of one are equal.

    Raises:
      ValueError: There are fewer than four samples.
    """
    if len(x) < FEWEST_SAMPLES:
        raise ValueError(f"distance correlation needs {FEWEST_SAMPLES} samples, not {len(x)}")
    a, b = _centred(x), _centred(y)
    size = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return float(np.sum(a * b)) / size if size else 0.0


def _centred(x: Array) -> NDArray[np.float64]:
    """Returns the U-centred distances between samples, [samples, samples]."""
    flat = x.astype(np.float64).reshape(len(x), -1)
    squares = np.sum(flat * flat, axis=1)
    squared = squares[:, None] + squares - 2 * flat @ flat.T
    # What rounding leaves of the distance between equal samples.
    tiny = 1e-12 * max(float(squares.max()), np.finfo(np.float64).tiny)
    distances = np.sqrt(np.where(squared > tiny, squared, 0.0))
    np.fill_diagonal(distances, 0.0)
    count = len(flat)
    rows = distances.sum(axis=1) / (count - 2)
    made = distances - rows[:, None] - rows + distances.sum() / ((count - 1) * (count - 2))
    np.fill_diagonal(made, 0.0)
    return np.asarray(made)
