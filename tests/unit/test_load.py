"""The loops of the load generator against targets that stall, refuse and never answer: who waits, and what is counted."""

import asyncio
import sys
import time

import numpy as np
import pytest

from serve.loadtest.loops import BEHIND_S, PAUSE_S, Load, event_loop, poisson_arrivals
from serve.loadtest.targets import Kind, RequestFailed


def measure(target, *, seconds, warmup_s=0.0, clients=None, rate=None, stop_after_s=None):
    """One test, as the command runs it; `target` takes the request's number. Ctrl-C after so many seconds."""

    async def run():
        load = Load(target, seconds=seconds, warmup_s=warmup_s)
        arrivals_s = [] if rate is None else poisson_arrivals(rate, -warmup_s, seconds, seed=0).tolist()
        task = asyncio.create_task(load.closed(clients) if rate is None else load.open(arrivals_s))
        if stop_after_s is not None:
            await asyncio.sleep(stop_after_s)
            task.cancel()
        await task
        return load.samples()

    with asyncio.Runner(loop_factory=event_loop) as runner:
        return runner.run(run())


class OneAtATime:
    """A server that works on one request at a time, 1 ms each, and once, in the middle, stands still."""

    def __init__(self, stalls_at_s, stall_s):
        self.lock, self.began_s = asyncio.Lock(), None
        self.stalls_at_s, self.stall_s = stalls_at_s, stall_s

    async def __call__(self, number):
        async with self.lock:
            self.began_s = self.began_s or time.monotonic()
            if time.monotonic() - self.began_s > self.stalls_at_s:
                self.stalls_at_s = float("inf")
                await asyncio.sleep(self.stall_s)
            await asyncio.sleep(0.001)


def latency_s(samples):
    return samples.done_s - samples.intended_s


def test_a_stall_is_in_the_p99_of_an_open_loop_and_not_of_a_closed_one():
    closed = measure(OneAtATime(0.3, 0.5), seconds=1.5, clients=1)
    assert (latency_s(closed) > 0.25).sum() == 1, "the one client waited"
    assert np.quantile(latency_s(closed), 0.99) < 0.25
    opened = measure(OneAtATime(0.3, 0.5), seconds=1.5, rate=100)
    slow_to_send = opened.done_s - opened.sent_s > 0.5
    assert slow_to_send.sum() < 0.1 * len(slow_to_send), "few requests are as slow as the stall is long"
    assert np.quantile(latency_s(opened), 0.99) > 0.4
    assert (latency_s(opened) > 0.1).mean() > 0.15, "but everybody who came meanwhile waited"


def test_a_generator_that_is_held_up_counts_from_the_moment_that_was_meant():
    held_up = iter([True])

    async def target(number):
        if number == 20 and next(held_up, False):
            time.sleep(0.3)  # the event loop itself: no request is sent meanwhile

    samples = measure(target, seconds=1, rate=200)
    late_s = samples.sent_s - samples.intended_s
    assert late_s.max() > 0.2
    assert np.quantile(latency_s(samples), 0.9) > 0.05, "the delay is in the latency of those who had to wait"
    assert np.quantile(samples.done_s - samples.sent_s, 0.9) < 0.05


def test_an_open_loop_never_waits_for_answers():
    under_way = most = 0

    async def target(number):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.5)
        under_way -= 1

    samples = measure(target, seconds=0.6, warmup_s=0.2, rate=200)
    wanted = poisson_arrivals(200, -0.2, 0.6, seed=0)
    np.testing.assert_array_equal(np.sort(samples.intended_s), wanted)
    assert most > 60
    assert (samples.sent_s >= samples.intended_s).all()
    assert samples.unsent == 0
    assert not samples.stopped


@pytest.mark.parametrize("rate", [20, 400])
def test_arrivals_are_a_poisson_process_of_the_rate_that_was_asked(rate):
    arrivals_s = poisson_arrivals(rate, -50, 50, seed=3)
    assert abs(len(arrivals_s) - 100 * rate) < 4 * np.sqrt(100 * rate)
    assert arrivals_s.min() >= -50
    assert arrivals_s.max() < 50
    gaps_s = np.diff(arrivals_s)
    assert (gaps_s >= 0).all()
    assert np.mean(gaps_s) == pytest.approx(1 / rate, rel=0.1)
    assert np.std(gaps_s) == pytest.approx(1 / rate, rel=0.15)  # exponential: as wide as its mean
    assert np.mean(gaps_s > 1 / rate) == pytest.approx(np.exp(-1), abs=0.05)
    np.testing.assert_array_equal(arrivals_s, poisson_arrivals(rate, -50, 50, seed=3))
    assert not np.array_equal(arrivals_s[:10], poisson_arrivals(rate, -50, 50, seed=4)[:10])


def test_a_generator_that_cannot_keep_up_gives_up_and_says_how_much_was_left():
    async def target(number):
        time.sleep(0.01)

    began_s = time.monotonic()
    samples = measure(target, seconds=0.2, rate=1000)
    assert time.monotonic() - began_s < 0.2 + BEHIND_S + 0.5
    assert samples.unsent > 20
    assert samples.unsent + len(samples.intended_s) == len(poisson_arrivals(1000, 0, 0.2, seed=0))


def test_each_client_of_a_closed_loop_waits_for_its_answer():
    under_way, numbers = set(), []

    async def target(number):
        assert number % 3 not in {other % 3 for other in under_way}
        under_way.add(number)
        numbers.append(number)
        await asyncio.sleep(0.01)
        under_way.remove(number)

    samples = measure(target, seconds=0.3, clients=3)
    assert sorted(numbers) == list(range(len(numbers))), "all pictures in turn"
    assert 30 < len(numbers) <= 93
    np.testing.assert_array_equal(samples.intended_s, samples.sent_s)
    assert samples.sent_s.max() < 0.3
    assert (samples.kind == Kind.ANSWERED).all()


def test_failures_are_counted_by_kind_with_the_first_reason_of_each():
    async def target(number):
        await asyncio.sleep(0)
        if number % 4:
            raise RequestFailed(Kind(number % 4), f"reason\n{number}")

    samples = measure(target, seconds=0.2, rate=500)
    counts = np.bincount(samples.kind, minlength=len(Kind))
    wanted = np.bincount(np.arange(len(samples.kind)) % 4, minlength=len(Kind))
    np.testing.assert_array_equal(counts, wanted)
    assert samples.reasons == {Kind.SHED: "reason 1", Kind.TIMEOUT: "reason 2", Kind.NO_CONNECTION: "reason 3"}


def test_a_client_that_finds_nobody_does_not_spin():
    async def target(number):
        await asyncio.sleep(0)
        raise RequestFailed(Kind.NO_CONNECTION, "refused")

    samples = measure(target, seconds=0.5, clients=2)
    assert 2 < len(samples.kind) <= 2 * (0.5 / PAUSE_S + 1)


@pytest.mark.parametrize("way", [{"clients": 2}, {"rate": 100}])
def test_ctrl_c_ends_the_sending_and_waits_for_what_is_under_way(way):
    async def target(number):
        await asyncio.sleep(0.2)

    began_s = time.monotonic()
    samples = measure(target, seconds=60, stop_after_s=0.5, **way)
    assert time.monotonic() - began_s < 2
    assert samples.stopped
    assert 0.4 < samples.seconds < 1
    assert (samples.done_s > samples.seconds).any(), "they were answered after Ctrl-C"
    assert samples.unsent == 0


@pytest.mark.parametrize("way", [{"clients": 20}, {"rate": 100}])
def test_ctrl_c_after_the_sending_loses_nothing(way):
    async def target(number):
        await asyncio.sleep(0.6)

    samples = measure(target, seconds=0.3, stop_after_s=0.5, **way)
    assert len(samples.kind) >= 15
    assert (samples.kind == Kind.ANSWERED).all()
    assert (samples.seconds, samples.stopped) == (0.3, False)


@pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")
def test_the_event_loop_does_not_sleep_for_whole_milliseconds():
    async def least_lateness_s():
        late = []
        for _ in range(50):
            meant_s = time.perf_counter() + 0.0022
            await asyncio.sleep(0.0022)
            late.append(time.perf_counter() - meant_s)
        return min(late)

    with asyncio.Runner(loop_factory=event_loop) as runner:
        assert runner.run(least_lateness_s()) < 0.0007, "epoll alone sleeps for 3 ms"
