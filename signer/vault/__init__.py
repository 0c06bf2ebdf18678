"""Everything about Vault and OpenBao: signing, administration, inventory, audit log, parity."""
