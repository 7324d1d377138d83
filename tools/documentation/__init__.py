"""Documentation that is made from the code, and the hooks of the site.

    python -m tools.documentation        # writes docs/reference/configuration.md, command_line.md and python.md again

Run it after a key, an option or a public docstring has changed; a test fails where a page is not what this writes.
"""
