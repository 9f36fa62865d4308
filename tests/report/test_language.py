"""Numbers as English and Spanish write them; texts that hold a run's facts."""

from pathlib import Path

import pytest

from capas.core.errors import CapasError
from capas.core.language import NARROW_SPACE, Language, Numbers
from capas.report.intervals import mean_interval, wilson_interval

ENGLISH, SPANISH = Numbers("en"), Numbers("es")


def test_thousands_and_decimals_follow_the_language() -> None:
    assert (ENGLISH.num(12345), SPANISH.num(12345)) == ("12,345", f"12{NARROW_SPACE}345")
    assert (ENGLISH.num(6000), SPANISH.num(6000)) == ("6,000", "6000")
    assert (ENGLISH.dec(-0.5, 1), SPANISH.dec(-0.5, 1)) == ("−0.5", "−0,5")
    assert (ENGLISH.pct(0.774), SPANISH.pct(0.774)) == ("77.4%", f"77,4{NARROW_SPACE}%")


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(999, "999 B"), (80_000, "80 kB"), (2.14e6, "2.1 MB"), (8e9, "8.00 GB")]
)
def test_sizes_take_the_unit_that_fits(num_bytes: float, text: str) -> None:
    assert ENGLISH.size(num_bytes).replace(NARROW_SPACE, " ") == text


def test_a_small_number_is_not_shown_as_nothing() -> None:
    assert ENGLISH.dec(0.00002, 2) == "2.0e−05"
    assert ENGLISH.dec(0.0, 2) == "0.00"


def test_a_share_has_decimals_unless_it_is_none_or_all() -> None:
    assert [ENGLISH.pct(share) for share in (0, 0.0001, 0.5, 1)] == ["0%", "0.0%", "50.0%", "100%"]


def test_what_is_unknown_is_a_dash() -> None:
    assert [ENGLISH.num(None), ENGLISH.dec(None), ENGLISH.pct(None)] == ["–"] * 3


def test_a_text_holds_facts_escaped(tmp_path: Path) -> None:
    (tmp_path / "en.yaml").write_text("a:\n  b: '<em>{{ name }}</em> {{ n|num }}'\n")
    language = Language(tmp_path, "en", {"name": "<b>", "n": 1000})
    assert language.say("a.b") == "<em>&lt;b&gt;</em> 1,000"


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "en.yaml").write_text("a: {b: c}\n")
    with pytest.raises(CapasError, match=r"en\.yaml has no text 'a\.x'"):
        Language(tmp_path, "en", {}).say("a.x")


def test_the_wilson_interval_is_that_of_the_literature() -> None:
    low, high = wilson_interval(81, 263, 0.95)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("num_right", [0, 10])
def test_the_wilson_interval_stays_within_a_share(num_right: int) -> None:
    low, high = wilson_interval(num_right, 10, 0.95)
    assert 0 <= low < high <= 1
    assert high - low > 0.2


@pytest.mark.parametrize("num_records", [5, 40, 500])  # rounding put an end beyond the share
def test_the_wilson_interval_holds_the_share_itself(num_records: int) -> None:
    assert wilson_interval(0, num_records, 0.95)[0] == 0.0
    assert wilson_interval(num_records, num_records, 0.95)[1] == 1.0


def test_scores_between_right_and_wrong_get_a_bootstrap_interval() -> None:
    """Close to the normal one for many records; Wilson's would be wider."""
    scores = [0.4, 0.5, 0.6] * 40
    low, high = mean_interval(scores, 0.95, 2000)
    half = 1.96 * (sum((s - 0.5) ** 2 for s in scores) / len(scores)) ** 0.5 / len(scores) ** 0.5
    assert (low, high) == (pytest.approx(0.5 - half, abs=2e-3), pytest.approx(0.5 + half, abs=2e-3))
    assert mean_interval([1.0, 0.0, 1.0, 1.0], 0.95, 2000) == wilson_interval(3, 4, 0.95)
