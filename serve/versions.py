"""Which of its versions a model of the repository serves: config.pbtxt says it, to Triton and to us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]
from tritonclient.grpc import model_config_pb2 as pb

from serve.errors import ContractError, first_line

CONFIG_NAME = "config.pbtxt"
"""Of the model; a copy of it, as it was published, stands in every version folder."""


def versions(model: Path) -> list[int]:
    """Numbers of the version folders that hold something, rising."""
    return sorted({int(file.parent.name) for file in model.glob("*/*") if file.parent.name.isdecimal()})


def served_version(model: Path) -> int | None:
    """The highest version that config.pbtxt names; without a list there the newest folder; None without any."""
    named = list(read_config(model / CONFIG_NAME).version_policy.specific.versions) if (model / CONFIG_NAME).exists() else []
    return max(named or versions(model), default=None)


def read_config(path: Path) -> Any:  # noqa: ANN401  # protobuf messages have no static types here
    """A ModelConfig message. Raises: ContractError."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise ContractError(f"{path}: not a Triton configuration ({first_line(error)}); export the run again") from error
