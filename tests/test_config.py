"""Settings: every field documented, every bad value named."""

import math
from dataclasses import fields
from pathlib import Path

import pytest

from config import CPU, GPU, Config, UserError
from evaluate import Options


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("epochs", 0, "int, 1 to 1000000000"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", math.nan, "above 0"),
        ("learning_rate", math.inf, "above 0"),
        ("batch_size", 1, "2 to 65536"),
        ("seed", -1, "0 to 9"),
        ("seed", 2**63, "0 to 9"),
        ("num_workers", -1, "0 to 1024"),
        ("img_resolution", 48, "one of"),
        ("img_resolution", 8, "one of"),
        ("z_dim", 0, "1 to 65536"),
        ("w_dim", 0, "1 to 65536"),
        ("channel_base", 8, "16 to 1048576"),
        ("channel_max", 0, "1 to 65536"),
        ("flip_prob", 1.5, "0 to 1"),
        ("brightness", -0.1, "0 to 1"),
        ("contrast", 2.0, "0 to 1"),
        ("rotation", 200.0, "0 to 180"),
        ("r1_gamma", -1.0, "float, 0 or more, or None"),
        ("r1_interval", 0, "1 or more"),
        ("pl_weight", math.nan, "0 or more"),
        ("pl_interval", 0, "1 or more"),
        ("pl_decay", 0.0, "above 0"),
        ("style_mixing_prob", 2.0, "0 to 1"),
        ("ema_kimg", -1.0, "0 or more"),
        ("ema_rampup", -1.0, "0 or more"),
        ("snapshot_epochs", 0, "1 or more"),
        ("checkpoint_kimg", 0, "above 0"),
        ("img_resolution", 16.0, "one of 16, 32"),
        ("conditional", 1, "bool"),
        ("epochs", True, "int"),
        ("epochs", 2.0, "int"),
        ("data_root", "AD_NC", r'Path\("\.\.\."\), or None'),
    ],
)
def test_an_invalid_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(UserError, match=f"^{name} = {value}: must be .*{allowed}"):
        Config(**{name: value})


def test_the_two_named_settings_are_valid_and_differ_in_size():
    gpu, cpu = Config(**GPU), Config(**CPU)
    assert (gpu.img_resolution, gpu.channel_max) == (256, 512)
    assert cpu.img_resolution <= 64 and cpu.channel_max < gpu.channel_max


def test_every_field_is_documented_in_the_help(capsys):
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(Config, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = open(__import__("config").__file__).read()
    for field in fields(Config):
        line = source.split(f"    {field.name}: ")[1].split('"""')[1]
        assert " ".join(line.split()[:4]) in text, field.name
        assert f"--{field.name.replace('_', '-')}" in text


def test_a_path_may_begin_with_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config(out=Path("~/run")).out == tmp_path / "run"
    assert Options(runs=(Path("~/a"), Path("b"))).runs == (tmp_path / "a", Path("b"))
    with pytest.raises(UserError, match="~nobody_here/x: there is no such home"):
        Config(cache=Path("~nobody_here/x"))
