"""CA keys: the key file, its rendering, and the trust lines for hosts."""
