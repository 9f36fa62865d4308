"""Passwords and tokens stay out of what capas prints, logs and writes."""

import logging

import pytest

from capas.core.errors import CapasError, exit_on_user_error, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://hidden@host/x", "https://***@host/x"),
        ("postgresql://ana:hidden@host:5432/x", "postgresql://***@host:5432/x"),
        ("mysql://ana:hid/den@host:3306/x", "mysql://***@host:3306/x"),
        ("mysql://ana:hid@den@host/x", "mysql://***@host/x"),
        ("https://h/f?sig=hidden&x=1", "https://h/f?sig=***&x=1"),
        ("https://h/f?X-Amz-Signature=hidden", "https://h/f?X-Amz-Signature=***"),
        ("https://h/f?a=1&api_key=hidden#b", "https://h/f?a=1&api_key=***#b"),
        (
            "git clone https://ghp_0123456789abcdefghij@github.com/o/r",
            "git clone https://***@github.com/o/r",
        ),
        ("the token hf_0123456789abcdefghij is", "the token *** is"),
        *((text, text) for text in ("http://host:5000/a@b", "https://github.com/o/r@main")),
        *((text, text) for text in ("ana@example.com", "https://h/f?page=2&monkey=3", "hf_hub")),
    ],
)
def test_what_is_secret_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_secret_is_hidden_in_errors_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with (
        pytest.raises(SystemExit, match=r"train: no answer from http://\*\*\*@host"),
        exit_on_user_error("train"),
    ):
        raise CapasError("no answer from http://ana:hidden@host")
    logging.getLogger("capas").warning("%s is away", "http://ana:hidden@host")
    assert caplog.messages == ["http://***@host is away"]
