"""Requests to an ASGI application in this process, and what its refusals look like."""

import asyncio
from contextlib import asynccontextmanager

import httpx

PNG = {"content-type": "image/png"}


def ask(api, *calls):
    """The answers to requests that are made one after the other."""

    async def run():
        async with client(api) as http:
            return [await call(http) for call in calls]

    answers = asyncio.run(run())
    return answers[0] if len(answers) == 1 else answers


@asynccontextmanager
async def client(api):
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        yield http


def form(*pictures):
    return [("images", (f"{number}.png", picture)) for number, picture in enumerate(pictures)]


def problem(answer, status):
    """The detail of a problem, which is one line."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert set(found) == {"title", "status", "detail"}
    assert found["status"] == status
    assert "\n" not in found["detail"]
    return found["detail"]
