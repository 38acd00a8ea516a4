"""Signs of life against slow twins, and the watch against curves that are healthy or made ill."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.augment import SimCLRAugment
from train.data import step_generator
from train.encoder import Encoder, ProjectionHead, SimCLR
from train.health import Watch, alignment, chance_loss, dimension_std, effective_rank, signs_of_life, uniformity
from train.loss import nt_xent_with_top1
from train.optim import LARS, lr_at, parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(rows: int, dims: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


# --- measures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "dims"), [(7, 20), (20, 7), (9, 9)])
def test_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values(rows: int, dims: int) -> None:
    z = gaussian(rows, dims) * torch.linspace(0.1, 3, dims)
    sigma = torch.linalg.svd(z.double()).S.tolist()
    shares = [value / sum(sigma) for value in sigma]
    assert effective_rank(z) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_directions_of_equal_strength_are_counted(rank: int) -> None:
    frame, _ = torch.linalg.qr(gaussian(8, 8))
    assert effective_rank(frame[:rank].repeat(10, 1)) == pytest.approx(rank, rel=1e-5)
    assert effective_rank(frame[:rank].repeat(10, 1) * 1e-4) == pytest.approx(rank, rel=1e-5), "scale must not count"


def test_vectors_that_are_all_zero_have_no_more_than_one_dimension() -> None:
    assert effective_rank(torch.zeros(6, 4)) == 1


def slow_unit(row: list[float]) -> list[float]:
    length = math.hypot(*row)
    return [value / length for value in row]


def test_dimension_std_is_that_of_unit_vectors() -> None:
    z = gaussian(40, 6) + 0.5
    rows = [slow_unit(row) for row in z.tolist()]
    stds = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        stds.append(math.sqrt(sum((value - mean) ** 2 for value in column) / len(column)))
    assert dimension_std(z) == pytest.approx(sum(stds) / len(stds) * math.sqrt(6), rel=1e-5)


def test_dimension_std_is_one_on_the_whole_sphere_and_zero_at_a_point() -> None:
    assert dimension_std(gaussian(5000, 64)) == pytest.approx(1, abs=0.01)
    assert dimension_std(torch.ones(50, 64)) == pytest.approx(0, abs=1e-6)
    assert dimension_std(gaussian(1000, 64) * 0.01 + 1) < 0.1


def test_alignment_and_uniformity_are_those_of_wang_and_isola() -> None:
    z = gaussian(10, 4)
    one, other = ([slow_unit(row) for row in half.tolist()] for half in z.chunk(2))
    near = [math.dist(a, b) ** 2 for a, b in zip(one, other, strict=True)]
    assert alignment(z) == pytest.approx(sum(near) / len(near), rel=1e-5)
    pairs = [math.exp(-2 * math.dist(one[i], one[j]) ** 2) for i in range(5) for j in range(5) if i < j]
    assert uniformity(z) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)


def test_twins_in_one_place_are_aligned_and_opposite_ones_are_not() -> None:
    half = gaussian(6, 5)
    assert alignment(torch.cat([half, 3 * half])) == pytest.approx(0, abs=1e-6)
    assert alignment(torch.cat([half, -half])) == pytest.approx(4, rel=1e-6)
    assert uniformity(torch.ones(8, 3)) == pytest.approx(0, abs=1e-6)


def test_uniformity_of_a_huge_batch_looks_at_some_of_its_pictures() -> None:
    z = torch.cat([gaussian(2048, 2), torch.ones(3000, 2), gaussian(5048, 2, seed=1)])
    assert uniformity(z) == pytest.approx(uniformity(torch.cat([z[:2048], z[:2048]])))


def test_signs_of_life_are_those_of_unit_projections_and_do_not_touch_their_graph() -> None:
    z = gaussian(12, 5).requires_grad_()
    lengths = torch.linspace(0.01, 50, 12)[:, None]
    signs = signs_of_life(z * lengths)
    assert signs == pytest.approx(
        {
            "effective_rank": effective_rank(F.normalize(z, dim=1)),
            "dimension_std": dimension_std(z),
            "alignment": alignment(z),
            "uniformity": uniformity(z),
        },
        rel=1e-4,
    )
    assert signs_of_life(z.bfloat16(), z)["feature_std"] == pytest.approx(dimension_std(z))
    assert all(isinstance(value, float) for value in signs.values())


def test_the_last_batch_norm_hides_a_collapse_that_the_features_show() -> None:
    features = torch.ones(256, 32) + 0.02 * gaussian(256, 32)
    projections = nn.BatchNorm1d(16, affine=False)(features @ gaussian(32, 16, seed=1))
    signs = signs_of_life(projections, features)
    assert signs["dimension_std"] > 0.9
    assert signs["feature_std"] < 0.05


# --- the watch, on made-up curves ---------------------------------------------------------------------------------------

BATCH = 256
PICTURES = 50_000


def curve(steps: int, **changed: object) -> list[dict[str, float]]:
    """What CIFAR-10 at batch 256 looks like on two cores: loss 6.2 -> 4.5, top-1 1 % -> 25 %, rank about 60 of 128."""
    rng = np.random.default_rng(0)
    run = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-step / 150)
        metrics = {
            "epoch": step * BATCH / PICTURES,
            "loss": 6.24 - 1.8 * done + rng.normal(0, 0.12),
            "chance_loss": chance_loss(BATCH),
            "contrastive_top1": 0.015 + 0.24 * done + rng.normal(0, 0.01),
            "chance_top1": 1 / (2 * BATCH - 1),
            "lr": 1.2,
            "samples_per_s": 340 + rng.normal(0, 40),
            "data_share": min(1.0, max(0.0, 0.15 + rng.normal(0, 0.1))),
        }
        if step % 10 == 0:
            signs = {"effective_rank": 75 - 20 * done, "dimension_std": 0.97, "alignment": 1.2, "uniformity": -3.3}
            metrics |= signs | {"feature_std": 0.58 - 0.2 * done}
        for name, value in changed.items():
            metrics[name] = value(step, metrics[name]) if callable(value) else value  # type: ignore[assignment]
        run.append(metrics)
    return run


def watch(**changed: object) -> Watch:
    settings = {"batch_size": BATCH, "warmup_steps": 30, "learning_rate": 1.2, "temperature": 0.2}
    return Watch(**(settings | changed))  # type: ignore[arg-type]


def troubles(run: list[dict[str, float]], watcher: Watch | None = None) -> list[str]:
    watcher = watcher or watch()
    return [trouble for step, metrics in enumerate(run, start=1) for trouble in watcher.look(step, metrics)]


def test_a_healthy_run_raises_nothing() -> None:
    assert troubles(curve(1500)) == []


def test_a_healthy_run_of_few_pictures_in_small_batches_raises_nothing() -> None:
    rng = np.random.default_rng(1)
    run = [
        {
            "epoch": step * 16 / 32,
            "loss": max(0.7, 3.2 - step / 10) + rng.normal(0, 0.3),
            "chance_loss": chance_loss(16),
            "contrastive_top1": min(1.0, 0.3 + step / 40),
            "chance_top1": 1 / 31,
            "lr": 3.0,
            "samples_per_s": 800.0,
            "data_share": 0.15,
            "effective_rank": 15.0,
            "dimension_std": 0.95,
        }
        for step in range(1, 200)
    ]
    assert troubles(run, watch(batch_size=16)) == []


def test_one_batch_that_scatters_is_no_trouble() -> None:
    wild = curve(400)
    for step in (60, 150, 310):
        wild[step] |= {"loss": 11.0, "contrastive_top1": 1.0, "data_share": 1.0, "effective_rank": 1.0, "dimension_std": 0.01}
    assert troubles(wild) == []


def test_a_low_rank_is_collapse_and_named_once() -> None:
    (trouble,) = troubles(_ranks(3.1))
    assert trouble.startswith("step 110: ")
    assert "effective rank 3.1 of 128" in trouble
    assert "collapse" in trouble
    assert "--learning-rate (peak now 1.2)" in trouble
    assert "--temperature (now 0.2)" in trouble


def _ranks(rank: float) -> list[dict[str, float]]:
    run = curve(300)
    for metrics in run[99:]:
        if "effective_rank" in metrics:
            metrics["effective_rank"] = rank
    return run


def test_features_that_are_all_alike_are_collapse_whatever_the_projections_look_like() -> None:
    run = curve(200)
    for metrics in run:
        if "feature_std" in metrics:
            metrics["feature_std"] = 0.04
    (trouble,) = troubles(run)
    assert "spread 0.04 of 1" in trouble
    assert trouble.startswith("step 50: "), "the second reading after the warm-up of 30 steps"


def test_a_small_batch_fills_few_dimensions_and_that_is_no_collapse() -> None:
    assert troubles(_ranks(2.0), watch(batch_size=4)) == []
    assert troubles(_ranks(1.05), watch(batch_size=4)) != []


def test_a_loss_that_returns_to_chance_diverges() -> None:
    (trouble,) = troubles(curve(400, loss=lambda step, loss: loss if step < 200 else 6.24))
    assert "diverges" in trouble
    assert "6.24" in trouble
    assert "lower --learning-rate" in trouble


def test_a_loss_that_rises_but_stays_below_chance_does_not() -> None:
    assert troubles(curve(400, loss=lambda step, loss: loss if step < 200 else loss + 0.8)) == []


@pytest.mark.parametrize("level", [6.235, 5.9, 7.5])
def test_a_loss_that_never_moves_has_learned_nothing(level: float) -> None:
    (trouble,) = troubles(curve(400, loss=level, contrastive_top1=0.02))
    assert trouble.startswith("step 100: nothing learned yet")
    assert f"{level:.2f}" in trouble
    assert ("far too low" if level < 6 else "far too high, or the pictures are all alike") in trouble


def test_a_loss_that_only_falls_towards_chance_has_learned_nothing() -> None:
    (trouble,) = troubles(curve(400, loss=lambda step, _: 6.24 + 2 / step**0.5, contrastive_top1=0.003))
    assert "nothing learned" in trouble


def test_a_loss_that_cannot_fall_but_twins_that_are_found_are_no_trouble() -> None:
    hot = curve(400, loss=lambda step, _: 6.23)  # temperature 5: all logits are nearly equal
    cold = curve(400, loss=lambda step, _: 20 - step / 50)  # temperature 0.01: far above chance, and falling
    assert troubles(hot) == troubles(cold) == []


def test_a_long_warm_up_is_waited_for() -> None:
    slow = curve(700, loss=lambda step, loss: 6.2 if step < 400 else 5.0, contrastive_top1=0.02)
    assert troubles(slow, watch(warmup_steps=500)) == []
    assert troubles(slow, watch(warmup_steps=100)) != []


def test_twins_that_are_all_found_at_once_are_too_easy() -> None:
    (trouble,) = troubles(curve(200, contrastive_top1=lambda step, _: min(0.99, step / 40)))
    assert "too easy" in trouble
    assert "watermark" in trouble
    assert "--crop-area" in trouble


def test_twins_found_after_many_epochs_or_among_few_are_not() -> None:
    late = curve(200, contrastive_top1=lambda step, top1: 0.99 if step > 150 else top1, epoch=lambda step, _: step / 10)
    few = curve(200, contrastive_top1=0.99, chance_top1=1 / 31)
    assert troubles(late) == troubles(few) == []


def test_a_loader_that_starves_the_model_is_named_with_both_rates() -> None:
    starved = curve(300, data_share=0.8, samples_per_s=lambda step, _: 100.0)
    (trouble,) = troubles(starved, watch(workers=4))
    assert trouble.startswith("step 50: 80% of the time goes into pictures")
    assert "4 workers decode 100 pictures/s, the model could take 500/s" in trouble
    assert "more --workers" in trouble


def test_waiting_while_caches_are_cold_is_no_trouble() -> None:
    assert troubles(curve(300, data_share=lambda step, _: 0.95 if step < 20 or step % 10 == 0 else 0.2), watch(workers=4)) == []


def test_a_watch_that_is_fed_the_past_again_goes_on_where_it_was() -> None:
    run = curve(400, loss=lambda step, loss: loss if step < 200 else 6.24, data_share=0.9)
    whole = troubles(run, watch(workers=4))
    assert len(whole) == 2
    resumed = watch(workers=4)
    earlier = [trouble for step, metrics in enumerate(run[:150], start=1) for trouble in resumed.look(step, metrics)]
    later = [trouble for step, metrics in enumerate(run[150:], start=151) for trouble in resumed.look(step, metrics)]
    assert earlier + later == whole
    assert len(later) == 1


# --- the watch, on runs that are really ill -------------------------------------------------------------------------------


def train(images: Tensor, steps: int, *, peak: float, batch: int = 32, temperature: float = 0.2) -> list[str]:
    """The loop of train/pretrain.py in short, on 8 px and the narrowest network; what the watch says to it."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", 0.125, "small-s2")
    model = SimCLR(encoder, ProjectionHead(encoder.feature_dim))
    optimizer = LARS(parameter_groups(model), lr=0.0)
    augment = SimCLRAugment((8, 8), strength=0.2, blur=False, crop_area=0.7)
    watcher = Watch(batch_size=batch, warmup_steps=steps // 10, learning_rate=peak, temperature=temperature)
    said = []
    for step in range(steps):
        rows = torch.randperm(len(images), generator=step_generator(0, step, stream=0))[:batch]
        features = encoder(augment(torch.cat([images[rows], images[rows]]), step_generator(0, step)))
        projections = model.head(features)
        loss, top1 = nt_xent_with_top1(projections, temperature=temperature)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, peak=peak, warmup_steps=steps // 10, total_steps=steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics = {
            "epoch": (step + 1) * batch / len(images),
            "loss": loss.item(),
            "chance_loss": chance_loss(batch),
            "contrastive_top1": top1.item(),
            "chance_top1": 1 / (2 * batch - 1),
            "samples_per_s": 100.0,
            "data_share": 0.1,
        }
        if step % 5 == 0:
            metrics |= signs_of_life(projections, features)
        said += watcher.look(step + 1, metrics)
    return said


def pictures(count: int, seed: int = 0) -> Tensor:
    """Pictures with shapes of their own: coarse noise, enlarged."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (8, 8), mode="bicubic").clamp(0, 1).mul(255).byte()


def test_a_run_that_learns_is_left_alone() -> None:
    assert train(pictures(256), 110, peak=1.0) == []


def test_a_learning_rate_of_nearly_nothing_is_named() -> None:
    (said,) = train(pictures(256), 101, peak=1e-6)
    assert "nothing learned" in said
    assert "--learning-rate (peak now 1e-06)" in said


def test_pictures_that_are_all_alike_are_named() -> None:
    said = train(pictures(1).expand(64, -1, -1, -1).contiguous(), 101, peak=0.5)
    assert any("the pictures are all alike" in trouble for trouble in said)


def test_a_rate_a_hundred_times_too_high_is_named() -> None:
    said = train(pictures(256), 101, peak=300.0)
    assert any("--learning-rate (peak now 300) is far too high" in trouble for trouble in said)
