"""The memory estimate against tensors that are really saved, and against what a process really takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.encoder import Encoder, ProjectionHead, SimCLR
from train.estimate import MemoryEstimate, memory_estimate


def network(width: float = 0.125, arch: str = "resnet18", stem: str = "small") -> SimCLR:
    encoder = Encoder(arch, width, stem)  # type: ignore[arg-type]
    return SimCLR(encoder, ProjectionHead(encoder.feature_dim))


def really_saved(model: SimCLR, views: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of what a real pass keeps, by address; weights, their copies and the views left out."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor.detach()

    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(views)
    ours = {tensor.untyped_storage().data_ptr() for tensor in (views, *model.parameters(), *model.buffers())}
    shapes = {weight.shape for weight in model.parameters() if weight.ndim > 1}
    return sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in kept.items()
        if address not in ours and tensor.shape not in shapes and tensor.shape != views.shape
    )


@pytest.mark.parametrize(
    ("arch", "stem", "frame"),
    [("resnet18", "small", (16, 16)), ("resnet50", "imagenet", (64, 32)), ("resnet18", "small-s2", (32, 32))],
)
def test_activations_are_those_that_a_real_pass_saves(arch: str, stem: str, frame: tuple[int, int]) -> None:
    model = network(arch=arch, stem=stem)
    estimate = memory_estimate(model, frame, batch_size=5)
    assert estimate.activations == pytest.approx(really_saved(model, torch.rand(10, 3, *frame)), rel=0.01)


def test_in_bfloat16_they_are_half_as_large() -> None:
    model, frame = network(), (16, 16)
    estimate = memory_estimate(model, frame, batch_size=8, dtype=torch.bfloat16)
    assert estimate.activations == pytest.approx(really_saved(model, torch.rand(16, 3, *frame), torch.bfloat16), rel=0.03)
    assert estimate.activations == pytest.approx(memory_estimate(model, frame, batch_size=8).activations / 2, rel=0.03)


def test_the_parts_are_counted() -> None:
    model = network()
    weights = sum(weight.numel() for weight in model.parameters())
    plain = memory_estimate(model, (16, 16), batch_size=32)
    assert plain.weights == weights * 4 * 3, "weight, gradient, momentum"
    assert plain.views == 64 * 3 * 16 * 16 * 4
    assert plain.loss == 3 * 64 * 64 * 4
    assert plain.total == plain.weights + plain.activations + plain.views + plain.loss + plain.heap
    assert memory_estimate(model, (16, 16), batch_size=32, on_gpu=True).heap == 0


def test_it_grows_with_the_chunk_and_the_loss_with_the_batch() -> None:
    model = network()
    whole = memory_estimate(model, (16, 16), batch_size=64)
    chunked = memory_estimate(model, (16, 16), batch_size=64, chunk=16)
    assert whole.activations == pytest.approx(4 * chunked.activations, rel=0.01)
    assert whole.views == 4 * chunked.views
    assert whole.loss == chunked.loss
    assert memory_estimate(model, (16, 16), batch_size=64, chunk=999) == whole
    assert memory_estimate(model, (16, 16), batch_size=64, tile_rows=32).loss == 3 * 32 * 32 * 4
    shared = memory_estimate(model, (16, 16), batch_size=64, world_size=4)
    assert (shared.activations, shared.loss) == (chunked.activations, whole.loss)


def test_the_model_and_the_random_state_stay_as_they_are() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    memory_estimate(model, (16, 16), batch_size=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None and weight.device.type == "cpu" for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training


def test_a_huge_step_is_estimated_without_taking_its_memory() -> None:
    estimate = memory_estimate(network(1, stem="imagenet"), (224, 224), batch_size=4096)
    assert estimate.activations > 100 * 2**30


def test_it_is_said_in_one_line() -> None:
    said = str(MemoryEstimate(weights=300 * 2**20, activations=3 * 2**30, views=50 * 2**20, loss=0, heap=2**20))
    assert said == "about 3.3 GiB a step (activations 3.0 GiB, weights and momentum 300 MiB, views 50 MiB, heap 1 MiB)"


CHILD = """
import torch
torch.set_num_threads(1)
from train.encoder import Encoder, ProjectionHead, SimCLR
from train.estimate import memory_estimate
from train.optim import LARS, parameter_groups

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

torch.nn.functional.conv2d(torch.rand(2, 3, 9, 9), torch.rand(4, 3, 3, 3))
before = kib("VmRSS")
encoder = Encoder("resnet18", 0.25, "small-s2")
model = SimCLR(encoder, ProjectionHead(encoder.feature_dim)).to(memory_format=torch.channels_last)
optimizer = LARS(parameter_groups(model), lr=0.1)
for _ in range(2):
    views = torch.rand(512, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    z = model.head(model.encoder(views))
    loss = (z @ z.T).logsumexp(1).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    del z, loss, views
print(memory_estimate(model, (32, 32), batch_size=256).total, (kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_really_takes_about_that_much() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    estimated, taken = map(int, done.stdout.split())
    assert 0.6 < estimated / taken < 1.5
