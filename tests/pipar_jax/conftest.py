from __future__ import annotations

import jax
import pytest


@pytest.fixture
def double():
    """64-bit numbers for one test: a run sets them for good, as it has a process of its own."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
