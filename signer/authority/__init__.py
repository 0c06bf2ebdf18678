"""Decide, record, release: the core's state machine. Pure; no I/O of its own."""
