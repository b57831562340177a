"""What a check tells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at.
        told: what was found.
        fix: what to do about it; empty when all is well.
    """

    check: str
    told: str
    fix: str = ""

    @property
    def ok(self) -> bool:
        return not self.fix

    def line(self) -> str:
        return f"✓ {self.check}: {self.told}" if self.ok else f"✗ {self.check}: {self.told}; {self.fix}"

    def to_json(self) -> dict[str, object]:
        return {"check": self.check, "ok": self.ok, "told": self.told, "fix": self.fix}


def gigabytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
