"""Evaluations of the world model: ranks of its predictions, roll-outs, sliders, inferred actions."""
