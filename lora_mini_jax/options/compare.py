"""The options of a comparison: several methods and seeds side by side."""

from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin

from lora_mini_jax.errors import UserError
from lora_mini_jax.options.finetune import Finetune
from lora_mini_jax.options.kinds import allowed, fitted
from lora_mini_jax.options.numbers import SEED, check_numbers
from lora_mini_jax.settings.spec import split_spec, to_pairs

OF_A_RUN = ("method", "settings", "seed", "output_dir", "init_adapter")
"""What the comparison itself gives to each of its runs, or, an adapter to begin from, to none."""


@dataclass(frozen=True)
class Compare(Finetune):
    """Compare several methods and seeds on one task, in a table, JSON and plots.

    The config.json of a run, as --config, gives all options except its method, settings and seed,
    and the adapter that it began from: every run of a comparison begins with its own.
    """

    # As class variables they are no options any more: each run of a comparison has its own.
    method: ClassVar[str] = ""  # ty: ignore[incompatible-attribute-override]
    seed: ClassVar[int] = 0  # ty: ignore[incompatible-attribute-override]
    init_adapter: ClassVar[str] = ""  # ty: ignore[incompatible-attribute-override]
    passed_over: ClassVar[tuple[str, ...]] = ("method", "settings", "seed", "init_adapter")

    output_dir: str = "runs/compare"
    """The folder of the comparison; every run has its own inside."""
    methods: tuple[str, ...] = ("lora-mini", "lora")
    """Methods, each with its own settings: lora-mini:rank=4,a=32,b=32,learning_rate=0.02 ..."""
    settings: tuple[str, ...] = ()
    """Settings of all the methods that have them, rank=4; or each as a flag of its own: --rank 4.
    What a method's own words in --methods say goes before."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every method is run with every seed."""

    def __post_init__(self) -> None:
        from lora_mini_jax.methods import method_class

        if not self.methods or not self.seeds:
            raise UserError("--methods and --seeds need at least one each")
        check_numbers(self, {"seeds": SEED})
        for name in ("methods", "seeds"):
            given = getattr(self, name)
            if twice := sorted({str(each) for each in given if given.count(each) > 1}):
                raise UserError(f"--{name} says {', '.join(twice)} more than once: a run that is "
                                "counted twice makes the spread too small")  # fmt: skip
        for spec in self.methods:  # which checks all options that the runs share
            self.run_options(spec, self.seeds[0])
        there = {n for s in self.methods for n in method_class(split_spec(s)[0]).field_names()}
        if unused := sorted(set(self.parsed_settings()) - there):
            raise UserError(f"no method of --methods {' '.join(self.methods)} has a setting "
                            f"{', '.join(unused)}: leave it out")  # fmt: skip

    def run_options(self, spec: str, seed: int) -> Finetune:
        """The options of one run: ``spec`` is a method's name and perhaps ``:key=value,...``."""
        from lora_mini_jax.methods import method_class

        name, given = split_spec(spec)
        own = method_class(name).field_names()
        kinds = {f.name: f.type for f in fields(Finetune) if f.name not in OF_A_RUN}
        changed = {n: _typed(spec, n, v, kinds[n]) for n, v in given.items() if n in kinds}
        # What is given for all goes to the methods that have it; what a spec says must fit.
        settings = {n: v for n, v in self.parsed_settings().items() if n in own}
        settings |= {n: v for n, v in given.items() if n not in kinds}
        values: dict[str, Any] = {n: getattr(self, n) for n in kinds} | changed
        folder = str(Path(self.output_dir) / f"{_safe(spec)}-seed{seed}")
        return Finetune(
            **values, method=name, settings=to_pairs(settings), seed=seed, output_dir=folder
        )


def _safe(spec: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in spec)


def _typed(spec: str, name: str, value: Any, kind: Any) -> Any:
    """A setting of the run, as the option it stands for wants it."""
    if value == "none" and NoneType in get_args(kind):
        return None
    if get_origin(kind) is tuple:
        value = str(value).split("+")
    elif str in (kind, *get_args(kind)):
        value = str(value)
    try:
        return fitted(value, kind)
    except TypeError:
        raise UserError(f"{spec!r}: {name} is {value!r}: give {allowed(kind)}") from None
