"""YAML without bombs: how large a document becomes once its aliases are expanded, counted before anything is built.

Covered: aliases, merge keys, documents that contain themselves. Not covered: what the document means.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_EXPANDED_NODES = 200_000


class AliasBombError(yaml.YAMLError):
    """Aliases that expand to more nodes than any honest document has, or that contain themselves."""


def load(text: str, loader_class: Any) -> Any:
    """``yaml.load`` of the first document, refused before it is built where its aliases expand beyond the limit.

    Raises:
        AliasBombError: too large once expanded, or cyclic. yaml.YAMLError: not YAML.
    """
    loader = loader_class(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if "*" in text and "&" in text:
            check_size(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def check_size(root: yaml.Node) -> int:
    """Nodes of the tree that a node stands for, shared ones counted each time.

    Raises:
        AliasBombError: above ``MAX_EXPANDED_NODES``, or a node inside itself.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, children_done = stack.pop()
        key = id(node)
        if key in sizes:
            continue
        if children_done:
            open_nodes.discard(key)
            sizes[key] = 1 + sum(sizes[id(child)] for child in _children(node))
            if sizes[key] > MAX_EXPANDED_NODES:
                raise AliasBombError(f"aliases expand to more than {MAX_EXPANDED_NODES} nodes")
            continue
        if key in open_nodes:
            raise AliasBombError("the document contains itself")
        open_nodes.add(key)
        stack.append((node, True))
        for child in _children(node):
            if id(child) in open_nodes:
                raise AliasBombError("the document contains itself")
            stack.append((child, False))
    return sizes[id(root)]


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return []
