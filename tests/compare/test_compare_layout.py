"""Plain text in columns: what is shortened, broken and made harmless."""

from capas.compare import layout


def test_the_middle_is_left_out() -> None:
    assert layout.shortened("abcdefghij", 10) == "abcdefghij"
    assert layout.shortened("abcdefghij", 7) == "abc…hij"
    assert layout.shortened("日本語日本語", 7) == "日…本語"
    assert layout.width_of("日本語e\u0301") == 7


def test_characters_that_steer_a_terminal_are_not_printed() -> None:
    assert layout.one_line("a\x1b[31mb\u202ec\nd\te\r") == "a�[31mb�c↵d e"


def test_lines_end_at_blanks_and_never_before_a_percent_sign() -> None:
    assert layout.wrapped("from 90.8 % to 92.4 %", 12) == ["from 90.8 %", "to 92.4 %"]
    assert layout.wrapped("it is 90.8 % now", 10) == ["it is", "90.8 % now"]
    assert layout.wrapped("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert layout.wrapped("one\ntwo", 10) == ["one", "two"]


def test_a_long_text_keeps_to_its_lines() -> None:
    lines = layout.wrapped(" ".join(f"word{i:03}" for i in range(100)), 20, 3)
    assert len(lines) == 3
    assert lines[0].startswith("word000") and lines[-1].endswith("word099")
    assert sum("…" in line for line in lines) == 1


def test_what_differs_in_long_texts_is_seen() -> None:
    one, other = layout.focused(["a" * 100 + "X" + "b" * 100, "a" * 100 + "YY" + "b" * 100], 40)
    assert one == f"…{'a' * 12}X{'b' * 12}…"
    assert other == f"…{'a' * 12}YY{'b' * 12}…"
    assert layout.focused(["short", "shore"], 40) == ["short", "shore"]
    assert layout.focused(["abc", "abcabc" + "x" * 90], 40)[1].endswith("x")


def test_the_terminal_decides(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for columns, width in (("200", 120), ("66", 66), ("10", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        assert layout.terminal_width() == width
