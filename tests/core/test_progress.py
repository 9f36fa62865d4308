"""No stage is silent for long: what is going on is logged when nothing else is."""

import time

import pytest

from capas.core.progress import doing, heartbeat, log

SECONDS = 0.05


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "capas")


def test_a_silent_stage_says_what_it_is_doing(caplog: pytest.LogCaptureFixture) -> None:
    with heartbeat(SECONDS), doing("scoring records", 8) as scored:
        scored.step(3)
        time.sleep(5 * SECONDS)
    assert 1 <= len(caplog.messages) <= 5
    assert caplog.messages[0] == "scoring records, 3 of 8 (0 s)"


def test_an_activity_within_another_is_told_after_it(caplog: pytest.LogCaptureFixture) -> None:
    with heartbeat(SECONDS), doing("samples", 4), doing("loading base"):
        time.sleep(2 * SECONDS)
    assert caplog.messages[0] == "samples, 0 of 4: loading base (0 s)"


def test_a_stage_that_talks_is_not_interrupted(caplog: pytest.LogCaptureFixture) -> None:
    with heartbeat(20 * SECONDS):
        for _ in range(10):
            log.info("step")
            time.sleep(SECONDS / 5)
    assert set(caplog.messages) == {"step"}


def test_it_ends_with_the_block_and_an_activity_with_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ValueError, match="broken"), heartbeat(SECONDS), doing("loading"):
        raise ValueError("broken")
    with heartbeat(SECONDS):
        time.sleep(2 * SECONDS)
    assert caplog.messages[0] == "working (0 s)"
    count = len(caplog.messages)
    time.sleep(3 * SECONDS)
    assert len(caplog.messages) == count
