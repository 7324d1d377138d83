"""From decoded images to views and their actions. Nothing is imported here: DALI takes half a second."""
