"""Codecs: how tensors become bytes on a link; each is registered under a name and a number."""
