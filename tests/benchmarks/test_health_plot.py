from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from iwm_fast.benchmarks.plots.health import draw, table
from iwm_fast.config import load_config, packaged_config
from iwm_fast.engine.metrics.collapse import CollapseWatch

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT, GUIDE = ROOT / "benchmarks/results/health_cpu.json", ROOT / "docs/guides/healthy_training.md"


def test_the_committed_curves_show_what_the_guide_says(tmp_path):
    """The collapsed run has the lower loss and less than half of the RankMe, and the table says so."""
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    rows = {
        tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ") for line in table(document).splitlines()
    }
    healthy, shared = rows["healthy", "300"], rows["shared target", "300"]
    assert float(shared[2]) < float(healthy[2]) / 2
    assert float(shared[3]) < float(healthy[3]) / 2
    assert float(shared[5]) < float(healthy[5])
    draw(document, tmp_path / "health.png", 6.4)
    assert Image.open(tmp_path / "health.png").size[0] > 1000


def test_the_log_warns_of_the_committed_collapse_once_and_of_the_healthy_run_never():
    document = json.loads(RESULT.read_text(encoding="utf-8"))
    said = {}
    for arm in document["arms"]:
        overrides = ["data.root=x", "train.warmup=50", *arm["overrides"]]
        watch = CollapseWatch(load_config(packaged_config("vit_tiny_p4_32.yaml"), overrides))
        said[arm["name"]] = [line for line in map(watch.look, arm["runs"][0]["curve"]) if line]
    assert said["healthy"] == []
    (line,) = said["shared target"]
    assert line in GUIDE.read_text(encoding="utf-8")
