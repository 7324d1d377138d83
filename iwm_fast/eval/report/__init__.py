"""The page that shows what a run is worth."""
