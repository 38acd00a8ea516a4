"""Who is let in, and how often: keys and scopes on every route, the rate of each caller, pages of other sites."""

import asyncio
import itertools
import random

import httpx
import pytest

from serve.api import create_api
from serve.gallery import Gallery
from serve.gateway.guard import needed_scope
from serve.gateway.keys import SCOPES, Keyring, add_key
from serve.gateway.limits import Limits
from serve.gateway.rates import Rates
from serve.ports import is_loopback
from serve.samples import Sample
from tests.asgi_client import PNG, ask, problem
from tests.bad_images import good
from tests.toy_encoder import toy_head

CALLS = {
    "read": [
        ("POST", "/v1/embed", {"content": good(), "headers": PNG}),
        ("POST", "/v1/classify", {"content": good(), "headers": PNG}),
        ("POST", "/v1/search", {"json": {"id": 1}}),
        ("POST", "/v1/search/image", {"content": good(), "headers": PNG}),
        ("POST", "/v1/reid/identify", {"json": {"id": 1}}),
        ("POST", "/v1/reid/identify/image", {"content": good(), "headers": PNG}),
        ("GET", "/v1/info", {}),
        ("GET", "/v1/items", {}),
        ("GET", "/v1/items/1", {}),
        ("GET", "/v1/items/1/vector", {}),
    ],
    "write": [
        ("PATCH", "/v1/items/1", {"json": {"label": "x"}}),
        ("PUT", "/v1/items/1/image", {"content": good(), "headers": PNG}),
        ("POST", "/v1/items", {"content": good(8), "headers": PNG}),
        ("DELETE", "/v1/items/1", {}),
    ],
    "admin": [("GET", "/metrics", {})],
}
NAMES = [(scope, call) for scope, calls in CALLS.items() for call in calls]


@pytest.fixture
def guarded(tmp_path, encoder):
    """An API with a key of each scope."""
    keys = {scope: add_key(tmp_path / "keys", scope, scope) for scope in SCOPES}
    with Gallery.open(tmp_path / "gallery", encoder, create=True) as gallery:
        gallery.add([Sample("0.png")], encoder.embed([good()]))
        heads = {"toy": toy_head(encoder.encoder_id)}
        yield create_api(encoder, heads=heads, gallery=gallery, keys=Keyring(tmp_path / "keys")), keys


def send(call, key=None):
    method, path, options = call
    bearer = {} if key is None else {"authorization": f"Bearer {key}"}
    return lambda http: http.request(method, path, **{**options, "headers": {**options.get("headers", {}), **bearer}})


@pytest.mark.parametrize(("needed", "call"), NAMES, ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]))
def test_every_route_wants_its_scope(guarded, needed, call):
    api, keys = guarded
    nobody, stranger = ask(api, send(call), send(call, "simclr_wrong"))
    assert "no key was given" in problem(nobody, 401)
    assert nobody.headers["www-authenticate"] == 'Bearer realm="simclr"'
    assert "not known here" in problem(stranger, 401)
    assert stranger.headers["www-authenticate"] == 'Bearer realm="simclr", error="invalid_token"'
    for scope in SCOPES:
        answer = ask(api, send(call, keys[scope]))
        if SCOPES.index(scope) < SCOPES.index(needed):
            assert problem(answer, 403) == f"key {scope} has scope {scope}, wanted {needed}"
            assert f'scope="{needed}"' in answer.headers["www-authenticate"]
        else:
            assert answer.is_success or answer.status_code in (404, 409), answer.text  # the second DELETE, the second POST


def test_what_needs_no_key(guarded):
    api, _ = guarded
    calls = [("GET", path, {}) for path in ("/health/live", "/health/ready", "/openapi.json")]
    assert [answer.status_code for answer in ask(api, *map(send, calls))] == [200] * 3


@pytest.mark.parametrize("path", ["/v1/embed/", "/v2/x", "/", "/v1", "//v1/embed", "/V1/items", "/docs"])
def test_paths_that_nobody_thought_of_need_a_key(guarded, path):
    api, _ = guarded
    assert ask(api, lambda http: http.post(f"http://gateway{path}")).status_code == 401
    assert needed_scope("GET", path) == "read"
    assert needed_scope("POST", path) == "write"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic {key}", "{key}", "bearer{key}", "Bearer {key} {key}"])
def test_headers_that_bring_no_key(guarded, header):
    api, keys = guarded
    headers = {"authorization": header.format(key=keys["admin"])}
    problem(ask(api, lambda http: http.get("/v1/info", headers=headers)), 401)


def test_a_key_that_is_no_text(guarded):
    api, _ = guarded
    problem(ask(api, lambda http: http.get("/v1/info", headers={"authorization": b"Bearer \xff\xfe"})), 401)


def test_the_word_bearer_is_written_as_you_like(guarded):
    api, keys = guarded
    for word in ("bearer", "BEARER"):
        answer = ask(api, lambda http, word=word: http.get("/v1/info", headers={"authorization": f"{word}  {keys['read']}"}))
        assert answer.status_code == 200


def test_a_key_file_that_cannot_be_read_lets_nobody_in_and_is_not_named(guarded, tmp_path):
    api, keys = guarded
    (tmp_path / "keys").write_text("nonsense")
    answer, health = ask(api, send(("GET", "/v1/info", {}), keys["admin"]), lambda http: http.get("/health/live"))
    assert str(tmp_path) not in problem(answer, 503)
    assert health.status_code == 200


def test_a_refusal_reads_no_body(guarded):
    api, _ = guarded
    read = 0

    async def endless():
        nonlocal read
        for _ in range(5):
            read += 1
            yield b"x" * 100

    answer, page = ask(
        api,
        lambda http: http.post("/v1/embed", content=endless(), headers=PNG),
        send(("GET", "/metrics", {}), guarded[1]["admin"]),
    )
    problem(answer, 401)
    assert answer.headers["connection"] == "close"
    assert 'simclr_rejections_total{reason="key"} 1.0' in page.text
    assert 'simclr_stage_seconds_count{stage="line"} 0.0' in page.text


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://gateway:81", "http://gateway.evil.example", "http://[", ""]
)
def test_pages_of_other_sites_are_kept_out_where_there_are_no_keys(encoder, origin):
    """A form with a picture needs no leave of the browser's to be sent anywhere."""
    api = create_api(encoder)
    answer, ours, none = ask(
        api,
        lambda http: http.post("/v1/embed", content=good(), headers={**PNG, "origin": origin}),
        lambda http: http.post("/v1/embed", content=good(), headers={**PNG, "origin": "http://gateway"}),
        lambda http: http.post("/v1/embed", content=good(), headers=PNG),
    )
    assert "comes from a page of" in problem(answer, 403)
    assert (ours.status_code, none.status_code) == (200, 200)


def asked_by(host):
    """A page that the browser takes for one of this site, at an address of this machine."""
    headers = {"host": host, "origin": f"http://{host}"}
    return lambda http: http.get("http://127.0.0.1/v1/info", headers=headers)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7861", "localhost.evil.example", "127.0.0.1.evil.example", "evil:[::1]", "1:x", ""],
)
def test_names_that_lead_here_are_not_ours_where_there_are_no_keys(encoder, host):
    """Of DNS rebinding: the browser sees one site, and lets its page read the answers."""
    assert "localhost or an address" in problem(ask(create_api(encoder), asked_by(host)), 403)


@pytest.mark.parametrize("host", ["localhost", "LocalHost:7861", "127.0.0.1", "10.0.0.5:80", "[::1]", "[FE80::1]:7861"])
def test_addresses_and_localhost_are_ours(encoder, host):
    assert ask(create_api(encoder), asked_by(host)).status_code == 200


def test_names_are_let_in_with_a_key_or_from_afar(guarded, encoder):
    api, keys = guarded
    headers = {"host": "our.example", "authorization": f"Bearer {keys['read']}"}
    keyed = ask(api, lambda http: http.get("http://127.0.0.1/v1/info", headers=headers))
    afar = ask(create_api(encoder), lambda http: http.get("http://10.0.0.5/v1/info", headers={"host": "our.example"}))
    health = ask(create_api(encoder), lambda http: http.get("http://127.0.0.1/health/live", headers={"host": "our.example"}))
    assert [answer.status_code for answer in (keyed, afar, health)] == [200] * 3


def test_with_a_key_it_does_not_matter_where_the_page_is_from(guarded):
    api, keys = guarded
    headers = {"authorization": f"Bearer {keys['read']}", "origin": "http://their.app"}
    assert ask(api, lambda http: http.get("/v1/info", headers=headers)).status_code == 200


def test_each_key_has_its_rate(tmp_path, encoder):
    keys = {name: add_key(tmp_path / "keys", name, "read") for name in ("quick", "slow")}
    api = create_api(encoder, keys=Keyring(tmp_path / "keys"), limits=Limits(rate_per_s=0.01, burst=3))
    info = ("GET", "/v1/info", {})
    *taken, late, other, unknown, health = ask(
        api,
        *[send(info, keys["quick"])] * 3,
        send(info, keys["quick"]),
        send(info, keys["slow"]),
        send(info, "wrong"),
        lambda http: http.get("/health/live"),
    )
    assert [answer.status_code for answer in taken] == [200] * 3
    assert "more than 0.01 requests/s came from this key quick" in problem(late, 429)
    assert 95 <= int(late.headers["retry-after"]) <= 100
    assert (other.status_code, unknown.status_code, health.status_code) == (200, 401, 200)


def test_without_keys_each_address_has_its_rate(encoder):
    api = create_api(encoder, limits=Limits(rate_per_s=0.01, burst=1))

    async def run():
        statuses = []
        for address in ("10.0.0.1", "10.0.0.1", "10.0.0.2"):
            transport = httpx.ASGITransport(api, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
                statuses.append((await http.get("/v1/info")).status_code)
        return statuses

    assert asyncio.run(run()) == [200, 429, 200]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_what_only_this_machine_reaches(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example", "localhost.example", ""])  # noqa: S104
def test_what_others_reach(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("seed", range(5))
def test_the_bucket_against_one_that_counts_its_tokens(seed):
    chance = random.Random(seed)  # noqa: S311
    per_s, burst, clock = chance.choice([0.5, 3, 40]), chance.choice([1, 2, 20]), [0.0]
    rates = Rates(per_s, burst, lambda: clock[0])
    tokens, refused = float(burst), 0
    for _ in range(500):
        step = chance.expovariate(per_s * 1.5)
        clock[0] += step
        tokens = min(burst, tokens + step * per_s)
        wait_s = rates.wait_s("me")
        if tokens >= 1 - 1e-6:
            assert wait_s == 0
            tokens -= 1
        else:
            assert wait_s == pytest.approx((1 - tokens) / per_s)
            refused += 1
    assert 50 < refused < 450


def test_callers_whose_bucket_is_full_are_forgotten(monkeypatch):
    monkeypatch.setattr("serve.gateway.rates._REMEMBERED", 10)
    clock = itertools.count()
    rates = Rates(1.0, 2, lambda: float(next(clock)))
    assert not any(rates.wait_s(f"caller {number}") for number in range(1000))
    assert len(rates._full_at_s) <= 11
