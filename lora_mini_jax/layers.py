"""Which layer of the model a kernel belongs to, by its path; a softmax over each layer; and many
paths in few words."""

import re
from collections.abc import Collection, Iterable

import jax
import jax.numpy as jnp
import numpy as np

_LAYER = re.compile(r"((^|_)|layers?|blocks?|stages?|^h)\d+$")


def first(path: str) -> str:
    """The top module of a parameter.

    Example:
        >>> first("encoder/layer_0/kernel")
        'encoder'
    """
    return path.split("/")[0]


def place(path: str) -> tuple[str, str]:
    """The row and column of a kernel where a model is seen as layers by modules.

    The row is the layer: the path up to the first name that is a number, or a word and a number
    (``h_3``, ``layer3``; of a model's name, ``gpt2``, that is not so); empty where there is none.
    The column is the path without that name.

    Example:
        >>> place("gpt2/h_3/mlp/c_fc/kernel")
        ('gpt2/h_3', 'gpt2/mlp/c_fc/kernel')
    """
    names = path.split("/")
    layer = next((i for i, name in enumerate(names) if _LAYER.search(name)), None)
    if layer is None:
        return "", path
    return "/".join(names[: layer + 1]), "/".join(names[:layer] + names[layer + 1 :])


def softmax(scores: dict[str, jax.Array], stacked: Collection[str]) -> dict[str, jax.Array]:
    """``N softmax`` over the ``N`` numbers that each layer has, in the arrays' own shapes.

    Args:
        scores: float32 by kernel path, any shape.
        stacked: the paths of arrays whose first axis counts layers.

    Example:
        >>> scores = {"layers_0/q/kernel": jnp.zeros(()), "layers_0/v/kernel": jnp.zeros(3)}
        >>> even = softmax(scores, ())
        >>> even["layers_0/v/kernel"].tolist()
        [1.0, 1.0, 1.0]
    """
    rows: dict[tuple[str, int], dict[str, jax.Array]] = {}
    for path, score in scores.items():
        row, _ = place(path)
        layers = score.shape[0] if path in stacked else 1
        rows.setdefault((row, layers), {})[path] = score.reshape(layers, -1)
    found = {}
    for row in rows.values():
        powers = jnp.concatenate(list(row.values()), axis=1)
        powers = jnp.exp(powers - powers.max(axis=1, keepdims=True))
        shares = powers / powers.mean(axis=1, keepdims=True)  # of equal scores exactly 1
        ends = np.cumsum([score.shape[1] for score in row.values()])[:-1]
        for path, share in zip(row, jnp.split(shares, ends, axis=1), strict=True):
            found[path] = share.reshape(scores[path].shape)
    return found


def brief(lines: Iterable[str], between: str = ", ", most: int = 16) -> str:
    """Paths, or what is said of some, in few words: those that differ in the number of a layer
    alone as one, and no more than ``most``.

    Example:
        >>> brief(["layers_0/up/kernel", "layers_0/down/kernel", "layers_1/up/kernel"])
        'layers_*/up/kernel, layers_0/down/kernel'
    """
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(re.sub(r"(?<=_)\d+(?=/)", "*", line), []).append(line)
    said = [name if len(same) > 1 else same[0] for name, same in alike.items()]
    more = f" and {len(said) - most} more" if len(said) > most else ""
    return between.join(said[:most]) + more
