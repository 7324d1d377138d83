"""Verdicts beside controls follow from intervals, and never from the values alone."""

import pytest

from iwm_fast.eval.report.terminal import result_rows
from iwm_fast.eval.report.verdicts import verdict_lines, verdict_results


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        ([0.44, 0.46], [0.28, 0.30], "k-NN: better than untrained"),
        ([0.20, 0.22], [0.28, 0.30], "k-NN: worse than untrained"),
        (
            [0.29, 0.46],
            [0.28, 0.30],
            "k-NN: no better than untrained: the 95 % intervals overlap (29.0 % – 46.0 % and 28.0 % – 30.0 %)",
        ),
    ],
)
def test_a_probe_is_compared_with_the_untrained_network_by_intervals(own, other, said):
    assert verdict_lines({"knn": 0.9, "knn_interval": own, "knn_untrained": 0.1, "knn_untrained_interval": other}) == [
        said
    ]
    short = verdict_lines({"knn_interval": own, "knn_untrained_interval": other}, ends=False)
    assert short == [said.split(" (")[0]]


def test_mrr_is_compared_with_chance_and_with_shuffled_actions():
    found = {"mrr_interval": [0.2, 0.3], "mrr_chance": 0.024, "mrr_shuffled_interval": [0.02, 0.03]}
    assert verdict_lines(found) == ["MRR: better than chance; better than with shuffled actions"]
    alike = found | {"mrr_interval": [0.02, 0.03]}
    (line,) = verdict_lines(alike)
    assert line.startswith("MRR: no better than chance (0.024): the 95 % interval begins at 0.020; no better than with")


def test_verdicts_are_in_json_under_the_name_of_their_measurement():
    found = {"mrr_interval": [0.2, 0.3], "mrr_chance": 0.024, "equivariance_interval": [0.5, 0.6]}
    found |= {"equivariance_untrained_interval": [0.1, 0.2], "knn_interval": [0.4, 0.6]}
    said = {"mrr_verdict": "better than chance", "equivariance_verdict": "better than untrained"}
    assert verdict_results(found) == said
    assert verdict_lines(found, ("equivariance", "rollout")) == ["equivariance: better than untrained"]


def test_what_has_no_control_has_no_verdict():
    assert verdict_lines({"knn": 0.5, "knn_interval": [0.4, 0.6]}) == []


def test_accuracies_of_the_table_are_percentages_under_the_names_of_the_page():
    (row,) = result_rows({"knn": 0.4521, "knn_interval": [0.44, 0.46], "knn_untrained": 0.292, "knn_chance": 0.1})
    assert row == ["k-NN top-1", "45.2 %", "44.0 % – 46.0 %", "10.0 %", "", "", "29.2 %"]
