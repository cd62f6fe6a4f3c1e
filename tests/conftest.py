"""Settings every test shares; they must stand before vLLM is imported."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import vision

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # tiny models gain nothing from more, and spin against other work
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # engines live in the test process: fast to start, open to look into
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

vision.usable()  # before anything asks transformers whether it is there

# A shell's background job ignores Ctrl-C, and so would every child of it; tests send it to some.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# ---------------------------------------------------------------- how many answers were compared
_compared_in_workers = 0


def _compared_here() -> int:
    return getattr(sys.modules.get("tests.support.engines"), "compared", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a pytest-xdist worker
        session.config.workeroutput["compared"] = _compared_here()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    global _compared_in_workers
    _compared_in_workers += getattr(node, "workeroutput", {}).get("compared", 0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if count := _compared_in_workers or _compared_here():
        terminalreporter.write_line(f"{count:,} greedy answers are plain vLLM's, token for token")


# Two runs of their own (`make test` makes all three): Triton decides once per process whether its kernels are
# interpreted, and modules of vLLM-Omni are not to be loaded beside engines.
_RUNS = {"kernels": "interpreted", "engine_v2": "interpreted", "omni": "omni"}
_HERE = Path(__file__).parent


def _this_run() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreted"
    return "omni" if os.environ.get("VLLM_OMNI_FOLDER") else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    part = collection_path.relative_to(_HERE).parts[:1] if collection_path.is_relative_to(_HERE) else ()
    if not part or part[0].endswith(".py"):
        return None
    return _RUNS.get(part[0]) != _this_run() or None
