"""A round as a state machine without I/O, and what drives it."""
