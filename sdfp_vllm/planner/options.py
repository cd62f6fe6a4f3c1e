"""What a user can ask of the offline job, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.view import PRECISIONS
from sdfp_vllm.plan.window import parse_window
from sdfp_vllm.planner.bridged_search import VARIANTS, BridgeRequest, check_bridge
from sdfp_vllm.planner.memory import parse_memory
from sdfp_vllm.planner.selectors import Selector, check_selector
from sdfp_vllm.ray.cluster import RayOptions

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ScoreText = Literal["own", "corpus"]


@dataclass(frozen=True)
class PlanOptions:
    """What the user can ask of the job; docs/concepts/search.md says what the defaults take.

    Attributes:
        revision: Branch, tag or commit of a model that is an id; None for the hub's default.
        calibration, field: Source of calibration text (None: the built-in sample) and its text field.
        sequences, length: Windows scored for the Fisher trace, and tokens in each.
        text_sequences, prompt, new_tokens: Texts that the target writes to try drafts on, each
            from a prompt of `prompt` calibration tokens.
        layers, draft_tokens: Fix the number of kept layers or the draft length.
        score_form: "trace" or "diagonal".
        selector: How the keep set is chosen: "auto", "fit" or "gradient" (see `selectors.py`).
        bridge: What stands in for skipped layers: "none", "bias", "affine", "low-rank", or "auto", the
            one of them that is predicted to be fastest.
        head: Tokens whose logits the draft computes: "full", their number, or "auto", restricted where that
            is predicted to be faster.
        precision: What the draft's branches may run at: "auto" (whatever there are kernels for), "full", or one by name.
        extra_memory: The most that rounded copies may take, as `parse_memory` reads it; None for any amount.
        window: How much of a long context drafts attend to: "none" for all of it, a number of last tokens, or "auto", what
            the check measures to be fastest (all of it without one).
        score_text: Text that Fisher traces are taken on: the target's own, or the calibration text. With `ray`
            always the latter.
        run_check: Run plain decoding and the plan on the real engine at the end.
        eager: Whether the engine that is served with runs eager (`--enforce-eager`), for costs and check.
        anyway: Go on where costs alone say that nothing can pay, and with an architecture that was not tried.
        trust_remote_code: Run code that comes with the checkpoint where it needs that.
        ray: Score the layers on a Ray cluster; None scores them in this process.
    """

    revision: str | None = None
    calibration: str | None = None
    field: str = "text"
    sequences: int = 8
    length: int = 256
    text_sequences: int = 12
    prompt: int = 64
    new_tokens: int = 64
    seed: int = 0
    layers: int | None = None
    draft_tokens: int | None = None
    dtype: str = "auto"
    score_form: str = "trace"
    selector: Selector = "auto"
    bridge: BridgeRequest = "none"
    head: str = "auto"
    precision: str = "auto"
    extra_memory: str | None = None
    window: str = "auto"
    score_text: ScoreText = "own"
    run_check: bool = True
    eager: bool = False
    anyway: bool = False
    trust_remote_code: bool = False
    resume: bool = False
    ray: RayOptions | None = None

    @property
    def confirms(self) -> bool:
        """Whether the selector confirms on text of its own what it finds."""
        return self.selector == "auto" and None in VARIANTS[self.bridge]

    @property
    def texts(self) -> int:
        """How many texts the target writes: to judge on, to confirm on, to fit bridges on."""
        return self.text_sequences * (1 + self.confirms + (self.bridge != "none"))

    @property
    def device(self) -> str:
        """Where the model is loaded."""
        if self.ray and self.ray.gpus_per_worker > 1:
            return "auto"  # too large for one GPU there, too large for one here
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def selector_name(self) -> str:
        """The selector, with the FIT score that it starts from."""
        # Bridges by name are tried over FIT's keep sets alone.
        name = self.selector if None in VARIANTS[self.bridge] else "fit"
        return name if name == "gradient" else f"{name}-{self.score_form}"

    def check(self) -> None:
        """Refuses what can be seen to be wrong without the model.

        Raises:
            SdfpError: Naming the flag.
        """
        for flag, value, known in (
            ("--dtype", self.dtype, tuple(DTYPES)),
            ("--score-form", self.score_form, ("trace", "diagonal")),
            ("--precision", self.precision, ("auto", *PRECISIONS)),
            ("--score-text", self.score_text, get_args(ScoreText)),
        ):
            if value not in known:
                raise SdfpError(flag, f"{value!r} is not known", f"Use one of {', '.join(known)}.")
        check_bridge(self.bridge)
        check_selector(self.selector)
        parse_memory(self.extra_memory, 0)
        if self.window != "auto":
            parse_window("--window", self.window)
