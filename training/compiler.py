"""Run the phases of training, and compile them, beside training in processes of their own.

torch.compile keeps what it made in a cache on disk. A process that runs a phase of the same sizes
fills the cache; the process that trains then finds everything there, and needs seconds.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from training import process
from utils import SIGNALS, first_line, num_cores, num_ranks, print_once

Stats = dict[str, Tensor]


class Phases:
    """Runs phases, each compiled into a forward and a backward graph or, with mode "off", as it is.

    `mode` is a value of config.compile. With "on" and "graphs" each phase is compiled at its first
    call, with "auto" in processes of their own, by `compile_one(name, config, c_dim)`, while it
    runs uncompiled. If compiling fails, a warning says why, once, and all phases run uncompiled
    from then on.
    """

    def __init__(
        self, mode: str, phases: Sequence[Callable] = (), compile_one: Callable | None = None
    ) -> None:
        self.phases, self.compile_one, self.graphs = phases, compile_one, mode == "graphs"
        self.calls: Counter[Callable] = Counter()  # of compiled phases, without an error
        self.cached: set[Callable] = set()  # phases that another process has compiled
        self.compiled: dict[Callable, Callable] = {}
        self.beside = mode == "auto"  # compilation beside training has yet to start
        self.processes: CompilerProcesses | None = None
        self.compiled_at: dict[str, int] = {}  # from which image on a phase runs compiled
        for phase in phases if mode in ("on", "graphs") else ():
            self.compile(phase)

    def compile(self, phase: Callable) -> None:
        """Let the next call of a phase compile it, or find it in the cache."""
        mode = "reduce-overhead" if self.graphs else None
        self.compiled[phase] = torch.compile(phase, dynamic=False, fullgraph=True, mode=mode)

    def compile_beside(self, state: Any) -> None:
        """After a step in mode "auto": start to compile, or use what has been compiled by now.

        The memory of a GPU may not do for another process; then this process compiles.
        """
        if self.beside:
            self.beside = False
            if not (most := most_processes(state.device)):
                for phase in self.phases:
                    self.compile(phase)
                return
            args, names = (state.config, state.G.mapping.c_dim), [p.__name__ for p in self.phases]
            self.processes = CompilerProcesses(self.compile_one, names, args, most)
            text = f"{min(most, len(names))} processes; training goes on meanwhile"
            print_once(f"compiling {', '.join(names)} in {text}")
        ended = self.processes.poll() if self.processes else {}
        for phase in self.phases:
            if phase.__name__ in ended:
                self.compile(phase)
                if (seconds := ended[phase.__name__]) is not None:
                    self.cached.add(phase)
                    text = f"compiled in {seconds:.0f} s, used from image {state.cur_nimg:,} on"
                    print_once(f"{phase.__name__}: {text}")
                self.compiled_at[f"{phase.__name__}_compiled_at"] = state.cur_nimg

    def close(self) -> None:
        """End the processes that still compile."""
        if self.processes:
            self.processes.stop()

    def __call__(self, phase: Callable, optimizer: Adam, seed: int, *args: Any) -> Stats:
        """One update by a phase, on its own random stream. -> statistics, averaged over ranks."""
        if phase in self.compiled and self.calls[phase] < (3 if self.graphs else 1):
            stats = self.first_call(phase, optimizer, seed, *args)
        else:
            stats = self.backward(phase, seed, *args)
        parameters = optimizer.param_groups[0]["params"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        process.average_over_ranks(gradients + list(stats.values()))
        stats[f"{phase.__name__}_grad"] = torch.nn.utils.get_total_norm(gradients)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return stats

    def first_call(self, phase: Callable, optimizer: Adam, seed: int, *args: Any) -> Stats:
        """`backward` of a phase that is compiled now, or found in the cache; graphs need a few.

        Without other processes it raises Stopped if it is asked to stop while it compiles.
        """
        cached, reason = phase in self.cached or self.calls[phase] > 0, ""
        told = (lambda _: None) if cached else print_once
        told(f"compiling {phase.__name__} ...")
        started = time.perf_counter()
        try:
            alone = self.processes is None and num_ranks() == 1
            with process.STOP.immediate() if alone else nullcontext():
                stats = self.backward(phase, seed, *args)
            told(f"compiled {phase.__name__} in {time.perf_counter() - started:.0f} s")
        except Exception as error:  # the compiler raises many types
            reason = f"{phase.__name__} cannot be compiled: {first_line(error)}"
        if reason:  # the error is gone, and with it the tensors of the first attempt
            print_once(f"warning: training goes on uncompiled, because {reason}")
            self.compiled, self.compiled_at = {}, {}
            self.close()
            optimizer.zero_grad(set_to_none=True)
            stats = self.backward(phase, seed, *args)
        self.calls[phase] += 1
        return stats

    def backward(self, phase: Callable, seed: int, *args: Any) -> Stats:
        """Leave the gradients of a phase in the parameters. -> its statistics."""
        torch.manual_seed(seed)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # earlier graphs' outputs may be overwritten
        loss, stats = self.compiled.get(phase, phase)(*args)
        loss.backward()
        return {name: value.detach().clone() for name, value in stats.items()}


class CompilerProcesses:
    """Calls `compile_one(name, *args)` for each name, in up to `most` processes at a time."""

    def __init__(
        self, compile_one: Callable, names: Sequence[str], args: tuple[Any, ...], most: int
    ) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.compile_one, self.args, self.most = compile_one, args, most
        self.waiting, self.running = list(names), {}
        self.threads = max(1, num_cores() // max(1, min(most, len(names))))
        self.poll()

    def poll(self) -> dict[str, float | None]:
        """Start what may start. -> seconds of each process that has ended; None if it failed."""
        ended = {}
        for name, (child, started) in list(self.running.items()):
            if not child.is_alive():
                ended[name] = None if child.exitcode else time.monotonic() - started
                del self.running[name]
        while self.waiting and len(self.running) < self.most:
            name = self.waiting.pop(0)
            args = self.compile_one, self.threads, name, *self.args
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

    If it fails, the process that trains compiles the phase itself, and says so.
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
