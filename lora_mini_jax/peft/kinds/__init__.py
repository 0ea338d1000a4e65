"""The kinds of adapters that PEFT has and we have too. A new one is its own file and one line here.

Example:
    >>> from lora_mini_jax.methods import LoRA
    >>> kind_of(LoRA(rank=4)).peft_type
    'LORA'
"""

from lora_mini_jax.method import Method
from lora_mini_jax.peft.kinds.adalora import AdaLoraKind
from lora_mini_jax.peft.kinds.kind import Kind
from lora_mini_jax.peft.kinds.lora import LoraKind
from lora_mini_jax.peft.kinds.miss import MissKind
from lora_mini_jax.peft.kinds.vera import VeraKind

KINDS: dict[str, Kind] = {
    kind.peft_type: kind for kind in (LoraKind(), AdaLoraKind(), MissKind(), VeraKind())
}
_BY_METHOD = {method: kind for kind in KINDS.values() for method in kind.leaves}


def kind_of(method: Method) -> Kind | None:
    """The kind that a method is in PEFT; None where PEFT has no such method."""
    return _BY_METHOD.get(type(method))
