"""Translates HTTP requests to keeper commands and back; holds no key, policy or state and decides nothing."""
