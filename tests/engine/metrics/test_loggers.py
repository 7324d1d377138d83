"""Sinks beside metrics.jsonl: steps that come again, and sinks that fail."""

import errno
import json

from small_run import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from iwm_fast.engine.metrics.log import MetricsLog
from iwm_fast.engine.metrics.loggers import open_sinks


def test_tensorboard_shows_each_step_once_after_a_run_resumed_and_after_it_started_over(tmp_path):
    config, folder = small_config(tmp_path, log__tensorboard=True), tmp_path / "tensorboard"
    shown = []
    for first, losses in ((1, [3.0, 2.0, 1.0]), (3, [1.5, 0.5]), (1, [9.0])):
        (board,) = open_sinks(config, tmp_path, folder, first)
        for step, loss in enumerate(losses, first):
            board.write({"step": step, "loss": loss})
        board.close()
        events = EventAccumulator(str(folder)).Reload().Scalars("loss")
        shown.append([(event.step, event.value) for event in events])
    assert shown == [
        [(1, 3.0), (2, 2.0), (3, 1.0)],
        [(1, 3.0), (2, 2.0), (3, 1.5), (4, 0.5)],
        [(1, 9.0)],
    ]


def test_a_sink_that_fails_gets_no_more_and_the_metrics_go_on(tmp_path, capsys):
    class Full:
        where, seen = "board (log.tensorboard)", 0

        def write(self, record):
            self.seen += len(record)
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            raise AssertionError("it is forgotten")

    sink = Full()
    log = MetricsLog(tmp_path / "metrics.jsonl", [sink])
    for step in (1, 2):
        log.write({"step": step})
    log.close()
    assert sink.seen == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2]
    assert capsys.readouterr().err == (
        "board (log.tensorboard): No space left on device; free space there; it gets no more of this run\n"
    )
