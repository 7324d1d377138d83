"""Commands by group, as Typer applications or functions that `iwm_fast.cli.main` combines."""
