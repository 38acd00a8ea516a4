import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export.repository import MAX_BATCH, head_graph, write_repository
from serve.contract import METADATA_KEY, Manifest
from serve.encoder import open_encoder
from serve.errors import EncoderMismatch
from tests.toy_encoder import DIM, HEIGHT, WIDTH, toy_head, write_toy_encoder

FIVE = ["toy_preprocess", "toy_encoder", "toy_head", "toy_embed", "toy_classify"]


def write(repository, source, *, with_head=True, target="cpu", name="toy"):
    graph, manifest = write_toy_encoder(source, name)
    head = toy_head(manifest.encoder_id) if with_head else None
    return write_repository(repository, graph=graph, manifest=manifest, head=head, target=target)


def read_config(repository, model):
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), pb.ModelConfig())


@pytest.fixture
def repository(tmp_path):
    assert write(tmp_path / "repo", tmp_path / "source") == FIVE
    return tmp_path / "repo"


def test_every_model_has_a_complete_configuration(repository):
    assert sorted(path.name for path in repository.iterdir()) == sorted(FIVE)
    for model in FIVE:
        config = read_config(repository, model)
        assert config.name == model
        assert config.max_batch_size == MAX_BATCH
        assert list(config.version_policy.specific.versions) == [1]
        assert (repository / model / "1" / "config.pbtxt").read_bytes() == (repository / model / "config.pbtxt").read_bytes()
        if config.platform != "ensemble":
            assert config.backend == ("python" if model == "toy_preprocess" else "onnxruntime")
            assert config.HasField("dynamic_batching")
            assert not config.dynamic_batching.HasField("default_queue_policy"), "a policy stalls requests for 500 ms"
            assert len(config.instance_group) == 1


def test_names_types_and_shapes_follow_the_manifest(repository):
    table = {
        "toy_preprocess": ({"bytes": ("TYPE_STRING", [1])}, {"image": ("TYPE_UINT8", [HEIGHT, WIDTH, 3])}),
        "toy_encoder": ({"image": ("TYPE_UINT8", [HEIGHT, WIDTH, 3])}, {"embedding": ("TYPE_FP32", [DIM])}),
        "toy_embed": ({"bytes": ("TYPE_STRING", [1])}, {"embedding": ("TYPE_FP32", [DIM])}),
        "toy_classify": (
            {"bytes": ("TYPE_STRING", [1])},
            {"embedding": ("TYPE_FP32", [DIM]), "probabilities": ("TYPE_FP32", [3])},
        ),
    }
    for model, (inputs, outputs) in table.items():
        config = read_config(repository, model)
        for tensors, wanted in ((config.input, inputs), (config.output, outputs)):
            assert {tensor.name: (pb.DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in tensors} == wanted


def test_no_ensemble_output_is_also_the_input_of_a_step(repository):
    """Triton answers a request for some of the outputs of such an ensemble with "unexpected deadlock"."""
    for model in ("toy_embed", "toy_classify"):
        config = read_config(repository, model)
        read_by_steps = {tensor for step in config.ensemble_scheduling.step for tensor in step.input_map.values()}
        assert not read_by_steps & {output.name for output in config.output}


def test_configurations_say_which_encoder_they_belong_to(repository):
    manifest = Manifest.read(repository / "toy_encoder" / "1" / "manifest.json")
    assert Manifest.parse(read_config(repository, "toy_encoder").parameters[METADATA_KEY].string_value, "config") == manifest
    for model in FIVE[1:]:
        assert read_config(repository, model).parameters["encoder_id"].string_value == manifest.encoder_id
    values = json.loads(read_config(repository, "toy_preprocess").parameters["preprocess"].string_value)
    assert values == manifest.preprocess.model_dump()


def test_the_repository_opens_in_process(repository):
    vectors = open_encoder(repository).embed([np.full((HEIGHT, WIDTH, 3), 7, np.uint8)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(("target", "kind"), [("gpu", "KIND_GPU"), ("cpu", "KIND_CPU")])
def test_the_target_decides_the_instances(tmp_path, monkeypatch, target, kind):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    write(tmp_path / "repo", tmp_path / "source", target=target)
    encoder = read_config(tmp_path / "repo", "toy_encoder")
    assert pb.ModelInstanceGroup.Kind.Name(encoder.instance_group[0].kind) == kind
    preprocess = read_config(tmp_path / "repo", "toy_preprocess").instance_group[0]
    assert pb.ModelInstanceGroup.Kind.Name(preprocess.kind) == "KIND_CPU"
    if target == "cpu":
        threads = int(encoder.parameters["intra_op_thread_count"].string_value)
        assert threads * encoder.instance_group[0].count == 6
    else:
        assert "intra_op_thread_count" not in encoder.parameters


def test_warm_up_runs_the_smallest_and_the_largest_batch(repository):
    for model in ("toy_encoder", "toy_head"):
        config = read_config(repository, model)
        assert [sample.batch_size for sample in config.model_warmup] == [1, MAX_BATCH]
        for sample in config.model_warmup:
            (warm,) = sample.inputs.items()
            assert warm[0] == config.input[0].name
            assert (warm[1].data_type, list(warm[1].dims)) == (config.input[0].data_type, list(config.input[0].dims))


def test_the_head_graph_is_the_head(tmp_path):
    head = toy_head("abc")
    model = head_graph(head)
    assert model.ir_version <= 10
    assert model.opset_import[0].version <= 20
    onnx.save(model, tmp_path / "head.onnx")
    vectors = np.random.default_rng(0).normal(size=(7, DIM)).astype(np.float32)
    session = ort.InferenceSession(tmp_path / "head.onnx", providers=["CPUExecutionProvider"])
    probabilities, passed = session.run(None, {"embedding": vectors})
    np.testing.assert_allclose(probabilities, head.probabilities(vectors), atol=1e-6)
    np.testing.assert_array_equal(passed, vectors)


def test_labels_stand_one_a_line_whatever_the_classes_are_called(tmp_path):
    graph, manifest = write_toy_encoder(tmp_path / "source")
    head = toy_head(manifest.encoder_id, ("a\nb", "  c  d ", "é"))
    write_repository(tmp_path / "repo", graph=graph, manifest=manifest, head=head, target="cpu")
    assert (tmp_path / "repo/toy_head/1/labels.txt").read_text(encoding="utf-8").splitlines() == ["a b", "c d", "é"]
    assert read_config(tmp_path / "repo", "toy_head").output[0].label_filename == "1/labels.txt"


def test_exporting_without_a_head_takes_the_old_one_away(repository, tmp_path):
    assert write(repository, tmp_path / "source", with_head=False) == ["toy_preprocess", "toy_encoder", "toy_embed"]
    assert sorted(path.name for path in repository.iterdir()) == ["toy_embed", "toy_encoder", "toy_preprocess"]


def test_models_of_other_names_stay(repository, tmp_path):
    write(repository, tmp_path / "source2", name="other", with_head=False)
    assert len(list(repository.iterdir())) == 8
    write(repository, tmp_path / "source", with_head=False)
    assert len(list(repository.iterdir())) == 6


def test_the_head_of_another_encoder_is_refused_before_anything_is_written(tmp_path):
    graph, manifest = write_toy_encoder(tmp_path / "source")
    with pytest.raises(EncoderMismatch, match="simclr fit-head"):
        write_repository(tmp_path / "repo", graph=graph, manifest=manifest, head=toy_head("other"), target="cpu")
    assert not (tmp_path / "repo").exists()


def test_a_failed_export_leaves_the_old_models_and_nothing_half_built(repository, tmp_path):
    before = (repository / "toy_encoder" / "config.pbtxt").read_bytes()
    _, manifest = write_toy_encoder(tmp_path / "source", seed=1)
    with pytest.raises(FileNotFoundError):
        write_repository(repository, graph=tmp_path / "missing.onnx", manifest=manifest, head=None, target="cpu")
    assert (repository / "toy_encoder" / "config.pbtxt").read_bytes() == before
    assert (repository / "toy_encoder" / "1" / "model.onnx").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repo", "source"]
    assert all(not path.name.startswith(".") for path in repository.iterdir())
