"""pfl-research: its public classes, put together as its own training script does for CIFAR-10.

The script: benchmarks/image_classification/pytorch/train.py of apple/pfl-research with
configs/baseline.yaml (IID, no privacy). Engine "local" is one process with all threads; engine
"processes" is one process for each core, started by torchrun.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data import FederatedDataset
from pfl.data.dataset import Dataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from shared import Clock, Images, Task, cnn, load, normalised
from torch import Tensor, nn


def loss(self: nn.Module, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
    """Returns the mean cross-entropy of a batch; pfl calls it as a method of the network."""
    self.train(not eval)
    return F.cross_entropy(self(x), y)


@torch.no_grad()
def metrics(self: nn.Module, x: Tensor, y: Tensor, eval: bool = True) -> dict[str, Weighted]:
    """Returns the metrics of a batch; pfl calls it as a method of the network."""
    self.train(not eval)
    logits = self(x)
    right = (logits.argmax(1) == y).sum().item()
    total = F.cross_entropy(logits, y, reduction="sum").item()
    return {"loss": Weighted(total, len(y)), "accuracy": Weighted(right, len(y))}


class Laps(TrainingProcessCallback):
    """Tells the clock when a round is over; the last callback, so evaluation comes before it."""

    def __init__(self, clock: Clock) -> None:
        """Makes the callback of a clock."""
        self.clock = clock
        self.accuracy = 0.0

    def on_train_begin(self, *, model: object) -> Metrics:
        """Is called before the first round."""
        self.clock.lap()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: object, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Is called after each round."""
        found = aggregate_metrics.to_simple_dict()
        self.accuracy = float(found["Central val | accuracy"])
        self.clock.lap()
        return False, Metrics()


def federated(data: Images) -> FederatedDataset:
    """Returns the clients' data, normalised beforehand, as in pfl's script."""
    x = normalised(data.x)
    slices = [(x[rows], data.y[rows]) for rows in data.clients]
    return FederatedDataset.from_slices(slices, get_user_sampler("random", range(len(slices))))


def main() -> None:
    """Runs the rounds."""
    task = Task.read()
    clock = Clock(task)
    processes = pytorch_ops.distributed.world_size
    torch.set_num_threads(task.threads if processes == 1 else 1)
    data = load(task.folder)
    network = cnn()
    network.loss = types.MethodType(loss, network)
    network.metrics = types.MethodType(metrics, network)
    model = PyTorchModel(
        model=network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
        amp_dtype=task.dtype,
    )
    backend = SimulatedBackend(
        training_data=federated(data), val_data=None, postprocessors=[WeightByUser()]
    )
    evaluation = NNEvalHyperParams(local_batch_size=10_000)
    held = Dataset(raw_data=[normalised(data.held_x), data.held_y])
    laps = Laps(clock)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=task.rounds,
            # Only the callback evaluates, after every round.
            evaluation_frequency=task.rounds,
            train_cohort_size=task.cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_learning_rate=task.lr, local_num_epochs=1, local_batch_size=task.batch
        ),
        model_eval_params=evaluation,
        callbacks=[CentralEvaluationCallback(held, evaluation, frequency=1), laps],
    )
    if pytorch_ops.distributed.global_rank == 0:
        clock.write(laps.accuracy, ["pfl"])
    if processes > 1:
        # A process that ends with its group open may be aborted (SIGABRT): threads of the group
        # still hold tensors while the interpreter is taken down (pytorch/pytorch#179291).
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
