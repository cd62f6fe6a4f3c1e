"""Every field that vLLM has for a request or an engine has its verdict in `vllm_fields.py`; a new one fails here."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.vllm_fields import ENGINE_ARGS, ROUTES, SAMPLING_PARAMS

ROOT = Path(__file__).parents[2]
TABLES = {"SamplingParams": SAMPLING_PARAMS, "routes": ROUTES, "EngineArgs": ENGINE_ARGS}


def listed(table: dict[str, str]) -> Counter[str]:
    return Counter(name for names in table.values() for name in names.split())


def public(names: object) -> set[str]:
    return {name for name in names if not name.startswith("_")}  # type: ignore[attr-defined]


def assert_listed(has: set[str], table: dict[str, str]) -> None:
    import vllm

    assert not has - set(listed(table)), "without a verdict in vllm_fields.py"
    if vllm.__version__.startswith("0.32."):
        assert not set(listed(table)) - has, "gone from vLLM"


def test_sampling_params():
    from vllm import SamplingParams

    has = public(SamplingParams.__struct_fields__)
    assert_listed(has, SAMPLING_PARAMS)


def test_requests_of_the_openai_routes():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    routes = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
    has = public(name for route in routes for name in route.model_fields)
    assert_listed(has - set(listed(SAMPLING_PARAMS)), ROUTES)


def test_engine_arguments():
    from vllm.engine.arg_utils import AsyncEngineArgs

    has = public(field.name for field in dataclasses.fields(AsyncEngineArgs))
    assert_listed(has, ENGINE_ARGS)


@pytest.mark.parametrize("name", TABLES)
def test_verdicts(name):
    """One verdict each, and where it is "works", the test file it names has the field."""
    table = TABLES[name]
    assert not {field for field, times in listed(table).items() if times > 1}
    for verdict, fields in table.items():
        kind, _, where = verdict.partition(": ")
        assert kind in ("works", "refused", "irrelevant") and where
        if kind == "works":
            text = (ROOT / where).read_text()
            for field in fields.split():
                flag = field.replace("_", "-")
                assert re.search(rf"\b{field}\b|--{flag}\b", text), f"{where} never has {field}"
