"""What `sdfp generate` asks the engine for, and refuses before it starts one."""

from __future__ import annotations

import inspect

import pytest
from typer.testing import CliRunner

from sdfp_vllm.cli.app import app
from sdfp_vllm.cli.generate import generate_command


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
