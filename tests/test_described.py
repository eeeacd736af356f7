"""What mmsegmentation's checkpoints say of themselves, and what is made of it."""

from __future__ import annotations

import golden
import pytest
import torch
from torch import Tensor

import segnext
from segnext import WeightsError
from segnext.described import Described, described

OLD = """
data_root = 'C:\\Users\\me'
model = dict(
    type='EncoderDecoder',
    pretrained=None,
    decode_head=dict(
        type='LightHamHead', ham_kwargs=dict(MD_R=24, EVAL_STEPS=5), align_corners=False, norm_cfg=dict(num_groups=32)),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(1024, 512), stride=(768, 384)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [dict(type='Resize', img_scale=(1, 1), ratio_range=(0.5, 2.0))]
broken = 'somebody's'
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='MultiScaleFlipAug',
        img_scale=(2048, 1024),
        flip=False,
        transforms=[dict(type='AlignResize', keep_ratio=True), dict(type='RandomFlip')])
]
optimizer = dict(lr=6e-05, betas=(0.9, 0.999), eps=-1)
data = dict(train=dict(pipeline=train_pipeline), test=dict(type='X'))
"""
NEW = """
data_preprocessor = dict(type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], bgr_to_rgb=True)
test_cfg = dict(type='TestLoop')
test_pipeline = [dict(type='Resize', scale=(9, 99), keep_ratio=True)]
model = dict(
    decode_head=dict(
        norm_cfg=dict(type='GN', num_groups=32), threshold=0.4,
        ham_kwargs=dict(MD_S=1, MD_R=16, train_steps=6, eval_steps=9, inv_t=100, rand_init=True)),
    test_cfg=dict(mode='whole'))
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='mmseg.Resize', scale=(512, 2048), keep_ratio=True), dict(type='ResizeToMultiple', size_divisor=16)]))
"""
OLD_FLIP = "type='MultiScaleFlipAug', img_scale=(9, 9)"
SHOWN_OLD = {"scale": (2048, 1024), "multiple": 32, "window": (1024, 512), "stride": (768, 384)}


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"config": OLD}, Described({"rank": 24, "eval_steps": 5}, SHOWN_OLD)),
        ({"cfg": NEW}, Described({"rank": 16, "eval_steps": 9}, {"scale": (2048, 512), "multiple": 16}, threshold=0.4)),
        ({"cfg": '{"ham_kwargs": {"MD_R": 8}, "align_corners": true}'}, Described({"rank": 8})),
        ({"cfg": "decode_head = dict(align_corners=True)"}, Described(other="align_corners is True")),
        ({"cfg": "decode_head = dict(ham_kwargs=dict(MD_S=2, MD_R=1.5))"}, Described(other="MD_S is 2")),
        ({"cfg": "head = dict(ham_kwargs=dict(SPATIAL=False))"}, Described(other="spatial is False")),
        ({"cfg": "head = dict(ham_kwargs=dict(RAND_INIT=False))"}, Described(other="rand_init is False")),
        ({"cfg": "a = dict(decode_head=dict(c=dict(num_groups=16)))"}, Described(other="num_groups is 16")),
        ({"cfg": "img_norm_cfg = dict(mean=[0, 0, 0])"}, Described(other="mean of the images is [0, 0, 0]")),
        ({"cfg": "img_norm_cfg = dict(std=[1, 1, 1])"}, Described(other="std of the images is [1, 1, 1]")),
        ({"cfg": "img_norm_cfg = dict(to_rgb=False)"}, Described(other="to_rgb is False")),
        ({"cfg": "model = dict(data_preprocessor=dict(bgr_to_rgb=False))"}, Described(other="bgr_to_rgb is False")),
        ({"cfg": "a = dict(MD_R=1025)"}, Described({"rank": 1025}, other="rank is 1025")),
        ({"cfg": "a = dict(decode_head=dict(type='mmseg.LightHamHead', ham_kwargs=dict()))"}, Described({"rank": 64})),
        ({"cfg": "decode_head=dict(ham_kwargs=dict(MD_R=24), who='somebody's')"}, Described({"rank": 24})),
        ({"cfg": "test_pipeline = [dict(type=['x']), dict(type='Resize', scale=(512, 512))]"}, Described()),
        ({"cfg": "model = dict(test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(48, 48)))"}, Described()),
        ({"cfg": f"test_pipeline = dict({OLD_FLIP}, transforms=[dict(type='Resize')])"}, Described({}, {"scale": (9, 9)})),
        ({"cfg": "model = dict(test_cfg=dict(mode='whole', crop_size=(32, 32), stride=(16, 16)))"}, Described()),
        ({"cfg": "test_pipeline = [dict(type='Resize', scale=(9, 9), keep_ratio=False), dict(scale=f(1))]"}, Described()),
        ({"cfg": f"test_pipeline = dict({OLD_FLIP}, transforms=[dict(type='Resize', keep_ratio=False)])"}, Described()),
        ({"cfg": "a = dict(**b)\nimport os\nos.abort()"}, Described()),
        ({"cfg": "no Python, 1."}, Described()),
        ({"cfg": 5, "config": None}, Described()),
        ({}, Described()),
    ],
)
def test_described(meta, expected):
    assert described(meta) == expected


def write(tmp_path, state: dict[str, Tensor], meta: dict):
    return golden.write(tmp_path / "model.pth", state, meta)


def test_a_checkpoint_is_shown_pictures_as_its_configuration_says(tmp_path):
    model = segnext.load(write(tmp_path, golden.state_dict(), {"config": OLD}))
    assert {name: getattr(model, name) for name in SHOWN_OLD} == SHOWN_OLD
    ham = model.decode_head.hamburger.ham
    assert (ham.rank, ham.eval_steps) == (24, 5) == (model.config.rank, model.config.eval_steps)
    segnext.save(model, tmp_path / "own.pth")
    again = segnext.load(tmp_path / "own.pth")
    assert again.config == model.config and {name: getattr(again, name) for name in SHOWN_OLD} == SHOWN_OLD


@pytest.mark.parametrize("threshold", [None, 0.3, 0.8])
def test_one_output_becomes_two_with_the_same_labels(tmp_path, threshold):
    """mmsegmentation's labels of such a head are sigmoid(z) > threshold."""
    state, level = golden.state_dict(), torch.tensor(threshold or 0.3).logit()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = segnext.load(write(tmp_path, state, {}))(images)[:, 0]
    # The first class alone, around the threshold.
    state["decode_head.conv_seg.weight"] = 20 * state["decode_head.conv_seg.weight"][:1]
    state["decode_head.conv_seg.bias"] = 20 * (state["decode_head.conv_seg.bias"][:1] - logits.mean()) + level
    wanted = (20 * (logits - logits.mean()) + level).sigmoid() > (threshold or 0.3)
    text = "decode_head = dict(num_classes=2, out_channels=1)" if threshold is None else f"decode_head = dict({threshold=})"
    meta = {"cfg": text, "dataset_meta": {"classes": ("road", "car"), "palette": [[0, 0, 0], [255, 0, 0]]}}
    model = segnext.load(write(tmp_path, state, meta))
    assert model.classes == ["road", "car"] and model.config.num_classes == 2
    alone = segnext.load(write(tmp_path, state, {"CLASSES": ("crack",)}))
    assert alone.classes == ["background", "crack"]
    with torch.no_grad():
        labels = model(images).argmax(1)
    assert torch.equal(labels.bool(), wanted) and 0.2 < wanted.float().mean() < 0.8


def test_what_the_models_here_do_otherwise_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="other settings than the models here have: align_corners is True"):
        segnext.load(write(tmp_path, golden.state_dict(), {"cfg": "decode_head = dict(align_corners=True)"}))
    state = golden.state_dict() | {"decode_head.hamburger.ham.bases": torch.rand(1, 4, 2)}
    with pytest.raises(WeightsError, match="rand_init is False, so that its decomposition starts from bases of its own"):
        segnext.load(write(tmp_path, state, {}))
