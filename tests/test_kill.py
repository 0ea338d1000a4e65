"""A run that is killed and started again ends with the same adapter, bit for bit."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from lora_mini_jax.options import Finetune
from tests.runs import options

KILLS = 12
PRELOAD = ["lora_mini_jax.runs.finetune", "orbax.checkpoint", "matplotlib.figure", "tests.runs"]


def run(given: Finetune, cache: str) -> None:
    """One process of the run, from its start to its end or its killing."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    import jax

    # Compiled programs are kept between the processes, so that a start takes seconds.
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from lora_mini_jax.runs.finetune import finetune

    finetune(given, say=lambda line: None)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_with_the_same_adapter(tmp_path):
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(PRELOAD)
    common = {"max_steps": 120, "epochs": 1e3, "save_every": 1, "log_every": 1, "eval_every": 7,
              "samples": 0}  # fmt: skip
    whole = options(tmp_path, output_dir=str(tmp_path / "whole"), **common)
    broken = options(tmp_path, output_dir=str(tmp_path / "broken"), **common)
    checkpoints = tmp_path / "broken" / "checkpoints"

    def start(given: Finetune):
        process = fork.Process(target=run, args=(given, str(tmp_path / "cache")))
        process.start()
        return process

    reference = start(whole)
    reference.join()
    assert reference.exitcode == 0

    dice, reached = random.Random(0), [0]
    for _ in range(KILLS):
        process = start(broken)
        if dice.random() < 0.3:
            time.sleep(dice.uniform(0, 4))  # perhaps while it is still starting
        else:
            while process.is_alive() and newest(checkpoints) == reached[-1]:
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.7))  # somewhere in a few steps and their saves
        assert process.is_alive(), f"it ended before it could be killed: {reached}"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(newest(checkpoints))
    last = start(broken)
    last.join()
    assert last.exitcode == 0
    assert len(set(reached)) > KILLS // 2, f"the kills did not fall into training: {reached}"
    assert files(tmp_path / "broken" / "adapter") == files(tmp_path / "whole" / "adapter")


def newest(folder: Path) -> int:
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(steps, default=0)
