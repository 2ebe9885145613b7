"""What must hold on a GPU. ``make check-gpu`` runs these tests; ANANN_DEVICE=cpu runs those that a CPU can."""

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import acl
from acl import AnalyticConv2d
from acl.kernels import FAMILIES, KINDS, PROFILES, analytic_kinds
from evaluation.finished_run import load_finished_run
from models.four_layer import FourLayer
from tests.arrangements import arrange_all_kinds
from training.config import compose
from training.loop import run
from training.settings import parse_run

DEVICE = torch.device(os.environ.get("ANANN_DEVICE", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA only")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "kernels": lambda: acl.convert(FourLayer(), "all", arrange_all_kinds(), amplitude=True),
    "filters": lambda: acl.convert(FourLayer(), "all", "G100%", per="filter"),
    "factored": lambda: acl.convert(FourLayer(), "all", "G50% Ts50%", per="filter", compute="factored"),
}


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Without TF32, whose rounding hides errors."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symbol", analytic_kinds())
def test_kernels_and_gradients_equal_those_of_cpu(symbol: str, family: str, profile: str) -> None:
    kind = KINDS[symbol]
    results = []
    values = {akp.name: akp.sample(64, (7, 5)).double() for akp in kind.akps(family)}
    for device in ("cpu", DEVICE):
        akps = {name: value.to(device).requires_grad_() for name, value in values.items()}
        kernels = kind.synthesize(akps, (7, 5), profile)
        gradients = torch.autograd.grad(kernels.square().sum(), list(akps.values()))
        results.append([tensor.cpu() for tensor in (kernels, *gradients)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def compute_step(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients of a training step."""
    output = network(x)
    output.float().square().mean().backward()
    return [output, *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_equal_those_of_cpu(name: str, memory_format: torch.memory_format) -> None:
    network, x = NETWORKS[name]().double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    other = copy.deepcopy(network).to(DEVICE, memory_format=memory_format)  # type: ignore[call-overload]
    expected = compute_step(network, x)
    actual = compute_step(other, x.to(DEVICE, memory_format=memory_format))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x.to(DEVICE)).cpu(), network.eval()(x), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_precision_is_close_to_float32(name: str, dtype: torch.dtype) -> None:
    network, x = NETWORKS[name]().to(DEVICE), torch.randn(8, 3, 16, 16, device=DEVICE)
    expected = network(x)
    with torch.autocast(DEVICE.type, dtype):
        output = network(x)
    assert (output.float() - expected).square().mean() < 1e-2 * expected.square().mean()
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_network_equals_eager_one(name: str) -> None:
    network, x = NETWORKS[name]().to(DEVICE), torch.randn(4, 3, 16, 16, device=DEVICE)
    expected = compute_step(copy.deepcopy(network), x)
    actual = compute_step(torch.compile(network), x)  # type: ignore[arg-type]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_graph_replays_training_steps(name: str) -> None:
    network = NETWORKS[name]().to(DEVICE)
    x = torch.randn(4, 3, 16, 16, device=DEVICE)
    expected = [tensor.detach().clone() for tensor in compute_step(copy.deepcopy(network), x)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute_step(copy.deepcopy(network), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph, recorded = torch.cuda.CUDAGraph(), copy.deepcopy(network)
    with torch.cuda.graph(graph):
        results = compute_step(recorded, x)
    graph.replay()
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@needs_cuda
def test_data_parallel_gives_same_outputs() -> None:
    network = AnalyticConv2d(3, 8, 5, arrangement=arrange_all_kinds()).to(DEVICE)  # no batch norm, which splits batches
    x = torch.randn(8, 3, 16, 16, device=DEVICE)
    for mode in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(nn.DataParallel(network.train(mode), [0, 0])(x), network(x))


def compose_run(folder: Path, *overrides: str) -> list[str]:
    trainer = ["trainer.epochs=2", "trainer.batch_size=200", f"trainer.accelerator={DEVICE.type}"]
    return ["arrangement=mosaic", *trainer, f"paths.runs={folder}", *overrides]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", pytest.param("16-mixed", marks=needs_cuda)])
def test_run_learns_and_is_loaded(tmp_path: Path, precision: str) -> None:
    settings = parse_run(compose(compose_run(tmp_path, f"trainer.precision={precision}", "trainer.epochs=8")))
    record, _ = run(settings)
    assert record.test is not None and record.test.top1 > 50
    finished = load_finished_run(settings.directory.path)
    assert finished.model(torch.randn(1, 1, 28, 28)).shape == (1, 10)


def test_interrupted_deterministic_run_resumes_to_identical_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for name, stop_at in (("whole", None), ("interrupted", 2)):
        settings = parse_run(compose(compose_run(tmp_path / name, "trainer.deterministic=true", "trainer.epochs=3")))
        if stop_at is not None:
            with monkeypatch.context() as patch:
                patch.setattr("training.loop.train_one_epoch", interrupt_at(stop_at, KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    run(settings)
        run(settings)
        contents.append((settings.directory.path / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def interrupt_at(epoch: int, error: type[BaseException]) -> Callable[..., object]:
    """``train_one_epoch`` that fails at an epoch."""
    from training.loop import train_one_epoch

    calls = 0

    def train(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == epoch:
            raise error
        return train_one_epoch(*arguments)  # type: ignore[arg-type]

    return train


def test_attribution_equals_that_of_cpu() -> None:
    network = nn.Sequential(
        AnalyticConv2d(1, 8, 5, arrangement="G4 Lg2 P2"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    x, labels = torch.randn(128, 1, 12, 12, dtype=torch.float64), torch.randint(8, (128,))
    expected = acl.explain.attribute(network, lambda: [(x, labels)], progress=False)
    moved = copy.deepcopy(network).to(DEVICE)
    actual = acl.explain.attribute(moved, lambda: [(x.to(DEVICE), labels.to(DEVICE))], progress=False)
    assert actual.correct == expected.correct
    lost = [
        acl.explain.leave_one_out(n, lambda d=d: [(x.to(d), labels.to(d))], progress=False)["0"]  # type: ignore[misc]
        for n, d in ((network, "cpu"), (moved, DEVICE))
    ]
    assert torch.equal(lost[0], lost[1].cpu())


def test_rotation_and_fold_work_on_device() -> None:
    network = NETWORKS["filters"]().to(DEVICE).eval()
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    acl.rotate(network, 30)
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(acl.fold(copy.deepcopy(network))(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(acl.fold(network, factored=True)(x), expected, rtol=1e-4, atol=1e-5)
