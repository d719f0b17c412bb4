"""Stub of the rebuild: the paper's figures, tables and rows as one frame."""

from l2p_utils.comparison import compare_with_paper  # noqa: F401
from l2p_utils.exhibits import read_source  # noqa: F401
from l2p_utils.results import (  # noqa: F401
    HUB_SUITES,
    ROLES,
    Roles,
    read_paper,
    roles_of,
)
