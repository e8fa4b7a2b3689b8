"""Which choice a step takes: the default, or what was measured."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tuned import GPU, LARGE, NAMED, TILE, TILED, problems, watch

from fastlora import dispatch, lora_linear, oracle
from fastlora.dispatch import EXPECTED, Problem, candidates, choose, default_choice, expected, store
from fastlora.kernels.config import valid_tiles
from fastlora.kernels.gemm import gemm_kernel
from fastlora.kernels.target import INTERPRETER, Target
from fastlora.torch_backend import DECODE_ROWS

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_the_default_reads_what_the_page_says():
    """docs/forms.md: of the GPU its multiprocessors and capability, of the problem everything."""
    edge = replace(LARGE, rows=4096)
    few = replace(edge, rows=DECODE_ROWS, dropout=False)
    another = Target(90, GPU.sms, 99 * 1024, "Another GPU")
    for problem in (edge, few, replace(edge, direction="backward"), replace(edge, dtype=torch.float32)):
        assert default_choice(problem, GPU) == default_choice(problem, another)
    assert default_choice(edge, GPU) == default_choice(replace(edge, dtype=torch.float16), GPU) == "fused"
    assert default_choice(replace(edge, direction="backward", out_features=14336), GPU) == "addmm"
    changes = [{"dtype": torch.float32}, {"rows": 1024}, {"r": 100}]
    for change in (*changes, {"in_features": 14336}, {"out_features": 128}):
        assert default_choice(replace(edge, **change), GPU) == "addmm", change
    for gpu in (replace(GPU, sms=10_000), replace(GPU, capability=80), replace(GPU, capability=100)):
        assert default_choice(edge, gpu) == "addmm"
    assert default_choice(few, GPU) == "torch"
    for change in ({"rows": 2 * DECODE_ROWS}, {"dropout": True}, {"direction": "backward"}):
        assert default_choice(replace(few, **change), GPU) == "addmm", change


@pytest.mark.parametrize(("capability", "row"), [(80, "8.x"), (90, "9.0"), (100, "10.0 and later")])
def test_the_figures_of_the_page(capability, row):
    page = (Path(__file__).parents[2] / "docs/forms.md").read_text()
    (cells,) = (line.split(" | ") for line in page.splitlines() if line.startswith(f"| {row} |"))
    balance, slowdown = EXPECTED[capability].balance, EXPECTED[capability].slowdown
    longest = int((balance - 16) / [*slowdown.values()][-1])
    problem, gpu = replace(LARGE, rows=65536, in_features=longest), replace(GPU, capability=capability)
    assert default_choice(problem, gpu) == "fused" != default_choice(replace(problem, in_features=longest + 1), gpu)
    assert cells[1].startswith(f"{balance},")
    assert cells[2].startswith(f"{100 * next(iter(slowdown.values())):g} %")
    assert cells[3].startswith(f"L = {longest} ")
    assert f"at most {DECODE_ROWS} rows" in page


def test_what_is_expected_of_a_gpu():
    """An unlisted capability takes the entry below it.  The slowdown is that of the next listed length."""
    gpus = [replace(GPU, capability=capability) for capability in (75, 80, 89, 90, 103, 120)]
    assert [expected(gpu) for gpu in gpus] == [EXPECTED[known] for known in (80, 80, 80, 90, 100, 100)]
    for length, most in ((1024, 141), (1025, 129), (6478, 16)):  # 165 − 2.3 %, 3.5 % and 2.3 % of the length
        assert EXPECTED[90].prefers_fused(length, most)
        assert not EXPECTED[90].prefers_fused(length, most + 1)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_form_and_valid_tile_is_a_candidate_and_comes_back(capability, dtype):
    gpu = Target(capability, 100, 166912 if capability == 80 else 232448, "GPU")
    for direction, dropout, width in product(("forward", "backward"), (False, True), (4096, 4095)):
        problem = Problem(direction, dtype, 8192, width, 2048, 16, dropout)
        first, *others = candidates(problem, gpu)
        assert first == default_choice(problem, gpu)
        descriptors = capability >= 90 and (width % 8 == 0 or (dtype == torch.float32 and width % 4 == 0))
        tiles = {f"fused/{tile}" for tile in valid_tiles(dtype, "ieee", gpu, descriptors)}
        assert {first, *others} == {"fused", "addmm", *tiles} | (set() if dropout else {"torch"})
        assert len({first, *others}) == 1 + len(others)
        for choice in (first, *others):
            store(gpu, {problem: choice})
            assert choose(problem, gpu) == choice == dispatch.stored(gpu)[str(problem)]


def test_without_a_file_or_a_name_the_default_holds(empty_cache):
    assert choose(LARGE, GPU) == default_choice(LARGE, GPU)
    assert choose(LARGE, INTERPRETER) == default_choice(LARGE, INTERPRETER)
    with pytest.raises(ValueError, match=r"target\.name is empty"):
        store(INTERPRETER, {})
    assert not empty_cache.exists()


def test_stores_add_up_and_write_no_default():
    first, second, third = problems(3)
    path = store(GPU, {first: TILED, second: TILED})
    choose(third, GPU)
    assert store(GPU, {second: "addmm"}) == path
    assert dispatch.stored(GPU) == {str(first): TILED, str(second): "addmm"}
    data = json.loads(path.read_text())  # another process adds one
    data["choices"][str(third)] = "fused"
    path.write_text(json.dumps(data))
    dispatch.forget()
    assert [choose(problem, GPU) for problem in (first, second, third)] == [TILED, "addmm", "fused"]


def test_a_choice_holds_for_its_own_problem_and_gpu():
    store(GPU, {LARGE: TILED})
    changes = [{"direction": "backward"}, {"dtype": torch.float16}, {"rows": 4096}, {"r": 8}, {"dropout": False}]
    for change in (*changes, {"in_features": 4104}, {"out_features": 4104}):
        other = replace(LARGE, **change)
        assert choose(other, GPU) == default_choice(other, GPU) != TILED
    for target in (replace(GPU, name="Another"), replace(GPU, sms=66), replace(GPU, capability=100)):
        assert choose(LARGE, target) == default_choice(LARGE, target) != TILED
    assert choose(LARGE, GPU) == TILED
    single = replace(LARGE, dtype=torch.float32)  # in the precision that it was measured in
    store(GPU, {single: "fused"})
    assert choose(single, GPU) == "fused" != choose(replace(single, precision="tf32"), GPU)


def test_one_look_at_the_file():
    """A step does not pay for the file."""
    other = replace(LARGE, r=8)
    path = store(GPU, {LARGE: TILED, other: TILED})
    assert choose(LARGE, GPU) == TILED
    path.unlink()
    assert choose(other, GPU) == TILED


def test_the_file_is_one_for_each_environment(monkeypatch, tmp_path):
    paths = [dispatch.path_of(GPU)]
    assert paths[0].name.startswith(f"test-gpu-9000-torch-{torch.__version__.replace('+', '-')}-triton-")
    paths += [dispatch.path_of(target) for target in (replace(GPU, sms=66), replace(GPU, capability=100))]
    paths += [dispatch.path_of(replace(GPU, name=name)) for name in ("Test-GPU 9000", "x" * 500, "../../etc/passwd", "汉字")]
    for module in (torch, dispatch.triton, dispatch):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.1")
            paths.append(dispatch.path_of(GPU))
    assert len({path.name for path in paths}) == len(paths)
    assert all(path.parent == tmp_path / "cache" and len(path.name) < 200 for path in paths)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FASTLORA_CACHE_DIR", "")
    assert dispatch.path_of(GPU).parent == tmp_path / "xdg/fastlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert dispatch.path_of(GPU).parent == tmp_path / "home/.cache/fastlora"


# What was stored is taken


@pytest.fixture
def plans(monkeypatch):
    """Everything that is launched, in order."""
    plans = []
    watch(monkeypatch, plans.append)
    return plans


def products(plans):
    """The tiles of the launches that multiply x or dy by W."""
    options = [plan.options for plan in plans if plan.kernel is gemm_kernel and plan.options["HAS_PRODUCT"]]
    return [tuple(option[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")) for option in options]


def numbers(choice):
    m, n, k, _, warps, stages, _ = map(int, choice.removeprefix("fused/").split(","))
    return m, n, k, warps, stages


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_lora_linear_takes_what_was_stored(dropout_p, target, plans):
    x, W = torch.randn(20, 32, requires_grad=True), torch.randn(48, 32)
    A, B = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    forward = Problem("forward", torch.float32, 32, 32, 48, 4, dropout_p > 0)
    backward = replace(forward, direction="backward")

    def step():
        plans.clear()
        lora_linear(x, W, A, B, dropout_p=dropout_p, seed=5, backend="triton").sum().backward()
        return products(plans)

    assert step() == []
    first, second, third = (choice for choice in candidates(forward, target) if "/" in choice)
    for there, back in ((first, third), (second, first), (third, second)):
        store(target, {forward: there, backward: back})
        assert step() == [numbers(there), numbers(back)]
    store(target, {forward: "addmm"})
    assert step() == [numbers(second)]
    if not dropout_p:
        store(target, {forward: "torch", backward: "torch"})
        assert (step(), plans) == ([], [])


@pytest.mark.parametrize("unaligned", ["x", "dy"])
def test_unaligned_operands_take_another_tile_and_stay_right(unaligned, target, plans):
    """The tile was measured with descriptors, which only one of forward and backward can make here."""
    case = oracle.Case((40, 64, 96), 4, torch.bfloat16, bias=False, dropout_p=0.1)
    forward = Problem("forward", torch.bfloat16, 64, 64, 96, 4, True)
    assert not TILE.is_valid(NAMED, torch.bfloat16, "ieee", descriptors=False)
    store(target, {forward: TILED, replace(forward, direction="backward"): TILED})

    def shifted(tensor):
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return storage[1:].view(tensor.shape).copy_(tensor)

    oracle.assert_parity(case, backend="triton", views={unaligned: shifted})
    there, back = products(plans)
    assert [there == numbers(TILED), back == numbers(TILED)] == [unaligned != "x", unaligned != "dy"]
