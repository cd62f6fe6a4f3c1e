"""The one error type a user meets, and why there is only one.

Every refusal says what is wrong, where (file, field or flag) and the way out, in that
order, so that the last line of a traceback is enough to act on.
"""

from __future__ import annotations


class SdfpError(ValueError):
    """A request that cannot be met as asked.

    Args:
        where: The file, field, flag or feature at fault.
        what: What is wrong with it.
        way_out: What the user can do about it.
    """

    def __init__(self, where: str, what: str, way_out: str):
        super().__init__(f"{where}: {what}. {way_out}")
        self.where, self.what, self.way_out = where, what, way_out

    def __reduce__(self):  # crosses process boundaries (engine core, Ray)
        return type(self), (self.where, self.what, self.way_out)


class PlanError(SdfpError):
    """A plan file that is missing, damaged, unsafe or made for another model."""
