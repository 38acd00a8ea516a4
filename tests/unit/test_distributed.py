"""2 and 4 real processes (gloo, float64) against one process with the whole batch.

pytest starts this file as a script, which forks the ranks; each writes what it found to a file, and the tests compare.
"""

import copy
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from serve.errors import TrainingError
from train import distributed
from train.gradcache import cached_backward
from train.loss import nt_xent_with_top1

Found = dict[str, Tensor]
LossFn = Callable[[Tensor], tuple[Tensor, Tensor]]
WORLDS = 2, 4
LIMIT_S = 60
"""After so long a rank that waits for another one ends."""
BATCH = 8
LOSSES = {"plain": None, "tiled": 3, "one tile": 64}
CHUNKS_PER_RANK = 2
UNEVEN = {"2d": (3, 5, 4), "1d": (3,)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    last = nn.BatchNorm1d(6)
    last.register_parameter("bias", None)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8, bias=False), nn.BatchNorm1d(8)
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 6), last).double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def views() -> Tensor:
    """Two views of all images (2, B, 3, 5, 5)."""
    return draw(2, BATCH, 3, 5, 5)


def uneven(shape: tuple[int, ...], rank: int) -> Tensor:
    """Batches that differ in size and level from rank to rank."""
    return draw(rank + 2, *shape, seed=rank) * (rank + 1) + rank


def norm_for(shape: tuple[int, ...]) -> nn.Module:
    norm = nn.BatchNorm2d(3) if len(shape) == 3 else nn.BatchNorm1d(3, momentum=None)
    with torch.no_grad():
        norm.weight.copy_(draw(3, seed=8))
        norm.bias.copy_(draw(3, seed=9))
    return norm.double()


def findings(model: nn.Module, loss: Tensor, top1: Tensor) -> Found:
    gradients = {f"{name}.grad": weight.grad for name, weight in model.named_parameters()}
    return {"loss": loss.detach(), "top1": top1, **gradients, **dict(model.named_buffers())}


def worker(folder: Path, rank: int) -> None:
    """What one rank finds."""
    signal.alarm(LIMIT_S)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}")
    distributed.start()
    assert distributed.rank() == rank
    found = {}
    for name, tile_rows in LOSSES.items():
        loss_fn = partial(nt_xent_with_top1, temperature=0.2, tile_rows=tile_rows)
        found[name] = step(loss_fn)
        found[f"{name}, chunked"] = chunked_step(loss_fn)
        found[f"{name}, alone"] = loss_alone(loss_fn)
    for name, shape in UNEVEN.items():
        found[f"uneven {name}"] = normalise(distributed.convert_batchnorm(norm_for(shape)), uneven(shape, rank))
    half = uneven(UNEVEN["2d"], rank).bfloat16().contiguous(memory_format=torch.channels_last)
    found["half"] = {"y": distributed.convert_batchnorm(nn.BatchNorm2d(3))(half)}
    flags = [distributed.any_of(rank == 1), distributed.any_of(False), distributed.smallest(7 + rank)]
    found["exchange"] = {"flags": torch.tensor(flags), "gathered": distributed.gather(torch.tensor([rank, 5]))}
    torch.save(found, folder / f"{rank}-of-{distributed.world_size()}.pt")
    distributed.stop()
    assert distributed.world_size() == 1


def share(of_all_2B: Tensor) -> Tensor:
    """This rank's images."""
    return of_all_2B.chunk(distributed.world_size(), dim=1)[distributed.rank()]


def step(loss_fn: LossFn) -> Found:
    model = distributed.convert_batchnorm(network())
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    loss, top1 = loss_fn(wrapped(share(views()).flatten(0, 1)))
    loss.backward()
    return findings(model, loss, top1)


def chunked_step(loss_fn: LossFn) -> Found:
    model = distributed.convert_batchnorm(network())
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    parts = [part.flatten(0, 1) for part in share(views()).chunk(CHUNKS_PER_RANK, dim=1)]
    loss, top1 = cached_backward(wrapped, [partial(wrapped, part) for part in parts], loss_fn)
    return findings(model, loss, top1)


def loss_alone(loss_fn: LossFn) -> Found:
    z = share(draw(2, BATCH, 5, seed=3)).flatten(0, 1).requires_grad_()
    loss, top1 = loss_fn(z)
    loss.backward()
    assert z.grad is not None
    return {"z": z.detach(), "z.grad": z.grad, "loss": loss.detach(), "top1": top1}


def normalise(norm: nn.Module, x: Tensor) -> Found:
    """Output, gradients of a loss that is no sum over channels, buffers, and what evaluation makes of x."""
    x.requires_grad_()
    y = norm(x)
    (y**3 * x.detach().cos()).sum().backward()
    gradients = {"x.grad": x.grad, "weight.grad": norm.weight.grad, "bias.grad": norm.bias.grad}
    return {"y": y.detach(), **gradients, **dict(norm.named_buffers()), "evaluated": norm.eval()(x).detach()}


def start_ranks(folder: Path) -> None:
    """Forked, because importing torch and what DistributedDataParallel needs takes longer than all the tests."""
    importlib.import_module("torch._dynamo")
    for world in WORLDS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(WORLD_SIZE=f"{world}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
        ranks = [multiprocessing.get_context("fork").Process(target=worker, args=(folder, rank)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every rank of every group has left what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    root = str(Path(distributed.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert len(list(folder.iterdir())) == sum(WORLDS), done.stderr
    return folder


@pytest.fixture(params=WORLDS)
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Found]]:
    return [torch.load(folder / f"{rank}-of-{request.param}.pt", weights_only=True) for rank in range(request.param)]


def close(found: Found, wanted: Found) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_averaged_gradients_are_those_of_one_process(ranks: list[dict[str, Found]], name: str) -> None:
    model = network()
    loss, top1 = nt_xent_with_top1(model(views().flatten(0, 1)), temperature=0.2)
    loss.backward()
    wanted = findings(model, loss, top1)
    assert wanted["0.weight.grad"].abs().max() > 1e-3
    for found in ranks:
        close(found[name], wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_chunked_gradients_are_those_of_one_process_with_the_same_chunks(ranks: list[dict[str, Found]], name: str) -> None:
    """A chunk is normalised over all ranks: its pictures are every rank's share of it."""
    shards = [shard.chunk(CHUNKS_PER_RANK, dim=1) for shard in views().chunk(len(ranks), dim=1)]
    model = network()
    chunks = [torch.cat(chunk, dim=1) for chunk in zip(*shards, strict=True)]
    first, second = zip(*(model(chunk.flatten(0, 1)).chunk(2) for chunk in chunks), strict=True)
    loss, top1 = nt_xent_with_top1(torch.cat(first + second), temperature=0.2)
    loss.backward()
    wanted = findings(model, loss, top1)
    assert wanted["1.num_batches_tracked"] == CHUNKS_PER_RANK
    for found in ranks:
        close(found[f"{name}, chunked"], wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_a_rank_has_its_rows_of_the_gradient_times_the_number_of_ranks(ranks: list[dict[str, Found]], name: str) -> None:
    z = draw(2, BATCH, 5, seed=3).requires_grad_()
    loss, top1 = nt_xent_with_top1(z.flatten(0, 1), temperature=0.2)
    loss.backward()
    assert z.grad is not None
    gradients = z.grad.chunk(len(ranks), dim=1)
    for found, gradient in zip(ranks, gradients, strict=True):
        alone = found[f"{name}, alone"]
        close({"loss": alone["loss"], "top1": alone["top1"]}, {"loss": loss.detach(), "top1": top1})
        close({"": alone["z.grad"]}, {"": len(ranks) * gradient.flatten(0, 1)})
        own_negatives_only, _ = nt_xent_with_top1(alone["z"], temperature=0.2)
        assert abs(own_negatives_only - loss) > 0.1, "the test would notice negatives that were not gathered"


@pytest.mark.parametrize("name", UNEVEN)
def test_batch_norm_is_that_of_all_ranks_samples_together(ranks: list[dict[str, Found]], name: str) -> None:
    batches = [uneven(UNEVEN[name], rank) for rank in range(len(ranks))]
    wanted = normalise(norm_for(UNEVEN[name]), torch.cat(batches))
    of_ranks = [found[f"uneven {name}"] for found in ranks]
    for of_samples in ("y", "x.grad", "evaluated"):
        close({of_samples: torch.cat([found[of_samples] for found in of_ranks])}, {of_samples: wanted[of_samples]})
    for of_weights in ("weight.grad", "bias.grad"):
        close({of_weights: torch.stack([found[of_weights] for found in of_ranks]).sum(0)}, {of_weights: wanted[of_weights]})
    for found in of_ranks:
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            close({buffer: found[buffer]}, {buffer: wanted[buffer]})


def test_batch_norm_of_half_precision_takes_float32_statistics(ranks: list[dict[str, Found]]) -> None:
    whole = torch.cat([uneven(UNEVEN["2d"], rank) for rank in range(len(ranks))]).bfloat16()
    wanted = nn.BatchNorm2d(3)(whole.float()).bfloat16()
    found = torch.cat([found["half"]["y"] for found in ranks])
    assert found.dtype == torch.bfloat16
    assert (found == wanted).float().mean() > 0.97, "but for the last bit, now and then"
    assert all(found["half"]["y"].is_contiguous(memory_format=torch.channels_last) for found in ranks)


def test_ranks_exchange_flags_and_numbers(ranks: list[dict[str, Found]]) -> None:
    for found in ranks:
        assert found["exchange"]["flags"].tolist() == [True, False, 7]
        assert found["exchange"]["gathered"].tolist() == [[rank, 5] for rank in range(len(ranks))]


def test_alone_there_is_nothing_to_exchange() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.any_of(True)
    assert not distributed.any_of(False)
    assert distributed.smallest(3) == 3
    x = draw(2, 3)
    assert distributed.sum_over_ranks_(x) is distributed.max_over_ranks_(x) is x
    distributed.stop()


def test_converted_batch_norms_keep_parameters_names_and_values() -> None:
    model = network()
    model(draw(4, 3, 5, 5))
    names, parameters = list(model.state_dict()), list(model.parameters())
    plain = copy.deepcopy(model)
    converted = distributed.convert_batchnorm(model.eval())
    assert converted is model
    assert [type(module) for module in model if isinstance(module, nn.modules.batchnorm._BatchNorm)] == [
        distributed.GlobalBatchNorm
    ] * 3
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model[8].bias is None
    assert not model[1].training
    plain.load_state_dict(model.state_dict())
    batch = draw(5, 3, 5, 5)
    assert torch.equal(model.train()(batch), plain.train()(batch)), "one process normalises as ever"
    assert torch.equal(model.eval()(batch), plain.eval()(batch))


def test_batch_norm_wants_flat_features_or_maps() -> None:
    with pytest.raises(ValueError, match="input has 3 dimensions"):
        distributed.GlobalBatchNorm(3)(draw(2, 3, 4))


def test_start_without_torchrun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.start().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert distributed.world_size() == 1


def test_a_world_size_that_torchrun_did_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainingError, match="WORLD_SIZE is set but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"):
        distributed.start()


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(TrainingError, match=r"process 3 .* no GPU of its own; use torchrun --nproc-per-node 2"):
        distributed.start()


if __name__ == "__main__":
    start_ranks(Path(sys.argv[1]))
