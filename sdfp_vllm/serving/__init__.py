"""Serving on Ray: `serve run sdfp_vllm.serving:app model=MODEL`."""

from sdfp_vllm.serving.application import app

__all__ = ["app"]
