"""How a run is kept: saved, verified and restored. Only this package imports Orbax."""
