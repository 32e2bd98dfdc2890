"""Which nodes of a graph run elsewhere than asked for: ONNX Runtime runs on the CPU what it has no kernel for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime.library import PROVIDERS, Provider

_log = logging.getLogger(__name__)

# Small enough for the host, and on it by design: shapes, and what is computed with them, and with tokens.
LIGHT = frozenset(
    {
        "Add",
        "ArgMax",
        "Cast",
        "Concat",
        "ConstantOfShape",
        "Div",
        "Equal",
        "Expand",
        "Gather",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Range",
        "ReduceProd",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Unsqueeze",
        "Where",
    }
)


def record_assignment(options: Any) -> None:
    """Have a session that is yet to be opened remember which node runs where, for `check_assignment`."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def elsewhere(session: Any, provider: Provider) -> Mapping[str, str]:
    """Return the nodes that run on another provider, shapes' arithmetic left out: {name: operator}."""
    parts = session.get_provider_graph_assignment_info()
    nodes = [node for part in parts if part.ep_name != PROVIDERS[provider] for node in part.get_nodes()]
    return {node.name: node.op_type for node in nodes if node.op_type not in LIGHT}


def check_assignment(session: Any, provider: Provider, what: str) -> None:
    """Raise EngineError where operators would run on another device than the one asked for, which nobody wants.

    what: the graph, as an error names it
    """
    if found := elsewhere(session, provider):
        operators, name = ", ".join(sorted(set(found.values()))), next(iter(found))
        raise EngineError(
            f"this ONNX Runtime has no {operators} for its {PROVIDERS[provider]} and would run {len(found)} nodes of "
            f"{what} on the CPU ({name}, …); install a newer one with: pip install --upgrade 'latentrt[cuda]', or use "
            "--backend tensorrt"
        )
