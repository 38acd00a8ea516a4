"""Encoders for asyncio: the same vectors, the loop stays free, a cancelled task too."""

import asyncio
import threading
import time

import numpy as np
import pytest

from serve.aio import AsyncEncoder, open_async_encoder
from serve.encoder import OnnxEncoder
from serve.errors import ContractError, EncoderUnavailable
from serve.ports import free_port
from serve.preprocess import ImageError
from tests.bad_images import good
from tests.gated_encoder import GatedEncoder
from tests.toy_encoder import write_toy_encoder


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("encoder_")]


def test_the_same_vectors_as_without_it(tmp_path):
    wanted = OnnxEncoder(write_toy_encoder(tmp_path / "toy_encoder" / "1")[0])
    pictures = [good(number) for number in range(40)]

    async def ask():
        async with await open_async_encoder(tmp_path) as encoder:
            assert encoder.manifest == wanted.manifest
            assert encoder.encoder_id == wanted.encoder_id
            both = await asyncio.gather(encoder.embed(pictures), encoder.embed_bytes(pictures))
            return [*both, np.concatenate(await asyncio.gather(*(encoder.embed([picture]) for picture in pictures)))]

    for vectors in asyncio.run(ask()):
        np.testing.assert_allclose(vectors, wanted.embed(pictures), atol=1e-6)


def test_errors_arrive_as_they_are(tmp_path):
    async def ask():
        async with AsyncEncoder(OnnxEncoder(write_toy_encoder(tmp_path)[0])) as encoder:
            with pytest.raises(ImageError, match="not a readable picture"):
                await encoder.embed([b"no picture"])
            with pytest.raises(ContractError, match="has no head"):
                await encoder.classify_bytes([good()])

    asyncio.run(ask())


def test_an_encoder_that_is_not_there(tmp_path):
    with pytest.raises(ContractError, match="wanted one folder"):
        asyncio.run(open_async_encoder(tmp_path))
    with pytest.raises(EncoderUnavailable, match="no Triton server answers"):
        asyncio.run(open_async_encoder(f"grpc://127.0.0.1:{free_port()}/toy"))


def test_who_finds_a_thread_goes_at_once_and_who_waits_goes_together(tmp_path):
    gated = GatedEncoder(tmp_path)
    pictures = [good(number) for number in range(80)]

    async def ask():
        async with AsyncEncoder(gated, threads=2) as encoder:
            tasks = [asyncio.create_task(encoder.embed([picture])) for picture in pictures[:70]]
            tasks += [asyncio.create_task(encoder.embed(pictures[70:]))]
            await asyncio.sleep(0.2)
            assert gated.batches == [1, 1]
            assert len(threads()) == 2
            gated.let(80)
            return np.concatenate(await asyncio.gather(*tasks))

    np.testing.assert_allclose(asyncio.run(ask()), gated.ungated.embed(pictures), atol=1e-6)
    assert gated.batches == [1, 1, 32, 32, 14]


def test_what_is_larger_than_a_group_goes_alone(tmp_path):
    gated = GatedEncoder(tmp_path)

    async def ask():
        async with AsyncEncoder(gated, threads=1) as encoder:
            tasks = [asyncio.create_task(encoder.embed([good()] * count)) for count in (1, 20, 20, 50, 1)]
            gated.let(92)
            return [len(vectors) for vectors in await asyncio.gather(*tasks)]

    assert asyncio.run(ask()) == [1, 20, 20, 50, 1]
    assert gated.batches == [1, 20, 20, 50, 1]


@pytest.mark.parametrize("bad", [b"no picture", np.zeros((3, 3, 3), np.uint8)], ids=["unreadable", "wrong shape"])
def test_a_bad_picture_fails_its_own_request_alone(tmp_path, bad):
    wanted = OnnxEncoder(write_toy_encoder(tmp_path)[0])
    requests = [[good(number)] for number in range(40)]
    requests[7] = [good(7), bad]
    requests[20] = []

    async def ask():
        async with AsyncEncoder(wanted, threads=1) as encoder:
            return await asyncio.gather(*map(encoder.embed, requests), return_exceptions=True)

    answers = asyncio.run(ask())
    assert isinstance(answers.pop(7), ValueError)
    requests.pop(7)
    assert [len(answer) for answer in answers] == [len(request) for request in requests]
    np.testing.assert_allclose(
        np.concatenate(answers), wanted.embed([picture for (picture,) in filter(None, requests)]), atol=1e-6
    )


def test_all_are_told_when_the_encoder_is_away(tmp_path):
    gated = GatedEncoder(tmp_path)

    def away(images):
        gated.batches.append(len(images))
        raise EncoderUnavailable("away")

    gated.embed = away

    async def ask():
        async with AsyncEncoder(gated, threads=1) as encoder:
            return await asyncio.gather(*(encoder.embed([good()]) for _ in range(9)), return_exceptions=True)

    assert [str(answer) for answer in asyncio.run(ask())] == ["away"] * 9
    assert gated.batches == [1, 8], "it is not asked for each of them"


def test_a_task_that_is_cancelled_is_free_at_once_and_one_that_waits_is_never_begun(tmp_path):
    gated = GatedEncoder(tmp_path)

    async def ask():
        async with AsyncEncoder(gated, threads=1) as encoder:
            first, second = (asyncio.create_task(encoder.embed([good()])) for _ in range(2))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await first
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            assert time.monotonic() - began < 2
            gated.let(2)
            assert (await encoder.embed([good()])).shape == (1, 8)

    asyncio.run(ask())
    assert len(gated.batches) == 2


def test_closing_waits_for_all_and_leaves_no_thread(tmp_path):
    gated = GatedEncoder(tmp_path)

    async def ask():
        encoder = AsyncEncoder(gated, threads=1)
        tasks = [asyncio.create_task(encoder.embed([good()])) for _ in range(5)]
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(encoder.close())
        await asyncio.sleep(0.1)
        assert not closing.done()
        with pytest.raises(RuntimeError, match="closed"):
            await encoder.embed([good()])
        gated.let(5)
        await closing
        assert all(task.done() for task in tasks)
        assert {vectors.shape for vectors in await asyncio.gather(*tasks)} == {(1, 8)}

    asyncio.run(ask())
    assert threads() == []
