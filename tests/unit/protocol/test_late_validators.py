"""Validators are made at their first use: that must need no module, so no free descriptor and no disk."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import sys
import signer.api.asgi, signer.service.startup
from pydantic import BaseModel
from signer.api import openapi
from signer.toml import Table

class Known(Table):  # policy.toml is read before anything is served
    number: int

Known.model_validate({"number": 1})
loaded = set(sys.modules)

def shapes(base):
    for shape in base.__subclasses__():
        yield shape
        yield from shapes(shape)

ours = [shape for shape in shapes(BaseModel) if shape.__module__.startswith("signer.")]
late = [shape for shape in ours if not shape.__pydantic_complete__]
for shape in late:
    shape.model_rebuild()
print(len(late) > 50, sorted(set(sys.modules) - loaded))
"""


def test_a_validator_that_is_made_late_loads_no_module() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"
