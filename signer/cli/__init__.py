"""The `signer` command: a table of verbs, one module for each group of verbs, their parser, and all output.

`signer --help` imports no verb's module. A verb's module imports at its top only what its own help needs; what the verb
works with is imported by the function that uses it, so that help, completion and usage errors stay fast.
"""
