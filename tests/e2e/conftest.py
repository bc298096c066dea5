"""The matrix of commands, methods, models and data, for the tests of docs/support.md."""

from tests.support.matrix import loaded, matrix_models, tried  # noqa: F401 (fixtures)
from tests.support.support_page import page  # noqa: F401 (fixture)
