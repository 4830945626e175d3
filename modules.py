"""StyleGAN2 for one-channel slices, conditional on the class, in plain PyTorch.

Notation: N images, C channels, H x W pixels, I inputs, O outputs, K kernel taps; `z` latents, `c`
one-hot labels, `w` intermediate latents, `ws` one w for every layer. Images are in [-1, 1].

References, numbered as in README.md up to [10]:
    [1] Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN, arXiv:1912.04958
    [2] Karras et al. 2019, A Style-Based Generator Architecture for GANs, arXiv:1812.04948
    [4] Karras et al. 2018, Progressive Growing of GANs, arXiv:1710.10196
    [5] Miyato and Koyama 2018, cGANs with Projection Discriminator, arXiv:1802.05637
    [6] Karras et al. 2020, Training Generative Adversarial Networks with Limited Data,
        arXiv:2006.06676
    [11] Zhang 2019, Making Convolutional Networks Shift-Invariant Again, arXiv:1904.11486
"""

import math
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Config

NoiseMode = Literal["random", "const", "none"]
ACTIVATION_GAIN = math.sqrt(2)  # keeps unit variance through a leaky ReLU
MEMORY_FORMAT = torch.channels_last  # layout of features and kernels: fast on CPUs, tensor cores
HIGH_RESOLUTION = 16  # pixels; features of this size and above have the dtype of their network


def normalize_2nd_moment(x: Tensor) -> Tensor:
    """Scale each row to unit mean square ([4], section 4.2). [N, C] -> [N, C]."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def channels(resolution: int, channel_base: int, channel_max: int) -> int:
    """Number of feature maps at a resolution: channel_base / resolution, 1 to `channel_max`."""
    return max(1, min(channel_base // resolution, channel_max))


def binomial_filter(x: Tensor, order: int, padding: int, gain: float = 1) -> Tensor:
    """Low-pass filter ([11]) with the taps [1, 2, 1] (order 2) or [1, 3, 3, 1] (order 3).

    The taps sum to `gain`. The filter adds shifted images along each axis; a compiler makes one
    pass of the sum and of its derivatives of any order. On a CPU a depthwise convolution is faster.
    [N, C, H, W] -> [N, C, H + 2p - order, W + 2p - order], p = `padding`.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        row = torch.tensor([math.comb(order, i) for i in range(order + 1)], dtype=x.dtype)
        kernel = row.outer(row * (gain / 4**order)).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, padding=padding, groups=x.shape[1])
    for axis in ([], [0, 0]):  # columns, rows
        shifts = [(padding - i, padding - order + i) for i in range(order + 1)]
        first, *middle, last = (F.pad(x, (*axis, *shift)) for shift in shifts)
        x = torch.add(first + last, reduce(torch.add, middle), alpha=order)
    return x * (gain / 4**order)


def upsample(x: Tensor) -> Tensor:
    """Zero insertion and [1, 3, 3, 1] of gain 4. [N, C, H, W] -> [N, C, 2H, 2W]."""
    # equal to repeating each pixel, then filtering with [1, 2, 1]
    return binomial_filter(F.interpolate(x, scale_factor=2), order=2, padding=1)


def downsample(x: Tensor) -> Tensor:
    """[1, 3, 3, 1] and decimation. [N, C, 2H, 2W] -> [N, C, H, W]."""
    # equal to filtering with [1, 2, 1], then averaging each pair
    return F.avg_pool2d(binomial_filter(x, order=2, padding=1), 2)


def sinc_matrix(size: int, reach: int = 3) -> Tensor:
    """Matrix that doubles the density of a row by windowed sinc interpolation. -> [2 size, size].

    Outside the row the signal is 0. The transpose, halved, filters sharply and decimates back.
    """
    t = (torch.arange(2 * size)[:, None] + 0.5) / 2 - 0.5 - torch.arange(size)
    weights = torch.sinc(t) * (t * (math.pi / 2 / reach)).cos().square() * (t.abs() < reach)
    return weights / weights[size].sum()


def leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2. The layer before it applies the gain, which commutes with it."""
    return F.leaky_relu(x, 0.2)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    demodulate: bool = True,
    up: bool = False,
    gain: float = 1,
) -> Tensor:
    """Convolution whose input channels are scaled per image by `styles` ([1], section 2.2).

    x [N, I, H, W], weight [O, I, K, K], styles [N, I] -> [N, O, H, W], or [N, O, 2H, 2W] with `up`,
    by a transposed convolution of stride 2 and the low-pass filter. `demodulate` divides each
    output map by the deviation that it would have if all inputs were independent with variance 1;
    nothing is measured. `gain` is that of the demodulated maps.

    The paper scales the weights of each image (equations 1 and 3). Scaling input and output gives
    the same result, y = d * conv(s * x, W) with d_o = gain * rsqrt(sum_i s_i^2 sum_k W_oik^2 +
    1e-8), and needs only one dense convolution for the whole batch.
    """
    x = x * styles.to(x.dtype)[:, :, None, None]
    kernel = weight.to(x.dtype)
    if up:
        x = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)  # [N, O, 2H + 1, 2W + 1]
        x = binomial_filter(x, order=3, padding=1, gain=4)  # [N, O, 2H, 2W]
    else:
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
    if demodulate:
        energy = styles.square() @ weight.square().sum((2, 3)).T  # [N, O]
        x = x * (gain * (energy + 1e-8).rsqrt()).to(x.dtype)[:, :, None, None]
    return x


class EqualizedLinear(nn.Module):
    """Fully connected layer with equalized learning rate ([4], section 4.1). [N, I] -> [N, O].

    Weights are stored with a deviation of 1 / `lr_multiplier` and scaled in `forward`. So Adam
    moves each layer, however wide, at the relative speed `lr_multiplier`: 1, or 0.01 in the mapping
    network ([2], appendix C).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        lr_multiplier: float = 1,
        bias_init: float = 0,
        gain: float = 1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_multiplier))
        self.weight_gain = gain * lr_multiplier / math.sqrt(in_features)
        self.bias_gain = gain * lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """[N, I] -> [N, O]."""
        gains = {"alpha": self.weight_gain, "beta": self.bias_gain}
        return torch.addmm(self.bias, x, self.weight.T, **gains)


class EqualizedConv2d(nn.Module):
    """Convolution with equalized learning rate ([4], section 4.1). [N, I, H, W] -> [N, O, H, W]."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, gain: float = 1, down: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = gain / math.sqrt(in_channels * kernel * kernel)
        self.bias_gain = gain
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H, W], or with `down` filtered, decimated [N, O, H / 2, W / 2]."""
        weight, padding = (self.weight * self.weight_gain).to(x.dtype), self.weight.shape[-1] // 2
        bias = (self.bias * self.bias_gain).to(x.dtype)
        if not self.down:
            return F.conv2d(x, weight, bias, padding=padding)
        if padding == 0:  # a 1x1 kernel commutes with the filter: decimating first is cheaper
            return F.conv2d(downsample(x), weight, bias)
        return F.conv2d(binomial_filter(x, order=3, padding=2), weight, bias, stride=2)


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU ([1], figure 2d).

    One noise image is added to all feature maps, to each with a strength of its own ([2], section
    2; [1] has one strength for all): so a map may carry noise, and the next layer may shape it,
    while others stay free of it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        noise: bool = True,
        up: bool = False,
    ) -> None:
        super().__init__()
        weight_gain = 1 / math.sqrt(in_channels * 9)  # the convolution's: styles carry it
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1, gain=weight_gain)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.up, self.noise = up, noise
        if noise:
            self.register_buffer("noise_const", torch.randn(1, 1, resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor, noise_mode: NoiseMode = "random") -> Tensor:
        """x [N, I, H, W], w [N, w_dim] -> [N, O, H, W], or twice the size with `up`."""
        gain = ACTIVATION_GAIN
        x = modulated_conv2d(x, self.weight, self.affine(w), True, self.up, gain)
        if self.noise and noise_mode != "none":
            noise = self.noise_const
            if noise_mode == "random":
                noise = torch.randn_like(x[:, :1], dtype=torch.float32)
            strength = (self.noise_strength * gain).to(x.dtype)[:, None, None]
            x = torch.addcmul(x, noise.to(x.dtype), strength)
        return leaky_relu(x + (self.bias * gain).to(x.dtype)[:, None, None])


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to image channels, without demodulation ([1], figure 7b)."""

    def __init__(self, in_channels: int, img_channels: int, w_dim: int) -> None:
        super().__init__()
        weight_gain = 1 / math.sqrt(in_channels)  # the convolution's: styles carry it
        self.affine = EqualizedLinear(w_dim, in_channels, bias_init=1, gain=weight_gain)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x [N, I, H, W], w [N, w_dim] -> [N, img_channels, H, W], linear."""
        x = modulated_conv2d(x, self.weight, self.affine(w), demodulate=False)
        return x.float() + self.bias[:, None, None]


class MinibatchStd(nn.Module):
    """Append one constant map: the deviation within a small group of images ([4], section 3).

    Its value is the standard deviation over the group, averaged over maps and pixels. A group has
    as many images as the largest divisor of N up to `group_size`. If there is none but 1, as for
    N = 25, an image is alone in its group, and the map says nothing.
    """

    def __init__(self, group_size: int = 4) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, x: Tensor, batches: int = 1) -> Tensor:
        """[N, C, H, W] -> [N, C + 1, H, W]. x holds equal `batches`; no group mixes them."""
        N, C, H, W = x.shape
        n = N // batches
        G = next(size for size in range(min(self.group_size, n), 0, -1) if n % size == 0)
        groups = x.reshape(N // G, G, C, H, W)
        std = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # [N / G]
        std = std[:, None].expand(-1, G).reshape(N, 1, 1, 1)
        return torch.cat([x, std.expand(N, 1, H, W)], 1)


class MappingNetwork(nn.Module):
    """Latents and labels to intermediate latents, by fully connected layers ([2], section 2).

    An embedding of the label is concatenated with z; both are normalized to unit second moment. The
    sum of the label's entries weighs the embedding: a label of zeros has no effect. With `c_dim` 0
    the network is unconditional and ignores c. `w_avg` [max(1, c_dim), w_dim] is the mean of w
    in each class: truncation draws w towards the typical image of its class.
    """

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, num_ws: int, num_layers: int = 8
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.num_ws = z_dim, c_dim, num_ws
        self.embed = EqualizedLinear(c_dim, z_dim) if c_dim else None
        widths = [z_dim * 2 if c_dim else z_dim] + [w_dim] * num_layers
        self.layers = nn.ModuleList(
            EqualizedLinear(i, o, lr_multiplier=0.01, gain=ACTIVATION_GAIN)
            for i, o in zip(widths, widths[1:], strict=False)
        )
        self.register_buffer("w_avg", torch.zeros(max(1, c_dim), w_dim))

    def map(self, z: Tensor, c: Tensor | None) -> Tensor:
        """z [N, z_dim], c [N, c_dim] -> w [N, w_dim]."""
        x = normalize_2nd_moment(z)
        if self.embed is not None:
            embedding = normalize_2nd_moment(self.embed(c)) * c.sum(1, keepdim=True)
            x = torch.cat([x, embedding], 1)  # [N, 2 z_dim]
        for layer in self.layers:
            x = leaky_relu(layer(x))
        return x

    def forward(
        self,
        z: Tensor,
        c: Tensor | None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
    ) -> Tensor:
        """z [N, z_dim], c [N, c_dim] -> ws [N, num_ws, w_dim], truncated before the cutoff."""
        ws = self.map(z, c)[:, None].expand(-1, self.num_ws, -1)
        if truncation_psi == 1:
            return ws
        w_avg = (self.w_avg if c is None or not self.c_dim else c @ self.w_avg)[:, None]
        psi = torch.ones(self.num_ws, 1, device=ws.device)
        psi[:truncation_cutoff] = truncation_psi
        return w_avg.lerp(ws, psi)

    @torch.no_grad()
    def estimate_w_avg(self, num_samples: int = 4096, seed: int = 0) -> None:
        """Estimate `w_avg` from new latents: it fits the averaged weights, and needs no state."""
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(num_samples, self.z_dim, generator=rng).to(self.w_avg.device)
        labels = torch.eye(self.c_dim, device=z.device) if self.c_dim else [None]
        for average, label in zip(self.w_avg, labels, strict=True):
            c = None if label is None else label.expand(num_samples, -1)
            average.copy_(self.map(z, c).mean(0))


class SynthesisBlock(nn.Module):
    """One resolution of the skip generator ([1], figure 7b): two layers (one at 4x4), a ToRGB."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: int,
        config: Config,
        img_channels: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype if resolution >= HIGH_RESOLUTION else torch.float32
        layer = (out_channels, config.w_dim, resolution, config.noise)
        self.conv0 = SynthesisLayer(in_channels, *layer, up=True) if resolution > 4 else None
        self.conv1 = SynthesisLayer(out_channels, *layer)
        self.torgb = ToRGB(out_channels, img_channels, config.w_dim)

    def forward(
        self, x: Tensor, img: Tensor | None, ws: Tensor, noise_mode: NoiseMode
    ) -> tuple[Tensor, Tensor]:
        """x [N, I, H, W], img at the same size, ws [N, 3, w_dim] -> both at [2H, 2W].

        The first block takes ws [N, 2, w_dim] and keeps the size.
        """
        x = x.to(self.dtype)
        if self.conv0 is not None:
            x = self.conv0(x, ws[:, 0], noise_mode)
        x = self.conv1(x, ws[:, -2], noise_mode)
        rgb = self.torgb(x, ws[:, -1])
        return x, rgb if img is None else upsample(img) + rgb


class SynthesisNetwork(nn.Module):
    """Intermediate latents to an image of fixed resolution, from a constant ([1], section 4).

    The first layer of a block shares its w with the ToRGB of the block before:
    num_ws = 2 log2(img_resolution) - 2.
    """

    def __init__(self, config: Config, img_channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        resolutions = [2**i for i in range(2, config.img_resolution.bit_length())]
        widths = [channels(r, config.channel_base, config.channel_max) for r in resolutions]
        self.num_ws = 2 * len(resolutions)
        self.const = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.blocks = nn.ModuleList(
            SynthesisBlock(i, o, resolution, config, img_channels, dtype)
            for i, o, resolution in zip(widths[:1] + widths, widths, resolutions, strict=False)
        )

    def forward(self, ws: Tensor, noise_mode: NoiseMode = "random") -> Tensor:
        """ws [N, num_ws, w_dim] -> images [N, img_channels, H, W]."""
        x, img = self.const.expand(len(ws), -1, -1, -1), None
        for i, block in enumerate(self.blocks):
            x, img = block(x, img, ws[:, max(0, 2 * i - 1) : 2 * i + 2], noise_mode)
        return img


class Generator(nn.Module):
    """Latents z and labels c to images, by mapping and synthesis network ([1], figure 2)."""

    def __init__(
        self, config: Config, c_dim: int, img_channels: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.by_position = config.z_dim, c_dim, config.condition_position
        self.synthesis = SynthesisNetwork(config, img_channels, dtype)
        sizes = (config.z_dim, c_dim, config.w_dim, self.synthesis.num_ws)
        self.mapping = MappingNetwork(*sizes, config.mapping_layers)

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "random",
    ) -> Tensor:
        """z [N, z_dim], c [N, c_dim] -> images [N, img_channels, H, W], about [-1, 1]."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, noise_mode)


def switched(first: Tensor, second: Tensor, cutoff: Tensor) -> Tensor:
    """ws of the first up to a layer, then of the second. [N, num_ws, w_dim] twice, [N, 1]."""
    from_first = torch.arange(first.shape[1], device=first.device) < cutoff  # [N, num_ws]
    return torch.where(from_first[:, :, None], first, second)


def mixed_ws(G: Generator, z: Tensor, c: Tensor, style_mixing_prob: float) -> Tensor:
    """Style mixing ([2], section 3.1): a share of the images switches to a second latent.

    z [N, z_dim], c [N, c_dim] -> ws [N, num_ws, w_dim].
    """
    both = G.mapping(torch.cat([z, torch.randn_like(z)]), torch.cat([c, c]))
    N, num_ws = len(z), both.shape[1]
    cutoff = torch.randint(1, num_ws, [N, 1], device=z.device)
    keep = torch.rand([N, 1], device=z.device) >= style_mixing_prob
    return switched(*both.chunk(2), cutoff.where(~keep, num_ws))


class DiscriminatorBlock(nn.Module):
    """Residual block with filtered downsampling ([1], figure 7c)."""

    def __init__(self, in_channels: int, out_channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.conv0 = EqualizedConv2d(in_channels, in_channels, 3, ACTIVATION_GAIN)
        half = math.sqrt(0.5)  # gain of each of the two summands; their sum keeps unit variance
        self.conv1 = EqualizedConv2d(in_channels, out_channels, 3, ACTIVATION_GAIN * half, True)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, half, True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, H / 2, W / 2]."""
        x = x.to(self.dtype)
        return leaky_relu(self.conv1(leaky_relu(self.conv0(x)))) + self.skip(x)


class Discriminator(nn.Module):
    """Images and labels to logits, high for real ([1], section 4.1; label projection of [5]).

    The logit is a linear function of `features`, plus the product of `features` and the label's
    embedding. Training applies `augment` to images before it calls D.
    """

    def __init__(
        self, config: Config, c_dim: int, img_channels: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.augment = AdaptiveAugment(config) if config.augment == "ada" else nn.Identity()
        self.dtype = dtype
        resolutions = [2**i for i in range(config.img_resolution.bit_length() - 1, 1, -1)]
        widths = [channels(r, config.channel_base, config.channel_max) for r in resolutions]
        self.fromrgb = EqualizedConv2d(img_channels, widths[0], 1, ACTIVATION_GAIN)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(i, o, dtype if r >= HIGH_RESOLUTION else torch.float32)
            for r, i, o in zip(resolutions, widths, widths[1:], strict=False)
        )
        self.mbstd = MinibatchStd()
        self.conv = EqualizedConv2d(widths[-1] + 1, widths[-1], 3, ACTIVATION_GAIN)
        self.fc = EqualizedLinear(widths[-1] * 16, widths[-1], gain=ACTIVATION_GAIN)
        self.out = EqualizedLinear(widths[-1], 1)
        self.embed = nn.Parameter(torch.randn(c_dim, widths[-1])) if c_dim else None

    def features(self, img: Tensor, batches: int = 1) -> Tensor:
        """Images [N, img_channels, H, W] -> [N, channels(4)]."""
        x = leaky_relu(self.fromrgb(img.to(self.dtype, memory_format=MEMORY_FORMAT)))
        for block in self.blocks:
            x = block(x)
        x = leaky_relu(self.conv(self.mbstd(x, batches)))
        return leaky_relu(self.fc(x.flatten(1)))

    def forward(self, img: Tensor, c: Tensor | None = None, batches: int = 1) -> Tensor:
        """Images [N, img_channels, H, W], labels [N, c_dim] -> logits [N].

        img holds equal `batches`, one after the other; each gets the logits that it has alone.
        """
        x = self.features(img, batches)
        logits = self.out(x)[:, 0]
        if self.embed is not None:
            logits = logits + (x * (c @ self.embed)).sum(1) / math.sqrt(x.shape[1])
        return logits


class AdaptiveAugment(nn.Module):
    """Random changes of all images that D sees, real or generated ([6]).

    Each kind of change is applied to each image with probability p. As no change is certain, G
    learns images without changes ([6], section 2.2). Only changes that leave a head a head are
    used: no up-down flip, no quarter turn, no hue. Images are in [-1, 1], with background -1; an
    image that is not chosen keeps every bit. Settings: config.ada_*.
    """

    P_MAX = 0.8  # above it some changes leak into the samples ([6], figure 3)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("p", torch.full([], config.ada_p or 0.0))
        self.register_buffer("sign_sum", torch.zeros([]))  # since the last change of p
        self.register_buffer("dense", sinc_matrix(config.img_resolution), persistent=False)

    def forward(self, img: Tensor) -> Tensor:
        """[N, C, R, R] -> [N, C, R, R]. Differentiable once."""
        if self.p.device.type == "cpu" and not torch.compiler.is_compiling() and self.p == 0:
            return img  # equal and faster; on a GPU, reading p would wait for the device
        img = torch.where(self.draw(img) < self.p * self.config.ada_flip, img.flip(3), img)
        for change in (self.shift, self.warp, self.contrast, self.brightness, self.noise, self.cut):
            img = change(img)
        return img

    def draw(self, img: Tensor, count: int = 1) -> Tensor:
        """Draw uniform numbers in [0, 1) for each image. -> [N, 1, 1, count]."""
        return torch.rand([len(img), 1, 1, count], device=img.device, dtype=img.dtype)

    def chosen(self, img: Tensor) -> Tensor:
        """Draw the images that a change is applied to. -> bool [N, 1, 1, 1]."""
        return self.draw(img) < self.p

    def normal(self, img: Tensor, deviation: float, count: int = 1) -> Tensor:
        """Draw normal numbers for each image; 0 for images not chosen. -> [N, 1, 1, count]."""
        value = torch.randn([len(img), 1, 1, count], device=img.device, dtype=img.dtype)
        return torch.where(self.chosen(img), value * deviation, 0)

    def shift(self, img: Tensor) -> Tensor:
        """Shift by whole pixels, up to `ada_translation` of the side."""
        N, C, H, W = img.shape
        most = round(self.config.ada_translation * W)
        drawn = (self.draw(img, 2) * (2 * most + 1)).long() - most
        rows, columns = torch.where(self.chosen(img), drawn, 0).split(1, 3)
        y = torch.arange(H, device=img.device)[:, None] - rows  # [N, 1, H, 1]
        x = torch.arange(W, device=img.device) - columns  # [N, 1, 1, W]
        moved = img.gather(2, y.clamp(0, H - 1).expand(N, C, H, W))
        moved = moved.gather(3, x.clamp(0, W - 1).expand(N, C, H, W))
        inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        return torch.where(inside, moved, -1)

    def warp(self, img: Tensor) -> Tensor:
        """Scale, rotate and shift by any distance, in one resampling at twice the density."""
        N, C, H, W = img.shape
        strength = self.config
        size = self.normal(img, strength.ada_scale)
        ratio = self.normal(img, strength.ada_anisotropy) / 2
        angle = (2 * self.draw(img) - 1) * math.radians(strength.ada_rotation)
        angle = torch.where(self.chosen(img), angle, 0)
        x, y = self.normal(img, 2 * strength.ada_translation, 2).split(1, 3)
        a, b = (-size - ratio).exp2(), (-size + ratio).exp2()  # inverse: from output to input
        cos, sin = angle.cos(), angle.sin()
        rows = torch.cat([a * cos, -a * sin, x, b * sin, b * cos, y], 3)  # [N, 1, 1, 6]
        grid = F.affine_grid(rows.view(N, 2, 3), [N, C, 2 * H, 2 * W], align_corners=False)
        warped = self.dense @ (img + 1) @ self.dense.T  # [N, C, 2H, 2W], background 0
        warped = F.grid_sample(warped, grid, align_corners=False)
        warped = self.dense.T @ warped @ self.dense / 4 - 1
        still = (size == 0) & (ratio == 0) & (angle == 0) & (x == 0) & (y == 0)
        return torch.where(still, img, warped)

    def contrast(self, img: Tensor) -> Tensor:
        """Multiply the distance of each pixel from the background by a factor."""
        log2 = self.normal(img, self.config.ada_contrast)
        return torch.where(log2 == 0, img, (img + 1) * log2.exp2() - 1)

    def brightness(self, img: Tensor) -> Tensor:
        """Add one number to all pixels."""
        return img + self.normal(img, self.config.ada_brightness)

    def noise(self, img: Tensor) -> Tensor:
        """Add white noise, with a strength drawn for each image."""
        return img + self.normal(img, self.config.ada_noise) * torch.randn_like(img)

    def cut(self, img: Tensor) -> Tensor:
        """Fill a square at a random place with background."""
        H, W = img.shape[2:]
        middle = self.draw(img, 2)
        y = torch.arange(H, device=img.device)[:, None] + 0.5
        x = torch.arange(W, device=img.device) + 0.5
        half = self.config.ada_cutout / 2
        inside = ((y / H - middle[..., :1]).abs() < half) & ((x / W - middle[..., 1:]).abs() < half)
        return torch.where(inside & self.chosen(img), -1, img)

    @torch.no_grad()
    def adapt(self, real_sign: Tensor, cur_nimg: int) -> None:
        """Raise p if D is too sure of real images, else lower it ([6], section 3).

        It is, if the mean sign of D(real) over `ada_interval` steps is above `ada_target`.
        `real_sign` is the mean of the step that just ended, over all ranks; `cur_nimg` counts the
        images seen, including that step.
        """
        config = self.config
        if config.ada_p is not None:
            return
        self.sign_sum += real_sign
        if cur_nimg // config.batch_size % config.ada_interval == 0:
            too_high = (self.sign_sum / config.ada_interval - config.ada_target).sign()
            images = config.batch_size * config.ada_interval
            self.p.add_(too_high * (images / (config.ada_kimg * 1000))).clamp_(0, self.P_MAX)
            self.sign_sum.zero_()
