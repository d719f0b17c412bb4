"""Bundled collections: no leaks between splits, nothing given away, the same in every process."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from l2p_utils import docstrings
from l2p_utils.collection import load_collection
from l2p_utils.docstrings import (
    PACKAGES,
    cache_folder,
    find_package,
    load_docstrings,
    make_entries,
    source_docstrings,
    split_docstring,
    split_names,
)
from l2p_utils.files import UserError

BODY = " ".join(f"word{i}" for i in range(30))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache for all tests here, so that each package is read once."""
    return tmp_path_factory.mktemp("docstrings")


@pytest.fixture(scope="session", params=PACKAGES)
def entries(request, cache):
    return load_docstrings(request.param, cache)


def same(text):
    """What the tests call equal: case and white space do not count."""
    return " ".join(text.casefold().split())


# --- the six collections --------------------------------------------------------------------------


def test_a_collection_has_900_to_1900_pairs_and_280_test_queries(entries):
    assert 900 <= len(entries) <= 1_900
    splits = Counter(entry.split for entry in entries)
    assert (splits["test"], splits["dev"]) == (280, 100)
    assert splits["train"] == len(entries) - 380


def test_no_test_or_dev_query_is_among_the_training_queries(entries):
    queries = {split: set() for split in ("train", "dev", "test")}
    for entry in entries:
        queries[entry.split].add(same(entry.query))
    assert not queries["train"] & queries["test"]
    assert not queries["train"] & queries["dev"]
    assert not queries["dev"] & queries["test"]


def test_no_document_contains_its_query(entries):
    assert [entry.id for entry in entries if same(entry.query) in same(entry.document)] == []


@pytest.mark.parametrize("part", ["query", "document"])
def test_nothing_occurs_twice(entries, part):
    assert len({entry.id for entry in entries}) == len(entries)
    counts = Counter(same(getattr(entry, part)) for entry in entries)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_two_documents_begin_alike(entries):
    beginnings = Counter(same(entry.document)[:200] for entry in entries)
    assert max(beginnings.values()) == 1


def test_queries_and_documents_are_clean_text_of_a_useful_length(entries):
    for entry in entries:
        assert 3 <= len(entry.query.split()) <= 40
        assert len(entry.document.split()) >= 20
        for text in (entry.query, entry.document):
            assert text == " ".join(text.split())
            assert "`" not in text


@pytest.mark.parametrize("package", PACKAGES)
def test_ids_are_public_names_in_the_package_sorted_and_outside_of_its_tests(package, cache):
    names = [entry.id for entry in load_docstrings(package, cache)]
    assert names == sorted(names)
    for name in names:
        first, *modules, last = name.split(".")
        assert first == PACKAGES[package]
        assert not last.startswith("_")
        assert "tests" not in modules


@pytest.mark.parametrize(
    ("package", "word"),
    [
        ("numpy", "numpy.arctan2"),  # a ufunc: written in C, read from the imported package
        ("numpy", "numpy.random.Generator.permuted"),
        ("numpy", "numpy._core.multiarray.packbits"),  # add_newdoc
        ("scipy", "scipy.special._add_newdocs.kolmogorov"),
        ("torch", "torch.fliplr"),  # add_docstr
        ("torch", "torch.linalg.cross"),  # cross = _add_docstr(...)
        ("pandas", "pandas.core.frame.DataFrame.melt"),
        ("sklearn", "sklearn.cluster._dbscan.DBSCAN"),
    ],
)
def test_every_way_of_documenting_an_object_is_read(cache, package, word):
    assert word in {entry.id for entry in load_docstrings(package, cache)}


BUILD = """
import hashlib, importlib, sys
for name in ["numpy.f2py", "scipy.special", "pandas"]:
    importlib.import_module(name)
from l2p_utils import docstrings
for package in reversed(docstrings.PACKAGES):
    print(package, hashlib.sha256(ascii(docstrings.build(package)).encode()).hexdigest())
"""


def test_a_process_with_another_hash_seed_and_other_imports_makes_the_same(cache):
    here = {
        package: hashlib.sha256(ascii(load_docstrings(package, cache)).encode()).hexdigest()
        for package in PACKAGES
    }
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    root = str(Path(docstrings.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    assert dict(line.split() for line in done.stdout.splitlines()) == here


def test_load_collection_gives_every_split_the_whole_corpus(cache):
    pairs = load_docstrings("numpy", cache)
    for split in ("train", "dev", "test"):
        loaded = load_collection("docs:numpy", split, cache=cache)
        assert loaded.corpus == {entry.id: entry.document for entry in pairs}
        assert loaded.queries == {entry.id: entry.query for entry in pairs if entry.split == split}
        assert loaded.qrels == {query: {query: 1} for query in loaded.queries}


def test_load_collection_refuses_a_split_that_does_not_exist(cache):
    with pytest.raises(UserError, match="no split 'validation'.*train, dev, test"):
        load_collection("docs:numpy", "validation", cache=cache)


# --- from docstring to pair -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docstring", "pair"),
    [
        ("Sum of two\nnumbers.\n\nThe rest.", ("Sum of two numbers", "The rest.")),
        ("Sum. Adds things up.\n\nMore.", ("Sum", "Adds things up. More.")),
        ("f(x, *, out=None) -> Tensor\n\nSum.\n\nRest.", ("Sum", "Rest.")),
        ("f(x)\n--\n\nf(x, /)\n\nSum.\n\nRest.", ("Sum", "Rest.")),
        ("Sum.\n\nParameters\n----------\na : int", ("Sum", "Parameters a : int")),
        ("See :func:`~np.sum` or ``b``.\n\nRest.", ("See np.sum or b", "Rest.")),
        ("Sum.\n\n.. versionadded:: 1.2\n\n.. note:: Rest.", ("Sum", "Rest.")),
        ("A norm.\n\n%(before_notes)s\n\nRest.", ("A norm", "Rest.")),
        ("Fit, e.g. PCA. Rest.", ("Fit, e.g. PCA", "Rest.")),
        ("Sum it.\n\nSum it, then rest.", ("Sum it", "then rest.")),
    ],
)
def test_the_summary_is_the_query_and_the_rest_is_the_document(docstring, pair):
    assert split_docstring(docstring) == pair


@pytest.mark.parametrize(
    "docstring",
    ["", "Parameters\n----------\nx : int", "Args:\n    x: it", "f(x) -> y", ">>> f(1)\n2"],
)
def test_a_docstring_without_a_summary_makes_no_pair(docstring):
    assert split_docstring(docstring) is None


def test_a_repeated_summary_is_taken_out_of_the_document_whatever_its_case_and_line_breaks():
    docstring = "Return the (sorted) sum.\n\nThis will return the\n  (sorted) SUM. Then stops."
    assert split_docstring(docstring) == ("Return the (sorted) sum", "This will Then stops.")


def pairs_of(**docstrings_by_name):
    return {entry.id: entry.query for entry in make_entries(docstrings_by_name)}


def test_of_equal_queries_or_documents_the_first_by_id_stays():
    other, third = BODY.replace("word1 ", "one "), BODY.replace("word2 ", "two ")
    assert pairs_of(
        b=f"Sum of all numbers.\n\n{BODY}",
        a=f"sum of ALL  numbers\n\n{other}",  # the query of b
        c=f"Another summary here.\n\n{BODY.upper()}",  # the document of b, which is gone
        d=f"And one more.\n\n{BODY}",  # the document of c
        e=f"The last of them.\n\n{third}",
    ) == {"a": "sum of ALL numbers", "c": "Another summary here", "e": "The last of them"}


def test_documents_that_begin_alike_count_as_one():
    beginning = "x" * 199
    alike = f"{beginning}y one {BODY}", f"{beginning}y two {BODY}", f"{beginning}z {BODY}"
    documented = {name: f"The summary of {name}.\n\n{alike[i]}" for i, name in enumerate("abc")}
    assert list(pairs_of(**documented)) == ["a", "c"]


@pytest.mark.parametrize(
    ("docstring", "kept"),
    [
        (f"Two words.\n\n{BODY}", False),
        (f"Three words here.\n\n{BODY}", True),
        (f"{'word ' * 40}\n\n{BODY.replace('word', 'other')}", True),
        (f"{'word ' * 41}\n\n{BODY.replace('word', 'other')}", False),
        ("Three words here.\n\n" + "x " * 19, False),
        ("Three words here.\n\n" + "x " * 20, True),
    ],
)
def test_what_is_too_short_or_too_long_makes_no_pair(docstring, kept):
    assert bool(pairs_of(a=docstring)) is kept


def test_beyond_the_largest_number_of_pairs_the_hashes_of_the_ids_decide(monkeypatch):
    documented = {f"n{i}": f"Summary number {i}.\n\n{i} {BODY}" for i in range(20)}
    everything = set(pairs_of(**documented))
    monkeypatch.setattr(docstrings, "MAX_PAIRS", 7)
    kept = set(pairs_of(**documented))
    assert len(everything) == 20
    assert len(kept) == 7
    shuffled = dict(sorted(documented.items(), reverse=True))
    assert set(pairs_of(**shuffled)) == kept


def test_splits_go_by_the_rank_of_the_hashes_not_by_order():
    names = [f"n{i}" for i in range(1_000)]
    splits = split_names(names)
    assert splits == split_names(names[::-1])
    rank = {name: hashlib.sha256(f"split:{name}".encode()).hexdigest() for name in names}
    ranked = sorted(names, key=rank.get)
    assert [splits[name] for name in ranked] == ["test"] * 280 + ["dev"] * 100 + ["train"] * 620


# --- from source to docstrings --------------------------------------------------------------------

SOURCE = '''
import torch
def public():
    """Public."""
    def inner():
        """Inner."""
def _private():
    """Private."""
alias = public
if torch:
    class Thing:
        """Thing."""
        @property
        def size(self):
            """Size."""
        @size.setter
        def size(self, value):
            """Not this one."""
        def __len__(self):
            """Length."""
class _Hidden:
    def method(self):
        """Hidden."""
@doc(klass="Series")
def templated():
    """A {klass}."""
add_docstr(torch.abs, r"""abs({{}}){x}""".format(**common) + " end")
cross = _add_docstr(_linalg.linalg_cross, "Cross.")
add_docstr_all("numel", "Count.")
add_newdoc("agm", "Mean.")
'''

NUMPY_SOURCE = '''
add_newdoc("numpy", "dtype", ("kind", """Kind."""))
add_newdoc("numpy", "dtype", ("__len__", """Hidden."""))
add_newdoc("ArrayLike", "typing.Union[...]", "No name.")
add_newdoc_for_scalar_type("void", "(x)", "Void.")
'''


def test_public_objects_are_found_once_under_the_name_where_they_are_defined():
    found = {}
    for name, docstring in source_docstrings("torch._tensor_docs", SOURCE):
        found.setdefault(name, docstring)
    assert found == {
        "torch._tensor_docs.public": "Public.",
        "torch._tensor_docs.Thing": "Thing.",
        "torch._tensor_docs.Thing.size": "Size.",
        "torch.abs": "abs({}) end",
        "torch._tensor_docs.cross": "Cross.",
        "torch.Tensor.numel": "Count.",
        "torch._tensor_docs.agm": "Mean.",  # a name of its own: the module comes before it
    }


def test_documentation_that_numpy_adds_is_found_under_the_name_of_what_it_documents():
    assert dict(source_docstrings("numpy._core._add_newdocs", NUMPY_SOURCE)) == {
        "numpy.dtype.kind": "Kind.",
        "numpy.void": "Void.",
    }


def test_test_folders_and_vendored_copies_are_left_out(tmp_path):
    root = tmp_path / "tests" / "pkg"  # a parent of that name does not matter
    for path in ("__init__.py", "a.py", "tests/b.py", "externals/c.py", "conftest.py", "d/e.py"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("")
    modules = [module for module, _ in docstrings.module_files(root)]
    assert modules == ["pkg", "pkg.a", "pkg.d.e"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package of 10 documented functions, one broken file and a version that a test can set."""
    root = tmp_path / "toy"
    root.mkdir()
    functions = (f'def f{i}():\n    """Summary number {i}.\n\n    {i} {BODY}\n    """\n\n'
                 for i in range(10))  # fmt: skip
    (root / "good.py").write_text("".join(functions))
    (root / "template.py").write_text("def {{ name }}(:\n")
    (root / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    version = {"toy": "1.0"}
    monkeypatch.setattr(docstrings, "find_package", lambda package: (root, version[package]))
    return version


def test_a_file_that_cannot_be_parsed_is_left_out_and_the_rest_is_kept(toy, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert len(load_docstrings("toy", tmp_path / "cache")) == 10
    assert "template.py" in caplog.text
    assert "latin.py" in caplog.text


# --- cache ----------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """The packages that were built, in order."""
    done = []
    build = docstrings.build
    monkeypatch.setattr(docstrings, "build", lambda package: done.append(package) or build(package))
    return done


def test_a_cache_is_used_the_second_time(toy, builds, tmp_path, caplog):
    first = load_docstrings("toy", tmp_path / "cache")
    second = load_docstrings("toy", tmp_path / "cache")
    assert first == second
    assert builds == ["toy"]
    assert caplog.text == ""


def cut(pairs, provenance):
    pairs.write_bytes(pairs.read_bytes()[:-20])


def cut_at_a_line(pairs, provenance):
    pairs.write_bytes(b"".join(pairs.read_bytes().splitlines(keepends=True)[:-1]))


def edit(pairs, provenance):
    pairs.write_bytes(pairs.read_bytes().replace(b"Summary", b"summary", 1))


def empty_pairs(pairs, provenance):
    pairs.write_bytes(b"")


def lose_provenance(pairs, provenance):
    provenance.unlink()


def cut_provenance(pairs, provenance):
    provenance.write_text(provenance.read_text()[:30])


def drop_checksum(pairs, provenance):
    content = json.loads(provenance.read_text())
    del content["sha256"]
    provenance.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [cut, cut_at_a_line, edit, empty_pairs, lose_provenance, cut_provenance, drop_checksum],
)
def test_a_damaged_cache_is_rebuilt_with_a_notice(toy, builds, tmp_path, caplog, damage):
    first = load_docstrings("toy", tmp_path / "cache")
    folder = tmp_path / "cache" / "docs-toy"
    damage(folder / "pairs.jsonl", folder / "provenance.json")
    assert load_docstrings("toy", tmp_path / "cache") == first
    assert builds == ["toy", "toy"]
    assert "Rebuilding" in caplog.text
    assert str(folder / "pairs.jsonl") in caplog.text
    assert load_docstrings("toy", tmp_path / "cache") == first
    assert builds == ["toy", "toy"]  # mended


def test_a_cache_of_another_version_or_of_older_rules_is_rebuilt(
    toy, builds, tmp_path, caplog, monkeypatch
):
    load_docstrings("toy", tmp_path / "cache")
    toy["toy"] = "1.1"
    load_docstrings("toy", tmp_path / "cache")
    assert builds == ["toy"] * 2
    monkeypatch.setattr(docstrings, "BUILDER", docstrings.BUILDER + 1)
    load_docstrings("toy", tmp_path / "cache")
    assert builds == ["toy"] * 3
    assert caplog.text.count("Rebuilding") == 2
    provenance = json.loads((tmp_path / "cache" / "docs-toy" / "provenance.json").read_text())
    assert provenance["settings"]["version"] == "1.1"
    assert provenance["pairs"] == 10


def test_a_build_that_fails_leaves_nothing_behind(toy, tmp_path, monkeypatch):
    def full_disk(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        load_docstrings("toy", tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cache_folder_that_cannot_be_written_is_refused_with_what_to_do(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="L2P_CACHE"):
        load_docstrings("toy", tmp_path / "file")


def test_the_cache_lies_where_asked_else_in_l2p_cache_else_in_the_home_folder(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("L2P_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "l2p"
    monkeypatch.setenv("L2P_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    assert cache_folder(tmp_path / "asked") == tmp_path / "asked"


# --- packages -------------------------------------------------------------------------------------


def test_an_unknown_package_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(UserError, match="docs:django.*docs:scipy, docs:numpy"):
        load_docstrings("django", tmp_path)


@pytest.mark.parametrize("gone", ["module", "metadata"])
def test_a_package_that_is_not_installed_is_refused_with_how_to_install_it(monkeypatch, gone):
    if gone == "module":
        monkeypatch.setitem(docstrings.PACKAGES, "sklearn", "no_such_module_anywhere")
    else:
        monkeypatch.setitem(docstrings.DISTRIBUTIONS, "sklearn", "no-such-distribution-anywhere")
    name = docstrings.DISTRIBUTIONS["sklearn"]
    with pytest.raises(UserError, match=f"not installed here.*python -m pip install {name}"):
        find_package("sklearn")
