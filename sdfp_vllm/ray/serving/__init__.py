"""Serving on Ray: `serve run sdfp_vllm.ray.serving:app model=MODEL`."""

from sdfp_vllm.ray.serving.application import app

__all__ = ["app"]
