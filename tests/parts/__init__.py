"""Real parts that tests run against: OpenSSH, OpenBao, keys made by `ssh-keygen`. conftest.py has their fixtures."""

from pathlib import Path

import pytest

# An assertion in here shows its values as one in a test does.
pytest.register_assert_rewrite(*(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py")))
