"""What a gated model's owner asks of whoever downloads it."""

from collections.abc import Iterator
from contextlib import contextmanager

from capas.errors import CapasError


@contextmanager
def gate(name: str, gated: bool) -> Iterator[None]:
    """Around a download: where the Hub refuses it, say what a gated model needs.

    Args:
        name: of the model on the Hub, owner/name.
        gated: model.gated.

    Raises:
        CapasError: that of the download, with the way in where the Hub answered 401 or 403.
    """
    try:
        yield
    except CapasError as error:
        response = getattr(error.__context__, "response", None)
        if not gated or getattr(response, "status_code", None) not in (401, 403):
            raise
        raise CapasError(
            f"{error}\n{name} is gated: sign in at https://huggingface.co/{name}, accept its licence there "
            "(some owners answer after hours), then `hf auth login` here, or set HF_TOKEN."
        ) from None
