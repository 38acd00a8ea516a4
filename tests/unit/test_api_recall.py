"""The recall canary beside an index that misses on purpose, and beside a slow count."""

import asyncio
import logging
import math
import time

import numpy as np
import pytest

from serve.api import create_api
from serve.errors import GalleryError
from serve.gallery import Gallery
from serve.gateway import recall
from serve.gateway.metrics import Metrics
from serve.gateway.recall import RecallCanary
from serve.samples import Sample
from tests.asgi_client import client


class Lossy(Gallery):
    """Its index loses the hits at these places, unless it is asked for everything."""

    lost = ()

    def search_many(self, queries_QD, k=10, where=None):
        scores, ids = super().search_many(queries_QD, len(self), where)
        if k == len(self):
            return scores, ids
        kept = np.delete(np.arange(len(self)), self.lost)[:k]
        return scores[:, kept], ids[:, kept]


def filled(tmp_path, encoder, count, kind=Gallery):
    gallery = kind.open(tmp_path / "gallery", encoder, create=True)
    vectors = np.random.default_rng(0).standard_normal((count, encoder.manifest.embedding_dim))
    if count:
        gallery.add([Sample(str(number)) for number in range(count)], vectors.astype(np.float32))
    return gallery


def flown(gallery, times=3):
    canary = RecallCanary(gallery, metrics := Metrics())
    for _ in range(times):
        canary.fly()
    return metrics.registry.get_sample_value("simclr_recall_at_10")


@pytest.mark.parametrize("lost", [(), (0,), (1, 3, 5), tuple(range(10)), (10, 11), (9, 12)])
def test_what_is_lost_is_counted(tmp_path, toy_encoder, lost):
    with filled(tmp_path, toy_encoder, 60, Lossy) as gallery:
        gallery.lost = lost
        wanted = len(set(range(10)) - set(lost)) / 10  # the ten nearest of each query stand at the places 0 to 9
        assert flown(gallery) == pytest.approx(wanted)


@pytest.mark.parametrize("count", [1, 5, 10, 11])
def test_small_galleries_lose_nothing(tmp_path, toy_encoder, count):
    with filled(tmp_path, toy_encoder, count) as gallery:
        assert flown(gallery) == 1


def test_equal_pictures_stand_in_for_each_other(tmp_path, toy_encoder):
    with filled(tmp_path, toy_encoder, 0, Lossy) as gallery:
        gallery.add(
            [Sample(str(number)) for number in range(30)], np.ones((30, toy_encoder.manifest.embedding_dim), np.float32)
        )
        gallery.lost = (0, 1, 2)
        assert flown(gallery) == 1


def test_an_empty_gallery_says_nothing(tmp_path, toy_encoder):
    with filled(tmp_path, toy_encoder, 0) as gallery:
        assert math.isnan(flown(gallery))


def test_it_flies_while_the_api_lives_and_outlives_faults(tmp_path, toy_encoder, monkeypatch, caplog):
    monkeypatch.setattr(recall, "_PAUSE_S", 0.01)
    monkeypatch.setattr(recall, "_SHARE", 10)
    with filled(tmp_path, toy_encoder, 30) as gallery, caplog.at_level(logging.WARNING):
        search_many, flights = gallery.search_many, []

        def fails_at_first(queries, k):
            flights.append(k)
            if len(flights) == 1:
                raise GalleryError("the disk is away")
            return search_many(queries, k)

        gallery.search_many = fails_at_first
        api = create_api(toy_encoder, gallery=gallery)

        async def run():
            async with api.router.lifespan_context(api), client(api) as http:
                deadline = time.monotonic() + 20
                while "simclr_recall_at_10 1.0" not in (await http.get("/metrics")).text:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)

        asyncio.run(run())
        landed = len(flights)
        time.sleep(0.05)
        assert len(flights) == landed, "nothing goes on when the API has ended"
    assert "recall was not measured: the disk is away" in caplog.text


def test_the_pause_grows_with_the_cost(tmp_path, toy_encoder, monkeypatch):
    """A flight of 0.2 s at a share of 1 % is followed by 20 s of rest."""
    monkeypatch.setattr(recall, "_PAUSE_S", 0.0)
    with filled(tmp_path, toy_encoder, 30) as gallery:
        search_many, flights = gallery.search_many, []

        def slow(queries, k):
            flights.append(k)
            time.sleep(0.025)
            return search_many(queries, k)

        gallery.search_many = slow
        with RecallCanary(gallery, Metrics()).flying():
            time.sleep(0.6)
        assert len(flights) == 8, "four queries, each asked twice"
