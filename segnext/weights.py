"""Loading and saving models: files in the official or mmsegmentation's layout, .pth or .safetensors, and hosted names."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import hosted
from .checkpoint import SAFETENSORS_SUFFIX, WeightsError, plain, read, suffix, writing
from .classifier import Classifier
from .described import Described, described
from .heads import GROUPS
from .model import SIZES, Config, SegNeXt
from .mscan import MSCAN
from .recipes import shown

__all__ = ["WeightsError", "load", "load_classifier", "load_encoder", "save"]

# The part of a Config that no tensor shows
NOT_IN_TENSORS = ("rank", "eval_steps", "drop_path", "dropout", "bases", "gradient")


def load(path_or_name: str | os.PathLike[str], *, rank: int | None = None) -> SegNeXt:
    """Builds the whole model from a checkpoint alone, on the CPU, in float32 and in evaluation mode.

    Args:
        path_or_name: a file in the official or mmsegmentation's layout that ends in .pth, .pt, .ckpt, .tar or .safetensors, or
            the name of hosted weights such as "ade20k-t" (see :data:`segnext.hosted.HOSTED`), fetched once and kept in
            torch.hub's folder.
        rank: of the Ham head's matrix decomposition. No tensor shows it: unless given, it comes from the checkpoint's own
            description where there is one, else it is the paper's.

    Returns:
        The model, with ``classes``, ``palette`` and how it is shown pictures where the checkpoint names them. A head with one
        output, which mmsegmentation compares with a threshold, gets two, of which the larger one is the same label.

    Raises:
        WeightsError: the checkpoint cannot be had or read, or its keys or shapes do not make a SegNeXt.
        ValueError: ``rank`` is below 1.
        ImportError: safetensors is not installed, and the file is one of its kind.
    """
    path = locate(path_or_name)
    state, meta = read(path)
    own = meta.get("segnext") if isinstance(meta.get("segnext"), dict) else None
    said = described(meta) if own is None else Described({name: own[name] for name in NOT_IN_TENSORS if name in own})
    if not any(key.startswith("decode_head.") for key in state):
        if hidden := next((key for key in state if ".decode_head." in key), None):
            raise WeightsError(f"{path} holds a model under a prefix that is unknown here: {hidden.removeprefix('backbone.')}")
        raise WeightsError(f"{path} holds no decode_head, only an encoder, which segnext.load_encoder takes")
    if said.other or "decode_head.hamburger.ham.bases" in state:
        reason = said.other or "rand_init is False, so that its decomposition starts from bases of its own"
        raise WeightsError(f"{path} was trained with other settings than the models here have: {reason}")
    doubled = own is None and _make_two_outputs(state, said.threshold)
    config = _config(state, said, path)
    if rank is not None:
        config = replace(config, rank=rank)
    with torch.device("meta"):
        model = SegNeXt(config)
    check(state, model, path)
    _fill(model, state)
    model.classes, model.palette = _legend(meta, config.num_classes)
    if doubled and model.classes is None and (one := _legend(meta, 1)[0]):  # that of the single output
        model.classes = ["background", *one]
    _show(model, {**said.shown, **meta})
    return model.eval()


def load_encoder(model: SegNeXt | MSCAN, path_or_name: str | os.PathLike[str]) -> None:
    """Loads an encoder's weights, such as ImageNet's, into a model or an encoder; a model's head stays as it is.

    Args:
        model: a whole model or an encoder alone, of the checkpoint's size.
        path_or_name: as for :func:`load`, or "imagenet-t" and so on: a checkpoint of an encoder (its classifier is left out) or
            of a whole model (its head is).

    Raises:
        WeightsError: as for :func:`load`; the model is then unchanged.
    """
    path = locate(path_or_name)
    state, _ = read(path)
    prefix = "backbone."
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    encoder = model.backbone if isinstance(model, SegNeXt) else model
    check(state, encoder, path)
    encoder.load_state_dict(state)


def load_classifier(path_or_name: str | os.PathLike[str]) -> Classifier:
    """Builds an encoder with its classifier from a checkpoint alone, on the CPU, in float32 and in evaluation mode.

    Args:
        path_or_name: as for :func:`load`, or "imagenet-t" and so on.

    Raises:
        WeightsError: as for :func:`load`, or the checkpoint holds no classifier ``head.weight``, ``head.bias``.
    """
    path = locate(path_or_name)
    state, _ = read(path)
    if "head.weight" not in state:
        raise WeightsError(f"{path} holds no classifier head.weight, so it tells no classes apart")
    config = replace(_encoder_config(state, path), num_classes=_size(state, path, "head.weight"))
    with torch.device("meta"):
        model = Classifier(config)
    check(state, model, path)
    _fill(model, state)
    return model.eval()


def save(model: SegNeXt, path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint that :func:`load` takes: the state, and beside it the configuration and what rides along.

    Args:
        path: ends in .pth, .pt, .ckpt, .tar or .safetensors; its folder is made if it isn't there. A file that was there is
            replaced only once the new one is complete.

    Raises:
        TypeError: the model is no SegNeXt, compiled or not.
        ValueError: it has not as many names or colours as classes, or colours that are none.
        WeightsError: the path has another ending, or cannot be written.
    """
    path, model = Path(path), getattr(model, "_orig_mod", model)
    if not isinstance(model, SegNeXt):
        raise TypeError(f"save: model must be a SegNeXt, got {type(model).__name__}")
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    is_safetensors = suffix(path) == SAFETENSORS_SUFFIX
    with writing(path) as file:
        if is_safetensors:
            from safetensors.torch import save as to_bytes

            file.write(to_bytes(state, {"format": "pt", "meta": json.dumps(about(model))}))
        else:
            torch.save({"state_dict": state, "meta": about(model)}, file)


def about(model: SegNeXt) -> dict[str, Any]:
    """What a checkpoint says of a model beside its tensors, in plain types.

    Raises:
        ValueError: the model has not as many names or colours as classes, or colours that are none.
    """
    classes, palette, count = model.classes, model.palette, model.config.num_classes
    classes = None if classes is None else [str(name) for name in classes]
    palette = None if palette is None else [tuple(int(value) for value in colour) for colour in palette]
    views = {name: plain(value if np.ndim(value) == 0 else tuple(value)) for name, value in shown(model).items()}
    found = [None if given is None else len(given) for given in (classes, palette)]
    if not {*found} <= {None, count}:
        raise ValueError(f"a model of {count} classes must have as many names and colours, got {found[0]} and {found[1]}")
    if palette is not None and not all(map(_is_colour, palette)):
        raise ValueError(f"a palette's colours must be three numbers from 0 to 255, got {palette}")
    return {"segnext": asdict(model.config), "classes": classes, "palette": palette, **views}


def from_about(meta: Mapping[str, Any]) -> SegNeXt:
    """The model, with random weights, that :func:`about` described."""
    model = SegNeXt(Config(**meta["segnext"]))
    model.classes, model.palette = meta.get("classes"), meta.get("palette")
    _show(model, meta)
    return model


def locate(path_or_name: str | os.PathLike[str]) -> Path:
    """A checkpoint's file; of a hosted one it is fetched where it is not there."""
    if path_or_name in hosted.HOSTED:
        return hosted.fetch(path_or_name)
    path = Path(path_or_name)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}, and hosted weights are called {', '.join(hosted.HOSTED)}")
    return path


def _size(state: Mapping[str, Tensor], path: Path, key: str, dim: int = 0, multiple_of: int = 1) -> int:
    """A tensor's length in one dimension."""
    shape = state[key].shape if key in state else ()
    if len(shape) <= dim or shape[dim] == 0 or shape[dim] % multiple_of:
        raise WeightsError(f"{path} does not fit: {key}, which tells the model's size, is missing or misshapen")
    return shape[dim]


def _encoder_config(state: Mapping[str, Tensor], path: Path) -> Config:
    """The configuration that the encoder's shapes show, and the paper's of that encoder for the rest."""
    size = partial(_size, state, path)
    stages = range(1, 5)
    channels = tuple(size(f"backbone.norm{i}.weight", multiple_of=2 if i == 1 else 1) for i in stages)
    blocks = {match[0] for match in (re.match(r"backbone\.block\d\.\d+\.", key) for key in state) if match}
    depths = tuple(sum(block.startswith(f"backbone.block{i}.") for block in blocks) for i in stages)
    hidden = tuple(size(f"backbone.block{i}.0.mlp.fc1.weight", multiple_of=c) for i, c in zip(stages, channels, strict=True))
    known = (config for config in SIZES.values() if (config.channels, config.depths) == (channels, depths))
    return replace(
        next(known, Config(channels, depths)),
        mlp_ratios=tuple(h // c for h, c in zip(hidden, channels, strict=True)),
        in_channels=size("backbone.patch_embed1.proj.0.weight", 1),
    )


def _make_two_outputs(state: dict[str, Tensor], threshold: float) -> bool:
    """Logits (0, z - logit(threshold)) in place of a single z, whose probability mmsegmentation compares with the threshold;
    whether there was one."""
    weight, bias = (state.get(f"decode_head.conv_seg.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None or weight.shape[:1] != (1,) or bias.shape != (1,):
        return False
    state["decode_head.conv_seg.weight"] = torch.cat([torch.zeros_like(weight), weight])
    state["decode_head.conv_seg.bias"] = torch.cat([torch.zeros_like(bias), bias - math.log(threshold / (1 - threshold))])
    return True


def _config(state: Mapping[str, Tensor], said: Described, path: Path) -> Config:
    """The configuration that the shapes show; rank and stochastic depth are described by the checkpoint, or the paper's."""
    decoder_channels = _size(state, path, "decode_head.squeeze.conv.weight", multiple_of=GROUPS)
    config = replace(
        _encoder_config(state, path),
        decoder_channels=decoder_channels,
        rank=64 if decoder_channels >= 512 else 16,
        head="ham" if any(key.startswith("decode_head.hamburger.") for key in state) else "msca",
        num_classes=_size(state, path, "decode_head.conv_seg.weight"),
    )
    try:
        return replace(config, **said.config)
    except ValueError as error:
        raise WeightsError(f"{path} describes no model: {error}") from error


def _legend(meta: Mapping[str, Any], count: int) -> tuple[list[str] | None, list[tuple[int, int, int]] | None]:
    """Classes and palette: ours, or mmsegmentation's under ``dataset_meta`` (1.x) or in capitals (0.x)."""
    dataset = meta.get("dataset_meta")
    places = [meta, {str(key).lower(): value for key, value in meta.items()}, dataset if isinstance(dataset, dict) else {}]

    def find(name: str, fits: Callable[[Any], bool]) -> list | None:
        values = (place.get(name) for place in places)
        lists = (list(value) for value in values if isinstance(value, (list, tuple)) and len(value) == count)
        return next((items for items in lists if all(map(fits, items))), None)

    palette = find("palette", _is_colour)
    return find("classes", lambda name: isinstance(name, str)), palette and [tuple(colour) for colour in palette]


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(part, int) and 0 <= part <= 255 for part in value)
    )


def _show(model: SegNeXt, meta: Mapping[str, Any]) -> None:
    """Gives the model what a checkpoint says of how it is shown pictures, as far as it makes sense."""
    model.scale, multiple = _pair(meta.get("scale")), meta.get("multiple")
    model.multiple = multiple if isinstance(multiple, int) and multiple > 0 else 1
    window, stride = (_pair(meta.get(name)) for name in ("window", "stride"))
    if window is not None and stride is not None:
        model.window, model.stride = window, stride


def _pair(sides: Any) -> tuple[int, int] | None:
    fits = isinstance(sides, (list, tuple)) and len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides)
    return tuple(sides) if fits else None


def check(state: Mapping[str, Tensor], module: nn.Module, path: Path) -> None:
    """Raises one WeightsError that names what is missing, too much or of another shape."""
    expected = module.state_dict()
    shapes = {key: (list(state[key].shape), list(value.shape)) for key, value in expected.items() if key in state}
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "misshapen": [f"{key} {is_} instead of {ought}" for key, (is_, ought) in shapes.items() if is_ != ought],
    }
    found = "; ".join(f"{kind} {_first_few(names)}" for kind, names in problems.items() if names)
    if found:
        raise WeightsError(f"{path} does not fit: {found}")


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a module on the meta device memory on the CPU, in its own dtypes, with the state in it. ``to_empty`` does the first
    of it, but imports sympy to do so, a second."""
    filled = model.state_dict()
    with torch.no_grad():
        for key, own in filled.items():
            filled[key] = torch.empty(own.shape, dtype=own.dtype, device="cpu").copy_(state[key])
    model.load_state_dict(filled, assign=True)


def _first_few(names: list[str], count: int = 3) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest
