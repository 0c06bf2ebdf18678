"""signer: an SSH user-certificate authority for one platform."""

__version__ = "0.1.0"
