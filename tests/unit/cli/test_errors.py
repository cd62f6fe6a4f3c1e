"""The one error a user meets: one line, whatever is quoted in it, and the same on the other side of a process."""

from __future__ import annotations

import pickle

from sdfp_vllm.errors import PlanError, SdfpError


def test_a_librarys_newlines_are_squeezed_out():
    error = SdfpError("model\nx", "cannot be loaded (ValueError: one\n\n  two\r\nthree\n)", "Go\n away.")
    assert str(error) == "model x: cannot be loaded (ValueError: one two three ). Go away."


def test_another_processs_output_is_shown_as_it_is():
    error = SdfpError("engine", "failed", "Correct it.", log="  line 1\n    line 2")
    assert str(error) == "engine: failed. Correct it.\n  line 1\n    line 2"


def test_it_crosses_processes_whole():
    for error in (SdfpError("a", "b", "c", log="d\ne"), PlanError("a", "b", "c")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
        assert vars(again) == vars(error)
