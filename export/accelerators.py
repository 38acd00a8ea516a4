"""TensorRT in the onnxruntime backend of NVIDIA's container. Not run by us: no GPU was at hand.

The keys are those of the table "Parameter mapping between ONNX Runtime and Triton ONNXRuntime Backend" in the backend's README
(013d274); their meaning is in ONNX Runtime's documentation of the TensorRT execution provider.
"""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from serve.contract import Manifest

CACHE = "/var/cache/simclr-tensorrt"
"""Where the server keeps engines: outside the repository, which it may not write. Mount a volume there: building takes minutes,
and an engine fits one kind of GPU and one version of TensorRT only, so it cannot be exported."""
WORKSPACE_BYTES = 1 << 30
_PRECISION = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


def tensorrt(manifest: Manifest, *, usual_batch: int, max_batch: int) -> Any:  # noqa: ANN401  # protobuf messages have no static types
    """ModelOptimizationPolicy of NAME_encoder: one engine for batches of 1 to `max_batch`, quickest at `usual_batch`.

    Without the shapes TensorRT would build anew, for tens of seconds, at every batch size it has not seen. Nodes that it does
    not support fall back to CUDA, then to the CPU.
    """
    shape = "x".join(map(str, manifest.input.shape))
    values = {
        "precision_mode": _PRECISION[manifest.precision],
        "max_workspace_size_bytes": str(WORKSPACE_BYTES),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": CACHE,
        "trt_engine_cache_prefix": f"{manifest.name}_{manifest.encoder_id}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": CACHE,
        "trt_profile_min_shapes": f"{manifest.input.name}:1x{shape}",
        "trt_profile_opt_shapes": f"{manifest.input.name}:{usual_batch}x{shape}",
        "trt_profile_max_shapes": f"{manifest.input.name}:{max_batch}x{shape}",
    }
    policy = pb.ModelOptimizationPolicy
    accelerator = policy.ExecutionAccelerators.Accelerator(name="tensorrt", parameters=values)
    return policy(execution_accelerators=policy.ExecutionAccelerators(gpu_execution_accelerator=[accelerator]))
