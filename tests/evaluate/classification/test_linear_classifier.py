"""Linear classifiers side by side: each as if it were alone; their scores; their files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from oracle import linear as oracle
from torch import Tensor

from dino.evaluate.classification.linear_classifier import (
    Classifier,
    Sweep,
    cosine,
    hits,
    load,
    save,
)
from dino.files import UserError

RATES = (0.001, 0.03, 0.7, 4.0)


def steps(seed: int, count: int = 50, width: int = 6, classes: int = 4) -> list[tuple[Tensor, ...]]:
    """Batches of 16 and an odd last one."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64)
    labels = (features @ torch.randn(width, classes, generator=generator).double()).argmax(dim=1)
    return list(zip(features.split(16), labels.split(16), strict=True))


def test_a_sweep_equals_classifiers_trained_alone() -> None:
    sweep = Sweep(6, 4, RATES, seed=3, dtype=torch.float64)
    start = sweep.weight[0].clone()
    epochs = [steps(seed) for seed in range(5)]
    for epoch, batches in enumerate(epochs):
        for features, labels in batches:
            sweep.step(features, labels, cosine(epoch, len(epochs)))
    for place, rate in enumerate(RATES):
        alone = oracle.train(start, epochs, rate)
        torch.testing.assert_close(sweep.weight[place], alone.weight.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(sweep.bias[place], alone.bias.detach(), rtol=1e-9, atol=1e-12)
        features = epochs[0][0][0]
        torch.testing.assert_close(sweep.logits(features)[:, place], alone(features).detach())


def test_weights_start_small_and_equal() -> None:
    sweep = Sweep(300, 40, (0.1, 0.2), seed=0)
    assert torch.equal(sweep.weight[0], sweep.weight[1])
    assert sweep.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not sweep.bias.any()
    assert not torch.equal(sweep.weight, Sweep(300, 40, (0.1, 0.2), seed=1).weight)


def test_one_that_diverges_leaves_the_others_alone() -> None:
    batches = [(features.float(), labels) for features, labels in steps(0)] * 30
    single, both = Sweep(6, 4, (0.1,)), Sweep(6, 4, (0.1, 1e38))
    for features, labels in batches:
        single.step(features, labels)
        both.step(features, labels)
    assert not both.weight[1].isfinite().all()
    torch.testing.assert_close(both.weight[0], single.weight[0])
    features, labels = batches[0]
    found = hits(both.logits(features), labels)
    assert found[0, 0] > 12
    assert found[1, 0] == 0


def test_one_class_is_always_right() -> None:
    sweep = Sweep(3, 1, (0.1,))
    features, labels = torch.randn(7, 3), torch.zeros(7, dtype=torch.int64)
    sweep.step(features, labels)
    assert hits(sweep.logits(features), labels).tolist() == [[7, 7]]


def test_hits_equal_a_sort() -> None:
    logits, labels = torch.randn(64, 3, 9), torch.randint(9, (64,))
    ranking = logits.argsort(dim=2, descending=True)
    right = ranking == labels[:, None, None]
    expected = torch.stack([right[:, :, :n].any(dim=2).sum(dim=0) for n in (1, 5)], dim=1)
    assert torch.equal(hits(logits, labels), expected)


def test_constant_and_diverged_classifiers_are_never_right() -> None:
    labels = torch.tensor([0, 1, 2, 7])
    for value in (0.0, torch.nan):
        assert hits(torch.full((4, 1, 7), value), labels).tolist() == [[0, 0]]
    sure = torch.eye(8)[[0, 1, 2, 0]][:, None, :7]
    assert hits(sure, labels).tolist() == [[3, 3]]  # the classifier has no class 7


def test_fewer_than_five_classes() -> None:
    logits, labels = torch.tensor([[[3.0, 2.0, 1.0]]]), torch.tensor([2])
    assert hits(logits, labels).tolist() == [[0, 1]]


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    one = Classifier(torch.randn(2, 5), torch.randn(2), ["cat", "dog"], {"blocks": 1, "top1": 9.5})
    save(one, tmp_path / "c.safetensors")
    again = load(tmp_path / "c.safetensors", average=True)
    assert torch.equal(again.weight, one.weight)
    assert torch.equal(again.bias, one.bias)
    assert again.classes == one.classes
    assert again.about == one.about
    features = torch.randn(3, 5)
    torch.testing.assert_close(again.logits(features)[:, 0], features @ one.weight.T + one.bias)


def published(path: Path, weight: Tensor, bias: Tensor) -> Path:
    """A file as the authors' linear probe leaves it."""
    tensors = {"module.linear.weight": weight, "module.linear.bias": bias}
    torch.save({"epoch": 100, "state_dict": tensors, "best_acc": 77.0}, path)
    return path


def test_published_weights_take_interleaved_features(tmp_path: Path) -> None:
    weight, bias = torch.randn(10, 8), torch.randn(10)
    path = published(tmp_path / "l.pth", weight, bias)
    cls, average = torch.randn(3, 4), torch.randn(3, 4)
    interleaved = torch.stack([cls, average], dim=2).flatten(1)  # cls_0, avg_0, cls_1, ...
    expected = interleaved @ weight.T + bias
    ours = torch.cat([cls, average], dim=1)
    found = load(path, average=True)
    torch.testing.assert_close(found.logits(ours)[:, 0], expected)
    assert not torch.allclose(load(path, average=False).logits(ours)[:, 0], expected)
    plain = load(path, average=False)  # of several blocks: as they stand
    assert torch.equal(plain.weight, weight)
    assert plain.classes is None


class Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("no.pth", "no.safetensors"):
        with pytest.raises(UserError, match=r"there (are no weights|is no classifier) at"):
            load(tmp_path / name, average=False)
    torch.save({"state_dict": {"fc.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no linear classifier: it should hold one weight"):
        load(tmp_path / "other.pth", average=False)
    torch.save({"state_dict": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(UserError, match="is refused: it would run or build"):
        load(tmp_path / "harm.pth", average=False)
    assert not (tmp_path / "harmed").exists()
    (tmp_path / "text.safetensors").write_text("words, not tensors")
    with pytest.raises(UserError, match="not a complete safetensors"):
        load(tmp_path / "text.safetensors", average=False)
