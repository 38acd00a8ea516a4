"""JPEG files of photo size -> unit vectors: ours beside torch eager, torch.compile and OpenVINO, in one run.

    python benchmarks/embed.py --peer-python .venv-peers/bin/python

Every side runs in a process of its own, in turn, several times, each after a warm-up on the first files; the ratio is that of
the medians. Ours: `serve.bulk.embed_samples` on what `simclr export` publishes. The peers: PIL, torchvision's usual
transforms and a DataLoader with as many workers as cores, then the network in torch or its fp32 graph in OpenVINO.
All have the same weights: random ones whose batch norms have seen the pictures, or those of --run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the peers' environment has our code, not our package

from benchmarks.sides import SideFailed, run_side, seconds

SIDES = ("ours-fp32", "ours-int8", "torch-eager", "torch-compile", "openvino")
SIZE_PX, BATCH, SHOTS = 224, 32, 10
ATTEMPTS, TIMEOUT_S = 3, 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of .jpg files instead of drawn ones")
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="trained runs instead of random ResNet-18 and -50")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--photo-px", type=int, nargs=2, default=(1024, 768), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--arch", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers' environment (make bench)")
    parser.add_argument("--json", type=Path, help="also write every figure there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vectors", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(embed_files(arguments.side, arguments.model, arguments.images, arguments.vectors)))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Prepare pictures and encoders, run the sides in turn, print the table."""
    report: dict[str, Any] = {"peak": matrix_peak(), "networks": {}}
    print("matrix peak: " + ", ".join(f"{name} {rate / 1e9:,.0f} Gop/s" for name, rate in report["peak"].items()))
    with tempfile.TemporaryDirectory() as scratch:
        images = arguments.images or draw_photos(Path(scratch) / "photos", arguments.count, tuple(arguments.photo_px))
        runs = arguments.run or [random_run(Path(scratch) / arch, arch, images) for arch in arguments.arch]
        for run in runs:
            report["networks"][run.name] = measure(run, images, Path(scratch) / "models" / run.name, arguments)
            show(run.name, report["networks"][run.name], report["peak"])
            if arguments.json:
                arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(run: Path, images: Path, models: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from export.publish import publish
    from train.checkpoint import load_encoder

    for precision in ("fp32", "int8"):
        options = {"precision": precision, "images": str(images), "accept_loss": True}
        publish(*load_encoder(run), models / precision, name="bench", head=None, target="cpu", **options)
    rates: dict[str, list[float]] = {side: [] for side in arguments.sides}
    vectors: dict[str, np.ndarray] = {}
    for _ in range(arguments.repeats):
        for side in arguments.sides:
            python = arguments.peer_python if side == "openvino" else sys.executable
            model = models / side.removeprefix("ours-") if side.startswith("ours") else models / "fp32"
            model = run if side.startswith("torch") else model
            found = embed_apart(python, side, model, images)
            if found is not None:
                rates[side].append(found[0])
                vectors[side] = found[1]
    wanted = vectors.get("ours-fp32")
    recall = {side: recall_at_10(found, wanted) for side, found in vectors.items() if wanted is not None}
    return {"images_per_s": rates, "recall_at_10": recall, "ops_per_image": operations(run)}


def embed_apart(python: str, side: str, model: Path, images: Path) -> tuple[float, np.ndarray] | None:
    """Pictures per second and vectors (N, D) in file order; None where its library is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors.npy"
        options = ("--model", model, "--images", images, "--vectors", vectors)
        for _ in range(ATTEMPTS):  # a DataLoader forked beside OpenVINO's threads hung once in four runs
            try:
                rate = json.loads(run_side(python, __file__, side, *options, timeout_s=TIMEOUT_S))
                return float(rate), np.load(vectors)
            except subprocess.TimeoutExpired:
                continue
            except SideFailed as failure:
                if "No module named 'openvino'" in str(failure):
                    return None
                raise
    sys.exit(f"{side} hung {ATTEMPTS} times for {TIMEOUT_S} s")


def embed_files(side: str, model: Path, images: Path, vectors_file: Path) -> float:
    """Pictures per second; the vectors are written to the file."""
    files = sorted(images.rglob("*.jpg"))
    embed = {"torch-eager": torch_side, "torch-compile": torch_side, "openvino": openvino_side}.get(side, our_side)(model, side)
    embed(files[: 3 * BATCH])
    started = time.perf_counter()
    vectors = embed(files)
    rate = len(files) / (time.perf_counter() - started)
    np.save(vectors_file, vectors)
    return rate


def our_side(model: Path, side: str) -> Callable[[list[Path]], np.ndarray]:  # noqa: ARG001  # one signature for all sides
    from serve.bulk import embed_samples
    from serve.encoder import open_encoder
    from serve.samples import Sample

    encoder = open_encoder(model)
    return lambda files: embed_samples(encoder, [Sample(str(file)) for file in files], "embedding")[0]


def torch_side(model: Path, side: str) -> Callable[[list[Path]], np.ndarray]:
    import torch

    from train.checkpoint import load_encoder

    network = load_encoder(model)[0].eval()
    if side == "torch-compile":
        network = torch.compile(network)

    def embed(files: list[Path]) -> np.ndarray:
        with torch.inference_mode():
            parts = [torch.nn.functional.normalize(network(batch)).numpy() for batch in loaded(files)]
        return np.concatenate(parts)

    return embed


def openvino_side(model: Path, side: str) -> Callable[[list[Path]], np.ndarray]:  # noqa: ARG001
    import openvino

    graph = model / "bench_encoder" / "1" / "model.onnx"
    compiled = openvino.Core().compile_model(graph, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})

    def embed(files: list[Path]) -> np.ndarray:
        found: list[np.ndarray] = [np.empty(0)] * -(-len(files) // BATCH)
        queue = openvino.AsyncInferQueue(compiled)
        queue.set_callback(lambda request, at: found.__setitem__(at, request.get_output_tensor(0).data.copy()))
        for at, batch in enumerate(loaded(files, scaled=False)):
            queue.start_async({0: batch.numpy()}, at)
        queue.wait_all()
        return np.concatenate(found)

    return embed


def loaded(files: list[Path], *, scaled: bool = True) -> Iterator[Any]:
    """Batches as the peers' users load them: float (B, 3, H, W), or uint8 (B, H, W, 3) for a graph that scales itself."""
    import torch
    from torchvision.transforms import v2

    steps = [v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE_PX)]
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)] if scaled else [np.asarray]
    transform = v2.Compose(steps)
    yield from torch.utils.data.DataLoader(Files(files, transform), batch_size=BATCH, num_workers=os.cpu_count() or 1)


class Files:
    """A map-style data set of pictures."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], Any]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def random_run(run: Path, arch: str, images: Path) -> Path:
    """A RUN with random weights; batch norms with the statistics of some pictures, without which all vectors are alike."""
    import torch

    from serve.contract import Preprocess
    from serve.preprocess import load_image
    from train.checkpoint import save_encoder
    from train.encoder import Encoder

    size = {"height_px": SIZE_PX, "width_px": SIZE_PX, "crop": 0.875}
    frame = Preprocess(**size, resize="center_crop", resample="bicubic", jpeg="reduced")
    torch.manual_seed(0)
    encoder = Encoder(arch, 1.0, "imagenet")
    files = sorted(images.rglob("*.jpg"))
    pixels = np.stack([load_image(file, frame) for file in files[:: max(1, len(files) // 64)]])
    for norm in (module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None  # the plain mean of what it sees
        torch.nn.init.ones_(norm.weight)  # SimCLR starts a block's last one at 0, which would leave out half the network
    with torch.inference_mode():
        encoder.train()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    run.mkdir(parents=True)
    save_encoder(run, encoder.eval(), frame, {"images": str(images)})
    return run


def draw_photos(folder: Path, count: int, size_px: tuple[int, int]) -> Path:
    """Scenes of shapes on a textured ground, each taken ten times from a little elsewhere in other light."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    width, height = size_px
    for number in range(count):
        if number % SHOTS == 0:
            scene = draw_scene(rng, (width * 5 // 4, height * 5 // 4))
        left, top = (int(rng.integers(0, edge // 4)) for edge in size_px)
        shot = np.asarray(scene.crop((left, top, left + width, top + height)), np.float32) * rng.uniform(0.7, 1.2)
        noisy = shot + rng.normal(0, 6, shot.shape).astype(np.float32)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)
    return folder


def draw_scene(rng: np.random.Generator, size_px: tuple[int, int]) -> Image.Image:
    width, height = size_px
    ground = rng.integers(0, 256, (int(rng.integers(3, 40)), int(rng.integers(3, 40)), 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize(size_px, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 25))):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(20, width // 3), rng.integers(20, height // 3)
        shape = (draw.ellipse, draw.rectangle, draw.arc)[int(rng.integers(3))]
        shape(
            (int(x), int(y), int(x + w), int(y + h)), *((0, 300) if shape == draw.arc else ()), tuple(rng.integers(0, 256, 3))
        )
    return image.filter(ImageFilter.GaussianBlur(1))


def recall_at_10(vectors_ND: np.ndarray, wanted_ND: np.ndarray) -> float:
    """Share of the ten nearest in the fp32 gallery that queries of another side find there as well."""
    tops = []
    for queries in (vectors_ND, wanted_ND):
        scores = queries @ wanted_ND.T
        np.fill_diagonal(scores, -2)
        tops.append(np.argsort(-scores, axis=1, kind="stable")[:, :10])
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*tops, strict=True)]))


def operations(run: Path) -> float:
    """Multiplications and additions of one picture."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from train.checkpoint import load_encoder

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        load_encoder(run)[0](torch.zeros(1, 3, SIZE_PX, SIZE_PX))
    return float(counter.get_total_flops())


def matrix_peak(edges: tuple[int, ...] = (512, 1024, 2048, 3072), repeats: int = 8) -> dict[str, float]:
    """The best rate of square matrix products in ONNX Runtime, in operations per second: float32, and uint8 x int8."""
    return {
        kind: max(2 * edge**3 / min(seconds(product(edge, kind)) for _ in range(repeats)) for edge in edges)
        for kind in ("fp32", "int8")
    }


def product(edge: int, kind: str) -> Callable[[], object]:
    """A square matrix times a constant one, as a network's weights are."""
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    if kind == "fp32":
        operator, left, right, out = "MatMul", *(rng.random((edge, edge), dtype=np.float32) for _ in range(2)), np.float32
    else:
        low, high = rng.integers(0, 256, (edge, edge), np.uint8), rng.integers(-128, 128, (edge, edge), np.int8)
        operator, left, right, out = "MatMulInteger", low, high, np.int32
    inputs, outputs = (
        [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [edge, edge])]
        for name, dtype in (("a", left.dtype), ("c", out))
    )
    node = helper.make_node(operator, ["a", "b"], ["c"])
    graph = helper.make_graph([node], "peak", inputs, outputs, [numpy_helper.from_array(right, "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": left})


def show(name: str, report: dict[str, Any], peak: dict[str, float]) -> None:
    rates = report["images_per_s"]
    base = statistics.median(rates["torch-eager"]) if rates.get("torch-eager") else float("nan")
    print(f"{name}: {report['ops_per_image'] / 1e9:.2f} Gop per picture")
    for side, found in rates.items():
        if not found:
            print(f"  {side:14} not installed")
            continue
        median = statistics.median(found)
        share = median * report["ops_per_image"] / peak["int8" if side == "ours-int8" else "fp32"]
        recall = report["recall_at_10"].get(side, float("nan"))
        print(
            f"  {side:14} {median:7.1f} img/s ({min(found):.1f} to {max(found):.1f})  {median / base:5.2f}x eager  "
            f"recall@10 {recall:.3f}  {share:.0%} of the matrix peak, decoding included",
            flush=True,
        )


if __name__ == "__main__":
    main()
