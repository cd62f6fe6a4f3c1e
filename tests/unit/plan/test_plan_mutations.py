"""Any change to a plan's JSON gives a plan that can be served, or our error."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan.parcel import PLAN_FILE
from sdfp_vllm.plan.schema import (
    SkipPlan,
    StoredView,
)
from sdfp_vllm.plan.store import load_plan, save_plan
from tests.support.plans import (
    PARTIAL,
    bridged_and_restricted,
    make_plan,
    stored,
)

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def paths(node, prefix=()):
    """Every place in a JSON tree."""
    yield prefix
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from paths(child, (*prefix, key))


def test_no_field_is_missing_from_the_plans_that_are_mutated():
    """Every field of the schema, and every kind of bridge and head, is in one of them."""
    seen = {
        ".".join("*" if isinstance(k, int) else k for k in p) for kind in KINDS for p in paths(raw_of(kind))
    }

    def fields(model: type[BaseModel], prefix: str = ""):
        for name, field in model.model_fields.items():
            here = prefix + name
            yield here
            for part in _inner(field.annotation):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    yield from fields(part, f"{here}.*." if "list[" in str(field.annotation) else f"{here}.")

    assert set(fields(SkipPlan)) <= seen


def _inner(annotation) -> list:
    """A type and all that its parameters hold."""
    return [annotation, *(part for arg in get_args(annotation) for part in _inner(arg))]


KINDS = ("whole", "partial", "beside")


def saved(kind: str, folder: Path) -> Path:
    """A plan of whole layers, one of single branches, or one with files beside it."""
    plan, *files = {
        "whole": lambda: (make_plan(),),
        "partial": lambda: (make_plan(view=stored(PARTIAL)),),
        "beside": bridged_and_restricted,
    }[kind]()
    save_plan(plan, folder, *files)
    return folder


def raw_of(kind: str):
    return json.loads(_plans(kind)[0])


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mutation_gives_a_plan_or_our_error(data):
    """10,000 mutations of structure or bytes: a valid plan, or PlanError. Nothing else leaves load_plan."""
    text, folder, names = _plans(data.draw(st.sampled_from(KINDS)))
    if data.draw(st.booleans()):
        raw = json.loads(text)
        for _ in range(data.draw(st.integers(1, 3))):
            *parents, last = data.draw(st.sampled_from([p for p in paths(raw) if p]))
            node = raw
            for key in parents:
                node = node[key]
            if data.draw(st.booleans()):
                node[last] = data.draw(_JSON)
            elif isinstance(node, dict):
                node[data.draw(st.text(max_size=4))] = node.pop(last)
            else:
                node.pop(last)
        blob = json.dumps(raw).encode()
    else:
        blob = bytearray(text.encode())
        for _ in range(data.draw(st.integers(1, 8))):
            blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
        blob = (
            bytes(blob[: data.draw(st.integers(0, len(blob)))]) if data.draw(st.booleans()) else bytes(blob)
        )
    (folder / PLAN_FILE).write_bytes(blob)
    try:
        plan = load_plan(folder)
    except PlanError as e:
        assert str(folder) in str(e) and e.way_out
    else:
        layers = plan.fingerprint.num_layers
        for seen in (plan.view.branches, *(c.view for c in plan.curve)):
            assert 0 <= min(seen.touched()) <= max(seen.touched()) < layers and seen.problem(layers) is None
        assert StoredView.of(plan.view.branches, layers).attention == plan.view.attention
        for served in (plan, plan.at_full_precision()):  # what an engine asks of it
            assert served.pacing is None or min(served.pacing.draft_ms + served.pacing.target_ms) > 0
            assert served.promised_speedup >= 0
    assert sorted(p.name for p in folder.iterdir()) == names


@functools.cache
def _plans(kind: str) -> tuple[str, Path, list[str]]:
    """A plan's text, a folder that it lies in, and the names in there."""
    folder = saved(kind, Path(tempfile.mkdtemp()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return (folder / PLAN_FILE).read_text(), folder, sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- fingerprint
