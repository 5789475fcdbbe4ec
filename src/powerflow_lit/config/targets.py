"""What a `_target_` may be given, read from its source: nothing is imported to find out."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from powerflow_lit.config.rules import ConfigError, listed, nearest

DEPTH = 12  # re-exports and base classes that are followed


@dataclass(frozen=True)
class Signature:
    """The parameters of a class or function."""

    names: tuple[str, ...]
    is_open: bool  # it takes any others too


def check_targets(node: Any, name: str = "") -> None:
    """Refuse keys beside a `_target_` that it would not take.

    Args:
        node: a plain configuration, or a part of one.
        name: its dotted key.

    Raises:
        ConfigError: with the nearest parameter. A target whose source cannot be read is left for
            its call to refuse.
    """
    if isinstance(node, list):
        for place, value in enumerate(node):
            check_targets(value, f"{name}[{place}]")
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        check_targets(value, f"{name}.{key}" if name else str(key))
    target = node.get("_target_")
    signature = signature_of(target) if isinstance(target, str) else None
    if signature is None or signature.is_open:
        return
    for key in map(str, node):
        if key.startswith("_") or key in signature.names:
            continue
        close = nearest(key, signature.names)
        known = listed(signature.names) or "no key at all"
        hint = f"did you mean {name}.{close}?" if close else f"{target} takes {known}"
        raise ConfigError(f"unknown key '{name}.{key}': {hint}")


@cache
def signature_of(target: str) -> Signature | None:
    """The parameters of a dotted path's class or function; None where they cannot be read."""
    try:
        return _signature(*_found(target, DEPTH), DEPTH)
    except (LookupError, OSError, SyntaxError, ValueError, ImportError):
        return None


@dataclass(frozen=True)
class _Module:
    """A source file and the package that its relative imports start from."""

    name: str
    file: Path

    @property
    def package(self) -> str:
        return self.name if self.file.name == "__init__.py" else self.name.rpartition(".")[0]


def _found(target: str, depth: int) -> tuple[_Module, ast.AST]:
    """The definition of a dotted path, through the imports of the modules that it names."""
    if depth == 0:
        raise LookupError(target)
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = _module(parts[:cut])
        if module is not None:
            if len(parts) - cut != 1:
                raise LookupError(target)
            return _defined(module, parts[cut], depth)
    raise LookupError(target)


@cache
def _body(file: Path) -> list[ast.stmt]:
    return list(_statements(ast.parse(file.read_text()).body))


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, those under `if` and `try` included."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                for inner in getattr(statement, block, []):
                    yield from _statements(inner.body if hasattr(inner, "body") else [inner])


def _defined(module: _Module, name: str, depth: int) -> tuple[_Module, ast.AST]:
    for statement in _body(module.file):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
            return module, statement
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    source = _source(module, statement)
                    return _found(f"{source}.{alias.name}", depth - 1)
    raise LookupError(name)


def _source(module: _Module, statement: ast.ImportFrom) -> str:
    if statement.level == 0:
        return statement.module or ""
    package = module.package.split(".")
    above = package[: len(package) - statement.level + 1]
    return ".".join([*above, *([statement.module] if statement.module else [])])


def _module(parts: Sequence[str]) -> _Module | None:
    spec = find_spec(parts[0])  # of a top-level name: nothing is imported
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        file = Path(spec.origin or "")
        return _Module(parts[0], file) if len(parts) == 1 and file.suffix == ".py" else None
    for location in spec.submodule_search_locations:
        base = Path(location, *parts[1:])
        for file in (base / "__init__.py", base.with_name(base.name + ".py")):
            if file.is_file():
                return _Module(".".join(parts), file)
    return None


def _signature(module: _Module, node: ast.AST, depth: int) -> Signature:
    if isinstance(node, ast.FunctionDef):
        return _of_function(node, skip=0)
    if not isinstance(node, ast.ClassDef) or depth == 0:
        raise LookupError
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return _of_function(statement, skip=1)
    inherited = Signature((), is_open=False)
    for base in node.bases:
        if isinstance(base, ast.Attribute) and base.attr == "Module":
            continue  # torch's, which takes nothing
        if not isinstance(base, ast.Name):
            raise LookupError
        if base.id not in ("ABC", "Protocol", "object"):
            inherited = _signature(*_defined(module, base.id, depth), depth - 1)
    if not any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list):
        return inherited
    fields = [
        s.target.id
        for s in node.body
        if isinstance(s, ast.AnnAssign)
        and isinstance(s.target, ast.Name)
        and "ClassVar" not in ast.dump(s.annotation)
    ]
    return Signature((*inherited.names, *fields), inherited.is_open)


def _of_function(node: ast.FunctionDef, *, skip: int) -> Signature:
    arguments = node.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args][skip:]]
    names += [a.arg for a in arguments.kwonlyargs]
    return Signature(tuple(names), is_open=arguments.kwarg is not None)
