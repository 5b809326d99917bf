"""Bytes on a connection: frames, handshake, transports, buffers and the event loop."""
