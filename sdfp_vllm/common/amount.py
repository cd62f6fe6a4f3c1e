"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from sdfp_vllm.errors import SdfpError

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B|B)?", re.IGNORECASE)
_UNIT = {
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def bytes_of(flag: str, asked: str, whole: int) -> int:
    """Bytes of "500MB", "2GiB", "0", or a share of `whole` such as "30%".

    Raises:
        SdfpError: For anything else, naming `flag`.
    """
    found = _AMOUNT.fullmatch(asked.strip())
    if not found or (found[2] is None and float(found[1])):
        raise SdfpError(flag, f"{asked!r} is no amount of memory", "Give one such as 500MB, 2GiB, 30% or 0.")
    number, unit = float(found[1]), (found[2] or "B").upper()
    return int(whole * number / 100 if unit == "%" else number * _UNIT[unit])
