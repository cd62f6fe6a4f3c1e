"""The output: answers as they come in a partial file that survives a crash, then all in the input's order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdfp_vllm.errors import SdfpError


class Answers:
    """OUTPUT.partial: a header line with the run's key, then one JSON answer a line, in any order.

    Attributes:
        finished: Indices of the requests answered so far.
    """

    def __init__(self, output: Path, key: str, resume: bool):
        """Opens the partial file of `output`, to go on from or new.

        Raises:
            SdfpError: If there is an output or (without `resume`) a partial file already, the
                partial file is of another run, or none can be written.
        """
        self.output, self.partial, self._key = output, output.with_name(output.name + ".partial"), key
        self.finished: set[int] = set()
        if output.exists():
            raise SdfpError(str(output), "exists already", "Name another file, or remove it.")
        if self.partial.exists() and not resume:
            raise SdfpError(
                str(self.partial), "holds a run that was interrupted", "Add --resume to go on, or remove it."
            )
        try:
            good = self._read() if self.partial.exists() else 0
            self._file = self.partial.open("ab")
            self._file.truncate(good)  # a line that the crash cut in two is answered again
            if not good:
                self._append([{"key": key}])
        except OSError as e:
            raise SdfpError(
                str(self.partial), f"cannot be written ({e.strerror or e})", "Name another output file."
            ) from e

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        """Appends answers ({"index": ...} and what is to be written) and waits until the disk has them."""
        fresh = [a for a in answers if a["index"] not in self.finished]
        self._append(fresh)
        self.finished.update(a["index"] for a in fresh)

    def finish(self) -> None:
        """Writes the output atomically, in the order of the input, and removes the partial file."""
        self._file.close()
        place: dict[int, int] = {}
        with self.partial.open("rb") as f:
            f.readline()
            start = f.tell()
            while line := f.readline():
                place[json.loads(line)["index"]] = start
                start = f.tell()
            new = self.output.with_name(self.output.name + ".new")
            with new.open("w", encoding="utf-8") as out:
                for index in sorted(place):
                    f.seek(place[index])
                    answer = json.loads(f.readline())
                    del answer["index"]
                    out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
        os.replace(new, self.output)
        self.partial.unlink()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Takes in the partial file; returns how many of its bytes are whole lines."""
        good = 0
        with self.partial.open("rb") as f:
            for number, line in enumerate(f):
                if not line.endswith(b"\n"):
                    break
                try:
                    content = json.loads(line)
                    if number == 0 and content["key"] != self._key:
                        raise SdfpError(
                            str(self.partial),
                            "is of another input, model, plan or settings",
                            "Remove it, or give what it was made with.",
                        )
                    if number:
                        self.finished.add(int(content["index"]))
                except (ValueError, KeyError, TypeError) as e:
                    if isinstance(e, SdfpError):
                        raise
                    raise SdfpError(
                        f"{self.partial}, line {number + 1}", f"is damaged ({e})", "Remove the file."
                    ) from e
                good += len(line)
        return good
