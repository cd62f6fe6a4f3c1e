"""PlanParcel: a plan with all that lies beside it, read once and carried to every process that needs it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdfp_vllm.plan.schema import SkipPlan

if TYPE_CHECKING:
    from torch import Tensor

    from sdfp_vllm.plan.bridge import Bridge

PLAN_FILE = "plan.json"
BRIDGE_FILE = "bridges.safetensors"
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class PlanParcel:
    """A plan and the contents of its files, checked; nodes need share no disk for it.

    Attributes:
        plan: The plan.
        source: The folder that it was read from, for messages.
        files: Content of the files beside plan.json, by name.
    """

    plan: SkipPlan
    source: str
    files: dict[str, bytes]

    @classmethod
    def read(cls, plan: SkipPlan, folder: Path) -> PlanParcel:
        """Reads what belongs to `plan` from `folder`.

        Raises:
            PlanError: If a file is missing, is not the plan's, or holds what the plan does not describe.
        """
        from sdfp_vllm.plan.tensor_file import read_pinned  # torch, which a plan alone does not need

        files = {}
        view = plan.view
        if view.bridges is not None:
            files[BRIDGE_FILE] = read_pinned(folder / BRIDGE_FILE, view.bridges.sha256, "bridges")
        if view.head.sha256 is not None:
            files[HEAD_FILE] = read_pinned(folder / HEAD_FILE, view.head.sha256, "a restricted draft head")
        parcel = cls(plan, str(folder), files)
        parcel.bridges()
        parcel.tokens()
        return parcel

    def bridges(self) -> dict[tuple[int, int], Bridge]:
        """The bridges by (first, last) skipped layer, float32 on the CPU; empty for none."""
        if BRIDGE_FILE not in self.files:
            return {}
        from sdfp_vllm.plan.bridge_file import unpack_bridges

        return unpack_bridges(self.plan, self.files[BRIDGE_FILE], Path(self.source) / BRIDGE_FILE)

    def tokens(self) -> Tensor | None:
        """The tokens that the draft's head computes, int64 [M] ascending; None for all."""
        if HEAD_FILE not in self.files:
            return None
        from sdfp_vllm.plan.head_file import unpack_head

        return unpack_head(self.plan, self.files[HEAD_FILE], Path(self.source) / HEAD_FILE)

    @property
    def sha256(self) -> str:
        """Hash of the whole content."""
        content = [self._json(), *(self.files[name] for name in sorted(self.files))]
        return hashlib.sha256(b"".join(content)).hexdigest()

    def write(self, folder: Path) -> Path:
        """Writes the plan and its files into `folder` and returns it."""
        for name, content in {PLAN_FILE: self._json(), **self.files}.items():
            (folder / name).write_bytes(content)
        return folder

    def _json(self) -> bytes:
        return json.dumps(self.plan.model_dump(mode="json")).encode()
