"""What a docstring says, section by section, for the tests of the packages' faces."""

from __future__ import annotations

import re


def sections(text: str | None) -> dict[str, list[str]]:
    """Return the sections of a cleaned docstring, each with the names or the first words of its entries."""
    parts = re.split(r"^(Args|Returns|Yields|Raises):\n", text or "", flags=re.M)
    names = re.compile(r"^    (\*{0,2}\w[\w.*]*)", flags=re.M)
    return {name: names.findall(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
