"""Writing that loses nothing: everything goes to a temporary name first, then is renamed."""

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError


def writes() -> bool:
    """Whether this process writes files, and speaks: the first of those that have met, be it by
    `processes.start` or by ``jax.distributed.initialize``, does it for all."""
    jax = sys.modules.get("jax")  # a program that has not imported it is alone, and may stay quick
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def is_address(path: str | Path) -> bool:
    """Whether it is none of this machine's paths, such as ``gs://bucket/run``: as a path it would
    be a folder called ``gs:``."""
    return re.match(r"[A-Za-z][\w+.-]+:/", str(path)) is not None


@contextmanager
def new_folder(path: str | Path) -> Generator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends without error.

    What was at ``path`` before stays until the new folder is complete, and for good if it fails or
    if anything else lies there than files of the new one's names. A link to a folder stays one.

    Raises:
        UserError: no permission, a full disk, or what `check_replaceable` raises.

    Example:
        >>> with tempfile.TemporaryDirectory() as home:
        ...     with new_folder(Path(home) / "out") as folder:
        ...         _ = (folder / "a.txt").write_text("whole")
        ...     (Path(home) / "out" / "a.txt").read_text()
        'whole'
    """
    if not writes():
        with tempfile.TemporaryDirectory() as unused:
            yield Path(unused)
        return
    with writing(path):
        check_replaceable(path)
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            yield temporary
            check_replaceable(path, {file.name for file in temporary.iterdir()})
            # What mkdtemp and safetensors make is for the owner alone; the umask knows better.
            os.chmod(temporary, 0o777 & ~_umask())
            for file in temporary.iterdir():
                os.chmod(file, 0o666 & ~_umask())
            old = temporary.with_suffix(".old")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path: str | Path, names: Collection[str] | None = None) -> None:
    """Whether a new folder may take the place of what is at ``path``: nothing, an empty folder, or
    one that holds only files of these ``names``, if they are given.

    Raises:
        UserError: an address, a file, the current directory, or a folder that holds something else.
    """
    if is_address(path):
        raise UserError(f"{path} is an address: name a folder on this machine to write to")
    path = Path(path).resolve()
    if path.is_file():
        raise UserError(f"{path} is a file: name a folder to write to")
    if path == Path.cwd():
        raise UserError(f"{path} is the current directory: name a folder in it to write to")
    if names is None or not path.exists():
        return
    others = (file.name for file in path.iterdir() if file.name not in names or file.is_dir())
    if other := min(others, default=None):
        raise UserError(f"{path} holds something else, {other}: choose another folder to write to")


@contextmanager
def locked(path: Path, busy: str) -> Generator[None]:
    """Hold a file's lock, making the file, until the block ends or this process does.

    A lock that nobody is left to hold keeps nobody out. Where a file system knows no locks, nothing
    does.

    Raises:
        UserError: ``busy``, where another holds it, in this process or not.
    """
    if not writes():
        yield
        return
    with writing(path):
        path.touch()
    with open(path, "a", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except (ImportError, OSError):
            pass
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file or nothing."""
    if not writes():
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a name that outlives a crash may hold nothing
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, indented, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; `UserError` names the file (and the line) when it cannot be."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; errors as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object, {{...}}")
    return value


def read_safetensors(path: str | Path, advice: str) -> dict[str, Any]:
    """The tensors of a safetensors file, as NumPy's arrays; where it is damaged, `UserError` ends
    in ``advice``, what to do about such a file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except AttributeError as error:
        raise UserError(f"{path} is damaged or of a dtype that NumPy lacks ({error}): {advice}, "
                        "with tensors of 16 or 32 bits") from None  # fmt: skip
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from None


@contextmanager
def writing(path: str | Path) -> Generator[None]:
    """Turn what the disk refuses into a `UserError` that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors, written in Rust, and TensorStore, in C++, raise their own kinds.
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise UserError(
                f"the disk is full: could not write {path}; what was there before is unchanged, "
                "free some space and run the same command again"
            ) from None
        if number in (
            errno.ENOENT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.EISDIR,
            errno.ENAMETOOLONG,
            errno.EBUSY,
            errno.ENOTEMPTY,
        ):
            raise UserError(f"cannot write {path}: {os.strerror(number)}") from None
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
