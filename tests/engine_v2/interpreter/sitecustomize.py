"""Lets vLLM's V2 runner start without a GPU: its Triton kernels run under Triton's interpreter.

vLLM turns Triton off unless a driver is active. On a CPU build it accepts a backend called
"cpu", which Triton itself does not ship; this stand-in has only what vLLM asks of it. It must
be in place before vLLM is imported, in every process, hence a sitecustomize on PYTHONPATH.
"""

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    driver = type("InterpreterDriver", (), {"is_active": staticmethod(lambda: True)})
    backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=None))
