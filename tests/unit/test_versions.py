"""Versions of a repository: the next one beside the last, the former one back, whole at every moment."""

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from export import versions
from export.repository import write_repository
from export.versions import roll_back
from serve.encoder import open_encoder
from serve.errors import ContractError
from serve.versions import served_version
from tests.toy_encoder import toy_head, write_toy_encoder

ROLES = ("preprocess", "encoder", "head", "embed", "classify")


def publish(folder, seed, *, head=True, changed=lambda _: None, classes=("cat", "dog")):
    graph, manifest = write_toy_encoder(folder / f"source{seed}", seed=seed)
    found = toy_head(manifest.encoder_id, classes) if head else None
    write_repository(folder / "repo", graph=graph, manifest=manifest, head=found, target="cpu", changed=changed)
    return manifest.encoder_id


def config(repository, role):
    return text_format.Parse((repository / f"toy_{role}" / "config.pbtxt").read_text(), pb.ModelConfig())


def served(repository):
    return {role: list(config(repository, role).version_policy.specific.versions) for role in ROLES}


def everywhere(versions):
    return dict.fromkeys(ROLES, versions)


def whole(repository):
    """Everything that an ensemble names is served; which encoder the ensemble and the in-process one have."""
    for ensemble in ("embed", "classify"):
        for step in config(repository, ensemble).ensemble_scheduling.step:
            role = step.model_name.removeprefix("toy_")
            assert step.model_version in config(repository, role).version_policy.specific.versions
            assert (repository / step.model_name / str(step.model_version) / "config.pbtxt").is_file()
    assert open_encoder(repository).encoder_id == config(repository, "encoder").parameters["encoder_id"].string_value
    return config(repository, "embed").parameters["encoder_id"].string_value


def test_the_next_publication_has_the_next_number_everywhere(tmp_path):
    ids = [publish(tmp_path, seed) for seed in (0, 1)]
    repository = tmp_path / "repo"
    assert served(repository) == everywhere([2])
    assert whole(repository) == ids[1]
    assert [(repository / "toy_encoder" / number / "model.onnx").is_file() for number in "12"] == [True, True]
    assert config(repository, "head").output[0].label_filename == "2/labels.txt"


def test_back_and_forth(tmp_path):
    repository, ids = tmp_path / "repo", [publish(tmp_path, seed) for seed in (0, 1)]
    assert roll_back(repository, "toy") == 1
    assert served(repository) == everywhere([1])
    assert whole(repository) == ids[0]
    with pytest.raises(ContractError, match="serves version 1 and no earlier one"):
        roll_back(repository, "toy")
    with pytest.raises(ContractError, match="holds no encoder other"):
        roll_back(repository, "other")
    publish(tmp_path, 2)
    assert served(repository) == everywhere([3]), "no number is used twice"
    assert roll_back(repository, "toy") == 2


def test_back_to_a_publication_without_a_head(tmp_path):
    """A server would not start with an ensemble whose steps are not served."""
    publish(tmp_path, 0, head=False)
    publish(tmp_path, 1)
    assert roll_back(tmp_path / "repo", "toy") == 1
    assert {path.name for path in (tmp_path / "repo").iterdir()} == {"toy_preprocess", "toy_encoder", "toy_embed"}


def test_three_publications_are_kept_and_the_served_one_in_any_case(tmp_path):
    for seed in range(5):
        publish(tmp_path, seed)
    folders = sorted(path.name for path in (tmp_path / "repo" / "toy_encoder").iterdir())
    assert folders == ["3", "4", "5", "config.pbtxt"]


def test_the_steps_in_which_a_server_changes_over(tmp_path):
    publish(tmp_path, 0)
    seen = []
    publish(tmp_path, 1, changed=lambda models: seen.append((models, served(tmp_path / "repo"))))
    parts = ["toy_preprocess", "toy_encoder", "toy_head"]
    both, old, new = [1, 2], [1], [2]
    assert seen == [
        (parts, {"preprocess": both, "encoder": both, "head": both, "embed": old, "classify": old}),
        (["toy_embed", "toy_classify"], {"preprocess": both, "encoder": both, "head": both, "embed": new, "classify": new}),
        (parts, everywhere(new)),
    ]


@pytest.mark.parametrize("writes", range(9))
def test_killed_at_any_point_the_repository_serves_one_of_the_two_whole(tmp_path, monkeypatch, writes):
    ids = [publish(tmp_path, 0)]
    write, left = versions._write, [writes]

    def dying(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*arguments)

    monkeypatch.setattr(versions, "_write", dying)
    try:
        ids.append(publish(tmp_path, 1))
    except KeyboardInterrupt:
        assert whole(tmp_path / "repo") in (ids[0], write_toy_encoder(tmp_path / "again", seed=1)[1].encoder_id)
        monkeypatch.setattr(versions, "_write", write)
        new = publish(tmp_path, 1)
        assert whole(tmp_path / "repo") == new
    else:
        assert writes >= 8


def test_another_number_of_classes_cannot_stand_beside_the_old(tmp_path):
    publish(tmp_path, 0)
    seen = []
    publish(tmp_path, 1, classes=("a", "b", "c"), changed=lambda _: seen.append(served(tmp_path / "repo")))
    assert seen[0]["head"] == [2]
    assert seen[0]["encoder"] == [1, 2]
    assert whole(tmp_path / "repo")


def test_a_repository_of_the_old_layout_is_taken_on_from(tmp_path):
    _, manifest = write_toy_encoder(tmp_path / "repo/toy_encoder/1")
    policy = "version_policy { latest { num_versions: 1 } }"
    (tmp_path / "repo/toy_encoder/config.pbtxt").write_text(f'name: "toy_encoder" max_batch_size: 32 {policy}')
    assert served_version(tmp_path / "repo/toy_encoder") == 1
    assert open_encoder(tmp_path / "repo").encoder_id == manifest.encoder_id
    new = publish(tmp_path, 1)
    assert served(tmp_path / "repo") == everywhere([2])
    assert whole(tmp_path / "repo") == new
    with pytest.raises(ContractError, match="no earlier one"):
        roll_back(tmp_path / "repo", "toy")
