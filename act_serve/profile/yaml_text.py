"""YAML that users write, in which no key may stand twice: YAML's own readers keep the last one and say nothing."""

from collections.abc import Iterator
from typing import Any

import yaml

Node = yaml.Node


class RepeatedKeyError(yaml.MarkedYAMLError):
    """A key stands twice in one mapping: `problem` names it, `problem_mark` is the place of the second one."""


def parse_yaml(text: str | bytes) -> tuple[Any, Node | None]:
    """Returns what a YAML text says, and its root node, which knows the lines; both are None for an empty text.

    Raises yaml.YAMLError: RepeatedKeyError where a key stands twice in one mapping.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        for mapping in _mappings(root, set()):
            _check_keys(mapping)
        return loader.construct_document(root), root
    finally:
        loader.dispose()


def _mappings(node: Node, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """Every mapping in the node, once: an alias is the node that it stands for."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        for pair in node.value:
            for part in pair:
                yield from _mappings(part, seen)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _mappings(part, seen)


def _check_keys(mapping: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = key.tag, key.value
        if name in lines:
            problem = f"the key `{key.value}` stands in line {lines[name]} already; keep one of the two"
            raise RepeatedKeyError(problem=problem, problem_mark=key.start_mark)
        lines[name] = key.start_mark.line + 1
