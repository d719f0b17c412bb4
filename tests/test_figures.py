"""Figures and tables show what the rows say, from the paper's numbers and from a run's alike."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from l2p_utils.exhibits import CONTENTS, FIGURES, TABLES, missing, read_source, rows_source
from matplotlib.colors import to_hex
from PIL import Image
from synthetic import COLLECTIONS, OFFLINE_MODELS, PAPER, QUICK_MODELS, make_rows, write_synthetic

from l2p_utils.figures import (
    COLOURS,
    PANELS,
    draw,
    draw_all,
    draw_kept,
    main,
    table,
    table_markdown,
    table_values,
)
from l2p_utils.files import UserError
from l2p_utils.results import read_paper, relative_ndcg, series, validate_rows


@pytest.fixture(scope="module")
def paper():
    return read_source(PAPER)


@pytest.fixture(scope="module")
def rows():
    return validate_rows(make_rows(OFFLINE_MODELS, queries=12)[0])


@pytest.fixture(scope="module")
def offline(rows):
    return rows_source(rows, "offline")


@pytest.fixture(scope="module")
def quick():
    return rows_source(validate_rows(make_rows(QUICK_MODELS, queries=6, plaid=False)[0]), "quick")


def curves(axis):
    """Drawn curves as (colour, line style, points), without the line at 100."""
    return [
        (to_hex(line.get_color()).upper(), line.get_linestyle(), line.get_xydata())
        for line in axis.lines
        if len(line.get_xdata()) == 6
    ]


def text_of(figure):
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


# ---------------------------------------------------------------- the tidy frame


def test_both_sources_have_the_same_cells(paper, offline):
    keys = ["exhibit", "dataset", "label", "pool_method", "pool_factor"]
    theirs, ours = (
        set(source.frame[keys].itertuples(index=False, name=None)) for source in (paper, offline)
    )
    assert theirs == ours
    assert list(paper.frame.columns) == list(offline.frame.columns)


def test_a_run_of_the_whole_grid_misses_nothing(offline):
    assert offline.frame["relative"].notna().all()
    assert [missing(offline, exhibit) for exhibit in CONTENTS] == [""] * 8


def test_our_cells_are_the_rows_values(offline, rows):
    relative = relative_ndcg(rows)
    expected = series(
        relative, "docs-torch-kmeans-pf1-6-s42", "docs:pandas", "kmeans", "plaid",
        value="relative_ndcg@10",
    )  # fmt: skip
    frame = offline.frame
    cell = frame[(frame["exhibit"] == "figure4") & (frame["dataset"] == "SCIDOCS")]
    cell = cell[cell["label"] == "FT FiQA KMeans PF1-6"].set_index("pool_factor")["relative"]
    assert cell.to_numpy() == pytest.approx(expected.to_numpy())


def test_the_average_panel_is_the_mean_of_five_and_missing_if_one_is(rows, offline):
    frame = offline.frame[offline.frame["exhibit"] == "figure1"]
    pivot = frame.pivot_table(
        index=["pool_method", "pool_factor"], columns="dataset", values="relative"
    )
    assert pivot["Average"].to_numpy() == pytest.approx(
        pivot.drop(columns="Average").mean(axis=1).to_numpy()
    )
    without = rows_source(rows[rows["collection"] != "docs:sklearn"], "offline").frame
    assert without.loc[without["dataset"] == "Average", "relative"].isna().all()


def test_several_seeds_are_averaged(rows):
    name = "docs-scipy-kmeans-pf1-6-s42"
    twin = rows[rows["model"] == name].assign(model=name.replace("s42", "s43"), seed=43)
    twin["ndcg@10"] -= 0.1
    frame = rows_source(pd.concat([rows, twin]), "x").frame
    alone = rows_source(rows, "x").frame
    chosen = (frame["exhibit"] == "table4") & (frame["label"] == "FT KMeans PF1-6")
    difference = alone.loc[chosen, "ndcg"] - frame.loc[chosen, "ndcg"]
    assert difference.to_numpy() == pytest.approx(np.full(6, 0.05))


def test_a_folder_without_numbers_is_refused(tmp_path):
    with pytest.raises(UserError, match="no result rows"):
        read_source(tmp_path)


# ---------------------------------------------------------------- one model


def of_one_model(rows, collections, factors):
    chosen = (rows["model"] == "baseline") & (rows["engine"] == "exact")
    chosen &= rows["collection"].isin(collections) & rows["pool_factor"].isin(factors)
    return rows[chosen]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3)])
def test_one_models_panels_are_its_collections_and_none_is_empty(rows, count, columns):
    figure = draw_kept(of_one_model(rows, COLLECTIONS[:count], [1, 2, 4]))
    assert [axis.get_title() for axis in figure.axes] == sorted(COLLECTIONS[:count])
    assert len({round(axis.get_position().x0, 2) for axis in figure.axes}) == columns
    below = [axis.get_xlabel() for axis in figure.axes]
    assert below == [""] * (count - columns) + ["Pool factor"] * columns


def test_one_models_curves_start_at_100_percent_and_tick_what_was_run(rows):
    figure = draw_kept(of_one_model(rows, COLLECTIONS[:2], [1, 2, 4]))
    for axis in figure.axes:
        lines = [line for line in axis.lines if line.get_marker() != "None"]
        colours = [to_hex(line.get_color()).upper() for line in lines]
        assert colours == [COLOURS[method] for method in ("hierarchical", "kmeans", "span")]
        assert all(list(line.get_xdata()) == [1, 2, 4] for line in lines)
        assert all(line.get_ydata()[0] == pytest.approx(100) for line in lines)
        assert list(axis.get_xticks()) == [1, 2, 4]
        low, high = axis.get_ylim()
        assert all(low < y < high for line in lines for y in line.get_ydata())
    assert "baseline: NDCG@10 kept" in text_of(figure) and "12 test queries" in text_of(figure)


def test_one_models_collection_that_was_not_pooled_says_so(rows):
    few = of_one_model(rows, COLLECTIONS[:2], [1, 2])
    pooled = (few["collection"] == "docs:scipy") & (few["pool_method"] != "none")
    axes = draw_kept(few[~pooled]).axes
    assert [[text.get_text() for text in axis.texts] for axis in axes] == [["not run"], []]


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("exhibit", FIGURES)
def test_panels_stand_where_the_papers_do(paper, offline, exhibit):
    for source in (paper, offline):
        figure = draw(source, exhibit)
        titles = [axis.get_title() for axis in figure.axes]
        flat = [dataset for row in PANELS[exhibit] for dataset in row]
        for title, dataset in zip(titles, flat, strict=True):
            assert dataset.split("2")[0] in title
        assert len({axis.get_ylim() for axis in figure.axes}) == 1
        assert all(list(axis.get_xticks()) == [1, 2, 3, 4, 5, 6] for axis in figure.axes)


@pytest.mark.parametrize("exhibit", FIGURES)
def test_every_number_is_drawn_inside_the_axes(paper, offline, exhibit):
    for source in (paper, offline):
        frame = source.frame[source.frame["exhibit"] == exhibit]
        figure = draw(source, exhibit)
        drawn = np.concatenate([xy for axis in figure.axes for _, _, xy in curves(axis)])
        expected = frame[["pool_factor", "relative"]].to_numpy(dtype=float)
        order = [np.lexsort(points.T) for points in (drawn, expected)]
        assert drawn[order[0]] == pytest.approx(expected[order[1]])
        low, high = figure.axes[0].get_ylim()
        assert low < expected[:, 1].min() and expected[:, 1].max() < high


def test_colours_and_lines_keep_their_meaning(paper):
    blue, orange, green, pink = "#0072B2", "#E08A00", "#009E73", "#CC79A7"
    assert [c[0] for c in curves(draw(paper, "figure1").axes[0])] == [blue, orange, green]
    figure3 = curves(draw(paper, "figure3").axes[0])
    assert [c[:2] for c in figure3] == [(blue, "--"), (green, "-"), (blue, "-"), (orange, "-")]
    figure4 = draw(paper, "figure4")
    assert [c[0] for c in curves(figure4.axes[2])] == [blue, orange, green, orange, pink]
    figure2 = draw(paper, "figure2").axes[0].lines[1:]
    assert len({(to_hex(line.get_color()), line.get_marker()) for line in figure2}) == 5
    squares = [line.get_marker() for line in figure4.axes[0].lines if line.get_linestyle() == "-"]
    assert set(squares) == {"s"} and len(squares) == 4


@pytest.mark.parametrize("exhibit", ["figure3", "figure4"])
def test_trained_curves_that_run_together_are_all_seen(offline, exhibit):
    for axis in draw(offline, exhibit).axes:
        solid = [line for line in axis.lines if line.get_linestyle() == "-"]
        solid.sort(key=lambda line: line.get_zorder())  # as they are painted
        sizes = [(line.get_linewidth(), line.get_markersize()) for line in solid]
        for (width, size), (next_width, next_size) in itertools.pairwise(sizes):
            assert width >= next_width + 0.5 and size >= next_size + 2
        assert all(line.get_markerfacecolor() == "none" for line in solid[:-1])


def test_a_note_speaks_of_the_engine_that_is_drawn(rows):
    many = rows.assign(queries=rows["queries"].where(rows["engine"] == "plaid", 280))
    source = rows_source(many, "offline")
    for exhibit in ("figure1", "figure2", "figure3", "overview"):
        text = text_of(draw(source, exhibit))
        assert "280 test queries a collection" in text and "PLAID" not in text
    text = text_of(draw(source, "figure4"))
    assert "12 test queries a collection" in text and "280" not in text
    assert "PLAID" not in table_markdown(source, "table1")


def test_what_was_not_run_is_said(quick):
    figure = draw(quick, "figure2")
    assert "Not run: FT Span PF2; FT Span PF3; FT Span PF1-6; FT PF1 on docs:torch" in (
        text_of(figure)
    )
    assert "Not run" not in text_of(draw(quick, "figure1"))
    assert missing(quick, "table4") == "FT KMeans PF2"


def test_panels_of_collections_that_were_not_run_say_so(rows):
    few = rows[(rows["collection"] == "docs:scipy") & (rows["engine"] == "exact")]
    figure = draw(rows_source(few, "smoke"), "figure3")
    assert [text.get_text() for text in figure.axes[1].texts] == ["not run"]
    assert "docs:torch (everything)" in text_of(figure)
    nothing = draw(rows_source(few, "smoke"), "figure4")
    assert all(axis.texts[0].get_text() == "not run" for axis in nothing.axes)


def test_gaps_within_a_curve_are_named(rows):
    gone = (rows["pool_method"] == "span") & (rows["pool_factor"] == 5)
    gone &= (rows["model"] == "baseline") & (rows["collection"] == "docs:scipy")
    source = rows_source(rows[~gone], "x")
    assert missing(source, "table1") == "Baseline span at PF 5"
    assert table(source, "table1")["PF5"][0] == "not run"


def test_the_overview_shows_vectors_a_document_and_the_three_models(offline, paper):
    axis = draw(offline, "overview").axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()][:2] == [
        "1\n100 vectors",
        "2\n50 vectors",
    ]
    assert len(curves(axis)) == 3 and len(axis.texts) == 3
    assert "98.3 %" in " ".join(text.get_text() for text in draw(paper, "overview").axes[0].texts)


@pytest.mark.parametrize("exhibit", [*FIGURES, "overview"])
def test_no_text_or_legend_leaves_the_canvas(paper, offline, quick, exhibit):
    for source in (paper, offline, quick):
        figure = draw(source, exhibit)
        width, height = figure.bbox.width, figure.bbox.height
        inside = [text for axis in figure.axes for text in axis.texts]
        for artist in [*figure.texts, *figure.legends, *inside]:
            box = artist.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, artist


def test_an_unknown_exhibit_is_refused(paper):
    with pytest.raises(UserError, match="figure9.*figure1"):
        draw(paper, "figure9")
    with pytest.raises(UserError, match="figure1.*table1"):
        table(paper, "figure1")


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("exhibit", TABLES)
def test_the_papers_tables_come_back_as_printed(paper, exhibit):
    printed = pd.read_csv(PAPER / f"{exhibit}.csv")
    pd.testing.assert_frame_equal(
        table_values(paper, exhibit).reset_index(drop=True), printed, check_dtype=False
    )


def test_a_cell_reads_ndcg_percent_and_difference(paper):
    assert table(paper, "table1").set_index("Model").loc["Baseline", "PF4"] == "0.278 (34.4)"
    across = table(paper, "table2").set_index(["Collection", "Model"])
    assert list(across.columns) == ["PF1", "PF2", "PF4", "PF6"]
    assert across.loc[("SCIDOCS", "FT FiQA KMeans PF1-6"), "PF1"] == "0.382 (96.3) −0.015"
    assert across.loc[("NFCorpus", "FT SciFact KMeans PF1-6"), "PF2"] == "0.370 (98.9) +0.000"


def test_our_tables_are_laid_out_like_the_papers(paper, offline):
    for exhibit in TABLES:
        ours, theirs = table(offline, exhibit), table(paper, exhibit)
        assert ours.shape == theirs.shape and list(ours.columns) == list(theirs.columns)
    assert "FT docs:torch KMeans PF1-6" in set(table(offline, "table2")["Model"])
    text = table_markdown(offline, "table3")
    assert "docs:scipy (in SciFact’s role)" in text and "not run" not in text


def test_our_differences_are_to_the_baseline_at_the_same_factor(offline):
    values = table_values(offline, "table2").set_index(["dataset", "model", "pool_factor"])
    trained = values.loc[("docs:numpy", "FT docs:scipy KMeans PF1-6", 4)]
    baseline = values.loc[("docs:numpy", "Baseline", 4)]
    difference = trained["ndcg10"] - baseline["ndcg10"]
    assert trained["delta"] == pytest.approx(difference, abs=1.1e-4)
    assert np.isnan(baseline["delta"])


# ---------------------------------------------------------------- files


def test_everything_is_written_readably_and_the_same_each_time(tmp_path):
    once = draw_all(PAPER, tmp_path / "once")
    again = draw_all(PAPER, tmp_path / "again")
    assert [file.name for file in once] == [file.name for file in again]
    assert len(once) == 5 * 2 + 4 * 2
    for first, second in zip(once, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    with Image.open(tmp_path / "once" / "figure1.png") as image:
        assert min(image.info["dpi"]) >= 200 - 1 and image.width > 2000


def test_the_command_redraws_every_folder_of_numbers(tmp_path, capsys):
    data = tmp_path / "data"
    write_synthetic(data / "quick", QUICK_MODELS, queries=5)
    (data / "paper").symlink_to(PAPER)
    (data / "notes").mkdir()
    main(["--data", str(data), "--out", str(tmp_path / "figures")])
    assert sorted(folder.name for folder in (tmp_path / "figures").iterdir()) == ["paper", "quick"]
    assert "20 files" in capsys.readouterr().out
    claims = pd.read_csv(tmp_path / "figures" / "quick" / "claims.csv")
    assert set(claims["finding"]) == set(range(1, 8))
    with pytest.raises(SystemExit, match="no folder"):
        main(["--data", str(tmp_path / "absent")])


def test_a_figure_shows_itself_in_a_notebook(paper):
    assert draw(paper, "figure2")._repr_png_().startswith(b"\x89PNG")


def test_drawing_needs_no_model_library():
    code = "import sys, l2p_utils.figures; print(sorted({'torch', 'pylate'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_papers_folder_reads_the_same_through_both_doors(paper):
    pd.testing.assert_frame_equal(paper.frame, read_paper(PAPER))
