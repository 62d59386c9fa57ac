"""Low-shot classification by logistic regression on frozen features (appendix A, Tables 10 and 12).

Features are those of k-NN, divided by their length. Over n images the objective is

    (1 / n) sum_i loss_i(W) + (lambda / n) / 2 |W|^2

with the multinomial logistic loss and no intercept. The paper names lambda in {.01, .1, 1}; read as
the factor of the averaged loss itself (lambda instead of lambda / n) its numbers do not come out,
read as above they do (issue 121 of the published code). scikit-learn minimises

    C sum_i loss_i(W) + 1 / 2 |W|^2

which is the same divided by lambda / n, so C = 1 / lambda whatever n is. For two classes
scikit-learn fits the difference w of the two rows, whose shortest rows are w / 2 and -w / 2 with
|W|^2 = |w|^2 / 2: there C = 2 / lambda.

Shapes: n images, N numbers a feature, C classes.
"""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from dino.data.sources.open import Source
from dino.evaluate import command
from dino.evaluate.classification.knn_classifier import Accuracy, K, knn, standard_error
from dino.evaluate.classification.label_subsets import LabelSubset, fraction, subsets
from dino.evaluate.classification.linear_classifier import Classifier
from dino.evaluate.classification.linear_training import scores
from dino.evaluate.shared_images import paths_of
from dino.features.command import Count, Images, number_table
from dino.features.extractor import extract
from dino.features.table import (
    Subset,
    count_classes,
    labels_in,
    labels_of,
    my_share,
    open_labelled,
)
from dino.files import UserError
from dino.models.backbone import Backbone
from dino.progress import bar
from dino.runtime import gather_objects, ranks
from dino.settings import Range, validated

TASK = "logistic regression"

FRACTIONS = (0.01, 0.1)
"""Subsets of Tables 10 and 12, used where no others are requested."""


class Fit(NamedTuple):
    """A classifier, and whether the solver converged."""

    classifier: Classifier
    converged: bool


def fit(
    features: Float[Tensor, "n N"],
    labels: Int[Tensor, " n"],
    classes: int,
    penalty: float,
    *,
    tolerance: float = 1e-5,
    iterations: int = 1000,
) -> Fit:
    """L2-penalised multinomial logistic regression without intercept, in float64.

    The features have unit length in the paper's protocol. Classes without an image are never
    predicted. `penalty` is lambda (see the module), `tolerance` the largest entry of the gradient
    of the objective at the end, `iterations` the limit of L-BFGS.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = labels.unique()
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    bias = torch.full((classes,), -torch.inf, dtype=torch.float64)
    bias[present] = 0
    if len(present) == 1:  # nothing to separate: W = 0
        return Fit(Classifier(weight, bias, None, {}), True)
    model = LogisticRegression(
        C=(2 if len(present) == 2 else 1) / penalty,
        fit_intercept=False,
        tol=tolerance,
        max_iter=iterations,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features.double().numpy(), labels.numpy())
    stopped = any(issubclass(one.category, ConvergenceWarning) for one in caught)
    rows = torch.from_numpy(model.coef_)
    weight[present] = rows if len(present) > 2 else torch.cat([-rows / 2, rows / 2])
    return Fit(Classifier(weight, bias, None, {}), not stopped)


def held_out(labels: Int[Tensor, " n"], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on, and rows to choose on: `share` of each class that has two images or more.

    Raises:
        UserError: if no class has two images.
    """
    counts = torch.bincount(labels)[labels]
    candidates = (counts > 1).nonzero().squeeze(1)
    if len(candidates) == 0:
        raise UserError("no class has a second image: choose the penalty without --holdout")
    out = candidates[fraction(labels[candidates], share, seed)]
    rows = torch.arange(len(labels))
    return rows[~torch.isin(rows, out)], out


def held_out_scores(
    features: Float[Tensor, "n N"],
    labels: Int[Tensor, " n"],
    classes: int,
    penalties: Sequence[float],
    share: float,
    seed: int,
) -> list[Accuracy]:
    """For each penalty: the accuracy on held-out images of a fit to the others."""
    fitted, out = held_out(labels, share, seed)
    fits = [fit(features[fitted], labels[fitted], classes, penalty) for penalty in penalties]
    return [scores(one.classifier, features[out], labels[out])[0] for one in fits]


# ---------------------------------------------------------------------------------- command
@dataclass(frozen=True, kw_only=True)
class Logistic(command.FeatureEvaluationSettings):
    """Classify with few labelled images: logistic regression and k-NN on frozen features."""

    data: Images
    """Labelled images from which subsets are taken: a folder with one sub-folder for each class, or
    a list with labels."""
    val: Images
    """Images to test on, laid out like those of --data."""
    fractions: Annotated[tuple[float, ...], Range(above=0, high=1)] = ()
    """Shares of each class to train on; 1 means all images. Without --shots and --lists by default
    .01 and .1."""
    shots: Annotated[tuple[int, ...], Range(low=1)] = ()
    """Numbers of images of each class to train on."""
    lists: tuple[Path, ...] = ()
    """Files that name the images to train on, one a line, such as the published ImageNet lists."""
    seeds: Count = 3
    """Draws of each subset; the result is their mean and standard deviation."""
    penalties: Annotated[tuple[float, ...], Range(above=0)] = (0.01, 0.1, 1.0)
    """Values of lambda, in front of |W|^2 / 2 with the losses summed."""
    holdout: Annotated[float, Range(low=0, below=1)] = 0.0
    """Choose lambda on this share of the subset, then fit on all of it. 0 chooses on the test
    images, as published numbers seem to."""
    k: Annotated[tuple[int, ...], Range(low=1)] = K
    """Numbers of neighbours for k-NN with the same subset as bank."""
    batch: Count = 64
    """Images at a time through the network."""


def run(settings: Logistic) -> dict[str, Any]:
    """`dino evaluate logistic`: one table, and JSON with its provenance.

    Returns:
        The JSON without its provenance: "logistic" holds one entry a subset for each network.

    Raises:
        UserError: for weights, data or lists that do not exist, or subsets that cannot be drawn.
    """
    settings = validated(settings)
    if not settings.penalties:
        raise UserError("--penalties must be one or more numbers")
    names = (settings.data, settings.val)
    with command.evaluation_run("logistic", settings, *names) as started:
        source, val, counts = open_labelled(*names, started.pixels, TASK)
        started.compare_images(paths_of(source), paths_of(val))
        labels = labels_of(source, TASK)
        named = settings.shots or settings.lists
        fractions = settings.fractions or (() if named else FRACTIONS)
        drawn = subsets(source, labels, fractions, settings.shots, settings.lists, settings.seeds)
        if settings.holdout:
            _check_holdout(drawn, labels)
        found = {
            name: _of_network(network, source, val, drawn, settings)
            for name, network in started.networks.items()
        }
        images = {"data": len(source), "val": len(val), **counts}
        content = {"logistic": found, "images": images}
        chosen = {
            f"top-1, {subset}": {
                name: {"percent": top1["mean"], "standard_error": top1["standard_error"]}
                for name, by_subset in found.items()
                for top1 in [by_subset[subset]["chosen"]["top1"]]
            }
            for subset in found[command.TRAINED]
        }
        started.report(content, _table(found, settings, len(val)), images=len(val), scores=chosen)
    return content


def _check_holdout(drawn: Sequence[LabelSubset], labels: Int[Tensor, " n"]) -> None:
    """Refuse subsets of which no image can be held out, before features are computed."""
    for subset in drawn:
        if torch.bincount(labels[subset.indices]).max() < 2:
            raise UserError(
                f"the subset {subset.name} has one image of each class, and none to hold out: "
                "choose larger subsets, or omit --holdout"
            )


def _of_network(
    network: Backbone, source: Source, val: Source, drawn: Sequence[LabelSubset], settings: Logistic
) -> dict[str, Any]:
    used = sorted({index for subset in drawn for index in subset.indices})
    options: dict[str, Any] = {"batch": settings.batch, **settings.extraction()}
    bank, test = (extract(network, images, **options) for images in (Subset(source, used), val))
    row_of = {used[position]: row for row, position in enumerate(bank.indices)}
    features, labels = bank.finite(), labels_of(bank, TASK)
    tested = (test.finite(), labels_in(source.classes, test, TASK))
    classes, device = count_classes(source, TASK), next(network.parameters()).device
    share = my_share(range(len(drawn)))
    runs = []
    with bar(TASK, len(share), shown=ranks().main) as advance:
        for subset in (drawn[index] for index in share):
            rows = [row_of[index] for index in subset.indices if index in row_of]
            if not rows:
                raise UserError(f"no image of the subset {subset.name} can be used")
            train = (features[rows], labels[rows])
            runs.append(_of_subset(train, tested, classes, subset.seed or 0, settings, device))
            advance(1)
    by_name = defaultdict(list)
    for subset, found in zip(drawn, chain.from_iterable(gather_objects(runs)), strict=True):
        by_name[subset.name].append(found)
    return {name: _summary(found) for name, found in by_name.items()}


def _of_subset(
    train: tuple[Float[Tensor, "n N"], Int[Tensor, " n"]],
    test: tuple[Float[Tensor, "q N"], Int[Tensor, " q"]],
    classes: int,
    seed: int,
    settings: Logistic,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracies of one subset: by penalty, of the chosen one, and of k-NN by k."""
    features, tested = (F.normalize(rows.double(), dim=1) for rows in (train[0], test[0]))
    labels, truth = train[1], test[1]
    fits = [fit(features, labels, classes, penalty) for penalty in settings.penalties]
    found = [scores(one.classifier, tested, truth)[0] for one in fits]
    deciding = found
    if settings.holdout:
        how = (settings.penalties, settings.holdout, seed)
        deciding = held_out_scores(features, labels, classes, *how)
    chosen = deciding.index(max(deciding))
    near = knn(*train, *test, settings.k, device=device)
    return {
        "images": len(labels),
        "penalties": {f"{p:g}": one for p, one in zip(settings.penalties, found, strict=True)},
        "chosen": {"penalty": settings.penalties[chosen], "score": found[chosen]},
        "knn": {f"k{n}": score for n, score in near.items()},
        "converged": all(one.converged for one in fits),
    }


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over the draws of one kind of subset."""
    first = runs[0]
    return {
        "images": [run["images"] for run in runs],
        "penalties": {
            name: _mean([run["penalties"][name] for run in runs]) for name in first["penalties"]
        },
        "chosen": {
            "penalties": [run["chosen"]["penalty"] for run in runs],
            **_mean([run["chosen"]["score"] for run in runs]),
        },
        "knn": {k: _mean([run["knn"][k] for run in runs if k in run["knn"]]) for k in first["knn"]},
        "converged": all(run["converged"] for run in runs),
    }


def _mean(runs: Sequence[Accuracy]) -> dict[str, Any]:
    """Of top-1 and top-5 the mean, its two errors, and the values of all draws.

    The deviation is that of the draws (None for a single one), the standard error the one that the
    number of test images leaves.
    """
    draws = {"top1": [run.top1 for run in runs], "top5": [run.top5 for run in runs]}
    return {
        name: {
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "standard_error": standard_error(statistics.fmean(values), runs[0].images),
            "runs": values,
        }
        for name, values in draws.items()
    }


def _table(found: dict[str, dict[str, Any]], settings: Logistic, images: int) -> Table:
    def cell(score: dict[str, Any]) -> str:
        top1 = score["top1"]
        error = top1["standard_error"] if top1["deviation"] is None else top1["deviation"]
        return f"{top1['mean']:.1f}±{error:.1f}"

    rows: dict[str, list[str]] = {}
    for name, by_subset in found.items():
        for subset, entry in by_subset.items():
            nearest = max(entry["knn"].values(), key=lambda score: score["top1"]["mean"])
            network = f"{name}, " if len(found) > 1 else ""
            note = "" if entry["converged"] else " (not converged)"
            rows[f"{network}{subset}{note}"] = [
                str(round(statistics.fmean(entry["images"]))),
                *map(cell, (*entry["penalties"].values(), entry["chosen"], nearest)),
            ]
    chosen_by = "held-out images" if settings.holdout else "the test images"
    penalties = (f"λ {penalty:g}" for penalty in settings.penalties)
    return number_table(
        f"Logistic regression, top-1 in %, {images} test images\n"
        f"mean±deviation of {settings.seeds} draws (of a single one: ±standard error)\n"
        f"lambda chosen on {chosen_by}, best k of k-NN on the test images",
        ["subset", "images", *penalties, "chosen", "k-NN"],
        rows,
    )
