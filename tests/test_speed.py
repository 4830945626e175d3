"""What a step costs: operations, precision, compilation; and the same code on CUDA."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, needs_cuda, phase_calls, phase_gradients, step_inputs
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train as training
from config import CPU, GPU, Config
from modules import Discriminator, Generator
from train import PHASES, Phases, TrainingState, d_r1, g_main, g_path, train, train_step
from training import compiler
from training.compiler import CompilerProcesses
from training.logs import STATS, read_log
from training.memory import MemoryCounter, bytes_of_step, warn_of_too_little
from training.process import feature_dtype, tune
from utils import run_command

ROOT = Path(__file__).parents[1]

WIDTHS = (64, 512)  # of channel_max, at the settings for a GPU: 256 pixels


# Operations


class OperationCounter(TorchDispatchMode):
    """Counts every operation that reaches the device, backward passes included, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.kernels: set[int] = set()  # sides of the kernels of convolutions

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[name := func._overloadpacket.__name__] += 1
        if name in ("convolution", "convolution_backward"):
            self.kernels.add(args[1 if name == "convolution" else 2].shape[-1])
        return func(*args, **(kwargs or {}))


def gpu_calls(device: str, **settings: int) -> Iterator[tuple[Callable, tuple]]:
    """Each phase and its arguments at the settings for a GPU: no values, no memory, no GPU."""
    config = Config(**GPU | settings)
    with torch.device(device):
        G, D = (net(config, 2, dtype=torch.bfloat16) for net in (Generator, Discriminator))
        real = torch.zeros(config.batch_size, 1, *[config.img_resolution] * 2)
        c = torch.zeros(config.batch_size, 2)
    for phase, (_, args) in phase_calls(G, D, real, c, config).items():
        D.requires_grad_(phase is not g_main)
        yield phase, args


def operations(channel_max: int) -> dict[str, Counter[str]]:
    """Operations of each phase and of its gradients, by name."""
    found = {}
    for phase, args in gpu_calls("meta", channel_max=channel_max):
        with OperationCounter() as counter:
            phase(*args)[0].backward()
        found[phase.__name__] = counter.counts
        assert counter.kernels == {1, 3}, phase  # none as large as an image
    return found


def test_operations_are_few_and_their_number_does_not_depend_on_the_width():
    found = operations(channel_max=512)
    assert found == operations(channel_max=64)
    limits = {"g_main": 3000, "g_path": 3850, "d_main": 1700, "d_r1": 1600}
    for name, counts in found.items():
        assert counts.total() <= limits[name], counts.most_common(8)
        assert sum(n for kind, n in counts.items() if "conv" in kind) <= 100, name


def test_second_derivatives_do_not_go_channel_by_channel_on_a_cpu(config: Config):
    found = []
    for width in (8, 32):
        state, real, c = step_inputs(replace(config, channel_max=width, channel_base=512))
        counts = {}
        for phase in (g_path, d_r1):
            _, args = phase_calls(state.G, state.D, real, c, config)[phase]
            with OperationCounter() as counter:
                phase(*args)[0].backward()
            counts[phase.__name__] = counter.counts
        found.append(counts)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("conv", "shape", "how"),
    [
        (F.conv2d, (4, 3, 3, 3), {"padding": 1}),
        (F.conv2d, (4, 3, 3, 3), {"stride": 2}),
        (F.conv2d, (3, 1, 2, 2), {"groups": 3, "dilation": 2}),
        (F.conv_transpose2d, (3, 4, 3, 3), {"stride": 2}),
        (F.conv1d, (2, 3, 3), {"padding": 1}),  # as many outputs as images
    ],
)
def test_second_derivatives_of_convolutions_are_right(conv, shape, how):
    bias = torch.randn(shape[1] if conv is F.conv_transpose2d else shape[0]).double()
    x = torch.randn(2, 3, *[6] * (len(shape) - 2)).double()
    values = [value.requires_grad_() for value in (x, torch.randn(shape).double(), bias)]
    assert torch.autograd.gradgradcheck(lambda *a: conv(*a, **how), values, fast_mode=True)
    with OperationCounter() as counter:  # of PyTorch's own formula, a kernel is as large as x
        y = conv(*values, **how).square().sum()
        first = torch.autograd.grad(y, values[0], create_graph=True)[0]
        first.square().sum().backward()
    assert counter.kernels == {shape[-1]}


def graph_nodes(channel_max: int, names: tuple[str, ...]) -> dict[str, int]:
    """Nodes of the forward and backward graphs that the compiler is given for each phase.

    At 32 pixels: each further doubling adds the same blocks, and seconds of tracing.
    """
    nodes: Counter[str] = Counter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for phase, args in gpu_calls("cpu", channel_max=channel_max, img_resolution=32):
            if phase.__name__ not in names:
                continue

            def count(graph, _inputs, name=phase.__name__):
                nodes[name] += len(graph.graph.nodes)
                return graph.forward

            compilers = {"fw_compiler": count, "bw_compiler": count}
            backend = aot_autograd(**compilers, decompositions=select_decomp_table())
            compiled = torch.compile(phase, backend=backend, fullgraph=True, dynamic=False)
            compiled(*args)[0].backward()
    return dict(nodes)


NODES = {"g_main": 2600, "g_path": 2700, "d_main": 1600, "d_r1": 1450}  # at most


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_what_the_compiler_is_given_is_small(fresh_compiler):
    assert 0 < graph_nodes(512, ("d_main",))["d_main"] <= NODES["d_main"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_what_the_compiler_is_given_of_any_phase_does_not_depend_on_the_width(fresh_compiler):
    found = graph_nodes(512, tuple(NODES))
    assert all(0 < found[name] <= limit for name, limit in NODES.items()), found
    torch.compiler.reset()
    assert graph_nodes(64, ("d_r1",)) == {"d_r1": found["d_r1"]}


# Gradients, compiled and in bfloat16


def noisy_state(config: Config):
    """A state in which noise has a strength, as after some training."""
    state, real, c = step_inputs(config)
    for name, p in state.G.named_parameters():
        if name.endswith("noise_strength"):
            p.data.fill_(0.1)
    return state, real, c


def one_block(config: Config):
    """Networks of 8 pixels, which have a block and everything else once: they compile in less."""
    object.__setattr__(config, "img_resolution", 8)  # no setting, as nobody trains it
    state, real, c = noisy_state(config)
    return state, real[:, :, :8, :8].contiguous(), c


SLOW = pytest.mark.slow
FORMS = [  # one of them quickly
    pytest.param(phase, relativistic, marks=[] if phase is d_r1 and not relativistic else SLOW)
    for phase in PHASES
    for relativistic in ((False,) if phase is g_path else (False, True))
]


@pytest.mark.parametrize(("phase", "relativistic"), FORMS)
def test_every_phase_is_one_graph_with_the_gradients_it_has_uncompiled(
    config, fresh_compiler, phase, relativistic
):
    """Traced and differentiated by the compiler's front end, run by its reference backend."""
    config = replace(config, augment="ada", ada_p=0.5, relativistic=relativistic)
    state, real, c = one_block(config)
    expected = phase_gradients(state, real, c, Phases("off").backward, (phase,))
    traced = Phases("off")
    options = {"backend": "aot_eager", "fullgraph": True, "dynamic": False}
    traced.compiled = {phase: torch.compile(phase, **options)}
    found = phase_gradients(state, real, c, traced.backward, (phase,))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected[phase.__name__].abs().max() > 0


def first_call_of_r1(config: Config) -> tuple[list[torch.Tensor], dict[str, int]]:
    """In a process of its own: gradients of R1 by the default compiler, what its cache counted."""
    tune(torch.device("cpu"), config.cache)
    state, real, c = one_block(config)
    phases = Phases("on", (d_r1,))
    phases.first_call(d_r1, state.d_opt, 1, state.G, state.D, real, c, torch.tensor(1.0), config)
    assert d_r1 in phases.compiled and Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).exists()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in state.D.parameters()]
    counters = torch._dynamo.utils.counters
    names = {"inductor": "fxgraph_cache_miss", "aot_autograd": "autograd_cache_miss"}
    return gradients, {k: counters[k][name] for k, name in names.items()}


def test_a_process_that_cannot_compile_does_not_end_well(config: Config, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(RuntimeError, match="d_r1 could not be compiled"):
        training.compile_phase("d_r1", config, 2)


def write_name(name: str, folder: Path, seconds: float) -> None:
    """Stands for a compiler: it ends well, or by an error, or is killed."""
    (folder / f"{name}.{time.time()}").touch()
    print("not to be seen")
    time.sleep(seconds)
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "broken":
        raise RuntimeError(name)


@pytest.mark.slow
def test_processes_compile_side_by_side_and_every_end_is_noticed(tmp_path: Path, capfd):
    names = ["a", "killed", "broken", "b"]
    processes = CompilerProcesses(write_name, names, (tmp_path, 0.0), most=2)
    ended: dict[str, float | None] = {}
    while len(ended) < len(names):
        assert len(processes.running) <= 2
        ended |= processes.poll()
        time.sleep(0.05)
    assert ended.keys() == set(names) and len(list(tmp_path.iterdir())) == 4
    assert [ended[name] is None for name in names] == [False, True, True, False]
    assert processes.poll() == {} and capfd.readouterr() == ("", "")
    waiting = CompilerProcesses(write_name, names, (tmp_path, 60.0), most=1)
    ((child, _),) = waiting.running.values()
    started = time.monotonic()
    waiting.stop()
    assert not child.is_alive() and time.monotonic() - started < 5 and waiting.poll() == {}


def test_as_many_processes_compile_as_cores_and_memory_allow(monkeypatch):
    found = []
    for cores, free in ((1, 80), (2, 80), (16, 80), (16, 20), (16, 5)):
        monkeypatch.setattr(compiler, "num_cores", lambda c=cores: c)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, f=free: (f * 2**30, 0))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 8 * 2**30)
        found.append(compiler.most_processes(torch.device("cuda")))
    assert found == [1, 1, 8, 2, 0]
    assert compiler.most_processes(torch.device("cpu")) == 8


def test_memory_is_foreseen_and_a_batch_named_that_fits(capsys):
    config, GiB = Config(**GPU), 2**30
    fixed, per_image = bytes_of_step(g_main, config, 2, torch.bfloat16)
    assert 1 < fixed / GiB < 4 and 6 < 32 * per_image / GiB < 9  # 7.6 of them counted by hand
    halved = bytes_of_step(g_main, replace(config, batch_size=16), 2, torch.bfloat16)
    assert halved[0] == fixed and halved[1] == pytest.approx(per_image, rel=0.1)
    warn_of_too_little(g_main, config, 2, torch.bfloat16, 80 * GiB)
    assert capsys.readouterr().out == ""
    warn_of_too_little(g_main, config, 2, torch.bfloat16, fixed + 10 * per_image)
    assert "free: batch_size = 10 would fit" in capsys.readouterr().out


def test_counted_memory_is_what_a_cpu_allocates():
    a = torch.zeros(1000)
    with MemoryCounter() as counter:
        b = a + 1
        c = b.view(10, 100) * 2  # a view takes none
        del b, c
        _ = torch.ones(500)
    assert counter.peak == 8000 and counter.now == 2000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_training_goes_on_while_another_process_compiles(
    config: Config, monkeypatch, capsys, fresh_compiler
):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    tune(torch.device("cpu"), config.cache)
    state, real, c = one_block(replace(config, relativistic=False, r1_interval=1))
    plain = phase_gradients(state, real, c, Phases("off").backward, (d_r1,))
    state.phases = Phases("auto", (d_r1,), training.compile_phase)
    steps = 0
    with closing(state.phases):
        while not state.phases.compiled_at and steps < 100_000:
            train_step(state, real, c, torch.eye(2))
            state.phases.compile_beside(state)
            steps += 1
    assert steps > 10 and state.phases.compiled_at == {"d_r1_compiled_at": state.cur_nimg}
    state, real, c = one_block(replace(config, relativistic=False, r1_interval=1))
    phases = Phases("on", (d_r1,))
    found = phase_gradients(state, real, c, phases.backward, (d_r1,))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["aot_autograd"]["autograd_cache_miss"] == 0
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    out = capsys.readouterr().out
    assert "compiling d_r1 in 1 processes; training goes on meanwhile" in out
    assert f"s, used from image {steps * config.batch_size:,} on" in out


def test_a_core_is_left_to_others_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for cores, own, expected in (({0}, 1, 1), ({4, 5}, 2, 1), (range(8), 8, 7), (range(8), 4, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, c=cores: c, raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        torch.set_num_threads(own)
        run_command(lambda: None)
        assert torch.get_num_threads() == expected
        monkeypatch.setenv("OMP_NUM_THREADS", str(own))
        torch.set_num_threads(own)
        run_command(lambda: None)
        assert torch.get_num_threads() == own


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_phase_has_its_gradients_and_a_second_start_compiles_nothing(
    config, monkeypatch
):
    """The default backend, on R1 alone: the others take minutes on a CPU."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    config = replace(config, relativistic=False)  # R2 needs random numbers, which differ
    state, real, c = one_block(config)
    Phases("off").backward(d_r1, 1, state.G, state.D, real, c, torch.tensor(1.0), config)
    plain = [torch.zeros_like(p) if p.grad is None else p.grad for p in state.D.parameters()]
    found = []
    for _ in range(2):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(first_call_of_r1, config).result())
    (cold, misses), (warm, misses_again) = found
    assert all(misses.values()) and not any(misses_again.values())
    for a, b, expected in zip(cold, warm, plain, strict=True):
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(a, b)


def test_what_cannot_be_compiled_is_said_once_and_trains_as_it_is(
    config, trained_once, monkeypatch, capsys
):
    def broken(phase, **_options):
        def run(*_args):
            torch.randn(7)  # a failed attempt leaves no trace in the random numbers
            raise RuntimeError("no compiler found\nand much more")

        return run

    plain, compiled = trained_once(epochs=1), replace(config, epochs=1, compile="on")
    monkeypatch.setattr(torch, "compile", broken)
    capsys.readouterr()
    train(compiled)
    out = capsys.readouterr().out
    assert out.count("uncompiled, because g_main cannot be compiled: no compiler found\n") == 1
    assert_same_run(plain, compiled)


def test_a_failed_compilation_keeps_nothing_alive(monkeypatch):
    class Large:
        alive = 0

        def __init__(self):
            Large.alive += 1

        def __del__(self):
            Large.alive -= 1

    def phase(*_):
        assert not Large.alive
        return parameter.square().sum(), {}

    def broken(*_):
        large = Large()
        raise RuntimeError(f"no memory for {large}")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    parameter = torch.nn.Parameter(torch.ones(1))
    phases = compiler.Phases("on", [phase])
    phases.compiled_at = {"g_main_compiled_at": 4}
    phases(phase, torch.optim.Adam([parameter]), 0)
    assert parameter.item() < 1 and phases.compiled_at == phases.compiled == {}


@pytest.mark.parametrize("native", [False, True])
def test_precision_is_chosen_by_device_and_width(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    cpu, wide = torch.device("cpu"), Config(**CPU | {"channel_base": 1024})
    assert feature_dtype(wide, cpu) == (torch.bfloat16 if native else torch.float32)
    assert feature_dtype(Config(**CPU), cpu) == torch.float32  # 16 maps
    assert feature_dtype(replace(wide, precision="float32"), cpu) == torch.float32
    assert feature_dtype(Config(**CPU, precision="bfloat16"), cpu) == torch.bfloat16


def test_bfloat16_gradients_stay_close(config: Config):
    """Over a batch: of four images alone, R1's may fall to a cosine of 0.94."""
    config = replace(config, img_resolution=64, channel_base=512, channel_max=64, batch_size=16)
    coarse = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    real = F.interpolate(coarse, size=64, mode="bicubic").clamp(-1, 1)
    c, found = torch.eye(2)[torch.arange(16) % 2], []
    for precision in ("float32", "bfloat16"):
        state, _, _ = noisy_state(replace(config, precision=precision))
        found.append(phase_gradients(state, real, c, Phases("off").backward))
    for name, exact in found[0].items():
        assert torch.cosine_similarity(found[1][name], exact, dim=0) > 0.99, name
        assert not torch.equal(found[1][name], exact)


def test_a_graph_that_fails_when_it_is_recorded_is_given_up(config: Config, capsys):
    state, real, c = step_inputs(config)
    phases, calls = Phases("off"), []

    def recorded(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no graph")
        return g_main(*args)

    phases.graphs, phases.compiled = True, {g_main: recorded}
    for _ in range(3):
        phases(g_main, state.g_opt, 0, state.G, state.D, real, c, config)
    said = capsys.readouterr().out
    assert said.count("training goes on uncompiled, because g_main") == 1 and len(calls) == 2


def test_what_ran_once_is_not_blamed_on_the_compiler_later(config: Config):
    state, real, c = step_inputs(config)
    state.phases.compiled = {d_r1: d_r1}
    args = (state.d_opt, 0, state.G, state.D, real, c, torch.tensor(1.0), config)
    state.phases(d_r1, *args)

    def out_of_memory(*_args):
        raise torch.OutOfMemoryError("no memory")

    state.phases.compiled = {d_r1: out_of_memory}
    with pytest.raises(torch.OutOfMemoryError):
        state.phases(d_r1, *args)


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_steps_in_bfloat16_stay_finite(config: Config, count):
    config = replace(config, precision="bfloat16", channel_max=4, num_workers=0)
    state, real, c = step_inputs(config)
    stats = torch.stack([train_step(state, real, c, torch.eye(2)) for _ in range(count)])
    assert stats[:, [STATS.index(n) for n in ("g_loss", "d_loss")]].isfinite().all()
    for net in (state.G, state.D, state.G_ema):
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in net.parameters())


@pytest.mark.slow
def test_what_hangs_on_cuda_is_ended_and_shown(tmp_path):
    """The limit of those tests, on one that waits for ever."""
    script = "import conftest, pytest, time\nconftest.CUDA_SECONDS = 1\n"
    script += "@pytest.mark.usefixtures('limited_time')\n"
    script += "def test_that_waits():\n    time.sleep(600)\n"
    (tmp_path / "test_hang.py").write_text(script)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "."]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0 and "in test_that_waits" in done.stderr


# CUDA: of the phases no test compiles more than one, which takes seconds


@needs_cuda
@pytest.mark.parametrize("compile", ["off", "on", "graphs"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_code_trains_on_cuda(
    config, monkeypatch, capsys, fresh_compiler, precision, compile
):
    monkeypatch.setattr(training, "PHASES", (d_r1,))
    how = {"device": "cuda", "precision": precision, "compile": compile, "num_workers": 2}
    train(replace(config, **how, r1_interval=2))  # the graph is recorded, and replayed
    assert "warning" not in capsys.readouterr().out
    assert read_log(config.out)[-1]["nimg"] == 32


@needs_cuda
@pytest.mark.parametrize("compile", ["off", "on", "graphs"])
def test_a_step_never_waits_for_the_gpu(config: Config, monkeypatch, fresh_compiler, compile):
    monkeypatch.setattr(training, "PHASES", (d_r1,))
    device = torch.device("cuda")
    ada = {"augment": "ada", "ada_interval": 1, "ada_target": -1.0, "ada_kimg": 0.5}
    state = TrainingState(replace(config, compile=compile, r1_interval=4, **ada), 2, device)
    real, c = torch.rand(4, 1, 16, 16, device=device), torch.eye(2, device=device)[[0, 1, 1, 0]]
    for _ in range(20):  # compiled, recorded, and every penalty seen
        train_step(state, real, c, torch.eye(2, device=device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(16):
            train_step(state, real, c, torch.eye(2, device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("compile", ["on", "graphs"])
@pytest.mark.parametrize("phase", PHASES)
def test_compiled_gradients_on_cuda_are_those_of_the_plain_phase(
    config, monkeypatch, fresh_compiler, phase, compile
):
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)
    state = TrainingState(config, 2, torch.device("cuda"))
    real = torch.rand(4, 1, 16, 16, device="cuda") * 2 - 1
    c = torch.eye(2, device="cuda")[[0, 1, 1, 0]]
    expected = phase_gradients(state, real, c, Phases("off").backward, (phase,))
    compiled = Phases(compile, PHASES)
    for _ in range(3):  # graphs are recorded at the second call and replayed at the third
        found = phase_gradients(state, real, c, compiled.backward, (phase,))
        cosine = torch.cosine_similarity(*found.values(), *expected.values(), dim=0)
        assert cosine > 0.999  # TF32 convolutions
