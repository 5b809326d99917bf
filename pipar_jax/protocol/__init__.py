"""Every control message of a run as a value, and its way to the wire and back."""
