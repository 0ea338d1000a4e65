"""The options of a forecast: those of the run that it is of."""

from dataclasses import dataclass

from lora_mini_jax.options.finetune import Finetune


@dataclass(frozen=True)
class PlanStep(Finetune):
    """Forecast what a training step takes: memory on each device, FLOPs and communication.

    Takes the options of finetune; reads config.json only, and needs none of the devices. Compiles
    for CPUs, or with --tpu for a TPU slice.
    """

    tpu: str = ""
    """Compile for this TPU slice, such as v5e:4x4, by its own compiler: memory is then what that
    says, and a step that does not fit is an error. Needs libtpu, and no TPU."""
    json: bool = False
    """Print JSON instead of a table."""
