"""The evidence of a run."""
