"""What the world model is worth: ranks of its predictions, roll-outs, sliders, inferred actions."""
