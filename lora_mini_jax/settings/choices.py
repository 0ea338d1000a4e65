"""What more than one layer of the package chooses from; importing them needs no JAX."""

from typing import Literal

Remat = Literal["none", "dots", "dots_no_batch", "full"]
"""From the most memory to the least. ``"none"``: all is kept. ``"dots"``: the results of matrix
products. ``"dots_no_batch"``: those of linear layers alone, and not the attention's scores, which
grow with the square of the length. ``"full"``: nothing but the layer's input."""

Overlong = Literal["skip", "truncate", "error"]
"""What becomes of an example that is longer than may be."""

Bits = Literal["int8", "nf4"]
"""``"int8"``: one scale for each column. ``"nf4"``: QLoRA's four bits (arXiv 2305.14314), one
scale for each 64 entries of a column, or fewer where 64 does not divide it."""
