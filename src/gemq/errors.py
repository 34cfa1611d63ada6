"""The one exception that the command line shows as a single line."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one line: what is wrong, then what to do. The command line prints it without a traceback and
    exits with code 2.
    """


class NotFiniteError(UserError, ArithmeticError):
    """What a model computes overflows: NaN or infinity where there should be numbers."""
