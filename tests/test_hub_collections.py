"""Hub collections from miniature repositories: every layout, every rule, every refusal.

The hub is replaced by folders; `tests/hub` serves the same layouts over HTTP.
"""

import gzip
import http.server
import json
import logging
import threading
import zipfile

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors

from l2p_utils import beir_zip, hub_collections
from l2p_utils.collection import load_collection
from l2p_utils.files import UserError, read_json
from l2p_utils.hub_collections import (
    NANO,
    fetch_collection,
    parse_name,
    provenance_of,
)

COMMIT, QRELS_COMMIT, NEXT = "a" * 40, "b" * 40, "c" * 40
CORPUS = [
    {"_id": "1", "title": "Wings", "text": "lift of a wing"},
    {"_id": "2", "title": "", "text": "drag"},
    {"_id": "3", "title": "", "text": " "},  # no text at all
    {"_id": "4", "title": "Only a title", "text": ""},
]
QUERIES = [
    {"_id": "10", "text": "what lifts a wing"},
    {"_id": "11", "text": "what drags"},
    {"_id": "12", "text": "for training"},
    {"_id": "13", "text": "for training too"},
]
TEST = [("10", "1", 1), ("10", "2", 0), ("11", "2", 2)]
TRAIN = [("12", "1", 1), ("13", "4", 1)]
TEXTS = {"1": "Wings lift of a wing", "2": "drag", "4": "Only a title"}
# without the time that gzip puts in: the tests' names hold these bytes
CUT_SHORT = gzip.compress(b'{"_id": "1", "text": "x"}', mtime=0)[:-9]
TEST_QRELS = {"10": {"1": 1, "2": 0}, "11": {"2": 2}}


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def tsv(path, rows, header="query-id\tcorpus-id\tscore\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in rows), "utf-8")


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def records(rows, score=int):
    rows = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in rows]
    return [{**row, "score": score(row["score"])} for row in rows]


def readme(folder, configs):
    """Front matter as the hub has it: config → split → path."""
    lines = ["---", "license: cc-by-sa-4.0", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A data set", ""]), "utf-8")


class Hub:
    """Folders in place of the hub: `put` makes a commit, `download` gives the latest or one."""

    def __init__(self, root):
        self.root, self.commits, self.asked, self.gone = root, {}, [], False

    def put(self, repository, commit=COMMIT):
        folder = self.root / repository.replace("/", "--") / commit
        folder.mkdir(parents=True)
        self.commits.setdefault(repository, []).append(commit)
        return folder

    def download(self, repository, kind="model", revision=None, patterns=None):
        assert kind == "dataset"
        self.asked.append((repository, revision))
        if self.gone:
            raise UserError(f"{repository} can't be reached: no network")
        commits = self.commits.get(repository, [])
        if not commits or (revision and revision not in [*commits, "main"]):
            kinds = errors.RevisionNotFoundError, errors.RepositoryNotFoundError
            raise UserError(f"{repository} is not there") from failure(kinds[not commits])
        commit = commits[-1] if revision in (None, "main") else revision
        return self.root / repository.replace("/", "--") / commit


def failure(kind, status=404):
    request = httpx.Request("GET", "http://127.0.0.1/api")
    return kind("no", response=httpx.Response(status, request=request))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub_collections.hub, "download", hub.download)
    monkeypatch.setenv("L2P_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("L2P_BEIR_URL", (tmp_path / "zips").as_uri())
    monkeypatch.delenv("L2P_REFRESH", raising=False)
    return hub


def refusal(*arguments, call=load_collection, **settings):
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    return str(caught.value)


# --- the layouts ----------------------------------------------------------------------------------


def put_nano(
    hub, name="NanoSciFact", commit=COMMIT, corpus=CORPUS, queries=QUERIES[:2], qrels=None
):
    folder = hub.put(f"zeta-alpha-ai/{name}", commit)
    pairs = [{"query-id": q, "corpus-id": d} for q, d in qrels or [("10", "1"), ("11", "2")]]
    tables = {"corpus": corpus, "queries": queries, "qrels": pairs}
    for config, rows in tables.items():
        rows = [{k: v for k, v in row.items() if k != "title"} for row in rows]
        parquet(folder / config / "train-00000-of-00001.parquet", rows)
    readme(folder, {config: {"train": f"{config}/train-*"} for config in tables})
    return folder


def put_beir(hub, corpus=CORPUS, queries=QUERIES, splits=None, commit=COMMIT):
    """BeIR/mini and BeIR/mini-qrels as they were first: gzipped JSON lines, TSV, no configs."""
    folder = hub.put("BeIR/mini", commit)
    jsonl(folder / "corpus.jsonl.gz", corpus)
    jsonl(folder / "queries.jsonl.gz", queries)
    (folder / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n# BEIR\n", "utf-8")
    qrels = hub.put("BeIR/mini-qrels", QRELS_COMMIT if commit == COMMIT else commit)
    for split, rows in (splits or {"train": TRAIN, "test": TEST}).items():
        tsv(qrels / f"{split}.tsv", rows)
    return folder


def put_beir_parquet(hub):
    """The same after its conversion: sharded parquet, with and without configs."""
    folder = hub.put("BeIR/mini")
    parquet(folder / "corpus" / "corpus-00000-of-00002.parquet", CORPUS[:2])
    parquet(folder / "corpus" / "corpus-00001-of-00002.parquet", CORPUS[2:])
    parquet(folder / "queries" / "queries-00000-of-00001.parquet", QUERIES)
    readme(folder, {c: {c: f"{c}/{c}-*"} for c in ("corpus", "queries")})
    qrels = hub.put("BeIR/mini-qrels", QRELS_COMMIT)
    for split, rows in {"train": TRAIN, "test": TEST}.items():
        rows = [{**row, "query-id": int(row["query-id"])} for row in records(rows)]
        parquet(qrels / "data" / f"{split}-00000-of-00001.parquet", rows)


def put_mteb_jsonl(hub):
    folder = hub.put("mteb/mini")
    jsonl(folder / "corpus.jsonl", CORPUS)
    jsonl(folder / "queries.jsonl", QUERIES)
    for split, rows in {"train": TRAIN, "test": TEST}.items():
        jsonl(folder / "qrels" / f"{split}.jsonl", records(rows, float))
    qrels = {split: f"qrels/{split}.jsonl" for split in ("train", "test")}
    configs = {"corpus": {"corpus": "corpus.jsonl"}, "queries": {"queries": "queries.jsonl"}}
    readme(folder, {"default": qrels, **configs})


def put_mteb_parquet(hub):
    """As a conversion leaves it, `config/split/0000.parquet`, and no README."""
    folder = hub.put("mteb/mini")
    parquet(folder / "corpus" / "corpus" / "0000.parquet", CORPUS)
    parquet(folder / "queries" / "queries" / "0000.parquet", QUERIES)
    for split, rows in {"train": TRAIN, "test": TEST}.items():
        parquet(folder / "default" / split / "0000.parquet", records(rows, float))


def put_zip(hub, extra=(), base="mini/"):
    path = hub.root.parent / "zips" / "mini.zip"
    path.parent.mkdir(exist_ok=True)
    lines = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, rows in lines.items():
            archive.writestr(base + name, "".join(json.dumps(row) + "\n" for row in rows))
        for split, rows in {"train": TRAIN, "test": TEST}.items():
            text = "".join(f"{q}\t{d}\t{score}\n" for q, d, score in rows)
            archive.writestr(f"{base}qrels/{split}.tsv", "query-id\tcorpus-id\tscore\n" + text)
        for name in extra:
            archive.writestr(name, "evil")
    return path


LAYOUTS = {
    "BeIR": put_beir,
    "BeIR parquet": put_beir_parquet,
    "mteb": put_mteb_jsonl,
    "mteb parquet": put_mteb_parquet,
    "zip": put_zip,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_collection(hub, layout):
    LAYOUTS[layout](hub)
    test, train = load_collection("beir:mini"), load_collection("beir:mini", "train")
    assert (test.name, test.split, test.dropped) == ("beir:mini", "test", 1)
    assert test.corpus == train.corpus == TEXTS
    assert test.queries == {"10": "what lifts a wing", "11": "what drags"}
    assert test.qrels == TEST_QRELS
    assert train.qrels == {"12": {"1": 1}, "13": {"4": 1}}
    assert provenance_of("beir:mini")["source"] == layout.split()[0]


def test_nano_has_one_split_called_test_and_every_listed_document_is_relevant(hub):
    put_nano(hub)
    loaded = load_collection("nano:scifact")
    assert loaded.name == "nano:scifact"
    assert loaded.corpus == {"1": "lift of a wing", "2": "drag"}
    assert loaded.qrels == {"10": {"1": 1}, "11": {"2": 1}}
    assert loaded.dropped == 2


def test_every_nano_set_is_asked_for_by_the_id_it_has_on_the_hub(hub):
    assert len(NANO) == 13
    for name in ("scifact", "fiqa", "nfcorpus", "scidocs", "touche"):
        refusal(f"nano:{name}")
    ids = ["NanoSciFact", "NanoFiQA2018", "NanoNFCorpus", "NanoSCIDOCS", "NanoTouche2020"]
    assert hub.asked == [(f"zeta-alpha-ai/{name}", None) for name in ids]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_training_on_nano_is_refused_before_anything_is_fetched(hub, split):
    message = refusal("nano:scifact", split)
    assert "for evaluation" in message
    assert "beir:scifact" in message
    assert hub.asked == []


def test_text_only_leaves_titles_out(hub):
    put_beir(hub)
    assert load_collection("beir:mini", text_only=True).corpus == {
        "1": "lift of a wing",
        "2": "drag",
    }


def test_touche_and_dbpedia_have_other_names_at_each_place(hub):
    refusal("beir:touche")
    assert [repository for repository, _ in hub.asked] == [
        "BeIR/webis-touche2020",
        "mteb/touche2020",
    ]


def test_files_that_are_links_as_in_the_hubs_own_cache_are_read(hub):
    """A snapshot holds links to blobs that are called by their checksums."""
    put_beir_parquet(hub)
    files = [path for path in hub.root.rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        blob = hub.root / "blobs" / f"{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(blob)
    assert load_collection("beir:mini").qrels == TEST_QRELS


def test_validation_is_our_dev(hub):
    put_beir(hub, splits={"train": TRAIN[:1], "validation": TRAIN[1:], "test": TEST})
    assert list(load_collection("beir:mini", "dev").queries) == ["13"]


def test_parquet_is_preferred_where_a_table_is_there_twice(hub):
    folder = put_beir(hub)
    parquet(folder / "corpus" / "corpus-00000-of-00001.parquet", CORPUS[:2])
    assert set(load_collection("beir:mini").corpus) == {"1", "2"}


def test_ids_become_strings_and_scores_whole_numbers(hub):
    corpus = [{**row, "_id": int(row["_id"])} for row in CORPUS]
    put_beir(hub, corpus=corpus, splits={"test": [("10", "1", "1.0"), ("11", "2", "+2")]})
    assert load_collection("beir:mini").qrels == {"10": {"1": 1}, "11": {"2": 2}}


# --- train, dev -----------------------------------------------------------------------------------


def test_all_training_queries_train_and_dev_is_an_error_unless_it_is_carved(hub):
    queries = [{"_id": f"t{i}", "text": f"question {i}"} for i in range(30)]
    put_beir(hub, queries=queries, splits={"train": [(q["_id"], "1", 1) for q in queries]})
    assert len(load_collection("beir:mini", "train").queries) == 30
    message = refusal("beir:mini", "dev")
    assert "no split 'dev'" in message
    assert "It has: train." in message
    assert "dev_collections" in message
    train = load_collection("beir:mini", "train", carve_dev=True)
    dev = load_collection("beir:mini", "dev", carve_dev=True)
    assert (len(train.queries), len(dev.queries)) == (27, 3)
    assert not set(train.queries) & set(dev.queries)


def test_a_split_that_is_missing_is_named_with_those_that_are_there(hub):
    put_beir(hub, splits={"test": TEST})
    assert refusal("beir:mini", "train") == "beir:mini has no split 'train'. It has: test."
    # carving helps nothing where there is nothing to carve from
    assert "no split 'dev'" in refusal("beir:mini", "dev", carve_dev=True)


# --- revisions, cache, provenance -----------------------------------------------------------------


def test_what_was_fetched_once_is_read_without_the_hub(hub):
    put_beir(hub)
    before = load_collection("beir:mini")
    hub.gone = True
    asked = len(hub.asked)
    assert load_collection("beir:mini") == before
    assert load_collection("beir:mini", "train").queries
    assert len(hub.asked) == asked
    assert "no network" in refusal("beir:other")


def test_a_newer_commit_is_taken_only_when_asked_for(hub, monkeypatch):
    put_nano(hub)
    old = load_collection("nano:scifact")
    put_nano(hub, commit=NEXT, corpus=[*CORPUS, {"_id": "5", "text": "new"}])
    monkeypatch.setenv("L2P_REFRESH", "1")
    assert load_collection("nano:scifact") == old  # a job of a run, whatever the environment says
    fetch_collection("nano:scifact")
    assert "5" in load_collection("nano:scifact").corpus
    assert load_collection(f"nano:scifact@{COMMIT}") == old
    assert "5" in load_collection("nano:scifact").corpus


def test_a_revision_is_asked_for_and_recorded_and_is_no_part_of_the_name(hub):
    put_beir(hub)
    loaded = load_collection(f"beir:mini@{COMMIT}")
    assert loaded.name == "beir:mini"
    # the judgments' repository has commits of its own
    assert hub.asked == [("BeIR/mini", COMMIT), ("BeIR/mini-qrels", None)]
    assert provenance_of(f"beir:mini@{COMMIT}") == {
        "name": "beir:mini",
        "revision": COMMIT,
        "source": "BeIR",
        "repositories": {"BeIR/mini": COMMIT, "BeIR/mini-qrels": QRELS_COMMIT},
        "counts": {
            "documents": 4,
            "documents without text": 1,
            "queries": 4,
            "queries without text": 0,
            "splits": {
                "train": {"queries": 2, "judgments": 2},
                "test": {"queries": 2, "judgments": 3},
            },
        },
    }


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("beir:mini", (None, None)),
        ("beir:mini@main", ("main", "main")),
        (f"beir:mini@{COMMIT}:{QRELS_COMMIT}", (COMMIT, QRELS_COMMIT)),
    ],
)
def test_a_branch_is_asked_of_both_repositories_a_commit_of_its_own(hub, name, asked):
    put_beir(hub)
    load_collection(name)
    assert tuple(revision for _, revision in hub.asked) == asked


def test_two_commits_of_the_judgments_are_two_folders(hub):
    put_beir(hub)
    tsv(hub.put("BeIR/mini-qrels", NEXT) / "test.tsv", TEST[:1])
    one = load_collection(f"beir:mini@{COMMIT}:{QRELS_COMMIT}")
    other = load_collection(f"beir:mini@{COMMIT}:{NEXT}")
    assert (len(one.queries), len(other.queries)) == (2, 1)


def test_a_revision_that_is_nowhere_is_refused_and_the_zip_does_not_stand_in_for_it(hub):
    put_beir(hub)
    put_mteb_jsonl(hub)
    put_zip(hub)
    message = refusal(f"beir:mini@{NEXT}")
    assert f"BeIR/mini with BeIR/mini-qrels at {NEXT} (not found)" in message
    assert f"mteb/mini at {NEXT} (not found)" in message
    assert "mini.zip (a zip has no revisions)" in message


def test_provenance_of_what_is_not_from_the_hub_is_empty(tmp_path):
    assert provenance_of("docs:scipy") == provenance_of(str(tmp_path)) == {}


@pytest.mark.parametrize("harm", ["cut", "gone", "no provenance", "half provenance", "old rules"])
def test_a_damaged_cache_is_fetched_again(hub, harm, caplog):
    put_beir(hub)
    folder = fetch_collection("beir:mini")
    before = load_collection("beir:mini")
    corpus, provenance = folder / "corpus.jsonl", folder / "provenance.json"
    if harm == "cut":
        corpus.write_bytes(corpus.read_bytes()[:-40])
    elif harm == "gone":
        corpus.unlink()
    elif harm == "no provenance":
        provenance.unlink()
    elif harm == "half provenance":
        provenance.write_text(provenance.read_text()[:30])
    else:
        provenance.write_text(json.dumps({**read_json(provenance), "builder": 0}))
    assert load_collection("beir:mini") == before
    assert "Fetching beir:mini again" in caplog.text


def test_a_damaged_pointer_is_named(hub, tmp_path):
    put_beir(hub)
    fetch_collection("beir:mini")
    pointer = tmp_path / "cache" / "hub" / "names" / "beir-mini.json"
    for content in ('{"folder', "[]", '{"folder": "../../elsewhere"}'):
        pointer.write_text(content)
        message = refusal("beir:mini")
        assert str(pointer) in message
        assert "Delete it" in message


def test_a_failed_fetch_leaves_nothing_behind_and_what_was_there_untouched(hub, tmp_path):
    put_beir(hub)
    before = load_collection("beir:mini")
    put_beir(hub, corpus=[CORPUS[0], CORPUS[0]], commit=NEXT)
    assert "'1' is there already" in refusal("beir:mini", call=fetch_collection, refresh=True)
    assert load_collection("beir:mini") == before
    (folder,) = [p for p in (tmp_path / "cache" / "hub").iterdir() if p.name != "names"]
    assert folder.name == f"beir-mini--{COMMIT[:12]}-{QRELS_COMMIT[:12]}"


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    put_beir(hub)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("L2P_CACHE", str(tmp_path / "file"))
    assert "L2P_CACHE" in refusal("beir:mini")


def test_two_processes_that_fetch_the_same_at_once_both_get_it(hub, monkeypatch):
    put_beir(hub)
    written, inodes = hub_collections.write_collection, []

    def slower(*arguments):
        """The other process finishes while this one writes."""
        monkeypatch.setattr(hub_collections, "write_collection", written)
        inodes.append((fetch_collection("beir:mini") / "corpus.jsonl").stat().st_ino)
        return written(*arguments)

    monkeypatch.setattr(hub_collections, "write_collection", slower)
    assert load_collection("beir:mini").qrels == TEST_QRELS
    # what the other one reads was not taken away from under it
    assert [(fetch_collection("beir:mini") / "corpus.jsonl").stat().st_ino] == inodes


# --- what is left out and counted -----------------------------------------------------------------


def test_judgments_of_the_unknown_are_left_out_counted_and_reported(hub, caplog):
    unknown = [("10", "99", 1), ("99", "1", 1), ("99", "2", 1)]
    put_beir(hub, splits={"test": TEST + unknown})
    with caplog.at_level(logging.WARNING):
        assert load_collection("beir:mini").qrels == TEST_QRELS
    assert "1 of unknown documents" in caplog.text
    assert "2 of unknown queries" in caplog.text
    counts = provenance_of("beir:mini")["counts"]["splits"]["test"]
    assert counts["of unknown documents"] == 1
    assert counts["of unknown queries"] == 2


def test_an_empty_query_is_left_out_with_its_judgments(hub, caplog):
    queries = [{**QUERIES[0], "text": "  "}, *QUERIES[1:3], {"_id": "13", "text": None}]
    put_beir(hub, queries=queries)
    assert load_collection("beir:mini").qrels == {"11": {"2": 2}}
    assert "2 queries have no text" in caplog.text
    counts = provenance_of("beir:mini")["counts"]
    assert (counts["queries"], counts["queries without text"]) == (2, 2)
    assert counts["splits"]["test"]["of queries without text"] == 2


def test_a_judgment_that_is_there_with_two_scores_counts_as_the_last(hub, caplog):
    put_beir(hub, splits={"test": [("10", "1", 0), ("10", "1", 2), ("10", "1", 2)]})
    assert load_collection("beir:mini").qrels == {"10": {"1": 2}}
    assert "1 with another score" in caplog.text


def test_half_a_surrogate_pair_is_replaced_counted_and_reported_with_its_place(hub, caplog):
    corpus = [CORPUS[0], {"_id": "2", "title": "a \ud83d", "text": "drag \udfff"}, *CORPUS[2:]]
    put_beir(hub, corpus=corpus, queries=[{"_id": "10", "text": "wing\ud800"}, *QUERIES[1:]])
    loaded = load_collection("beir:mini")
    assert loaded.corpus["2"] == "a \ufffd drag \ufffd"
    assert loaded.queries["10"] == "wing\ufffd"
    assert provenance_of("beir:mini")["counts"]["texts with half characters"] == 3
    assert "half characters in 3 texts" in caplog.text
    assert "corpus.jsonl.gz, line 2" in caplog.text


def test_half_a_surrogate_pair_in_an_id_is_refused(hub):
    put_beir(hub, corpus=[{"_id": "1\ud800", "text": "a wing"}])
    message = refusal("beir:mini")
    assert "corpus.jsonl.gz, line 1" in message and "half of a surrogate pair" in message


def test_nothing_is_reported_where_nothing_was_left_out(hub, caplog):
    put_beir(hub, corpus=CORPUS[:2] + CORPUS[3:])
    load_collection("beir:mini")
    assert caplog.text == ""


def test_a_judged_document_without_text_is_dropped_with_its_judgment(hub):
    put_beir(hub, splits={"test": [*TEST, ("10", "3", 1)]})
    assert load_collection("beir:mini").qrels == TEST_QRELS


@pytest.mark.parametrize("put", [put_beir, put_nano])
def test_a_document_of_100_000_characters_arrives_whole(hub, put):
    long = {"_id": "9", "title": "", "text": "word " * 20_000 + "end"}
    put(hub, corpus=[*CORPUS, long])
    name = "beir:mini" if put is put_beir else "nano:scifact"
    assert load_collection(name).corpus["9"] == long["text"]


def test_odd_characters_survive(hub):
    text = "one\u2028two \u00e9 \U0001f600 \x0b \\ \" 'tab\tin text' \nline"
    put_beir(hub, corpus=[{"_id": "1", "title": "", "text": text}, *CORPUS[1:]])
    assert load_collection("beir:mini").corpus["1"] == text


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nano:trec-covid", "nano:scifact"),
        ("nano:", "Known are"),
        ("beir:", "names no hub collection"),
        ("beir:a/b", "names no hub collection"),
        ("beir:../up", "names no hub collection"),
        ("beir:SciFact", "names no hub collection"),
        ("beir:mini@", "revision is incomplete"),
        ("beir:mini@a:", "revision is incomplete"),
        ("nano:scifact@a:b", "revision is incomplete"),
    ],
)
def test_a_name_that_can_be_none_is_refused_without_asking_the_hub(hub, name, words):
    assert words in refusal(name)
    assert hub.asked == []


def test_a_name_is_taken_apart():
    name = parse_name("beir:scifact@refs/pr/3")
    assert (name.plain, name.revision, name.qrels_revision) == (
        "beir:scifact", "refs/pr/3", "refs/pr/3",
    )  # fmt: skip
    assert parse_name(f"beir:scifact@{COMMIT}").qrels_revision is None


def test_a_collection_that_is_nowhere_is_refused_with_all_that_was_tried(hub):
    message = refusal("beir:mini")
    assert "There is no collection beir:mini. Tried: " in message
    assert "BeIR/mini with BeIR/mini-qrels (not found)" in message
    assert "mteb/mini (not found)" in message
    assert "/zips/mini.zip (not found)" in message


def test_judgments_that_are_missing_on_the_hub_send_on_to_the_next_place(hub):
    put_beir(hub)
    del hub.commits["BeIR/mini-qrels"]
    put_zip(hub)
    load_collection("beir:mini")
    assert provenance_of("beir:mini")["source"] == "zip"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.GatedRepoError, 401),
        (errors.HfHubHTTPError, 500),
        (ConnectionError, 0),
        (errors.LocalEntryNotFoundError, 0),
    ],
)
def test_any_other_failure_ends_the_search_with_its_error(hub, monkeypatch, kind, status):
    put_mteb_jsonl(hub)

    def fail(repository, *_):
        if repository.startswith("BeIR"):
            cause = failure(kind, status) if status else kind("reset")
            raise UserError(f"{repository}: no access") from cause
        return hub.download(repository, "dataset")

    monkeypatch.setattr(hub_collections.hub, "download", fail)
    assert refusal("beir:mini") == "BeIR/mini: no access"


def lacking_config(folder):
    readme(folder, {"corpus": {"train": "corpus/train-*"}, "queries": {"train": "queries/train-*"}})


def lacking_split(folder):
    readme(folder, {c: {"test": f"{c}/train-*"} for c in ("corpus", "queries", "qrels")})


def lacking_file(folder):
    readme(folder, {c: {"train": f"{c}/part-*"} for c in ("corpus", "queries", "qrels")})


def outside(folder):
    readme(folder, {c: {"train": "../../x.parquet"} for c in ("corpus", "queries", "qrels")})


def odd_format(folder):
    (folder / "corpus.arrow").write_bytes(b"x")
    readme(folder, {c: {"train": "corpus.arrow"} for c in ("corpus", "queries", "qrels")})


def bad_front_matter(folder):
    (folder / "README.md").write_text("---\nconfigs: [\n---\n", "utf-8")


def no_data(folder):
    (folder / "README.md").unlink()
    for path in folder.rglob("*.parquet"):
        path.unlink()


TRAIN_FILE = "train-00000-of-00001.parquet"


def table(config, rows):
    return lambda folder: parquet(folder / config / TRAIN_FILE, rows)


def content(config, data):
    return lambda folder: (folder / config / TRAIN_FILE).write_bytes(data)


def latin(folder):
    binary = pa.array([b"caf\xe9"], pa.binary()).view(pa.utf8())
    rows = pa.table({"_id": ["1"], "text": binary})
    pq.write_table(rows, folder / "corpus" / TRAIN_FILE)


PAIR = {"query-id": "10", "corpus-id": "1"}
REPOSITORY = "zeta-alpha-ai/NanoSciFact (commit aaaaaaaaaaaa)"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lacking_config, ["no config 'qrels' or 'default'", "corpus, queries", "test.tsv"]),
        (lacking_split, ["'corpus' has no split 'train'", "There is: test"]),
        (lacking_file, ["'corpus/part-*'", "no such file"]),
        (outside, ["'../../x.parquet'", "inside the repository"]),
        (odd_format, ["corpus.arrow", ".parquet"]),
        (bad_front_matter, ["README.md", "front matter"]),
        (no_data, ["no config 'corpus'", "no data file", "corpus.jsonl"]),
        (table("corpus", [{"doc": "1", "text": "x"}]), ["corpus/train", "'_id'", "doc, text"]),
        (table("corpus", [{"_id": "1", "body": "x"}]), ["no column 'text'", "_id, body"]),
        (table("queries", [{"_id": "1"}]), ["queries/train", "no column 'text'"]),
        (table("qrels", [{"query-id": "1"}]), ["no column 'corpus-id'"]),
        (table("corpus", [CORPUS[0]] * 2), ["row 2", "'1' is there already", "number 1"]),
        (table("queries", [QUERIES[0]] * 2), ["row 2", "'10' is there already"]),
        (table("corpus", [{"_id": None, "text": "x"}]), ["row 1", "'_id'", "None"]),
        (table("corpus", [{"_id": " ", "text": "x"}]), ["row 1", "' '"]),
        (table("corpus", [{"_id": 1.5, "text": "x"}]), ["row 1", "1.5"]),
        (table("corpus", [{"_id": True, "text": "x"}]), ["row 1", "True"]),
        (table("corpus", [{"_id": "a\tb", "text": "x"}]), ["row 1", "tab"]),
        (table("corpus", [{"_id": "1", "text": 5}]), ["row 1", "'text' to be text", "5"]),
        (table("corpus", [{"_id": "1", "text": ""}]), ["none of its 1 documents has any text"]),
        (table("queries", [{"_id": "1", "text": ""}]), ["no query with any text"]),
        (table("qrels", [{**PAIR, "score": 0.5}]), ["qrels/train", "row 1", "0.5"]),
        (table("qrels", [{**PAIR, "score": "high"}]), ["'high'"]),
        (table("qrels", [{**PAIR, "corpus-id": "99"}]), ["none of its judgments"]),
        (content("corpus", b"PAR1 nonsense"), ["corpus/train", "is damaged"]),
        (latin, ["corpus/train", "not UTF-8"]),
    ],
)
def test_what_a_repository_gets_wrong_is_refused_by_name(hub, harm, words):
    harm(put_nano(hub))
    message = refusal("nano:scifact")
    assert message.startswith(REPOSITORY)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("corpus.jsonl", b'{"_id": "1"', ["line 1", "bad JSON"]),
        ("corpus.jsonl", b'{"_id": "1", "text": "x"}\n[1]\n', ["line 2", "JSON object"]),
        ("corpus.jsonl", b'{"_id": "1", "text": "caf\xe9"}\n', ["not UTF-8"]),
        ("corpus.jsonl", b"", ["it is empty"]),
        (
            "corpus.jsonl.gz",
            CUT_SHORT,
            ["is damaged"],
        ),
        ("corpus.jsonl.gz", b"no gzip", ["is damaged"]),
        ("qrels.tsv", b"query-id\tcorpus-id\n10\t1\n", ["no column 'score'"]),
        ("qrels.tsv", b"10\t1\t1\n", ["no column 'query-id'", "10, 1, 1"]),
        ("qrels.tsv", b"query-id\tcorpus-id\tscore\n10\t1\n", ["line 2", "expected 3 fields"]),
        ("qrels.tsv", b"query-id\tcorpus-id\tscore\n10\t1\tcaf\xe9\n", ["not UTF-8"]),
    ],
)
def test_text_files_are_refused_by_name_and_line(hub, file, content, words):
    folder = put_beir(hub)
    if file == "qrels.tsv":
        path = hub.root / "BeIR--mini-qrels" / QRELS_COMMIT / "test.tsv"
    else:
        (folder / "corpus.jsonl.gz").unlink()
        path = folder / file
    path.write_bytes(content)
    message = refusal("beir:mini")
    assert message.startswith("BeIR/mini")
    for word in words:
        assert word in message


def test_queries_in_several_splits_none_of_them_called_queries_are_refused(hub):
    put_mteb_jsonl(hub)
    folder = hub.root / "mteb--mini" / COMMIT
    splits = {"a": "queries.jsonl", "b": "queries.jsonl"}
    readme(folder, {"corpus": {"corpus": "corpus.jsonl"}, "queries": splits})
    assert "the config 'queries' has the splits a, b" in refusal("beir:mini")


# --- the zip --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "member", ["../evil.txt", "/etc/evil", "mini/../../evil", "mini\\evil", "c:x"]
)
def test_a_zip_whose_members_escape_is_refused_and_nothing_is_unpacked(hub, tmp_path, member):
    put_zip(hub, [member])
    message = refusal("beir:mini")
    assert "mini.zip" in message
    assert "outside" in message
    assert not list(tmp_path.rglob("*evil*"))
    assert not [p for p in (tmp_path / "cache" / "hub").iterdir() if p.name.startswith(".zip")]


def test_a_link_in_a_zip_is_refused(hub):
    path = put_zip(hub)
    link = zipfile.ZipInfo("mini/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    assert "outside" in refusal("beir:mini")


def test_a_zip_with_a_wrong_checksum_is_refused(hub):
    path = put_zip(hub)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("mini/corpus.jsonl", '{"_id": "1", "text": "lift"}')
    path.write_bytes(path.read_bytes().replace(b"lift", b"gift"))
    assert "mini.zip is damaged" in refusal("beir:mini")


@pytest.mark.parametrize("harm", [lambda data: data[:-30], lambda _: b"<html>no zip</html>"])
def test_a_zip_that_is_none_is_refused(hub, harm):
    path = put_zip(hub)
    path.write_bytes(harm(path.read_bytes()))
    assert "mini.zip is damaged" in refusal("beir:mini")


def test_a_zip_without_a_collection_is_refused(hub):
    path = put_zip(hub)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mini/other.txt", "x")
    message = refusal("beir:mini")
    assert "expected one corpus.jsonl" in message
    assert "mini/other.txt" in message


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers with what `answers` lists, one a request: a status, "reset", "short" or "whole"."""

    def do_GET(self):
        answer = self.server.answers.pop(0)
        body = self.server.zip
        if answer == "reset":
            self.connection.close()
        elif isinstance(answer, int):
            self.send_response(answer)
            for name, value in self.server.asks.items():
                self.send_header(name, value)
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if answer == "whole" else body[: len(body) // 2])

    def log_message(self, *_):
        """Be quiet."""


@pytest.fixture
def server(hub, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.zip = put_zip(hub).read_bytes()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("L2P_BEIR_URL", f"http://127.0.0.1:{server.server_port}/datasets/")
    waits = []
    monkeypatch.setattr(beir_zip.time, "sleep", waits.append)
    server.waits, server.asks = waits, {"Retry-After": "7"}
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("fault", "wait"), [(429, 7), (503, 7), ("reset", 2), ("short", 2)])
def test_what_may_pass_is_tried_again(server, fault, wait):
    server.answers = [fault, "whole"]
    assert load_collection("beir:mini").qrels == TEST_QRELS
    assert server.waits == [wait]


@pytest.mark.parametrize(("fault", "tries"), [(500, 4), ("short", 4), (403, 1)])
def test_what_does_not_pass_ends_in_an_error_with_the_address(server, fault, tries):
    server.answers = [fault] * tries
    message = refusal("beir:mini")
    assert "/datasets/mini.zip can't be fetched" in message
    assert "L2P_BEIR_URL" in message
    assert server.answers == []


@pytest.mark.parametrize(
    ("asks", "wait"),
    [
        ({"Retry-After": "130"}, 130),
        ({"RateLimit": '"zips";r=0;t=299'}, 300),
    ],
)
def test_a_server_is_given_the_time_that_it_asks_for(server, asks, wait):
    server.answers, server.asks = [429, "whole"], asks
    assert load_collection("beir:mini").qrels == TEST_QRELS
    assert server.waits == [wait]


@pytest.mark.parametrize(("asked", "tries", "words"), [("7", 4, "4 times"), ("3601", 1, "once")])
def test_a_server_that_stays_busy_is_told_with_the_time(server, asked, tries, words):
    server.answers, server.asks = [429] * tries, {"Retry-After": asked}
    message = refusal("beir:mini")
    assert f"Wait {asked} s" in message and words in message and server.answers == []
    assert len(server.waits) == tries - 1


def test_a_zip_that_is_not_there_is_tried_once(server):
    server.answers = [404]
    assert "mini.zip (not found)" in refusal("beir:mini")
    assert server.answers == []


def test_an_address_that_is_none_is_refused(hub, monkeypatch):
    monkeypatch.setenv("L2P_BEIR_URL", "ftp.example.org")
    assert "L2P_BEIR_URL is 'ftp.example.org'" in refusal("beir:mini")


# --- licences -------------------------------------------------------------------------------------
