"""Records in, packed batches of tokens out, and the loss that reads such a batch.

The steps, each a plain function: ``read_records`` (files, folders, hub ids), ``load_tokenizer``,
``encode_records`` (text, prompt and completion, chat), ``pack`` (many examples to a row) and
``Batches`` (a pure function from the step to the batch); ``token_loss`` closes the circle. For
data larger than memory ``cache`` takes the same steps record by record, and keeps the rows on
disk. Whole text files, for pre-training, come in through ``find_texts`` and ``encode_texts``.
Texts with labels, for encoders, become rows in ``encode_labelled``; ``read_glue`` reads GLUE's.
"""

from lora_mini_jax.data.batches import Batches
from lora_mini_jax.data.encoded import Encoded
from lora_mini_jax.data.examples import Example, encode_records
from lora_mini_jax.data.fields import Fields
from lora_mini_jax.data.glue_files import read_glue
from lora_mini_jax.data.labels import (
    Labelled,
    class_names,
    class_numbers,
    encode_labelled,
    numbers,
)
from lora_mini_jax.data.loss import examples_right, next_tokens, summed, token_loss
from lora_mini_jax.data.packing import Packed, pack
from lora_mini_jax.data.records import read_records
from lora_mini_jax.data.texts import encode_texts, find_texts, hold_out, thinned
from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.data.tokenizer_folder import load_tokenizer

__all__ = [
    "Batches",
    "Encoded",
    "Example",
    "Fields",
    "Labelled",
    "Packed",
    "Tokenizer",
    "class_names",
    "class_numbers",
    "encode_labelled",
    "encode_records",
    "encode_texts",
    "examples_right",
    "find_texts",
    "hold_out",
    "load_tokenizer",
    "next_tokens",
    "numbers",
    "pack",
    "read_glue",
    "read_records",
    "summed",
    "thinned",
    "token_loss",
]
