"""What tests of the runtime share."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture
def compiled():
    """Functions that were compiled so far, by name."""
    names: list[str] = []

    def listen(event, seconds, **facts):
        if event.endswith("backend_compile_duration"):
            names.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
