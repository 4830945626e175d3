"""The networks against independent forms of the same mathematics."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from config import Config
from modules import (
    AdaptiveAugment,
    Discriminator,
    DiscriminatorBlock,
    EqualizedConv2d,
    EqualizedLinear,
    Generator,
    MappingNetwork,
    MinibatchStd,
    SynthesisLayer,
    ToRGB,
    binomial_filter,
    channels,
    downsample,
    modulated_conv2d,
    upsample,
)

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def upsampling_matrix(size: int) -> torch.Tensor:
    """[2 size, size]: each input sample spreads over four outputs, by the filter with gain 2."""
    matrix = torch.zeros(2 * size, size, dtype=torch.float64)
    for i in range(size):
        for k in range(4):
            if 0 <= 2 * i - 1 + k < 2 * size:
                matrix[2 * i - 1 + k, i] = 2 * TAPS[k]
    return matrix


def test_upsampling_equals_a_dense_matrix():
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    expected = upsampling_matrix(5) @ x @ upsampling_matrix(6).T
    torch.testing.assert_close(upsample(x), expected)


def test_downsampling_is_the_transpose_of_upsampling():
    x = torch.randn(2, 3, 10, 12, dtype=torch.float64)
    expected = upsampling_matrix(5).T @ x @ upsampling_matrix(6) / 4
    torch.testing.assert_close(downsample(x), expected)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("gain", [1, 4])
def test_both_forms_of_the_binomial_filter_are_its_matrix(order, gain):
    """The depthwise form, and the means of neighbours that are taken where it is derived twice."""
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    row = torch.tensor([math.comb(order, i) for i in range(order + 1)]).double()
    kernel = (row.outer(row) * gain / 4**order).expand(3, 1, -1, -1)
    for padding in range(order + 1):
        expected = F.conv2d(x, kernel, padding=padding, groups=3)
        torch.testing.assert_close(binomial_filter(x, order, padding, gain), expected)
        means, pull = torch.func.vjp(lambda x, p=padding: binomial_filter(x, order, p, gain), x)
        torch.testing.assert_close(means, expected)
        (gradient,) = pull(expected)
        transposed = F.conv_transpose2d(expected, kernel, padding=padding, groups=3)
        torch.testing.assert_close(gradient, transposed)


def per_image_convolution(x, weight, styles, demodulate, up):
    """[1], equations 1 and 3, literally: each image has weights of its own."""
    images = []
    for image, style in zip(x, styles, strict=True):
        w = weight * style[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            image = F.conv_transpose2d(image[None], w.transpose(0, 1), stride=2)
            image = binomial_filter(image, 3, padding=1, gain=4)
        else:
            image = F.conv2d(image[None], w, padding=w.shape[-1] // 2)
        images.append(image)
    return torch.cat(images)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [True, False])
def test_modulated_convolution_equals_weights_scaled_per_image(demodulate, up):
    x, styles = torch.randn(3, 4, 6, 6).double(), torch.randn(3, 4).double()
    weight = torch.randn(5, 4, 3, 3).double()
    dense = modulated_conv2d(x, weight, styles, demodulate, up)
    torch.testing.assert_close(dense, per_image_convolution(x, weight, styles, demodulate, up))


def test_upsampling_convolution_is_centred():
    """With a delta as its kernel it is plain upsampling, to the pixel."""
    x = torch.randn(1, 1, 6, 6).double()
    delta = torch.zeros(1, 1, 3, 3).double()
    delta[..., 1, 1] = 1
    out = modulated_conv2d(x, delta, torch.ones(1, 1).double(), demodulate=False, up=True)
    torch.testing.assert_close(out, upsample(x))


def test_demodulation_gives_unit_variance():
    x, styles = torch.randn(4, 64, 32, 32), torch.rand(4, 64) * 5
    out = modulated_conv2d(x, torch.randn(16, 64, 3, 3), styles)[:, :, 1:-1, 1:-1]
    assert out.std().item() == pytest.approx(1, abs=0.03)


def test_strided_convolution_filters_before_it_decimates():
    x = torch.randn(2, 3, 8, 8)
    conv = EqualizedConv2d(3, 4, 3, down=True)
    blurred = F.conv2d(F.pad(x, [2] * 4), outer_kernel(3), groups=3)  # [2, 3, 9, 9]
    expected = F.conv2d(blurred, conv.weight / math.sqrt(27), stride=2)
    torch.testing.assert_close(conv(x), expected)
    skip = EqualizedConv2d(3, 4, 1, down=True)
    every_second = F.conv2d(F.pad(x, [1] * 4), outer_kernel(3), groups=3)[:, :, ::2, ::2]
    torch.testing.assert_close(skip(x), F.conv2d(every_second, skip.weight / math.sqrt(3)))


def test_a_discriminator_block_equals_its_figure_written_out():
    """Activations gain sqrt(2), the residual sum loses it: [1], figure 7c."""
    block, x = DiscriminatorBlock(3, 5, torch.float32), torch.randn(2, 3, 8, 8)
    for conv in (block.conv0, block.conv1, block.skip):
        torch.nn.init.normal_(conv.bias)
    y = F.conv2d(x, block.conv0.weight / math.sqrt(27), block.conv0.bias, padding=1)
    y = F.conv2d(F.leaky_relu(y, 0.2) * math.sqrt(2), outer_kernel(3), padding=2, groups=3)
    y = F.conv2d(y, block.conv1.weight / math.sqrt(27), block.conv1.bias, stride=2)
    skip = F.conv2d(downsample(x), block.skip.weight / math.sqrt(3), block.skip.bias)
    expected = (F.leaky_relu(y, 0.2) * math.sqrt(2) + skip) / math.sqrt(2)
    torch.testing.assert_close(block(x), expected)


def test_bfloat16_reaches_the_high_resolutions_only(config: Config):
    config = replace(config, img_resolution=32)
    G, D = (net(config, 2, dtype=torch.bfloat16) for net in (Generator, Discriminator))
    seen = {}
    for net in (G, D):
        for name, module in net.named_modules():
            if name:
                module.register_forward_hook(
                    lambda _m, _i, out, name=name: seen.setdefault(name, out)
                )
    image = G(torch.randn(2, 8), torch.eye(2))
    logits = D(image, torch.eye(2))
    for i, dtype in enumerate([torch.float32] * 2 + [torch.bfloat16] * 2):
        assert seen[f"synthesis.blocks.{i}.conv1"].dtype == dtype
    assert [seen[f"blocks.{i}"].dtype for i in range(3)] == [torch.bfloat16] * 2 + [torch.float32]
    wide = ["mapping.layers.7", "synthesis.blocks.3.torgb", "mbstd", "conv", "fc", "out"]
    assert all(seen[name].dtype == torch.float32 for name in wide)
    assert image.dtype == logits.dtype == torch.float32


def outer_kernel(count: int) -> torch.Tensor:
    return TAPS.outer(TAPS).float().expand(count, 1, 4, 4)


def test_equalized_layers_have_unit_gain_and_scale_their_learning_rate():
    x = torch.randn(4096, 100)
    for lr_multiplier in (1, 0.01):
        layer = EqualizedLinear(100, 50, lr_multiplier, bias_init=1)
        assert layer.weight.std().item() == pytest.approx(1 / lr_multiplier, rel=0.05)
        out = layer(x)
        assert out.std().item() == pytest.approx(1, abs=0.05)
        assert out.mean().item() == pytest.approx(1, abs=0.1)
        with torch.no_grad():  # one step of size 1 on the bias moves the output by the multiplier
            layer.bias += 1
        torch.testing.assert_close(layer(x), out + lr_multiplier, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 8])
def test_minibatch_std_equals_an_explicit_loop_for_any_batch(batch):
    x = torch.randn(batch, 3, 4, 4)
    group = max(size for size in (1, 2, 3, 4) if batch % size == 0)
    out = MinibatchStd()(x)
    assert out.shape == (batch, 4, 4, 4)
    torch.testing.assert_close(out[:, :3], x)
    for n in range(batch):
        members = x[n // group * group :][:group]
        std = (members.var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(out[n, 3], std.expand(4, 4))


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_two_batches_at_once_get_the_logits_that_each_gets_alone(config: Config, size):
    D, x = Discriminator(config, 2), torch.randn(2 * size, 1, 16, 16)
    c = torch.eye(2)[torch.arange(2 * size) % 2]
    alone = torch.cat([D(x[:size], c[:size]), D(x[size:], c[size:])])
    torch.testing.assert_close(D(x, c, batches=2), alone)


def test_noise_is_off_at_first_then_random_constant_or_none():
    layer = SynthesisLayer(4, 4, 8, resolution=8)
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 8)
    torch.testing.assert_close(layer(x, w, "random"), layer(x, w, "none"))
    with torch.no_grad():
        layer.noise_strength.fill_(0.5)
    assert not torch.equal(layer(x, w, "random"), layer(x, w, "random"))
    assert torch.equal(layer(x, w, "const"), layer(x, w, "const"))
    assert not torch.equal(layer(x, w, "const"), layer(x, w, "none"))


def test_noise_has_the_strength_it_learned():
    layer = SynthesisLayer(4, 4, 8, resolution=64)
    with torch.no_grad():
        layer.weight.zero_()
        layer.noise_strength.copy_(torch.tensor([0.5, 0, -0.25, 0.5]))
    out = layer(torch.randn(4, 4, 64, 64), torch.randn(4, 8), "random")
    noise = torch.where(out > 0, out, out / 0.2) / math.sqrt(2)
    assert noise[:, 0].std().item() == pytest.approx(0.5, rel=0.05)
    torch.testing.assert_close(noise[:, 0], noise[:, 3])  # one noise image for all maps
    torch.testing.assert_close(noise[:, 0], -2 * noise[:, 2])
    assert not noise[:, 1].any()


def test_noise_is_the_same_in_both_precisions():
    layer = SynthesisLayer(4, 4, 8, resolution=16)
    with torch.no_grad():
        layer.weight.zero_()
        layer.noise_strength.fill_(1)
    x, w, found = torch.randn(2, 4, 16, 16), torch.randn(2, 8), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        found.append(layer(x.to(dtype), w).float())
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def test_without_noise_inputs_an_image_is_that_of_its_latent_alone(config: Config):
    G = Generator(replace(config, noise=False, mapping_layers=3), 2)
    names = [*G.state_dict()]
    assert not [name for name in names if "noise" in name]
    assert len(G.mapping.layers) == 3 and "mapping.layers.3.weight" not in names
    z, c = torch.randn(2, config.z_dim), torch.eye(2)
    images = [G(z, c, noise_mode=mode) for mode in ("random", "random", "const", "none")]
    assert all(torch.equal(images[0], other) for other in images[1:])


def test_torgb_is_linear_and_not_demodulated():
    torgb = ToRGB(4, 2, 8)
    x, w = torch.randn(3, 4, 5, 5), torch.randn(3, 8)
    styles = (w @ torgb.affine.weight.T / math.sqrt(8) + 1) / 2
    expected = torch.einsum("oi,ni,nihw->nohw", torgb.weight[:, :, 0, 0], styles, x)
    torch.testing.assert_close(torgb(x, w), expected)
    torch.testing.assert_close(torgb(2 * x, w), 2 * expected)


def test_mapping_equals_the_layers_written_out():
    mapping = MappingNetwork(z_dim=6, c_dim=3, w_dim=5, num_ws=4)
    z, c = torch.randn(7, 6), torch.eye(3)[torch.arange(7) % 3]
    embedding = mapping.embed.weight.T[torch.arange(7) % 3] / math.sqrt(3) + mapping.embed.bias
    x = torch.cat([F.normalize(z) * math.sqrt(6), F.normalize(embedding) * math.sqrt(6)], 1)
    assert len(mapping.layers) == 8
    for layer in mapping.layers:
        gain = 0.01 / math.sqrt(layer.weight.shape[1])
        x = F.leaky_relu(x @ layer.weight.T * gain + 0.01 * layer.bias, 0.2) * math.sqrt(2)
    ws = mapping(z, c)
    assert ws.shape == (7, 4, 5)
    for i in range(4):
        torch.testing.assert_close(ws[:, i], x, rtol=1e-4, atol=1e-6)


def test_w_avg_is_the_mean_of_each_class():
    mapping = MappingNetwork(z_dim=6, c_dim=2, w_dim=5, num_ws=4)
    mapping.estimate_w_avg(20000)
    z = torch.randn(20000, 6)
    for label in range(2):
        mean = mapping.map(z, torch.eye(2)[[label]].expand(20000, 2)).mean(0)
        torch.testing.assert_close(mapping.w_avg[label], mean, rtol=0, atol=0.03)
    assert (mapping.w_avg[0] - mapping.w_avg[1]).abs().max() > 0.05


def test_psi_0_gives_one_image_per_class(config: Config):
    G = Generator(config, c_dim=2)
    G.mapping.estimate_w_avg(64)
    c = torch.eye(2)[[0, 0, 1, 1]]
    images = G(torch.randn(4, 8), c, truncation_psi=0, noise_mode="none")
    torch.testing.assert_close(images[0], images[1])
    torch.testing.assert_close(images[2], images[3])
    assert (images[0] - images[2]).abs().max() > 1e-3


def test_truncation_interpolates_up_to_its_cutoff():
    mapping = MappingNetwork(z_dim=6, c_dim=2, w_dim=5, num_ws=4)
    mapping.estimate_w_avg(64)
    z, c = torch.randn(3, 6), torch.eye(2)[[0, 1, 1]]
    full, ws = mapping(z, c), mapping(z, c, truncation_psi=0.3, truncation_cutoff=2)
    expected = mapping.w_avg[[0, 1, 1]] * 0.7 + full[:, 0] * 0.3
    torch.testing.assert_close(ws[:, 0], expected)
    torch.testing.assert_close(ws[:, 1], expected)
    torch.testing.assert_close(ws[:, 2:], full[:, 2:])


def test_half_of_each_label_lies_between_the_classes():
    mapping = MappingNetwork(z_dim=6, c_dim=2, w_dim=5, num_ws=4)
    mapping.estimate_w_avg(64)
    ws = mapping(torch.randn(1, 6), torch.tensor([[0.5, 0.5]]), truncation_psi=0)
    torch.testing.assert_close(ws[0, 0], mapping.w_avg.mean(0))


@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("c_dim", [0, 2, 3])
def test_any_resolution_and_number_of_classes(config: Config, resolution, c_dim):
    config = replace(config, img_resolution=resolution, channel_base=resolution)
    G, D = Generator(config, c_dim, img_channels=1), Discriminator(config, c_dim, img_channels=1)
    c = torch.eye(c_dim)[torch.arange(2) % c_dim] if c_dim else None
    images = G(torch.randn(2, 8), c)
    assert images.shape == (2, 1, resolution, resolution)
    assert D(images, c).shape == (2,)
    assert G.mapping.num_ws == 2 * math.log2(resolution) - 2


def test_any_number_of_image_channels(config: Config):
    images = Generator(config, 2, img_channels=3)(torch.randn(2, 8), torch.eye(2))
    assert images.shape == (2, 3, 16, 16)
    assert Discriminator(config, 2, img_channels=3)(images, torch.eye(2)).shape == (2,)


def test_channels_halve_with_each_doubling():
    assert [channels(r, 16384, 512) for r in (4, 32, 64, 256)] == [512, 512, 256, 64]
    assert channels(512, 16, 8) == 1


def test_the_label_changes_the_image_and_the_logit(config: Config):
    G, D = Generator(config, 2), Discriminator(config, 2)
    z = torch.randn(1, 8).expand(2, -1)
    images = G(z, torch.eye(2), noise_mode="none")
    assert (images[0] - images[1]).abs().max() > 1e-3
    one = images[:1]
    assert (D(one, torch.eye(2)[:1]) - D(one, torch.eye(2)[1:])).abs() > 1e-4


def test_layers_take_their_ws_in_order_and_torgb_shares_the_next(config: Config):
    """Recorded by the affine layers: conv 0; then ToRGB and the layer after it share each w."""
    synthesis, seen = Generator(config, 2).synthesis, []
    for name, module in synthesis.named_modules():
        if name.endswith("affine"):
            module.register_forward_hook(
                lambda _module, inputs, _out, name=name: seen.append((name, int(inputs[0][0, 0])))
            )
    synthesis(torch.arange(6.0)[None, :, None].expand(1, 6, 8))
    names = ["conv1", "torgb", "conv0", "conv1", "torgb", "conv0", "conv1", "torgb"]
    assert [name.split(".")[2] for name, _ in seen] == names
    assert [w for _, w in seen] == [0, 1, 1, 2, 3, 3, 4, 5]


def test_the_image_is_the_upsampled_sum_of_every_torgb(config: Config):
    synthesis, parts = Generator(config, 2).synthesis, []
    for block in synthesis.blocks:
        block.torgb.register_forward_hook(lambda _module, _inputs, rgb: parts.append(rgb))
    image = synthesis(torch.randn(2, synthesis.num_ws, 8), "none")
    expected = parts[0]
    for rgb in parts[1:]:
        expected = upsample(expected) + rgb
    assert [part.shape[2] for part in parts] == [4, 8, 16]
    torch.testing.assert_close(image, expected)


def test_image_does_not_depend_on_its_batch(config: Config):
    G = Generator(config, 2)
    z, c = torch.randn(5, 8), torch.eye(2)[[0, 1, 0, 1, 1]]
    alone = torch.cat([G(z[i : i + 1], c[i : i + 1], noise_mode="const") for i in range(5)])
    torch.testing.assert_close(G(z, c, noise_mode="const"), alone, rtol=1e-4, atol=1e-5)


def test_logit_adds_the_projection_of_the_label(config: Config):
    D = Discriminator(config, 2)
    images, c = torch.randn(4, 1, 16, 16), torch.eye(2)[[0, 1, 1, 0]]
    features = D.features(images)
    projection = (features * D.embed[[0, 1, 1, 0]]).sum(1) / math.sqrt(features.shape[1])
    torch.testing.assert_close(D(images, c), D.out(features)[:, 0] + projection)


def test_fresh_networks_keep_their_scale(config: Config):
    config = replace(config, img_resolution=64, channel_base=1024, channel_max=64)
    G, D = Generator(config, 2), Discriminator(config, 2)
    c = torch.eye(2)[torch.arange(16) % 2]
    logits = D(torch.randn(16, 1, 64, 64), c)
    assert 0.2 < D.features(torch.randn(16, 1, 64, 64)).std() < 2
    assert logits.abs().max() < 10
    assert 0.2 < G(torch.randn(16, config.z_dim), c).std() < 5


# Augmentation

STRENGTHS = (
    "ada_flip", "ada_translation", "ada_scale", "ada_anisotropy", "ada_rotation",
    "ada_brightness", "ada_contrast", "ada_noise", "ada_cutout",
)  # fmt: skip


def pipe(config: Config, p: float | None = 1, size: int = 32, **strengths) -> AdaptiveAugment:
    """Only the kinds of change named, at probability p."""
    alone = dict.fromkeys(STRENGTHS, 0.0) | strengths if strengths else {}
    return AdaptiveAugment(replace(config, augment="ada", ada_p=p, img_resolution=size, **alone))


def blobs(size: int = 32, x: float = 6, y: float = -3, n: int = 1) -> torch.Tensor:
    """A smooth bright spot at (x, y) pixels from the centre, on a background of -1."""
    at = torch.arange(size) - (size - 1) / 2
    spot = torch.exp(-((at - x) ** 2 + (at[:, None] - y) ** 2) / 8)
    return (spot * 2 - 1).expand(n, 1, size, size)


def test_augmentation_at_p_0_is_the_identity_to_the_bit(config: Config):
    img = torch.rand(4, 1, 32, 32) * 2 - 1
    assert torch.equal(pipe(config, 0)(img), img)
    assert torch.equal(pipe(config, 1e-12)(img), img)  # this one takes the long way


@pytest.mark.parametrize("kind", STRENGTHS)
def test_each_kind_of_change_has_its_strength_and_comes_at_probability_p(config: Config, kind):
    img = blobs(16, 2, -1, n=4000)
    augment = pipe(config, 0.3, 16, **{kind: 1.0 if kind != "ada_rotation" else 90.0})
    changed = (augment(img) != img).flatten(1).any(1).float().mean().item()
    expected = 0.3
    if kind == "ada_translation":  # by whole pixels and by fractions
        expected = 1 - 0.7**2
    assert changed == pytest.approx(expected, abs=0.03)


def test_a_flip_mirrors_left_and_right(config: Config):
    img = torch.rand(4, 1, 32, 32)
    assert torch.equal(pipe(config, ada_flip=1.0)(img), img.flip(3))


def test_whole_shifts_move_pixels_and_bring_in_background(config: Config):
    augment, img = pipe(config, ada_translation=0.25), torch.rand(50, 1, 32, 32)
    seen = set()
    for before, after in zip(img, augment.shift(img), strict=True):
        rows, columns = ((after[0] != -1).any(dim).nonzero() for dim in (1, 0))
        top, left = rows.min().item(), columns.min().item()
        H, W = rows.max().item() + 1 - top, columns.max().item() + 1 - left
        y, x = top if top else H - 32, left if left else W - 32
        assert max(abs(x), abs(y)) <= 8
        kept = before[0, max(0, -y) : 32 - max(0, y), max(0, -x) : 32 - max(0, x)]
        assert torch.equal(after[0, top : top + H, left : left + W], kept)
        assert (after == -1).sum() == 32 * 32 - H * W
        seen.add((x, y))
    assert len(seen) > 30


def test_a_rotation_turns_about_the_centre_by_the_angle_drawn(config: Config):
    augment = pipe(config, ada_rotation=60.0)
    augment.draw = lambda img, n=1: torch.full([len(img), 1, 1, n], 0.75)  # half of it, clockwise
    turn = math.radians(30)
    x, y = 6 * math.cos(turn) - 3 * math.sin(turn), -6 * math.sin(turn) - 3 * math.cos(turn)
    torch.testing.assert_close(augment(blobs()), blobs(x=x, y=y), rtol=0, atol=0.03)


@pytest.mark.parametrize(("log2", "anisotropy"), [(0.5, False), (-0.5, False), (1.0, True)])
def test_scale_and_anisotropy_stretch_about_the_centre(config: Config, log2, anisotropy):
    kind = "ada_anisotropy" if anisotropy else "ada_scale"
    augment = pipe(config, **{kind: 1.0})
    augment.normal = lambda img, strength, n=1: torch.full([len(img), 1, 1, n], log2 * strength)
    out = augment(blobs()) + 1
    at, mass = torch.arange(32) - 15.5, out.sum()
    x, y = (out.sum(2) * at).sum() / mass, (out.sum(3) * at).sum() / mass
    across = 2 ** (log2 / 2 if anisotropy else log2)
    down = 2 ** (-log2 / 2 if anisotropy else log2)
    assert (x.item(), y.item()) == (
        pytest.approx(6 * across, abs=0.1),
        pytest.approx(-3 * down, abs=0.1),
    )
    assert mass.item() == pytest.approx((blobs() + 1).sum().item() * across * down, rel=0.02)


def test_fractional_shifts_are_exact_for_what_is_smooth(config: Config):
    augment = pipe(config, ada_translation=0.1)
    augment.normal = lambda img, strength, n=1: torch.full(
        [len(img), 1, 1, n], -2.5 / 16 * (strength > 0)
    )
    torch.testing.assert_close(augment.warp(blobs()), blobs(x=8.5, y=-0.5), rtol=0, atol=0.03)


def test_shrinking_does_not_alias(config: Config):
    """The finest checkerboard, at half its size, is beyond what pixels can show: plain grey."""
    augment = pipe(config, ada_scale=1.0)
    augment.normal = lambda img, strength, n=1: torch.full([len(img), 1, 1, n], -strength)
    at = torch.arange(32)
    board = ((at + at[:, None]) % 2 * 2.0 - 1)[None, None]
    out = augment(board)[0, 0, 12:20, 12:20]
    assert out.std() < 0.03 and out.mean().abs() < 0.03


def test_contrast_and_brightness_scale_and_add(config: Config):
    img = torch.rand(8, 1, 32, 32) * 2 - 1
    for out, per_image in (
        (pipe(config, ada_contrast=0.5)(img) + 1, lambda out: out / (img + 1)),
        (pipe(config, ada_brightness=0.2)(img), lambda out: out - img),
    ):
        change = per_image(out).flatten(1)
        torch.testing.assert_close(change, change[:, :1].expand_as(change), rtol=1e-2, atol=1e-4)
        assert change[:, 0].std() > 0.05


def test_noise_has_a_strength_for_each_image(config: Config):
    noise = pipe(config, ada_noise=0.1)(torch.zeros(500, 1, 32, 32))
    strength = noise.flatten(1).std(1)
    assert strength.square().mean().sqrt().item() == pytest.approx(0.1, rel=0.15)
    assert strength.min() < 0.01 < 0.2 < strength.max()


def test_a_cut_is_a_square_of_background(config: Config):
    out = pipe(config, ada_cutout=0.5)(torch.ones(200, 1, 32, 32))
    assert set(out.unique().tolist()) == {-1.0, 1.0}
    area = (out == -1).flatten(1).sum(1)
    assert (
        area.max() == 16 * 16 and area.min() >= 7 * 7
    )  # a quarter where it is centred in a corner


def test_no_change_turns_a_head_upside_down(config: Config):
    augment = pipe(config, 1, ada_rotation=15.0, ada_flip=0.5, ada_scale=0.2)
    out = augment(blobs(n=200, x=0, y=-8)) + 1
    assert (out[:, :, :16].sum((1, 2, 3)) > out[:, :, 16:].sum((1, 2, 3))).all()


def test_augmentation_is_differentiable(config: Config):
    augment, img = pipe(config, 0.8, 16).double(), torch.rand(3, 1, 16, 16).double()

    def seeded(img):
        torch.manual_seed(3)
        return augment(img)

    assert torch.autograd.gradcheck(seeded, img.requires_grad_(), fast_mode=True)


def test_p_follows_its_target_and_stays_in_its_range(config: Config):
    config = replace(config, augment="ada", ada_kimg=0.16, ada_interval=2)  # 2 steps: 0.05
    augment, cur_nimg = AdaptiveAugment(config), 0

    def after(steps: int, sign: float) -> float:
        nonlocal cur_nimg
        for _ in range(steps):
            cur_nimg += config.batch_size
            augment.adapt(torch.tensor(sign), cur_nimg)
        return augment.p.item()

    assert after(1, 1.0) == 0
    assert after(1, 0.3) == pytest.approx(0.05)  # the mean of both is above the target
    assert after(2, 0.7) == pytest.approx(0.10)
    assert after(2, 0.5) == pytest.approx(0.05)
    assert after(8, -1.0) == 0
    assert after(100, 1.0) == pytest.approx(0.8)
    fixed = AdaptiveAugment(replace(config, ada_p=0.4))
    fixed.adapt(torch.tensor(1.0), 8)
    assert fixed.p == 0.4


def test_a_label_of_zeros_has_no_effect_and_a_weight_grows_to_the_whole(config: Config):
    mapping = MappingNetwork(z_dim=6, c_dim=2, w_dim=5, num_ws=4)
    z, c = torch.randn(1, 6).expand(2, -1), torch.eye(2)
    gaps = [(mapping.map(z, c * weight)[0] - mapping.map(z, c * weight)[1]).norm().item()
            for weight in (0, 0.01, 0.5, 1)]  # fmt: skip
    assert gaps[0] < 1e-6 < gaps[1] < 0.05 * gaps[3] and gaps[1] < gaps[2] < gaps[3]
