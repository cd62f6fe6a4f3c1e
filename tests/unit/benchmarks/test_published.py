"""Every study knows where its figures are published."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmarks
from benchmarks.common.published import RESULTS

ROOT = Path(benchmarks.__file__).parent


def test_published_figures_are_there():
    assert (RESULTS / "latest.json").is_file()


@pytest.mark.parametrize("module", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_looks_for_them_by_itself(module):
    """Modules move; five once looked into a folder that was no more."""
    assert module.name == "published.py" or '/ "results"' not in module.read_text()
