"""Adapter files: PEFT reads ours and we read PEFT's; what is not plain LoRA, PEFT refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapting import EVERYTHING, KINDS, UNTIED, adapted, base, batch, scores, stir
from safetensors.torch import load_file, save_file

from reclib.config import ENCODER, AdapterConfig, InputError
from reclib.model.ilora import AdaptedModel
from reclib.train.saving import ADAPTER_CONFIG, ADAPTER_TENSORS, load_adapter, read_adapter, save_adapter

PLAIN = (*ENCODER, "transform.linear", "item_table")  # what PEFT can adapt: modules


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="PEFT is not installed: it is in the extra 'test'")


def test_an_adapter_comes_back_to_the_same_bits(tmp_path):
    for kind in KINDS:
        for shape in [UNTIED, {}]:
            one = batch()
            written = adapted(kind, base(**shape), targets=EVERYTHING, dropout=0.25)
            folder = save_adapter(written, tmp_path / "a")
            read = load_adapter(base(**shape), folder, "again").eval()
            assert read.configs["again"] == written.configs["default"] or kind in ("lora", "rslora")
            assert torch.equal(scores(read, one), scores(written, one))
            size = sum(t.numel() for t in load_file(folder / ADAPTER_TENSORS).values())
            assert size == sum(
                p.numel() for p in written.parameters() if p.requires_grad
            )  # nothing of the base


def test_a_causal_reader_is_not_in_the_file_but_its_hash(tmp_path):
    reader, other = (base(seed=seed, causal=True) for seed in (7, 8))
    written = AdaptedModel(base(**UNTIED))
    written.add("x", AdapterConfig(kind="ilora", representation="causal_state"), reader)
    folder = save_adapter(stir(written).eval(), tmp_path / "a")
    one = batch()
    read = load_adapter(base(**UNTIED), folder, causal_model=reader).eval()
    assert torch.equal(scores(read, one), scores(written, one))
    with pytest.raises(InputError, match="the gate reads the causal model"):
        load_adapter(base(**UNTIED), folder, causal_model=other)
    with pytest.raises(InputError, match="needs causal_model"):
        load_adapter(base(**UNTIED), folder)


# -- PEFT ----------------------------------------------------------------------------------------------------


def peft_scores(model, one) -> torch.Tensor:
    return scores(model.base_model.model.eval(), one)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_peft_reads_ours_and_gives_the_same(peft, kind, tmp_path, recwarn):
    one = batch()
    written = adapted(kind, targets=PLAIN)
    folder = save_adapter(written, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(base(**UNTIED), folder)
    assert not [w for w in recwarn if "missing" in str(w.message) or "nexpected" in str(w.message)]
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 16.0, kind == "rslora")
    torch.testing.assert_close(peft_scores(theirs, one), scores(written, one), rtol=1e-5, atol=1e-5)
    plain = scores(base(**UNTIED), one)
    assert float((scores(written, one) - plain).abs().max()) > 1e-2
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(scores(merged, one), scores(written, one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_we_read_pefts_and_give_the_same(peft, kind, tmp_path):
    paths = ["blocks.0.attention.qkv", "blocks.1.ffn.down", "blocks.1.attention.qkv", "item_table"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=paths, use_rslora=kind == "rslora")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base(**UNTIED), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not say which base"):
        load_adapter(base(**UNTIED), tmp_path)
    read = load_adapter(base(**UNTIED), tmp_path, any_base=True).eval()
    assert sorted(read.layers()) == sorted(paths)
    assert read.configs["default"].kind == kind
    torch.testing.assert_close(scores(read, batch()), peft_scores(theirs, batch()), rtol=1e-5, atol=1e-5)


def test_peft_refuses_what_is_not_plain_lora(peft, tmp_path):
    for kind, targets in [("ilora", ENCODER), ("gated", ENCODER), ("lora", EVERYTHING)]:
        folder = save_adapter(adapted(kind, targets=targets), tmp_path / "a")
        with pytest.raises((KeyError, ValueError, TypeError), match="RECLIB_"):
            peft.PeftModel.from_pretrained(base(**UNTIED), folder)


def test_what_changes_the_function_in_peft_is_refused_here(peft, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["blocks.0.ffn.up"], use_dora=True)
    peft.get_peft_model(base(**UNTIED), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"use_dora=True; allowed: False"):
        load_adapter(base(**UNTIED), tmp_path, any_base=True)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted("ilora"), tmp_path / "a")


def test_another_base_is_refused(folder):
    other = base(seed=1, **UNTIED)
    with pytest.raises(InputError, match=r"is an adapter of base \w{12}, and this model is \w{12}"):
        load_adapter(other, folder)
    with pytest.raises(InputError, match="is an adapter of base"):
        load_adapter(base(), folder, any_base=True)
    assert all(p.requires_grad for p in other.parameters())  # it was given back as it was


def test_a_truncated_file_is_told_by_name(folder):
    for name in (ADAPTER_CONFIG, ADAPTER_TENSORS):
        whole = (folder / name).read_bytes()
        for share in (0.0, 0.02, 0.5, 0.99):
            (folder / name).write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(InputError, match=f"damaged adapter: .*{name}") as caught:
                load_adapter(base(**UNTIED), folder)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_TENSORS])
def test_a_missing_file_is_told_by_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: No such file"):
        read_adapter(folder)


def test_other_tensors_are_told(folder):
    tensors = load_file(folder / ADAPTER_TENSORS)
    first = min(tensors)
    for changed, said in (
        ({k: v for k, v in tensors.items() if k != first}, "lacks"),
        (tensors | {"base_model.model.more.lora_A.weight": torch.zeros(1)}, "has 'more.lora_A.weight'"),
        (tensors | {first: torch.zeros(3, 3)}, r"has shape \(3, 3\), expected"),
        (tensors | {"more": torch.zeros(1)}, "key 'more'; expected base_model.model"),
    ):
        save_file(changed, folder / ADAPTER_TENSORS)
        model = AdaptedModel(base(**UNTIED))
        with pytest.raises(InputError, match=said):
            load_adapter(model, folder)
        assert model.configs == {}
        assert model.active is None


def test_a_wrong_configuration_is_told(folder):
    body = json.loads((folder / ADAPTER_CONFIG).read_text())
    for change, said in [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; allowed: LORA"),
        ({"reclib": None}, "'reclib' holds no 'config'"),
        ({"reclib": {"config": {"kind": "ilora", "rank": 6}}}, "rank=6 must be divisible"),
        ({"reclib": {"config": {"kind": "ilora", "ranks": 6}}}, "unknown parameter 'ranks'"),
    ]:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(body | change))
        with pytest.raises(InputError, match=said):
            read_adapter(folder)


def test_what_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write adapter"):
        save_adapter(adapted("lora"), tmp_path / "file" / "a")
    with pytest.raises(InputError, match="unknown adapter 'june'"):
        save_adapter(adapted("lora"), tmp_path / "a", "june")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
