"""Learning an encoder, and what it is worth."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from commands.opening import GalleryName, is_run, open_encoder, open_encoder_of
from commands.telling import write_json
from serve.errors import ContractError, SimclrError
from train.config import Arch, PretrainConfig, Stem

if TYPE_CHECKING:
    from serve.classify import Head
    from serve.heads.fit import Examples


@dataclass(frozen=True, kw_only=True)
class Pretrain(PretrainConfig):
    """Learn an encoder from pictures without labels (SimCLR)."""

    def __call__(self) -> None:
        from train.pretrain import pretrain

        run = pretrain(self)
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes speaks for all
            print(run)


@dataclass(frozen=True, kw_only=True)
class ImportWeights:
    """Make a RUN folder of an encoder trained elsewhere: torchvision, lightly, solo-learn, VISSL, official SimCLR ..."""

    weights: Path
    """State dict: .pth, .ckpt or .safetensors."""
    run: Path
    """Folder to write."""
    pixels: Literal["auto", "official", "unit", "imagenet", "cifar10", "cifar100", "stl10"] = "auto"
    """What it was trained on. Default: what its project does."""
    image_size: int | None = None
    """Pixels of the input. Default: 224, or 32 with a 3x3 stem."""

    def __post_init__(self) -> None:
        if self.image_size is not None and not 16 <= self.image_size <= 1024:
            raise ContractError(f"--image-size is {self.image_size}, wanted 16 to 1024")

    def __call__(self) -> None:
        from train.weights import read_weights

        weights = read_weights(self.weights, pixels=self.pixels, size_px=self.image_size)
        manifest = weights.save(self.run)
        print(weights.summary())
        print(f"{self.run}: encoder {manifest.encoder_id}")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score an encoder on labelled pictures."""

    encoder: str
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME."""
    images: str
    """Labelled pictures to learn from (class = sub-folder, or a CSV); their own test split is used if they have one.
    shape-bias: the cue-conflict folder."""
    test: str | None = None
    """Labelled pictures to score on. Default: the test split of --images, else every fifth of them."""
    protocol: Literal["knn", "linear", "linear-sgd", "finetune", "imagenet-linear", "places205", "shape-bias"] = "knn"
    """knn: vote of the 200 nearest at temperature 0.1. linear: logistic regression on frozen features. shape-bias: shape or
    texture, on the cue-conflict pictures. The others train a RUN as the literature does (docs/evaluation.md)."""
    head: Annotated[Path | None, arg(metavar="HEAD.npz")] = None
    """shape-bias: linear layer over ImageNet's 1000 classes."""
    label_fraction: float = 1.0
    """finetune: share of every class's labels, such as 0.01."""
    label_list: Annotated[Path | None, arg(metavar="FILE")] = None
    """finetune: names of the pictures to learn from instead, one a line (the official 1percent.txt)."""
    start: Annotated[Literal["encoder", "head"], arg(name="from")] = "encoder"
    """finetune: from the encoder (SimCLR) or the first layer of its projection head (SimCLR v2)."""
    save: Annotated[Path | None, arg(metavar="PATH")] = None
    """finetune: new RUN folder for the tuned encoder. linear-sgd, imagenet-linear, places205: HEAD.npz for the layer."""
    epochs: float | None = None
    """Other than the protocol's."""
    batch_size: int | None = None
    """Other than the protocol's; the learning rate follows."""
    seed: int = 0
    """Of the order, the crops and the choice of labels."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the figures there."""

    def __post_init__(self) -> None:
        choices = self.label_fraction, self.label_list, self.start
        if self.protocol != "finetune" and choices != (1, None, "encoder"):
            raise SimclrError("--label-fraction, --label-list and --from belong to --protocol finetune")
        if self.protocol in ("knn", "linear", "shape-bias") and (self.epochs, self.batch_size, self.save) != (None, None, None):
            raise SimclrError(f"--protocol {self.protocol} has neither --epochs nor --batch-size nor --save")
        if (self.protocol == "shape-bias") != (self.head is not None):
            raise SimclrError("--protocol shape-bias and --head HEAD.npz (over ImageNet's 1000 classes) belong together")
        if self.protocol == "shape-bias" and self.test is not None:
            raise SimclrError("--protocol shape-bias scores all of --images and has no --test")
        if not 0 < self.label_fraction <= 1:
            raise SimclrError(f"--label-fraction is {self.label_fraction}, wanted more than 0 and at most 1")
        if self.epochs is not None and not 0.001 <= self.epochs < math.inf:
            raise SimclrError(f"--epochs is {self.epochs}, wanted at least 0.001")
        if self.batch_size is not None and self.batch_size < 2:
            raise SimclrError(f"--batch-size is {self.batch_size}, wanted at least 2")

    def __call__(self) -> None:
        if self.protocol == "shape-bias":
            self._shape_bias()
            return
        from train.protocols import evaluate, report_lines

        report = evaluate(
            open_encoder(self.encoder),
            self.images,
            self.test,
            self.protocol,
            run=Path(self.encoder) if is_run(self.encoder) else None,
            epochs=self.epochs,
            batch_size=self.batch_size,
            label_fraction=self.label_fraction,
            label_list=self.label_list,
            start=self.start,
            save=self.save,
            seed=self.seed,
        )
        write_json(self.json, report)
        print("\n".join(report_lines(report)))

    def _shape_bias(self) -> None:
        from serve.classify import Head
        from serve.shape_bias.evaluate import evaluate, report_lines

        assert self.head is not None
        head = Head.load(self.head)
        report = evaluate(open_encoder_of(self.encoder, head), head, self.images)
        write_json(self.json, report)
        print("\n".join(report_lines(report)))


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Teach a small network the answers of a large one, on pictures without labels (SimCLR v2)."""

    teacher: str
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME."""
    head: Path
    """HEAD.npz of `simclr fit-head` on the teacher's vectors."""
    images: str
    """Folder, .csv, .zip, .tar or a known dataset's root; labels are used for scoring only."""
    run: Path
    """Folder for the student: encoder, head.npz and checkpoint."""
    arch: Arch = "resnet18"
    """Depth of the student's ResNet."""
    width: float = 1.0
    """Width multiplier of every stage."""
    stem: Stem | None = None
    """First layers. Default: by the size of the teacher's input."""
    temperature: float = 1.0
    """Of the answers: 1.0 for a smaller student, 0.1 for one of the teacher's own kind."""
    batch_size: int = 256
    """Pictures per step; the peak of LARS is 0.1 * its square root."""
    epochs: float = 400
    """Passes over the pictures."""
    weight_decay: float = 1e-4
    """Of all weights but batch norms and biases."""
    seed: int = 0
    """Of weights, order and crops."""
    resume: bool = False
    """Go on from RUN's checkpoint."""

    def __post_init__(self) -> None:
        limits = ("batch-size", self.batch_size, 2), ("epochs", self.epochs, 0.001), ("width", self.width, 0.125)
        for name, value, minimum in limits:
            if not minimum <= value < math.inf:
                raise SimclrError(f"--{name} is {value}, wanted at least {minimum}")
        if not self.temperature > 0:
            raise SimclrError(f"--temperature is {self.temperature}, wanted more than 0")
        if not 0 <= self.weight_decay <= 1:
            raise SimclrError(f"--weight-decay is {self.weight_decay}, wanted 0 to 1")

    def __call__(self) -> None:
        from serve.classify import Head
        from train.distill import distill, report_line

        settings = dict(vars(self))
        teacher, head = open_encoder(settings.pop("teacher")), Head.load(settings.pop("head"))
        report = distill(teacher, head, settings.pop("images"), settings.pop("run"), **settings)
        print(self.run)
        print(report_line(report))


@dataclass(frozen=True, kw_only=True)
class FitHead:
    """Fit a linear classifier on an encoder's vectors of labelled pictures, or on a gallery's (docs/heads.md)."""

    encoder: str | None = None
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME; with --images."""
    images: str | None = None
    """Labelled pictures: class = sub-folder, or a CSV with a label column."""
    gallery: GalleryName | None = None
    """Instead of both: a gallery with labels. No picture is read again."""
    where: str | None = None
    """With --gallery: only items that pass, such as 'camera = 2'."""
    out: Path
    """HEAD.npz to write."""
    balanced: bool = False
    """Every class weighs the same, however many pictures it has. Default: as often as it comes, so do the probabilities say."""
    abstain: Annotated[float, arg(metavar="P")] = 0.0
    """Say "uncertain" where the likeliest class is less likely than this."""
    accuracy: Annotated[float | None, arg(metavar="SHARE")] = None
    """Choose --abstain so that so large a share of what is decided is right, such as 0.95."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the figures there."""
    confusion: Annotated[Path | None, arg(metavar="FILE.png")] = None
    """Also draw there who was taken for whom."""

    def __post_init__(self) -> None:
        given = self.gallery is not None, self.encoder is not None, self.images is not None
        if given not in ((True, False, False), (False, True, True)):
            raise SimclrError("wanted either --encoder ENC and --images SRC, or --gallery GALLERY")
        if self.where is not None and self.gallery is None:
            raise SimclrError("--where belongs to --gallery")
        if not 0 <= self.abstain <= 1:
            raise SimclrError(f"--abstain is {self.abstain}, wanted 0 to 1")
        if self.accuracy is not None and (not 0 < self.accuracy <= 1 or self.abstain):
            raise SimclrError("--accuracy wants more than 0 and at most 1, and no --abstain beside it")

    def __call__(self) -> None:
        from serve.heads.fit import fit_head
        from serve.heads.scores import report_lines

        examples, encoder_id = self._examples()
        options: dict[str, Any] = {"balanced": self.balanced, "abstain_below": self.abstain, "wanted_accuracy": self.accuracy}
        head = fit_head(examples, encoder_id, **options)
        head.save(self.out)
        write_json(self.json, {"classes": head.classes, **head.report})
        if self.confusion:
            _draw_confusion(self.confusion, head)
        accuracy = head.report["held_back_accuracy"]
        told = "" if accuracy is None else f", held-back accuracy {accuracy:.2%}"
        print(f"{self.out}: {len(head.classes)} classes, {len(examples.groups)} pictures{told}")
        print("\n".join(report_lines(head.report)))

    def _examples(self) -> tuple[Examples, str]:
        """What to learn from, and whose vectors they are."""
        from serve.gallery import Gallery
        from serve.heads.labelled import labelled_items, labelled_pictures

        if self.gallery is not None:
            with Gallery.open(self.gallery) as gallery:
                return labelled_items(gallery, self.where), gallery.encoder_id
        assert self.encoder is not None and self.images is not None  # noqa: PT018
        encoder = open_encoder(self.encoder)
        return labelled_pictures(encoder, self.images), encoder.encoder_id


def _draw_confusion(path: Path, head: Head) -> None:
    from serve.heads.plot import save_confusion
    from serve.heads.scores import confusion_matrix

    title = f"{head.report['held_back_pictures']} pictures held back"
    save_confusion(path, confusion_matrix(head.report, len(head.classes)), head.classes, title)
