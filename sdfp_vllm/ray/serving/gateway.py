"""The application's HTTP entrance: hands requests to engine replicas and stands in for one that dies.

It knows nothing of OpenAI's protocol but the form of an error.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

# Of a request that no replica has answered a byte of; then the client is told.
ATTEMPTS = 3
# What an engine replica gets to know of a request. `path` begins with `root_path`, the application's route prefix.
_SCOPE = (
    "type", "http_version", "method", "scheme", "root_path", "path", "raw_path", "query_string", "headers", "server",
)  # fmt: skip

Message = dict[str, Any]


class Gateway:
    """Serve deployment that takes the application's HTTP requests."""

    def __init__(self, engines: DeploymentHandle):
        self._engines = engines.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Relays one request. Tried again on another replica until a byte of the answer has come."""
        scope = {key: request.scope[key] for key in _SCOPE if key in request.scope}
        scope |= {"asgi": {"version": "3.0"}, "client": tuple(request.client or ("", 0))}
        body = await request.body()
        for _ in range(ATTEMPTS):
            answer: Any = self._engines.relay.remote(scope, body)
            try:
                start, first = await anext(answer), await anext(answer)
            except RayActorError:
                continue
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in start["headers"]}
            return StreamingResponse(_bodies(first, answer, headers), start["status"], headers)
        return JSONResponse(_error(f"{ATTEMPTS} replicas in turn died before they answered"), 503)


async def _bodies(
    first: Message, answer: DeploymentResponseGenerator, headers: dict[str, str]
) -> AsyncIterator[bytes]:
    """The answer's pieces; a stream of events that breaks off ends with an event that says so."""
    try:
        yield first.get("body", b"")
        async for message in answer:
            yield message.get("body", b"")
    except RayActorError:
        if not headers.get("content-type", "").startswith("text/event-stream"):
            raise  # the connection breaks off, short of the length its header promised
        error = _error("the replica that was answering died; what was sent so far is incomplete")
        yield f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode()
    finally:
        answer.cancel()  # a client that leaves in the middle takes its request off the engine


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "replica_died", "param": None, "code": 503}}
