"""What a kind of PEFT's adapters is: the settings of its config, and its tensors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lora_mini_jax.method import Factors, Method

Arrays = Mapping[str, np.ndarray]


class Leaf(NamedTuple):
    """PEFT's tensor of a leaf, the same numbers under another name.

    Attributes:
        name: what PEFT calls it.
        there, back: how to get there and back; leading axes are left alone.
        linear, embed: the end of its key in a file, by the kind of the kernel (`Target.kind`),
            where that is another than the name.
    """

    name: str
    there: Callable[[Any], Any] = lambda x: x
    back: Callable[[Any], Any] = lambda x: x
    linear: str = ""
    embed: str = ""

    def key(self, kind: str) -> str:
        """The end of its key in a file."""
        return (self.embed if kind == "embed" else self.linear) or self.name


def swap(x: Any) -> Any:
    """A matrix as torch's linear layers have it, and back."""
    return x.swapaxes(-1, -2)


def plain(number: Any) -> Any:
    """A whole number without its point: some readers insist on ``"lora_alpha": 16``."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


class Kind(ABC):
    """A ``peft_type``. Subclass it, and give it one line in ``kinds/__init__.py``. What few kinds
    need, ranks by module or tensors of all kernels together, has defaults that do nothing."""

    peft_type: ClassVar[str]

    leaves: ClassVar[Mapping[type[Method], Mapping[str, Leaf]]]
    """The methods that are of this kind, and what PEFT keeps of each, by our names."""

    settings: ClassVar[tuple[str, ...]]
    """What is understood of a config, beside what all kinds have."""

    required: ClassVar[tuple[str, ...]]
    """What a config must have."""

    ignored: ClassVar[tuple[str, ...]] = ()
    """What a config may have and PEFT itself passes over."""

    patterns: ClassVar[Mapping[str, str]] = {}
    """The settings that may differ from module to module, and where it is said in which."""

    adapts_tables: ClassVar[bool] = False
    """Whether PEFT adapts embedding tables by it."""

    only_bias: ClassVar[str] = "lora_only"
    """Its config's ``bias`` where those of the adapted modules are trained."""

    shared: ClassVar[tuple[str, ...]] = ()
    """The tensors that a file has once for all kernels."""

    @abstractmethod
    def to_config(self, method: Any) -> dict[str, Any]:
        """A method's settings in PEFT's words."""

    @abstractmethod
    def of_config(self, config: Mapping[str, Any], module: str) -> Method:
        """The method that a config gives a module, the inverse of `to_config`; an error of any kind
        where a value is none that the method allows."""

    def restored(self, config: Mapping[str, Any], module: str, tensors: Arrays) -> Arrays:
        """A module's tensors in the sizes that `of_config` gives it, where a file has smaller."""
        return tensors

    def gather(self, kernels: Mapping[str, Factors]) -> tuple[Arrays, Mapping[str, Factors]]:
        """The `shared` tensors, and the leaves of all kernels as they are beside those, by path."""
        return {}, kernels

    def least_shapes(self, method: Any, n_in: int, n_out: int) -> dict[str, tuple[int, int]]:
        """The smallest `shared` tensors that do for a kernel ``(in, out)``."""
        return {}

    def scatter(self, shared: Arrays, lead: tuple[int, ...], n_in: int, n_out: int) -> Arrays:
        """One kernel's own leaves that come from the `shared` tensors, ``lead`` axes before."""
        return {}
