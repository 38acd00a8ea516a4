"""Triton's NAME_preprocess model: encoded images -> uint8 pixels. Export copies this file as its model.py.

serve/preprocess.py travels beside it, so a picture is prepared by the same code everywhere.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from preprocess import ImageError, prepare  # type: ignore[import-not-found]


class TritonPythonModel:
    """One instance; Triton calls the methods by name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the preparation from config.pbtxt."""
        self._preprocess = json.loads(json.loads(args["model_config"])["parameters"]["preprocess"]["string_value"])
        # Pillow releases the interpreter lock while it decodes; each worker may hold one picture of MAX_PIXELS in memory.
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request: a picture that cannot be read fails its own request and no other."""
        pictures = [pb_utils.get_input_tensor_by_name(request, "bytes").as_numpy().ravel() for request in requests]
        prepared = iter(list(self._pool.map(self._prepare, [data for request in pictures for data in request])))
        return [_response([next(prepared) for _ in request]) for request in pictures]

    def finalize(self) -> None:
        """Let the threads go."""
        self._pool.shutdown()

    def _prepare(self, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]] | ImageError:
        try:
            return prepare(data, **self._preprocess)
        except ImageError as error:
            return error


def _response(images: list[Any]) -> Any:  # noqa: ANN401
    for position, image in enumerate(images):
        if isinstance(image, ImageError):
            where = f"item {position} of {len(images)}: " if len(images) > 1 else ""
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{where}{image}", pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse([pb_utils.Tensor("image", np.stack(images))])
