"""Run in a process of its own: open exports as their model cards say, with timm, transformers and torch alone.

Arguments: folders of exports, each with README.md and cat.jpg. Writes into each opened.safetensors what the card's code
computes (tokens, features, predicted, and pixels of large.jpg where it has a processor), and opened.json: classes,
and what the library said of missing weights.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from reference_libraries import import_torchvision

# Nothing of this project can be imported. A checkout's root goes too: its kernels/ would be taken for a library.
sys.path = [path for path in sys.path if not (Path(path) / "kernels" / "conditioned_mlp.py").is_file()]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.modules["iwm_fast"] = None  # type: ignore[assignment]
import_torchvision()
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def opened(folder: Path) -> None:
    os.chdir(folder)
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("transformers", "timm"):
        logging.getLogger(name).addHandler(handler)
    names: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        exec(code, names)
    about = {
        "said": said,
        "warned": [str(one.message) for one in warned],
        "encoder": type(names["encoder"]).__name__,
    }
    found = {
        key: torch.as_tensor(np.asarray(names[key])) for key in ("tokens", "features", "predicted") if key in names
    }
    if (folder / "preprocessor_config.json").exists():
        pictures = names["processor"](Image.open("large.jpg"), return_tensors="pt")
        found["pixels"] = pictures["pixel_values"]
        loaded = {".": names["AutoModel"].from_pretrained(".", output_loading_info=True)[1]}
        loaded["predictor"] = names["AutoModel"].from_pretrained(
            "predictor", trust_remote_code=True, output_loading_info=True
        )[1]
        about["loading"] = {place: {key: sorted(map(str, value)) for key, value in info.items() if value}
                            for place, info in loaded.items()}  # fmt: skip
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "opened.safetensors")
    (folder / "opened.json").write_text(json.dumps(about))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for place in sys.argv[1:]:
        opened(Path(place))
