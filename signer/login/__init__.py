"""The `safe-session` command: a certificate for one session, with the key in memory only.

People feel every import here at each login, so this package imports `signer.errors`, `signer.ssh.wire`, `signer.ssh.agent`
and the cheapest parts of the standard library. Measured on the reference machine, on top of 17 ms for Python itself:
`typing` 20 ms, `json` 15, `socket` 15, `re` 12, `signal` 8, `http.client` 40, `argparse` and `subprocess` more than they save.
Hence `_json`, `_socket`, `_signal` (the C halves of those modules), `os.posix_spawn`, and argument parsing by hand.
"""
