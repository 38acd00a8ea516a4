"""Re-identification: figures, and decisions."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from commands.opening import GalleryName, is_run, open_encoder, open_gallery
from commands.telling import tell_left_out, write_json
from serve.errors import SimclrError
from serve.protocols.names import Flip, ProtocolName

if TYPE_CHECKING:
    from serve.encoder import Encoder
    from serve.gallery import Gallery
    from serve.protocols.run import Outcome


@dataclass(frozen=True, kw_only=True)
class ReidEvaluate:
    """Score an encoder on a re-ID set by its protocol: CMC, mAP in both forms, mINP, MRR, by camera, with intervals."""

    encoder: str | None = None
    """A RUN folder, a model repository, or grpc://host:port/NAME, http://host:port/NAME. Not needed for vectors."""
    images: str | None = None
    """A known data set's root, ID/cam1/x.jpg, or a CSV with identity and camera (docs/reid.md)."""
    query: str | None = None
    """Instead of --images: the queries, as pictures or as Parquet vectors of `simclr embed`."""
    gallery: str | None = None
    """Beside --query: the gallery, likewise."""
    protocol: ProtocolName | None = None
    """Default: that of the layout; of other data cross-camera, or single-camera where there is only one."""
    flip: Flip | None = None
    """What is done with the mirrored picture's vector. Default: none; sysu30k: sysu-official."""
    rerank: bool = False
    """Re-rank with k-reciprocal neighbours, each query on its own."""
    transductive: bool = False
    """Re-rank all queries at once, as published: each then depends on the others."""
    vectors: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Keep vectors there: a run that was interrupted goes on, one that is repeated embeds nothing."""
    seed: int = 0
    """Of what a protocol draws (vehicleid, cuhk03-classic)."""
    strict: bool = False
    """Fail where the counts are not the published ones."""
    per_query: Annotated[Path | None, arg(metavar="FILE.jsonl")] = None
    """Write a line for every query there."""
    json: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the figures there."""

    def __post_init__(self) -> None:
        if (self.images is None) == (self.query is None) or (self.query is None) != (self.gallery is None):
            raise SimclrError("wanted either --images, or --query and --gallery")
        if self.images is not None and self.encoder is None:
            raise SimclrError("--images needs --encoder")
        if self.strict and self.images is None:
            raise SimclrError("--strict belongs to --images, a data set's root")

    def __call__(self) -> None:
        from serve.protocols.report import lines, write_per_query

        outcome = self._outcome()
        told = outcome.figures()
        write_json(self.json, told)
        if self.per_query:
            write_per_query(outcome.scores, self.per_query)
        for remark in (told["data"], told["note"]):
            if remark:
                print(remark, file=sys.stderr)
        for line in lines(told):
            print(line)

    def _outcome(self) -> Outcome:
        from serve.protocols.run import Options, evaluate_files, evaluate_pictures
        from serve.protocols.score import Rerank

        rerank = Rerank(self.transductive) if self.rerank or self.transductive else None
        options = Options(
            protocol=self.protocol, flip=self.flip, rerank=rerank, parts=self.vectors, seed=self.seed, strict=self.strict
        )
        encoder = None if self.encoder is None else self._encoder(self.encoder)
        if self.images is not None:
            assert encoder is not None
            return evaluate_pictures(encoder, self.images, options)
        return evaluate_files(str(self.query), str(self.gallery), encoder, options)

    def _encoder(self, spec: str) -> Encoder:
        """Plain features where they are to be added up and the encoder has them: a RUN's."""
        mirrored = self.protocol == "sysu30k" if self.flip is None else self.flip != "none"
        if mirrored and is_run(spec):
            from train.torch_encoder import open_run

            return open_run(Path(spec), unit=False)
        return open_encoder(spec)


@dataclass(frozen=True, kw_only=True)
class ReidIdentify:
    """Say who is on pictures of one probe: somebody enrolled, or UNKNOWN below the threshold."""

    gallery: Positional[GalleryName]
    """A folder, or an address in Milvus (docs/scaling.md)."""
    image: tuple[Path, ...]
    """One picture, or several of one track, which are pooled."""
    threshold_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """Of `simclr reid calibrate`. Without it, identities are ranked and nothing is decided."""
    where: str | None = None
    """Only among these, such as: camera != 2 and time > 100"""
    k: Annotated[int, arg(aliases=["-k"])] = 5
    """How many identities to list."""
    encoder: str | None = None
    """The encoder that made the gallery. Default: the one used before."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not self.image:
            raise SimclrError("wanted --image FILE, one or more")

    def __call__(self) -> None:
        from serve.identity.calibration import Calibration
        from serve.identity.decision import summary
        from serve.identity.identify import identify, outgrown

        calibration = Calibration.load(self.threshold_file) if self.threshold_file else None
        with open_gallery(self.gallery, self.encoder) as gallery:
            assert gallery.encoder is not None
            decision = identify(gallery, gallery.encoder.embed(self.image), calibration, where=self.where, k=self.k)
            warning = outgrown(gallery, calibration) if calibration else None
        if warning:
            print(warning, file=sys.stderr)
        print(json.dumps(asdict(decision)) if self.json else summary(decision))


@dataclass(frozen=True, kw_only=True)
class ReidCalibrate:
    """Choose the score from which on a probe is named, so that strangers are named no more often than asked."""

    gallery: Positional[GalleryName]
    """The gallery's folder, with identities enrolled."""
    probes: str
    """Other pictures of known identity; some of them should be of identities that are not enrolled."""
    fpir: float
    """Share of strangers that may be named, such as 0.01."""
    out: Path
    """File to write."""
    tracks: bool = False
    """Pictures of one identity and camera are one probe, as a tracker gives them."""
    where: str = ""
    """Only among these, such as: camera != 2"""
    plot: Annotated[Path | None, arg(metavar="FILE.png")] = None
    """Also draw TPIR against FPIR there."""
    encoder: str | None = None
    """The encoder that made the gallery. Default: the one used before."""

    def __post_init__(self) -> None:
        if not 0 < self.fpir < 1:
            raise SimclrError(f"--fpir is {self.fpir}, wanted more than 0 and less than 1")

    def __call__(self) -> None:
        from serve.bulk import embed_samples
        from serve.identity.trials import choose_threshold, draw, run_trials
        from serve.sources import open_source

        images = open_source(self.probes)
        with open_gallery(self.gallery, self.encoder) as gallery:
            assert gallery.encoder is not None
            vectors, kept, unreadable = embed_samples(gallery.encoder, images.query or images.everything, "probes")
            tell_left_out(unreadable)
            trials = run_trials(gallery, kept, vectors, tracks=self.tracks, where=self.where)
            calibration = choose_threshold(gallery, trials, self.fpir, tracks=self.tracks, where=self.where)
        calibration.save(self.out)
        if self.plot:
            draw(trials, calibration, self.plot)
        if warning := calibration.warning():
            print(warning, file=sys.stderr)
        print(f"{self.out}\n{calibration.summary()}")


@dataclass(frozen=True, kw_only=True)
class ReidTrack:
    """Give identities to the crops of a tracker, one by one in the order of time."""

    crops: Positional[Annotated[str, arg(metavar="SRC")]]
    """CSV with path, track (the tracker's id within its camera), camera, time; with identity, IDF1 is told."""
    threshold_file: Annotated[Path, arg(metavar="FILE")]
    """Of `simclr reid calibrate --tracks`."""
    encoder: str | None = None
    """A RUN folder, a model repository, or grpc://…, http://…  Default: the gallery's."""
    gallery: GalleryName | None = None
    """A gallery whose identities may be met; it stays as it is."""
    evidence: int = 3
    """Pictures that a track has before it becomes a new identity."""
    memory_s: float = math.inf
    """Tracks not seen for longer are forgotten. Default: none."""
    out: Annotated[Path | None, arg(metavar="FILE.jsonl")] = None
    """Where to write a line for every crop. Default: standard output."""

    def __post_init__(self) -> None:
        if self.encoder is None and self.gallery is None:
            raise SimclrError("wanted --encoder ENC, --gallery GALLERY or both")
        if self.evidence < 1 or not self.memory_s > 0:
            raise SimclrError(f"--evidence is {self.evidence}, --memory-s {self.memory_s}; wanted 1 or more, and more than 0")

    def __call__(self) -> None:
        if self.gallery is None:
            self._follow(open_encoder(str(self.encoder)), None)
            return
        with open_gallery(self.gallery, self.encoder) as gallery:
            assert gallery.encoder is not None
            self._follow(gallery.encoder, gallery)

    def _follow(self, encoder: Encoder, gallery: Gallery | None) -> None:
        from serve.bulk import embed_samples
        from serve.identity.calibration import Calibration
        from serve.identity.rolling import RollingReid
        from serve.identity.tracks import follow, in_time, scored, write_assignments
        from serve.sources import open_source

        calibration, listed = Calibration.load(self.threshold_file), in_time(open_source(self.crops).everything)
        calibration.require(encoder.encoder_id)
        vectors, crops, unreadable = embed_samples(encoder, listed, "crops")
        tell_left_out(unreadable)
        rolling = RollingReid(
            threshold=calibration.threshold,
            dim=encoder.manifest.embedding_dim,
            gallery=gallery,
            evidence=self.evidence,
            memory_s=self.memory_s,
        )
        assignments = follow(rolling, crops, vectors)
        write_assignments(assignments, self.out)
        if figures := scored(crops, assignments):
            print(f"IDF1 {figures[0]:.1%} online, {figures[1]:.1%} with the last word on each track", file=sys.stderr)
