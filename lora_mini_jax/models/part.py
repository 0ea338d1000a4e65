"""What every model here is made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models.activations import ACTIVATIONS


class Part(nn.Module):
    """A piece of a model: its config, its dtypes, and the layers that all pieces are made of."""

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def args(self) -> tuple[Any, Any, Any]:
        """What a piece of this piece is made with."""
        return self.config, self.dtype, self.param_dtype

    @nn.nowrap
    def initializer(self, std: float | None) -> Any:
        """Of kernels and tables: normal, with the config's standard deviation unless one is
        given."""
        return nn.initializers.normal(self.config.initializer_range if std is None else std)

    @nn.nowrap
    def linear(
        self, name: str, features: int, *, bias: bool = True, std: float | None = None
    ) -> nn.Dense:
        """A projection."""
        return nn.Dense(
            features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype,
            kernel_init=self.initializer(std), name=name,
        )  # fmt: skip

    @nn.nowrap
    def table(
        self,
        name: str | None,
        rows: int,
        features: int | None = None,
        *,
        std: float | None = None,
        dtype: Any = None,
    ) -> nn.Embed:
        """A table of rows, as wide as the model and looked up in its dtype unless told."""
        return nn.Embed(
            rows, features or self.config.hidden_size, dtype=dtype or self.dtype,
            param_dtype=self.param_dtype, embedding_init=self.initializer(std), name=name,
        )  # fmt: skip

    @nn.nowrap
    def norm(self, name: str | None) -> nn.Module:
        """A layer norm: computed in float32, returned in ``dtype``."""
        # The fast variance, E[x^2] - E[x]^2, loses digits that torch keeps.
        return nn.LayerNorm(
            self.config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype,
            use_fast_variance=False, name=name,
        )  # fmt: skip

    @nn.nowrap
    def heads(self, x: jax.Array) -> jax.Array:
        """(batch, time, width) as (batch, time, heads, head_dim)."""
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

    @nn.nowrap
    def activate(self, x: jax.Array) -> jax.Array:
        """The config's activation."""
        return ACTIVATIONS[self.config.hidden_act](x)
