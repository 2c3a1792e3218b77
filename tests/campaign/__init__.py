"""Breaks runs in every way that users report, and checks that nothing is lost. See `__main__`."""
