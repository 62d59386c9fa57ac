"""Jaccard of attention masks, patches classified, and the command `dino evaluate segmentation`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fakes import PatchColors
from helpers.pictures import scene, write_plain, write_voc
from helpers.videos import save_mask
from oracle import segmentation as oracle

from dino.evaluate.segmentation.attention_jaccard import attention_jaccard, object_jaccards, summary
from dino.evaluate.segmentation.datasets import open_scenes
from dino.evaluate.segmentation.segmentation import Segmentation, divided, run
from dino.features import patch_classifiers as patches
from dino.features.patch_classifiers import (
    Bank,
    PatchExtractor,
    confusion,
    enlarged,
    mean_iou,
    training_patches,
)
from dino.files import UserError
from dino.models.attention import attention_maps, mass_mask
from dino.models.create import create
from dino.weights.load import save

CPU = torch.device("cpu")


def vit(patch_size: int = 4) -> Any:
    torch.manual_seed(0)
    return create(
        "vit_tiny", embed_dim=12, depth=2, heads=3, patch_size=patch_size, image_size=16
    ).eval()


# ------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("seed", range(6))
def test_both_choices_of_heads_equal_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = random.choice(np.array([0, 0, 1, 2, 5, 255], dtype=np.uint8), (9, 13))
    masks = random.random((4, 4, 5)) < 0.4
    found = object_jaccards(torch.from_numpy(masks), ids)
    per_object, per_image = oracle.best_heads(list(masks[:-1]), ids)
    scores = summary([found])
    assert scores["best_per_object"] == pytest.approx(100 * per_object)
    assert scores["best_per_image"] == pytest.approx(100 * per_image)
    assert scores["mean_map"] == pytest.approx(100 * oracle.best_heads([masks[-1]], ids)[0])
    for head, score in enumerate(scores["heads"]):
        assert score == pytest.approx(100 * oracle.best_heads([masks[head]], ids)[0])


def test_jaccards_by_hand() -> None:
    ids = np.array([[1, 1, 2, 0], [1, 1, 2, 255]], dtype=np.uint8)
    masks = torch.tensor([[[True, False]], [[False, True]]])  # left and right half
    found = object_jaccards(masks, ids)
    assert found.tolist() == [[1.0, 0.0], [0.0, pytest.approx(2 / 3)]]  # void counts nowhere


def test_objects_are_averaged_before_pictures() -> None:
    first = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.4, 0.5]])  # two objects, two heads, mean map
    second = torch.tensor([[0.2, 0.1, 0.9]])
    found = summary([first, second])
    assert found["best_per_object"] == pytest.approx(100 * ((1 + 0.4) / 2 + 0.2) / 2)
    assert found["best_per_image"] == pytest.approx(100 * (0.5 + 0.2) / 2)
    assert found["mean_map"] == pytest.approx(70)
    assert found["heads"] == pytest.approx([35, 15])


def test_attention_of_a_network_over_pictures(tmp_path: Path) -> None:
    root = write_plain(tmp_path, 3)
    save_mask(np.zeros((24, 32), dtype=np.uint8), root / "masks/1.png")
    scenes, backbone = open_scenes(root, None), vit()
    found = attention_jaccard(PatchExtractor(backbone, 16, True), scenes, [0.5], "test")
    assert (found["images"], found["objects"], found["empty"]) == (2, 4, 1)
    expected = []
    for index in (0, 2):
        picture, ids = scenes[index].read()
        maps = attention_maps(backbone, PatchExtractor(backbone, 16, True).prepare(picture))[0]
        expected.append(oracle.best_heads([mass_mask(one, 0.5).numpy() for one in maps], ids)[0])
    covers = [
        [np.mean(ids == number) for number in (1, 2)]
        for ids in (scenes[index].read()[1] for index in (0, 2))
    ]
    assert found["whole_image"] == pytest.approx(100 * np.mean(covers))
    score = found["masses"]["0.5"]["best_per_object"]
    assert score == pytest.approx(100 * sum(expected) / 2)


def test_networks_without_attention_and_masks_without_objects_are_refused(tmp_path: Path) -> None:
    scenes = open_scenes(write_plain(tmp_path, 1), None)
    with pytest.raises(UserError, match="no CLS attention"):
        attention_jaccard(PatchExtractor(create("resnet50").eval(), 32), scenes, [0.6], "test")
    save_mask(np.zeros((24, 32), dtype=np.uint8), scenes[0].mask)
    with pytest.raises(UserError, match=r"none of the masks, such as .*0\.png, holds an object"):
        attention_jaccard(PatchExtractor(vit(), 16), scenes, [0.6], "test")


# --------------------------------------------------------------------------------------- patches
def random_bank(seed: int = 0, n: int = 60, width: int = 4, classes: int = 3) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, width, generator=generator)
    counts = torch.randint(0, 9, (n, classes), generator=generator).float() + 0.01
    weights = counts.sum(dim=1)
    return Bank(features, counts / weights[:, None], weights, list(range(classes)))


def test_the_linear_classifier_is_at_the_minimum_over_pixels() -> None:
    bank, penalty = random_bank(), 0.01
    scorer = patches.linear(bank, penalty, 200, CPU)
    share = (bank.weights / bank.weights.sum()).double()
    x = bank.features.double()
    mean = share @ x
    deviation = (share @ (x - mean) ** 2).sqrt()
    zero, unit = torch.zeros(1, 4), torch.eye(4)
    offset = scorer(zero + mean.float())[0].double()  # at the mean: standardised features are zero
    matrix = scorer(unit * deviation.float() + mean.float()).double() - offset
    matrix, offset = matrix.requires_grad_(), offset.requires_grad_()
    logits = (x - mean) / deviation @ matrix + offset
    # Every pixel alone, with the logits of its patch.
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(len(x)):
        for label in range(3):
            pixels = bank.weights[row].double() * bank.shares[row, label].double()
            target = torch.tensor([label])
            loss = loss + pixels * F.cross_entropy(logits[row : row + 1], target)
    loss = loss / bank.weights.double().sum() + penalty / 2 * matrix.square().sum()
    for slope in torch.autograd.grad(loss, (matrix, offset)):
        assert slope.abs().max() < 1e-4


def test_neighbours_vote_by_similarity() -> None:
    features = torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
    shares = torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]])
    bank = Bank(features, shares, torch.ones(3), [0, 1])
    found = patches.neighbours(bank, 2, 0.5, CPU)(torch.tensor([[2.0, 0]]))
    first, second = np.exp(1 / 0.5), np.exp(0.6 / 0.5)
    assert found[0, 1].item() == pytest.approx(0.5 * second / (first + second))
    everything = patches.neighbours(bank, 30, 0.5, CPU)(torch.tensor([[2.0, 0]]))
    assert everything.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("method", ["linear", "neighbours"])
def test_colours_are_classified_perfectly(method: str, tmp_path: Path) -> None:
    scenes, backbone = open_scenes(write_plain(tmp_path), None), PatchColors().eval()
    extractor = PatchExtractor(backbone, size=24, keep_aspect=True)  # images are not resized
    bank = training_patches(extractor, scenes[:3], 10**6, 0, "test")
    assert bank.classes == [0, 1, 2]
    scorer = (
        patches.linear(bank, 1e-4, 100, CPU)
        if method == "linear"
        else patches.neighbours(bank, 5, 0.02, CPU)
    )
    for seed in range(3, 6):
        picture, ids = scenes[seed].read()
        features = extractor.features(picture)
        scores = scorer(features.flatten(1).T).T.unflatten(1, features.shape[1:])
        assert np.array_equal(scores.argmax(dim=0).numpy(), ids[::4, ::4])


def test_few_patches_are_drawn_evenly_and_reproducibly(tmp_path: Path) -> None:
    scenes, backbone = open_scenes(write_plain(tmp_path), None), PatchColors().eval()

    def draw(seed: int) -> Bank:
        return training_patches(PatchExtractor(backbone, size=24), scenes, 30, seed, "test")

    first = draw(0)
    assert len(first.features) == 30
    assert torch.equal(draw(0).features, first.features)
    assert not torch.equal(draw(1).features, first.features)


def test_void_patches_are_not_training_patches(tmp_path: Path) -> None:
    root = write_plain(tmp_path, 1)
    ids = scene(0)
    ids[:8] = 255
    save_mask(ids, root / "masks/0.png")
    bank = training_patches(
        PatchExtractor(PatchColors().eval(), 24, True), open_scenes(root, None), 99, 0, ""
    )
    assert len(bank.features) == 4 * 8
    assert bank.weights.eq(16).all()
    save_mask(np.zeros((24, 32), dtype=np.uint8), root / "masks/0.png")
    with pytest.raises(UserError, match=r"1 training masks, such as .*0\.png, hold only one class"):
        training_patches(
            PatchExtractor(PatchColors().eval(), 24), open_scenes(root, None), 99, 0, ""
        )


def test_mean_iou_equals_the_oracle_and_a_case_by_hand() -> None:
    random = np.random.default_rng(0)
    truth = [random.choice(np.array([0, 1, 4, 255], np.uint8), (5, 6)) for _ in range(3)]
    found = [random.choice(np.array([0, 1, 2], np.uint8), (5, 6)) for _ in range(3)]
    counts = sum(confusion(a, b) for a, b in zip(found, truth, strict=True))
    assert mean_iou(counts)["miou"] == pytest.approx(100 * oracle.mean_iou(found, truth))
    one = mean_iou(
        confusion(np.array([[0, 0, 1, 2]], np.uint8), np.array([[0, 1, 1, 255]], np.uint8))
    )
    assert one["classes"] == {"0": 50, "1": 50}  # class 2 was found on void only
    assert one["accuracy"] == pytest.approx(200 / 3)


def test_scores_are_enlarged_bilinearly() -> None:
    scores = torch.tensor([[[1.0, 0.0]], [[0.4, 0.4]]])
    assert enlarged(scores, (1, 8)).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    assert enlarged(scores + torch.tensor([0.2, 0])[:, None, None], (1, 8)).tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 1]
    ]


# ----------------------------------------------------------------------------------- the command
@pytest.fixture
def weights(tmp_path: Path) -> str:
    save(vit(), tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def test_the_command_on_voc(
    tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Segmentation(
        weights=weights,
        data=write_voc(tmp_path / "voc"),
        methods=("attention", "linear", "knn"),
        size=16,
        baseline=True,
        out=tmp_path / "s.json",
        device="cpu",
    )
    found = run(settings)
    assert found.keys() == {"trained", "untrained"}
    for results in found.values():
        assert results["attention"]["images"] == 2
        assert results["attention"]["masses"].keys() == {"0.6", "0.8"}
        assert results["linear"]["classes"].keys() <= {"0", "1", "15"}
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["segmentation"] == found
    assert (content["images"], content["training_images"]) == (2, 3)
    assert content["shared_images"]["count"] == 0
    for name, results in found.items():
        score = content["scores"]["patches, linear, mIoU"][name]
        assert score == {"percent": results["linear"]["miou"]}
    assert content["networks"]["trained"]["sha256"] == content["weights"]["sha256"]
    printed = capsys.readouterr().out
    assert f"{found['untrained']['knn']['miou']:.1f}" in printed
    assert "2 images, 3 for training" in printed


def test_plain_folders_are_divided_once_and_for_all(tmp_path: Path, weights: str) -> None:
    root = write_plain(tmp_path / "plain")
    attention = Segmentation(weights=weights, data=root)
    assert [len(scenes) for scenes in divided(attention)] == [0, 6]
    learns = Segmentation(weights=weights, data=root, methods=("linear",), train_share=1 / 3)
    training, scored = divided(learns)
    assert (len(training), len(scored)) == (2, 4)
    assert {*training}.isdisjoint(scored)
    assert divided(learns) == (training, scored)
    assert divided(Segmentation(**{**vars(learns), "seed": 3})) != (training, scored)
    (root / "train.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"val\.txt is missing"):
        divided(learns)
    (root / "val.txt").write_text("0\n")
    assert [len(scenes) for scenes in divided(learns)] == [2, 1]
    assert [len(scenes) for scenes in divided(attention)] == [0, 1]


def test_networks_without_a_patch_size_have_maps(tmp_path: Path) -> None:
    scenes, backbone = open_scenes(write_plain(tmp_path, 1), None), PatchColors().eval()
    backbone.patch_size = None
    picture, _ = scenes[0].read()
    assert PatchExtractor(backbone, 26, True).features(picture).shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ()}, "--methods"),
        ({"mass": (0.6, 1.0)}, "mass is"),
        ({"mass": ()}, "--mass"),
        ({"train_share": 1.0}, "train_share is"),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature is"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run(Segmentation(weights="w", data=Path("d"), **changes))
