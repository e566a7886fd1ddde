"""Other people's clients of the server, in an environment of their own whose Python GLMJAX_CLIENTS_PYTHON names.

`make test-all` installs them; elsewhere the tests that need one are left out.
"""

import os
import subprocess
import sys

import pytest

PYTHON = os.environ.get("GLMJAX_CLIENTS_PYTHON", sys.executable)


def needs(module: str) -> None:
  """Skips a test where there is no such module."""
  here = f"import sys, importlib.util as util; sys.exit(util.find_spec({module!r}) is None)"
  if "GLMJAX_CLIENTS_PYTHON" not in os.environ and subprocess.run([PYTHON, "-c", here]).returncode:
    pytest.skip(f"no {module} here: make install-clients, and GLMJAX_CLIENTS_PYTHON=.venv-clients/bin/python")
