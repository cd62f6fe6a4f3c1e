"""What tests of DiP-GO share."""

from __future__ import annotations

import pytest

from sdfp_vllm.dipgo import surrogate


@pytest.fixture
def latents_seen(monkeypatch):
    """Predictions of the latents' error: the decoder and the range of images are not linear, the last call is."""
    monkeypatch.setattr(surrogate, "seen", lambda sampler, latents: latents)
