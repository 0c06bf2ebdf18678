"""HTTP to commands and back: no key, no policy, no state, nothing decided."""
