"""Presets against the numbers of their sources, and options that win over them."""

import math
from pathlib import Path

import pytest

from cli import _parse
from train.config import PretrainConfig
from train.optim import peak_lr
from train.presets import PRESETS

PUBLISHED = {
    # google-research/simclr README: --train_batch_size=512 --train_epochs=1000 --learning_rate=1.0 --weight_decay=1e-4
    # --temperature=0.5 --image_size=32 --resnet_depth=18, color_jitter_strength 0.5
    "cifar10": {"arch": "resnet18", "batch": 512, "epochs": 1000, "peak": 1.0 * 512 / 256, "decay": 1e-4, "tau": 0.5},
    # paper, section 2.2: batch 4096, 100 epochs, LARS 4.8 (= 0.3 * 4096 / 256), weight decay 1e-6; tau 0.1
    "imagenet-100ep": {"arch": "resnet50", "batch": 4096, "epochs": 100, "peak": 4.8, "decay": 1e-6, "tau": 0.1},
    "imagenet-1000ep": {"arch": "resnet50", "batch": 4096, "epochs": 1000, "peak": 4.8, "decay": 1e-6, "tau": 0.1},
    # google-research/simclr#166: 0.075 * sqrt(B), temperature 0.2
    "small-batch": {"arch": "resnet50", "batch": 256, "epochs": 200, "peak": 0.075 * 16, "decay": 1e-6, "tau": 0.2},
    "reid-256x128": {"arch": "resnet50", "batch": 256, "epochs": 200, "peak": 0.075 * 16, "decay": 1e-6, "tau": 0.2},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_numbers_of_its_source(name: str) -> None:
    config = PRESETS[name]("pictures", Path("run"))  # type: ignore[index]
    peak = config.learning_rate if config.learning_rate is not None else peak_lr(config.batch_size, config.lr_rule)
    found = {
        "arch": config.arch,
        "batch": config.batch_size,
        "epochs": config.epochs,
        "peak": pytest.approx(peak),
        "decay": config.weight_decay,
        "tau": config.temperature,
    }
    assert found == PUBLISHED[name]
    assert config.preset == name
    assert PRESETS[name].__doc__  # type: ignore[index]


def parse(*arguments: str) -> PretrainConfig:
    command = _parse(["pretrain", "--images", "pictures", "--run", "run", *arguments])
    assert isinstance(command, PretrainConfig)
    return command


def test_options_beside_a_preset_win() -> None:
    config = parse("--preset", "cifar10", "--batch-size", "128")
    assert (config.preset, config.batch_size, config.epochs, config.images) == ("cifar10", 128, 1000, "pictures")
    assert parse("--batch-size=128", "--preset=cifar10") == config


def test_without_a_preset_nothing_changes() -> None:
    assert vars(parse()) == vars(PretrainConfig(images="pictures", run=Path("run")))


@pytest.mark.parametrize("arguments", [["--preset", "cifar11"], ["--preset"]])
def test_an_unknown_preset_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    assert "preset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batch_size", "sqrt", "linear"), [(256, 1.2, 0.3), (1024, 2.4, 1.2), (4096, 4.8, 4.8), (8192, 6.788, 9.6)]
)
def test_both_rules_meet_at_4096(batch_size: int, sqrt: float, linear: float) -> None:
    assert peak_lr(batch_size, "sqrt") == pytest.approx(sqrt, abs=1e-3)
    assert peak_lr(batch_size, "linear") == pytest.approx(linear)
    assert math.isclose(peak_lr(4096, "sqrt"), peak_lr(4096, "linear"))
