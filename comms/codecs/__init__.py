"""Codecs of tensors on links, each registered under a name and a number."""
