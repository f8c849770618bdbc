"""Reads YAML with bounds on its size (of the file, and of what aliases and merges expand to), and remembers lines."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, cast

import yaml

_MAX_BYTES = 64 * 2**10
_MAX_VALUES = 20_000

# The keys and indexes that lead to a value in the file.
Place: TypeAlias = tuple[int | str, ...]


class YamlTooLarge(ValueError):  # noqa: N818 - it names what is wrong
    """The file is too large, or expands to too much; the text says which."""


@dataclass(frozen=True)
class RepeatedKey:
    """A key that its mapping already has, with the line of the first one."""

    place: Place
    first_line: int


@dataclass(frozen=True)
class YamlLines:
    """Where each value of a file begins, counting lines from 1, and which keys are repeated."""

    at: Mapping[Place, int] = field(default_factory=dict[Place, int])
    repeats: tuple[RepeatedKey, ...] = ()

    def of(self, place: Place) -> int | None:
        """The line of ``place``, or of the closest section around it that is in the file; None for the whole file."""
        for length in range(len(place), 0, -1):
            *section, name = place[:length]
            for spelling in (name, str(name).replace("_", "-")):
                if (line := self.at.get((*section, spelling))) is not None:
                    return line
        return None


@dataclass(frozen=True)
class YamlContent:
    """What a file says, and in which lines."""

    value: object
    lines: YamlLines = field(default_factory=YamlLines)


def read_yaml(path: Path) -> YamlContent:
    """The content of ``path``. Raises OSError, YamlTooLarge, yaml.YAMLError, and what PyYAML lets escape."""
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise YamlTooLarge(f"larger than {_MAX_BYTES // 2**10} KiB")
    loader = yaml.SafeLoader(content.decode("utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlContent(None)
        if _values(node, {}) > _MAX_VALUES:
            raise YamlTooLarge(f"more than {_MAX_VALUES:,} values, with its aliases written out")
        lines = _lines(node)  # before construction, which merges mappings in place
        value = cast("object", loader.construct_document(node))  # pyright: ignore[reportUnknownMemberType]
        return YamlContent(value, lines)
    finally:
        loader.dispose()


def _lines(root: yaml.Node) -> YamlLines:
    at: dict[Place, int] = {}
    repeats: dict[Place, RepeatedKey] = {}
    for place, line in _places(root, ()):
        # What is below a repeated section is repeated with it.
        if place in at and not any(place[:length] in repeats for length in range(1, len(place) + 1)):
            repeats[place] = RepeatedKey(place, at[place])
        at[place] = line
    return YamlLines(at, tuple(repeats.values()))


def _places(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    """Every key and every item below ``node``, with its line; aliases of a value that contains them end there."""
    if len(place) > _MAX_DEPTH:
        return
    children: list[tuple[int | str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.SequenceNode):
        items = cast("list[yaml.Node]", node.value)
        children = [(index, item, item) for index, item in enumerate(items)]
    elif isinstance(node, yaml.MappingNode):
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        children = [(str(cast("object", key.value)), key, value) for key, value in pairs]
    for name, where, child in children:
        below = (*place, name)
        yield below, where.start_mark.line + 1
        yield from _places(child, below)


# The file's fields are at most this deep; deeper values are no mistakes with a line of their own.
_MAX_DEPTH = 8


def _values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """The number of values in ``node`` with every alias written out."""
    if node in known:
        return known[node]
    known[node] = _MAX_VALUES + 1  # if it contains itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = cast("list[yaml.Node]", node.value)
    elif isinstance(node, yaml.MappingNode):
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        children = [one for pair in pairs for one in pair]
    known[node] = 1 + sum(_values(child, known) for child in children)
    return known[node]
