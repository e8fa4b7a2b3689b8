"""What was measured is kept in a file, and taken by the kernels."""

import json
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import GPU, LARGE, TILE, TILED, forget, problems

from fastlora import choices, lora_linear, oracle
from fastlora.kernels import launch
from fastlora.kernels import target as target_module
from fastlora.kernels.config import GemmConfig
from fastlora.kernels.forms import ASSUMED_SLOWDOWN, BALANCE, Choice, Problem, default_choice
from fastlora.kernels.gemm import gemm_kernel
from fastlora.kernels.target import INTERPRETER, Target
from fastlora.torch_backend import DECODE_ROWS

pytestmark = pytest.mark.usefixtures("empty_cache")


# What is stored is taken


def test_without_a_file_arithmetic_decides(empty_cache: Path) -> None:
    assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)
    assert not empty_cache.exists()


def test_without_a_name_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_read", lambda target: pytest.fail("looked up"))
    assert choices.choose(LARGE, INTERPRETER) == default_choice(LARGE, INTERPRETER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_choice_comes_back(dtype: torch.dtype) -> None:
    """Of every form and tile that a problem can take, in another process's eyes."""
    for dropout, direction in product((False, True), ("forward", "backward")):
        problem = Problem(direction, dtype, 512, 1024, 2048, 100, dropout)
        tiles = choices.tiles(problem, GPU)
        assert len(tiles) >= 2
        for choice in (*map(Choice, problem.forms), *(Choice("fused", tile) for tile in tiles)):
            choices.store(GPU, {problem: choice})
            assert choices.choose(problem, GPU) == choice
            forget()
            assert choices.choose(problem, GPU) == choice


def test_stores_add_up() -> None:
    first, second, third = problems(3)
    path = choices.store(GPU, {first: TILED, second: TILED})
    assert choices.store(GPU, {second: Choice("addmm"), third: Choice("fused")}) == path
    forget()
    taken = [choices.choose(problem, GPU) for problem in (first, second, third)]
    assert taken == [TILED, Choice("addmm"), Choice("fused")]
    assert len(json.loads(path.read_text())["results"]) == 3


def test_only_what_was_measured_is_written() -> None:
    """Not the defaults that were asked for in between."""
    first, second = problems(2)
    choices.choose(first, GPU)
    path = choices.store(GPU, {second: TILED})
    choices.choose(first, GPU)
    choices.store(GPU, {})
    assert [record["in_features"] for record in json.loads(path.read_text())["results"]] == [second.in_features]


def test_a_choice_holds_for_its_own_problem_and_gpu() -> None:
    choices.store(GPU, {LARGE: TILED})
    changes: list[dict[str, Any]] = [{"direction": "backward"}, {"dtype": torch.float16}, {"rows": 4096}, {"r": 8}]
    changes += [{"in_features": 4104}, {"out_features": 4104}, {"dropout": False}]
    for change in changes:
        other = replace(LARGE, **change)
        assert choices.choose(other, GPU) == default_choice(other, GPU) != TILED
    for target in (replace(GPU, name="Another"), replace(GPU, sms=66), replace(GPU, capability=100)):
        assert choices.choose(LARGE, target) == default_choice(LARGE, target) != TILED
    assert choices.choose(LARGE, GPU) == TILED


def test_float32_is_kept_by_matmul_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(LARGE, dtype=torch.float32)
    assert default_choice(problem, GPU) != Choice("fused")
    with monkeypatch.context() as patch:
        patch.setattr(choices, "matmul_precision", lambda dtype: "tf32")
        choices.store(GPU, {problem: Choice("fused")})
        assert choices.choose(problem, GPU) == Choice("fused")
    assert choices.choose(problem, GPU) == default_choice(problem, GPU)


def test_one_look_at_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    choices.store(GPU, {LARGE: TILED})
    forget()
    reads, where = [], choices.path_of
    monkeypatch.setattr(choices, "path_of", lambda target: reads.append(target) or where(target))
    for problem in (LARGE, *problems(20)) * 2:
        choices.choose(problem, GPU)
    assert reads == [GPU]


def test_what_is_stored_is_as_the_file_is_now() -> None:
    """Not the defaults that were asked for, nothing on trial, and what another process has stored since the first look."""
    first, second, third = problems(3)
    assert choices.stored(GPU) == {}
    path = choices.store(GPU, {first: TILED})
    choices.choose(second, GPU)
    with choices.trying({third: TILED}, GPU):
        assert choices.stored(GPU) == {first: TILED}
    data = json.loads(path.read_text())
    data["results"].append(data["results"][0] | {"in_features": third.in_features, "form": "addmm", "tile": None})
    path.write_text(json.dumps(data))
    assert choices.stored(GPU) == {first: TILED, third: Choice("addmm")}


# The default


def test_the_default_reads_what_the_page_says() -> None:
    """docs/forms.md: of the GPU its multiprocessors, of the problem everything."""
    edge = replace(LARGE, rows=4096, in_features=1024, r=16)
    others = [replace(edge, direction="backward"), replace(edge, rows=16, dropout=False), replace(edge, dtype=torch.float32)]
    every = Target(100, GPU.sms, 99 * 1024, "Another GPU")
    for problem in (edge, LARGE, *others):
        assert default_choice(problem, GPU) == default_choice(problem, every)
    assert default_choice(edge, GPU) == default_choice(replace(edge, dtype=torch.float16), GPU) == Choice("fused")
    changes: list[dict[str, Any]] = [{"direction": "backward"}, {"dtype": torch.float32}, {"rows": 1024}, {"r": 100}]
    changes += [{"in_features": 4096}, {"out_features": 128}, {"rows": 16, "dropout": False}]
    for change in changes:
        assert default_choice(replace(edge, **change), GPU) != Choice("fused"), change
    assert default_choice(edge, replace(GPU, sms=10_000)) == Choice("addmm")
    few = replace(edge, rows=DECODE_ROWS, dropout=False)
    assert default_choice(few, GPU) == Choice("torch")
    for change in ({"rows": 2 * DECODE_ROWS}, {"dropout": True}, {"direction": "backward"}):
        assert default_choice(replace(few, **change), GPU) == Choice("addmm"), change


def test_the_figures_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/forms.md").read_text()
    length = int((BALANCE - 16) / ASSUMED_SLOWDOWN)
    problem = replace(LARGE, in_features=length)
    assert default_choice(problem, GPU) == Choice("fused") != default_choice(replace(problem, in_features=length + 1), GPU)
    for words in (
        f"({BALANCE} − r) / L",
        f"The {BALANCE} is",
        f"{100 * ASSUMED_SLOWDOWN:g} % slower",
        f"r = 16 up to L = {length}",
        f"at most {DECODE_ROWS} rows",
    ):
        assert words in page, words


# Where it lies


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert choices.path_of(GPU).parent == tmp_path / "cache"
    monkeypatch.setenv("FASTLORA_CACHE_DIR", "")
    assert choices.path_of(GPU).parent == tmp_path / "xdg/fastlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert choices.path_of(GPU).parent == tmp_path / "home/.cache/fastlora"


def test_the_file_is_one_for_each_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [choices.path_of(GPU)]
    assert paths[0].name.startswith(f"test-gpu-9000-torch-{torch.__version__.replace('+', '-')}-triton-")
    paths += [choices.path_of(target) for target in (replace(GPU, sms=66), replace(GPU, capability=100))]
    paths += [choices.path_of(replace(GPU, name=name)) for name in ("Test-GPU 9000", "x" * 500, "../../etc/passwd", "汉字")]
    for module, name in (
        (torch, "__version__"),
        (choices.triton, "__version__"),
        (choices, "__version__"),
        (choices, "FORMAT"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "0.0.1")
            paths.append(choices.path_of(GPU))
    assert len({path.name for path in paths}) == len(paths)
    assert all(path.parent == paths[0].parent and len(path.name) < 200 for path in paths)


# Trying


def test_trying_holds_for_the_time_being_and_in_every_thread() -> None:
    first, second = problems(2)
    choices.store(GPU, {first: Choice("fused")})
    seen = []

    def look() -> None:
        seen.append([choices.choose(problem, GPU) for problem in (first, second)])

    with choices.trying({first: TILED}, GPU):
        with choices.trying({first: Choice("addmm"), second: TILED}, GPU):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join(60)
        look()
        assert choices.choose(first, replace(GPU, sms=66)) == default_choice(first, GPU)
    look()
    default = default_choice(second, GPU)
    assert seen == [[Choice("addmm"), TILED], [TILED, default], [Choice("fused"), default]]


def test_trying_ends_with_an_error_too() -> None:
    with pytest.raises(KeyboardInterrupt), choices.trying({LARGE: TILED}, GPU):
        raise KeyboardInterrupt
    assert choices.choose(LARGE, GPU) == default_choice(LARGE, GPU)
    assert not choices.path_of(GPU).exists()


def test_a_revision_stands_for_the_choices_that_hold() -> None:
    """What was planned under one is taken again where the same choices hold, and nowhere else."""

    def tried(choice: Choice) -> int:
        with choices.trying({LARGE: choice}, GPU):
            return choices.revision()

    first, once, other = choices.revision(), tried(TILED), tried(Choice("addmm"))
    assert len({first, once, other}) == 3
    assert (choices.revision(), tried(TILED), tried(Choice("addmm"))) == (first, once, other)
    choices.store(GPU, {LARGE: Choice("addmm")})
    assert len({first, once, other, choices.revision(), tried(TILED)}) == 5


def test_another_thread_can_look_first_while_trying() -> None:
    """As the thread of a first backward does."""
    with choices.trying({LARGE: TILED}, GPU):
        thread = threading.Thread(target=choices.choose, args=(replace(LARGE, r=8), GPU), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()


# The kernels take it


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, options) of every launch."""
    seen: list[tuple[Any, dict[str, Any]]] = []
    run = launch.launch

    def spy(plan: launch.Plan, *args: Any) -> None:
        seen.append((plan.kernel, plan.options))
        run(plan, *args)

    monkeypatch.setattr(launch, "launch", spy)
    return seen


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Target:
    """The interpreter's GPU, under a name."""
    target = replace(INTERPRETER, name="Interpreted GPU")
    monkeypatch.setattr(target_module, "INTERPRETER", target)
    return target


def products(launches: list[tuple[Any, dict[str, Any]]]) -> list[tuple[int, ...]]:
    """The tiles of the launches that multiply x or dy by W."""
    options = [options for kernel, options in launches if kernel is gemm_kernel and options["HAS_PRODUCT"]]
    return [tuple(option[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")) for option in options]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_lora_linear_takes_what_was_stored(dropout_p: float, named: Target, launches: list[Any]) -> None:
    x, W = torch.randn(20, 32, requires_grad=True), torch.randn(48, 32)
    A, B = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    forward = Problem("forward", torch.float32, 32, 32, 48, 4, dropout_p > 0)
    backward = replace(forward, direction="backward")
    tiles = choices.tiles(forward, named)
    assert len(tiles) == 3

    def step() -> list[tuple[int, ...]]:
        launches.clear()
        lora_linear(x, W, A, B, dropout_p=dropout_p, seed=5, backend="triton").sum().backward()
        return products(launches)

    def numbers(tile: GemmConfig) -> tuple[int, ...]:
        return tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages

    assert step() == []
    for index in range(3):
        there, back = tiles[index], tiles[index - 1]
        choices.store(named, {forward: Choice("fused", there), backward: Choice("fused", back)})
        assert step() == [numbers(there), numbers(back)]
    choices.store(named, {forward: Choice("addmm")})
    assert step() == [numbers(tiles[1])]
    assert sum(kernel is gemm_kernel for kernel, _ in launches) == 2  # the prefill, and the fused backward
    if not dropout_p:
        choices.store(named, {forward: Choice("torch"), backward: Choice("torch")})
        assert step() == []
        assert launches == []


@pytest.mark.parametrize("unaligned", ["x", "dy"])
def test_unaligned_operands_take_another_tile_and_stay_right(unaligned: str, named: Target, launches: list[Any]) -> None:
    """The tile was measured with descriptors, which only one of forward and backward can make here."""
    case = oracle.Case((40, 64, 96), 4, torch.bfloat16, bias=False, dropout_p=0.1)
    forward = Problem("forward", torch.bfloat16, 64, 64, 96, 4, True)
    assert TILE in choices.tiles(forward, named)
    assert not TILE.is_valid(named, torch.bfloat16, "ieee", descriptors=False)
    choices.store(named, {forward: TILED, replace(forward, direction="backward"): TILED})

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return storage[1:].view(tensor.shape).copy_(tensor)

    oracle.assert_parity(case, backend="triton", views={unaligned: shifted})
    there, back = products(launches)
    measured = (128, 256, 64, 8, 3)
    assert [there == measured, back == measured] == [unaligned != "x", unaligned != "dy"]
