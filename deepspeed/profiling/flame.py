"""A profile as a flame chart: one HTML file that needs nothing else, with a bar per module below its parent's. Pure.

Width is the module's share of the operations (or of the parameters, or of the time, where it was taken); a click on a bar makes it
the whole. `flame.html` is the page, this fills it.
"""

from __future__ import annotations

import html
import json
from importlib import resources

from deepspeed.profiling.tree import Profile
from deepspeed.utils.figures import number, seconds


def flame_chart(profile: Profile) -> str:
    """The page."""
    root = profile.root
    parts = [f"{number(root.all_params)} parameters", f"{number(profile.step_flops, 'FLOPs')} per step"]
    parts += [f"forward {seconds(root.forward_s)}"] if root.forward_s else []
    parts += [f"utilisation {profile.utilisation:.0%}"] if profile.utilisation is not None else []
    names = {"flops": "Operations", "params": "Parameters"} | ({"time": "Time"} if root.forward_s else {})
    buttons = " ".join(f'<button data-by="{key}">{name}</button>' for key, name in names.items())
    data = json.dumps(root.as_dict()).replace("<", "\\u003c")
    title = html.escape(profile.title or f"Flops profile of {root.name}")
    template = resources.files("deepspeed.profiling").joinpath("flame.html").read_text(encoding="utf-8")
    page = template.replace("__TITLE__", title).replace("__SUMMARY__", html.escape(" · ".join(parts)))
    return page.replace("__BUTTONS__", buttons).replace("__DATA__", data)
