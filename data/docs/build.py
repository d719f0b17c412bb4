"""Build the bundled collections from the docstrings of installed packages.

The query is a docstring's one-line summary, its one relevant document the rest of that docstring.
Sources are parsed, never imported (but for what NumPy writes in C), so the pairs depend on the
packages' versions alone: not on import order, hash seed, clock or machine.

``python data/docs/build.py`` builds all of them. Nobody needs to: the collections are committed.
Other versions of the packages give other collections, and rows of these are not comparable.
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

#: Short name of a collection (``docs:<short name>``) and its packages, as in ``import``.
COLLECTIONS = {
    "scipy": ("scipy",),
    "numpy": ("numpy",),
    "sklearn": ("sklearn",),
    "pandas": ("pandas",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "mixed": ("transformers", "networkx", "matplotlib", "sympy"),
}
#: Name of a package in ``pip install``, where it differs.
DISTRIBUTIONS = {"sklearn": "scikit-learn"}

MAX_PAIRS = 1_900
MIXED_PAIRS = 4_400
TEST_QUERIES, DEV_QUERIES = 280, 100
QUERY_WORDS = (3, 40)
MIN_DOCUMENT_WORDS = 20
#: Documents that begin alike, over so many characters, are near duplicates: the encoder, which
#: cuts documents at about 100-128 tokens, could hardly tell them apart.
PREFIX_CHARACTERS = 200

# Tests and vendored copies of other projects.
SKIPPED_PARTS = {
    "tests", "test", "_tests", "testing", "_testing", "testing_utils", "conftest", "setup",
    "_pytesttester", "externals", "_vendor", "vendored", "distutils",
}  # fmt: skip
# Internals that the manuals leave out, and sources that others of the package are generated from.
SKIPPED_MODULES = {
    "scipy": re.compile(r"scipy\._lib\b"),
    "torch": re.compile(
        r"torch\.(_(?!torch_docs|tensor_docs|tensor$|jit_internal|lobpcg|lowrank|linalg_utils|utils$)"
        r"|ao\b|fx\b|onnx\b|utils\.benchmark\b|distributed\._|.*\._internal\b)"
    ),
    "transformers": re.compile(r"transformers\.models\..*\.(modular|convert)_"),
}
# What NumPy documents in C and so cannot be parsed: ufuncs, the random generators' methods.
COMPILED = {"numpy": ("numpy", "numpy.random", "numpy.random.Generator")}
COMPILED_TYPES = {
    "ufunc", "builtin_function_or_method", "method_descriptor", "cython_function_or_method",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One query/document pair; `id` is the canonical name of the object that it documents."""

    id: str
    query: str
    document: str
    split: str


# --- from source to (id, docstring) ---------------------------------------------------------------

TEMPLATED = {"doc", "Appender", "Substitution"}  # decorators that fill placeholders in at import
TORCH_CLASSES = {"torch._tensor_docs": "torch.Tensor", "torch._size_docs": "torch.Size"}
ADDERS = {
    "add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc", "add_newdoc_for_scalar_type",
}  # fmt: skip


def find_package(package: str) -> tuple[Path, str]:
    """Return the folder of an installed package's source and its version.

    Raises
    ------
    SystemExit
        For a package that is not installed.
    """
    distribution = DISTRIBUTIONS.get(package, package)
    spec = importlib.util.find_spec(package)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if spec is None or not spec.submodule_search_locations or version is None:
        raise SystemExit(
            f"The docstrings of the package {distribution} are needed, which is not installed "
            f"here. Install it: python -m pip install {distribution}"
        )
    return Path(next(iter(spec.submodule_search_locations))), version


def module_files(root: Path, skipped: re.Pattern[str] | None = None) -> Iterator[tuple[str, Path]]:
    """Yield (module name, path) of the Python files under the package folder `root`, sorted."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        if not SKIPPED_PARTS.intersection(parts) and not (skipped and skipped.match(module)):
            yield module, path


def source_docstrings(module: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield (canonical name, docstring) of every public object that a module's source documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escape sequences
        tree = ast.parse(source)
    yield from _definitions(tree, module)
    yield from _added(tree, module)


def _definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _definitions(node, prefix)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        docstring = ast.get_docstring(node)
        if docstring and not TEMPLATED.intersection(map(_called, node.decorator_list)):
            yield name, docstring
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, name)


def _added(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Docstrings that are attached by a call: torch's ``add_docstr``, NumPy's ``add_newdoc``."""
    for statement in tree.body:
        call = getattr(statement, "value", None)
        if not isinstance(call, ast.Call) or _called(call) not in ADDERS or len(call.args) < 2:
            continue
        documented, member = call.args[-1], ""
        if isinstance(documented, ast.Tuple) and len(documented.elts) == 2:  # (method, docstring)
            member, documented = _literal(documented.elts[0]), documented.elts[1]
        if isinstance(statement, ast.Assign):  # cross = _add_docstr(_linalg.linalg_cross, ...)
            name = f"{module}.{_dotted(statement.targets[0])}"
        else:
            name = _added_name(call, module, member)
        docstring = _literal(documented)
        public = not name.rpartition(".")[2].startswith("_")
        if docstring and public and all(map(str.isidentifier, name.split("."))):
            yield name, inspect.cleandoc(docstring)


def _added_name(call: ast.Call, module: str, member: str) -> str:
    """What a call documents: ``add_newdoc('numpy', 'dtype', ('kind', doc))`` numpy.dtype.kind."""
    names = [_literal(argument) or _dotted(argument) for argument in call.args[:-1]]
    if _called(call) == "add_docstr_all":
        names = [TORCH_CLASSES.get(module, module), *names]
    elif _called(call) == "add_newdoc_for_scalar_type":
        names = ["numpy", names[0]]
    name = ".".join(part for part in [*names, member] if part)
    package = module.partition(".")[0]
    return name if name.startswith(f"{package}.") else f"{module}.{name}"


def _called(node: ast.expr) -> str:
    """The last name of a call or decorator: ``add_newdoc`` of ``core.add_newdoc(...)``."""
    return _dotted(node.func if isinstance(node, ast.Call) else node).rpartition(".")[2]


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _literal(node: ast.expr) -> str:
    """The text of a string expression; parts that only running the code could fill in are left out.

    torch writes ``r'''...{input}...'''.format(**common_args)``: such a placeholder stands for a
    stock sentence about an argument and is dropped.
    """
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_literal, node.values))
    if isinstance(node, ast.Call) and _called(node) in {"format", "replace", "strip"}:
        template = _literal(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if _called(node) != "format":
            return template
        template = re.sub(r"(?<!\{)\{\w*\}(?!\})", "", template)
        return template.replace("{{", "{").replace("}}", "}")
    return ""


def compiled_docstrings(places: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of public objects without Python source in modules and classes."""
    for place in places:
        module, _, attribute = place.rpartition(".")
        owner = importlib.import_module(place) if not attribute[:1].isupper() else None
        owner = owner or getattr(importlib.import_module(module), attribute)
        for name in sorted(vars(owner)):
            value = vars(owner)[name]
            if name.startswith("_") or type(value).__name__ not in COMPILED_TYPES:
                continue
            if isinstance(docstring := getattr(value, "__doc__", None), str):
                canonical = getattr(value, "__name__", name)  # np.abs is np.absolute
                yield f"{place}.{canonical}", inspect.cleandoc(docstring)


# --- from docstring to pair -----------------------------------------------------------------------

# Markup is taken out, for each of its characters would cost one of the encoder's tokens.
ROLE = re.compile(r":(?:\w+:)?\w+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`")  # :func:`~a.b` -> a.b
MARKUP = re.compile(
    r"^[-=~^*#+ |]{2,}$"  # underlines, rules of tables
    r"|^\s*\.\. (versionadded|versionchanged|deprecated)::.*$"
    r"|\.\. [\w-]+::"  # .. note::, .. math::
    r"|%\(\w+\)s|\$\{\w+\}"  # SciPy's and NumPy's placeholders, filled in at import
    r"|`~?",
    re.MULTILINE,
)
SIGNATURE = re.compile(r"^[\w.]+\([^\n]*(\)|->\s*\S.*)$")
# First paragraphs that are no summary: section headings, lists of parameters, boilerplate.
NO_SUMMARY = re.compile(
    r"(args|arguments|parameters|returns?|yields|raises|examples?|notes?|attributes|references|"
    r"inputs?|outputs?|usage|warnings?|see also|todo|copied from)\s*(:|$)"
    r"|\w+ ?\([^)]*\)( ?,| ?:|$)|.*\boptional\b|\W|this is the configuration class",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bvs)(?<!\betc)(?<!\bal)[.!?]\s+(?=[A-Z\"'(*\[])")


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Split a docstring into (summary, rest), both on one line each; None if it has no summary.

    Signatures before the summary are skipped. A summary is the first sentence of the first
    paragraph; it loses its full stop. Where the rest repeats the summary, it is taken out.
    """
    text = MARKUP.sub("", ROLE.sub(r"\1", inspect.cleandoc(docstring)))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    paragraphs = [part for part in paragraphs if part]
    while paragraphs and SIGNATURE.match(paragraphs[0]):
        paragraphs.pop(0)
    if not paragraphs or NO_SUMMARY.match(paragraphs[0]):
        return None
    summary, first_rest = _first_sentence(paragraphs[0])
    query = summary.rstrip(" .:")
    body = " ".join([first_rest, *paragraphs[1:]])
    body = " ".join(re.sub(re.escape(query) + r"\.?", " ", body, flags=re.IGNORECASE).split())
    return query, body.lstrip(",;: ")


def _first_sentence(paragraph: str) -> tuple[str, str]:
    match = SENTENCE_END.search(paragraph)
    if match is None:
        return paragraph, ""
    return paragraph[: match.start()], paragraph[match.end() :]


def normalised(text: str) -> str:
    """Case-folded text with single spaces and no full stop: what counts as equal."""
    return " ".join(text.casefold().split()).rstrip(" .")


def usable(query: str, document: str) -> bool:
    """Whether a pair is a retrieval task: not too short, the query not in the document."""
    shortest, longest = QUERY_WORDS
    return (
        shortest <= len(query.split()) <= longest
        and len(document.split()) >= MIN_DOCUMENT_WORDS
        and normalised(query) not in normalised(document)
    )


def _hash(salt: str, identifier: str) -> str:
    return hashlib.sha256(f"{salt}:{identifier}".encode()).hexdigest()


def make_entries(docstrings: dict[str, str], most: int = MAX_PAIRS) -> list[Entry]:
    """Make the pairs of a collection, sorted by id, from docstrings by canonical name.

    Of pairs with an equal query, an equal document or documents that begin alike, the first by id
    stays. Beyond `most`, and for the splits, the hashes of the ids decide.
    """
    pairs: dict[str, tuple[str, str]] = {}
    seen: set[tuple[str, str]] = set()
    for name in sorted(docstrings):
        pair = split_docstring(docstrings[name])
        if pair is None or not usable(*pair):
            continue
        query, document = map(normalised, pair)
        keys = {("query", query), ("document", document)}
        keys.add(("beginning", document[:PREFIX_CHARACTERS]))
        if not keys & seen:
            seen |= keys
            pairs[name] = pair
    kept = sorted(pairs, key=functools.partial(_hash, "kept"))[:most]
    splits = split_names(kept)
    return [Entry(name, *pairs[name], splits[name]) for name in sorted(kept)]


def split_names(names: list[str]) -> dict[str, str]:
    """Assign test, dev and train by the rank of the ids' SHA-256: 280, 100, and all the others."""
    ranked = sorted(names, key=functools.partial(_hash, "split"))
    ends = (TEST_QUERIES, TEST_QUERIES + DEV_QUERIES)
    return {
        name: "test" if rank < ends[0] else "dev" if rank < ends[1] else "train"
        for rank, name in enumerate(ranked)
    }


def build(name: str) -> list[Entry]:
    """Make the pairs of one of `COLLECTIONS` from installed source, without any cache."""
    if name not in COLLECTIONS:
        known = ", ".join(f"docs:{known}" for known in COLLECTIONS)
        raise SystemExit(f"There is no collection docs:{name}. Known are: {known}.")
    docstrings: dict[str, str] = {}
    for package in COLLECTIONS[name]:
        docstrings |= package_docstrings(package)
    return make_entries(docstrings, MIXED_PAIRS if name == "mixed" else MAX_PAIRS)


def package_docstrings(package: str) -> dict[str, str]:
    """Docstrings of a package's public objects by canonical name."""
    root, _ = find_package(package)
    docstrings: dict[str, str] = {}
    for module, path in module_files(root, SKIPPED_MODULES.get(package)):
        try:
            found = list(source_docstrings(module, path.read_text("utf-8")))
        except (SyntaxError, UnicodeDecodeError) as error:  # a template, or a newer Python's syntax
            logger.info("docs:%s leaves out %s: %s", package, path, error)
            continue
        for name, docstring in found:
            docstrings.setdefault(name, docstring)
    for name, docstring in compiled_docstrings(COMPILED.get(package, ())):
        docstrings.setdefault(name, docstring)
    return docstrings


# --- files ----------------------------------------------------------------------------------------


def write_gzipped(path: Path, records: list[dict]) -> None:
    """JSON lines, gzipped: the same records give the same bytes."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def write(collection: str, folder: Path) -> None:
    """Write a collection's pairs as a folder in BEIR's layout."""
    entries = build(collection)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name in ("document", "query"):
        file = {"document": "corpus", "query": "queries"}[name]
        records = [{"_id": entry.id, "text": getattr(entry, name)} for entry in entries]
        write_gzipped(folder / f"{file}.jsonl.gz", records)
    for split in ("train", "dev", "test"):
        lines = [f"{entry.id}\t{entry.id}\t1\n" for entry in entries if entry.split == split]
        text = "query-id\tcorpus-id\tscore\n" + "".join(lines)
        (folder / "qrels" / f"{split}.tsv").write_text(text, "utf-8")
    packages = COLLECTIONS[collection]
    sources = [f"{DISTRIBUTIONS.get(p, p)} {find_package(p)[1]}" for p in packages]
    print(f"{folder}: {len(entries)} documents from {', '.join(sources)}")


if __name__ == "__main__":
    for name in sys.argv[1:] or COLLECTIONS:
        write(name, Path(__file__).parent / name)
