"""Encoders: pictures -> unit vectors, in-process (ONNX Runtime) or through Triton; one protocol for both."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from serve.contract import MANIFEST_NAME, METADATA_KEY, Manifest
from serve.errors import ContractError, first_line
from serve.pictures import Picture, prepare_batch, prepare_each
from serve.preprocess import ImageError
from serve.triton.client import TritonEncoder
from serve.versions import served_version


class Encoder(Protocol):
    """What every encoder offers, wherever it runs."""

    @property
    def manifest(self) -> Manifest:
        """Interface, preparation and provenance."""

    @property
    def encoder_id(self) -> str:
        """Who made the vectors; two different ids must never be mixed."""

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors (N, D) of pictures: paths, encoded bytes, PIL images or prepared uint8 (H, W, 3) arrays."""


def embed_each(encoder: Encoder, images: Sequence[Picture]) -> list[NDArray[np.float32] | ImageError]:
    """One answer per picture, in order: its unit vector (D,), or why it cannot be read. A bad one costs no other its answer."""
    prepared = prepare_each(images, encoder.manifest.preprocess)
    vectors = iter(encoder.embed([pixels for pixels in prepared if not isinstance(pixels, ImageError)]))
    return [pixels if isinstance(pixels, ImageError) else next(vectors) for pixels in prepared]


def open_encoder(spec: str | Path) -> Encoder:
    """Open a model repository in-process, or `grpc://host:port/NAME`, `http://host:port/NAME` through Triton.

    Raises: ContractError if there is no encoder, EncoderUnavailable if the server does not answer.
    """
    text = str(spec)
    if text.startswith(("grpc://", "http://")):
        return TritonEncoder(text)
    return OnnxEncoder(find_graph(Path(text)))


def find_graph(repository: Path) -> Path:
    """The served encoder graph of a repository that holds one encoder, or of REPOSITORY/NAME. Raises: ContractError."""
    named = repository.parent / f"{repository.name}_encoder"
    models = sorted(repository.glob("*_encoder")) or [named] * named.is_dir()
    if len(models) != 1:
        found = ", ".join(model.name for model in models) or "none"
        raise ContractError(f"{repository}: wanted one folder NAME_encoder, found {found}; give what `simclr export` wrote")
    graph = models[0] / str(served_version(models[0])) / "model.onnx"
    if not graph.is_file():
        raise ContractError(f"{models[0]}: holds no version folder with a model.onnx; export the run again")
    return graph


class OnnxEncoder:
    """Runs model.onnx in this process, on the GPU where ONNX Runtime can load CUDA, else on the CPU."""

    def __init__(self, graph: Path, *, batch_size: int = 64) -> None:
        try:
            self._session = ort.InferenceSession(graph, _options(), providers=loadable_providers())
        except Exception as error:  # onnxruntime raises a dozen unrelated types, none of them exported
            raise ContractError(f"{graph}: ONNX Runtime cannot load it ({first_line(error)}); export the run again") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise ContractError(f"{graph}: carries no manifest in its metadata; was it written by `simclr export`?")
        self.manifest = Manifest.parse(metadata[METADATA_KEY], str(graph))
        beside = Manifest.read(graph.with_name(MANIFEST_NAME))
        if beside != self.manifest:
            raise ContractError(f"{graph}: its manifest ({self.encoder_id}) is not the one beside it ({beside.encoder_id})")
        self._batch_size = batch_size

    @property
    def encoder_id(self) -> str:
        """Who made the vectors."""
        return self.manifest.encoder_id

    def embed(self, images: Sequence[Picture]) -> NDArray[np.float32]:
        """Unit vectors float32 (N, D). Raises: ImageError."""
        vectors = np.empty((len(images), self.manifest.embedding_dim), np.float32)
        for start in range(0, len(images), self._batch_size):
            batch = prepare_batch(images[start : start + self._batch_size], self.manifest.preprocess)
            (vectors[start : start + len(batch)],) = self._session.run(
                [self.manifest.output.name], {self.manifest.input.name: batch}
            )
        return vectors


def _options() -> ort.SessionOptions:
    """Threads that have nothing to do sleep, rather than spin on the cores that decode the next pictures."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def loadable_providers() -> list[str]:
    """CUDA only where its driver and ONNX Runtime's CUDA library load: asking in vain prints errors on every start."""
    cuda = "CUDAExecutionProvider" in ort.get_available_providers() and _cuda_loads()
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]


def _cuda_loads() -> bool:
    windows = sys.platform == "win32"
    try:
        if ctypes.CDLL("nvcuda.dll" if windows else "libcuda.so.1").cuInit(0) != 0:
            return False
        if hasattr(ort, "preload_dlls"):
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
                ort.preload_dlls()  # CUDA and cuDNN out of wheels, such as those that torch brings: no other way leads there
        if not windows:
            folder = Path(ort.__file__).parent / "capi"
            ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError:
        return False
    return True
