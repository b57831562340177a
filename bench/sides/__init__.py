"""The libraries that training is compared with, each behind the same few methods; run in their own environments."""

from __future__ import annotations

from bench.sides.setting import Setting, Side, SideClass


def import_side(name: str) -> SideClass:
    """The class of a side; its library is imported only now."""
    match name:
        case "ours":
            from bench.sides.ours import Ours

            return Ours
        case "bound":
            from bench.sides.bound import Bound

            return Bound
        case "saelens":
            from bench.sides.saelens import SaeLens

            return SaeLens
        case "sparsify":
            from bench.sides.eai_sparsify import Sparsify

            return Sparsify
        case "dictionary_learning":
            from bench.sides.dictlearning import DictionaryLearning

            return DictionaryLearning
        case other:
            raise ValueError(f"no side {other}")


def side_of(name: str, setting: Setting) -> Side:
    """The side of that name, about to train."""
    return import_side(name)(setting)
