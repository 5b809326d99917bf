"""Converts arrays and JSON to outgoing messages, and checks them before they are queued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from comms.arrays import Array
from comms.codecs.base import RAW, Codec, Encoded, parse_codec
from comms.codecs.coding import contiguous, supports
from comms.errors import ChannelError, CodecError
from comms.link.incoming import credit_cost, pack_json
from comms.link.outgoing import Outgoing, Sending
from comms.options import Limits
from comms.wire.bounded_json import JsonBody
from comms.wire.frame import Flag, Header, Kind, Role, Tag, array_bytes, dtype_code, tag_fields

_BUNDLE = int(Flag.BUNDLE)


class Job(NamedTuple):
    """A job of the codec worker, which encodes a message before it can leave."""

    message: Outgoing
    codec: Codec
    array: Array
    parameter: int


def pack_control(body: JsonBody, limits: Limits) -> Outgoing:
    """Returns a control message.

    Raises:
      ChannelError: If the body is no JSON or too large.
    """
    payload = _json("control message", {"body": body}, limits)
    header = Header(kind=Kind.CONTROL, flags=int(Flag.CONTROL_LANE), total=len(payload))
    return Outgoing(header, (), payload, Sending(None), raw_bytes=len(payload))


def pack_tensor(
    tag: Tag,
    array: Array | Encoded,
    codec: str,
    sending: Sending,
    limits: Limits,
    *,
    part: int | None = None,
) -> tuple[Outgoing, Job | None]:
    """Returns a tensor's message, and the job that encodes its payload if necessary.

    Args:
      tag: Fields of the tensor for the header.
      array: Any shape; not copied unless it is not contiguous or not little-endian.
      codec: Name of the codec; an ``Encoded`` has its own.
      sending: Record of times and bytes.
      limits: Limits of the peer.
      part: Index in a bundle.

    Raises:
      ChannelError: If the array, the codec or the tag cannot be sent.
    """
    chosen, parameter = parse_codec(array.codec if isinstance(array, Encoded) else codec)
    if not isinstance(array, Encoded):
        array = contiguous(np.asarray(array))
    dtype, shape = array.dtype, array.shape
    code = dtype_code(dtype)
    chosen.check(dtype, parameter)
    raw_bytes = array_bytes(dtype, shape)
    total = chosen.encoded_bytes(dtype, shape, parameter)
    if max(raw_bytes, total) > limits.message_bytes or len(shape) > limits.rank:
        raise ChannelError(
            f"{tag}: {raw_bytes} bytes of rank {len(shape)}; at most {limits.message_bytes} and "
            f"{limits.rank} are accepted (Limits.message_bytes, Limits.rank)"
        )
    header = Header(
        Kind.TENSOR,
        int(tag.role),
        chosen.code,
        code,
        len(shape),
        0 if part is None else _BUNDLE,
        *tag_fields(tag),
        part=tag.entry if part is None else part,
        total=total,
        codec_parameter=parameter,
    )
    cost = credit_cost(tag.role, raw_bytes)
    message = Outgoing(header, shape, None, sending, raw_bytes=raw_bytes, cost=cost)
    if isinstance(array, Encoded):
        size = array.data.nbytes
        if size > total or (chosen.exact_size and size != total):
            raise CodecError(
                f"{tag}: {size} bytes are not a valid {chosen.name} of {dtype} {shape}, which has "
                f"{total}"
            )
        set_payload(message, array.data)
    elif chosen is RAW:
        set_payload(message, array)
    else:
        return message, Job(message, chosen, array, parameter)
    return message, None


def pack_bundle(
    name: str,
    tensors: Mapping[str, Array | Encoded],
    body: JsonBody,
    sending: Sending,
    limits: Limits,
    *,
    tag: Tag,
    codec: str,
) -> tuple[list[Outgoing], list[Job]]:
    """Returns a bundle's messages, the manifest first, and the jobs that encode its tensors.

    Raises:
      ChannelError: If something cannot be sent.
    """
    if tag.role is not Role.WEIGHT:
        raise ChannelError(f"bundle {name}: only weights travel in bundles, not {tag}")
    if len(tensors) > limits.bundle_tensors:
        raise ChannelError(
            f"bundle {name} has {len(tensors)} tensors; at most {limits.bundle_tensors} are "
            "accepted (Limits.bundle_tensors)"
        )
    fields = {"name": name, "tensors": list(tensors), "body": body}
    payload = _json(f"manifest of bundle {name}", fields, limits)
    header = Header(Kind.MANIFEST, int(tag.role), 0, 0, 0, 0, *tag_fields(tag))
    header = header._replace(total=len(payload))
    manifest = Outgoing(header, (), payload, sending, raw_bytes=len(payload), final=not tensors)
    messages, jobs = [manifest], []
    chosen, parameter = parse_codec(codec)
    for part, array in enumerate(tensors.values()):
        if not isinstance(array, Encoded):
            array = contiguous(np.asarray(array))
        name_of_codec = codec if supports(chosen, array.dtype, parameter) else "raw"
        message, job = pack_tensor(tag, array, name_of_codec, sending, limits, part=part)
        message.final = part == len(tensors) - 1
        messages.append(message)
        if job is not None:
            jobs.append(job)
    if sum(message.raw_bytes for message in messages[1:]) > limits.message_bytes:
        raise ChannelError(
            f"bundle {name} has more than {limits.message_bytes} bytes (Limits.message_bytes)"
        )
    return messages, jobs


def set_payload(message: Outgoing, payload: Array) -> None:
    """Sets the payload of a message and its size."""
    flat = payload.reshape(-1).view(np.uint8)
    if message.header.total != flat.nbytes:
        message.header = message.header._replace(total=flat.nbytes)
    message.payload = flat.data


def _json(what: str, fields: JsonBody, limits: Limits) -> memoryview:
    payload = pack_json(fields)
    if len(payload) > limits.control_bytes:
        raise ChannelError(
            f"the {what} has {len(payload)} bytes, at most {limits.control_bytes} are accepted "
            "(Limits.control_bytes)"
        )
    return memoryview(payload)
