"""Samples of a generator: of numbered seeds for pictures, of fresh latents for measurements.

A numbered seed is one latent z, for all classes, and a position in the scan; it gets constant noise
and is computed alone. So on one machine the same seed always gives the same image.
"""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dataset
import utils
from modules import Generator, mixed_ws, switched

BATCH = 50  # images of fresh latents that are computed at a time

# Numbered seeds


def latents(seeds: list[int], z_dim: int) -> Tensor:
    """The latent of each seed. -> [N, z_dim]."""
    streams = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.cat([torch.randn(1, z_dim, generator=stream) for stream in streams])


def labels_of(G: Generator, labels: np.ndarray, seeds: list[int], position: float | None) -> Tensor:
    """c of class indices [N]. A G with positions gets `position`, or a random one per seed."""
    own = [np.random.default_rng(seed).random() for seed in seeds]
    positions = np.array(own if position is None else [position] * len(seeds))
    return utils.conditions(labels, positions if G.by_position else None, G.c_dim)


@torch.no_grad()
def images_of(G: Generator, ws: Tensor, bar: str | None = None) -> np.ndarray:
    """Images of ws [N, num_ws, w_dim], under a progress bar. -> uint8 [N, H, W].

    Batches of one image make every bit of an image independent of the other images.
    """
    parts = ws.to(next(G.parameters()).device).split(1)
    parts = tqdm(parts, bar, leave=False, unit="image", disable=bar is None)
    return np.concatenate([utils.to_uint8(G.synthesis(part, "const")) for part in parts])


@torch.no_grad()
def sample(
    G: Generator, z: Tensor, c: Tensor, psi: float = 1, cutoff: int | None = None,
    bar: str | None = None,
) -> np.ndarray:  # fmt: skip
    """Images of latents [N, z_dim] and labels [N, c_dim], as `images_of`. -> uint8 [N, H, W]."""
    return images_of(G, mapped(G, z, c, psi, cutoff), bar)


@torch.no_grad()
def mapped(G: Generator, z: Tensor, c: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """ws of latents [N, z_dim] and labels [N, c_dim], each computed alone."""
    device = next(G.parameters()).device
    pairs = zip(z.to(device).split(1), c.to(device).split(1), strict=True)
    return torch.cat([G.mapping(*pair, psi, cutoff) for pair in pairs])


def with_mixed_styles(
    ws: Tensor, others: Tensor, seeds: list[int], style_mixing_prob: float
) -> Tensor:
    """ws of seeds, of which a share switches to `others` at a layer, as in `modules.mixed_ws`.

    The share and the layers depend on the seeds only. All [N, num_ws, w_dim].
    """
    cutoffs = cutoffs_of(seeds, style_mixing_prob, ws.shape[1])
    return switched(ws, others, torch.from_numpy(cutoffs).to(ws.device)[:, None])


def cutoffs_of(seeds: list[int], style_mixing_prob: float, num_ws: int) -> np.ndarray:
    """The layer of each seed from which `with_mixed_styles` uses `others`; num_ws: none. -> [N]."""
    rngs = [np.random.default_rng(utils.stream_seed("style mixing", seed)) for seed in seeds]
    mixes = [rng.random() < style_mixing_prob for rng in rngs]
    return np.where(mixes, [rng.integers(1, num_ws) for rng in rngs], num_ws)


# Fresh latents


@torch.no_grad()
def sample_fakes(
    G: Generator, labels: np.ndarray, classes: list[str], seed: int,
    positions: np.ndarray | None = None, style_mixing_prob: float = 0, silent: bool = False,
) -> dataset.Slices:  # fmt: skip
    """Untruncated samples with new noise, one for each label, each a participant of its own.

    `positions` [n] are needed if G has positions. A share `style_mixing_prob` is made with style
    mixing.
    """
    device, images = next(G.parameters()).device, []
    conditioned = utils.conditions(labels, positions, G.c_dim)
    for start in tqdm(range(0, len(labels), BATCH), "sampling", unit="batch", disable=silent):
        torch.manual_seed(utils.stream_seed("evaluate", seed, start))
        c = conditioned[start : start + BATCH].to(device)
        z = torch.randn(len(c), G.z_dim, device=device)
        ws = mixed_ws(G, z, c, style_mixing_prob) if style_mixing_prob else G.mapping(z, c)
        images.append(utils.to_uint8(G.synthesis(ws)))
    participants = np.arange(len(labels)).astype(str)
    return dataset.Slices(np.concatenate(images), labels, participants, classes, positions)


def labels_in_proportion(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` labels in the proportions of the given labels."""
    return np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(int)]


def positions_like(slices: dataset.Slices, labels: np.ndarray, seed: int) -> np.ndarray | None:
    """For each label the position of a random slice of its class; None if slices have none."""
    if slices.positions is None:
        return None
    rng, positions = np.random.default_rng(seed), np.empty(len(labels))
    for label in np.unique(labels):
        own = slices.positions[slices.labels == label]
        positions[labels == label] = rng.choice(own, int((labels == label).sum()))
    return positions


@torch.no_grad()
def conditional_variation(G: Generator, seed: int, count: int = 64) -> dict[str, float]:
    """Standard deviation of a pixel, in grey levels, if only z, only the noise or only c changes.

    "z": in the class that z changes least. "noise": mean over the classes. "class": mean over 8
    latents; missing if there is one class.
    """
    device = next(G.parameters()).device
    num = G.c_dim // utils.NUM_POSITIONS if G.by_position else max(1, G.c_dim)
    positions = np.full(num, 0.5) if G.by_position else None
    torch.manual_seed(utils.stream_seed("variation", seed))
    z = torch.randn(count, G.z_dim, device=device)
    labels = utils.conditions(np.arange(num), positions, G.c_dim).to(device)

    def deviation(z: Tensor, c: Tensor, noise_mode: str = "const") -> float:
        """Over n images; z and c have n rows, or a single one for all images."""
        n = max(len(z), len(c))
        images = G(z.expand(n, -1), c.expand(n, -1), noise_mode=noise_mode)
        return float(images.std(0).mean() * 127.5)

    one = z[:1].expand(count, -1)
    found = {"z": np.min([deviation(z, c) for c in labels.split(1)])}
    found["noise"] = np.mean([deviation(one, c, "random") for c in labels.split(1)])
    if num > 1:
        found["class"] = np.mean([deviation(row, labels) for row in z[:8].split(1)])
    return {name: float(value) for name, value in found.items()}
