"""Instance-wise LoRA against plain LoRA and full fine-tuning: a step's time and the memory of its tensors.

    python benchmarks/ilora.py                some minutes
    python benchmarks/ilora.py --tiny         a model of no interest and few steps, to try the script

The shape is `electronics` of `engine.py` (160,000 items, hidden 256, 4 layers, batch 128, untied tables),
fp32, after some steps of full training as the base. Adapters: all encoder matrices, rank 8, 4 experts, gate
on the mean of the visible items' embeddings, its time included; iLoRA compiled, too, where there is a
compiler. Steps are timed in turns in one process, on the same batches, as notebook 05 does, and a ratio is
the geometric mean over pairs of steps with its 95 % bootstrap interval.
"""

import argparse

import torch
from common import Row, Rows, options, start
from engine import configs, dataset_of, whole_histories

from reclib import hardware, parameters
from reclib.config import changed, model_config
from reclib.data.prepare import synthetic_dataset
from reclib.experiments import speed
from reclib.model.bert4rec import Bert4Rec
from reclib.train.trainer import Trainer

KINDS = ["full", "lora", "ilora"]


def run(args: argparse.Namespace, rows: Rows) -> Row:
    """Train the base, time the steps of all variants; return their seconds, bytes and ratios."""
    torch.set_num_threads(args.threads)
    device, tiny = hardware.resolve("cpu"), args.tiny
    dataset = synthetic_dataset(300, 200, 9.4, 0) if tiny else dataset_of("electronics")
    model, train = configs("electronics", dataset.num_items)
    if tiny:
        model, train = model_config("nano", num_items=200, max_len=50), changed(train, batch_size=32)
    torch.manual_seed(0)
    base, train = Bert4Rec(model), changed(train, max_steps=2 if tiny else 60)
    for _ in Trainer(base, whole_histories(dataset), train, device, dataset.fingerprint).steps():
        pass
    values = parameters.profile("05_ilora", "smoke") | {"arms": ["none", *KINDS], "learning_rates": [1e-4]}
    values |= {name: getattr(train, name) for name in ("batch_size", "mask_prob", "last_item_share")}
    values |= {"rank": 8, "alpha": 8.0, "num_experts": 4, "representation": "mean_embedding"}
    values |= {"precisions": ["fp32"], "rounds": 2 if tiny else args.pairs, "warmup_steps": 12}
    values["compile_modes"] = ["off", "default"] if hardware.has_compiler() and not tiny else ["off"]
    p = parameters.build("05_ilora", values)
    result: Row = {"pairs": p.rounds}
    for step in speed.adapter_grid(p, base, dataset, device):
        settings = step.own_params()
        name = settings["model"] + ("" if settings["compile_mode"] == "off" else "_compiled")
        rows.add(name, **settings, **step.metrics(), **step.timings)
        for key, value in step.timings.items():
            if key.startswith("over_") or key in ("step_seconds", "peak_tensor_bytes"):
                result[f"{name}_{key}"] = value
    return result


if __name__ == "__main__":
    parser = options(__doc__, threads=2, pairs=40)
    parser.add_argument("--tiny", action="store_true", help="a model of no interest, to try the script")
    raise SystemExit(start(parser, run))
