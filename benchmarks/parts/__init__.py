"""Parts of the programs beside this folder."""
