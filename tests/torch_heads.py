"""Torch oracle of the published fusers and decoders, written from their definition (NCHW).

Module names are the published state-dict names, so `state_dict()` is what such a checkpoint holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class ConvNorm(nn.Conv2d):
    """Bias-free convolution with a group norm that belongs to it (`weight`, `norm.*`)."""

    def __init__(self, cin, cout, size=1, groups=32):
        super().__init__(cin, cout, size, padding=size // 2, bias=False)
        self.norm = nn.GroupNorm(groups, cout, eps=1e-5)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    def __init__(self, cin, width, groups=32):
        super().__init__()
        if cin != width:
            self.shortcut = ConvNorm(cin, width, 1, groups)
        self.conv1 = ConvNorm(cin, width // 4, 1, groups)
        self.conv2 = ConvNorm(width // 4, width // 4, 3, groups)
        self.conv3 = ConvNorm(width // 4, width, 1, groups)

    def forward(self, x):
        y = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


def block(cin, width, groups):
    return nn.Sequential(Bottleneck(cin, width, groups))


class Gate(nn.Module):
    def __init__(self, width, entries):
        super().__init__()
        self.gate_conv = nn.Conv2d(width, entries, 1)


class Experts(nn.Module):
    def __init__(self, cin, width, experts, top_k, groups):
        super().__init__()
        self.experts = nn.ModuleList(block(cin, width, groups) for _ in range(experts))
        self.gate_network = nn.Sequential(nn.Conv2d(cin, experts, 3, padding=1))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.top_k = top_k

    def forward(self, x, dense):
        logits = self.gate_network(x).mean((2, 3)) / self.temperature
        share = logits.softmax(-1)
        if dense:
            y = sum(
                share[:, e, None, None, None] * expert(x) for e, expert in enumerate(self.experts)
            )
            return y, share
        values, chosen = logits.topk(self.top_k, -1)
        weights = values.softmax(-1)
        rows = []
        for n in range(len(x)):
            picked = zip(weights[n], chosen[n])
            rows.append(sum(v * self.experts[int(e)](x[n : n + 1]) for v, e in picked))
        return torch.cat(rows), share


class Fuser(nn.Module):
    """gw, lw or moe on features[scale] = [B, T, C, H, W]; returns maps and gates or mixing."""

    def __init__(self, kind, scales, keys, width, groups=32, experts=8, top_k=2, first_tap=False):
        super().__init__()
        self.kind, self.scales, self.keys, self.first_tap = kind, scales, keys, first_tap
        taps = [c for scale in scales for c in scale.channels]
        if kind == "moe":
            self.scale_moes = nn.ModuleList(
                Experts(sum(s.channels), width, experts, top_k, groups) for s in scales
            )
            return
        self.bottleneck_layers = nn.ModuleList(block(c, width, groups) for c in taps)
        if kind == "gw":
            self.mixing_weights = nn.Parameter(torch.ones(len(taps) * keys))
        else:
            self.gate_modules = nn.ModuleList(Gate(width, keys * len(s.channels)) for s in scales)

    def forward(self, features, dense=True):
        maps, extra, first = [], [], 0
        for s, (scale, x) in enumerate(zip(self.scales, features)):
            if self.kind == "moe":
                parts = [self.scale_moes[s](x[:, t], dense) for t in range(self.keys)]
                maps.append(sum(p[0] for p in parts) / self.keys)
                extra.append([p[1] for p in parts])
                continue
            projected = []
            for t in range(self.keys):
                taps = x[:, t].split(list(scale.channels), 1)
                for i in range(len(taps)):
                    tap = taps[0] if self.first_tap else taps[i]
                    projected.append(self.bottleneck_layers[first + i](tap))
            count = len(scale.channels)
            if self.kind == "gw":
                mixing = self.mixing_weights.softmax(0).reshape(self.keys, -1)
                share = mixing[:, first : first + count].reshape(-1)
                maps.append(sum(v * p for v, p in zip(share, projected)))
                extra = mixing.reshape(-1)
            else:
                stack = torch.stack(projected, 1)
                gate = self.gate_modules[s].gate_conv(stack.mean(1)).softmax(1)
                maps.append((gate[:, :, None] * stack).sum(1))
                extra.append(gate)
            first += count
        return maps, extra


class Classifier(nn.Module):
    """Maps resized to the finest side, summed, averaged over space, one linear layer."""

    def __init__(self, width, classes):
        super().__init__()
        self.decoder_head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
        )

    def forward(self, maps):
        size = maps[0].shape[2:]
        return self.decoder_head(sum(resize(x, size) for x in maps))


def resize(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv_bn(cin, cout, size=1):
    conv = nn.Conv2d(cin, cout, size, padding=size // 2)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())


class Neck(nn.Module):
    def __init__(self, width, rescales):
        super().__init__()
        self.ops = nn.ModuleList(self.op(width, r) for r in rescales)

    @staticmethod
    def op(width, rescale):
        def up():
            return nn.ConvTranspose2d(width, width, 2, 2)

        if rescale == 4:
            return nn.Sequential(up(), nn.BatchNorm2d(width), nn.GELU(), up())
        if rescale == 2:
            return nn.Sequential(up())
        return nn.Identity() if rescale == 1 else nn.MaxPool2d(round(1 / rescale))


class UPerNet(nn.Module):
    def __init__(self, width, channels, classes, pools, levels, side, rescales=None, dropout=0.1):
        super().__init__()
        self.side, self.dropout = side, nn.Dropout2d(dropout)
        self.neck = Neck(width, rescales or (1,) * levels)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(p), *conv_bn(width, channels)) for p in pools
        )
        self.bottleneck = conv_bn(width + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_bn(width, channels) for _ in range(levels - 1))
        self.fpn_convs = nn.ModuleList(conv_bn(channels, channels, 3) for _ in range(levels - 1))
        self.fpn_bottleneck = conv_bn(levels * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps):
        maps = [op(x) for op, x in zip(self.neck.ops, maps)]
        top = maps[-1]
        pooled = [resize(module(top), top.shape[2:]) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels)] + [levels[-1]]
        outs = [resize(x, outs[0].shape[2:]) for x in outs]
        y = self.conv_seg(self.dropout(self.fpn_bottleneck(torch.cat(outs, 1))))
        return resize(y, (self.side, self.side))


class TorchHead(nn.Module):
    """Fuser and decoder of a HeadSpec; features NHWC arrays [B, T, H, W, C]."""

    def __init__(self, spec):
        super().__init__()
        self.fuser = Fuser(
            spec.fuser,
            spec.scales,
            spec.num_keys,
            spec.projection_dim,
            spec.norm_groups,
            spec.num_experts,
            spec.top_k,
            spec.lw_input == "first_tap",
        )
        if spec.task == "segmentation":
            self.decoder = UPerNet(
                spec.projection_dim,
                spec.channels,
                spec.num_classes,
                spec.pool_scales,
                len(spec.scales),
                spec.output_side,
                spec.rescales,
                spec.dropout,
            )
        else:
            self.decoder = Classifier(spec.projection_dim, spec.num_classes)

    def forward(self, features, dense=True):
        features = [torch.as_tensor(x).permute(0, 1, 4, 2, 3) for x in features]
        maps, extra = self.fuser(features, dense)
        return self.decoder(maps), extra

    def published_state(self):
        """Fuser and decoder names on one level, as published checkpoints have them."""
        return {k.split(".", 1)[1]: v for k, v in self.state_dict().items()}
