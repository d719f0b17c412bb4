"""Figures and tables show what the rows say, from the paper's numbers and from a run's alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from synthetic import (
    COLLECTIONS,
    OFFLINE_MODELS,
    PAPER,
    QUICK_MODELS,
    make_rows,
    with_seeds_and_lengths,
    write_synthetic,
)

from l2p_utils import figures
from l2p_utils.claims import Cell, OurCells, check_claims
from l2p_utils.figures import COLOURS, PANELS, draw, draw_claims, table
from l2p_utils.files import UserError
from l2p_utils.paper import FIGURES, TABLES, read_paper, read_source, rows_source
from l2p_utils.results import read_per_query, validate_per_query, validate_rows

OFFLINE = PAPER.parent / "offline"
FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = "/x/my docs"


@pytest.fixture(scope="module")
def paper():
    return read_source(PAPER)


@pytest.fixture(scope="module")
def reference():
    return read_source(OFFLINE)


@pytest.fixture(scope="module")
def rows():
    return validate_rows(make_rows(OFFLINE_MODELS, queries=12)[0])


@pytest.fixture(scope="module")
def quick():
    return rows_source(validate_rows(make_rows(QUICK_MODELS, queries=6, plaid=False)[0]), "quick")


@pytest.fixture(scope="module")
def own(rows):
    """A run whose only collection is a folder of the user's."""
    chosen = rows[(rows["collection"] == "docs:scipy") & ~rows["model"].str.contains("torch")]
    return rows_source(chosen.assign(collection=FOLDER), "own")


def panels(figure):
    return [axis for axis in figure.axes if axis.axison]


def lines(axis):
    """Drawn curves, without the line at 100."""
    return [line for line in axis.lines if line.get_marker() != "None"]


def words(figure):
    texts = [*figure.texts, figure._suptitle, figure._supxlabel]
    return " ".join(" ".join(text.get_text().split()) for text in texts)


def legend(figure):
    return [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]


@pytest.mark.parametrize("exhibit", FIGURES)
def test_every_number_is_drawn_once_and_inside_the_axes(paper, reference, exhibit):
    for source in (paper, reference):
        frame = source.frame[source.frame["exhibit"] == exhibit]
        axes = panels(draw(source, exhibit))
        drawn = np.concatenate([line.get_xydata() for axis in axes for line in lines(axis)])
        expected = frame[["pool_factor", "relative"]].to_numpy(dtype=float)
        order = [np.lexsort(points.T) for points in (drawn, expected)]
        assert drawn[order[0]] == pytest.approx(expected[order[1]])
        low, high = axes[0].get_ylim()
        assert low < expected[:, 1].min() and expected[:, 1].max() < high
        assert [axis.get_title() for axis in axes] == [source.names[d][0] for d in PANELS[exhibit]]
        assert all(list(axis.get_xticks()) == [1, 2, 3, 4, 5, 6] for axis in axes)


def test_colours_and_lines_keep_their_meaning(paper):
    blue, orange, green, pink = "#0072B2", "#E08A00", "#009E73", "#CC79A7"

    def colours(axis):
        return [to_hex(line.get_color()).upper() for line in lines(axis)]

    assert colours(draw(paper, "figure1").axes[0]) == [blue, orange, green]
    assert colours(draw(paper, "figure4").axes[2]) == [blue, orange, green, orange, pink]
    third = lines(draw(paper, "figure3").axes[0])
    assert [line.get_linestyle() for line in third] == ["--", "-", "-", "-"]
    second = lines(draw(paper, "figure2").axes[0])
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in second}) == 5


def test_legends_name_each_curve_once(paper, reference):
    assert legend(draw(paper, "figure1")) == ["hierarchical", "kmeans", "span"]
    ours = legend(draw(reference, "figure4"))
    assert len(ours) == len(set(ours)) == 7
    assert {"Baseline, span", "FT Hier PF1-6 (own collection)"} < set(ours)
    assert "FT docs:torch KMeans PF1-6" in ours


@pytest.mark.parametrize("exhibit", [*FIGURES, "overview"])
def test_titles_tell_the_papers_figure_from_ours_and_both_have_a_text(paper, reference, exhibit):
    drawn = [draw(source, exhibit) for source in (paper, reference)]
    texts, spoken = [words(figure) for figure in drawn], [figure.alt for figure in drawn]
    assert "paper" in texts[0] and "280" not in texts[0]
    queries = "100" if exhibit == "figure4" else "280"
    assert "his run" in texts[1] and f"{queries} test queries per collection" in texts[1]
    assert "SciFact" in spoken[0] and "docs:scipy" in spoken[1] and " % at pool factor" in spoken[1]


def test_the_overview_has_three_models_and_the_vectors_that_are_stored(paper, reference):
    axis = draw(reference, "overview").axes[0]
    assert axis.get_xticklabels()[1].get_text() == "2\n35" and len(lines(axis)) == 3
    assert "trained with pooling (98.3 % at PF6)" in legend(draw(paper, "overview"))


@pytest.fixture(scope="module")
def both():
    """Three seeds, raw and unit-length means."""
    frames = with_seeds_and_lengths(*make_rows(OFFLINE_MODELS[:9], queries=8))
    rows, per_query = validate_rows(frames[0]), validate_per_query(frames[1])
    return rows_source(rows, "both", per_query)


@pytest.mark.parametrize("exhibit", ["figure1", "figure3", "overview"])
def test_unit_length_stands_out_with_bands_before_thin_raw_means(both, exhibit):
    figure = draw(both, exhibit)
    for axis in panels(figure):
        drawn = lines(axis)
        thin = [line for line in drawn if line.get_linewidth() < 1]
        assert len(thin) == len(drawn) / 2 == len(axis.collections)
        for raw, unit in zip(thin, drawn[len(thin) :], strict=True):
            same = raw.get_color(), raw.get_marker(), raw.get_linestyle()
            assert same == (unit.get_color(), unit.get_marker(), unit.get_linestyle())
            assert (raw.get_ydata()[1:] < unit.get_ydata()[1:]).all()
    assert legend(figure)[-1] == "the same, raw means" and "Thin: raw means" in words(figure)
    assert "unit" not in words(draw(both, "figure4")) and "Bands" in words(draw(both, "figure4"))


def test_a_band_is_the_interval_of_the_percentage(both):
    axis = panels(draw(both, "overview"))[0]
    assert [text.get_text() for text in axis.get_xticklabels()][-1] == "24\n17"
    cell = Cell("SciFact", "SciFact", "kmeans", "1-6", "kmeans", 24, False, True)
    trained = OurCells(both.rows, both.per_query, both.roles).error_bar([cell])
    (top,) = axis.lines[4].get_ydata()[-1:]  # after the line at 100 and three thin ones
    ends = axis.collections[0].get_paths()[0].vertices
    last = ends[ends[:, 0] == 24, 1]
    assert [last.min(), last.max()] == pytest.approx([top - trained, top + trained])
    assert trained > 0.1


def test_tables_have_both_lengths(both):
    values = figures.table_values(both, "table4").set_index(
        ["renormalized", "model", "pool_factor"]
    )
    gain = (values.loc[True] - values.loc[False])["ndcg10"]["Baseline"]
    assert gain[1] == 0 and gain[6] == pytest.approx(0.05)
    text = figures.table_markdown(both, "table4")
    assert text.count("Table 4 in this run") == 2 and text.count("unit length") == 1


def test_what_was_not_run_is_said_and_its_panels_are_left_out(quick, rows):
    figure = draw(quick, "figure2")
    assert "Not run: FT Span PF2; FT Span PF3; FT Span PF1-6; FT PF1 on docs:torch" in words(figure)
    assert "Not run" not in words(draw(quick, "figure1"))
    few = rows[(rows["collection"] == "docs:scipy") & (rows["engine"] == "exact")]
    few = few[(few["model"] != "baseline") | (few["pool_factor"] != 5)]
    few = rows_source(few, "smoke")
    figure = draw(few, "figure3")
    assert [axis.get_title() for axis in panels(figure)] == ["docs:scipy (in SciFact’s role)"]
    assert "docs:torch (everything)" in words(figure)
    assert table(few, "table1")["PF5"][0] == "not run"


def test_what_cannot_be_drawn_is_refused(paper, quick, rows):
    with pytest.raises(UserError, match="figure9.*figure1"):
        draw(paper, "figure9")
    with pytest.raises(UserError, match="figure1.*table1"):
        table(paper, "figure1")
    with pytest.raises(UserError, match="no rows of PLAID"):
        draw(quick, "figure4")
    with pytest.raises(UserError, match="no pooled measurement"):
        figures.draw_kept(rows[(rows["engine"] == "exact") & (rows["pool_method"] == "none")])


@pytest.mark.parametrize(("exhibit", "count"), [("overview", 1), ("figure2", 1), ("figure3", 3)])
def test_own_collections_show_all_their_models(own, exhibit, count):
    figure = draw(own, exhibit)
    assert len(panels(figure)) == count and "docs:scipy" not in words(figure) + figure.alt
    assert all(len(lines(axis)) == own.rows["model"].nunique() for axis in panels(figure))
    assert "my docs" in words(figure) and legend(figure)[0] == "baseline"


def test_own_collections_have_tables_without_gaps(own, paper):
    for exhibit in TABLES:
        shown = table(own, exhibit)
        assert set(shown["Collection"]) == {"my docs"} and shown.notna().all(axis=None)
        text = figures.table_markdown(own, exhibit)
        assert "own collections" in text and "scipy (in" not in text
    roles = figures.roles_table(paper, own.rows)
    assert list(roles.index) == ["my docs"] and roles.notna().all(axis=None)
    assert figures.storage_table(own.rows).notna().all(axis=None)
    means = figures.means_table([paper, own], "figure1")
    assert list(means.index.get_level_values(0).unique()) == ["my docs"]
    assert set(means.columns.get_level_values(0)) == {"this run"}


def test_folders_of_the_same_name_stay_apart(own):
    both = pd.concat([own.rows, own.rows.assign(collection="/y/my docs")])
    figure = draw(rows_source(both, "own"), "figure1")
    assert [axis.get_title() for axis in panels(figure)] == [FOLDER, "/y/my docs"]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3)])
def test_what_a_model_keeps_has_a_panel_per_collection(rows, count, columns):
    chosen = (rows["model"] == "baseline") & (rows["engine"] == "exact")
    chosen &= rows["collection"].isin(COLLECTIONS[:count]) & rows["pool_factor"].isin([1, 2, 4])
    figure = figures.draw_kept(rows[chosen])
    assert [axis.get_title() for axis in panels(figure)] == sorted(COLLECTIONS[:count])
    labelled = [axis.get_xlabel() for axis in panels(figure)]
    assert labelled == [""] * (count - columns) + ["Pool factor"] * columns
    for axis in panels(figure):
        colours = [to_hex(line.get_color()).upper() for line in lines(axis)]
        assert colours == [COLOURS[method] for method in ("hierarchical", "kmeans", "span")]
        assert all(list(line.get_xdata()) == [1, 2, 4] for line in lines(axis))
        assert all(line.get_ydata()[0] == pytest.approx(100) for line in lines(axis))
    assert "12 test queries" in words(figure) and "kmeans" in figure.alt


@pytest.mark.parametrize("exhibit", TABLES)
def test_tables_come_back_as_printed_and_as_pinned(paper, reference, exhibit):
    for source, folder in ((paper, PAPER), (reference, FIXTURES)):
        expected = pd.read_csv(folder / f"{exhibit}.csv")
        found = figures.table_values(source, exhibit)
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert table(paper, exhibit).shape == table(reference, exhibit).shape


def test_a_cell_reads_ndcg_percent_and_difference(paper, reference):
    across = table(paper, "table2").set_index(["Collection", "Model"])
    assert list(across.columns) == ["PF1", "PF2", "PF4", "PF6"]
    assert across.loc[("SCIDOCS", "FT FiQA KMeans PF1-6"), "PF1"] == "0.382 (96.3) −0.015"
    assert across.loc[("NFCorpus", "FT SciFact KMeans PF1-6"), "PF2"] == "0.370 (98.9) +0.000"
    assert "docs:scipy (in SciFact’s role)" in figures.table_markdown(reference, "table3")


def test_the_notebooks_tables_say_what_the_rows_do(paper, reference):
    means = figures.means_table([paper, reference], "figure1")
    line = means.loc[("SciFact · docs:scipy", "Baseline", "kmeans")]
    assert list(line) == [100.0, 84.7, 75.4, 100.0, 91.9, 87.6]
    assert figures.roles_table(paper, reference.rows).loc["docs:torch", "in the role of"] == "FiQA"
    assert list(figures.storage_table(reference.rows).loc["docs:scipy"][:2]) == [68.7, 34.6]
    assert figures.variants_table(reference.rows).loc["paper", "mean"] == 90.6
    index = figures.index_table(reference.rows)
    assert index.loc[("docs:numpy", "kmeans"), "PF6, % of unpooled"] == pytest.approx(20.05)
    values = read_per_query(OFFLINE)
    engines = figures.engines_table(values)
    assert len(engines) == 24 and (engines["", "queries"] == 100).all()
    assert figures.engines_table(values[values["engine"] == "exact"]).empty
    pooled = values[(values["engine"] == "exact") & (values["pool_method"] != "none")]
    unit = pooled.assign(renormalized=True, **{"ndcg@10": 0.5})
    both = figures.engines_table(pd.concat([values, unit]))
    names = ["Exact search, raw", "Exact search, unit length", "PLAID search"]
    assert list(both["PF6"]) == list(both["PF1"]) == names
    assert set(both["PF6", names[1]]) == {0.5}
    assert both["PF6", names[0]].tolist() == engines["PF6", "Exact search"].tolist()
    assert both["PF1", names[0]].equals(both["PF1", names[1]].rename(("PF1", names[0])))


def test_the_command_redraws_every_folder_of_numbers(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "figures"
    write_synthetic(data / "quick", QUICK_MODELS, queries=5, plaid=False)
    (data / "paper").symlink_to(PAPER)
    (data / "notes").mkdir()
    figures.main(["--data", str(data), "--out", str(out)])
    printed = capsys.readouterr().out
    for name, count in (("paper", 18), ("quick", 20)):  # quick: no figure 4, but claims
        assert len(list((out / name).iterdir())) == count and f"{name}: {count} files" in printed
    assert set(pd.read_csv(out / "quick" / "claims.csv")["finding"]) == set(range(1, 9))
    with Image.open(out / "paper" / "figure1.png") as image:
        assert min(image.info["dpi"]) >= 200 - 1 and image.width > 2000
    assert figures.main(["--data", str(data / "notes")]) == 1
    assert "no folder paper" in capsys.readouterr().err


def test_a_figure_shows_itself_with_its_text(paper):
    picture, metadata = draw(paper, "figure2")._repr_png_()
    assert picture.startswith(b"\x89PNG") and "FiQA, FT PF1" in metadata["alt"]


def test_drawing_needs_no_model_library():
    code = "import sys, l2p_utils.figures; print(sorted({'torch', 'pylate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_forest_plot_tells_verdicts_raw_and_unit_length_apart():
    rows = with_seeds_and_lengths(*make_rows(QUICK_MODELS, queries=12, plaid=False))
    claims = check_claims(*rows, read_paper(PAPER))
    figure = draw_claims(claims)
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    blank = claims[["verdict", "renormalized_verdict"]].isin(["not run", "–"])
    assert len(drawn) == (~blank).sum(axis=None)
    shapes = {(line.get_marker(), line.get_markerfacecolor() == "white") for line in drawn}
    assert {("o", False), ("o", True)} <= shapes <= {("o", False), ("o", True), ("X", False)}
    seven = claims.set_index("part").loc["7a"]  # NDCG is drawn × 100
    assert any(line.get_xdata()[0] == pytest.approx(100 * seven["difference"]) for line in drawn)
    assert "8a unit-length means: holds" in figure.alt and "8a raw" not in figure.alt
    nothing = draw_claims(check_claims(None, None, read_paper(PAPER)))
    assert not [line for line in nothing.axes[0].lines if line.get_linestyle() == "None"]
