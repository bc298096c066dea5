"""The two sandboxes, as fixtures."""

import os

import pytest

from app.evaluation.sandbox.judge import check_judge
from app.utils.errors import InputError


@pytest.fixture(scope="session")
def bubblewrap():
    """Skip without bubblewrap; where CI is true, fail."""
    try:
        check_judge("bubblewrap")
    except InputError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(params=[pytest.param("bubblewrap", marks=pytest.mark.sandbox), "unprotected"])
def mode(request):
    """Run a test in each sandbox that there is."""
    if request.param == "bubblewrap":
        request.getfixturevalue("bubblewrap")
    return request.param
