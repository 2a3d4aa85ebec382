"""The implementations by name, and how "auto" chooses among them.

Each is a module or object with `not_supported_reasons(inputs)`, `run(inputs) -> (out, lse)`, differentiable, and, where
the forward's results suffice for it, `gradients(inputs, out, lse, grad_out, grad_lse)` of the six `inputs.tensors`, and
`widened(inputs)`, the inputs whose forward these gradients are of.
"""

from collections.abc import Callable
from typing import Any

from . import blocked, native, reference, triton
from .inputs import LambdaInputs
from .vendors import VENDORS

IMPLEMENTATIONS: dict[str, Any] = {
    "triton": triton,
    "native": native,
    "blocked": blocked,
    **VENDORS,
    "reference": reference,
}
# best first, with what "auto" asks of each besides being able
AUTO: dict[str, Callable[[LambdaInputs], bool]] = {
    "triton": lambda inputs: inputs.query.is_cuda,  # interpreted Triton is slow
    "native": native.worthwhile,
    "blocked": lambda inputs: True,
}


def reasons_against(implementation: str, inputs: LambdaInputs) -> list[str]:
    """Every reason why `implementation` cannot run these inputs; empty if it can."""
    if implementation not in IMPLEMENTATIONS:
        return [f"unknown; known are auto, {', '.join(IMPLEMENTATIONS)}"]
    return IMPLEMENTATIONS[implementation].not_supported_reasons(inputs)


def choose(implementation: str, inputs: LambdaInputs) -> str:
    """The name of what runs: the one asked for, or for "auto" the first of AUTO that can. Raises ValueError if none."""
    if implementation == "auto":
        return next(name for name, wanted in AUTO.items() if wanted(inputs) and not reasons_against(name, inputs))
    if reasons := reasons_against(implementation, inputs):
        raise ValueError(f"lambda_attention: implementation {implementation!r} cannot run: " + "; ".join(reasons))
    return implementation


def explanation(inputs: LambdaInputs) -> str:
    """What "auto" runs for these inputs and why it passed over the others, one line each."""
    chosen = choose("auto", inputs)
    detail = IMPLEMENTATIONS[chosen]
    lines = [f"auto runs {chosen}" + (f": {detail.explanation(inputs)}" if hasattr(detail, "explanation") else "")]
    for name in IMPLEMENTATIONS:
        if name != chosen:
            reasons = reasons_against(name, inputs)
            if not reasons:
                reasons = [f"could run, {chosen} is preferred" if name in AUTO else "only runs when asked for by name"]
            lines.append(f"not {name}: " + "; ".join(reasons))
    return "\n".join(lines)
