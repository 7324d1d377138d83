"""Runs side by side: how their configurations differ, their curves, and which measured differences are beyond noise."""
