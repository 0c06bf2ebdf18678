"""Witnesses of logs: the one that this program is for others, and the ones that cosign this ledger's checkpoints.

The room of `signer witness` and `signer ledger witness`. Only `cli` imports it.
"""
