"""Rules for all tests."""

import os

import pytest

MUST_RUN_IN_CI = ("triton", "browser")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a Triton or browser test that skips has failed: the machine lacks something that .ci/run should install."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and any(item.get_closest_marker(name) for name in MUST_RUN_IN_CI):
        report.outcome = "failed"
    return report
