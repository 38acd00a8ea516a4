"""The online kNN and linear probe: what they measure, that they learn, and that training does not feel them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serve.contract import Preprocess
from serve.preprocess import load_image
from serve.samples import ImageSet, Sample
from train.encoder import Encoder, ProjectionHead, SimCLR
from train.loss import nt_xent_loss
from train.online import OnlineProbe, OnlineSet
from train.probe import knn_accuracy

CPU = torch.device("cpu")
PREPROCESS = Preprocess(height_px=8, width_px=8, resize="center_crop", crop=1.0, resample="bicubic", jpeg="full")


pytestmark = pytest.mark.usefixtures("one_thread")


def labelled(count: int, classes: int = 3, name: str = "train") -> tuple[Sample, ...]:
    return tuple(Sample(f"{name}/{i}", label=f"class {i % classes}") for i in range(count))


def features_of(targets: Tensor, dim: int = 6, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Features around a centre for each class, in a cone as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(8, dim, generator=torch.Generator().manual_seed(99))
    both = torch.cat([targets, targets]).clamp(min=0)
    return (1 + centres[both] + 0.1 * torch.randn(len(both), dim, generator=generator)) * scale


def probe_of(images: ImageSet, dim: int = 6) -> OnlineProbe:
    return OnlineProbe(images, dim, CPU)


# --- the probe ----------------------------------------------------------------------------------------------------------


def test_with_a_test_split_every_labelled_training_picture_teaches() -> None:
    images = ImageSet(train=(*labelled(7), Sample("nameless")), test=labelled(3, name="test"))
    probe = probe_of(images)
    assert probe.classes == ("class 0", "class 1", "class 2")
    assert probe.targets(images.train).tolist() == [0, 1, 2, 0, 1, 2, 0, -1]


def test_without_one_the_pictures_that_score_it_never_teach_it() -> None:
    images = ImageSet(train=labelled(15, classes=4))
    taught = probe_of(images).targets(images.train)
    assert (taught == -1).nonzero().flatten().tolist() == [4, 9, 14]
    assert taught[taught >= 0].tolist() == [i % 4 for i in range(15) if i % 5 != 4]


def test_identities_are_classes_where_there_are_no_labels() -> None:
    samples = tuple(Sample(str(i), identity=f"{i % 2:04}") for i in range(4))
    probe = probe_of(ImageSet(train=samples, test=samples))
    assert probe.targets(samples).tolist() == [0, 1, 0, 1]


def test_it_learns_whatever_the_scale_of_the_features() -> None:
    images = ImageSet(train=labelled(60), test=labelled(9, name="test"))
    for scale in (1e-3, 1.0, 1e3):
        probe = probe_of(images)
        targets = probe.targets(images.train)
        said = [probe.learn(features_of(targets, seed=step, scale=scale), targets) for step in range(30)]
        assert said[0]["probe_loss"] == pytest.approx(np.log(3), rel=1e-4), "it starts from zero"
        assert said[-1]["probe_train_accuracy"] > 0.95
        assert said[-1]["probe_loss"] < 0.3
        queries = features_of(torch.tensor([0, 1, 2]), seed=77)[:3]
        assert probe.accuracy(F.normalize(queries, dim=1).numpy(), ("class 0", "class 1", "class 2")) == 1
        assert probe.accuracy(F.normalize(queries, dim=1).numpy(), ("class 0", "class 2", "class 1")) == pytest.approx(1 / 3)
        assert probe.accuracy(F.normalize(queries, dim=1).numpy(), ("other",) * 3) == 0


def test_a_step_is_nesterovs_on_the_mean_cross_entropy_of_both_views() -> None:
    images = ImageSet(train=labelled(8), test=labelled(3, name="test"))
    probe = probe_of(images)
    targets = probe.targets(images.train)
    weight, velocity = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
    bias, bias_velocity = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    rate = 8 / 6
    for step in range(3):
        features = features_of(targets, seed=step)
        unit = features.double() / features.double().norm(dim=1, keepdim=True)
        x = (unit - unit.mean(0)) / (unit.var(0, correction=0) + 1e-5).sqrt()
        wanted = F.one_hot(torch.cat([targets, targets]), 3).double()
        error = ((x @ weight.T + bias).softmax(1) - wanted) / len(x)
        probe.learn(features, targets)
        for value, speed, gradient in ((weight, velocity, error.T @ x), (bias, bias_velocity, error.sum(0))):
            speed.mul_(0.9).add_(gradient)
            value.sub_(rate * (gradient + 0.9 * speed))
        state = probe.state_dict()
        assert torch.allclose(state["weight"].double(), weight, atol=1e-4)
        assert torch.allclose(state["bias"].double(), bias, atol=1e-4)


def test_pictures_without_a_label_do_not_count() -> None:
    images = ImageSet(train=labelled(6), test=labelled(3, name="test"))
    with_others, alone = probe_of(images), probe_of(images)
    targets = torch.tensor([0, -1, 1, 2, -1])
    features = features_of(targets)
    known = targets != -1
    assert with_others.learn(features, targets) == alone.learn(features[torch.cat([known, known])], targets[known])
    assert torch.equal(with_others.state_dict()["weight"], alone.state_dict()["weight"])


def test_a_step_without_labels_changes_nothing() -> None:
    probe = probe_of(ImageSet(train=labelled(6), test=labelled(3)))
    before = _bytes_of(probe.state_dict())
    assert probe.learn(features_of(torch.tensor([-1, -1])), torch.tensor([-1, -1])) == {}
    assert _bytes_of(probe.state_dict()) == before


def _bytes_of(state: dict[str, object]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_it_goes_on_bit_for_bit_from_a_file_that_is_not_unpickled() -> None:
    images = ImageSet(train=labelled(20), test=labelled(3))
    whole, first = probe_of(images), probe_of(images)
    targets = whole.targets(images.train)
    batches = [features_of(targets, seed=step) for step in range(8)]
    wanted = [whole.learn(batch, targets) for batch in batches]
    said = [first.learn(batch, targets) for batch in batches[:3]]
    first.accuracy(F.normalize(batches[0], dim=1).numpy()[:3], ("class 0", "class 1", "class 2"))
    saved = torch.load(io.BytesIO(_bytes_of(first.state_dict())), weights_only=True)
    resumed = probe_of(images)
    resumed.load_state_dict(saved)
    assert said + [resumed.learn(batch, targets) for batch in batches[3:]] == wanted
    assert all(torch.equal(resumed.state_dict()[name], whole.state_dict()[name]) for name in ("weight", "bias"))


def test_the_state_of_other_classes_is_refused() -> None:
    three, two = (
        probe_of(ImageSet(train=labelled(9), test=labelled(3))),
        probe_of(ImageSet(train=labelled(9, 2), test=labelled(3))),
    )
    with pytest.raises(RuntimeError, match="wanted"):
        two.load_state_dict(three.state_dict())


def test_training_does_not_feel_the_probe() -> None:
    def run(with_probe: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        encoder = Encoder("resnet18", 0.125, "small")
        model = SimCLR(encoder, ProjectionHead(encoder.feature_dim))
        images = ImageSet(train=labelled(4), test=labelled(3))
        probe = OnlineProbe(images, encoder.feature_dim, CPU) if with_probe else None
        for _ in range(2):
            features = encoder(torch.rand(8, 3, 8, 8))
            loss = nt_xent_loss(model.head(features), temperature=0.2)
            if probe:
                probe.learn(features, probe.targets(images.train))
            loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]), torch.rand(3)

    for without, with_it in zip(run(False), run(True), strict=True):
        assert torch.equal(without, with_it)


def test_features_in_bfloat16_are_learned_in_float32() -> None:
    images = ImageSet(train=labelled(9), test=labelled(3))
    probe = probe_of(images)
    targets = probe.targets(images.train)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        said = probe.learn(features_of(targets).bfloat16(), targets)
    assert said["probe_loss"] == pytest.approx(np.log(3), rel=1e-4)
    assert probe.state_dict()["weight"].dtype == torch.float32
    assert probe.state_dict()["weight"].abs().sum() > 0


# --- the pictures it is measured on ---------------------------------------------------------------------------------------


def test_labelled_pictures_are_a_bank_and_queries(pictures: Callable[[int], list[Sample]]) -> None:
    kept = OnlineSet.from_samples(ImageSet(train=tuple(pictures(20))), PREPROCESS)
    assert kept.has_labels
    assert kept.images.shape == (16, 3, 8, 8)
    assert kept.groups == tuple(f"class {i % 3}" for i in range(20) if i % 5 != 4)
    assert kept.query_groups == tuple(f"class {i % 3}" for i in (4, 9, 14, 19))


def test_pictures_without_labels_are_for_the_contact_sheet(
    pictures: Callable[[int], list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.online.MOST_UNLABELLED", 6)
    samples = [Sample(sample.source) for sample in pictures(20)]
    kept = OnlineSet.from_samples(ImageSet(train=tuple(samples)), PREPROCESS)
    assert not kept.has_labels
    assert kept.images.shape == (5, 3, 8, 8), "every fourth of 20"
    for picture, sample in zip(kept.images.permute(0, 2, 3, 1), samples[::4], strict=True):
        assert (picture.numpy() == load_image(sample.source, PREPROCESS)).all()
    metrics, vectors = kept.measure(Encoder("resnet18", 0.125, "small"), CPU)
    assert metrics == {}
    assert vectors.shape == (5, 64)


def test_it_measures_knn_and_probe_and_leaves_the_encoder_as_it_was(pictures: Callable[[int], list[Sample]]) -> None:
    images = ImageSet(train=tuple(pictures(30)))
    kept = OnlineSet.from_samples(images, PREPROCESS)
    encoder = Encoder("resnet18", 0.125, "small")
    probe = OnlineProbe(images, encoder.feature_dim, CPU)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    random_state = torch.get_rng_state()
    metrics, vectors = kept.measure(encoder, CPU, probe)
    assert encoder.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    with torch.no_grad():
        bank, queries = (F.normalize(encoder.eval()(part.float() / 255), dim=1).numpy() for part in (kept.images, kept.queries))
    np.testing.assert_allclose(vectors, bank, atol=1e-5)
    assert metrics["knn_accuracy"] == knn_accuracy(bank, kept.groups, queries, kept.query_groups)
    untaught = kept.query_groups.count("class 0") / len(kept.query_groups)
    assert metrics["probe_accuracy"] == pytest.approx(untaught), "zero weights choose the first class"
    kept.measure(encoder, CPU)
    assert not encoder.training, "nor is it put into training mode"


def test_a_source_of_one_labelled_picture_is_taken_as_unlabelled(
    pictures: Callable[[int], list[Sample]], tmp_path: Path
) -> None:
    some = pictures(6)
    images = ImageSet(train=(some[0], *(Sample(sample.source) for sample in some[1:])))
    kept = OnlineSet.from_samples(images, PREPROCESS)
    assert not kept.has_labels
    assert len(kept.images) == 6
