"""The house itself: who may import whom, what importing costs, what is public, the pins."""

import ast
import subprocess
import sys
from inspect import isfunction
from pathlib import Path
from typing import Any

import lora_mini_jax
from tests.check_pins import disagreements

PACKAGE = Path(lora_mini_jax.__file__).parent
# Every module and package of the top level, the lowest first: each may import those before it.
ORDER = ("errors", "glue", "scores", "layers", "files", "processes", "hardware", "tree", "settings",
         "selection", "quantized", "method", "algebra", "methods", "adapters", "sharding",
         "training", "checkpoint", "saved", "call", "linen", "nnx", "models", "data", "generation",
         "peft", "search", "forecast", "options", "tasks", "runs", "commands", "cli")  # fmt: skip
HEAVY = {"flax", "orbax", "transformers", "datasets", "tyro", "matplotlib", "tokenizers"}


def imports(path: Path) -> set[str]:
    """The modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f".{alias.name}" for alias in node.names]
            top = node.module == "lora_mini_jax"
            found |= {node.module + name for name in names} if top else {node.module}
    return found


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def test_imports_go_downwards_only():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("lora_mini_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
        if module == "lora_mini_jax.__init__":
            continue
        for name in imports(path):
            if name.startswith("lora_mini_jax.") and name != "lora_mini_jax.__version__":
                assert place(name) <= place(module), f"{module} imports {name}, which is above it"


def test_no_method_imports_another():
    for path in (PACKAGE / "methods").glob("*.py"):
        if path.name != "__init__.py":
            assert not any(name.startswith("lora_mini_jax.methods") for name in imports(path))


def test_the_core_needs_neither_flax_nor_anything_heavy():
    code = (
        "import sys, lora_mini_jax as lmj\n"
        "flax = ('linen', 'models', 'nnx', 'generate')\n"
        "[getattr(lmj, name) for name in lmj.__all__ if name not in flax]\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def shown(public: Any, name: str) -> bool:
    """Whether an example of the docstring has the name in it."""
    lines = (public.__doc__ or "").splitlines()
    return any(name in line for line in lines if line.lstrip().startswith((">>> ", "... ")))


def test_every_public_name_has_an_example_and_all_fit_a_screen():
    """The examples themselves are run as tests. Those of a module may be in its own docstring."""
    assert len(lora_mini_jax.__all__) <= 30
    modules = {name: getattr(lora_mini_jax, name) for name in lora_mini_jax._MODULES}
    names = {(lora_mini_jax, name) for name in lora_mini_jax.__all__ if name not in modules}
    names |= {(module, name) for module in modules.values()
              for name in getattr(module, "__all__", ())
              if isfunction(getattr(module, name))}  # fmt: skip
    for module, name in names:
        public = getattr(module, name)
        assert shown(public, name) or shown(public, "") or shown(module, name), name


def test_pins_and_ranges_agree():
    assert disagreements() == []


def test_the_shipped_model_is_small_enough():
    assert sum(path.stat().st_size for path in (PACKAGE / "base").iterdir()) <= 8_000_000


def test_a_method_is_a_page():
    for path in (PACKAGE / "methods").glob("*.py"):
        assert len(path.read_text().splitlines()) < 150, path.name
