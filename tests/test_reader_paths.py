"""A newcomer finds the answers on pages that README.md and docs/index.md link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = [
    ("docs/guides/distributed.md", "## ImageNet on eight GPUs", "torchrun --nproc_per_node 8 -m iwm_fast pretrain"),
    ("docs/guides/batch_and_schedule.md", "## The learning rate", "train.lr_batch"),
    ("docs/guides/healthy_training.md", "## What each number is", "rank_me"),
    ("docs/guides/augmentations.md", "## What there is", "actions.strength"),
    ("docs/extend/data_source.md", "# Data source", "@register_source("),
    ("docs/extend/encoder.md", "# Encoder", "register_encoder("),
    ("docs/guides/export.md", "## Start from existing weights", "model.init"),
    ("docs/guides/start_from_weights.md", "## What can be loaded", "DINOv3ViTModel"),
    ("docs/guides/export.md", "## timm", "timm.create_model("),
    ("docs/guides/export.md", "## Plain PyTorch", "load_file("),
    ("docs/guides/evaluate.md", "## Compare runs", "iwm-fast compare runs/a runs/b"),
    ("docs/guides/benchmark_and_profile.md", "## Profile one kernel", "--ncu"),
]


def links(page):
    """Return the files that a page links to, relative to the checkout."""
    targets = re.findall(r"\]\(([^)#\s:]+\.md)(?:#[\w-]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    return {str(((ROOT / page).parent / target).resolve().relative_to(ROOT)) for target in targets}


def section(page, heading):
    """Return the text from a heading to the next of its level or above; empty where it is missing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    level = len(heading.split()[0])
    found = re.search(rf"(?ms)^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text)
    return found[1] if found else ""


@pytest.mark.parametrize(("page", "heading", "phrase"), QUESTIONS)
def test_the_section_that_answers_is_linked_from_readme_and_index(page, heading, phrase):
    assert phrase in section(page, heading)
    assert page in links("README.md")
    assert page in links("docs/index.md")


def test_readme_says_whose_weights_a_training_can_start_from():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "`model.init=PATH` starts from weights of timm, transformers, DINO, I-JEPA or MAE" in text
