"""Rotary positions (RoPE) and the ways in which its frequencies are stretched for longer texts."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Rope = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class LinearRope:
    """All frequencies divided by ``factor``; names and units as in Hugging Face."""

    kind: ClassVar[str] = "linear"
    amplitude: ClassVar[float] = 1.0

    factor: float

    def __call__(self, inv_freq: np.ndarray, theta: float) -> np.ndarray:
        """The inverse frequencies (radians a token), scaled."""
        return inv_freq / self.factor


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretch of the slow rotary frequencies; names and units as in Hugging Face."""

    kind: ClassVar[str] = "llama3"
    amplitude: ClassVar[float] = 1.0

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, inv_freq: np.ndarray, theta: float) -> np.ndarray:
        """Scale inverse frequencies (radians a token): slow ones by 1/factor, fast ones not."""
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        fast = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return (1 - fast) * inv_freq / self.factor + fast * inv_freq


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071): slow frequencies stretched, and sharper attention.

    Between the dimensions that turn ``beta_fast`` and ``beta_slow`` times within the original
    positions the stretch grows linearly; ``truncate`` rounds these two dimensions outwards.
    ``attention_factor`` multiplies cosines and sines; None is the paper's ``0.1 ln(factor) + 1``.
    """

    kind: ClassVar[str] = "yarn"

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        given = self.attention_factor
        return temperature(self.factor) if given is None else given

    def __call__(self, inv_freq: np.ndarray, theta: float) -> np.ndarray:
        """Scale inverse frequencies (radians a token): slow ones by 1/factor, fast ones not."""
        width = 2 * len(inv_freq)

        def dimension(turns: float) -> float:
            """The one that turns so often within the original positions."""
            wave = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return width * math.log(wave) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        span = (high - low) or 0.001
        slow = np.clip((np.arange(width // 2, dtype=np.float32) - low) / span, 0.0, 1.0)
        return inv_freq / self.factor * slow + inv_freq * (1 - slow)


Scaling = LinearRope | Llama3Rope | YarnRope


def temperature(factor: float, weight: float = 1.0) -> float:
    """YaRN's amplitude of a stretch by ``factor``: ``0.1 weight ln(factor) + 1``."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def angles(positions: jax.Array, width: int, theta: float, scaling: Scaling | None = None) -> Rope:
    """Cosines and sines (batch, time, 1, width) float32 for int positions (batch, time).

    Args:
        positions: (batch, time) int32.
        width: of a head, even.
        theta: the base of the wavelengths.
        scaling: how they are stretched.

    Example:
        >>> cos, sin = angles(jnp.arange(3)[None], width=4, theta=10000.0)
        >>> cos.shape, float(sin[0, 0, 0, 0])
        ((1, 3, 1, 4), 0.0)
    """
    inv_freq = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width)
    if scaling is not None:
        inv_freq = scaling(inv_freq, theta)
    turned = positions[..., None].astype(jnp.float32) * inv_freq.astype(np.float32)
    turned = jnp.concatenate([turned, turned], axis=-1)[:, :, None, :]
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return amplitude * jnp.cos(turned), amplitude * jnp.sin(turned)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Heads (batch, time, heads, width) turned by `angles`, in float32, returned as they came."""
    cos, sin = rope
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    # Halves, not neighbours: Hugging Face permutes Meta's weights for this layout.
    half = jnp.concatenate([-high, low], axis=-1)
    return (jnp.concatenate([low, high], axis=-1) * cos + half * sin).astype(x.dtype)
