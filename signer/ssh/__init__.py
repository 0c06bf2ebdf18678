"""OpenSSH's formats as pure functions between bytes and values; no I/O, no policy, no keys kept."""
