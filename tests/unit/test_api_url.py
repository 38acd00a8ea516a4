"""Pictures by URL: from a real host of this machine, and everything that tries to look elsewhere through our eyes."""

import asyncio
import gzip
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from starlette.exceptions import HTTPException

from serve.gateway import urls
from serve.gateway.limits import Limits
from serve.gateway.urls import Fetcher, is_public
from tests.bad_images import good

asked = []


class Host(BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append((self.path, dict(self.headers)))
        if self.path == "/picture.png":
            self.answer(200, good())
        elif self.path == "/moved":
            self.answer(302, b"", Location="/picture.png")
        elif self.path == "/away":
            self.answer(301, b"", Location="http://169.254.169.254/latest/meta-data")
        elif self.path == "/large":
            self.answer(200, b"x" * 5001)
        elif self.path == "/bomb":
            self.answer(200, gzip.compress(b"x" * 10_000_000), **{"Content-Encoding": "gzip"})
        elif self.path == "/endless":
            self.endless()
        elif self.path == "/slow":
            time.sleep(1)
        else:
            self.answer(404, b"")

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def endless(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 1000)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture(autouse=True)
def nothing_asked():
    asked.clear()


def fetch(url, *hosts, **limits):
    return asyncio.run(Fetcher(hosts, Limits(**{"max_bytes": 5000, "fetch_s": 10, **limits})).fetch(url))


def refusal(status, url, *hosts, **limits):
    with pytest.raises(HTTPException) as caught:
        fetch(url, *hosts, **limits)
    assert caught.value.status_code == status, caught.value.detail
    assert caught.value.detail.startswith("url: ")
    return caught.value.detail


def test_a_host_that_is_listed_by_its_address(port):
    assert fetch(f"http://127.0.0.1:{port}/picture.png", f"127.0.0.1:{port}") == good()
    ((_, headers),) = asked
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & set(headers)


@pytest.mark.parametrize(
    ("status", "match", "path"),
    [
        (502, "answered 404, wanted 200", "/nothing"),
        (502, "answered 302, wanted 200; redirects are not followed", "/moved"),
        (502, "answered 301", "/away"),
        (422, "more than 5,000 bytes", "/large"),
        (422, "more than 5,000 bytes", "/bomb"),
        (422, "more than 5,000 bytes", "/endless"),
    ],
)
def test_what_a_host_may_answer(port, status, match, path):
    assert match in refusal(status, f"http://127.0.0.1:{port}{path}", f"127.0.0.1:{port}")
    assert [path for path, _ in asked] == [path], "nobody else is asked"


def test_a_host_that_takes_too_long(port):
    detail = refusal(502, f"http://127.0.0.1:{port}/slow", f"127.0.0.1:{port}", fetch_s=0.3)
    assert detail == "url: 127.0.0.1 did not answer within 0.3 s"


def test_a_bomb_is_not_unpacked(port):
    assert fetch(f"http://127.0.0.1:{port}/bomb", f"127.0.0.1:{port}", max_bytes=20_000)[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/picture.png",
        "http://localhost:{port}/picture.png",
        "http://listed.example:{port}/picture.png",
        "http://listed.example.evil.example/picture.png",
        "http://evil.example/listed.example",
        "http://2130706433:{port}/picture.png",
        "http://0x7f000001:{port}/picture.png",
        "http://127.1:{port}/picture.png",
        "http://[::1]:{port}/picture.png",
        "http://[::ffff:127.0.0.1]:{port}/picture.png",
        "http://evil.example#listed.example",
    ],
)
def test_hosts_that_are_not_listed(port, url):
    assert "--url-hosts" in refusal(403, url.format(port=port), "listed.example", "127.0.0.1")
    assert not asked


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://listed.example/a.png",
        "//listed.example/a.png",
        "listed.example/a.png",
        "http://",
        "http://user@listed.example/",
        "http://user:secret@listed.example/",
        "http://listed.example:99999/",
        "http://[::1/",
        "http://evil.example\\@listed.example/",
        "",
    ],
)
def test_what_is_no_url_of_a_picture(url):
    assert "wanted https://host/path" in refusal(422, url, "listed.example")


@pytest.mark.parametrize("host", ["listed.example", "LISTED.example"])
def test_usual_ports_need_no_number(monkeypatch, host):
    monkeypatch.setattr(urls.Fetcher, "_get", lambda self, session, url: _said(url))
    assert fetch("https://Listed.Example/a.png", host) == "https://listed.example/a.png"
    assert fetch("http://listed.example:80/a.png", host) == "http://listed.example/a.png"
    assert fetch("http://listed.example:8080/a.png", f"{host}:8080") == "http://listed.example:8080/a.png"


async def _said(url):
    return str(url)


@pytest.fixture
def names(monkeypatch):
    """A name service that the test speaks for; returns what it says, and whom it was asked about."""
    says, asked_about = [], []

    async def getaddrinfo(self, host, port, **_):
        asked_about.append(host)
        addresses = says.pop(0) if len(says) > 1 else says[0]
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 6, "", (one, port)) for one in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return says, asked_about


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["10.1.2.3"], ["169.254.169.254"], ["93.184.216.34", "127.0.0.1"], ["::1"]]
)
def test_a_listed_name_that_leads_to_this_network(port, names, addresses):
    names[0].append(addresses)
    assert "not public" in refusal(403, f"http://listed.example:{port}/picture.png", f"listed.example:{port}")
    assert not asked


def test_a_name_is_resolved_once_and_that_address_is_asked(port, names, monkeypatch):
    """DNS rebinding: a public address for those who check, a private one for those who connect."""
    says, asked_about = names
    says += [["93.184.216.34"], ["127.0.0.1"]]
    connected = []

    async def connect(self, sock, address):
        connected.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", connect)
    assert "could not be asked" in refusal(502, f"http://listed.example:{port}/picture.png", f"listed.example:{port}")
    assert asked_about == ["listed.example"]
    assert connected == ["93.184.216.34"]
    assert not asked


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),  # noqa: S104
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) is public
