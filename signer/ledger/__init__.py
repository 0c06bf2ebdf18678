"""The ledger: a durable, hash-chained record of events."""
