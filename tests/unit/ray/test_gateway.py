"""The gateway before replicas that die at every point of an answer."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("ray.serve")

from ray.exceptions import ActorDiedError
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sdfp_vllm.ray.serving.gateway import ATTEMPTS, Gateway

EVENTS = [b'data: {"choices": []}\n\n', b"data: [DONE]\n\n"]


class Replicas:
    """Stands in for a deployment handle; `deaths[i]` is after how many messages the i-th call's replica dies."""

    def __init__(self, deaths: list[int], content_type: str = "text/event-stream; charset=utf-8"):
        self.deaths, self.seen = iter(deaths), []
        self.messages = [
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", content_type.encode())],
            },
            *({"type": "http.response.body", "body": body, "more_body": True} for body in EVENTS),
        ]

    def options(self, **_):
        return self

    @property
    def relay(self):
        return self

    def remote(self, scope, body):
        self.seen.append((scope["path"], scope["query_string"], body))
        self.scope = scope
        return Answer(self.messages, next(self.deaths, None))


class Answer:
    def __init__(self, messages: list[dict], death: int | None):
        self.messages, self.death = enumerate(messages), death

    def __aiter__(self):
        return self

    async def __anext__(self):
        i, message = next(self.messages, (None, None))
        if message is None:
            raise StopAsyncIteration
        if i == self.death:
            raise ActorDiedError()
        return message

    def cancel(self):
        pass


def post(replicas: Replicas, prefix: str = ""):
    """As Ray Serve calls it: `path` whole, and the application's route prefix in `root_path`."""
    app = Starlette(routes=[Route("/{path:path}", Gateway(replicas).__call__, methods=["POST"])])
    client = TestClient(app, root_path=prefix)
    return client.post(f"{prefix}/v1/completions?a=1", content=b'{"prompt": "x"}')


@pytest.mark.parametrize("deaths", [[], [0], [1], [0, 1]])
def test_before_a_byte_is_answered_another_replica_takes_over(deaths):
    replicas = Replicas(deaths)
    response = post(replicas)
    assert response.status_code == 200 and response.content == b"".join(EVENTS)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert replicas.seen == [("/v1/completions", b"a=1", b'{"prompt": "x"}')] * (len(deaths) + 1)


@pytest.mark.parametrize("prefix", ["", "/llm", "/a/b"])
def test_a_replicas_app_finds_its_routes_under_a_route_prefix(prefix):
    replicas = Replicas([])
    assert post(replicas, prefix).status_code == 200
    app = Starlette(
        routes=[Route("/v1/completions", lambda r: PlainTextResponse(str(r.url)), methods=["POST"])]
    )
    sent: list[dict] = []

    async def answer():
        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        await app(dict(replicas.scope), receive, send)

    asyncio.run(answer())
    assert sent[0]["status"] == 200
    assert sent[1]["body"].decode() == f"http://testserver{prefix}/v1/completions?a=1"


def test_a_stream_that_breaks_off_says_so():
    response = post(Replicas([2]))
    assert response.content.startswith(EVENTS[0])
    event = response.content.removeprefix(EVENTS[0]).split(b"\n\n")[0]
    assert "incomplete" in json.loads(event.removeprefix(b"data: "))["error"]["message"]
    assert response.content.endswith(EVENTS[1])


def test_an_answer_that_is_no_stream_is_never_passed_off_as_whole():
    with pytest.raises(ActorDiedError):
        post(Replicas([2], "application/json"))


def test_after_enough_deaths_the_client_is_told():
    replicas = Replicas([0] * ATTEMPTS)
    response = post(replicas)
    assert response.status_code == 503 and "replicas in turn died" in response.json()["error"]["message"]
    assert len(replicas.seen) == ATTEMPTS
