"""Partial Fisher sums: mergeable across shards, and kept on disk between runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError


@dataclass(frozen=True)
class FisherSums:
    """Sums over calibration windows, from which scores are made.

    Attributes:
        sequences: How many windows were summed.
        sums: float64 [layers, 2 branches (attention, MLP), 2]: sum over windows of
            sum_j g_j^2 and of sum_j g_j^2 theta_j^2, with g the gradient of log p(window).
    """

    sequences: int
    sums: Tensor

    @classmethod
    def zero(cls, num_layers: int) -> FisherSums:
        return cls(0, torch.zeros(num_layers, 2, 2, dtype=torch.float64))

    def merge(self, other: FisherSums) -> FisherSums:
        """Adds the sums of other windows of the same model; order matters only to float64 rounding."""
        if self.sums.shape != other.sums.shape:
            raise SdfpError(
                "Fisher sums",
                f"of {len(self.sums)} and {len(other.sums)} layers cannot be merged",
                "Merge shards of one model.",
            )
        return FisherSums(self.sequences + other.sequences, self.sums + other.sums)


class OrderedSums:
    """Adds up windows that finish in any order, always in the windows' own order: the same bits as one process.

    Attributes:
        total: Sums of windows 0 to `total.sequences - 1`.
        ahead: Sums of later windows that are finished while an earlier one is not.
    """

    def __init__(self, total: FisherSums, ahead: Mapping[int, FisherSums] | None = None):
        self.total, self.ahead = total, dict(ahead or {})
        self._catch_up()

    @property
    def finished(self) -> int:
        return self.total.sequences + len(self.ahead)

    def add(self, window: int, sums: FisherSums) -> None:
        """Takes in one window; a window that is there already is not counted twice."""
        if window >= self.total.sequences:
            self.ahead[window] = sums
            self._catch_up()

    def missing(self, windows: int) -> list[int]:
        """The windows of 0 to `windows - 1` not taken in yet, ascending."""
        return [i for i in range(self.total.sequences, windows) if i not in self.ahead]

    def _catch_up(self) -> None:
        while (following := self.ahead.pop(self.total.sequences, None)) is not None:
            self.total = self.total.merge(following)


def checkpoint_key(ids: Tensor, num_layers: int, dtype: str, identity: str) -> str:
    """Hash of everything that the sums depend on: same key, same sums."""
    head = json.dumps([list(ids.shape), num_layers, dtype, identity])
    return hashlib.sha256(head.encode() + ids.cpu().contiguous().numpy().tobytes()).hexdigest()


class Checkpoint:
    """A JSON file with the sums of the first windows of one run, and of those finished ahead of them."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = Path(path), key

    def save(self, sums: FisherSums, ahead: Mapping[int, FisherSums] | None = None) -> None:
        """Writes atomically; floats survive exactly (JSON carries their shortest exact form).

        Raises:
            SdfpError: If the file cannot be written.
        """
        content = {
            "key": self.key,
            "sequences": sums.sequences,
            "sums": sums.sums.tolist(),
            "ahead": {i: s.sums.tolist() for i, s in (ahead or {}).items()},
        }
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, prefix=".fisher-", delete=False) as f:
                temporary = f.name
                json.dump(content, f)
            os.replace(temporary, self.path)
        except OSError as e:
            raise SdfpError(
                str(self.path),
                f"cannot be written ({e.strerror or e})",
                "Free space or choose another folder with -o.",
            ) from e
        finally:
            if temporary:
                Path(temporary).unlink(missing_ok=True)

    def load(self) -> OrderedSums | None:
        """The sums saved, or None where there is no file.

        Raises:
            SdfpError: If the file is damaged or was made by another run.
        """
        mend = "Delete it, or run without --resume."
        try:
            raw = json.loads(self.path.read_text())
            key, sequences = raw["key"], int(raw["sequences"])
            sums = torch.tensor(raw["sums"], dtype=torch.float64)
            ahead = {
                int(i): FisherSums(1, torch.tensor(s, dtype=torch.float64))
                for i, s in raw.get("ahead", {}).items()
            }
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise SdfpError(str(self.path), f"is damaged ({type(e).__name__}: {e})", mend) from e
        if key != self.key:
            raise SdfpError(
                str(self.path), "was made with another model, calibration text, dtype or seed", mend
            )
        return OrderedSums(FisherSums(sequences, sums), ahead)
