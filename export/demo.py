"""`simclr demo`: the whole path once, every stage the real component, every figure into demo.json.

images -> training -> quality -> head -> export and parity -> Triton -> gallery and search -> web page
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.publish import publish
from export.repository import Target
from serve.bulk import add_pictures, embed_samples
from serve.classify import Head
from serve.encoder import Encoder, open_encoder
from serve.errors import SimclrError, TritonStartError
from serve.files import atomic_path
from serve.gallery import Gallery
from serve.heads.fit import fit_head
from serve.heads.labelled import labelled_pictures
from serve.identity.calibration import Calibration
from serve.identity.trials import choose_threshold, run_trials
from serve.ports import HOST
from serve.preprocess import ImageError, decode
from serve.protocols.run import Options, evaluate_pictures
from serve.samples import ImageSet, Sample
from serve.signals import stopped_by_sigterm
from serve.sources import open_source, read_bytes
from serve.storage.gallery_folder import MANIFEST_COPY_NAME
from serve.triton.client import TritonEncoder
from serve.triton_server import TritonServer
from train.checkpoint import CHECKPOINT, CONFIG, METRICS, is_finished, load_encoder
from train.config import PretrainConfig
from train.data import preprocess_for
from train.demo_data import draw_demo_set
from train.pretrain import pretrain, samples_per_second
from train.probe import evaluate, score_head, view_retrieval
from train.torch_encoder import ColourHistogram, TorchEncoder, open_run, untrained

NAME = "simclr"
MOST_EPOCHS = 200
LONG_MINUTES = 8
"""From here on a CPU gets further with the wider network."""
GALLERY_MOST = 20_000
ASKED_FPIR = 0.1
PARITY_PICTURES, TRANSPORT_PICTURES, SEARCHES = 32, 64, 100
STEPS = 7


def run_demo(*, images: str | None, out: Path, minutes: float, app: bool, port: int) -> None:
    """Walk the path and open the web page unless `app` is false. Raises: SimclrError, OSError."""
    if app:
        from app import require_free_port

        require_free_port(HOST, port)  # rather now than after the training
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    _step(1, f"Read {images}" if images else "Draw people walking past four cameras (generated pictures, Market-1501 layout)")
    source = images or str(draw_demo_set(out / "people"))
    pictures = open_source(source)
    report: dict[str, Any] = {"images": source, "pictures": len(pictures.everything), "generated": images is None}

    _step(2, f"Train SimCLR without labels, about {minutes:g} min")
    run = _train(source, pictures, out / "run", minutes, report)
    encoder = open_run(run)

    _step(3, "Score it beside an untrained network and a colour histogram")
    report["quality"] = _quality(encoder, source, pictures)

    _step(4, "Fit a linear head on the labels")
    head = _fit_head(encoder, source, pictures, out, report)

    _step(5, "Export to ONNX, check parity, write the Triton model repository")
    repository = out / "model_repository"
    golden = [read_bytes(sample.source) for sample in pictures.everything[:PARITY_PICTURES]]
    target: Target = "gpu" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"name": NAME, "head": head, "target": target, "pictures": _readable(golden)}
    manifest, models = publish(*load_encoder(run), repository, **options)
    report["export"] = {"encoder_id": manifest.encoder_id, "models": models, **manifest.model_dump()["parity"]}

    _step(6, "Serve it with Triton")
    with stopped_by_sigterm(), _served(repository, report) as (served, spec, notice):
        if isinstance(served, TritonEncoder):
            http = TritonEncoder(f"{report['triton']['http']}/{NAME}")
            report["transports"] = _transports(served, http, open_encoder(repository), pictures.everything)
        _step(7, "Fill a gallery, search it, choose a threshold")
        with _gallery(out / "gallery", served, repository, pictures) as gallery:
            report["search"] = _searches(gallery, served)
            calibration = _threshold(gallery, pictures, out, report)
            report["minutes_in_all"] = round((time.monotonic() - started) / 60, 2)
            _write(out / "demo.json", report)
            _summarise(report, out)
            if app:
                from app import build_app, serve_app

                heads = {} if head is None else {"head": head}
                blocks = build_app(gallery, served, heads=heads, encoder_spec=spec, calibration=calibration, notice=notice)
                serve_app(blocks, port=port)


def _step(number: int, text: str) -> None:
    print(f"\n[{number}/{STEPS}] {text}", file=sys.stderr, flush=True)


def _train(source: str, pictures: ImageSet, run: Path, minutes: float, report: dict[str, Any]) -> Path:
    config = former_config(run, source)
    if config is None:
        config = fitting_config(source, pictures, run, minutes)
    if is_finished(run):
        print(f"{run} holds a finished run of these pictures: taken as it is", file=sys.stderr)
    else:
        pretrain(config)
    steps = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    rates, last = [step["samples_per_s"] for step in steps], steps[-1]
    report["training"] = {
        "minutes": round(sum(config.batch_size / rate for rate in rates) / 60, 2),  # of all calls that went on with this run
        "epochs": last["epoch"],
        "steps": last["step"],
        "loss": last["loss"],
        "chance_loss": last["chance_loss"],
        "contrastive_top1": last["contrastive_top1"],
        "chance_top1": last["chance_top1"],
        "samples_per_s": round(statistics.median(rates), 1),
        "network": f"{config.arch} x{config.width:g}",
        "batch_size": config.batch_size,
    }
    return run


def former_config(run: Path, source: str) -> PretrainConfig | None:
    """The configuration of a demo that was interrupted here, to go on with. Raises: SimclrError for other pictures."""
    if not (run / CONFIG).exists():
        return None
    recorded = json.loads((run / CONFIG).read_text())
    if recorded["images"] != source:
        raise SimclrError(f"{run.parent}: holds a demo of {recorded['images']}, this one is of {source}; choose another --out")
    if not (run / CHECKPOINT).exists():  # it ended before anything was worth keeping
        shutil.rmtree(run)
        return None
    names = {field.name for field in fields(PretrainConfig)} - {"run", "resume", "workers"}
    return PretrainConfig(run=run, resume=True, **{name: recorded[name] for name in names & recorded.keys()})


def fitting_config(source: str, pictures: ImageSet, run: Path, minutes: float) -> PretrainConfig:
    """A network that this machine trains in the time given, and as many epochs as fit into it."""
    fitting = preprocess_for(pictures.train, None)
    stretched = fitting.resize == "stretch"
    on_gpu = torch.cuda.is_available()
    size = None if on_gpu or max(fitting.height_px, fitting.width_px) <= 32 else ("64x32" if stretched else "64")
    batch_size = max(2, min(256, len(pictures.train) * 3 // 4))  # some may turn out to be unreadable
    config = PretrainConfig(
        images=source,
        run=run,
        width=1 if on_gpu else (0.5 if minutes >= LONG_MINUTES else 0.25),
        stem=None if on_gpu else "small-s2",
        image_size=size,
        batch_size=batch_size,
        crop_area=None if stretched else 0.2,  # milder views and twice the paper's rate get further in minutes
        learning_rate=0.15 * math.sqrt(batch_size),
        strength=0.5,
    )
    rate = samples_per_second(config, pictures)
    epochs = min(MOST_EPOCHS, max(1, round(rate * minutes * 60 / len(pictures.train), 2)))
    print(f"this machine trains {rate:.0f} pictures/s: {epochs:g} epochs", file=sys.stderr)
    return replace(config, epochs=epochs)


def _quality(encoder: TorchEncoder, source: str, pictures: ImageSet) -> dict[str, Any]:
    """The same figures for the trained encoder and both baselines: re-ID, kNN or view retrieval, whichever the set allows."""
    contenders: dict[str, Encoder] = {
        "trained": encoder,
        "untrained": untrained(encoder.manifest, pictures.train),
        "colour_histogram": ColourHistogram(encoder.manifest),
    }
    return {name: _figures(contender, source, pictures) for name, contender in contenders.items()}


def _figures(encoder: Encoder, source: str, pictures: ImageSet) -> dict[str, float]:
    found = {"view_retrieval": view_retrieval(encoder, pictures.train)}
    if pictures.query and pictures.gallery:
        reid = evaluate_pictures(encoder, source, Options()).figures()
        found |= {name: reid[name] for name in ("rank1", "rank5", "map_step", "map_trapezoid")}
    elif _has_labels(pictures):
        found["knn_accuracy"] = evaluate(encoder, source, None, "knn")["accuracy"]
    return found


def _has_labels(pictures: ImageSet) -> bool:
    return len({sample.label for sample in pictures.train if sample.label is not None}) > 1


def _fit_head(encoder: TorchEncoder, source: str, pictures: ImageSet, out: Path, report: dict[str, Any]) -> Head | None:
    """On the labels of the pictures; on the generated set, the pattern of the clothes, scored on people not seen before."""
    patterns = Path(source) / "patterns_train.csv"
    if patterns.exists():
        head = fit_head(labelled_pictures(encoder, str(patterns)), encoder.encoder_id)
        head = score_head(head, encoder, open_source(patterns.with_name("patterns_test.csv")).train)
    elif _has_labels(pictures):
        head = fit_head(labelled_pictures(encoder, source), encoder.encoder_id)
        head = score_head(head, encoder, pictures.test) if pictures.test else head
    else:
        print("no labels: no head", file=sys.stderr)
        return None
    head.save(out / "head.npz")
    report["head"] = {"classes": list(head.classes), **head.report}
    return head


def _readable(pictures: Sequence[bytes]) -> list[bytes]:
    good = []
    for picture in pictures:
        try:
            decode(picture)
            good.append(picture)
        except ImageError:
            continue
    return good


@contextmanager
def _served(repository: Path, report: dict[str, Any]) -> Iterator[tuple[Encoder, str, str | None]]:
    """The encoder through a real Triton server, its address and no notice; or in-process, with the reason."""
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0)
    try:
        server.start()
    except TritonStartError as error:
        notice = f"Triton does not run here, so this page answers in-process: {error}"
        print(notice, file=sys.stderr)
        report["triton"] = {"running": False, "reason": str(error)}
        yield open_encoder(repository), str(repository), notice
        return
    try:
        spec = f"{server.url}/{NAME}"
        print(f"ready: {spec} and {server.http_url}", file=sys.stderr)
        report["triton"] = {"running": True, "grpc": server.url, "http": server.http_url}
        yield open_encoder(spec), spec, None
    finally:
        server.stop()


def _transports(served: TritonEncoder, http: TritonEncoder, local: Encoder, samples: Sequence[Sample]) -> dict[str, float]:
    """Largest cosine distance of each way to the in-process vectors of the same pictures."""
    pictures = _readable([read_bytes(sample.source) for sample in samples[:TRANSPORT_PICTURES]])
    wanted = local.embed(pictures)
    ways = {
        "grpc_image": served.embed(pictures),
        "grpc_bytes": served.embed_bytes(pictures),
        "http_image": http.embed(pictures),
        "http_bytes": http.embed_bytes(pictures),
    }
    distances = {name: float(1 - (got.astype(np.float64) * wanted).sum(1).min()) for name, got in ways.items()}
    return {"pictures": len(pictures), **{name: max(0.0, distance) for name, distance in distances.items()}}


@contextmanager
def _gallery(folder: Path, encoder: Encoder, repository: Path, pictures: ImageSet) -> Iterator[Gallery]:
    samples = (pictures.gallery or pictures.test or pictures.everything)[:GALLERY_MOST]
    card = folder / MANIFEST_COPY_NAME
    if card.exists() and json.loads(card.read_text())["encoder_id"] != encoder.encoder_id:
        shutil.rmtree(folder)  # left by an earlier demo in this folder, with another encoder
    with Gallery.open(folder, encoder, create=True) as gallery:
        gallery.encoder_spec = str(repository.absolute())  # Triton's address is gone when the demo ends
        added = add_pictures(gallery, samples)
        for picture in added.unreadable[:3]:
            print(f"left out: {picture.reason}", file=sys.stderr)
        yield gallery


def _searches(gallery: Gallery, encoder: Encoder) -> dict[str, Any]:
    """Every picture must find itself; how alike its neighbours are; how long a search takes, embedding included."""
    items = gallery.items()
    probes = items[:: -(-len(items) // SEARCHES)]
    found_itself, same, seconds = 0, [], []
    for probe in probes:
        data = read_bytes(probe.source)
        started = time.perf_counter()
        hits = gallery.search(encoder.embed([data])[0], k=11)
        seconds.append(time.perf_counter() - started)
        found_itself += hits[0].score > 1 - 1e-5
        group = probe.label or probe.identity
        same += [(hit.label or hit.identity) == group for hit in hits if hit.id != probe.id][:10]
    known = any(item.label or item.identity for item in probes)
    return {
        "gallery": len(gallery),
        "searches": len(probes),
        "found_itself": found_itself / len(probes),
        "precision_at_10": statistics.mean(same) if known and same else None,
        "p50_ms": round(statistics.median(seconds) * 1000, 2),
    }


def _threshold(gallery: Gallery, pictures: ImageSet, out: Path, report: dict[str, Any]) -> Calibration | None:
    """Of a re-ID set: from which score on a query is named, where each identity is a stranger in its turn."""
    if not pictures.query:
        return None
    assert gallery.encoder is not None
    try:
        vectors, probes, _ = embed_samples(gallery.encoder, pictures.query, "probes")
        calibration = choose_threshold(gallery, run_trials(gallery, probes, vectors), ASKED_FPIR)
    except SimclrError as error:
        print(f"no threshold: {error}", file=sys.stderr)
        return None
    calibration.save(out / "threshold.json")
    report["threshold"] = calibration.model_dump(include={"asked_fpir", "threshold", "fpir", "tpir"})
    return calibration


def _write(path: Path, report: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


def _summarise(report: dict[str, Any], out: Path) -> None:
    """The figures as a table, and where everything lies."""
    rows = report["quality"]
    names = list(rows["trained"])
    print(f"\n{'':18}" + "".join(f"{name:>16}" for name in names))
    for contender, figures in rows.items():
        print(f"{contender.replace('_', ' '):18}" + "".join(f"{figures[name]:>16.1%}" for name in names))
    if "head" in report:
        head = report["head"]
        right = head.get("test_accuracy", head["held_back_accuracy"])
        print(f"\nlinear head: {'not scored' if right is None else f'{right:.1%} right'}, {len(head['classes'])} classes")
    search = report["search"]
    print(f"gallery: {search['gallery']} pictures, a search takes {search['p50_ms']} ms")
    if "threshold" in report:
        rates = {name: report["threshold"][name]["rate"] for name in ("tpir", "fpir")}
        print(f"threshold: {rates['tpir']:.1%} of the queries named rightly, {rates['fpir']:.1%} of strangers named")
    print(f"{out / 'demo.json'} has every figure; {report['minutes_in_all']} min in all")
