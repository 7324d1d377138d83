"""The tree follows the layers in `architecture`, and the checks find violations."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from architecture import (
    FACES,
    GROUND,
    LONGEST,
    ROOMS,
    crossed_borders,
    foreign_libraries,
    long_modules,
    module_circles,
    package_circles,
    read_house,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def house():
    """Return every module of the checkout except tests, new ones that are not committed yet included."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [file for file in listed if file and not file.startswith("tests/") and (ROOT / file).is_file()]
    found = read_house({file: (ROOT / file).read_text(encoding="utf-8") for file in files})
    assert {"iwm_fast.engine.train", "iwm_fast.kernels.aot", "iwm_fast.benchmarks.step"} <= {m.name for m in found}
    return found


@pytest.mark.parametrize("check", [crossed_borders, package_circles, module_circles, foreign_libraries, long_modules])
def test_the_tree_follows_the_layers(check, house):
    faults = check(house)
    assert not faults, "\n".join(faults)


def test_every_room_of_the_tables_is_in_the_tree(house):
    there = {module.room for module in house}
    assert there == {*ROOMS, *GROUND, *FACES}


def test_arrows_of_the_table_run_down():
    rooms = list(ROOMS)
    assert all(rooms.index(below) < rooms.index(room) for room in rooms for below in ROOMS[room])


BORDERS = {
    "an arrow up": (
        {"iwm_fast/engine/loop.py": "import os\nfrom iwm_fast.eval.online import measure\n"},
        "iwm_fast/engine/loop.py:2: engine imports iwm_fast.eval.online; there is no arrow from engine to eval",
    ),
    "an arrow up in a function": (
        {"benchmarks/step.py": "def f():\n    from iwm_fast.cli.options import only_rank\n"},
        "benchmarks/step.py:2: benchmarks imports iwm_fast.cli.options; there is no arrow from benchmarks to cli",
    ),
    "an arrow up for type checkers": (
        {"iwm_fast/models/vit.py": "import typing\nif typing.TYPE_CHECKING:\n    import iwm_fast.engine.zero\n"},
        "iwm_fast/models/vit.py:3: models imports iwm_fast.engine.zero; there is no arrow from models to engine",
    ),
    "a relative arrow up": (
        {"iwm_fast/data/views/graph.py": "from ...models import vit\n", "iwm_fast/models/vit.py": ""},
        "iwm_fast/data/views/graph.py:1: data imports iwm_fast.models.vit; there is no arrow from data to models",
    ),
    "kernels that import the ground": (
        {"kernels/loss.py": "from iwm_fast.errors import UserError\n"},
        "kernels/loss.py:1: kernels imports iwm_fast.errors; there is no arrow from kernels to errors",
    ),
    "configuration that imports more than errors": (
        {"iwm_fast/config/load.py": "import iwm_fast.errors\nimport iwm_fast.console\n"},
        "iwm_fast/config/load.py:2: config imports iwm_fast.console; there is no arrow from config to console",
    ),
    "ground that imports a room": (
        {"iwm_fast/file_locks.py": "from iwm_fast.data.sources import left_out\n"},
        "iwm_fast/file_locks.py:1: file_locks imports iwm_fast.data.sources; the ground imports only the ground",
    ),
    "the package itself": (
        {"iwm_fast/engine/peers.py": "from iwm_fast import kernels\nimport iwm_fast\n", "kernels/__init__.py": ""},
        (
            "iwm_fast/engine/peers.py:2: engine imports iwm_fast; version and parent_process hold the facts of "
            "iwm_fast/__init__, api its model"
        ),
    ),
    "a room that nobody planned": (
        {"iwm_fast/helpers/misc.py": ""},
        "iwm_fast/helpers/misc.py:1: helpers is a room that ROOMS, GROUND and FACES do not name",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sources", "fault"), BORDERS.values(), ids=BORDERS)
def test_a_crossed_border_is_named_with_its_file_line_and_rule(sources, fault):
    assert crossed_borders(read_house(sources)) == [fault]


def test_arrows_down_and_submodules_of_the_package_are_allowed():
    sources = {
        "kernels/__init__.py": "",
        "iwm_fast/engine/ema.py": "from iwm_fast import kernels\nfrom iwm_fast.errors import UserError\n",
        "iwm_fast/cli/bench.py": "from iwm_fast.benchmarks.step import measure_step\n",
        "iwm_fast/__init__.py": "def load():\n    from iwm_fast.api import load_world\n",
        "examples/use.py": "import iwm_fast\n",
    }
    assert crossed_borders(read_house(sources)) == []


KERNEL = "import math\nimport torch.nn\ntry:\n    import xformers.ops\nexcept ImportError:\n    pass\n"
LIBRARY_FAULTS = {
    "kernels": (
        {"kernels/loss.py": KERNEL},
        "kernels/loss.py:4: imports xformers.ops; at module level iwm_fast.kernels imports torch, triton, numpy",
    ),
    "transformations": (
        {"iwm_fast/actions/transforms.py": "import numpy as np\nimport torch\n"},
        "iwm_fast/actions/transforms.py:2: imports torch; at module level iwm_fast.actions.transforms imports numpy",
    ),
    "ground": (
        {"iwm_fast/console.py": "import rich.table\nimport torch\n"},
        "iwm_fast/console.py:2: imports torch; at module level iwm_fast.console imports rich, numpy",
    ),
}


@pytest.mark.parametrize(("sources", "fault"), LIBRARY_FAULTS.values(), ids=LIBRARY_FAULTS)
def test_a_foreign_library_is_named(sources, fault):
    assert foreign_libraries(read_house(sources)) == [fault]


def test_libraries_in_functions_and_in_other_rooms_are_allowed():
    sources = {"kernels/aot.py": "def f():\n    import pandas\n", "iwm_fast/data/graph.py": "import nvidia.dali\n"}
    assert foreign_libraries(read_house(sources)) == []


def test_a_long_module_is_named_with_its_lines():
    sources = {"iwm_fast/errors.py": "\n" * LONGEST, "kernels/aot.py": "\n" * (LONGEST + 1)}
    assert long_modules(read_house(sources)) == [
        f"kernels/aot.py:{LONGEST + 1}: a module has at most {LONGEST} lines; look for the second job in it"
    ]


# As engine and eval once were, one of them in a function, and as sources and decode were, one level below.
PACKAGES = {
    "rooms": (
        {
            "iwm_fast/engine/loop.py": "from iwm_fast.eval.online import measure\n",
            "iwm_fast/eval/run.py": "def f():\n    from iwm_fast.engine.zero import x\n",
            "iwm_fast/eval/online.py": "",
            "iwm_fast/engine/zero.py": "",
        },
        "iwm_fast/engine/loop.py:1: engine → eval, iwm_fast/eval/run.py:2: eval → engine",
    ),
    "packages of a room": (
        {
            "iwm_fast/data/sources/tar.py": "from iwm_fast.data.decode.encoded import Encoded\n",
            "iwm_fast/data/decode/encoded.py": "",
            "iwm_fast/data/decode/checkers.py": "from iwm_fast.data.samples import read\n",
            "iwm_fast/data/samples.py": "from iwm_fast.data.sources import tar\n",
        },
        (
            "iwm_fast/data/sources/tar.py:1: sources → decode, iwm_fast/data/decode/checkers.py:1: decode → samples, "
            "iwm_fast/data/samples.py:1: samples → sources"
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sources", "circle"), PACKAGES.values(), ids=PACKAGES)
def test_a_circle_of_packages_is_found_though_no_two_modules_are_in_one(sources, circle):
    house = read_house(sources)
    assert package_circles(house) == [f"{circle}: packages import each other in a circle"]
    assert module_circles(house) == []


def test_a_circle_of_modules_is_found_at_import_time_and_by_way_of_a_package():
    sources = {
        "iwm_fast/data/__init__.py": "from iwm_fast.data.loader import Loader\n",
        "iwm_fast/data/loader.py": "from iwm_fast.data.masks import draw\n",
        "iwm_fast/data/masks.py": "from iwm_fast.data import Loader\n",
    }
    (circle,) = module_circles(read_house(sources))
    assert circle == (
        "iwm_fast/data/__init__.py:1: iwm_fast.data → iwm_fast.data.loader, iwm_fast/data/loader.py:1: "
        "iwm_fast.data.loader → iwm_fast.data.masks, iwm_fast/data/masks.py:1: iwm_fast.data.masks → iwm_fast.data: "
        "modules import each other in a circle"
    )
    late = sources | {"iwm_fast/data/masks.py": "def f():\n    from iwm_fast.data import Loader\n"}
    assert module_circles(read_house(late)) == []
    plain = sources | {"iwm_fast/data/masks.py": "from iwm_fast.data import batch\n", "iwm_fast/data/batch.py": ""}
    assert module_circles(read_house(plain)) == []
