"""The HTTP API in this process, on a real graph and on an encoder that works only when it is let."""

import asyncio
import inspect
import json
import re
import resource
import time
from dataclasses import replace

import numpy as np
import pytest
from fastapi.openapi.models import OpenAPI

from serve.api import create_api
from serve.errors import ContractError, EncoderMismatch, EncoderUnavailable, GalleryError, Reembedded, SimclrError
from serve.gateway import canary
from serve.gateway.limits import Limits
from serve.gateway.pictures import ClassifyAnswer, EmbedAnswer
from tests.asgi_client import PNG, ask, client, form, problem
from tests.bad_images import accepted, good, refused
from tests.gated_encoder import GatedEncoder
from tests.toy_encoder import DIM, toy_head


@pytest.fixture
def gated(tmp_path):
    encoder = GatedEncoder(tmp_path)
    yield encoder
    encoder.let(10_000)  # no thread of it waits for ever


def vectors(answer):
    return np.array([result["embedding"] for result in answer.json()["results"]], np.float32)


async def until(condition):
    """Wait for what other threads bring about; the condition may have to be awaited."""
    deadline = time.monotonic() + 20
    while not (await found if inspect.isawaitable(found := condition()) else found):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def metric(http, name):
    (line,) = [line for line in (await http.get("/metrics")).text.splitlines() if line.startswith(f"{name} ")]
    return float(line.rsplit(" ", 1)[1])


def test_one_picture_and_many(encoder):
    api = create_api(encoder)
    wanted = encoder.embed([good(0), good(1), good(2)])
    one, octets, many = ask(
        api,
        lambda http: http.post("/v1/embed", content=good(0), headers=PNG),
        lambda http: http.post("/v1/embed", content=good(0), headers={"content-type": "application/octet-stream"}),
        lambda http: http.post("/v1/embed", files=form(good(0), good(1), good(2))),
    )
    assert one.json()["encoder_id"] == encoder.encoder_id
    np.testing.assert_array_equal(vectors(one), wanted[:1])
    np.testing.assert_array_equal(vectors(octets), wanted[:1])
    np.testing.assert_allclose(vectors(many), wanted, atol=1e-6)


def test_one_bad_image_never_hurts_a_neighbour(encoder):
    api = create_api(encoder)
    bad, unusual = refused(), accepted()
    pictures = [good(0)]
    for number, data in enumerate([*bad.values(), *unusual.values()], start=1):
        pictures += [data, good(number)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    together, *alone = ask(
        api,
        lambda http: http.post("/v1/embed", files=form(*pictures)),
        *(lambda http, data=data: http.post("/v1/embed", content=data, headers=PNG) for data in pictures[1::2]),
    )
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    results = together.json()["results"]
    wanted = encoder.embed(pictures[::2])
    np.testing.assert_allclose([result["embedding"] for result in results[::2]], wanted, atol=1e-6)
    for name, result, answer in zip([*bad, *unusual], results[1::2], alone, strict=True):
        if name in bad:
            assert result == {"error": problem(answer, 422)}, name
        else:
            np.testing.assert_allclose(result["embedding"], vectors(answer)[0], atol=1e-6, err_msg=name)
    assert grown_mb < 300


def test_several_bad_ones_are_still_several_results(encoder):
    both, none = ask(
        create_api(encoder),
        lambda http: http.post("/v1/embed", files=form(b"junk", good(0))),
        lambda http: http.post("/v1/embed", files=form(b"junk", b"")),
    )
    assert [list(result) for result in both.json()["results"]] == [["error"], ["embedding"]]
    assert [list(result) for result in none.json()["results"]] == [["error"], ["error"]]


def test_classify(encoder):
    head = toy_head(encoder.encoder_id)
    (wanted,) = head.probabilities(encoder.embed([good(0)]))
    answer, bad, without = (
        *ask(
            create_api(encoder, heads={"toy": head}),
            lambda http: http.post("/v1/classify", files=form(good(0), b"junk")),
            lambda http: http.post("/v1/classify", content=b"junk", headers=PNG),
        ),
        ask(create_api(encoder), lambda http: http.post("/v1/classify", files=form(good(0)))),
    )
    first, second = answer.json()["results"]
    assert first["label"] == head.classes[int(wanted.argmax())]
    assert list(first["probabilities"]) == list(head.classes)
    np.testing.assert_allclose(list(first["probabilities"].values()), wanted, atol=1e-6)
    assert second == {"error": problem(bad, 422)}
    problem(without, 404)


def test_several_heads_and_one_that_abstains(encoder):
    animals = toy_head(encoder.encoder_id)
    never = replace(toy_head(encoder.encoder_id, classes=("day", "night")), abstain_below=1.0)
    by_default, named, unknown, info = ask(
        create_api(encoder, heads={"animals": animals, "light": never}),
        lambda http: http.post("/v1/classify", content=good(0), headers=PNG),
        lambda http: http.post("/v1/classify?head=light", content=good(0), headers=PNG),
        lambda http: http.post("/v1/classify?head=sound", content=good(0), headers=PNG),
        lambda http: http.get("/v1/info"),
    )
    (first,), (second,) = by_default.json()["results"], named.json()["results"]
    assert first["label"] in animals.classes
    assert second["label"] is None
    assert list(second["probabilities"]) == ["day", "night"]
    assert problem(unknown, 422) == "head: there is no head 'sound'; there are animals, light"
    assert info.json()["heads"] == {"animals": list(animals.classes), "light": ["day", "night"]}
    assert info.json()["classes"] == list(animals.classes)


def test_a_head_of_another_encoder(encoder):
    with pytest.raises(EncoderMismatch, match="fit-head"):
        create_api(encoder, heads={"other": toy_head("another")})


def test_info(encoder):
    answer = ask(create_api(encoder, limits=Limits(at_once=3)), lambda http: http.get("/v1/info")).json()
    assert answer["manifest"] == json.loads(encoder.manifest.model_dump_json())
    assert answer["limits"]["at_once"] == 3
    assert answer["classes"] == []


@pytest.mark.parametrize(
    ("status", "match", "request_"),
    [
        (404, "Not Found", {"method": "GET", "url": "/v1/nothing"}),
        (405, "Not Allowed", {"method": "GET", "url": "/v1/embed"}),
        (413, "at most 5,000 bytes", {"content": b"x" * 5001, "headers": PNG}),
        (415, "missing, wanted image/", {"content": b"x"}),
        (415, "application/x-www-form-urlencoded, wanted", {"data": {"images": "x"}}),
        (400, "no file named images", {"files": [("image", ("a.png", b"x"))]}),
        (400, "no file named images", {"files": [("images", (None, b"text"))]}),
        (400, "Too many files", {"files": form(*[b"x"] * 5)}),
        (400, "boundary", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}),
        (400, "", {"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=x"}}),
    ],
)
def test_requests_that_are_wrong(encoder, status, match, request_):
    api = create_api(encoder, limits=Limits(max_bytes=5000, max_pictures=4))
    answer = ask(api, lambda http: http.request(**{"method": "POST", "url": "/v1/embed", **request_}))
    assert match in problem(answer, status)


def test_a_body_in_chunks_is_limited_too(encoder):
    async def endless():
        for _ in range(1000):
            yield b"x" * 1000

    api = create_api(encoder, limits=Limits(max_bytes=5000))
    answer = ask(api, lambda http: http.post("/v1/embed", content=endless(), headers=PNG))
    assert "at most 5,000 bytes" in problem(answer, 413)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EncoderUnavailable("no answer"), 503),
        (EncoderMismatch("another encoder"), 409),
        (GalleryError("no such gallery"), 503),
        (Reembedded("another encoder now"), 409),
        (ContractError("refused"), 500),
        (SimclrError("something"), 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_encoder(encoder, error, status):
    answer, page = ask(
        create_api(Failing(encoder, error)),
        lambda http: http.post("/v1/embed", content=good(), headers=PNG),
        lambda http: http.get("/metrics"),
    )
    assert problem(answer, status) == str(error)
    assert ("retry-after" in answer.headers) == (status == 503)
    assert f'simclr_requests_total{{route="/v1/embed",status="{status}"}} 1.0' in page.text


def test_a_fault_of_ours_is_not_told_to_strangers(encoder):
    answer, page = ask(
        create_api(Failing(encoder, RuntimeError("secret"))),
        lambda http: http.post("/v1/embed", files=form(good(), good())),
        lambda http: http.get("/metrics"),
    )
    assert problem(answer, 500) == "the server failed; its log says why"
    assert 'route="/v1/embed",status="500"} 1.0' in page.text


def test_an_encoder_that_loses_vectors(encoder):
    class Loses(Failing):
        def embed(self, images):
            return encoder.embed(images)[1:]

    answers = ask(create_api(Loses(encoder, None)), *[lambda http: http.post("/v1/embed", files=form(good()))] * 3)
    assert {problem(answer, 500) for answer in answers} == {"the server failed; its log says why"}


class Failing:
    def __init__(self, encoder, error):
        self.manifest, self.encoder_id, self.error = encoder.manifest, encoder.encoder_id, error

    def embed(self, images):
        raise self.error


def test_metrics(encoder):
    *_, page = ask(
        create_api(encoder),
        lambda http: http.post("/v1/embed", files=form(good(0), b"junk", good(1))),
        lambda http: http.post("/v1/embed", content=b"x", headers={**PNG, "content-length": "999999999"}),
        lambda http: http.get("/v1/some/strange/path"),
        lambda http: http.get("/metrics"),
    )
    found = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    wanted = {
        'simclr_requests_total{route="/v1/embed",status="200"}': 1,
        'simclr_requests_total{route="none",status="413"}': 1,
        'simclr_requests_total{route="none",status="404"}': 1,
        'simclr_rejections_total{reason="too large"}': 1,
        'simclr_pictures_total{outcome="embedded"}': 2,
        'simclr_pictures_total{outcome="unreadable"}': 1,
        'simclr_stage_seconds_count{stage="line"}': 2,
        'simclr_stage_seconds_count{stage="decode"}': 3,
        'simclr_stage_seconds_count{stage="queue"}': 2,
        "simclr_batch_pictures_sum": 2,
        "simclr_requests_held": 0,
        "simclr_requests_in_flight": 0,
    }
    assert {name: float(found[name]) for name in wanted} == wanted
    assert 1 <= float(found['simclr_stage_seconds_count{stage="infer"}']) <= 2
    assert float(found["process_resident_memory_bytes"]) > 1e7
    assert "strange" not in page.text


def test_openapi(encoder):
    api = create_api(encoder, heads={"toy": toy_head(encoder.encoder_id)})
    document = ask(api, lambda http: http.get("/openapi.json")).json()
    OpenAPI.model_validate(document)
    assert {"/v1/embed", "/v1/classify", "/v1/info", "/health/live", "/health/ready", "/metrics"} == set(document["paths"])
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    post = document["paths"]["/v1/embed"]["post"]
    assert {"image/jpeg", "multipart/form-data"} <= set(post["requestBody"]["content"])
    assert {"200", "413", "422", "429", "503"} <= set(post["responses"])
    for name, model in {"EmbedAnswer": EmbedAnswer, "ClassifyAnswer": ClassifyAnswer}.items():
        (example,) = document["components"]["schemas"][name]["examples"]
        assert model.model_validate(example).model_dump() == example
    detail = post["responses"]["429"]["content"]["application/problem+json"]["schema"]["properties"]["detail"]
    assert detail["type"] == "string"


def test_the_event_loop_is_never_blocked(gated):
    async def run():
        async with client(create_api(gated)) as http:
            work = [asyncio.create_task(http.post("/v1/embed", files=form(good(n), good(n + 1)))) for n in range(3)]
            await until(lambda: gated.batches)
            assert (await http.get("/health/live")).json() == {"status": "live"}
            assert "simclr_requests_in_flight 3.0" in (await http.get("/metrics")).text
            gated.let(6)
            assert [(await answer).status_code for answer in work] == [200] * 3

    asyncio.run(run())


def test_what_waits_goes_to_the_encoder_together(gated):
    async def run():
        async with client(create_api(gated)) as http:

            async def waiting(number):
                return await metric(http, "simclr_pictures_queued") == number

            work = []
            for number in range(12):
                work.append(asyncio.create_task(http.post("/v1/embed", content=good(number), headers=PNG)))
                if number < 2:  # both senders have one, alone: they never wait for more
                    await until(lambda number=number: len(gated.batches) == number + 1)
            await until(lambda: waiting(10))
            gated.let(12)
            return np.concatenate([vectors(await answer) for answer in work])

    found = asyncio.run(run())
    assert gated.batches == [1, 1, 10]
    np.testing.assert_allclose(found, gated.ungated.embed([good(number) for number in range(12)]), atol=1e-6)


def test_ready_means_that_a_picture_came_through(gated, monkeypatch):
    monkeypatch.setattr(canary, "FRESH_S", 0.1)
    monkeypatch.setattr(canary, "PATIENCE_S", 0.1)

    async def run():
        async with client(create_api(gated)) as http:
            first = await asyncio.gather(*(http.get("/health/ready") for _ in range(5)))
            assert {problem(answer, 503) for answer in first} == {"the encoder gave no answer within 0.1 s"}
            assert gated.batches == [1], "one canary, however many ask"
            assert (await http.get("/health/live")).status_code == 200
            gated.let(1)
            await until(lambda: gated.done == 1)
            assert (await http.get("/health/ready")).json() == {"status": "ready"}
            gated.let(1)
            await http.post("/v1/embed", content=good(), headers=PNG)
            assert (await http.get("/health/ready")).status_code == 200, "other people's pictures count"
            await asyncio.sleep(0.15)
            assert (await http.get("/health/ready")).status_code == 503

    asyncio.run(run())


def test_an_encoder_that_fails_is_not_ready(encoder):
    failing = Failing(encoder, EncoderUnavailable("grpc://host: no Triton server answers"))
    assert "no Triton server" in problem(ask(create_api(failing), lambda http: http.get("/health/ready")), 503)


def test_health_passes_a_full_gateway(gated):
    async def run():
        async with client(create_api(gated, limits=Limits(at_once=1, waiting=0))) as http:
            work = asyncio.create_task(http.post("/v1/embed", content=good(), headers=PNG))
            await until(lambda: gated.batches)
            refusal = await http.post("/v1/embed", content=good(), headers=PNG)
            assert "come back" in problem(refusal, 429)
            ready = asyncio.create_task(http.get("/health/ready"))
            await until(lambda: len(gated.batches) == 2)
            gated.let(2)
            assert [(await answer).status_code for answer in (work, ready)] == [200, 200]

    asyncio.run(run())


def test_a_stuck_encoder_costs_a_bounded_room(gated):
    """Requests are given up one after the other; their pictures are not kept for ever, and not embedded when it goes on."""

    async def run():
        limits = Limits(at_once=1, waiting=0, answer_s=0.05, max_pictures=3)
        async with client(create_api(gated, limits=limits)) as http:
            statuses = [problem(await http.post("/v1/embed", files=form(*[good()] * 3)), 503) for _ in range(8)]
            assert "no answer within 0.05 s" in statuses[0]
            assert "the encoder is stuck" in statuses[-1]
            gated.let(100)
            await until(lambda: gated.done >= sum(gated.batches))
            answer = await http.post("/v1/embed", content=good(), headers=PNG)
            assert len(vectors(answer)[0]) == DIM
            assert gated.done < 24

    asyncio.run(run())


AT_ONCE, WAITING = 4, 8


def test_overload_at_three_times_what_the_encoder_does(gated):
    """The unit of time is a picture of the encoder's: three requests come in for each. All that it does is for those who are
    accepted, none of whom waits for more than the places before it; the refused are answered in no time at all; and when the
    load ends, the next one is served as if nothing had been."""

    async def run():
        async with client(create_api(gated, limits=Limits(at_once=AT_ONCE, waiting=WAITING, batches=1))) as http:
            accepted, refusals, under_way = [], [], set()

            async def offer(number):
                came = gated.done
                answer = await http.post("/v1/embed", content=good(number), headers=PNG)
                if answer.status_code == 200:
                    accepted.append(gated.done - came)
                else:
                    problem(answer, 429)
                    refusals.append(gated.done - came)

            async def all_settled(count):
                names = ("simclr_requests_held", "simclr_requests_in_flight", "simclr_pictures_queued")
                held, inside, queued = [await metric(http, name) for name in names]
                decoded = sum(gated.batches) - len(accepted) + queued
                return len(accepted) + len(refusals) + held == count and min(held, AT_ONCE) == inside == decoded

            def all_delivered():
                return len(accepted) == max(sent for sent in np.cumsum([0, *gated.batches]) if sent <= gated.done)

            for tick in range(1, 61):
                for number in range(3):
                    under_way.add(asyncio.create_task(offer(number)))
                await until(lambda tick=tick: all_settled(3 * tick))
                gated.let(1)
                await until(lambda tick=tick: gated.done == tick and all_delivered())
            gated.let(AT_ONCE + WAITING)
            await asyncio.gather(*under_way)
            came = gated.done
            gated.let(1)
            await offer(0)
            return accepted, refusals, gated.done - came

    accepted, refusals, after = asyncio.run(run())
    assert len(accepted) + len(refusals) == 181
    assert len(accepted) > 60, "the encoder never idles"
    beside = AT_ONCE - 1  # of those inside with it, some may be decoded sooner, and others come into its batch
    assert max(accepted) <= AT_ONCE + WAITING + 2 * beside
    assert max(refusals) == 0
    assert after == 1
