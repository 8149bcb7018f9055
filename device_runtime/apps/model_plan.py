"""What an engine would take of the memory of this machine, before anything is loaded."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict

from device_runtime.apps.model_facts import Line
from device_runtime.backends.memory_plan import MemoryPlan, cache_tokens, plan_memory
from device_runtime.backends.select import create_backend
from device_runtime.engine.board_plan import single_session
from device_runtime.engine.configure import cache_request
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import DeviceError, PackageError
from device_runtime.package_format.amounts import format_bytes
from device_runtime.package_format.package import Package


def plan_here(package: Package, options: EngineOptions) -> tuple[MemoryPlan, int]:
    """Return the plan an engine would start with now; loads and allocates nothing.

    Returns:
        The plan, and the tokens of the longest conversation that fits when it runs alone.

    Raises:
        PackageError: the package asks for a KV format that it or this turbojet does not have.
        DeviceError: the model does not fit, or the backend does not run here.
    """
    model, limit = package.model, options.memory_limit_bytes
    with closing(create_backend(options.backend, package)) as backend:
        request = cache_request(package, options)
        plan = plan_memory(model, request, backend.survey(package, request, limit))
        alone = single_session(model, request)
        fitting = cache_tokens(model, alone, backend.survey(package, alone, limit))
        return plan, min(fitting, model.context_tokens)


def plan_facts(package: Package, options: EngineOptions) -> dict[str, object]:
    """Return the plan as JSON values, or why there is none."""
    try:
        plan, longest = plan_here(package, options)
    except (PackageError, DeviceError) as error:
        return {"error": str(error)}
    return {**plan_values(plan), "longest_session_tokens": longest}


def plan_values(plan: MemoryPlan) -> dict[str, object]:
    """Return a plan as JSON values."""
    return asdict(plan) | {
        "kv_format": plan.kv_format.title,
        "kv_bytes": plan.kv_bytes,
        "total_bytes": plan.total_bytes,
    }


def plan_lines(package: Package, options: EngineOptions) -> list[Line]:
    """Return the plan as lines, or why there is none."""
    try:
        plan, longest = plan_here(package, options)
    except (PackageError, DeviceError) as error:
        return [Line("here", str(error))]
    lines = [
        Line("here", memory_text(plan, context="context")),
        Line(
            "",
            f"{plan.kv_format.title} KV; sessions of {plan.session_len} tokens, up to "
            f"{plan.max_batch_size} at a time",
        ),
        Line("", f"alone a conversation can have {longest} tokens here"),
    ]
    if plan.backend != "cuda" and options.backend == "auto":
        lines.append(Line("", "no GPU is used here; --board NAME shows the plan on a Jetson"))
    return lines + [Line("", note) for note in plan.notes]


def memory_text(plan: MemoryPlan, *, context: str) -> str:
    """Return how a plan shares out memory; ``context`` is what its context_bytes are called."""
    parts = [("weights", plan.weight_bytes), ("workspace", plan.workspace_bytes)]
    if plan.context_bytes:
        parts.append((context, plan.context_bytes))
    taken = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts)
    return (
        f"{plan.backend}: {taken} + KV {plan.num_pages} x {format_bytes(plan.page_bytes)} = "
        f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.available_bytes)} available"
    )
