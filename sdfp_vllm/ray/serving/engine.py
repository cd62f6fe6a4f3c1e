"""A replica: one AsyncLLM engine with SDFP, behind vLLM's own OpenAI app."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sdfp_vllm.plan.parcel import PlanParcel
from sdfp_vllm.ray.serving.settings import ServingArgs

Message = dict[str, Any]


class Engine:
    """Serve deployment that answers HTTP requests handed on by the gateway (`relay`).

    vLLM's app is called in this process, as an ASGI server would call it; no port is opened.
    """

    async def __init__(self, args: ServingArgs, plan: PlanParcel):  # type: ignore[misc]  # Serve awaits it
        from sdfp_vllm.engine.openai_app import openai_app, serve_arguments

        self._resources = contextlib.AsyncExitStack()
        folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="sdfp-plan-")))
        speculative = {
            **args.engine.get("speculative_config", {}),
            "method": "sdfp",
            "model": str(plan.write(folder)),
        }
        settings = serve_arguments(args.model, {**args.engine, "speculative_config": speculative})
        self._app, self._client = await self._resources.enter_async_context(openai_app(settings))

    async def check_health(self) -> None:
        """Raises if the engine is dead: Serve then replaces this replica."""
        await self._client.check_health()

    async def relay(self, scope: Message, body: bytes) -> AsyncIterator[Message]:
        """Answers one HTTP request.

        Args:
            scope: ASGI scope of the request.
            body: Its whole body.

        Yields:
            ASGI messages: `http.response.start`, then `http.response.body` as often as vLLM sends them.
        """
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.Event()

        async def receive() -> Message:
            for request in requests:
                return request
            await gone.wait()  # asked for again only to learn that the client has gone
            return {"type": "http.disconnect"}

        async def answer() -> None:
            try:
                await self._app(scope, receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:  # also when the client leaves in the middle: vLLM then aborts the request
            gone.set()
            task.cancel()

    async def __del__(self) -> None:  # Serve awaits it when it takes the replica down
        await self._resources.aclose()
