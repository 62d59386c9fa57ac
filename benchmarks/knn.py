"""Weighted k-NN: ours against `faiss.IndexFlatIP` and against the published code's loop, fp32.

    python benchmarks/knn.py --threads 2 --repeats 3

10,000 queries, a bank of 50,000, 384 numbers each, 1,000 classes; in turn in one process, medians
of `--repeats`, by the clock and in CPU seconds of all threads, which a busy machine disturbs less.
Ours is `dino.evaluate.classification.knn_classifier.knn`: features to accuracies. FAISS (pip
install faiss-cpu; left out
where it is missing) only searches: adding the bank and finding the neighbours of the largest k. The
loop is the published one as its text tells it: 1 / 100 of the queries at a time, all similarities,
the k largest, votes through a one-hot tensor, all classes sorted; once for each k. All start from
features of unit length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dino.evaluate.classification.knn_classifier import TEMPERATURE, knn
from dino.runtime import keep_memory

CHUNKS = 100


def published(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """The published order of work, written plainly."""
    classes, columns = int(bank_labels.max()) + 1, bank.t()
    results = {}
    for k in ks:
        first = fifth = 0
        for part, truth in zip(queries.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True):
            similarity, index = torch.mm(part, columns).topk(k)
            voted = bank_labels.expand(len(part), -1).gather(1, index)
            one_hot = torch.zeros(len(part) * k, classes).scatter_(1, voted.view(-1, 1), 1)
            weights = (similarity / TEMPERATURE).exp_()
            votes = (one_hot.view(len(part), k, classes) * weights[:, :, None]).sum(dim=1)
            right = votes.sort(dim=1, descending=True).indices == truth[:, None]
            first += int(right[:, :1].sum())
            fifth += int(right[:, : min(5, k)].sum())
        results[k] = (100 * first / len(queries), 100 * fifth / len(queries))
    return results


def faiss_search(threads: int) -> Callable[[Tensor, Tensor, int], Tensor] | None:
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)

    def search(bank: Tensor, queries: Tensor, k: int) -> Tensor:
        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(bank.numpy())
        return torch.from_numpy(index.search(queries.numpy(), k)[1])

    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    keep_memory()
    centers = torch.randn(args.classes, args.width)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(args.classes, (count,))
        return F.normalize(centers[labels] + 4 * torch.randn(count, args.width), dim=1), labels

    (bank, bank_labels), (queries, labels) = draw(args.bank), draw(args.queries)
    search = faiss_search(args.threads)
    table = Table("k", "who", "seconds", "over ours", "CPU seconds", "over ours")
    for ks in ((20,), (10, 20, 100, 200)):
        jobs: dict[str, Callable[[], object]] = {
            "ours": lambda ks=ks: knn(bank, bank_labels, queries, labels, ks),
            "published loop": lambda ks=ks: published(bank, bank_labels, queries, labels, ks),
        }
        if search is not None:
            jobs["faiss, search only"] = lambda ks=ks: search(bank, queries, ks[-1])
        spent: dict[str, list[tuple[float, float]]] = {who: [] for who in jobs}
        answers = {}
        for _ in range(args.repeats):
            for who, job in jobs.items():
                started = time.perf_counter(), time.process_time()
                answers[who] = job()
                ended = time.perf_counter(), time.process_time()
                spent[who].append((ended[0] - started[0], ended[1] - started[1]))
        for k, score in answers["ours"].items():
            assert abs(score.top1 - answers["published loop"][k][0]) < 0.05, (k, score)
        each = {
            who: [statistics.median(t) for t in zip(*s, strict=True)] for who, s in spent.items()
        }
        for who, medians in each.items():
            ratios = [mine / ours for mine, ours in zip(medians, each["ours"], strict=True)]
            cells = [f"{x:.2f}" for pair in zip(medians, ratios, strict=True) for x in pair]
            table.add_row(", ".join(map(str, ks)), who, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
