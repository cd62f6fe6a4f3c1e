"""The one error type a user meets, and why there is only one.

Every refusal says what is wrong, where (file, field or flag) and the way out, in that
order, so that the last line of a traceback is enough to act on.
"""

from __future__ import annotations

import re


class SdfpError(ValueError):
    """A request that cannot be met as asked. One line, whatever a library's own message had that is quoted in it.

    Args:
        where: The file, field, flag or feature at fault.
        what: What is wrong with it.
        way_out: What the user can do about it.
        log: Output of another process, shown as it is below that line.
    """

    def __init__(self, where: str, what: str, way_out: str, log: str = ""):
        self.where, self.what, self.way_out = (_one_line(part) for part in (where, what, way_out))
        self.log = log
        super().__init__(f"{self.where}: {self.what}. {self.way_out}" + (f"\n{log}" if log else ""))

    def __reduce__(self):  # crosses process boundaries (engine core, Ray)
        return type(self), (self.where, self.what, self.way_out, self.log)


def _one_line(text: str) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", str(text)).strip()


class PlanError(SdfpError):
    """A plan file that is missing, damaged, unsafe or made for another model."""
