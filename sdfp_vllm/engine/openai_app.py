"""vLLM's own OpenAI-compatible app over an engine in this process, as `vllm serve` would build it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any

from sdfp_vllm.errors import SdfpError


def serve_arguments(model: str, engine: Mapping[str, Any]) -> Any:
    """Parses `vllm serve` flags given as a mapping, {"max_model_len": 512} for `--max-model-len 512`.

    Raises:
        SdfpError: If vLLM does not know a flag or its value.
    """
    from sdfp_vllm.engine import register
    from sdfp_vllm.engine.upstream.releases import refuse_missing

    refuse_missing("serve")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from sdfp_vllm.engine.upstream.compat import make_arg_parser

    register()
    parser = make_arg_parser(FlexibleArgumentParser())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(["--model", model, *_flags(engine)])
    except SystemExit as e:
        why = said.getvalue().strip().splitlines()[-1:] or ["refused"]
        raise SdfpError(
            "engine", f"vLLM refuses these settings ({why[0]})", "See `vllm serve --help`."
        ) from e
    return args


def _flags(engine: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in engine.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        elif value is False:
            flags.append(f"--no-{flag[2:]}")
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


@contextlib.asynccontextmanager
async def openai_app(args: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Starts an AsyncLLM engine; yields (ASGI app with all of vLLM's routes, engine client).

    The engine and its processes are gone when the block ends.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    async with build_async_engine_client(args) as client:
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        # On an engine's death vLLM asks its own server to stop, through this; Serve asks check_health instead.
        app.state.server = SimpleNamespace()
        async with app.router.lifespan_context(app):
            yield app, client
