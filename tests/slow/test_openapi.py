"""Schemathesis against the API: whatever the OpenAPI document allows, and much that it does not, is answered as it says."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.api_server import api_server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_every_operation_answers_as_documented(tmp_path, full):
    pytest.importorskip("schemathesis")
    command = [Path(sys.executable).with_name("schemathesis"), "run", "--checks", CHECKS, "--seed", "0", "--no-color"]
    command += ["--max-time", "300" if full else "60", "--generation-database", "none"]
    with api_server(tmp_path / "server") as (url, _):
        paths = httpx.get(f"{url}/openapi.json").json()["paths"]
        done = subprocess.run(
            [*command, f"{url}/openapi.json"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert httpx.get(f"{url}/health/ready").status_code == 200
    operations = sum(map(len, paths.values()))
    assert operations >= 12
    assert f"Tested: {operations}\n" in done.stdout
    assert "Unresolvable references" not in done.stdout, done.stdout
