"""Links between two hosts: sending, receiving, credit, resumption and measurement."""
