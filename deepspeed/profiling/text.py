"""A profile as text: a summary, the heaviest modules of each depth, the whole tree. Pure."""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.profiling.counter import Phase
from deepspeed.profiling.tree import ModuleProfile, Profile
from deepspeed.utils.figures import number, seconds

RULE = "-" * 100


def summary(profile: Profile) -> str:
    """The model as a whole."""
    root = profile.root
    lines: list[tuple[str, str]] = [("parameters", number(root.all_params))]
    if round(root.all_active_params) != root.all_params:
        lines.append(("parameters that a token meets", number(root.all_active_params)))
    lines += [
        ("multiply-adds of forward", number(root.macs, "MACs")),
        ("operations of forward", number(root.flops, "FLOPs")),
    ]
    if profile.saw_backward:
        lines += [
            ("operations of backward", number(root.total(Phase.BACKWARD), "FLOPs")),
            ("repeated in backward, on top of these", number(root.total(Phase.RECOMPUTE), "FLOPs")),
        ]
    if profile.update_flops:
        lines.append(("operations of the update", number(profile.update_flops, "FLOPs")))
    kind = "" if profile.saw_backward else ", backward estimated"
    lines.append((f"operations of a step{kind}", number(profile.step_flops, "FLOPs")))
    for name, value in (
        ("forward", root.forward_s),
        ("backward", root.backward_s),
        ("update, with its communication", profile.update_s),
    ):
        if value:
            lines.append((f"time of {name}", seconds(value)))
    if root.forward_s:
        lines.append(("speed of forward", number(root.flops / root.forward_s, "FLOPS")))
    if root.backward_s and profile.saw_backward:
        backward = root.total(Phase.BACKWARD) + root.total(Phase.RECOMPUTE)
        lines.append(("speed of backward", number(backward / root.backward_s, "FLOPS")))
    if profile.peak_flops:
        lines.append(("measured peak of the device", number(profile.peak_flops, "FLOPS")))
    if profile.utilisation is not None:
        lines.append(("utilisation in forward", f"{profile.utilisation:.1%}"))
    return "\n".join(f"{name + ':':<44}{value}" for name, value in lines)


def aggregated(profile: Profile, module_depth: int = -1, top_modules: int = 1) -> str:
    """The heaviest classes of modules, per depth down to `module_depth` (-1: the deepest): by parameters, MACs, time."""
    deepest = max(module.depth for module in profile.root.walk())
    lines = []
    for depth in range(0, (deepest if module_depth < 0 else min(module_depth, deepest)) + 1):
        kinds: dict[str, list[ModuleProfile]] = {}
        for module in profile.root.walk():
            if module.depth == depth:
                kinds.setdefault(module.kind.partition("(")[0], []).append(module)
        lines.append(f"depth {depth}:")
        for name, of, show in _MEASURES:
            sums = {kind: sum(of(module) for module in modules) for kind, modules in kinds.items()}
            best = sorted(sums.items(), key=lambda item: -item[1])[:top_modules]
            lines.append(f"    {name:<12}" + ", ".join(f"{kind} {show(value)}" for kind, value in best))
    return "\n".join(lines)


_MEASURES: tuple[tuple[str, Callable[[ModuleProfile], float], Callable[[float], str]], ...] = (
    ("parameters", lambda module: module.all_params, number),
    ("MACs", lambda module: module.macs, lambda value: number(value, "MACs")),
    ("forward", lambda module: module.forward_s, seconds),
)


def tree(profile: Profile, module_depth: int = -1) -> str:
    """A line per module: shares of the whole in brackets."""
    root = profile.root
    lines = []
    for module in root.walk():
        if 0 <= module_depth < module.depth:
            continue
        parts = [
            f"{number(module.all_params)} params ({_share(module.all_params, root.all_params)})",
            f"{number(module.macs, 'MACs')} ({_share(module.macs, root.macs)})",
        ]
        if profile.saw_backward:
            parts.append(f"backward {number(module.total(Phase.BACKWARD), 'FLOPs')}")
        if module.total(Phase.RECOMPUTE):
            parts.append(f"repeated {number(module.total(Phase.RECOMPUTE), 'FLOPs')}")
        if module.forward_s:
            parts.append(f"forward {seconds(module.forward_s)} ({_share(module.forward_s, root.forward_s)})")
            if module.flops:
                parts.append(number(module.flops / module.forward_s, "FLOPS"))
        if module.backward_s:
            parts.append(f"backward {seconds(module.backward_s)}")
        if module.num_calls != 1:
            parts.append(f"{module.num_calls} calls")
        lines.append(f"{'  ' * module.depth}({module.name}) {module.kind}: {', '.join(parts)}")
    return "\n".join(lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0 %"


def report(profile: Profile, *, module_depth: int = -1, top_modules: int = 1, detailed: bool = True) -> str:
    """The whole text."""
    parts = [f"DeepSpeed flops profile{': ' + profile.title if profile.title else ''}", summary(profile)]
    parts += ["Heaviest modules", aggregated(profile, module_depth, top_modules)]
    if detailed:
        parts += ["Every module, with what is below it", tree(profile, module_depth)]
    return f"\n{RULE}\n".join(["", *parts, ""])
