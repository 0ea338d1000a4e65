"""The one exception that means "you can fix this": it becomes one line and exit code 2."""

from collections.abc import Generator
from contextlib import contextmanager


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


@contextmanager
def told_of_memory() -> Generator[None]:
    """Turn what JAX raises when a device has no room into a `UserError` that says what to do."""
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"a device has not enough memory ({reason}): take smaller batches or --accumulate them,"
            " --remat full with --scan-layers, --quantize, or more devices with --mesh; "
            "lora-mini plan tells beforehand what a step takes"
        ) from error
