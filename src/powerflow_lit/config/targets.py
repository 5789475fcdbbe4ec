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
DATACLASS = ("dataclass", "dataclasses.dataclass")
# what leaves the parameters as they are written; the last is Lightning's, of its Trainer
HARMLESS_DECORATORS = (
    *DATACLASS, "final", "typing.final", "runtime_checkable", "typing.runtime_checkable",
    "override", "typing.override", "cache", "functools.cache", "lru_cache", "functools.lru_cache",
    "torch.no_grad", "torch.inference_mode", "_defaults_from_env_vars",
)  # fmt: skip
HARMLESS_BASES = (
    "object", "ABC", "abc.ABC", "Protocol", "typing.Protocol", "Generic", "typing.Generic",
    "nn.Module", "torch.nn.Module",
)  # fmt: skip
HARMLESS_METACLASSES = ("ABCMeta", "abc.ABCMeta")
CHANGES_CALLS = ("__new__", "__init_subclass__")


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
    """The parameters of a dotted path's class or function.

    None where they cannot be told for sure from the source: behind a decorator or a metaclass that
    is not known, with several bases, overloads or a `__new__`.
    """
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
    found = [s for s in _body(module.file) if name in _bound(s)]
    if len(found) != 1:  # of several it is not known which one holds
        raise LookupError(name)
    statement = found[0]
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return module, statement
    if isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            if (alias.asname or alias.name) == name:
                return _found(f"{_source(module, statement)}.{alias.name}", depth - 1)
    raise LookupError(name)


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement gives a value to."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


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
    return _of_class(module, node, depth)


def _of_class(module: _Module, node: ast.ClassDef, depth: int) -> Signature:
    _require_harmless(node.decorator_list, HARMLESS_DECORATORS)
    if any(keyword.arg != "metaclass" for keyword in node.keywords):
        raise LookupError  # of __init_subclass__
    _require_harmless([keyword.value for keyword in node.keywords], HARMLESS_METACLASSES)
    body = list(_statements(node.body))
    if any(name in CHANGES_CALLS for statement in body for name in _bound(statement)):
        raise LookupError
    base = _base(module, node, depth)  # looked at in any case, for its metaclass
    inherited = _signature(*base, depth - 1) if base else Signature((), is_open=False)
    inits = [statement for statement in body if "__init__" in _bound(statement)]
    if inits:
        if len(inits) > 1 or not isinstance(inits[0], ast.FunctionDef):
            raise LookupError
        return _of_function(inits[0], skip=1)
    decorator = next((d for d in node.decorator_list if _dotted(d) in DATACLASS), None)
    if decorator is None:
        return inherited
    if "init" in [k.arg for k in getattr(decorator, "keywords", [])]:
        raise LookupError
    if base and "__init__" in [n for s in getattr(base[1], "body", []) for n in _bound(s)]:
        raise LookupError  # the parameters of a base's own __init__ are not its fields
    fields = [
        s.target.id
        for s in body
        if isinstance(s, ast.AnnAssign)
        and isinstance(s.target, ast.Name)
        and "ClassVar" not in ast.dump(s.annotation)
    ]
    return Signature(tuple(dict.fromkeys([*inherited.names, *fields])), inherited.is_open)


def _base(module: _Module, node: ast.ClassDef, depth: int) -> tuple[_Module, ast.ClassDef] | None:
    """The one base class that may have parameters; LookupError where there are several."""
    bases = [base for base in node.bases if _dotted(base) not in HARMLESS_BASES]
    if not bases:
        return None
    if len(bases) > 1 or not isinstance(bases[0], ast.Name):
        raise LookupError
    home, found = _defined(module, bases[0].id, depth)
    if not isinstance(found, ast.ClassDef):  # such as typing.NamedTuple
        raise LookupError
    return home, found


def _of_function(node: ast.FunctionDef, *, skip: int) -> Signature:
    _require_harmless(node.decorator_list, HARMLESS_DECORATORS)
    arguments = node.args
    names = [a.arg for a in [*arguments.posonlyargs, *arguments.args][skip:]]
    names += [a.arg for a in arguments.kwonlyargs]
    return Signature(tuple(names), is_open=arguments.kwarg is not None)


def _require_harmless(nodes: Sequence[ast.expr], known: Sequence[str]) -> None:
    if any(_dotted(node) not in known for node in nodes):
        raise LookupError


def _dotted(node: ast.expr) -> str:
    """A name as it is written, without its call or its type parameters."""
    if isinstance(node, ast.Call):
        node = node.func
    elif isinstance(node, ast.Subscript):
        node = node.value
    return ast.unparse(node)
