"""The Vault-compatible HTTP API, for existing Vault clients."""
