"""Rules for all tests."""

import os

import pytest

MUST_RUN_IN_CI = ("triton", "browser", "ray", "milvus")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long tests at their full length (make test-slow)")


@pytest.fixture
def full(request) -> bool:
    """Whether a long test should run at its full length."""
    return request.config.getoption("--full")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a Triton, browser, Ray or Milvus test that skips has failed: the machine lacks what .ci/run should install."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and any(item.get_closest_marker(name) for name in MUST_RUN_IN_CI):
        report.outcome = "failed"
    return report
