"""schemathesis over the server's own OpenAPI page: every request ends in an answer or in words, never in a 500."""

import subprocess

import pytest
from serve import clients
from serve import running as running_lib

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_any_request_that_the_page_allows_or_does_not(tmp_path):
  clients.needs("schemathesis")
  with running_lib.Running() as running:
    running.server.ready = True
    command = [clients.PYTHON, "-m", "schemathesis.cli", "run", f"{running.address}/openapi.json", "--checks", CHECKS]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "40", "--seed", "1", "--no-color"]
    command += ["--request-timeout", "120"]  # a first answer of its kind compiles
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    running.idle()
    assert running.post("/v1/completions", {"prompt": "a"})[0] == 200
