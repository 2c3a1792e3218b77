"""Break runs in every way that users report, and check that nothing is lost. See `__main__`."""
