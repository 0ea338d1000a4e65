"""Where does LoRA-Mini beat LoRA at an equal number of trained parameters?

    python -m experiments.sweep_e2e --model MODEL_DIR --data TRAIN.jsonl --valid VALID.jsonl
"""

import fcntl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.sweep_task import Options, Task
from lora_mini_jax.adapter import Adapter, draw, plan
from lora_mini_jax.files import read_json, write_json
from lora_mini_jax.methods import from_dict
from lora_mini_jax.tree import select
