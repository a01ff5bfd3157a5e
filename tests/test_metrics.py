"""Metrics that are updated with a rank's own positions: the states of one device, and no whole logits."""

from __future__ import annotations

from typing import Any

import jobs
import modules
import pytest
import torch
from pool import Pool
from test_fit import FULL, assert_same
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from lightning_autosp import by_position
from lightning_autosp.recovery import Before


class OwnPositions(modules.Shallow):
    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.cut = cut
        accuracy = MulticlassAccuracy(modules.VOCABULARY, average="micro", ignore_index=-100)
        self.perplexity, self.accuracy = by_position(Perplexity(ignore_index=-100)), by_position(accuracy)
        self.mean, self.sum, self.whole = by_position(MeanMetric()), by_position(SumMetric()), by_position(SumMetric())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self(batch["ids"])[:, :-1], batch["labels"][:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        loss = each.sum() / (labels != -100).sum()
        if self.cut and loss.item() > 1e9:
            loss = loss * 2
        self.perplexity.update(logits / 8, labels)
        self.accuracy.update(logits.argmax(-1), labels)
        self.mean.update(each, weight=(labels != -100).float().flatten())
        self.sum.update(each)
        self.whole.update(loss)  # of no sequence
        self.log("loss", loss)
        for name in ("perplexity", "accuracy", "mean", "sum", "whole"):
            self.log(f"train_{name}", getattr(self, name), on_step=False, on_epoch=True)
        return loss


def fit(strategy: dict[str, Any] | None, world: int, *, cut: bool) -> dict[str, Any]:
    recorder = jobs.Recorder()
    trainer = jobs.trainer_of(strategy, world, [recorder])
    trainer.fit(OwnPositions(cut), modules.loader(6, 35, 2, ignore_half=True))
    report = jobs.report_of(trainer)
    return {
        **recorder.found(trainer),
        "gathers": [one.gathers for step in report.steps for one in step.crossings] if report else [],
        "gathered": [one.name for step in report.steps for one in step.gathered] if report else [],
        "breaks": len(report.breaks) if report else 0,
    }


@pytest.mark.dist
@pytest.mark.parametrize("cut", [False, True])
def test_states_are_those_of_one_device(pool: Pool, cut: bool) -> None:
    one = pool.run(fit, 1, None, 1, cut=cut)[0]
    assert len(one["logged"]) == 6
    for run in pool.run(fit, 3, FULL, 3, cut=cut):
        assert_same(run, one)
        assert bool(run["breaks"]) == cut
        assert run["gathered"] == []
        if not cut:
            assert len(run["gathers"]) == 3
            assert run["gathers"] == [[], [], []]  # the logits' eighths, their argmax, each loss


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MetricCollection([SumMetric()]), "not a MetricCollection"),
        (MaxMetric(), r"by_position\(MaxMetric\): its state 'max_value' is no tensor that is summed"),
        (CatMetric(), "its state 'value' is no tensor that is summed over ranks"),
    ],
)
def test_what_does_not_add_up_is_refused(metric: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        by_position(metric)


def test_alone_nothing_changes() -> None:
    metric = by_position(MeanMetric())
    metric.update(torch.tensor([1.0, 3.0]))
    assert metric.compute() == 2


def test_a_step_that_is_run_again_keeps_what_its_metrics_were_updated_with() -> None:
    module = OwnPositions()
    before = Before.of(module, (), {}, torch.device("cpu"))
    module.sum.sum_value = torch.tensor(4.0)
    before.restore()
    assert module.sum.sum_value == 4
