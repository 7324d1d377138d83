"""docs/reference/configuration.md: every key of a configuration, from the schema."""

from __future__ import annotations

from iwm_fast.config.schema import Config
from iwm_fast.config.schema_table import Row, rows
from tools.documentation.markdown import GENERATED, from_docstring, table

__all__ = ["page"]

_HEAD = f"""# Configuration

{GENERATED} A configuration is a YAML file with these sections; what a file leaves out has its default.

```sh
iwm-fast config vit_tiny_p4_32.yaml train.lr=5e-4     # a configuration as it would be used
iwm-fast pretrain my.yaml data.root=photos/train train.lr=5e-4 --out runs/a
iwm-fast config --schema                              # this page in a terminal; --json for programs
```

Give any key on the command line as `section.key=value`. A value is a number, `true` or `false`, `null`, or YAML that
begins with a bracket, a brace or a quote: `train.ema=[0.99,0.9999]`. A key that holds text takes the text as it is. An
unknown key, a wrong type or a value outside its range ends in one line that says what is allowed.
"""


def _description(section: str) -> str:
    """The docstring of the model that holds the section's keys."""
    model = Config
    for name in filter(None, section.split(".")):
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and hasattr(annotation, "model_fields")):
            return ""
        model = annotation
    return from_docstring(model.__doc__)


def page() -> str:
    """The Markdown."""
    lines = [_HEAD]
    sections: dict[str, list[Row]] = {}
    for row in rows():
        sections.setdefault(row.key.rpartition(".")[0], []).append(row)
    for section, keys in sections.items():
        cells = [(f"`{row.key}`", f"`{row.default}`", row.allowed, row.description) for row in keys]
        said = _description(section)
        lines += [f"## {section or 'plugins'}", "", *([said, ""] if said else [])]
        lines += [*table(("key", "default", "value", "meaning"), cells), ""]
    return "\n".join(lines).rstrip() + "\n"
