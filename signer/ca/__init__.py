"""CA keys: the key file, how it is rendered, and the trust line for hosts."""
