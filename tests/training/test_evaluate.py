from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import compose
from training.data import Data
from training.evaluate import predict
from training.settings import build_model, load_run_data, parse_run


@pytest.fixture(scope="module")
def model_and_data() -> tuple[nn.Module, Data]:
    settings = parse_run(compose(["arrangement=mosaic"]))
    data = load_run_data(settings)
    torch.manual_seed(0)
    return build_model(settings, data), data


def test_predict_matches_accuracy_and_loss_of_one_batch(model_and_data: tuple[nn.Module, Data]) -> None:
    """The training split fills more than one batch, and the last one is smaller."""
    model, data = model_and_data
    split = data.train
    assert 1000 < len(split) < 2000
    with torch.no_grad():
        logits = model.eval()(data.normalize(split.images))
    result = predict(model, data, split)[0]
    correct = int((logits.argmax(1) == split.labels).sum())
    assert 0 < correct < len(split) and result["top1"] == 100 * correct / len(split)
    assert result["loss"] == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)


class Float64Refused(TorchDispatchMode):
    """Refuses double precision, as Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert getattr(result, "dtype", None) != torch.float64, f"{func} returns float64"
        return result


def test_predict_works_without_float64(model_and_data: tuple[nn.Module, Data]) -> None:
    model, data = model_and_data
    fabric: Any = SimpleNamespace(global_rank=0, world_size=1)
    with Float64Refused():
        result = predict(model, data, data.val, fabric)[0]
    assert result == predict(model, data, data.val)[0]


def test_predict_disables_dropout_and_gradients(model_and_data: tuple[nn.Module, Data]) -> None:
    model, data = model_and_data
    noisy_model = nn.Sequential(model, nn.Dropout(0.9)).train()
    outputs: list[torch.Tensor] = []
    noisy_model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    assert predict(noisy_model, data, data.val)[0] == predict(model, data, data.val)[0]
    assert not noisy_model.training and not any(output.requires_grad for output in outputs)


def test_predictions_of_processes_are_in_order_of_split(model_and_data: tuple[nn.Module, Data]) -> None:
    """Without the reduction over processes, the predictions of the other processes are 0."""
    model, data = model_and_data
    _, predictions = predict(model, data, data.val)
    with torch.no_grad():
        assert torch.equal(predictions, model(data.normalize(data.val.images)).argmax(1))
    shares = []
    for rank in range(3):
        fabric: Any = SimpleNamespace(
            global_rank=rank,
            world_size=3,
            to_device=lambda tensor: tensor,
            all_reduce=lambda tensor, reduce_op: tensor,
        )
        shares.append(predict(model, data, data.val, fabric)[1])
    assert torch.equal(torch.stack(shares).sum(0), predictions) and len(predictions.unique()) > 1


def test_processes_evaluate_disjoint_shares(model_and_data: tuple[nn.Module, Data]) -> None:
    """Without the reduction over processes, the results of two processes sum to those of one."""
    model, data = model_and_data
    total = predict(model, data, data.val)[0]
    shares = []
    for rank in range(2):
        fabric: Any = SimpleNamespace(
            global_rank=rank,
            world_size=2,
            to_device=lambda tensor: tensor,
            all_reduce=lambda tensor, reduce_op: tensor,
        )
        shares.append(predict(model, data, data.val, fabric)[0])
    for name in ("top1", "loss"):
        assert shares[0][name] > 0 and shares[1][name] > 0
        assert shares[0][name] + shares[1][name] == pytest.approx(total[name], rel=1e-6)
