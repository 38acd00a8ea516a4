"""The Triton model repository: what `simclr triton`, NVIDIA's container and the in-process encoder all read.

NAME_preprocess   bytes -> image                      python: serve/preprocess.py, as everywhere
NAME_encoder      image -> embedding                  onnxruntime: the exported graph and its manifest
NAME_head         embedding -> probabilities          onnxruntime, only with a head
NAME_embed        bytes -> embedding                  ensemble
NAME_classify     bytes -> embedding, probabilities   ensemble, only with a head

NAME_preprocess_dali and NAME_embed_dali, if asked for, do as their namesakes do with a GPU that decodes.

Every config.pbtxt is complete (servers run with auto-complete off) and printed from Triton's own protobuf message.
Dynamic batching has no queue policy: with one instance that stalled 1-4 % of requests for 500 ms; the gateway sheds load.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
from google.protobuf import text_format  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import model_config_pb2 as pb

import serve.preprocess
from export import accelerators
from export.versions import change_over, next_version, obsolete
from serve.classify import Head
from serve.contract import MANIFEST_NAME, METADATA_KEY, Manifest
from serve.files import atomic_folder
from serve.versions import CONFIG_NAME

Target: TypeAlias = Literal["gpu", "cpu"]
MAX_BATCH = 32
USUAL_BATCH = 8
"""Between one client's single picture and a full batch; TensorRT is tuned for it."""
LABELS_NAME = "labels.txt"
KEPT_VERSIONS = 3
OPSET, IR_VERSION = 18, 8
"""Of the head's graph: old enough for every Triton in use; onnx's own defaults are too new for all of them."""
PASSED = "passed_embedding"
"""The head hands its input on under this name: if one ensemble tensor were both an output and the input of a later step,
Triton would fail every request that asks for a part of the outputs ("unexpected deadlock")."""
_KINDS = {"gpu": pb.ModelInstanceGroup.KIND_GPU, "cpu": pb.ModelInstanceGroup.KIND_CPU}
_DTYPES = {"uint8": pb.TYPE_UINT8, "float32": pb.TYPE_FP32}


def write_repository(
    repository: Path,
    *,
    graph: Path,
    manifest: Manifest,
    head: Head | None,
    target: Target,
    tensorrt: bool = False,
    dali: bool = False,
    changed: Callable[[list[str]], None] = lambda _: None,
) -> list[str]:
    """Publish the next version of one encoder's models; models of other names stay, and so do the two versions before it.

    Args: graph, a finished model.onnx that carries `manifest`; head, None to serve no classes; tensorrt, run the encoder with
    it (target gpu); dali, let a GPU decode pictures, besides; changed, told of the models that a running server must load
    anew, in the order of `export.versions.change_over`.
    Returns: the names of the models. Raises: EncoderMismatch if the head belongs to another encoder.
    """
    if head is not None:
        head.require(manifest.encoder_id)
    number = next_version(repository, manifest.name)
    configs = model_configs(manifest, head, target, number, dali=dali)
    if tensorrt:
        _with_tensorrt(configs[f"{manifest.name}_encoder"], manifest)
    repository.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        with atomic_folder(repository / name / str(number), workshop=_workshop(repository)) as folder:
            (folder / CONFIG_NAME).write_text(text_format.MessageToString(config, as_utf8=True), encoding="utf-8")
            _fill(folder, name.removeprefix(f"{manifest.name}_"), graph=graph, manifest=manifest, head=head)
    for models in change_over(repository, manifest.name, number):
        changed(models)
    for name in configs:
        for folder in obsolete(repository / name, KEPT_VERSIONS):
            shutil.rmtree(folder, ignore_errors=True)
    return list(configs)


def model_configs(manifest: Manifest, head: Head | None, target: Target, version: int, *, dali: bool = False) -> dict[str, Any]:
    """Model name -> its ModelConfig message, each before the ensembles that use it."""
    name, preprocess = manifest.name, _preprocess_config(manifest)
    configs = [preprocess, _encoder_config(manifest, target)]
    if head is not None:
        configs.append(_head_config(manifest, head, target, version))
    configs.append(_ensemble_config(f"{name}_embed", preprocess, manifest, None, version))
    if head is not None:
        configs.append(_ensemble_config(f"{name}_classify", preprocess, manifest, head, version))
    if dali:
        configs.append(_dali_config(manifest))
        configs.append(_ensemble_config(f"{name}_embed_dali", configs[-1], manifest, None, version))
    for config in configs:
        config.version_policy.specific.versions.append(version)
    return {config.name: config for config in configs}


def head_graph(head: Head) -> onnx.ModelProto:
    """embedding (N, D) -> probabilities (N, C) and the embedding itself: one matrix product and a softmax."""
    classes, dim = head.weight.shape
    nodes = [
        helper.make_node("Gemm", ["embedding", "weight", "bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("Identity", ["embedding"], [PASSED]),
    ]
    graph = helper.make_graph(
        nodes,
        "head",
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", dim])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", classes]),
            helper.make_tensor_value_info(PASSED, TensorProto.FLOAT, ["batch", dim]),
        ],
        [numpy_helper.from_array(head.weight, "weight"), numpy_helper.from_array(head.bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def _fill(version: Path, role: str, *, graph: Path, manifest: Manifest, head: Head | None) -> None:
    """The files of one version; an ensemble has none but its configuration."""
    if role == "preprocess":
        shutil.copyfile(Path(__file__).with_name("triton_preprocess.py"), version / "model.py")
        shutil.copyfile(str(serve.preprocess.__file__), version / "preprocess.py")
    elif role == "preprocess_dali":
        shutil.copyfile(Path(__file__).with_name("dali_preprocess.py"), version / "dali.py")
        (version / "preprocess.json").write_text(manifest.preprocess.model_dump_json() + "\n", encoding="utf-8")
    elif role == "encoder":
        shutil.copyfile(graph, version / "model.onnx")
        (version / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    elif role == "head" and head is not None:
        onnx.save(head_graph(head), version / "model.onnx")
        lines = [" ".join(label.split()) for label in head.classes]
        (version / LABELS_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _preprocess_config(manifest: Manifest) -> Any:  # noqa: ANN401  # protobuf messages have no static types here
    return _config(
        f"{manifest.name}_preprocess",
        backend="python",
        input=[pb.ModelInput(name="bytes", data_type=pb.TYPE_STRING, dims=[1])],
        output=[pb.ModelOutput(name="image", data_type=pb.TYPE_UINT8, dims=manifest.input.shape)],
        dynamic_batching=pb.ModelDynamicBatching(),
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)],
        parameters=_parameters(preprocess=manifest.preprocess.model_dump_json()),
    )


def _dali_config(manifest: Manifest) -> Any:  # noqa: ANN401
    """DALI's backend knows no BYTES: a picture is as many UINT8 as it has bytes, those of one request are padded with zeros.

    No dynamic batching: a picture that DALI cannot read fails its whole batch, which must not be other clients' requests.
    """
    return _config(
        f"{manifest.name}_preprocess_dali",
        backend="dali",
        input=[pb.ModelInput(name="bytes", data_type=pb.TYPE_UINT8, dims=[-1])],
        output=[pb.ModelOutput(name="image", data_type=pb.TYPE_UINT8, dims=manifest.input.shape)],
        instance_group=[pb.ModelInstanceGroup(count=1, kind=pb.ModelInstanceGroup.KIND_GPU)],
    )


def _encoder_config(manifest: Manifest, target: Target) -> Any:  # noqa: ANN401
    image, embedding = manifest.input, manifest.output
    identity = {"encoder_id": manifest.encoder_id, METADATA_KEY: manifest.model_dump_json()}
    return _config(
        f"{manifest.name}_encoder",
        backend="onnxruntime",
        input=[pb.ModelInput(name=image.name, data_type=_DTYPES[image.dtype], dims=image.shape)],
        output=[pb.ModelOutput(name=embedding.name, data_type=_DTYPES[embedding.dtype], dims=embedding.shape)],
        dynamic_batching=pb.ModelDynamicBatching(),
        instance_group=[pb.ModelInstanceGroup(count=1, kind=_KINDS[target])],
        model_warmup=_warmup(image.name, _DTYPES[image.dtype], image.shape),
        parameters=_parameters(**identity, **_threads(target, os.cpu_count() or 1)),
    )


def _with_tensorrt(config: Any, manifest: Manifest) -> None:  # noqa: ANN401
    """Let TensorRT run the encoder; every batch size of its profile is warmed up before the model counts as ready."""
    config.optimization.CopyFrom(accelerators.tensorrt(manifest, usual_batch=USUAL_BATCH, max_batch=MAX_BATCH))
    config.model_warmup.add().CopyFrom(config.model_warmup[0])
    config.model_warmup[-1].name, config.model_warmup[-1].batch_size = f"batch_{USUAL_BATCH}", USUAL_BATCH


def _head_config(manifest: Manifest, head: Head, target: Target, version: int) -> Any:  # noqa: ANN401
    return _config(
        f"{manifest.name}_head",
        backend="onnxruntime",
        input=[pb.ModelInput(name="embedding", data_type=pb.TYPE_FP32, dims=manifest.output.shape)],
        output=[_probabilities(head, label_filename=f"{version}/{LABELS_NAME}"), _vector(PASSED, manifest)],
        dynamic_batching=pb.ModelDynamicBatching(),
        instance_group=[pb.ModelInstanceGroup(count=1, kind=_KINDS[target])],
        model_warmup=_warmup("embedding", pb.TYPE_FP32, manifest.output.shape),
        parameters=_parameters(encoder_id=manifest.encoder_id, **_threads(target, 1)),
    )


def _ensemble_config(name: str, preprocess: Any, manifest: Manifest, head: Head | None, version: int) -> Any:  # noqa: ANN401
    """preprocess -> encoder, and -> head where there is one; with the input of `preprocess`, a configuration."""
    step = pb.ModelEnsembling.Step
    vector = "embedding" if head is None else "vector"
    prefix = manifest.name
    steps = [
        step(
            model_name=preprocess.name,
            model_version=version,
            input_map={"bytes": "bytes"},
            output_map={"image": "image"},
        ),
        step(
            model_name=f"{prefix}_encoder",
            model_version=version,
            input_map={manifest.input.name: "image"},
            output_map={manifest.output.name: vector},
        ),
    ]
    outputs = [_vector("embedding", manifest)]
    if head is not None:
        maps = {"input_map": {"embedding": vector}, "output_map": {"probabilities": "probabilities", PASSED: "embedding"}}
        steps.append(step(model_name=f"{prefix}_head", model_version=version, **maps))
        outputs.append(_probabilities(head))
    return _config(
        name,
        platform="ensemble",
        input=preprocess.input,
        output=outputs,
        ensemble_scheduling=pb.ModelEnsembling(step=steps),
        parameters=_parameters(encoder_id=manifest.encoder_id),
    )


def _config(name: str, **fields: Any) -> Any:  # noqa: ANN401
    return pb.ModelConfig(name=name, max_batch_size=MAX_BATCH, **fields)


def _vector(name: str, manifest: Manifest) -> Any:  # noqa: ANN401
    return pb.ModelOutput(name=name, data_type=pb.TYPE_FP32, dims=manifest.output.shape)


def _probabilities(head: Head, **fields: str) -> Any:  # noqa: ANN401
    return pb.ModelOutput(name="probabilities", data_type=pb.TYPE_FP32, dims=[len(head.classes)], **fields)


def _parameters(**values: str) -> dict[str, Any]:
    return {key: pb.ModelParameter(string_value=value) for key, value in values.items()}


def _threads(target: Target, count: int) -> dict[str, str]:
    """On the CPU one instance has all the cores: the backend's default of two, each with every core, overbooks them."""
    return {"intra_op_thread_count": str(count)} if target == "cpu" else {}


def _warmup(name: str, dtype: int, dims: tuple[int, ...]) -> list[Any]:
    """The model counts as ready once it has run the smallest and the largest batch."""
    zeros = pb.ModelWarmup.Input(data_type=dtype, dims=dims, zero_data=True)
    return [pb.ModelWarmup(name=f"batch_{size}", batch_size=size, inputs={name: zeros}) for size in (1, MAX_BATCH)]


def _workshop(repository: Path) -> Path:
    """Where models are built: outside, for a running server would take a half-built one for a model of its own."""
    beside = repository.resolve().parent
    return beside if beside.stat().st_dev == repository.stat().st_dev else repository  # a mounted volume: no rename across
