"""From Vault to the local CA and back."""
