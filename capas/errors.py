"""The errors that a user can act on: their message is printed without a traceback."""


class CapasError(Exception):
    """Bad input or a state that the user must mend; the message says what, where and how."""
