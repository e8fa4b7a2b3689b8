"""Adapter files of a model that torch or the user has wrapped: the names are those in the injected model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from adapted import llama, randomise
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from fastlora import FusedLoraLinear, from_pretrained, inject, load_adapter, merge_and_unload, save_adapter, unload
from fastlora.injection.inject import injected


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"model": model})
        self.head = nn.Linear(2, 2)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "held": Holder,
    "held DDP": lambda model: Holder(DistributedDataParallel(model)),
}


def adapted() -> nn.Module:
    return inject(llama(attention_bias=True), target_modules=["q_proj"], r=2, bias="lora_only", modules_to_save=["lm_head"])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:2 trainable parameters such as 'head.weight' are not part")
def test_a_wrapped_model_has_the_files_of_its_inside(wrapper: str, tmp_path: Path) -> None:
    model = randomise(adapted())
    save_adapter(model, tmp_path / "plain")
    save_adapter(WRAPPERS[wrapper](model), tmp_path / "wrapped")
    assert files(tmp_path / "wrapped") == files(tmp_path / "plain")
    other = adapted()
    load_adapter(WRAPPERS[wrapper](other), tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    unload(WRAPPERS[wrapper](other))
    assert not injected(other)
    from_pretrained(other, tmp_path / "plain")


def test_the_head_of_a_holder_earns_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 trainable parameters such as 'head\.weight' are not part of the adapter"):
        save_adapter(Holder(adapted()), tmp_path)
    assert b"base_model.model.head." not in (tmp_path / "adapter_model.safetensors").read_bytes()


def test_several_injected_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 2 injected models, '0', '1\.inner\.model': pass one of them"):
        save_adapter(nn.Sequential(adapted(), Holder(adapted())), tmp_path)


def with_compiled_parts(model: nn.Module) -> nn.Module:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    model.lm_head = torch.compile(model.lm_head)
    return model


def test_wrapped_parts_change_no_name(tmp_path: Path) -> None:
    model = randomise(adapted())
    save_adapter(model, tmp_path / "plain")
    save_adapter(with_compiled_parts(model), tmp_path / "wrapped after")
    before = from_pretrained(with_compiled_parts(llama(attention_bias=True)), tmp_path / "plain", is_trainable=True)
    save_adapter(before, tmp_path / "wrapped before")
    assert files(tmp_path / "plain") == files(tmp_path / "wrapped after") == files(tmp_path / "wrapped before")
    assert [type(module).__name__ for module in before.model.layers] == ["OptimizedModule", "CheckpointWrapper"]


@pytest.mark.parametrize("back", [unload, merge_and_unload])
def test_a_compiled_target_is_replaced_with_its_wrapper(back: Callable[[nn.Module], nn.Module]) -> None:
    """torch.compile's wrapper would go on to call the linear that it was given."""
    model = nn.Sequential(torch.compile(nn.Linear(4, 4)))
    inject(model, target_modules=["0"], r=2)
    nn.init.ones_(model[0].lora_B)
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert model[0].lora_B.grad.any()
    assert type(back(nn.Sequential(torch.compile(model[0])))[0]) is nn.Linear


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_injected_under_its_own_names(wrapper: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    save_adapter(inject(wrapper(llama()), target_modules=["q_proj"], r=2), tmp_path / "wrapped")
    save_adapter(inject(llama(), target_modules=["q_proj"], r=2), tmp_path / "plain")
    assert (tmp_path / "wrapped/adapter_config.json").read_text() == (tmp_path / "plain/adapter_config.json").read_text()


def test_layers_made_by_hand_are_unwrapped_too(tmp_path: Path) -> None:
    model = nn.Sequential(FusedLoraLinear(4, 4, r=1))
    save_adapter(model, tmp_path / "plain")
    save_adapter(nn.DataParallel(model), tmp_path / "wrapped")
    assert files(tmp_path / "wrapped") == files(tmp_path / "plain")


@pytest.mark.usefixtures("process_group")
def test_a_model_in_ddp_is_not_injected() -> None:
    with pytest.raises(ValueError, match="holds a DistributedDataParallel, which would not reduce new parameters"):
        inject(DistributedDataParallel(llama()), target_modules=["q_proj"])
