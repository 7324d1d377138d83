"""The commands of a group each, as Typer applications or functions that `iwm_fast.cli.main` joins into one."""
