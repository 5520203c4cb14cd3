"""Every error attncc raises on purpose. The message template stands on the class; each says what is wrong and what would be right."""

from __future__ import annotations


class AttnccError(Exception):
    """Base of all errors of attncc."""


class PredicateError(AttnccError, ValueError):
    """Predicate text outside the grammar."""


class SpecError(AttnccError, ValueError):
    """A spec that contradicts itself; names the field."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class GraphError(AttnccError, ValueError):
    """A graph that its stage does not allow; the text of the graph follows, the culprit marked."""


class UnsupportedError(AttnccError, NotImplementedError):
    """What this target or backend cannot do, why, and the nearest spec that it can."""

    def __init__(self, what: str, reason: str, nearest: str) -> None:
        super().__init__(f"{what} is not supported: {reason}. Nearest supported: {nearest}.")


class TargetError(AttnccError, ValueError):
    """An unknown target, or a description of one that is impossible; names the field."""


class InputError(AttnccError, ValueError):
    """A tensor or argument of a kernel call that does not fit its spec; names the argument."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument


class PlanError(AttnccError, ValueError):
    """A plan that does not belong to the spec or target it is used with."""


class CacheError(AttnccError, OSError):
    """A cache entry that cannot be trusted, or a cache directory that cannot be used."""
