"""Adapters in and out of Hugging Face's PEFT: ``adapter_config.json`` and safetensors.

Neither torch nor PEFT is needed. What PEFT has too goes out as it is and comes back the same:
LoRA (rsLoRA, LoRA-FA), DoRA, AdaLoRA, MiSS and VeRA. Other products of thin matrices (LoRA-Mini,
LoRA-XS, PiSSA, OLoRA) become a plain LoRA of the same function.

Example:
    >>> import tempfile
    >>> import jax
    >>> from lora_mini_jax import LoRA, init, linen, select
    >>> from lora_mini_jax.models import GPT2, GPT2Config
    >>> model = GPT2(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    >>> tokens = jax.numpy.array([[1, 2]])
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> targets = linen.targets(model, params, tokens)
    >>> adapter = init(params, LoRA(rank=2), select(targets, "c_attn|c_fc"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/mine", adapter, params, names=names_of(model))   # for peft, vLLM, ...
    ...     back = load(f"{folder}/mine", params, targets, names=names_of(model))
    >>> convert(adapter, params, names=names_of(model))[1]["r"]                   # the config
    2
    >>> [site.target.path for site in back.sites] == [site.target.path for site in adapter.sites]
    True
"""

from lora_mini_jax.peft.export import convert, save
from lora_mini_jax.peft.load import from_state_dict, load
from lora_mini_jax.peft.names import Names, names_of

__all__ = ["Names", "convert", "from_state_dict", "load", "names_of", "save"]
