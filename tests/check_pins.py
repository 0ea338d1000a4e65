"""Whether ``requirements*.txt`` (exact pins) and ``pyproject.toml`` (ranges) agree."""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins(name: str) -> dict[str, str]:
    """``{package: version}`` of a requirements file; anything but ``==`` is an error."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if not line.strip() or line.startswith(("#", "-r ")):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{name}: {line} is not an exact pin"
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def disagreements() -> list[str]:
    """Every range without a pin, and every pin outside its range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime = pins("requirements.txt")
    testing = {**runtime, **pins("requirements-test.txt")}
    wanted = [(line, runtime, "requirements.txt") for line in project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted += [(line, testing, "requirements-test.txt") for line in extra]
    wrong = []
    for line, pinned, name in wanted:
        requirement = Requirement(line)
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None:
            wrong.append(f"{name} has no pin for {line}")
        elif not requirement.specifier.contains(version):
            wrong.append(f"{name} pins {requirement.name}=={version}, outside {line}")
    return wrong


if __name__ == "__main__":
    if found := disagreements():
        sys.exit("\n".join(found))
