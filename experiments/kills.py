"""Runs whose processes are killed at random moments, again and again: what is lost, how they end.

    python -m experiments.kills

A tiny run is started in one process or two, its processes are killed (one of them, or all at once),
and it is started again in another number of processes: first always on the same mesh, then each
time on another. Writes ``results/kills.json``: for every kill the newest complete checkpoint before
it, the one that was found after it, and the step that the next start went on from; how many
committed steps were lost; and how the adapter in the end differs from that of a run that nobody
killed. Half an hour on one core.
"""

import multiprocessing
import os
import random
import re
import socket
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from safetensors.numpy import load_file

from lora_mini_jax.files import read_object, write_json
from lora_mini_jax.options import Finetune
from tests.runs import options as tiny

LAYOUTS = {
    "the same mesh": ((2, "data=2"), (1, "data=2")),
    "other meshes": ((2, "fsdp=4"), (1, "data=4"), (2, "data=2,tensor=2"), (1, "fsdp=2,tensor=2")),
}
"""For each run, the numbers of processes and the meshes that it is started with in turn."""
PRELOAD = [
    "lora_mini_jax.runs.finetune",
    "lora_mini_jax.cli",
    "orbax.checkpoint",
    "matplotlib.figure",
]
STARTING = 8.0
"""Seconds: about what a start takes until the first step."""
LEFT_ALONE = 10
"""Of so many kills, one leaves another process alone until it ends by itself."""


@dataclass(frozen=True)
class Options:
    """How many kills, and of which runs."""

    kills: int = 50
    """Of all runs together."""
    runs: tuple[str, ...] = tuple(LAYOUTS)
    seed: int = 0
    out: Path = Path(__file__).parent / "results" / "kills.json"


def main(options: Options) -> None:
    """The runs, one after the other."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(PRELOAD)
    # Runs that are not asked for stay as they were found before.
    found: dict[str, Any] = read_object(options.out)["runs"] if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        for name in options.runs:
            run = Run(fork, Path(home) / name.replace(" ", "-"), options.kills // len(options.runs))
            found[name] = run.killed(LAYOUTS[name], random.Random(options.seed))
            write_json(options.out, {"kills": sum(len(r["kills"]) for r in found.values()),
                                     "lost": sum(r["lost"] for r in found.values()),
                                     "runs": found})  # fmt: skip


class Run:
    """One run in a folder, started as often as it takes."""

    def __init__(self, fork: Any, home: Path, kills: int) -> None:
        home.mkdir()
        self.fork, self.home, self.kills = fork, home, kills
        self.given = tiny(home, max_steps=8 * kills, epochs=1e4, batch_size=8, save_every=2,
                          log_every=1, eval_every=7)  # fmt: skip

    def killed(self, layouts: Any, dice: random.Random) -> dict[str, Any]:
        """Kill and start again, let it end, and compare with runs that nobody kills."""
        rows, reached = [], 0
        for i in range(self.kills):
            row = self.one_kill(*layouts[i % len(layouts)], reached, dice, i % LEFT_ALONE == 0)
            went_on_from = row.pop("went_on_from")
            if rows:
                rows[-1]["next_went_on_from"] = went_on_from
            rows.append(row)
            assert row["before"] >= reached, f"checkpoint {reached} is gone: {row}"
            reached = row["after"]
            print(i, row, flush=True)
        self.ends("killed", *layouts[-1])
        rows[-1]["next_went_on_from"] = self.went_on_from()
        whole = [self.ends(f"whole {i}", *layout) for i, layout in enumerate(layouts[:2])]
        ours = self.leaves("killed")
        return {
            "kills": rows,
            "lost": sum(lost(row) for row in rows),
            "steps": self.given.max_steps,
            "difference": differences(ours, self.leaves(whole[0])),
            "difference_of_whole_runs": differences(*map(self.leaves, whole)),
            "largest": max(float(np.abs(leaf).max()) for leaf in ours.values()),
        }

    def one_kill(
        self, count: int, mesh: str, reached: int, dice: random.Random, alone: bool
    ) -> dict[str, Any]:
        """Start, kill at a random moment, and see what is there."""
        started = time.monotonic()
        processes = self.started("killed", count, mesh)
        if dice.random() < 0.3:
            time.sleep(dice.uniform(0, STARTING))  # perhaps before anything is trained
        else:
            while self.newest() == reached and any(p.is_alive() for p in processes):
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 1.0))  # somewhere in a few steps and their saves
        assert all(p.is_alive() for p in processes), f"it ended by itself: {self.said()}"
        victim = dice.randrange(count) if alone or dice.random() < 0.5 else None
        row = {"processes": count, "mesh": mesh, "victim": "all" if victim is None else victim}
        row["before"], began = self.newest(), time.monotonic()
        row["seconds"] = round(began - started, 1)
        for process in processes if victim is None else [processes[victim]]:
            process.kill()
        if alone and count > 1:
            for process in processes:
                process.join(300)
            row["others_ended_after"] = round(time.monotonic() - began, 1)
            row["exit_codes"] = [process.exitcode for process in processes]
        else:
            time.sleep(dice.uniform(0, 2.0))  # the others notice, or not yet
        for process in processes:
            process.kill()
            process.join()
        return row | {"after": self.newest(), "went_on_from": self.went_on_from()}

    def ends(self, name: str, count: int, mesh: str) -> str:
        """Let the run of that name train to its end; returns the name."""
        processes = self.started(name, count, mesh)
        for process in processes:
            process.join()
        assert [p.exitcode for p in processes] == [0] * count, self.said()
        return name

    def started(self, name: str, count: int, mesh: str) -> list[Any]:
        """The processes, each with its share of the mesh's devices."""
        devices = int(np.prod([int(size) for size in re.findall(r"\d+", mesh)]))
        given = replace(self.given, output_dir=str(self.home / name), mesh=mesh)
        if count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            given = replace(given, coordinator=address, processes=count)
        processes = []
        for i in range(count):
            own = replace(given, process=i) if count > 1 else given
            args = (own, devices // count, self.home)
            processes.append(self.fork.Process(target=work, args=args))
            processes[-1].start()
        return processes

    def newest(self) -> int:
        """The newest complete checkpoint of the run that is killed, or 0."""
        names = [path.name for path in (self.home / "killed" / "checkpoints").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def said(self) -> str:
        return (self.home / "said.txt").read_text()

    def went_on_from(self) -> int | None:
        """The step that the last start went on from, if it came so far."""
        found = re.search(r"going on from step (\d+)", self.said())
        return int(found[1]) if found else None

    def leaves(self, name: str) -> dict[str, np.ndarray]:
        """The adapter in the end."""
        return load_file(self.home / name / "adapter" / "adapter.safetensors")


def work(given: Finetune, devices: int, home: Path) -> None:
    """One process of a run; what process 0 says goes to a file."""
    first = given.process in (None, 0)
    with open(home / "said.txt" if first else os.devnull, "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    import jax

    from lora_mini_jax.cli import run

    jax.config.update("jax_num_cpu_devices", devices)
    # Compiled programs are kept between the processes, so that a start takes seconds.
    jax.config.update("jax_compilation_cache_dir", str(home / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    run(given)


def lost(row: dict[str, Any]) -> int:
    """Committed steps that were not there any more, or were not gone on from; a start that was
    killed before it read its checkpoint says nothing of that."""
    later = row["after"] if row["next_went_on_from"] is None else row["next_went_on_from"]
    return max(0, row["before"] - row["after"], row["after"] - later)


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest of all leaves."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


if __name__ == "__main__":
    main(tyro.cli(Options))
