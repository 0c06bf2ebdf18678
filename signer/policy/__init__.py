"""policy.toml and its rules: who may be granted what."""
