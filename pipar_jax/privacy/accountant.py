"""What Gaussian releases cost together, and the noise that a budget asks for. No jax.

Everything here is about the relation *replace one record* (or one user): the number of records is
public. A Gaussian release of a vector with norm at most C and noise of standard deviation zC has
sensitivity 2C under that relation, so its multiplier is z/2. Releases of multipliers m_1, m_2, … of
the same record compose to a single one with mu = sqrt(sum 1/m_i**2) (Dong, Roth and Su, Gaussian
Differential Privacy, arXiv 1905.02383, corollary 3.3), adaptive releases included. ``spent`` is
mu**2 everywhere. No amplification by sampling is claimed: devices shuffle.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

from pipar_jax.errors import ConfigError

#: Orders of Renyi divergence among which the best is taken; those of the library's default.
_ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
#: Bisections: more than a float64 has bits.
_HALVINGS = 200


def release_cost(noise: float) -> float:
    """Returns what one Gaussian release adds to ``spent``: 1 / (noise / 2)**2.

    Args:
      noise: Standard deviation of the noise, divided by the clipping norm.
    """
    return 4.0 / noise**2


def gaussian_delta(spent: float, epsilon: float) -> float:
    """Returns the smallest delta of Gaussian releases for an epsilon (Balle and Wang, 2018).

    Args:
      spent: mu**2 of the releases.
      epsilon: The epsilon.
    """
    if spent <= 0:
        return 0.0
    from scipy.special import log_ndtr

    mu = math.sqrt(spent)
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    # second < first, so that the difference of the exponentials is positive.
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


def gaussian_epsilon(spent: float, delta: float) -> float:
    """Returns the smallest epsilon of Gaussian releases for a delta: the exact one."""
    if spent <= 0:
        return 0.0
    mu = math.sqrt(spent)
    # The tail of the privacy loss alone gives an upper bound: P(loss > epsilon) <= delta.
    high = spent / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    if gaussian_delta(spent, 0.0) <= delta:
        return 0.0
    return _bisect(lambda epsilon: gaussian_delta(spent, epsilon) <= delta, 0.0, high)


def renyi_epsilon(spent: float, delta: float) -> float:
    """Returns the epsilon of Gaussian releases by way of Renyi divergences: never below the exact.

    The divergence of order a is a * spent / 2 (Mironov, arXiv 1702.07476); the conversion is
    that of Canonne, Kamath and Steinke (arXiv 2004.00010), proposition 12.
    """
    if spent <= 0:
        return 0.0
    return max(
        0.0,
        min(
            a * spent / 2 + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
            for a in map(float, _ORDERS)
        ),
    )


def loss_distribution_epsilon(spent: float, delta: float) -> float:
    """Returns the epsilon that the library dp-accounting finds from the privacy loss distribution.

    Raises:
      ConfigError: The library is not installed.
    """
    check_accountant("pld")
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    if spent <= 0:
        return 0.0
    # The event has the multiplier against a sensitivity of 1, and the accountant's relation is
    # add-or-remove: with replace-one it would double the sensitivity once more.
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(1 / math.sqrt(spent)))
    return float(accountant.get_epsilon(delta))


#: Ways to turn ``spent`` and a delta into an epsilon.
ACCOUNTANTS: dict[str, Callable[[float, float], float]] = {
    "exact": gaussian_epsilon,
    "rdp": renyi_epsilon,
    "pld": loss_distribution_epsilon,
}


def check_accountant(name: str) -> None:
    """Checks that what an accountant needs is installed.

    Raises:
      ConfigError: It is not.
    """
    if name == "pld" and importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            "privacy.accountant=pld needs the library dp-accounting, which is not installed: "
            "install pipar-jax[privacy], or use privacy.accountant=exact, which is no looser"
        )


def spent_for(epsilon: float, delta: float, accountant: str = "exact") -> float:
    """Returns the largest ``spent`` of Gaussian releases that keeps within a budget.

    It is found with the closed form, or for ``rdp`` its own: the library takes seconds a question,
    and differs from the closed form by its rounding alone, for which it is asked in the end.

    Args:
      epsilon: The budget.
      delta: Its delta.
      accountant: Name of the accountant.
    """
    spends = renyi_epsilon if accountant == "rdp" else gaussian_epsilon
    high = 1.0
    while spends(high, delta) <= epsilon:
        high *= 2
    spent = _bisect(lambda spent: spends(spent, delta) > epsilon, 0.0, high, upper=False)
    while accountant == "pld" and loss_distribution_epsilon(spent, delta) > epsilon:
        spent *= 1 - 1e-5
    return spent


def noise_for(epsilon: float, delta: float, releases: int, accountant: str = "exact") -> float:
    """Returns the least noise multiplier with which releases of a record keep within a budget.

    Args:
      epsilon: The budget of the Gaussian releases.
      delta: Its delta.
      releases: Number of releases of the same record.
      accountant: Name of the accountant.
    """
    noise = 2.0 * math.sqrt(releases / spent_for(epsilon, delta, accountant))
    return noise * (1 + 1e-9)  # so that no rounding of the sum exceeds the budget


def keep_probability(epsilon: float, classes: int) -> float:
    """Returns with which probability randomised response of some classes keeps a label.

    Any other label is given with probability (1 - keep) / (classes - 1); the ratio of the two is
    exp(epsilon), which makes it epsilon-differentially private for the label (Warner, 1965).
    """
    # 1 / (1 + (k - 1) exp(-epsilon)) does not overflow.
    return 1.0 / (1.0 + (classes - 1) * math.exp(-epsilon))


def noise_beside_quantile(noise: float, quantile_noise: float) -> float:
    """Returns the noise multiplier of updates that leaves room for a noisy quantile.

    An adaptive clip asks each user for a bit, whose sum gets noise of standard deviation
    ``quantile_noise``; the pair costs as much as one release with ``noise`` (Andrew et al.,
    arXiv 1905.03871, theorem 1). It holds for the replacement of a user as it does for its
    absence: both sensitivities double.

    Raises:
      ConfigError: The bit alone costs more than the budget.
    """
    rest = noise**-2 - (2 * quantile_noise) ** -2
    if rest <= 0:
        raise ConfigError(
            f"privacy.count_noise={quantile_noise:g} makes the count of clipped updates cost more "
            f"than updates with a noise multiplier of {noise:g} may: set it above {noise / 2:g}, "
            f"such as {5 * noise:g}"
        )
    return float(rest**-0.5)


def _bisect(
    holds: Callable[[float], bool], low: float, high: float, *, upper: bool = True
) -> float:
    """Returns where a condition that is false at ``low`` and true at ``high`` begins to hold.

    Args:
      holds: The condition.
      low: A number at which it is false.
      high: A number at which it is true.
      upper: Whether the number returned is one at which it holds, or does not.
    """
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if holds(middle):
            high = middle
        else:
            low = middle
    return high if upper else low
