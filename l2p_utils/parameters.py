"""Notebook parameters, refused before any work when they are unknown or of the wrong kind.

papermill injects whatever it is given and only warns about a name that the notebook does not have;
a typing mistake would silently run the default.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from l2p_utils.files import UserError

INJECTED = "# Parameters"  # how papermill begins the cell that it adds


def check_parameters(namespace: Mapping[str, Any], **known: type | tuple | Callable) -> None:
    """Check the parameters cell and the cell that papermill injected after it.

    Parameters
    ----------
    namespace
        The notebook's ``globals()``. Its ``In`` (IPython's list of the cells run so far) tells
        which names the cells just before this call assigned.
    **known
        Each parameter with what it must be: a type, a tuple of the values allowed, or a function
        that raises ValueError for a bad value.

    Raises
    ------
    UserError
        Naming every unknown parameter and every bad value, and what was expected.
    """
    problems = []
    unknown = _assigned(namespace.get("In", []), set(known)) - set(known)
    if unknown:
        problems.append(
            f"unknown: {', '.join(sorted(unknown))}. This notebook has: {', '.join(known)}."
        )
    for name, expected in known.items():
        problems += _problem(name, namespace.get(name), expected)
    if problems:
        raise UserError("Parameters refused, nothing was run:\n  " + "\n  ".join(problems))


def _problem(name: str, value: Any, expected: type | tuple | Callable) -> list[str]:
    if isinstance(expected, tuple):
        # 1 == True == 1.0 to Python: the type counts too
        good = any(type(value) is type(allowed) and value == allowed for allowed in expected)
        wanted = f"one of {list(expected)}"
    elif isinstance(expected, type):
        # bool is an int to Python, not to a reader
        good = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
        wanted = f"a value of type {expected.__name__}"
    else:
        try:
            expected(value)
        except (ValueError, TypeError) as error:
            return [f"{name} = {value!r}: {error}"]
        return []
    return [] if good else [f"{name} = {value!r}; expected {wanted}."]


def _assigned(cells: list[str], known: set[str]) -> set[str]:
    """Names assigned by the cells of parameters just before the cell that is running.

    Such a cell holds assignments of literals only, and papermill's comment or a known name: what a
    reader tried out in a cell of its own, before running the check again, is no parameter.
    """
    names: set[str] = set()
    for source in reversed(cells[:-1]):
        found = _literal_assignments(source)
        if not (found & known or (found and source.lstrip().startswith(INJECTED))):
            break
        names |= found
    return names


def _literal_assignments(source: str) -> set[str]:
    """The names to which a cell assigns literals; none when it does anything else."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic command: not a cell of parameters
        return set()
    names = set()
    for statement in statements:
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        named = all(isinstance(target, ast.Name) for target in targets)
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or not named:
            return set()
        if not _is_literal(statement.value):
            return set()
        names |= {target.id for target in targets}
    return names


def _is_literal(value: ast.expr | None) -> bool:
    if value is None:  # `name: int` declares, and assigns nothing
        return False
    try:
        ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value) in ("float('nan')", "float('inf')", "float('-inf')")
    return True
