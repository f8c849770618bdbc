"""Variables in command lines: those of a shell, of Compose, and of Kubernetes. Nothing is ever executed. Pure."""

import re
from collections.abc import Mapping

# $(NAME) in Kubernetes, $(command) in a shell; then ${NAME}, ${NAME:-default} and $NAME.
_REFERENCE = re.compile(
    r"\$\$"
    r"|\$\((?P<inner>[^()]*)\)"
    r"|\$\{(?P<braced>[A-Za-z_]\w*)(?:(?P<how>:?[-?+])(?P<other>[^{}]*))?\}"
    r"|\$(?P<plain>[A-Za-z_]\w*|[@*#?0-9])"
    r"|`[^`]*`"
)
_NAME = re.compile(r"[A-Za-z_]\w*")


def substituted(text: str, values: Mapping[str, str | None]) -> tuple[str, tuple[str, ...]]:
    """``text`` with its variables replaced, and the references that have no value and are left as they are."""
    missing: list[str] = []

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name = found["braced"] or found["plain"] or _kubernetes_name(found["inner"])
        known = values.get(name) if name else None
        if known is not None and (known or not (found["how"] or "").startswith(":")):
            return (found["other"] or "") if (found["how"] or "").endswith("+") else known
        if (found["how"] or "").endswith("-"):
            return found["other"] or ""
        missing.append(found[0])
        return found[0]

    return _REFERENCE.sub(value, text), tuple(missing)


def _kubernetes_name(inner: str | None) -> str:
    return inner if inner and _NAME.fullmatch(inner) else ""
