"""Adapters in and out of Hugging Face's PEFT: ``adapter_config.json`` and safetensors.

save(folder, adapter, params, names=names_of(model))          # for peft, transformers, vLLM
adapter = load(folder, params, targets, names=names_of(model))  # from PeftModel.save_pretrained
adapter = from_state_dict(tensors, params, targets, alpha=16, names=names)   # from anything else

Neither torch nor PEFT is needed. What PEFT has too goes out as it is and comes back the same:
LoRA (rsLoRA, LoRA-FA), DoRA, AdaLoRA, MiSS and VeRA. Other products of thin matrices (LoRA-Mini,
LoRA-XS, PiSSA, OLoRA) become a plain LoRA of the same function.
"""

from lora_mini_jax.peft.export import convert, save
from lora_mini_jax.peft.load import from_state_dict, load
from lora_mini_jax.peft.names import Names, names_of

__all__ = ["Names", "convert", "from_state_dict", "load", "names_of", "save"]
