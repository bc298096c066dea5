"""Tokenizers of both kinds for all tests of data modules."""

from tests.support.tokenizers import causal, seq2seq  # noqa: F401 (fixtures)
