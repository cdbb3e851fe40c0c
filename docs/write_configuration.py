"""Write docs/configuration.md from the declarations in salt_wds/config.py and salt_wds/probe/config.py.

python docs/write_configuration.py
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from salt_wds.config import Config, Section, resume_rules
from salt_wds.probe.config import ProbeConfig

PAGE = Path(__file__).parent / "configuration.md"
INTRODUCTION = """# Configuration

A run is described by one TOML file; [configs/](../configs) has some to start from. Every key below may stand in the
file or on the command line, which takes precedence:

    salt-wds train --config configs/base.toml --set data.shards=/mnt/ssv2/shards --set optim.lr=3e-4

Values of `--set` are TOML (`3`, `true`, `[0.5, 1.0]`); anything else is taken as a string. `~` is expanded in paths. An
unknown key, a wrong type or a value out of range ends the command with exit code 2 and one line that names the file,
the key and the nearest valid key. The run keeps its resolved configuration in `config.toml` of its folder.

"On resume" says whether `--resume` accepts another value than the run had: *yes*, *warns* (accepted with a warning),
or *no* (refused).

This page is generated: `python docs/write_configuration.py`. Edit the keys in `salt_wds/config.py`.
"""
PROBE = """
# Configuration of a probe

For `salt-wds probe --config FILE --run RUN`. What else a clip is (frames, size, precision, decoder) comes from the
configuration of the run.
"""


def page() -> str:
    """The whole page."""
    return INTRODUCTION + _sections(Config, resume=True) + PROBE + _sections(ProbeConfig, resume=False)


def meanings(root: type[Section]) -> dict[tuple[str, str], str]:
    """The docstring below each key, by the name of the class and of the key."""
    found = {}
    for statement in ast.parse(inspect.getsource(sys.modules[root.__module__])).body:
        if isinstance(statement, ast.ClassDef):
            for key, text in zip(statement.body, statement.body[1:], strict=False):
                if (
                    isinstance(key, ast.AnnAssign)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                ):
                    found[statement.name, ast.unparse(key.target)] = " ".join(str(text.value.value).split())
    return found


def _sections(root: type[Section], resume: bool) -> str:
    schema = root.model_json_schema()
    rules = {key: {"MAY_CHANGE": "yes", "WARN": "warns"}[mark.name] for key, mark in resume_rules().items()}
    text, texts = "", meanings(root)
    keys = {name: value for name, value in schema["properties"].items() if name not in _keys_by_section(schema)}
    for section, properties in [("", keys), *_keys_by_section(schema).items()]:
        if not properties:
            continue
        text += f"\n## {f'[{section}]' if section else 'Top level'}\n\n"
        text += "| key | value | default |" + (" on resume |" if resume else "") + " meaning |\n"
        text += "| --- " * (5 if resume else 4) + "|\n"
        for name, value in properties.items():
            dotted = f"{section}.{name}" if section else name
            default = _toml(value["default"]) if "default" in value else "*required*"
            cells = [f"`{name}`", _value(value), default, *([rules.get(dotted, "no")] if resume else [])]
            cells.append(texts[_class(schema, section) or root.__name__, name])
            text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def _class(schema: dict[str, Any], section: str) -> str:
    """The name of a section's class; "" for a key outside of any section."""
    return str(schema["properties"].get(section, {}).get("$ref", "")).rpartition("/")[2]


def _keys_by_section(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The keys of each section by its name."""
    names = [name for name in schema["properties"] if _class(schema, name)]
    return {name: schema["$defs"][_class(schema, name)]["properties"] for name in names}


def _value(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_value(part) for part in schema["anyOf"] if part.get("type") != "null"))
    if "const" in schema:
        return _toml(schema["const"])
    if "enum" in schema:
        return ", ".join(map(_toml, schema["enum"]))
    if schema["type"] == "array":
        parts = schema.get("prefixItems")
        return f"[{', '.join(map(_value, parts))}]" if parts else f"list of {_value(schema['items'])}"
    names = {"integer": "int", "number": "float", "string": "string", "boolean": "`true`, `false`"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join([names[schema["type"]], *(f"{sign} {schema[k]}" for k, sign in bounds.items() if k in schema)])


def _toml(value: object) -> str:
    return "unset" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
