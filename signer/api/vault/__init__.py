"""Vault's HTTP shape, for clients that already work with Vault."""
