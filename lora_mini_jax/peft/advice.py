"""What to do about files that cannot be read or written: most have a way out."""

from typing import Any

MERGE = "merge the adapter into its model in PEFT (merge_and_unload) and load that model"
UNTIE = (
    "the output head is the table of words here: give it numbers of its own in PyTorch "
    "(model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone()), "
    "model.config.tie_word_embeddings = False, model.save_pretrained), and load the adapter on that"
)
BIASES = (
    "of biases, PEFT trains those of no adapted module, of all of them or of the whole model: "
    "choose one of the three, or merge the adapter into the model (merge, then models.save)"
)
_PLAIN = (
    "PEFT makes a plain LoRA of it (model.save_pretrained(out, "
    "path_initial_model_for_weight_conversion=initial), initial being the folder of the adapter "
    "saved before its training), which is read here"
)
_PROJECTION = (
    "its random factors are not in the file: in PEFT make the model anew from this config with "
    "save_projection=True, new.load_state_dict(old.state_dict(), strict=False), and save that"
)


def way_out(name: str, value: Any) -> str:
    """What to do about a setting of ``adapter_config.json`` that is not supported.

    Example:
        >>> way_out("use_qalora", True) == MERGE
        True
    """
    if name == "save_projection":
        return _PROJECTION
    if name == "init_lora_weights" and str(value).startswith(("pissa", "olora")):
        return _PLAIN
    return MERGE
