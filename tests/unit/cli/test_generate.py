"""What `sdfp generate` asks the engine for, and refuses before it starts one."""

from __future__ import annotations

import inspect

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.cli.generate import as_chat, generate_command
from sdfp_vllm.errors import SdfpError
from tests import toy
from tests.unit.planner.test_chats import FRAMED, TOKENIZER, chat_tokenizer


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--temperature", "2.5", "temperature must be in [0, 2], got 2.5"),
        ("--temperature", "inf", "temperature must be a finite number"),
        ("--seed", str(1 << 63), "seed must be a whole number of 64 bits"),
    ],
)
def test_settings_that_vllm_refuses_are_refused_by_their_flag(flag, value, reason):
    result = CliRunner().invoke(app, ["generate", "no-model", "--prompt", "x", flag, value])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"{flag}: {reason}" in result.stderr


def test_no_seed_where_none_was_asked():
    """Requests with a seed are not paced: figures would be of what users do not get."""
    assert inspect.signature(generate_command).parameters["seed"].default is None


def test_a_prompt_is_rendered_as_one_turn_of_the_user(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert TOKENIZER.decode(as_chat("Why is the sky blue?", tmp_path)) == "Why is the sky blue?".join(FRAMED)


def test_a_prompt_stays_as_it_is_where_the_model_has_no_chat_template():
    assert as_chat("def main():", toy.MODEL) == "def main():"


def test_a_template_that_refuses_the_prompt_is_named(tmp_path):
    chat_tokenizer("{{ raise_exception('no chats today') }}").save_pretrained(tmp_path)
    with pytest.raises(SdfpError, match=r"--prompt: the model's chat template refuses it .*no chats today"):
        as_chat("Why?", tmp_path)
