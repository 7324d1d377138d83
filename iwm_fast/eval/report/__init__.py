"""The report of a run's evaluations, one HTML page."""
