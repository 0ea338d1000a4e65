"""Models with readers and writers of Hugging Face folders; Flax Linen throughout."""

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
