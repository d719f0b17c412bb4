"""Stub of the rebuild: notebooks run headless, their parameters checked."""

from l2p_utils.execute import NotebookError, execute  # noqa: F401
from l2p_utils.parameters import check_parameters  # noqa: F401
