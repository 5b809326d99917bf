"""What a codec cannot decode is refused where it arrives, and not where it is computed with."""

from __future__ import annotations

import random

import numpy as np
import pytest

from comms import codec_names, parse_codec
from comms.link.message import Message, Payload
from pipar_jax.schedule.plan import COORDINATOR
from tests.pipar_jax.roles import fakes
from tests.pipar_jax.roles.test_fuzz import acceptance, micro_batches

CASES, MANY = 150, 10_000
#: Every codec, and every mode of that whose payloads' sizes depend on the array.
CODECS = [
    *sorted({*codec_names()} - {"bits"}),
    "bits:1", "bits:8", "bits:6s17", "bits:abs0.01", "bits:rel1e-3", "bits:lossless",
]  # fmt: skip


def fuzz(host, peer, method, codec, cases, seed):
    rng = random.Random(f"{host} {codec} {seed}")
    chosen, parameter = parse_codec(codec)
    tensors = micro_batches(method, host, peer)[:2]
    tag, like = tensors[0]
    taken = refused = 0
    for _ in range(cases):
        receiver, link = acceptance(method, host, codec), fakes.Link(peer)
        if receiver.objection(peer, fakes.tensor(link, *tensors[1])) is not None:
            receiver = acceptance(method, host, codec)  # labels stay at home
        array = np.array([rng.choice((0.0, 0.0, 1.5, -2.0)) for _ in range(like.size)], like.dtype)
        data = np.array(chosen.encode(array.reshape(like.shape), parameter), copy=True)
        if rng.random() < 0.9:
            data = fakes.spoiled(rng, data, fixed=chosen.exact_size)
        payload = Payload(data, chosen, parameter, like.dtype, like.shape)
        message = Message("tensor", link, tag=tag, payloads={"": payload}, nbytes=data.size)
        reason = receiver.objection(peer, message)
        if reason is None:
            assert message.array.shape == like.shape and message.array.dtype == like.dtype
            taken += 1
        else:
            assert "\n" not in reason and "cannot be read" in reason
            refused += 1
    assert taken > cases / 20
    assert bool(refused) is not chosen.exact_size  # other sizes are refused by the channel


WAYS = [(COORDINATOR, "d0", "pipar"), ("n1", "d0", "mpsl"), ("d0", "n1", "mpsl")]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("host", "peer", "method"), WAYS)
def test_bytes_that_cannot_be_decoded_are_refused_where_they_arrive(host, peer, method, codec):
    fuzz(host, peer, method, codec, CASES, 0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("host", "peer", "method"), WAYS)
def test_bytes_that_cannot_be_decoded_are_refused_at_length(host, peer, method, codec):
    fuzz(host, peer, method, codec, MANY, 1)
