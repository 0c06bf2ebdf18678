"""The core: decides on commands, records events, signs certificates. Pure; no I/O."""
