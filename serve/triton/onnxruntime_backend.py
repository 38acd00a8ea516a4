"""A Triton backend named `onnxruntime`, in Python: for servers that lack NVIDIA's C++ one (the pip runtime).

Triton runs this file as backends/onnxruntime/model.py for every model whose config.pbtxt says `backend: "onnxruntime"`,
so the same repository serves here and in NVIDIA's container. It sees numpy, onnxruntime and Triton's own module alone.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of one ONNX model; Triton calls the methods by name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load model.onnx of the wanted version, on the device and with the threads that its config.pbtxt asks for."""
        config: dict[str, Any] = json.loads(args["model_config"])
        graph = Path(args["model_repository"]) / args["model_version"] / (config.get("default_model_filename") or "model.onnx")
        options = ort.SessionOptions()
        threads = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value", "0")
        options.intra_op_num_threads = int(threads)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are Triton's and the clients' too
        self._session = ort.InferenceSession(str(graph), options, providers=_providers(args))
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = {tensor["name"]: pb_utils.triton_string_to_numpy(tensor["data_type"]) for tensor in config["output"]}
        self._batched = config["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer what Triton's dynamic batcher put together with one run; Triton only hands over a list of requests."""
        if not self._batched:
            return [response for request in requests for response in self._answer([request])]
        return self._answer(requests)

    def _answer(self, requests: list[Any]) -> list[Any]:
        try:
            feeds = {
                name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
                for name in self._inputs
            }
            sizes = [len(array) for array in feeds[self._inputs[0]]]
            joined = {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in feeds.items()}
            results = self._session.run(list(self._outputs), joined)
        except Exception as error:  # onnxruntime raises many unrelated types; the server must live on
            reason = pb_utils.TritonError(f"ONNX Runtime: {str(error).splitlines()[0]}")
            return [pb_utils.InferenceResponse(error=reason) for _ in requests]
        if len(requests) == 1:
            return [self._response(results)]
        bounds = np.cumsum([0, *sizes])
        return [self._response([result[a:b] for result in results]) for a, b in pairwise(bounds)]

    def _response(self, results: list[np.ndarray[Any, Any]]) -> Any:  # noqa: ANN401
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(result, dtype))
            for (name, dtype), result in zip(self._outputs.items(), results, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)


def _providers(args: dict[str, str]) -> list[Any]:
    if args["model_instance_kind"] != "GPU":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pb_utils.Logger.log_warn(f"{args['model_name']} asks for a GPU, this onnxruntime has none built in: it runs on the CPU")
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": int(args["model_instance_device_id"])}), "CPUExecutionProvider"]
