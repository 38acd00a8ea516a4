"""TensorRT's configuration, as far as it can be checked without a GPU: the schema, the documented keys, the shapes."""

import re

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export.repository import MAX_BATCH, write_repository
from serve.contract import Manifest
from tests.toy_encoder import HEIGHT, WIDTH, write_toy_encoder

DOCUMENTED = set(
    re.findall(
        r"\w+",
        """
        max_workspace_size_bytes trt_max_partition_iterations trt_min_subgraph_size precision_mode int8_calibration_table_name
        int8_use_native_calibration_table trt_dla_enable trt_dla_core trt_engine_cache_enable trt_engine_cache_path
        trt_engine_cache_prefix trt_dump_subgraphs trt_force_sequential_engine_build trt_context_memory_sharing_enable
        trt_layer_norm_fp32_fallback trt_timing_cache_enable trt_timing_cache_path trt_force_timing_cache
        trt_detailed_build_log trt_build_heuristics_enable trt_sparsity_enable trt_builder_optimization_level
        trt_auxiliary_streams trt_tactic_sources trt_extra_plugin_lib_paths trt_profile_min_shapes trt_profile_max_shapes
        trt_profile_opt_shapes trt_cuda_graph_enable trt_dump_ep_context_model trt_ep_context_file_path
        trt_ep_context_embed_mode
        """,
    )
)
"""The backend's README, "Parameter mapping between ONNX Runtime and Triton ONNXRuntime Backend"."""


def configuration(tmp_path, precision="fp32", **options):
    graph, manifest = write_toy_encoder(tmp_path / "source")
    fields = {name: value for name, value in dict(manifest).items() if name not in ("schema_version", "encoder_id")}
    manifest = Manifest.create(**fields | {"precision": precision})
    write_repository(tmp_path / "repo", graph=graph, manifest=manifest, head=None, target="gpu", **options)
    return text_format.Parse((tmp_path / "repo/toy_encoder/config.pbtxt").read_text(), pb.ModelConfig()), manifest


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "FP32"), ("fp16", "FP16"), ("int8", "INT8")])
def test_the_encoder_gets_an_engine_for_the_batches_it_serves(tmp_path, precision, mode):
    config, manifest = configuration(tmp_path, precision, tensorrt=True)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    values = dict(accelerator.parameters)
    assert accelerator.name == "tensorrt"
    assert set(values) <= DOCUMENTED
    assert values["precision_mode"] == mode
    assert manifest.encoder_id in values["trt_engine_cache_prefix"], "an engine of other weights is never taken"
    shapes = [values[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")]
    assert shapes[0] == f"image:1x{HEIGHT}x{WIDTH}x3"
    assert shapes[2] == f"image:{MAX_BATCH}x{HEIGHT}x{WIDTH}x3"
    assert 1 < int(shapes[1].split(":")[1].split("x")[0]) <= MAX_BATCH
    assert {sample.batch_size for sample in config.model_warmup} == {1, 8, MAX_BATCH}, "no client waits for a first time"


def test_only_when_asked_for(tmp_path):
    config, _ = configuration(tmp_path)
    assert not config.HasField("optimization")
    assert {sample.batch_size for sample in config.model_warmup} == {1, MAX_BATCH}
