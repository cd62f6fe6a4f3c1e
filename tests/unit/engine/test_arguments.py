"""Which speculative settings ask for SDFP, and how the flags and the config merge."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sdfp_vllm.engine.arguments import sdfp_settings
from sdfp_vllm.errors import SdfpError


def args(config=None, method=None, model=None, tokens=None):
    return SimpleNamespace(
        speculative_config=config, spec_method=method, spec_model=model, spec_tokens=tokens
    )


@pytest.mark.parametrize(
    "given",
    [
        args({"method": "sdfp"}),
        args({"model": "sdfp"}),
        args(method="sdfp"),
        args(model="sdfp"),
    ],
)
def test_every_way_to_ask(given):
    assert sdfp_settings(given) == {"method": "sdfp"}


@pytest.mark.parametrize(
    "given",
    [
        args(),
        args({"method": "ngram", "num_speculative_tokens": 3}),
        args(model="org/draft", tokens=3),
        args({"method": "draft_model", "model": "./sdfp"}),
    ],
)
def test_other_methods_are_left_alone(given):
    assert sdfp_settings(given) is None


def test_a_plan_folder_is_enough(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    want = {"method": "sdfp", "model": str(tmp_path), "num_speculative_tokens": 2}
    assert sdfp_settings(args(model=str(tmp_path), tokens=2)) == want
    assert sdfp_settings(args({"model": str(tmp_path), "num-speculative-tokens": 2})) == want


def test_another_method_with_our_model_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    for model in ("sdfp", str(tmp_path)):
        with pytest.raises(SdfpError, match=r"'draft_model': cannot draft with .*Leave the method out"):
            sdfp_settings(args({"method": "draft_model", "model": model}))


def test_the_same_setting_twice_is_refused():
    with pytest.raises(SdfpError, match=r"--num-speculative-tokens.*Give it once"):
        sdfp_settings(args({"method": "sdfp", "num_speculative_tokens": 2}, tokens=3))
