"""Where numbers of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

A sink is any class with the two methods of `Sink`; those here are opened by the settings
`execution.tensorboard`, `.wandb` and `.mlflow`. Which project, server or account is used follows
from the environment of each library (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, ...).
`RUN/sinks.json` holds the names under which a resumed run goes on there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dino.files import UserError, atomic_json, read_json


class Sink(Protocol):
    """Takes the numbers of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The values, by names such as "loss" and "knn/k20", after `step` steps."""
        ...

    def close(self) -> None:
        """The run ends, or stops for now."""
        ...


class TensorBoard:
    """Event files in `RUN/tensorboard`."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As `Sink.write`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """As `Sink.close`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named by the run folder; its step is that of the training."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        known = _names(run)
        options = {"dir": str(run), "name": run.resolve().name, "config": dict(settings)}
        self._run: Any = wandb.init(id=known.get("wandb"), resume="allow", **options)
        # Steps that a resumed run does again are logged again; wandb's own step would drop them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        _remember(run, known, "wandb", self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As `Sink.write`."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """As `Sink.close`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, named by the run folder."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._client: Any = mlflow.tracking.MlflowClient()
        known = _names(run)
        self._id = known.get("mlflow")
        if self._id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dino")
            experiment = mlflow.set_experiment(name).experiment_id
            self._id = self._client.create_run(experiment, run_name=run.resolve().name).info.run_id
            for setting, value in settings.items():
                self._client.log_param(self._id, setting, value)
            _remember(run, known, "mlflow", self._id)
        self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """As `Sink.write`."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """As `Sink.close`."""
        self._client.set_terminated(self._id)


SINKS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


class Sinks:
    """Several sinks. One that fails while the run goes on is left out from then on.

    Args:
        names: of `SINKS`.
        run: the run folder.
        settings: of the run, by name.
        say: prints a sentence.

    Raises:
        UserError: if a library is not installed, or does not open.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        settings: Mapping[str, Any],
        say: Callable[[str, str], object],
    ) -> None:
        self._say, self._open = say, {name: _opened(name, run, settings) for name in names}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand values to all sinks."""
        self._each(lambda sink: sink.write(step, values))

    def close(self) -> None:
        """Close all sinks."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            try:
                act(sink)
            except Exception as error:
                del self._open[name]
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                self._say(
                    f"{name} failed and gets nothing more from this process ({reason}); "
                    "metrics.jsonl is complete",
                    "yellow",
                )


def _opened(name: str, run: Path, settings: Mapping[str, Any]) -> Sink:
    try:
        return SINKS[name](run, settings)
    except ImportError as error:
        raise UserError(
            f"{name} is not installed ({error}): pip install dino-ssl[{name}]"
        ) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"{name} cannot be used ({reason}): set it up, or leave out --execution.{name}"
        ) from error


def _names(run: Path) -> dict[str, Any]:
    """The names under which the run is known; none where the file is missing or damaged."""
    with suppress(UserError):
        content = read_json(run / "sinks.json")
        if isinstance(content, dict):
            return {name: value for name, value in content.items() if isinstance(value, str)}
    return {}


def _remember(run: Path, known: dict[str, Any], name: str, value: str) -> None:
    if known.get(name) != value:
        atomic_json(run / "sinks.json", {**known, name: value})
