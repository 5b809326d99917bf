from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipar_jax.errors import PeerError
from pipar_jax.roles import worker as workers
from pipar_jax.roles.peer_links import PeerLinks
from tests.pipar_jax.roles import fakes


@pytest.fixture
def alone(monkeypatch):
    """Workers without threads or sockets; gives their endpoint."""
    endpoint = SimpleNamespace(post=lambda call: call())
    monkeypatch.setattr(workers, "Endpoint", lambda *args, **kwargs: endpoint)
    monkeypatch.setattr(workers, "Host", fakes.Host)
    monkeypatch.setattr(workers, "Prefetcher", lambda loader: None)
    monkeypatch.setattr("pipar_jax.roles.survey_respondent.measure_host", _measured)
    monkeypatch.setattr("pipar_jax.roles.survey_respondent.measure_reference", _measured)
    monkeypatch.setattr(PeerLinks, "_dial", lambda *args: None)
    return endpoint


def _measured(*args):
    raise PeerError("device 0 was not to be measured here, and the server asked")
