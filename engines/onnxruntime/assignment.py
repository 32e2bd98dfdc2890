"""Which nodes of a graph run elsewhere than asked for: ONNX Runtime runs on the CPU what it has no kernel for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime.library import PROVIDERS, Provider

_log = logging.getLogger(__name__)

# Too heavy for the host: pictures and rows of tokens go through these.
HEAVY = frozenset(
    {
        *("Attention", "MultiHeadAttention", "BiasSplitGelu", "Gelu", "QuickGelu", "Sigmoid", "Softmax"),
        *("Conv", "ConvTranspose", "NhwcConv", "Pad", "Resize", "Transpose"),
        *("FusedMatMul", "Gemm", "MatMul"),
        *("GroupNorm", "GroupNormalization", "InstanceNormalization", "LayerNormalization"),
    }
)
# On the host by design: shapes, and what is computed with them, and with tokens.
LIGHT = frozenset(
    {
        *("Add", "Cast", "Div", "Equal", "Max", "Min", "Mod", "Mul", "Sub", "Where"),
        *("ArgMax", "ReduceProd", "Range", "Shape", "Size"),
        *("Concat", "ConstantOfShape", "Expand", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"),
    }
)


def record_assignment(options: Any) -> None:
    """Have a session that is yet to be opened remember which node runs where, for `check_assignment`."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def elsewhere(session: Any, provider: Provider, *, light: Collection[str] = LIGHT) -> Mapping[str, str]:
    """Return the nodes that run on another provider, `light` operators left out: {name: operator}."""
    parts = session.get_provider_graph_assignment_info()
    nodes = [node for part in parts if part.ep_name != PROVIDERS[provider] for node in part.get_nodes()]
    return {node.name: node.op_type for node in nodes if node.op_type not in light}


def check_assignment(session: Any, provider: Provider, what: str) -> None:
    """Raise EngineError where heavy operators would run on another device than the one asked for; warn of others.

    what: the graph, as it is named
    """
    found = elsewhere(session, provider)
    if heavy := sorted(HEAVY.intersection(found.values())):
        name = next(name for name, operator in found.items() if operator in HEAVY)
        raise EngineError(
            f"this ONNX Runtime has no {', '.join(heavy)} for its {PROVIDERS[provider]} and would run {what}'s on the "
            f"CPU ({name}, …); install a newer one with: pip install --upgrade 'latentrt[cuda]', or use --backend "
            "tensorrt"
        )
    if found:
        operators = ", ".join(sorted(set(found.values())))
        _log.warning("%s: %d nodes (%s) run on the CPU, and the GPU waits for them", what, len(found), operators)
