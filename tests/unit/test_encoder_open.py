"""Opening an encoder: what is found, what is refused, and that nothing is printed on the way."""

import ctypes
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from PIL import Image

from serve.contract import MANIFEST_NAME, METADATA_KEY
from serve.encoder import OnnxEncoder, find_graph, loadable_providers, open_encoder
from serve.errors import ContractError, EncoderUnavailable
from serve.pictures import prepare_batch
from serve.preprocess import ImageError
from tests.toy_encoder import DIM, HEIGHT, WIDTH, write_toy_encoder


@pytest.fixture
def repository(tmp_path):
    write_toy_encoder(tmp_path / "repo" / "toy_encoder" / "1")
    return tmp_path / "repo"


def refusal(spec):
    with pytest.raises(ContractError) as caught:
        open_encoder(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_repository_of_one_encoder(repository):
    (repository / "toy_head" / "1").mkdir(parents=True)
    encoder = open_encoder(repository)
    assert encoder.manifest.name == "toy"
    assert encoder.encoder_id == encoder.manifest.encoder_id == open_encoder(str(repository)).encoder_id


def test_two_encoders_are_told_apart_by_name(repository):
    write_toy_encoder(repository / "other_encoder" / "1", "other", seed=1)
    assert "found other_encoder, toy_encoder" in refusal(repository)
    assert open_encoder(repository / "toy").manifest.name == "toy"
    assert open_encoder(f"{repository}/other").manifest.name == "other"


def test_the_newest_version_is_taken_by_its_number(repository):
    for version in ("9", "10"):
        write_toy_encoder(repository / "toy_encoder" / version)
    (repository / "toy_encoder" / "11").mkdir()
    (repository / "toy_encoder" / "latest").mkdir()
    assert find_graph(repository) == repository / "toy_encoder" / "10" / "model.onnx"
    config = 'name: "toy_encoder" version_policy { specific { versions: [1, 9] } }'
    (repository / "toy_encoder" / "config.pbtxt").write_text(config)
    assert find_graph(repository) == repository / "toy_encoder" / "9" / "model.onnx", "as Triton serves it"
    (repository / "toy_encoder" / "config.pbtxt").write_text("version_policy {")
    assert "not a Triton configuration" in refusal(repository)


@pytest.mark.parametrize("name", ["a[1]", "*", "**x", "?", "two words", "é"])
def test_names_are_names_not_patterns(tmp_path, name):
    assert f"{name}: wanted one folder NAME_encoder, found none" in refusal(tmp_path / name)
    write_toy_encoder(tmp_path / "toy_encoder" / "1")
    write_toy_encoder(tmp_path / f"{name}_encoder" / "1", name)
    assert open_encoder(tmp_path / name).manifest.name == name


@pytest.mark.parametrize("spec", ["", ".", "..", "/", "missing", "/etc/passwd", "ftp://somewhere/model"])
def test_what_is_no_repository(tmp_path, monkeypatch, spec):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert "wanted one folder NAME_encoder, found none" in refusal(spec)


def test_a_repository_without_a_version(repository):
    shutil.rmtree(repository / "toy_encoder" / "1")
    assert "holds no version folder with a model.onnx" in refusal(repository)


@pytest.mark.parametrize("spec", ["grpc://", "grpc://host:notaport/x", "http://host:1/a/b", "grpc://host:70000/x"])
def test_an_address_that_is_none(spec):
    assert refusal(spec).startswith(f"{spec}: not the address of an encoder")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_nobody_at_home(scheme):
    with pytest.raises(EncoderUnavailable, match=r"no Triton server answers.*simclr triton"):
        open_encoder(f"{scheme}://127.0.0.1:9/toy")


def graph_of(repository):
    return repository / "toy_encoder" / "1" / "model.onnx"


def test_a_foreign_graph_carries_no_manifest(repository):
    model = onnx.load(graph_of(repository))
    helper.set_model_props(model, {"author": "somebody else"})
    onnx.save(model, graph_of(repository))
    assert "carries no manifest in its metadata" in refusal(repository)


def test_no_manifest_beside_the_graph(repository):
    graph_of(repository).with_name(MANIFEST_NAME).unlink()
    assert "manifest.json: no manifest (No such file or directory)" in refusal(repository)


def test_the_manifest_beside_is_not_the_one_inside(repository, tmp_path):
    _, other = write_toy_encoder(tmp_path / "other", seed=1)
    inside = open_encoder(repository).encoder_id
    graph_of(repository).with_name(MANIFEST_NAME).write_text(other.model_dump_json())
    message = refusal(repository)
    assert inside in message
    assert other.encoder_id in message


def test_the_manifest_inside_has_been_tampered_with(repository):
    model = onnx.load(graph_of(repository))
    text = next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY)
    helper.set_model_props(model, {METADATA_KEY: text.replace('"fp32"', '"fp16"')})
    onnx.save(model, graph_of(repository))
    assert "not a valid manifest" in refusal(repository)


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    return bytes(255 - byte for byte in data)


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b"no graph"])
def test_a_damaged_graph(repository, damage):
    path = graph_of(repository)
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(repository)
    assert message.startswith(f"{path}: ")
    assert "export" in message


def test_every_kind_of_picture_gives_the_same_unit_vector(repository, tmp_path):
    encoder = open_encoder(repository)
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    with Image.open(path) as image:
        prepared = prepare_batch([path], encoder.manifest.preprocess)[0]
        vectors = encoder.embed([path, str(path), path.read_bytes(), image, prepared])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(vectors, np.broadcast_to(vectors[0], (5, DIM)), atol=1e-6)
    assert encoder.embed([]).shape == (0, DIM)


def test_the_batch_size_makes_no_difference(repository):
    images = list(np.random.default_rng(0).integers(0, 256, (7, HEIGHT, WIDTH, 3), np.uint8))
    wanted = open_encoder(repository).embed(images)
    for size in (1, 2, 3, 7, 100):
        got = OnnxEncoder(graph_of(repository), batch_size=size).embed(images)
        np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "array", [np.zeros((5, 5, 3), np.uint8), np.zeros((HEIGHT, WIDTH, 3), np.float32), np.zeros((HEIGHT, WIDTH), np.uint8)]
)
def test_an_array_that_was_not_prepared_for_this_encoder(repository, array):
    with pytest.raises(ValueError, match=r"wanted uint8\(32, 16, 3\)"):
        open_encoder(repository).embed([array])


def test_an_unreadable_picture_is_named(repository, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ImageError, match=r"a\.png: not a readable picture"):
        open_encoder(repository).embed([tmp_path / "a.png"])


class Library:
    """Stands for a shared library; `answer` is what the driver's cuInit returns."""

    def __init__(self, answer):
        self.cuInit = lambda flags: answer


def machine(monkeypatch, *, driver=0, libraries=True, offered=("CUDAExecutionProvider", "CPUExecutionProvider")):
    """Fakes a machine: what the driver answers (None: there is none), and whether ONNX Runtime's CUDA library loads."""
    asked = []

    def load(name, *_):
        asked.append(os.path.basename(name))  # noqa: PTH119
        if (driver is None and "cuda.so.1" in name) or (not libraries and "providers_cuda" in name):
            raise OSError(f"{name}: cannot open shared object file")
        return Library(driver)

    def preload():
        asked.append("preload")
        print("Failed to load libcublasLt.so.13")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(offered))
    monkeypatch.setattr(ort, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return asked


CPU, BOTH = ["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_cuda_is_asked_for_where_driver_and_library_load(monkeypatch, capfd):
    asked = machine(monkeypatch)
    assert loadable_providers() == BOTH
    assert asked[0] == "libcuda.so.1"
    assert asked.index("preload") < asked.index("libonnxruntime_providers_cuda.so"), "or CUDA in wheels is never found"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("lacking", [{"driver": None}, {"driver": 100}, {"libraries": False}])
def test_cuda_is_not_asked_for_in_vain(monkeypatch, lacking, capfd):
    machine(monkeypatch, **lacking)
    assert loadable_providers() == CPU
    assert capfd.readouterr() == ("", "")


def test_a_runtime_without_cuda_never_looks_for_a_driver(monkeypatch):
    asked = machine(monkeypatch, offered=["CPUExecutionProvider"])
    assert loadable_providers() == CPU
    assert asked == []


QUIET = """
import sys
import numpy as np
from serve.encoder import open_encoder
from serve.errors import ContractError
encoder = open_encoder(sys.argv[1])
assert encoder.embed([np.zeros(encoder.manifest.input.shape, np.uint8)]).shape == (1, encoder.manifest.embedding_dim)
for bad in sys.argv[2:]:
    try:
        open_encoder(bad)
    except ContractError:
        continue
    raise SystemExit(f"{bad} opened")
"""


def test_nothing_is_printed_by_what_works_and_by_what_does_not(repository, tmp_path):
    damaged, foreign = (shutil.copytree(repository, tmp_path / name) for name in ("damaged", "foreign"))
    graph_of(damaged).write_bytes(b"no graph")
    graph_of(foreign).with_name(MANIFEST_NAME).unlink()
    command = [sys.executable, "-W", "error", "-c", QUIET, *map(str, (repository, damaged, foreign, tmp_path / "missing"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
