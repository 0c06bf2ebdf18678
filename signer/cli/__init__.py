"""The `signer` command: one module per verb group, its parser, and its output."""
