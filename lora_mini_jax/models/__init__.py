"""Models with readers and writers of Hugging Face folders; Flax Linen throughout.

Example:
    >>> import tempfile
    >>> import jax
    >>> model = GPT2(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))
    >>> params = model.init(jax.random.key(0), jax.numpy.array([[1, 2]]))["params"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/gpt2", model, params)           # transformers reads it too
    ...     model, params = load(f"{folder}/gpt2")
    >>> model.apply({"params": params}, jax.numpy.array([[1, 2]])).shape
    (1, 2, 32)
"""

from lora_mini_jax.models.bert import Bert
from lora_mini_jax.models.deberta import DebertaV2
from lora_mini_jax.models.deberta_config import DebertaV2Config
from lora_mini_jax.models.encoder_config import BertConfig, RobertaConfig, XLMRobertaConfig
from lora_mini_jax.models.gpt2 import GPT2
from lora_mini_jax.models.gpt2_config import GPT2Config
from lora_mini_jax.models.llama import Llama
from lora_mini_jax.models.llama_config import LlamaConfig
from lora_mini_jax.models.loading import load
from lora_mini_jax.models.roberta import Roberta, XLMRoberta
from lora_mini_jax.models.saving import save
from lora_mini_jax.models.t5 import T5
from lora_mini_jax.models.t5_config import T5Config

__all__ = [
    "GPT2",
    "T5",
    "Bert",
    "BertConfig",
    "DebertaV2",
    "DebertaV2Config",
    "GPT2Config",
    "Llama",
    "LlamaConfig",
    "Roberta",
    "RobertaConfig",
    "T5Config",
    "XLMRoberta",
    "XLMRobertaConfig",
    "load",
    "save",
]
