"""The one exception that the command line shows as a single line, and values in its message."""


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line: what is wrong, then what to do. The command line prints it without a traceback and
    exits with code 2.
    """


class NotFiniteError(UserError, ArithmeticError):
    """What a model computes overflows: NaN or infinity where there should be numbers."""


def shown(value: object) -> str:
    """``repr`` of a value from a file or a user for a message: short, whatever the value is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes out no integer of more than 4,300 digits
        return "a value that is too long to show"
    return text if len(text) <= 60 else text[:57] + "..."
