"""What tests of every folder may use, and what holds for all of them."""

import os
import time

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.support.kafka", "tests.support.vault", "tests.support.postgres"]

settings.register_profile(
    "unhurried",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,  # there the same commit gets the same answer; here new examples each time
)
settings.load_profile("unhurried")

DAY_S = 86_400
BEFORE_S, AFTER_S = 120, 45
"""Around midnight, UTC, no test begins."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Let no day, month or year end within a test, nor between what it says was half a minute ago and now.

    What happens at such an instant is tested with a clock of its own.
    """
    into_s = (time.time() + BEFORE_S) % DAY_S
    if into_s < BEFORE_S + AFTER_S:
        time.sleep(BEFORE_S + AFTER_S - into_s)
