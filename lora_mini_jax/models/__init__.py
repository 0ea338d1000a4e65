"""Models with readers and writers of Hugging Face folders; Flax Linen throughout."""

from lora_mini_jax.models.hub import load, save
from lora_mini_jax.models.llama import Llama
from lora_mini_jax.models.llama_config import LlamaConfig

__all__ = ["Llama", "LlamaConfig", "load", "save"]
