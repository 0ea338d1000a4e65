"""The one exception that means "you can fix this": it becomes one line and exit code 2."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a field, an option, a file.

    The message names what was given, what is allowed and what to do. The command line prints it
    as one line and exits with status 2; in Python it is an ordinary ``ValueError``.

    Example:
        >>> raise UserError("rank 0 is not allowed: give a whole number from 1")
        Traceback (most recent call last):
        ...
        lora_mini_jax.errors.UserError: rank 0 is not allowed: give a whole number from 1
    """

    @property
    def line(self) -> str:
        """The message as one line."""
        return " ".join(str(self).split())
