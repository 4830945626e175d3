"""How much memory a step needs, counted without a device before training starts."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import Config
from modules import MEMORY_FORMAT, Discriminator, Generator
from utils import num_ranks, print_once

COPIES = 8  # of G's and D's weights: themselves, gradients, Adam's moments, G_ema; 3 to spare
SPARE = 2**30  # bytes that CUDA itself and convolutions' workspaces take


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within and alive at a time, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def free(self, count: int) -> None:
        self.now -= count

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    count = self.seen[storage] = storage.nbytes()
                    self.now += count
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, count)
        return out


def bytes_of_step(
    g_main: Callable, config: Config, c_dim: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that a step needs whatever the batch, and for each image of this rank's share.

    `g_main` is the phase that needs most. It runs on the meta device: no values, no memory.
    """
    share = config.batch_size // num_ranks()
    with torch.device("meta"):
        G, D = (net(config, c_dim, dtype=dtype) for net in (Generator, Discriminator))
        nets = [net.to(memory_format=MEMORY_FORMAT) for net in (G, D.requires_grad_(False))]
        with MemoryCounter() as counter:
            real = torch.zeros(share, 1, *[config.img_resolution] * 2)
            g_main(*nets, real, torch.zeros(share, c_dim), config)[0].backward()
    fixed = sum(p.numel() * p.element_size() for net in nets for p in net.parameters()) * COPIES
    return fixed + SPARE, counter.peak // share


def warn_of_too_little(
    g_main: Callable, config: Config, c_dim: int, dtype: torch.dtype, free: int
) -> None:
    """Warn if a step needs more than the `free` bytes of a GPU, and name a batch that fits."""
    fixed, per_image = bytes_of_step(g_main, config, c_dim, dtype)
    share = config.batch_size // num_ranks()
    if (needed := fixed + per_image * share) > free:
        fitting = max(0, free - fixed) // per_image * num_ranks()
        text = f"a step needs about {needed / 2**30:.1f} GiB, and this GPU has {free / 2**30:.1f}"
        advice = f"batch_size = {fitting}" if fitting > num_ranks() else "a smaller channel_base"
        print_once(f"warning: {text} GiB free: {advice} would fit")
