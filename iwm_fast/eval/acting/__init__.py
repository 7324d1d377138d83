"""Act in an environment with a trained world model: plan, hold the first actions, look, and plan again."""
