"""A plan on its way to other machines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from sdfp_vllm.plan import BRIDGE_FILE, HEAD_FILE, PLAN_FILE, find_plan


@dataclass(frozen=True)
class PlanParcel:
    """A plan folder's content, carried in the arguments of actors: nodes need share no disk for it."""

    files: dict[str, bytes]

    @classmethod
    def read(cls, model: str, plan: str | None) -> PlanParcel:
        """Reads a plan folder, or for None the model's default one.

        Raises:
            PlanError: If there is none, or it is damaged or of another model.
        """
        _, folder = find_plan(model, plan or None)
        folder = folder.parent if folder.name == PLAN_FILE else folder
        present = [name for name in (PLAN_FILE, BRIDGE_FILE, HEAD_FILE) if (folder / name).is_file()]
        return cls({name: (folder / name).read_bytes() for name in present})

    @property
    def sha256(self) -> str:
        """Hash of the whole content."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()

    def write(self, folder: Path) -> Path:
        """Writes the files into `folder` and returns it."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder
