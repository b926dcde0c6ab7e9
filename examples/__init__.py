"""Runnable examples; a package only so that the tests import the same text loader as the examples."""
