"""Files of adapters, which PEFT reads as well, and checkpoints: whole or not there."""

import json
from pathlib import Path

import pytest
import torch
from adapting import EVERYTHING, KINDS, UNTIED, adapted, base, first_batch, scores, stir
from conftest import disk_of, refused
from safetensors.torch import load_file, save_file

from reclib.config import ENCODER, AdapterConfig, InputError
from reclib.model.ilora import AdaptedModel
from reclib.train import saving
from reclib.train.saving import ADAPTER_CONFIG, ADAPTER_TENSORS, load_adapter, save_adapter

PLAIN = (*ENCODER, "transform.linear", "item_table")  # what PEFT can adapt: modules


def test_an_adapter_comes_back_to_the_same_bits(tmp_path):
    for kind in KINDS:
        for shape in (UNTIED, {}):
            batch, written = first_batch(), adapted(kind, base(**shape), targets=EVERYTHING, dropout=0.25)
            folder = save_adapter(written, tmp_path / "a")
            read = load_adapter(base(**shape), folder, "again").eval()
            assert read.configs["again"] == written.configs["default"] or kind in ("lora", "rslora")
            assert torch.equal(scores(read, batch), scores(written, batch))
            size = sum(t.numel() for t in load_file(folder / ADAPTER_TENSORS).values())
            assert size == sum(p.numel() for p in written.parameters() if p.requires_grad)  # none of the base


def test_a_causal_reader_is_not_in_the_file_but_its_hash(tmp_path):
    reader, other = (base(seed=seed, causal=True) for seed in (7, 8))
    written, batch = AdaptedModel(base(**UNTIED)), first_batch()
    written.add("x", AdapterConfig(kind="ilora", representation="causal_state"), reader)
    folder = save_adapter(stir(written).eval(), tmp_path / "a")
    read = load_adapter(base(**UNTIED), folder, causal_model=reader).eval()
    assert torch.equal(scores(read, batch), scores(written, batch))
    refused("the causal model that the gate reads", load_adapter, base(**UNTIED), folder, causal_model=other)
    refused("needs causal_model", load_adapter, base(**UNTIED), folder)


def test_peft_and_we_read_each_others_files_and_give_the_same(tmp_path, recwarn):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: it is in the extra 'test'")
    batch, near = first_batch(), {"rtol": 1e-5, "atol": 1e-5}
    plain = scores(base(**UNTIED), batch)

    def peft_scores(model) -> torch.Tensor:
        return scores(model.base_model.model.eval(), batch)

    for kind in ("lora", "rslora"):
        written = adapted(kind, targets=PLAIN)
        folder = save_adapter(written, tmp_path / kind)
        theirs = peft.PeftModel.from_pretrained(base(**UNTIED), folder)
        assert not [w for w in recwarn if "missing" in str(w.message) or "nexpected" in str(w.message)]
        config = theirs.peft_config["default"]
        assert (config.r, config.lora_alpha, config.use_rslora) == (8, 16.0, kind == "rslora")
        expected = scores(written, batch)
        torch.testing.assert_close(peft_scores(theirs), expected, **near)
        assert float((expected - plain).abs().max()) > 1e-2
        torch.testing.assert_close(scores(theirs.merge_and_unload(), batch), expected, rtol=1e-4, atol=1e-4)

        paths = ["blocks.0.attention.qkv", "blocks.1.ffn.down", "blocks.1.attention.qkv", "item_table"]
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=paths, use_rslora=kind == "rslora")
        torch.manual_seed(3)
        theirs = peft.get_peft_model(base(**UNTIED), config)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        folder = tmp_path / f"their-{kind}"
        theirs.save_pretrained(folder)
        refused("does not say which base", load_adapter, base(**UNTIED), folder)
        read = load_adapter(base(**UNTIED), folder, any_base=True).eval()
        assert sorted(read.layers()) == sorted(paths)
        assert read.configs["default"].kind == kind
        torch.testing.assert_close(scores(read, batch), peft_scores(theirs), **near)

    for kind, targets in (("ilora", ENCODER), ("gated", ENCODER), ("lora", EVERYTHING)):
        folder = save_adapter(adapted(kind, targets=targets), tmp_path / "own")
        with pytest.raises((KeyError, ValueError, TypeError), match="RECLIB_"):
            peft.PeftModel.from_pretrained(base(**UNTIED), folder)
    special = {"use_dora": True, "init_lora_weights": "pissa", "rank_pattern": {"qkv": 2}}
    file = tmp_path / "their-lora" / ADAPTER_CONFIG
    about = json.loads(file.read_text())
    for field, value in (special | {"modules_to_save": ["norm"], "what_a_later_version_has": 1}).items():
        file.write_text(json.dumps(about | {field: value}))
        refused(f"'{field}': .* is not plain LoRA", load_adapter, base(**UNTIED), file.parent, any_base=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(adapted("ilora"), tmp_path / "a")


def test_another_base_is_refused_and_the_model_is_as_it_was(folder):
    other = base(seed=1, **UNTIED)
    refused(r"of another model: the base has sha256 \w{12}, expected \w{12}", load_adapter, other, folder)
    refused("of another model: the base", load_adapter, base(), folder, any_base=True)
    assert all(p.requires_grad for p in other.parameters())


def test_damaged_and_missing_files_are_named(folder):
    for name in (ADAPTER_CONFIG, ADAPTER_TENSORS):
        whole = (folder / name).read_bytes()
        for share in (0.0, 0.02, 0.5, 0.99, None):
            (folder / name).unlink()
            if share is not None:
                (folder / name).write_bytes(whole[: int(share * len(whole))])
            refused(f"^damaged adapter: .*{name}.*$", load_adapter, base(**UNTIED), folder)
        (folder / name).write_bytes(whole)


def test_other_tensors_and_settings_are_named_and_nothing_is_added(folder):
    tensors = load_file(folder / ADAPTER_TENSORS)
    body = json.loads((folder / ADAPTER_CONFIG).read_text())
    first, more = min(tensors), "base_model.model.more.lora_A.weight"
    for change, message in (
        ({k: v for k, v in tensors.items() if k != first}, "is None, expected torch.Size"),
        (tensors | {more: torch.zeros(1)}, r"'more.lora_A.weight' is torch.Size\(\[1\]\), expected None"),
        (tensors | {first: torch.zeros(3, 3)}, r"is torch.Size\(\[3, 3\]\), expected torch.Size"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; allowed: LORA"),
        ({"reclib": None}, "damaged adapter"),
        ({"reclib": {"config": {"kind": "ilora", "rank": 6}}}, "rank=6 must be divisible"),
    ):
        is_body = bool(change.keys() & body.keys())
        save_file(tensors if is_body else change, folder / ADAPTER_TENSORS)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(body | (change if is_body else {})))
        model = AdaptedModel(base(**UNTIED))
        refused(message, load_adapter, model, folder)
        assert (model.configs, model.active) == ({}, None)


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot write adapter", save_adapter, adapted("lora"), tmp_path / "file" / "a")
    refused("unknown adapter 'june'", save_adapter, adapted("lora"), tmp_path / "a", "june")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


TENSORS = {"a": torch.arange(5.0), "b": torch.tensor(3)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_replaces_its_former_and_the_newest_by_number_is_latest(tmp_path):
    (tmp_path / "step-12.partial").mkdir()  # half written
    (tmp_path / "step-abc").mkdir()
    assert saving.latest(tmp_path) is None
    for step in (8, 9, 10, 9):
        path = saving.save_checkpoint(tmp_path, f"step-{step}", TENSORS, {"step": step})
    tensors, state = saving.load_checkpoint(path)
    assert state["step"] == 9
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert saving.latest(tmp_path).name == "step-10"
    saving.prune(tmp_path)
    assert names(tmp_path) == ["step-10", "step-9", "step-abc"]
    assert names(path) == sorted([saving.TENSORS, saving.STATE])


def test_damage_is_named_with_what_to_do(tmp_path):
    for file, damaged in (
        (saving.TENSORS, lambda content: content[:-3]),
        (saving.TENSORS, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        (saving.TENSORS, None),
        (saving.STATE, lambda content: content[:20]),
        (saving.STATE, lambda content: b"{}"),
        (saving.STATE, None),
    ):
        path = saving.save_checkpoint(tmp_path, "step-7", TENSORS, {"step": 7})
        content = (path / file).read_bytes()
        (path / file).unlink()
        if damaged is not None:
            (path / file).write_bytes(damaged(content))
        refused(r"damaged checkpoint: .*step-7.*delete", saving.load_checkpoint, path)


def test_full_disk_is_one_clear_error_and_keeps_the_last_good_checkpoint(tmp_path):
    with disk_of(1, tmp_path / "disk") as disk:
        saving.save_checkpoint(disk, "step-1", TENSORS, {"step": 1})
        with pytest.raises(InputError, match=r"^cannot write .*step-2: .*last good one is step-1.*$"):
            saving.save_checkpoint(disk, "step-2", {"a": torch.zeros(300_000)}, {"step": 2})
        assert names(disk) == ["step-1"]
        assert torch.equal(saving.load_checkpoint(disk / "step-1")[0]["a"], TENSORS["a"])
