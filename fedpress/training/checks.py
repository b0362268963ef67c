"""Checks before training starts, so that it does not fail after hours.

They check, among others, the examples, the validation set, image sizes and batch norms.
"""

from __future__ import annotations

import torch
from torch import nn

from fedpress.core.examples import Arrays, Preprocess, resized
from fedpress.core.inputs import Inputs, call, is_image, shape_of, shape_text
from fedpress.errors import Argument, TrainingError, first_line
from fedpress.nn.batch_norm import ONE_VALUE, BatchNorm, uses_batch_statistics
from fedpress.nn.resize import copied
from fedpress.tasks import Task
from fedpress.training.evaluate import evaluate
from fedpress.training.settings import TrainSettings


def nothing_to_train() -> TrainingError:
    """Returns the error for a model without a trainable parameter."""
    return TrainingError(
        "no parameter of the model has requires_grad, so there is nothing to train",
        place="model",
        cure="set requires_grad on the parameters to train, or epochs = 0",
    )


def check_training(
    model: nn.Module,
    settings: TrainSettings,
    train: Arrays,
    validation: Arrays,
    preprocess: Preprocess,
    task: Task,
) -> None:
    """Checks that settings, model and data fit together, so that a long run does not fail later.

    Args:
        model: the model to train.
        settings: the settings of the training.
        train: the training examples.
        validation: the validation set; it may be empty.
        preprocess: the standardisation of the examples.
        task: the task of the data.

    Raises:
        TrainingError: if settings, model and data do not fit together; the error names the
            setting, "train" (the examples) or "model".
        RecipeError: if label smoothing is set, but the task has none.
    """
    task.smoothed(settings.label_smoothing)  # raises the RecipeError
    # Without epochs nothing is trained, so there may be no examples and no trainable parameter.
    if settings.epochs:
        _check_examples(model, settings, train, validation, preprocess)
        if not any(p.requires_grad for p in model.parameters()):
            raise nothing_to_train()
    _check_image_sizes(model, settings, train, preprocess, task)


def _check_examples(
    model: nn.Module,
    settings: TrainSettings,
    train: Arrays,
    validation: Arrays,
    preprocess: Preprocess,
) -> None:
    if not len(train):
        raise TrainingError(
            "the public part has no examples",
            place="train",
            cure=(
                "give public examples by ",
                Argument("data.public_share", 0.1),
                ", or lower ",
                Argument("data.validation"),
            ),
        )
    if settings.patience and not len(validation):
        raise TrainingError(
            "early stopping needs a validation set",
            place="patience",
            cure=("give ", Argument("data.validation", 0.1), ", or leave patience out"),
        )
    if settings.bn_penalty:
        batch_norm_scales(model)  # raises an error if there are none
    if min(settings.batch_size, len(train)) > 1:
        return
    why = _why_not_one(model, preprocess(train.x[:1]))
    if why is None:
        return
    # Two different errors: the cause is either the setting or the data.
    if settings.batch_size == 1:
        raise TrainingError(f"got 1, but {why}", place="batch_size", cure="take 2 or more")
    raise TrainingError(
        f"the public part has one example, but {why}",
        place="train",
        cure=("give more public examples by ", Argument("data.public_share", 0.1)),
    )


def _check_image_sizes(
    model: nn.Module, settings: TrainSettings, train: Arrays, preprocess: Preprocess, task: Task
) -> None:
    for side, _ in settings.image_sizes:
        if not is_image(train.x) or side > min(train.x.shape[2:]):
            raise TrainingError(
                (f"got sides of {side} pixels, but examples are {shape_text(shape_of(train.x))}"),
                place="image_sizes",
                cure="give smaller sides, or leave image_sizes out",
            )
        # Whether a network takes images of another size shows only in a forward pass.
        two = Arrays(resized(train.x[:2], side), train.y[:2])
        try:
            evaluate(model, two, preprocess, task)
        except RuntimeError as error:
            raise TrainingError(
                f"the model cannot take images of {side} pixels ({first_line(error)})",
                place="image_sizes",
                cure="leave image_sizes out, or use a network that pools, such as resnet18",
            ) from error


def batch_norm_scales(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable scales (gammas) of all batch norms.

    Raises:
        TrainingError: if there is no trainable scale.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    scales = [norm.weight for norm in norms if norm.affine and norm.weight.requires_grad]
    if not scales:
        raise TrainingError(
            "it penalises batch-norm scales, but the model has no trainable batch norm",
            place="bn_penalty",
            cure="leave it out",
        )
    return scales


def _why_not_one(model: nn.Module, x: Inputs) -> str | None:
    """Returns why a model with batch norms cannot train on one example `x` [1, ...], else None.

    In training mode a batch norm needs more than one value for each channel. A convolution gives
    one value per pixel, so batch norms after convolutions can train on one image.
    """
    # A copy is run, because the forward pass changes running statistics.
    twin = copied(model).train()
    if not uses_batch_statistics(twin):
        return None
    at = next((p.device for p in twin.parameters()), x.device)
    try:
        with torch.no_grad():
            call(twin, x.to(at))
    # A user's forward may raise anything, for instance after a `squeeze()` of the batch.
    except Exception as error:
        if ONE_VALUE in str(error):
            return "a batch norm needs two examples to average over"
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the network fails on a single example ({first_line})"
    return None
