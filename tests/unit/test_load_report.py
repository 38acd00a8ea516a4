"""Figures of a load test from requests written by hand, against slow versions of them; the table, the JSON, the plot."""

import json
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from serve.loadtest.bench import report_json
from serve.loadtest.config import LoadConfig
from serve.loadtest.loops import Samples
from serve.loadtest.plot import quantile_curve, save_plot
from serve.loadtest.report import PERCENTILES, make_report, percentiles_ms, report_lines
from serve.loadtest.targets import Kind
from serve.loadtest.triton_metrics import ModelFigures, between, parse_counters

URL = "grpc://127.0.0.1:8001/toy"


def samples(rows, *, seconds=2.0, **options):
    """Rows are (intended_s, sent_s, done_s, kind)."""
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    reasons = {Kind(int(kind)): "too busy" for kind in columns[3] if kind}
    names = ("intended_s", "sent_s", "done_s")
    return Samples(
        **dict(zip(names, columns, strict=False)), kind=columns[3].astype(np.uint8), reasons=reasons, seconds=seconds, **options
    )


def report_of(found, *, busy=0.1, triton=None, **options):
    config = LoadConfig(**{"url": URL, "seconds": found.seconds, **options})
    return make_report(config, found, encoder_id="abc", busy=busy, metrics_url="http://127.0.0.1:8002/metrics", triton=triton)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 100, 999, 1000, 1001, 12_345])
def test_percentiles_are_those_of_a_slow_version(count):
    seconds = np.random.default_rng(count).exponential(0.01, count)
    found = percentiles_ms(seconds)
    ordered = sorted(seconds)
    for name in PERCENTILES:
        share = 1 if name == "max" else Fraction(name.removeprefix("p")) / 100
        wanted = next(value for rank, value in enumerate(ordered, start=1) if rank >= share * count)
        assert found[name] == 1e3 * wanted, name
    assert found["max"] == 1e3 * max(seconds)
    assert percentiles_ms(seconds[:0]) is None


def test_the_curve_runs_from_the_least_to_the_greatest():
    seconds = np.random.default_rng(0).exponential(0.01, 5000)
    x, y_ms = quantile_curve(seconds)
    assert (x[0], x[-1]) == pytest.approx((1, 5000))
    assert y_ms[-1] == 1e3 * seconds.max()
    assert (np.diff(y_ms) >= 0).all()
    for at, value in zip(x, y_ms, strict=True):
        assert sum(1e3 * second >= value for second in seconds) == round(5000 / at)


def test_warm_up_counts_neither_as_request_nor_as_latency():
    found = samples([(-0.5, -0.5, -0.4, 0), (-0.1, -0.1, 0.3, 0), (0.5, 0.5, 0.6, 0), (1.0, 1.0, 1.2, 0)])
    report = report_of(found)
    assert (report.requests, report.answered) == (2, 2)
    assert report.latency_ms["max"] == pytest.approx(200)
    assert report.images_per_s == pytest.approx(3 / 2), "the second was answered during the measurement: that is throughput"
    assert report.requests_per_s == pytest.approx(2 / 2)


def test_a_queue_that_drains_afterwards_is_no_goodput():
    found = samples([(0.1 * i, 0.1 * i, 0.2 + 0.4 * i, 0) for i in range(10)])  # answers come at a quarter of the rate
    report = report_of(found, batch=4, rate=10)
    assert report.answered == 10
    assert report.images_per_s == pytest.approx(4 * 5 / 2)
    assert report.requests_per_s == 10 / 2
    assert report.per_interval == {"answered": [2, 3]}
    assert report.latency_ms["max"] == pytest.approx(1e3 * (0.2 + 0.4 * 9 - 0.9))


def test_what_was_sent_after_the_end_is_no_rate():
    late = [(1.9, 2.1, 2.2, 0), (1.95, 2.1, 2.2, 0)]
    report = report_of(samples([(-0.5, -0.5, -0.4, 0), (0.5, 0.5, 0.6, 0), *late]), rate=10)
    assert (report.requests, report.requests_per_s, report.images_per_s) == (3, 1 / 2, 1 / 2)


def test_rejections_have_a_latency_of_their_own():
    rows = [(0.1 * i, 0.1 * i, 0.1 * i + (0.001 if i % 2 else 0.05), Kind.SHED if i % 2 else Kind.ANSWERED) for i in range(20)]
    report = report_of(samples([*rows, (1.0, 1.0, 1.5, Kind.TIMEOUT)]))
    assert report.errors == {"shed": 10, "timeout": 1, "no_connection": 0, "bad_request": 0, "other": 0}
    assert report.shed_ms["max"] == pytest.approx(1)
    assert report.latency_ms["p50"] == pytest.approx(50)
    assert report.per_interval["timeout"] == [0, 1]
    assert "other" not in report.per_interval
    text = "\n".join(report_lines(report))
    assert "shed                  10 requests, the first: too busy" in text
    assert "turned away         1.00" in text


@pytest.mark.parametrize(
    ("late_s", "options", "slow"),
    [
        (0.0005, {"rate": 10}, False),
        (0.02, {"rate": 10}, True),
        (0.02, {}, False),  # a closed loop sends when it can
        (0, {"busy": 0.95}, True),
        (0, {"busy": 0.95, "rate": 10}, True),
    ],
)
def test_it_says_when_the_generator_was_the_bottleneck(late_s, options, slow):
    report = report_of(samples([(0.1 * i, 0.1 * i + late_s, 0.1 * i + late_s + 0.03, 0) for i in range(20)]), **options)
    assert report.bottleneck is slow
    assert ("generator was too slow" in "\n".join(report_lines(report))) is slow
    assert (report.late_ms is None) is ("rate" not in options)


def test_lateness_far_below_the_latency_is_none_of_its_fault():
    rows = [(0.1 * i, 0.1 * i + 0.005, 0.1 * i + 0.5, 0) for i in range(20)]
    assert not report_of(samples(rows), rate=10).bottleneck
    assert report_of(samples(rows, unsent=3), rate=10).bottleneck


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([], {}),
        ([], {"rate": 5}),
        ([(0.1, 0.1, 0.2, Kind.TIMEOUT)], {"clients": 3}),
        ([(0.1, 0.1, 0.2, Kind.ANSWERED)], {"rate": 5}),
    ],
)
def test_a_report_of_little_is_valid_json_a_table_and_a_plot(tmp_path, rows, options):
    found = samples(rows, seconds=0.4)
    report = report_of(found, **options, out=tmp_path)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    loaded = json.loads(report_json(report), parse_constant=refuse)
    assert loaded["asked"]["url"] == URL
    assert loaded["asked"]["out"] == str(tmp_path)
    assert loaded["requests"] == len(rows)
    assert loaded["latency_ms"] is None or set(loaded["latency_ms"]) == set(PERCENTILES)
    assert any("no metrics at http://127.0.0.1:8002/metrics" in line for line in report_lines(report))
    save_plot(report, found, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size[0] > 600


def test_the_table_names_what_was_asked():
    one = next(iter(report_lines(report_of(samples([]), clients=1, send="bytes"))))
    assert one == f"{URL}: closed loop, 1 client, bytes, batch 1, 2 s after 2 s of warm-up"
    many = next(iter(report_lines(report_of(samples([], stopped=True), rate=250, batch=8, warmup_s=0.5))))
    assert many == f"{URL}: open loop, 250 requests/s, pixels, batch 8, 2 s after 0.5 s of warm-up (stopped early)"


def metrics(**models):
    """A page as Triton writes it: two versions of each model, its counters halved between them; gauges; other things."""
    names = ("request_success", "count", "exec_count", "request_duration_us", "queue_duration_us")
    names += ("compute_input_duration_us", "compute_infer_duration_us", "compute_output_duration_us")
    lines = []
    for position, name in enumerate(names):
        lines += [f"# HELP nv_inference_{name} as Triton says", f"# TYPE nv_inference_{name} counter"]
        for model, values in models.items():
            lines += [f'nv_inference_{name}{{model="{model}",version="{version}"}} {values[position] / 2}' for version in "12"]
    lines += ["# TYPE nv_inference_pending_request_count gauge", 'nv_inference_pending_request_count{model="a",version="1"} 7']
    lines += ["# TYPE nv_cpu_utilization gauge", "nv_cpu_utilization 0.5", ""]
    return "\n".join(lines)


def test_the_mean_batch_is_read_from_tritons_metrics():
    before = parse_counters(metrics(a=(100, 800, 50, 9e6, 1e6, 1e5, 2e6, 1e5), b=(5, 5, 5, 1, 1, 1, 1, 1), c=(9,) * 8))
    after = parse_counters(metrics(a=(300, 2400, 150, 9e8, 3e6, 3e5, 8e6, 5e5), b=(5, 5, 5, 1, 1, 1, 1, 1), c=(1,) * 8))
    found = between(before, after)
    assert set(found) == {"a"}, "b did not run, and c was loaded anew"
    assert found["a"].requests == 200
    assert found["a"].mean_batch == 1600 / 100
    assert found["a"].queue_ms == pytest.approx(2e6 / 200 / 1e3)
    assert found["a"].compute_ms == pytest.approx((2e5 + 6e6 + 4e5) / 200 / 1e3)
    text = "\n".join(report_lines(report_of(samples([]), triton=found)))
    assert "a             200       16.00     10.00       33.00" in text


def test_other_pages_are_no_metrics():
    assert parse_counters("# TYPE process_cpu_seconds counter\nprocess_cpu_seconds_total 4\n") == {}
    with pytest.raises(ValueError, match="html"):
        parse_counters("<html>404</html>")


def test_model_figures_go_into_the_json():
    figures = ModelFigures(requests=3, mean_batch=1.5, queue_ms=0.1, compute_ms=2.0)
    loaded = json.loads(report_json(report_of(samples([]), triton={"toy_encoder": figures})))
    assert loaded["triton"] == {"toy_encoder": {"requests": 3, "mean_batch": 1.5, "queue_ms": 0.1, "compute_ms": 2.0}}
