"""policy.toml and the rules by which requests are granted."""
