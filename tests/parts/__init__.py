"""Real parts that tests run against: OpenSSH, OpenBao, keys made by `ssh-keygen`. conftest.py has their fixtures."""
