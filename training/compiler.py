"""Compile phases in processes of their own while training goes on.

torch.compile keeps what it made in a cache on disk. A process that runs a phase of the same sizes
fills the cache; the process that trains then finds everything there, and needs seconds.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from utils import SIGNALS, num_cores


class CompilerProcesses:
    """Calls `compile_one(name, *args)` for each name, in up to `most` processes at a time."""

    def __init__(
        self, compile_one: Callable, names: Sequence[str], args: tuple[Any, ...], most: int
    ) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.compile_one, self.args, self.most = compile_one, args, most
        self.waiting, self.running = list(names), {}
        self.poll()

    def poll(self) -> dict[str, float]:
        """Start what may start. -> the names whose process has ended, and its seconds."""
        ended = {}
        for name, (child, started) in list(self.running.items()):
            if not child.is_alive():
                ended[name] = time.monotonic() - started
                del self.running[name]
        while self.waiting and len(self.running) < self.most:
            name = self.waiting.pop(0)
            threads = max(1, num_cores() // self.most)
            args = self.compile_one, threads, name, *self.args
            child = self.context.Process(target=run_quietly, args=args, daemon=True)
            child.start()
            self.running[name] = child, time.monotonic()
        return ended

    def stop(self) -> None:
        """Kill the processes."""
        self.waiting = []
        for child, _ in self.running.values():
            child.kill()
            child.join(5)
        self.running = {}


def run_quietly(compile_one: Callable, threads: int, name: str, *args: Any) -> None:
    """Body of a process: no output, no reaction to signals, which the process that trains gets.

    If it fails, the process that trains compiles the phase itself, and shows the error.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
    compile_one(name, *args)


def most_processes(device: torch.device) -> int:
    """How many processes may run a phase beside training: by cores and, on a GPU, by memory.

    Each needs as much GPU memory as this process has used up to now. 0: not even one.
    """
    most = max(1, num_cores() // 2)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        most = min(most, int(free // (1.1 * torch.cuda.max_memory_reserved(device) + 2**30)))
    return most
