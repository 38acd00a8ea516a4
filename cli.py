"""The `simclr` command: parse, call, print. The verbs are in commands/.

Heavy modules are imported inside `__call__`, so that `--help` answers at once and serving needs no torch.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast, get_args

import tyro

from commands.export import Demo, Export
from commands.galleries import (
    GalleryAdd,
    GalleryDuplicates,
    GalleryInfo,
    GalleryRebuild,
    GalleryRelabel,
    GalleryRemove,
    GalleryTune,
    GalleryVerify,
)
from commands.identities import ReidEnrol, ReidForget, ReidMerge, ReidRename, ReidReview, ReidSplit
from commands.reid import ReidCalibrate, ReidEvaluate, ReidIdentify, ReidTrack
from commands.search import Search
from commands.serving import Api, App, BenchServe, Key, Triton
from commands.training import Distill, Evaluate, FitHead, ImportWeights, Pretrain
from commands.vectors import Embed, GalleryCopy, GalleryExport, GalleryImport, GalleryReembed
from serve.errors import SimclrError
from serve.preprocess import ImageError
from train.config import PresetName

VERBS: dict[str, Callable[..., Any]] = {
    "demo": Demo,
    "pretrain": Pretrain,
    "import-weights": ImportWeights,
    "evaluate": Evaluate,
    "fit-head": FitHead,
    "distill": Distill,
    "export": Export,
    "triton": Triton,
    "embed": Embed,
    "gallery add": GalleryAdd,
    "gallery import": GalleryImport,
    "gallery export": GalleryExport,
    "gallery reembed": GalleryReembed,
    "gallery remove": GalleryRemove,
    "gallery relabel": GalleryRelabel,
    "gallery duplicates": GalleryDuplicates,
    "gallery info": GalleryInfo,
    "gallery copy": GalleryCopy,
    "gallery rebuild": GalleryRebuild,
    "gallery tune": GalleryTune,
    "gallery verify": GalleryVerify,
    "search": Search,
    "reid evaluate": ReidEvaluate,
    "reid enrol": ReidEnrol,
    "reid identify": ReidIdentify,
    "reid calibrate": ReidCalibrate,
    "reid review": ReidReview,
    "reid rename": ReidRename,
    "reid merge": ReidMerge,
    "reid split": ReidSplit,
    "reid forget": ReidForget,
    "reid track": ReidTrack,
    "api": Api,
    "key": Key,
    "app": App,
    "bench serve": BenchServe,
}
SUMMARY = "From a folder of images to answers: SimCLR pretraining, ONNX and Triton export, search, re-ID, classification."
EXTRAS = {
    **dict.fromkeys(("torch", "torchvision", "onnx", "onnxscript", "safetensors", "tensorboard"), "train"),
    "ray": "scale",
}
"""Module -> the extra of this package that brings it."""
MARKERS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run one verb. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="PIL")  # of pictures that it reads all the same, or that we refuse ourselves
    try:
        command = _parse(list(sys.argv[1:] if argv is None else argv))
    except SimclrError as error:  # a configuration that refuses its values
        _fail(str(error), 2)
    try:
        command()
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted", 130)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        _fail(f"this command needs {error.name}, which a serving install leaves out: pip install 'simclr-serve[{extra}]'", 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, such as `head`, has seen enough
    except (SimclrError, ImageError, OSError) as error:
        _fail(str(error), 1)


def _parse(argv: list[str]) -> Callable[[], None]:
    groups = {verb.split()[0] for verb in VERBS if " " in verb}
    if argv[:1] == ["pretrain"]:
        command = tyro.cli(Pretrain, prog="simclr pretrain", args=argv[1:], default=_preset(argv[1:]), config=MARKERS)
    elif argv and argv[0] in groups:
        group = {verb.split()[1]: command for verb, command in VERBS.items() if verb.startswith(f"{argv[0]} ")}
        command = tyro.extras.subcommand_cli_from_dict(group, prog=f"simclr {argv[0]}", args=argv[1:], config=MARKERS)
    else:
        command = tyro.extras.subcommand_cli_from_dict(VERBS, prog="simclr", description=SUMMARY, args=argv, config=MARKERS)
    return cast("Callable[[], None]", command)


def _preset(argv: list[str]) -> Pretrain | None:
    """The settings that `--preset NAME` stands for: what the options beside it start from."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=get_args(PresetName))
    try:
        name = parser.parse_known_args(argv)[0].preset
    except argparse.ArgumentError:  # tyro says it better
        return None
    if name is None:
        return None
    from train.presets import PRESETS

    missing: Any = tyro.MISSING
    return Pretrain(**vars(PRESETS[name](missing, missing)))


def _fail(message: str, code: int) -> NoReturn:
    print(f"simclr: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
