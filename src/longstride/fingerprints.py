"""Fingerprints: of the source that a stage can run, so that editing a stage re-runs it and nothing else; of files."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "longstride"
DATA_SUFFIXES = (".html", ".css", ".js", ".json")

# Modules that cannot change a result: what they say, not what is computed. The configuration's values enter a
# job's identity by themselves, so a new key in one section must not re-run the others.
NEUTRAL = frozenset(
    f"{PACKAGE}{name}" for name in ("", ".config", ".errors", ".fingerprints", ".progress", ".provenance", ".stages")
)


def code_version(stage: str, *, source: Path | None = None) -> str:
    """Return a short hash of everything `longstride.stages.<stage>` imports from this package.

    The import closure is found without importing anything: imports inside functions count, imports under
    `if TYPE_CHECKING` do not, nor do comments, docstrings and layout. Package data (such as a template) counts
    where a module of the closure names the file.

    Args:
        stage: a module of `longstride.stages`: prepare, reference, shard, flow, distill, sample_md, ... .
        source: the package folder to look at; the installed one by default.

    Raises:
        ValueError: there is no such stage.
    """
    root = source or Path(__file__).parent
    first = f"{PACKAGE}.stages.{stage}"
    _existing(root, first)
    digest = hashlib.sha256()
    for module in sorted(import_closure(first, source=root) - NEUTRAL):
        path = _existing(root, module)
        digest.update(f"{module}\n{_parsed(path, _stamp(path)).digest}\n".encode())
        for data in _named_data(root, path):
            digest.update(f"{data.name}\n{hashlib.sha256(data.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def files_digest(files: Sequence[Path | str]) -> str:
    """Return a SHA-256 in hexadecimal digits over the contents of the files, in order.

    Raises:
        OSError: a file cannot be read.
    """
    joint = hashlib.sha256()
    for item in files:
        path = Path(item).expanduser()
        joint.update(_file_digest(path, _stamp(path)))
    return joint.hexdigest()


@functools.lru_cache(maxsize=64)
def _file_digest(path: Path, stamp: tuple[int, int]) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def import_closure(module: str, *, source: Path) -> set[str]:
    """Return `module` and every module of this package it imports, directly or not."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _module_file(source, name)
        if name in seen or path is None:
            continue
        seen.add(name)
        parsed = _parsed(path, _stamp(path))
        waiting += [_absolute(target, name, is_package=path.name == "__init__.py") for target in parsed.imports]
        waiting.append(name.rpartition(".")[0])  # importing a module runs its packages
    return seen


class _Parsed:
    """What one source file contributes: its imports, the data files it names, the hash of its code."""

    def __init__(self, text: str) -> None:
        tree = ast.parse(text)
        found: list[str] = []
        _visit(tree, found)
        self.imports = tuple(found)
        self.digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
        self.data = _data_names(tree) if any(suffix in text for suffix in DATA_SUFFIXES) else frozenset()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, stamp: tuple[int, int]) -> _Parsed:
    return _Parsed(path.read_text())


def _module_file(root: Path, module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return None
    base = root.joinpath(*parts[1:])
    for path in (base / "__init__.py", base.with_name(f"{base.name}.py")):
        if path.is_file():
            return path
    return None


def _existing(root: Path, module: str) -> Path:
    path = _module_file(root, module)
    if path is None:
        raise ValueError(f"no module {module} in {root}")
    return path


def _visit(node: ast.AST, imports: list[str]) -> None:
    """Remove docstrings in place and collect imports; relative ones keep their dots, `from a import b` gives a and a.b."""
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
    ):
        del node.body[0]
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, name, ()) if isinstance(getattr(node, name, ()), list) else ():
            if isinstance(child, ast.Import):
                imports += [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                joint = "" if base.endswith(".") else "."
                imports += [base, *(f"{base}{joint}{alias.name}" for alias in child.names)]
            elif not (isinstance(child, ast.If) and _is_type_checking(child.test)):
                _visit(child, imports)


def _is_type_checking(test: ast.expr) -> bool:
    return (test.id if isinstance(test, ast.Name) else getattr(test, "attr", "")) == "TYPE_CHECKING"


def _data_names(tree: ast.AST) -> frozenset[str]:
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return frozenset(Path(text).name for text in texts if text.endswith(DATA_SUFFIXES))


def _absolute(target: str, importer: str, *, is_package: bool) -> str:
    name = target.lstrip(".")
    level = len(target) - len(name)
    if level == 0:
        return name
    parts = importer.split(".")
    base = parts[: len(parts) - level + is_package]
    return ".".join([*base, name] if name else base)


def _named_data(root: Path, path: Path) -> list[Path]:
    """Return the data files of the module's package whose names the module mentions."""
    wanted = _parsed(path, _stamp(path)).data
    if not wanted or path.parent == root:
        return []
    return sorted(file for file in path.parent.rglob("*") if file.name in wanted)
