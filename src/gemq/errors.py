"""The exception that the command line shows as a single line, and how values appear in its message."""

MAX_SHOWN_CHARACTERS = 60
"""Of a value in a message."""


class UserError(ValueError):
    """An error that the user can fix. It is a ``ValueError``.

    The message is one line: what is wrong, then what to do. The command line prints it without a traceback and
    exits with code 2.
    """


class NotFiniteError(UserError, ArithmeticError):
    """A model computes NaN or infinity."""


def short_repr(value: object) -> str:
    """``repr`` of a value from a file or a user, shortened for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python converts no integer of more than 4,300 digits
        return "a value that is too long to show"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."
