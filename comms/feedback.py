"""Error feedback: what a lossy codec dropped of a tensor is added to it the next time it is sent.

It helps where the *same* tensor is sent again and again, such as weights or pseudo-gradients once
a round: the errors then cancel over the rounds instead of adding up. Activations and cotangents
belong to other samples each time, and there it would add one sample's error to another's.

Reference: Seide et al., "1-bit stochastic gradient descent and its application to data-parallel
distributed training of speech DNNs", Interspeech 2014; Karimireddy et al., "Error feedback fixes
SignSGD and other gradient compression schemes", ICML 2019, algorithm 2.
"""

from __future__ import annotations

import numpy as np

from comms.codec import Array, Encoded, parse_codec
from comms.errors import CodecError


class ErrorFeedback:
    """Encodes named tensors and carries each one's error over to its next encoding.

    Args:
        codec: name of the codec, with its parameter if that is not the default.

    Raises:
        CodecError: if there is no such codec.
    """

    def __init__(self, codec: str) -> None:
        self._name = codec
        self._codec, self._parameter = parse_codec(codec)
        self._errors: dict[str, Array] = {}

    def encode(self, name: str, array: Array) -> Encoded:
        """Returns what to send for `array` plus the error left from the last time.

        Args:
            name: identifies the tensor over its sendings.
            array: any shape; a type that the codec does not take goes raw and has no error.

        Raises:
            CodecError: if the tensor's shape or type changed between two sendings.
        """
        array = np.asarray(array)
        try:
            self._codec.check(array.dtype, self._parameter)
        except CodecError:
            flat = np.array(array, order="C").reshape(-1).view(np.uint8)
            return Encoded("raw", flat, array.dtype, array.shape)
        error = self._errors.get(name)
        if error is not None and (error.shape, error.dtype) != (array.shape, array.dtype):
            raise CodecError(
                f"{name}: was {error.dtype} {error.shape} and is {array.dtype} {array.shape} now; "
                "reset() the error feedback when the model changes"
            )
        wanted = np.array(array, order="C") if error is None else array + error
        payload = self._codec.encode(wanted, self._parameter)
        sent = self._codec.decode(payload, wanted.dtype, wanted.shape, self._parameter)
        self._errors[name] = wanted - sent
        return Encoded(self._name, payload, wanted.dtype, wanted.shape)

    def reset(self) -> None:
        """Forgets all errors."""
        self._errors.clear()
