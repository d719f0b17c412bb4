"""Shared by all tests: one thread, and the bundled model, built once."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# No deadline: a busy machine is no failure. Derandomised: what passes here passes elsewhere.
settings.register_profile("here", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("here")

TEXTS = [
    "Return the mean of an array along the given axis, ignoring missing values.",
    "Compute the singular value decomposition of a matrix; see also `eig` and `qr`.",
    "Sort the rows by one or more keys (stable), in ascending order.",
    "Draw samples from a normal distribution.",
    "Read a table from a file: comma-separated, with a header.",
    "Interpolate between points with a cubic spline. The second derivative is zero at both ends.",
    "Train a classifier on labelled examples, and predict the class of new ones.",
    "Solve a system of linear equations A x = b for x, where A is square.",
]


@pytest.fixture(scope="session")
def texts():
    """Eight short documents, with punctuation."""
    return list(TEXTS)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folder of the bundled model: queries of 16, documents of 32 word pieces."""
    from l2p_utils.model import build_bundled_model  # takes seconds to import

    folder = tmp_path_factory.mktemp("models") / "bundled"
    build_bundled_model(folder, TEXTS, query_length=16, document_length=32)
    return folder


@pytest.fixture(scope="session")
def bundled_model(model_folder):
    """The bundled model itself; a test that changes it must load its own from `model_folder`."""
    from l2p_utils.model import build_bundled_model

    return build_bundled_model(model_folder, TEXTS, query_length=16, document_length=32)
