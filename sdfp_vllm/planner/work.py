"""Work: what every stage of the job needs; and the folder that it ends in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdfp_vllm.common.progress import Stages
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.fingerprint import Fingerprint
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.texts import Texts


@dataclass(frozen=True)
class Work:
    """A job whose request was found to be possible.

    Attributes:
        model: As the user named it, a folder or a Hugging Face id.
        model_dir: Where its files are.
        folder: Where the plan goes.
        texts: Where text to score and to draft on comes from.
        bar: Progress, a line a stage.
    """

    model: str
    model_dir: Path
    identity: Fingerprint
    folder: Path
    options: PlanOptions
    texts: Texts
    bar: Stages

    @property
    def checkpoint(self) -> Path:
        """File of Fisher sums that are not finished."""
        return self.folder / ".fisher-partial.pt"

    @property
    def scored(self) -> str:
        """What finished sums must have been made from, to be gone on with."""
        return f"{self.identity.sha256} {self.options.seed}"


def writable(folder: Path) -> Path:
    """Makes the output folder and tries to write in it, so that no minutes are lost to a wrong path."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise SdfpError(
            f"output folder {folder}",
            f"cannot be written ({e.strerror or e})",
            "Choose another folder with -o, or with SDFP_CACHE_DIR.",
        ) from e
    return folder
