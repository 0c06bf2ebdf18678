"""The removal of Vault."""
