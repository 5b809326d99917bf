from __future__ import annotations

import pytest

from pipar_jax.errors import PeerError
from pipar_jax.roles import worker as workers
from pipar_jax.roles.peer_links import PeerLinks
from tests.pipar_jax.roles import fakes


@pytest.fixture
def alone(monkeypatch):
    """Workers without threads or sockets."""
    monkeypatch.setattr(workers, "Endpoint", lambda *args, **kwargs: None)
    monkeypatch.setattr(workers, "Host", fakes.Host)
    monkeypatch.setattr(workers, "Prefetcher", lambda loader: None)
    monkeypatch.setattr("pipar_jax.roles.survey.measure_host", _measured)
    monkeypatch.setattr("pipar_jax.roles.survey.measure_reference", _measured)
    monkeypatch.setattr(PeerLinks, "_dial", lambda *args: None)


def _measured(*args):
    raise PeerError("device 0 was not to be measured here, and the server asked")
