"""The codecs of comms as jit kernels with identical bytes."""
