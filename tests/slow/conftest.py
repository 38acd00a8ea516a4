"""Rules for the slow tests."""

import shutil

import pytest

from serve.triton.runtime import runtime_folder


def pytest_runtest_setup(item):
    """Before any fixture: a test of the real server needs one."""
    needed = item.get_closest_marker("triton")
    if needed and shutil.which("tritonserver") is None and not (runtime_folder() / "bin" / "python").is_file():
        pytest.skip(f"no tritonserver on PATH and no runtime in {runtime_folder()} (make triton-runtime)")
