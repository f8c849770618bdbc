"""Reads YAML with bounds on its size: of the file, and of what aliases and merges expand to."""

from pathlib import Path
from typing import cast

import yaml

_MOST_BYTES = 64 * 2**10
_MOST_VALUES = 20_000


class YamlTooLarge(ValueError):  # noqa: N818 - it names what is wrong
    """The file is too large, or expands to too much; the text says which."""


def read_yaml(path: Path) -> object:
    """The content of ``path``. Raises OSError, YamlTooLarge, yaml.YAMLError, and what PyYAML lets escape."""
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise YamlTooLarge(f"larger than {_MOST_BYTES // 2**10} KiB")
    loader = yaml.SafeLoader(content.decode("utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > _MOST_VALUES:
            raise YamlTooLarge(f"more than {_MOST_VALUES:,} values, with its aliases written out")
        return cast("object", loader.construct_document(node))  # pyright: ignore[reportUnknownMemberType]
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """The number of values in ``node`` with every alias written out."""
    if node in known:
        return known[node]
    known[node] = _MOST_VALUES + 1  # if it contains itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = cast("list[yaml.Node]", node.value)
    elif isinstance(node, yaml.MappingNode):
        pairs = cast("list[tuple[yaml.Node, yaml.Node]]", node.value)
        children = [one for pair in pairs for one in pair]
    known[node] = 1 + sum(_values(child, known) for child in children)
    return known[node]
