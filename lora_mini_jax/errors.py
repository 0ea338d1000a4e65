"""The one exception that means "you can fix this": it becomes one line and exit code 2."""

import difflib
import os
from collections.abc import Generator, Iterable
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


def one_line(error: BaseException, longest: int = 300) -> str:
    """An exception of another library as one line, its kind first, cut to ``longest`` characters.

    Example:
        >>> one_line(KeyError("a"))
        "KeyError: 'a'"
    """
    return _cut(" ".join(f"{type(error).__name__}: {error}".split()), longest)


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of what another library says, for the rest is of its insides; its kind where
    it says nothing.

    Example:
        >>> first_line(RuntimeError("no room\\n  at 0x7f00"))
        'no room'
    """
    return _cut(next(iter(str(error).strip().splitlines()), type(error).__name__), longest)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


@contextmanager
def told_of_memory() -> Generator[None]:
    """Turn what JAX raises when a device has no room into a `UserError` that says what to do."""
    try:
        yield
    except UserError:  # told already, perhaps of memory
        raise
    except Exception as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        raise UserError(
            f"a device has not enough memory ({first_line(error)}): take smaller batches or "
            "--accumulate them, --remat full with --scan-layers, --quantize, or more devices with "
            "--mesh; lora-mini plan tells beforehand what a step takes"
        ) from error


@contextmanager
def told_of_devices() -> Generator[None]:
    """Turn what JAX raises when it cannot start on devices into a `UserError` that says what to
    do."""
    try:
        yield
    except (RuntimeError, AssertionError):
        import jax  # whose own kind of these says nothing of where it comes from, so it is asked

        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:
            asked = os.environ.get("JAX_PLATFORMS", "")
            reason = " ".join(str(error).split())[:300] or "it knows no such platform"
        else:
            raise
        raise UserError(
            f"JAX cannot start on devices (JAX_PLATFORMS={asked!r}: {reason}): end what else uses "
            "them, install JAX for them, or set JAX_PLATFORMS=cpu"
        ) from None


def flag(name: str) -> str:
    """An option as it is typed: ``output_dir`` as ``--output-dir``."""
    return f"--{name.replace('_', '-')}"


def meant(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown ``word``: those known ones that may have been meant, by
    their letters or, of several parts, by their initials; or nothing.

    Example:
        >>> meant("lr", ["learning_rate", "labels"])
        ': did you mean learning_rate?'
        >>> meant("--rankk", ["--rank", "--task"])
        ': did you mean --rank?'
    """
    known = sorted(known)
    parts = {name: name.strip("-").replace("_", "-").split("-") for name in known}
    near = [n for n in known if "".join(p[:1] for p in parts[n]) == word.strip("-")]
    near = near or difflib.get_close_matches(word, known, n=2, cutoff=0.7)
    return f": did you mean {' or '.join(near)}?" if near else ""
