"""From a trained model to a file that others run: a threshold for every label, then ONNX.

    pip install "sadcl[train,export]"
    python examples/thresholds_and_export.py --output model.onnx

Thresholds are chosen on validation pictures and judged on others. The program takes uint8 pictures, any number at once,
and was compared with the model before it is written; ``model.onnx.json`` beside it holds class names and thresholds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import onnxruntime
import torch
from generated import NAMES, pictures

from sadcl import SADCL, AsymmetricLoss
from sadcl.commands.export import export_model
from sadcl.metrics import multilabel_report
from sadcl.train.thresholds import tune_thresholds

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="model.onnx")
parser.add_argument("--epochs", type=int, default=4)
options = parser.parse_args()

torch.manual_seed(0)
sizes = {"image_size": 64, "hidden_dim": 64, "num_heads": 4, "ffn_dim": 128, "encoder_layers": 0, "decoder_layers": 1}
model = SADCL(len(NAMES), "timm:test_resnet", contrastive=False, frozen="none", freeze_norm=False, dropout=0.0, **sizes)
images, labels = pictures(500, 64)
loss_of = AsymmetricLoss(gamma_neg=2, gamma_pos=0, clip=0.0, reduction="mean")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(options.epochs):
    for chosen in torch.randperm(len(images)).split(32):
        loss = loss_of(model(model.preprocessing(images[chosen])).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
validation, test = pictures(300, 64, seed=1), pictures(300, 64, seed=2)
with torch.no_grad():
    scores = [model(model.preprocessing(part[0])).logits.sigmoid() for part in (validation, test)]
thresholds = tune_thresholds(scores[0], validation[1])
for name, threshold in (("0.5", 0.5), ("tuned", thresholds)):
    report = multilabel_report(scores[1], test[1], threshold=threshold)
    print(f"thresholds {name}: mAP {report.mAP:.3f}, CF1 {report.CF1:.3f}, OF1 {report.OF1:.3f}")

about = {"classes": NAMES, "thresholds": {"default": 0.5, "tuned": thresholds.tolist()}}
export_model(model, options.output, about=about, pictures=test[0][:8])

session = onnxruntime.InferenceSession(options.output)
facts = json.loads(Path(f"{options.output}.json").read_text())
_, probabilities = session.run(None, {"images": test[0][:2].numpy()})
for row, truth in zip(probabilities, test[1], strict=False):
    tuned = facts["thresholds"]["tuned"]
    found = [name for name, p, t in zip(facts["classes"], row, tuned, strict=True) if p > t]
    print(f"found {found}, there {[name for name, there in zip(NAMES, truth, strict=True) if there]}")
