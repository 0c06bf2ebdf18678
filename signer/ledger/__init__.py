"""The durable, hash-chained record."""
