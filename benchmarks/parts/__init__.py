"""What programs beside this folder are made of, where one file would be too long."""
