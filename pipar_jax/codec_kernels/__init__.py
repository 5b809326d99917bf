"""The codecs of comms as jit kernels that give the same bytes."""
