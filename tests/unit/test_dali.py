"""The models for DALI's backend: their configuration, the geometry, and, where DALI is installed, the pixels on its CPU."""

import importlib.util
import io
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from export.repository import MAX_BATCH, write_repository
from export.versions import roll_back
from serve.contract import Manifest, Preprocess
from serve.preprocess import crop_box, load_image
from tests.bad_images import encoded
from tests.toy_encoder import DIM, HEIGHT, WIDTH, toy_head, write_toy_encoder

BOTH = {"toy_preprocess_dali", "toy_embed_dali"}
SQUARE = Preprocess(height_px=64, width_px=64, resize="center_crop", crop=0.875, resample="bicubic", jpeg="full")
TALL = Preprocess(height_px=64, width_px=40, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")
STRETCHED = Preprocess(height_px=64, width_px=32, resize="stretch", crop=1.0, resample="bicubic", jpeg="full")


def write(folder, *, dali=True, head=False):
    graph, manifest = write_toy_encoder(folder / "source")
    found = toy_head(manifest.encoder_id) if head else None
    return write_repository(folder / "repo", graph=graph, manifest=manifest, head=found, target="gpu", dali=dali)


def config(folder, model):
    return text_format.Parse((folder / "repo" / model / "config.pbtxt").read_text(), pb.ModelConfig())


def tensors(found):
    return [(tensor.name, pb.DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in found]


# --- the repository ---------------------------------------------------------------------------------------------------


def test_they_stand_beside_the_others(tmp_path):
    assert set(write(tmp_path, head=True)) > BOTH
    plain = write(tmp_path / "plain", dali=False, head=True)
    assert [config(tmp_path / "plain", model) for model in plain] == [config(tmp_path, model) for model in plain]


def test_they_take_bytes_as_numbers(tmp_path):
    write(tmp_path)
    encoded_picture, image = ("bytes", "TYPE_UINT8", [-1]), ("image", "TYPE_UINT8", [HEIGHT, WIDTH, 3])
    preprocess, embed = (config(tmp_path, model) for model in ("toy_preprocess_dali", "toy_embed_dali"))
    assert (tensors(preprocess.input), tensors(preprocess.output)) == ([encoded_picture], [image])
    assert (tensors(embed.input), tensors(embed.output)) == ([encoded_picture], [("embedding", "TYPE_FP32", [DIM])])
    assert [step.model_name for step in embed.ensemble_scheduling.step] == ["toy_preprocess_dali", "toy_encoder"]
    manifest = Manifest.read(tmp_path / "repo/toy_encoder/1/manifest.json")
    assert embed.parameters["encoder_id"].string_value == manifest.encoder_id


def test_a_bad_picture_must_not_share_a_batch_with_other_clients(tmp_path):
    write(tmp_path)
    found = config(tmp_path, "toy_preprocess_dali")
    assert (found.backend, found.max_batch_size) == ("dali", MAX_BATCH)
    assert not found.HasField("dynamic_batching")
    assert [pb.ModelInstanceGroup.Kind.Name(group.kind) for group in found.instance_group] == ["KIND_GPU"]


def test_the_pipeline_travels_with_the_contract(tmp_path):
    write(tmp_path)
    folder = tmp_path / "repo/toy_preprocess_dali/1"
    assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "dali.py", "preprocess.json"}
    manifest = Manifest.read(tmp_path / "repo/toy_encoder/1/manifest.json")
    assert json.loads((folder / "preprocess.json").read_text()) == manifest.preprocess.model_dump()


def test_they_change_over_and_back_with_the_rest(tmp_path):
    for version in (1, 2):
        write(tmp_path)
        assert {tuple(config(tmp_path, model).version_policy.specific.versions) for model in BOTH} == {(version,)}
    assert roll_back(tmp_path / "repo", "toy") == 1
    assert {tuple(config(tmp_path, model).version_policy.specific.versions) for model in BOTH} == {(1,)}
    assert {step.model_version for step in config(tmp_path, "toy_embed_dali").ensemble_scheduling.step} == {1}


def test_an_export_without_them_takes_them_away(tmp_path):
    write(tmp_path)
    write(tmp_path, dali=False)
    assert not BOTH & {path.name for path in (tmp_path / "repo").iterdir()}


# --- the pipeline -----------------------------------------------------------------------------------------------------


def load_pipeline(folder, preprocess):
    """The module of dali.py as DALI's backend loads it."""
    write(folder)
    path = folder / "repo/toy_preprocess_dali/1/dali.py"
    path.with_name("preprocess.json").write_text(preprocess.model_dump_json())
    spec = importlib.util.spec_from_file_location("autoserialize_mod", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def numpy_as_dali(monkeypatch):
    """What the file imports; the options of its pipeline are kept."""
    options = {}
    dali = ModuleType("nvidia.dali")
    dali.fn, dali.types, dali.math = SimpleNamespace(), SimpleNamespace(), SimpleNamespace(min=np.minimum)
    dali.pipeline_def = lambda **found: lambda function: options.update(found) or function
    triton = ModuleType("nvidia.dali.plugin.triton")
    triton.autoserialize = lambda function: function
    modules = {"nvidia": ModuleType("nvidia"), "nvidia.dali": dali, "nvidia.dali.plugin": ModuleType("nvidia.dali.plugin")}
    for name, module in (modules | {"nvidia.dali.plugin.triton": triton}).items():
        monkeypatch.setitem(sys.modules, name, module)
    return options


@pytest.mark.parametrize("preprocess", [SQUARE, TALL], ids=["square", "tall"])
def test_the_box_is_that_of_every_other_door(tmp_path, numpy_as_dali, preprocess):
    module = load_pipeline(tmp_path, preprocess)
    assert numpy_as_dali["batch_size"] == MAX_BATCH
    aspect = preprocess.height_px / preprocess.width_px
    for width, height in [(100, 80), (80, 100), (33, 500), (500, 33), (1, 1), (4000, 3000)]:
        got = module.crop_box(np.float32(width), np.float32(height))
        np.testing.assert_allclose(got, crop_box(width, height, aspect, preprocess.crop), rtol=1e-6, atol=1e-5)


def run_on_the_cpu(module, pictures):
    """Pixels (N, H, W, 3); a pipeline of its own each time, because one that has failed is of no more use."""
    flags = {"prefetch_queue_depth": 1, "exec_pipelined": False, "exec_async": False}
    pipeline = module.prepare("cpu", device_id=None, batch_size=len(pictures), num_threads=1, **flags)
    pipeline.build()
    length = max(map(len, pictures))
    pipeline.feed_input("bytes", [np.frombuffer(picture.ljust(length, b"\0"), np.uint8) for picture in pictures])
    (images,) = pipeline.run()
    return np.stack([np.asarray(images[row]) for row in range(len(pictures))])


def photo(width, height, seed=0, **options):
    """A JPEG file with soft shapes and some grain."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grainy = (np.asarray(shapes) + rng.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(grainy), "JPEG", **{"quality": 90, **options})


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("preprocess", [SQUARE, TALL, STRETCHED], ids=["square", "tall", "stretch"])
def test_the_pixels_are_nearly_those_of_every_other_door(tmp_path, preprocess):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install nvidia-dali-cuda120)")
    pictures = [photo(300, 200), photo(200, 301, 1), photo(70, 50, 2), photo(300, 200, 3, subsampling=0)]
    pictures += [photo(150, 90, orientation, exif=turned(orientation)) for orientation in range(1, 9)]
    pictures += [encoded(Image.open(io.BytesIO(photo(120, 90, 9))).convert(mode)) for mode in ("RGB", "L", "P")]
    got = run_on_the_cpu(load_pipeline(tmp_path, preprocess), pictures)
    wanted = np.stack([load_image(picture, preprocess) for picture in pictures])
    difference = np.abs(got.astype(int) - wanted)
    assert difference.max() <= 6
    assert difference.mean((1, 2, 3)).max() < 0.4
