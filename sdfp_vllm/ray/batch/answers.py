"""The output: answers as they come in a partial file that survives a crash, then all in the input's order."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdfp_vllm.errors import SdfpError

_GO_ON = "Mend that; --resume goes on from the rows that are answered."


class Answers:
    """OUTPUT.partial: a header line with the run's key, then one JSON answer a line, in any order.

    Attributes:
        finished: Ids of the requests answered so far.
        failed: Those of them whose answer is an error.
    """

    def __init__(self, output: Path, key: str, requests: Mapping[str | int, str], resume: bool):
        """Opens the partial file of `output`, to go on from or new.

        Args:
            key: Of the run: what its answers depend on beside their requests.
            requests: Digests of the requests by id, in the input's order.

        Raises:
            SdfpError: If there is an output or (without `resume`) a partial file already, the
                partial file is of another run or has answers to other requests, or none can be written.
        """
        self.output, self.partial = output, Path(f"{output}.partial")
        self._key, self._requests = key, requests
        self.finished: set[str | int] = set()
        self.failed: set[str | int] = set()
        with self._writing("Name another output file."):
            if output.exists():
                raise SdfpError(str(output), "exists already", "Name another file, or remove it.")
            if self.partial.exists() and not resume:
                raise SdfpError(
                    str(self.partial),
                    "holds a run that was interrupted",
                    "Add --resume to go on, or remove it.",
                )
            good = self._read() if self.partial.exists() else 0
            self._file = self.partial.open("ab")
            self._file.truncate(good)  # a line that the crash cut in two is answered again
            if not good:
                self._append([{"key": key}])

    def add(self, answers: Iterable[dict[str, Any]]) -> None:
        """Appends answers ({"id": ...} and what is to be written) and waits until the disk has them."""
        fresh = [a for a in answers if a["id"] not in self.finished]
        with self._writing(_GO_ON):
            self._append([{"request": self._requests[a["id"]], **a} for a in fresh])
        for answer in fresh:
            self._count(answer)

    def finish(self) -> None:
        """Writes the output atomically, in the order of the input, and removes the partial file."""
        with self._writing(_GO_ON):
            self._finish()

    def _finish(self) -> None:
        self._file.close()
        place: dict[str | int, int] = {}
        with self.partial.open("rb") as f:
            f.readline()
            start = f.tell()
            while line := f.readline():
                place[json.loads(line)["id"]] = start
                start = f.tell()
            new = Path(f"{self.output}.new")
            with new.open("w", encoding="utf-8") as out:
                for id in self._requests:
                    f.seek(place[id])
                    answer = json.loads(f.readline())
                    del answer["request"]
                    out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                out.flush()
                os.fsync(out.fileno())
        os.replace(new, self.output)
        self.partial.unlink()

    @contextlib.contextmanager
    def _writing(self, way_out: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise SdfpError(str(self.partial), f"cannot be written ({e.strerror or e})", way_out) from e

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _count(self, answer: dict[str, Any]) -> None:
        self.finished.add(answer["id"])
        if "error" in answer:
            self.failed.add(answer["id"])

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
                            "is of another model, plan or engine settings",
                            "Remove it, or give what it was made with.",
                        )
                    if number and self._holds(content):
                        self._count(content)
                except (ValueError, KeyError, TypeError) as e:
                    if isinstance(e, SdfpError):
                        raise
                    raise SdfpError(
                        f"{self.partial}, line {number + 1}", f"is damaged ({e})", "Remove the file."
                    ) from e
                good += len(line)
        return good

    def _holds(self, answer: dict[str, Any]) -> bool:
        """Whether it answers a request of the input as it is now; a failed row that was mended has none yet.

        Raises:
            SdfpError: If an answer was given to what the input no longer asks.
        """
        id, asked = answer["id"], answer["request"]
        if self._requests.get(id) == asked:
            return True
        if "error" in answer and id in self._requests:
            return False
        raise SdfpError(
            str(self.partial),
            f"has an answer to row {id!r}, which " + ("has changed" if id in self._requests else "is gone"),
            "Only rows without an answer may change: restore it, or remove the file.",
        )
