"""Bytes on a connection: frames, the handshake, transports, buffers and the I/O thread's loop."""
