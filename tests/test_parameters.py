"""Notebook parameters: what is refused, and that a reader's own cells raise no false alarm."""

from pathlib import Path

import nbformat
import pytest

from l2p_utils.files import UserError
from l2p_utils.parameters import check_parameters
from l2p_utils.profile import parse_factors

DEFAULTS = 'profile = "quick"\nseed = 42'
CHECK = "check_parameters(globals(), profile=str, seed=int)"
IMPORTS = "from l2p_utils.parameters import check_parameters"


def check(*cells, known=None, **values):
    """Run the check as the last of `cells`, in a namespace that holds `values`."""
    known = known or {"profile": str, "seed": int}
    namespace = {"profile": "quick", "seed": 42, "In": ["", *cells, CHECK], **values}
    check_parameters(namespace, **known)


def test_defaults_pass():
    check(IMPORTS, DEFAULTS)


def test_injected_known_names_pass():
    check(IMPORTS, DEFAULTS, '# Parameters\nprofile = "smoke"\n', profile="smoke")


@pytest.mark.parametrize(
    "injected",
    [
        "# Parameters\nprofil = 'smoke'\n",
        "# Parameters\nprofil = None\n",
        "# Parameters\nseed = 1\nprofil = {'a': [1, -2.5, True]}\n",
        "# Parameters\nprofil = float('nan')\n",
    ],
)
def test_unknown_injected_name_is_refused_with_the_names_that_exist(injected):
    with pytest.raises(UserError, match="unknown: profil. This notebook has: profile, seed"):
        check(IMPORTS, DEFAULTS, injected)


def test_unknown_name_typed_into_the_parameters_cell_is_refused():
    with pytest.raises(UserError, match="unknown: sede"):
        check(IMPORTS, 'profile = "quick"\nsede = 3')
    with pytest.raises(UserError, match="unknown: sede"):
        check(IMPORTS, 'profile: str = "quick"\nsede: int = 3')


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("profile", 3, "type str"),
        ("seed", "42", "type int"),
        ("seed", 1.0, "type int"),
        ("seed", True, "type int"),
        ("seed", None, "type int"),
    ],
)
def test_wrong_type_is_refused_with_name_value_and_expectation(name, value, wanted):
    with pytest.raises(UserError) as refused:
        check(DEFAULTS, **{name: value})
    assert f"{name} = {value!r}" in str(refused.value) and wanted in str(refused.value)


def test_bool_parameter_takes_bools_only():
    check(known={"draw": bool}, draw=False)
    with pytest.raises(UserError, match="draw = 0"):
        check(known={"draw": bool}, draw=0)


def test_tuple_lists_the_allowed_values():
    known = {"pool_method": ("none", "kmeans")}
    check(known=known, pool_method="kmeans")
    with pytest.raises(UserError, match=r"pool_method = 'means'; expected one of \['none', 'kme"):
        check(known=known, pool_method="means")
    with pytest.raises(UserError, match="factor = True"):
        check(known={"factor": (1, 2)}, factor=True)


def test_callable_refuses_by_raising():
    check(known={"pool_factors": parse_factors}, pool_factors="1-6")
    with pytest.raises(UserError, match="pool_factors = 'two': .*whole numbers"):
        check(known={"pool_factors": parse_factors}, pool_factors="two")


def test_missing_parameter_is_refused():
    with pytest.raises(UserError, match="seed = None"):
        check_parameters({"profile": "quick"}, profile=str, seed=int)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as refused:
        check(DEFAULTS, "# Parameters\nx = 1\ny = 2", profile=1, seed="a")
    for problem in ("unknown: x, y", "profile = 1", "seed = 'a'", "nothing was run"):
        assert problem in str(refused.value)


@pytest.mark.parametrize(
    "before",
    [
        "rows = read_rows(source)",
        "limit = 10",
        "limit: int = 10",
        "limit, other = 1, 2",
        "rows.columns = ['a']",
        "for i in range(3): print(i)",
        "seed += 1",
        "profile = load_profile(profile)\nrows = profile.runs",
        "%matplotlib inline",
        "!ls",
        "limit = = 3",
        "",
        "profile",
        "def f():\n    unknown = 1",
    ],
)
def test_other_cells_run_before_raise_no_false_alarm(before):
    check(IMPORTS, DEFAULTS, CHECK, before)  # the check alone, again
    check(IMPORTS, DEFAULTS, CHECK, before, DEFAULTS)  # from the parameters on, again
    check(before, DEFAULTS)


def test_without_ipython_only_the_values_are_checked():
    check_parameters({"profile": "quick", "seed": 1, "other": 2}, profile=str, seed=int)


def test_in_a_real_ipython_shell_the_history_is_read():
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.run_cell(IMPORTS, store_history=True)
    shell.run_cell(DEFAULTS, store_history=True)
    assert shell.run_cell(CHECK, store_history=True).success
    shell.run_cell("# Parameters\nsed = 1", store_history=True)
    refused = shell.run_cell(CHECK, store_history=True).error_in_exec
    assert isinstance(refused, UserError) and "unknown: sed." in str(refused)


# --- notebook 02's own check


def check_training_notebook(**given):
    """Run the notebook's cells of parameters and of their check, as papermill would."""
    path = Path(__file__).parent.parent / "notebooks" / "02_training.ipynb"
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    namespace = {}
    exec(cells[0].source, namespace)
    exec(cells[1].source, namespace | given)


@pytest.mark.parametrize(
    "given", [{}, {"seed": 0}, {"seed": 2**32 - 1}, {"pool_method": "none", "pool_factors": 1}]
)
def test_a_training_that_can_be_run_passes(given):
    check_training_notebook(**given)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "42", True, None])
def test_a_seed_that_cannot_be_is_refused_before_any_work(seed):
    with pytest.raises(UserError, match="nothing was run:\n  seed = .*from 0 to 4294967295"):
        check_training_notebook(seed=seed)


@pytest.mark.parametrize(("pool_method", "pool_factors"), [("none", "1-6"), ("kmeans", 1)])
def test_a_method_and_factors_that_do_not_fit_are_refused_before_any_work(
    pool_method, pool_factors
):
    with pytest.raises(UserError, match="the other way round"):
        check_training_notebook(pool_method=pool_method, pool_factors=pool_factors)
