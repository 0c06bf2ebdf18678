"""The `safe-session` command: a certificate for one session, with the key in memory only.

Each import here delays every login, so this package imports only `signer.errors`, `signer.address`, `signer.ssh`
and the cheapest parts of the standard library. Import times on a two-core host, on top of 17 ms for Python itself:
`http.client` 40 ms, `typing` 20, `json` 15, `socket` 15, `re` 12, `signal` 8, `pathlib` and `subprocess` more. Hence
`_json`, `_socket`, `_signal` (the C halves of those modules), `os.posix_spawn`, and a hand-written argument parser.
"""
