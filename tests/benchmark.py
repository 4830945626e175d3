"""How fast training is on this machine, and what each choice brings: a table and a JSON file.

    python tests/benchmark.py                              # this machine's settings, all forms
    python tests/benchmark.py --resolutions 64 128 256     # a GPU: the full table
    python tests/benchmark.py --peer stylegan2-ada-pytorch # a clone of it, in the same run

Every row is a process of its own. Rows take turns, `repeats` times over, and ratios are taken
within a turn, since machines are noisy and shared. "naive" is the form most implementations have:
weights scaled per image and a grouped convolution, NCHW, float32, eager double backward. "share" is
the arithmetic of the networks (FLOPs of the dense form, a multiply-add being two) over the rate
that large matrix products of that precision reach on the same device, TF32 for float32 on a GPU.
On Linux CPUs all rows but "naive" and the peer reuse freed memory, as training does.
"""

import importlib.util
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[1]))

import modules
import train
from config import CPU, GPU, Config, UserError
from dataset import Slices, make_loader
from training.process import feature_dtype, keep_freed_memory, resolve_device, tune
from utils import run_command

PHASES = tuple(phase.__name__ for phase in train.PHASES)


@dataclass(frozen=True)
class Options:
    """What to measure. Widths and batch default to those of config.py for the device."""

    resolutions: tuple[int, ...] | None = None
    """Image sizes in pixels; None: that of config.py."""
    batch_size: int | None = None
    """Images per step."""
    channel_base: int | None = None
    """Feature maps times resolution."""
    channel_max: int | None = None
    """Most feature maps at any resolution."""
    w_dim: int | None = None
    """Width of z and w."""
    forms: tuple[str, ...] | None = None
    """Rows to measure, as named in the table; None: all that make sense on the device."""
    peer: Path | None = None
    """Folder of a clone of stylegan2-ada-pytorch, to be measured beside."""
    repeats: int = 3
    """Turns over all rows."""
    seconds: float = 1.0
    """Least time to measure each phase for, in each turn."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    out: Path = Path("benchmark.json")
    """File to write all figures to."""
    row: str | None = None
    """Internal: measure one row, given as JSON, and print its figures."""


class Form(NamedTuple):
    """One way to do the same training step."""

    precision: str
    memory_format: str
    compile: str
    naive: bool = False
    peer: bool = False
    reuse_memory: bool = True
    ada_p: float | None = None


FORMS = {
    "naive": Form("float32", "NCHW", "off", naive=True, reuse_memory=False),
    "naive, memory reused": Form("float32", "NCHW", "off", naive=True),
    "float32 NCHW": Form("float32", "NCHW", "off"),
    "float32 NHWC": Form("float32", "NHWC", "off"),
    "bfloat16 NCHW": Form("bfloat16", "NCHW", "off"),
    "bfloat16 NHWC, fresh memory": Form("bfloat16", "NHWC", "off", reuse_memory=False),
    "bfloat16 NHWC": Form("bfloat16", "NHWC", "off"),
    "float32 NHWC compiled": Form("float32", "NHWC", "on"),
    "bfloat16 NCHW compiled": Form("bfloat16", "NCHW", "on"),
    "bfloat16 NHWC compiled": Form("bfloat16", "NHWC", "on"),
    "float32 NHWC, ada p 0": Form("float32", "NHWC", "off", ada_p=0.0),
    "float32 NHWC, ada p 0.5": Form("float32", "NHWC", "off", ada_p=0.5),
    "bfloat16 NHWC compiled, ada p 0": Form("bfloat16", "NHWC", "on", ada_p=0.0),
    "bfloat16 NHWC compiled, ada p 0.5": Form("bfloat16", "NHWC", "on", ada_p=0.5),
    "float32 NHWC graphs": Form("float32", "NHWC", "graphs"),
    "bfloat16 NHWC graphs": Form("bfloat16", "NHWC", "graphs"),
    "peer float32": Form("float32", "NCHW", "off", peer=True),
    "peer float16": Form("float16", "NHWC", "off", peer=True),
}


# The naive form


def grouped_modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    demodulate: bool = True,
    up: bool = False,
    gain: float = 1,
) -> Tensor:
    """`modules.modulated_conv2d` as the paper writes it: weights of each image, N groups."""
    N, in_maps, H, W = x.shape
    out_maps, K = weight.shape[0], weight.shape[-1]
    w = weight * styles[:, None, :, None, None]  # [N, O, I, K, K]
    if demodulate:
        w = w * (gain * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt())
    x = x.reshape(1, N * in_maps, H, W)
    if up:
        w = w.transpose(1, 2).reshape(N * in_maps, out_maps, K, K)
        x = F.conv_transpose2d(x, w, stride=2, groups=N).view(N, out_maps, 2 * H + 1, 2 * W + 1)
        return fir_depthwise(x, padding=1, gain=4)
    x = F.conv2d(x, w.reshape(N * out_maps, in_maps, K, K), padding=K // 2, groups=N)
    return x.view(N, out_maps, H, W)


def r1_by_double_backward(D: modules.Discriminator, real: Tensor, c: Tensor) -> Tensor:
    """`train.r1_penalty` in eager autograd."""
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(D(real, c).sum(), real, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def path_lengths_by_double_backward(synthesis: modules.SynthesisNetwork, ws: Tensor) -> Tensor:
    """`train.path_lengths` in eager autograd."""
    img = synthesis(ws)
    noise = torch.randn_like(img) / math.sqrt(img.shape[2] * img.shape[3])
    (gradient,) = torch.autograd.grad((img * noise).sum(), ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


def fir_depthwise(x: Tensor, padding: int, gain: float = 1, stride: int = 1) -> Tensor:
    """[1, 3, 3, 1] as a grouped convolution, whose second derivative goes group by group."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = (gain * row.outer(row)).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


def filter_of_order_3(x: Tensor, order: int, padding: int, gain: float = 1) -> Tensor:
    """`modules.binomial_filter` where it is [1, 3, 3, 1]."""
    return fir_depthwise(x, padding, gain)


def downsample_by_stride(x: Tensor) -> Tensor:
    """`modules.downsample` as one strided filter."""
    return fir_depthwise(x, padding=1, stride=2)


def upsample_by_stride(x: Tensor) -> Tensor:
    """`modules.upsample` as one transposed filter; images have one channel."""
    row = torch.tensor([[1.0, 3.0, 3.0, 1.0]], device=x.device, dtype=x.dtype) / 4
    return F.conv_transpose2d(x, (row.T * row)[None, None], stride=2, padding=1)


def use_naive_form() -> None:
    modules.modulated_conv2d = grouped_modulated_conv2d
    modules.binomial_filter = filter_of_order_3
    modules.downsample, modules.upsample = downsample_by_stride, upsample_by_stride
    train.r1_penalty = r1_by_double_backward
    train.path_lengths = path_lengths_by_double_backward


# One row


def phase_arguments(
    G: modules.Generator, D: modules.Discriminator, config: Config, device: torch.device
) -> dict[str, tuple[Any, ...]]:
    """What each phase of train.py is called with: a batch of noise as real images."""
    N = config.batch_size
    real = torch.randn(N, 1, config.img_resolution, config.img_resolution, device=device)
    c = torch.eye(2, device=device)[torch.arange(N, device=device) % 2]
    return {
        "g_main": (G, D, real, c, config),
        "g_path": (G, c[: max(1, N // 2)], torch.zeros([], device=device), config),
        "d_main": (G, D, real, c, c, config),
        "d_r1": (G, D, real, c, torch.ones([], device=device), config),
    }


def per_image(costs: dict[str, float], config: Config) -> float:
    """Costs of the phases of a batch -> cost of a whole step, lazy penalties in share, an image."""
    step = costs["g_main"] + costs["d_main"] + costs.get("ema", 0)
    step += costs["g_path"] / config.pl_interval + costs["d_r1"] / config.r1_interval
    return step / config.batch_size


def our_phases(config: Config, form: Form, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Each phase with its optimizer step, ready to be called."""
    layout = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}[form.memory_format]
    modules.MEMORY_FORMAT = train.MEMORY_FORMAT = layout
    if form.naive:
        use_naive_form()
    if form.reuse_memory:
        keep_freed_memory(device)
    config = replace(config, precision=form.precision, compile=form.compile)
    if form.ada_p is not None:
        config = replace(config, augment="ada", ada_p=form.ada_p)
    state = train.TrainingState(config, 2, device)
    arguments = phase_arguments(state.G, state.D, config, device)

    def call(name: str) -> None:
        state.D.requires_grad_(name != "g_main")
        optimizer = state.g_opt if name[0] == "g" else state.d_opt
        state.phases(getattr(train, name), optimizer, 0, *arguments[name])

    phases = {name: lambda name=name: call(name) for name in PHASES}
    return phases | {"ema": lambda: train.ema_step(state)}


def mend_peer() -> None:
    """Lets it find the extensions that it builds, and do without two modules for other tasks."""
    from torch.utils import cpp_extension

    load = cpp_extension.load

    def load_and_keep(name: str, **kwargs: Any) -> Any:
        sys.modules[name] = load(name=name, **kwargs)
        return sys.modules[name]

    cpp_extension.load = load_and_keep
    version = {"parse_version": torch.torch_version.TorchVersion}
    for name, content in (("pkg_resources", version), ("requests", {})):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = SimpleNamespace(**content)


def peer_phases(
    config: Config, form: Form, device: torch.device, folder: Path
) -> dict[str, Callable[[], Any]]:
    """The phases of stylegan2-ada-pytorch, called as its own training loop calls them."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "training"]:
        del sys.modules[name]  # ours: the peer has a folder of the same name
    sys.path.insert(0, str(folder))
    mend_peer()
    from training.loss import StyleGAN2Loss
    from training.networks import Discriminator, Generator

    half_blocks = 4 if form.precision == "float16" else 0
    common = {"c_dim": 2, "img_resolution": config.img_resolution, "img_channels": 1}
    widths = {"channel_base": config.channel_base, "channel_max": config.channel_max}
    widths |= {"num_fp16_res": half_blocks, "conv_clamp": 256 if half_blocks else None}
    layout = {"fp16_channels_last": True} if half_blocks else {}
    G = Generator(
        z_dim=config.z_dim, w_dim=config.w_dim, mapping_kwargs={"num_layers": 8},
        synthesis_kwargs=widths | layout, **common,
    ).to(device).train().requires_grad_(False)  # fmt: skip
    last_block = {"mbstd_group_size": 4}
    D = Discriminator(block_kwargs=layout, epilogue_kwargs=last_block, **widths, **common)
    D = D.to(device).train().requires_grad_(False)
    loss = StyleGAN2Loss(device, G.mapping, G.synthesis, D, style_mixing_prob=0.9, r1_gamma=0.1)
    N = config.batch_size
    real = torch.randn(N, 1, config.img_resolution, config.img_resolution, device=device)
    c = torch.eye(2, device=device)[torch.arange(N, device=device) % 2]
    interval = {"Gmain": 4, "Greg": 4, "Dmain": 16, "Dreg": 16}
    optimizers = {
        net: torch.optim.Adam(net.parameters(), 0.0025, (0.0, 0.99), eps=1e-8) for net in (G, D)
    }

    def call(name: str) -> None:
        net = G if name[0] == "G" else D
        net.requires_grad_(True)
        z = torch.randn(N, config.z_dim, device=device)
        loss.accumulate_gradients(name, real, c, z, c, True, interval[name])
        net.requires_grad_(False)
        for p in net.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizers[net].step()
        optimizers[net].zero_grad(set_to_none=True)

    names = dict(zip(PHASES, ("Gmain", "Greg", "Dmain", "Dreg"), strict=True))
    return {ours: lambda theirs=theirs: call(theirs) for ours, theirs in names.items()}


def milliseconds(
    call: Callable[[], Any], seconds: float, device: torch.device, warm_up: int = 1
) -> float:
    """Median time of a call, called for at least so long."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(warm_up):
        call()
    wait()
    times: list[float] = []
    while not times or sum(times) < seconds:
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def measure_row(config: Config, form: Form, options: Options) -> dict[str, float]:
    """ms of each phase, ms per image of a whole step, peak memory in MB, seconds to build."""
    device = resolve_device(options.device)
    tune(device, Path("cache"))
    if form.peer:
        phases = peer_phases(config, form, device, options.peer)
    else:
        phases = our_phases(config, form, device)
    started = time.perf_counter()
    for call in phases.values():
        call()
    row = {"build_s": time.perf_counter() - started}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warm_up = 3 if form.compile == "graphs" else 1  # graphs are recorded at the second call
    for name, call in phases.items():
        row[name] = milliseconds(call, options.seconds, device, warm_up)
    row["s_per_kimg"] = per_image(row, config)  # ms for one are s for a thousand
    if device.type == "cuda":
        row["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        in_bytes = sys.platform == "darwin"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["memory_mb"] = peak / (2**20 if in_bytes else 2**10)
    return row


# What the rows are compared with


class FlopCounter(TorchDispatchMode):
    """Adds up the operations of convolutions and matrix products, inside torch.func too."""

    total = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops_per_image(config: Config) -> float:
    """Floating point operations of a step with its share of the penalties, for one image."""
    meta = torch.device("meta")
    G, D = modules.Generator(config, 2).to(meta), modules.Discriminator(config, 2).to(meta)
    costs = {}
    for name, arguments in phase_arguments(G, D, config, meta).items():
        D.requires_grad_(name != "g_main")
        with FlopCounter() as counter:
            getattr(train, name)(*arguments)[0].backward()
        costs[name] = counter.total
    return per_image(costs, config)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of a large square matrix product: the best of ten."""
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions do
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [milliseconds(lambda: a @ b, 0, device) for _ in range(10)]
    return 2 * size**3 / min(times) * 1000


def loader_rate(config: Config, seconds: float) -> float:
    """Images per second that the loader delivers, from its second batch on."""
    R, n = config.img_resolution, 4096
    images = np.random.default_rng(0).integers(0, 256, (n, R, R), dtype=np.uint8)
    slices = Slices(images, np.arange(n) % 2, np.arange(n) // 20, ["AD", "NC"])
    batches = iter(make_loader(slices, config, 0, 10**6 * config.batch_size))
    next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 3 * seconds or count < 50 * config.batch_size:
        count += len(next(batches)[0])
    return count / (time.perf_counter() - started)


def fir_shift_and_add(x: Tensor) -> Tensor:
    x, (H, W) = F.pad(x, [1] * 4), (x.shape[2] - 1, x.shape[3] - 1)
    x = (x[..., :W] + x[..., 3 : W + 3]) + 3 * (x[..., 1 : W + 1] + x[..., 2 : W + 2])
    x = (x[:, :, :H] + x[:, :, 3 : H + 3]) + 3 * (x[:, :, 1 : H + 1] + x[:, :, 2 : H + 2])
    return x / 16


def resampling_table(config: Config, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """ms, forward and backward, of an upsampling convolution with each form of its filter.

    The last form is another function, bilinear interpolation and a convolution at full size.
    """
    filters: dict[str, Callable[[Tensor], Tensor]] = {
        "depthwise": lambda x: fir_depthwise(x, padding=1, gain=4),
        "in use": lambda x: modules.binomial_filter(x, 3, padding=1, gain=4),
        "shift-and-add": fir_shift_and_add,
    }
    if device.type == "cuda":
        for name in ("in use", "shift-and-add"):
            filters[f"{name}, compiled"] = torch.compile(filters[name])
    rows = []
    for resolution in [2**i for i in range(4, config.img_resolution.bit_length())]:
        C = modules.channels(resolution, config.channel_base, config.channel_max)
        for precision in ("float32", "bfloat16"):
            for layout in (torch.contiguous_format, torch.channels_last):
                like = {"dtype": getattr(torch, precision), "memory_format": layout}
                x = torch.randn(config.batch_size, C, *[resolution // 2] * 2, device=device)
                x, w = x.to(**like), torch.randn(C, C, 3, 3, device=device).to(**like)
                x.requires_grad_(), w.requires_grad_()

                def both(forward: Callable[[], Tensor]) -> float:
                    return milliseconds(
                        lambda: forward().square().sum().backward(), seconds / 4, device
                    )

                def transposed(filter: Callable, x: Tensor = x, w: Tensor = w) -> Tensor:
                    return filter(F.conv_transpose2d(x, w.transpose(0, 1), stride=2))

                def interpolated(x: Tensor = x, w: Tensor = w) -> Tensor:
                    return F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), w, padding=1)

                row = {"resolution": resolution, "channels": C, "precision": precision}
                row["layout"] = "NHWC" if layout == torch.channels_last else "NCHW"
                for name, filter in filters.items():
                    row[name] = both(lambda f=filter, t=transposed: t(f))
                row["interpolate"] = both(interpolated)
                rows.append(row)
    return rows


# Tables


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def measured_rows(
    config: Config, names: list[str], options: Options
) -> dict[str, list[dict | None]]:
    """The figures of every form, `repeats` times, in turns, each from a fresh process.

    None for a turn that failed; forms that always do are left out.
    """
    found: dict[str, list[dict | None]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name in names:
            settings = {k: v for k, v in asdict(config).items() if not isinstance(v, Path)}
            row = json.dumps({"form": name, "settings": settings})
            command = [sys.executable, __file__, "--row", row, "--device", options.device]
            command += ["--seconds", str(options.seconds)]
            command += ["--peer", str(options.peer)] if options.peer else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            good = done.returncode == 0
            found[name].append(json.loads(done.stdout.splitlines()[-1]) if good else None)
    if not (rows := {name: turns for name, turns in found.items() if any(turns)}):
        raise UserError("every form failed")
    return rows


def report(config: Config, names: list[str], options: Options) -> dict[str, Any]:
    """Measure and print one resolution."""
    device = resolve_device(options.device)
    flops = flops_per_image(config)
    rates = {p: matrix_rate(getattr(torch, p), device) for p in ("float32", "bfloat16")}
    if device.type == "cuda":
        rates["float16"] = matrix_rate(torch.float16, device)
    print(
        f"\n{config.img_resolution} pixels, channel_base {config.channel_base}, channel_max "
        f"{config.channel_max}, w {config.w_dim}, batch {config.batch_size}: "
        f"{flops / 1e9:.2f} GFLOP an image; matrix rate "
        + ", ".join(f"{p} {rate / 1e12:.2f} TFLOP/s" for p, rate in rates.items())
    )
    rows, table = measured_rows(config, names, options), []
    for name, turns in rows.items():
        good = [turn for turn in turns if turn]
        middle = {key: statistics.median(turn[key] for turn in good) for key in good[0]}
        share = flops / (middle["s_per_kimg"] / 1000) / rates[FORMS[name].precision]
        pairs = zip(rows.get("naive", []), turns, strict=False)
        ratios = [a["s_per_kimg"] / b["s_per_kimg"] for a, b in pairs if a and b]
        shown = [f"{middle[phase]:.1f}" for phase in PHASES]
        table.append(
            [name, f"{1000 / middle['s_per_kimg']:.1f}", f"{middle['s_per_kimg']:.1f}", *shown,
             f"{middle['memory_mb']:.0f}", f"{share:.0%}",
             f"{min(ratios):.2f} - {max(ratios):.2f}" if ratios else "",
             f"{middle['build_s']:.0f}"]
        )  # fmt: skip
    header = ["form", "img/s", "s/kimg", *(f"{phase} ms" for phase in PHASES)]
    print_table([*header, "MB", "share", "times naive", "build s"], table)
    loading = loader_rate(config, options.seconds)
    ours = [turn for name, turns in rows.items() for turn in turns if not FORMS[name].peer]
    fastest = max((1000 / turn["s_per_kimg"] for turn in ours if turn), default=math.inf)
    print(
        f"loader, {config.num_workers} workers: {loading:.0f} img/s, {loading / fastest:.1f} times "
        "the fastest form"
    )
    return {"settings": {k: str(v) for k, v in asdict(config).items()}, "flops_per_image": flops,
            "matrix_rates": rates, "rows": rows, "loader_img_per_s": loading}  # fmt: skip


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def main() -> None:
    """Command line of this module."""
    options = tyro.cli(Options, description=__doc__)
    device = resolve_device(options.device)
    if options.row is not None:
        row = json.loads(options.row)
        figures = measure_row(Config(**row["settings"]), FORMS[row["form"]], options)
        print(json.dumps(figures))
        return
    on_cuda = device.type == "cuda"
    names = options.forms or tuple(
        name
        for name, form in FORMS.items()
        if (on_cuda or form.compile == "off" and form.precision != "float16")
        and (options.peer is not None or not form.peer)
    )
    if unknown := set(names) - FORMS.keys():
        raise UserError(f"forms = {sorted(unknown)}: must be among {list(FORMS)}")
    given = {"batch_size": options.batch_size, "channel_base": options.channel_base,
             "channel_max": options.channel_max, "z_dim": options.w_dim,
             "w_dim": options.w_dim}  # fmt: skip
    config = Config(**(GPU if on_cuda else CPU))
    given |= {"noise": True, "relativistic": False}  # as the peer
    config = replace(config, **{k: v for k, v in given.items() if v is not None})
    print(f"torch {torch.__version__}, {device_name(device)}, {date.today()}", flush=True)
    found = {
        "torch": torch.__version__,
        "device": device_name(device),
        "date": str(date.today()),
        "default_precision": str(feature_dtype(config, device)),
        "tables": [],
    }
    for resolution in options.resolutions or (config.img_resolution,):
        sized = replace(config, img_resolution=resolution)
        found["tables"].append(report(sized, list(names), options))
        options.out.write_text(json.dumps(found, indent=1))
    found["resampling"] = resampling_table(sized, device, options.seconds)
    keys = list(found["resampling"][0])
    print("\nms of an upsampling convolution, forward and backward, by the form of its filter")
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
             for row in found["resampling"]]  # fmt: skip
    print_table(keys, cells)
    options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
