"""The public interface as data: every public name with its signature, written to and compared with a JSON file.

``python -m tests.model.public_api`` writes ``public_api.json`` anew; its diff is what CHANGELOG.md must tell.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("public_api.json")

# What is promised (docs/versioning.md). A module without __all__ stands with the names that are.
MODULES: dict[str, tuple[str, ...] | None] = {
    "sadcl": None,
    "sadcl.losses": None,
    "sadcl.functional": None,
    "sadcl.attention": ("LabelAttention",),
    "sadcl.model": None,
    "sadcl.metrics": None,
    "sadcl.prototypes": ("build_prototypes",),
    "sadcl.backbones": ("Backbone", "Preprocessing", "build_backbone"),
    "sadcl.checkpoint": ("load_checkpoint", "restore_model", "save_checkpoint", "save_weights", "thresholds_of"),
    "sadcl.commands.export": ("export_checkpoint", "export_model"),
    "sadcl.train.thresholds": None,
    "sadcl.compat": None,
    "sadcl.compat.msc": ("LossContrastiveMSC",),
    "sadcl.compat.mulsupcon": ("MulSupConLoss",),
    "sadcl.compat.multisupcon": ("MultiSupConLoss",),
}


def interface() -> dict[str, Any]:
    """Dotted name -> what is promised of it, for everything public."""
    found: dict[str, Any] = {}
    for module_name, names in MODULES.items():
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__ if names is None else names):
            found[f"{module_name}.{name}"] = _describe(getattr(module, name))
    return found


def _describe(thing: Any) -> Any:
    if not inspect.isclass(thing):
        return _signature(thing) if callable(thing) else repr(thing)
    own = {name: value for cls in reversed(thing.__mro__) if _ours(cls) for name, value in vars(cls).items()}
    members: dict[str, Any] = {"()": _signature(thing)}
    if hasattr(thing, "_fields"):
        members["fields"] = list(thing._fields)
    for name, value in sorted(own.items()):
        if name.startswith("_") or name in ("training", "extra_repr", "get_extra_state", "set_extra_state"):
            continue
        if isinstance(value, property):
            members[name] = "property"
        elif isinstance(value, (classmethod, staticmethod)):
            members[name] = f"{type(value).__name__}{_signature(value.__func__)}"
        elif inspect.isfunction(value):
            members[name] = _signature(value)
    return members


def _ours(cls: type) -> bool:
    return cls.__module__.startswith("sadcl")


def _signature(function: Any) -> str:
    """Names, kinds and defaults; annotations may become more precise without notice."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return "(...)"
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(inspect.Signature(plain))


def difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One sentence for each name that is gone, new, or another."""
    said = [f"{name}: gone" for name in before if name not in now]
    said += [f"{name}: new" for name in now if name not in before]
    for name in before:
        if name not in now or before[name] == now[name]:
            continue
        if isinstance(before[name], dict) and isinstance(now[name], dict):
            said += [f"{name}.{part}" for part in difference(before[name], now[name])]
        else:
            said.append(f"{name}: was {before[name]}, is {now[name]}")
    return said


if __name__ == "__main__":
    FILE.write_text(json.dumps(interface(), indent=1) + "\n")
