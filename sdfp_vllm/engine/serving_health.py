"""Watches a running server through its /metrics, and says what its drafts come to and what to do where that is poor."""

from __future__ import annotations

import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sdfp_vllm.engine.metrics import INFO, PREFIX
from sdfp_vllm.errors import SdfpError

TIMEOUT = 10.0  # seconds for an answer
POOR_ACCEPTANCE = 0.5
LARGE_BATCH = 8
SPEC = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class Scrape:
    """One reading of /metrics: samples by name, summed over engines, and the labels of our info gauge, if it is there."""

    samples: Counter[str]
    info: dict[str, str] | None


@dataclass(frozen=True)
class Traffic:
    """What a server did between two scrapes.

    Attributes:
        running: Requests in its batch, the mean of both ends.
        generated: Tokens generated.
        rounds, drafted, accepted: vLLM's counts, by request: rounds in which something was drafted for it, tokens drafted
            and accepted.
        paced, paused: Rounds of the whole batch that were paced, and those of them without drafts.
        model, copied: Tokens drafted by the model, and copied.
        draft_ms: Milliseconds spent in drafting.
    """

    running: float
    generated: float
    rounds: float
    drafted: float
    accepted: float
    paced: float
    paused: float
    model: float
    copied: float
    draft_ms: float

    @classmethod
    def between(cls, first: Scrape, last: Scrape) -> Traffic:
        def moved(name: str) -> float:
            return last.samples[name] - first.samples[name]

        return cls(
            running=(first.samples["vllm:num_requests_running"] + last.samples["vllm:num_requests_running"])
            / 2,
            generated=moved("vllm:generation_tokens_total"),
            rounds=moved(f"{SPEC}drafts_total"),
            drafted=moved(f"{SPEC}draft_tokens_total"),
            accepted=moved(f"{SPEC}accepted_tokens_total"),
            paced=moved(f"{PREFIX}rounds_total"),
            paused=moved(f"{PREFIX}paused_rounds_total"),
            model=moved(f"{PREFIX}model_draft_tokens_total"),
            copied=moved(f"{PREFIX}copied_draft_tokens_total"),
            draft_ms=moved(f"{PREFIX}draft_milliseconds_total"),
        )

    def rows(self, seconds: float) -> list[tuple[str, str]]:
        """Returns (name, value) for people; "-" where nothing was counted."""
        return [
            ("requests running", f"{self.running:.1f}"),
            ("tokens per second", f"{self.generated / seconds:.1f}"),
            ("acceptance rate", _quotient(self.accepted, self.drafted, "{:.0%}")),
            ("draft tokens a round", _quotient(self.drafted, self.rounds, "{:.2f}")),
            ("tokens a round", _quotient(self.rounds + self.accepted, self.rounds, "{:.2f}")),
            ("drafts that were copied", _quotient(self.copied, self.model + self.copied, "{:.0%}")),
            ("rounds paused", _quotient(self.paused, self.paced, "{:.0%}")),
            ("drafting in a round", _quotient(self.draft_ms, self.paced, "{:.2f} ms")),
        ]

    def advice(self) -> list[str]:
        """Returns what to do, a sentence for each thing that is poor; empty where nothing is."""
        said = []
        if self.generated and not self.drafted:
            said.append(
                "Nothing was drafted: drafts do not pay for this traffic, or its requests have a seed or ask for none "
                "(docs/use/troubleshooting.md)."
            )
        elif self.paced and self.paused > self.paced / 2:
            said.append("Most rounds drafted nothing: drafts seldom pay here (docs/use/when-it-pays.md).")
        # Copies are cheap and often wrong, and whose drafts were accepted is not counted: the model's fall short for sure only if
        # all that was accepted would be too little of them.
        planned = self.model if self.copied else self.drafted
        if self.drafted and planned and self.accepted < POOR_ACCEPTANCE * planned:
            said.append(
                "Few drafts were accepted: plan again with `--calibration` of your own traffic "
                "(docs/use/troubleshooting.md)."
            )
        if self.running >= LARGE_BATCH:
            said.append(
                "The batch is large, where drafts gain little: compare with plain decoding in bfloat16 "
                "(docs/use/when-it-pays.md)."
            )
        return said


def _quotient(part: float, whole: float, form: str) -> str:
    return form.format(part / whole) if whole else "-"


def checked(url: str) -> str:
    """Returns the server's address without a slash at its end.

    Raises:
        SdfpError: If it is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise SdfpError(
            f"address {url!r}", "is not one of a server", "Give it as http://HOST:PORT, without /v1."
        )
    return url.rstrip("/")


def watch(url: str, seconds: float, sleep: Callable[[float], Any] = time.sleep) -> tuple[Scrape, Traffic]:
    """Reads /metrics twice, `seconds` apart.

    Raises:
        SdfpError: If nothing answers, or something that is not vLLM.
    """
    first = scrape(url)
    sleep(seconds)
    last = scrape(url)
    return last, Traffic.between(first, last)


def release_of(url: str) -> str:
    """Returns the version of the vLLM behind a URL, or "unknown"."""
    try:
        return str(json.loads(_get(f"{url}/version")).get("version", "unknown"))
    except (SdfpError, ValueError, AttributeError):
        return "unknown"  # a route that a gateway may hide


def scrape(url: str) -> Scrape:
    """Reads a server's /metrics.

    Raises:
        SdfpError: If it does not answer, or has no metrics of vLLM.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as e:
        raise SdfpError("prometheus_client", "is not installed", "pip install prometheus-client") from e
    samples: Counter[str] = Counter()
    info = None
    where = f"{url}/metrics"
    try:
        for family in text_string_to_metric_families(_get(where)):
            for sample in family.samples:
                samples[sample.name] += sample.value  # type: ignore[assignment]  # a Counter of floats
                if sample.name == PREFIX + INFO:
                    info = dict(sample.labels)
    except SdfpError:
        raise
    except ValueError as e:
        raise SdfpError(where, "has no metrics that can be read", "Give the address of a vLLM server.") from e
    if not any(name.startswith("vllm:") for name in samples):
        raise SdfpError(
            where,
            "has no metrics of vLLM",
            "Give the address of a vLLM server, one without --disable-log-stats.",
        )
    return Scrape(samples, info)


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError) as e:  # URLError is an OSError
        why = getattr(e, "reason", None) or e
        raise SdfpError(url, f"does not answer ({why})", "Start the server, or give its address.") from e
