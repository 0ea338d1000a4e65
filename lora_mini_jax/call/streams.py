"""The random streams of an NNX model, such as those of its dropout layers, in an adapted call.

A call begins with the streams as they were when the model was taken apart, and what it draws from
them is lost: left alone, every call would draw the same.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
from flax import nnx

from lora_mini_jax.errors import UserError


def reseed(model: nnx.Module, key: jax.Array) -> None:
    """Begin every stream of the model anew, each with a key of its own made from ``key``."""
    for number, stream in enumerate(_streams(model)):
        own, shape = jax.random.fold_in(key, number), stream.key.shape  # stacked layers have many
        stream.key.set_value(jax.random.split(own, shape) if shape else own)
        stream.count.set_value(jax.numpy.zeros(shape, "uint32"))


def refuse_to_draw(model: nnx.Module) -> None:
    """Make the streams of the model raise `UserError` where the model draws from them, but for
    those of initial states: recurrent layers ask them for a key, and then make zeros."""
    of_states = {id(value) for _, node in nnx.iter_graph(model)
                 if isinstance(node, nnx.RNN | nnx.RNNCellBase)
                 for value in vars(node).values()}  # fmt: skip
    for stream in (each for each in _streams(model) if id(each) not in of_states):
        stream.__class__ = _refusing(type(stream))


def _streams(model: nnx.Module) -> Iterator[Any]:
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.RngStream):
            yield node


@cache
def _refusing(kind: type) -> type:
    def refuse(self: Any) -> Any:
        raise UserError(
            f"this model draws random numbers ({self.tag}), and would draw the same in every call: "
            "give the call a dropout_key, or variables to be changed; to evaluate, call "
            "model.eval() before adapt"
        )

    return type(kind)(kind.__name__, (kind,), {"__call__": refuse})
