"""What papermill and YAML do to parameters on their way into a notebook, found and undone.

Papermill injects a misspelt name as happily as a right one, and `-p use_amp false` as the string
"false" (which is true); YAML 1.1 reads `1e-3` as a string. Only these known spellings are undone,
and only where the string itself would be refused.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

_SHELL = frozenset({"In", "Out", "exit", "quit", "open", "get_ipython"})  # IPython's own names
_SPELLINGS: dict[str, bool | None] = {"false": False, "true": True, "null": None, "none": None}
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def strangers(namespace: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """Return the simple values in a notebook's globals that are none of the `known` parameters.

    When a cell is run again in JupyterLab, later cells have left names of their own; therefore,
    where there is a history, only names from cells of plain assignments count: the parameters cell
    and papermill's injected one.
    """
    history = [source for source in namespace.get("In", []) if source]
    assigned = {name for source in history for name in assigned_names(source)}
    return {
        name: value
        for name, value in namespace.items()
        if not (name in known or name in _SHELL or name.startswith("_"))
        and isinstance(value, bool | int | float | str | list | tuple | dict | None)
        and (not history or name in assigned)
    }


def assigned_names(source: str) -> list[str]:
    """Return the names that a cell assigns if it does nothing but assign literals, else nothing."""
    try:
        return [_literal_assignment(statement) for statement in ast.parse(source).body]
    except (SyntaxError, ValueError):  # a magic, a call, an import
        return []


def _literal_assignment(statement: ast.stmt) -> str:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            pass
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            pass
        case _:
            raise ValueError("not an assignment to a name")
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "float"):  # float('nan')
        ast.literal_eval(value)
    return name


def respelt(value: Any, annotation: Any) -> Any:
    """Return what a known misspelling stood for, if only that fits the type; else `value`."""
    if not isinstance(value, str) or _accepts(annotation, value):
        return value
    candidate: Any = value
    if value in _SPELLINGS:
        candidate = _SPELLINGS[value]
    elif _EXPONENT.fullmatch(value):
        candidate = float(value)
    elif value.startswith("[") and value.endswith("]"):
        try:
            candidate = json.loads(value)
        except json.JSONDecodeError:
            return value
    return candidate if _accepts(annotation, candidate) else value


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True
