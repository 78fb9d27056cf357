"""Networks for images of 32 x 32 pixels, as the papers on CIFAR train them.

    resnet8 .. resnet110    He 2016, section 4.2: three stages, shortcuts of option A
    resnet18, resnet34      He 2016 for ImageNet, with a 3 x 3 stem and no pooling before stage 1
    wrn40_2                 Zagoruyko 2016, WRN-40-2
    densenet100             Huang 2017, DenseNet-BC with 100 layers and growth rate 12

Parameters have the names of the authors' or the most used PyTorch code; `backbone.rename` maps the
names of other files. Before the last layer come the penultimate activations (N, D): after the last
ReLU and the mean over all places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.backbones.description import BackboneConfig
from pipelines.backbones.trainable import classifier_kind
from pipelines.config import UserError


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3 x 3, padded, without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class ZeroPadding(nn.Module):
    """The shortcut of option A: every second pixel, channels filled up with zeros on both sides."""

    def __init__(self, stride: int, channels: int) -> None:
        """Pad by `channels` in all."""
        super().__init__()
        self.stride = stride
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + channels, H / stride, W / stride)."""
        side = self.channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, pads: bool) -> None:
        """`pads`: a shortcut without parameters (option A); else a 1 x 1 convolution (B)."""
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = (
                ZeroPadding(stride, outputs - inputs)
                if pads
                else nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the sum of both ways."""
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        sums: Tensor = out + self.shortcut(x)
        return sums.relu()


class ResNet(nn.Module):
    """Basic blocks in stages of doubling width; all but the first stage halve the image."""

    def __init__(self, blocks: tuple[int, ...], width: int, num_classes: int) -> None:
        """Three stages are He's form for CIFAR, four the one for ImageNet."""
        super().__init__()
        self.conv1 = _conv(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for number, count in enumerate(blocks):
            outputs, stage = width * 2**number, []
            for block in range(count):
                stride = 2 if number and not block else 1
                stage.append(BasicBlock(inputs, outputs, stride, pads=len(blocks) == 3))
                inputs = outputs
            self.add_module(f"layer{number + 1}", nn.Sequential(*stage))
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) to logits (N, K)."""
        out = self.bn1(self.conv1(x)).relu()
        for stage in _stages(self, "layer"):
            out = stage(out)
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


# In the training of wide networks, as Liu 2020 trains them.
DROPOUT = 0.3


class WideBlock(nn.Module):
    """A block with normalisation first (Zagoruyko 2016, figure 1d)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Where the width changes, the shortcut is a 1 x 1 convolution of the normalised input."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(DROPOUT)
        self.conv2 = _conv(outputs, outputs)
        self.convShortcut = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways, not rectified."""
        ready = self.bn1(x).relu()
        out: Tensor = self.conv2(self.dropout(self.bn2(self.conv1(ready)).relu()))
        return out + (x if self.convShortcut is None else self.convShortcut(ready))


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`: three stages of (depth - 4) / 6 blocks."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        """Stage widths are 16, 32 and 64 times `widen`."""
        super().__init__()
        self.conv1 = _conv(3, 16)
        inputs = 16
        for number, outputs in enumerate((16 * widen, 32 * widen, 64 * widen)):
            blocks = [
                WideBlock(outputs if n else inputs, outputs, 2 if number and not n else 1)
                for n in range((depth - 4) // 6)
            ]
            self.add_module(f"block{number + 1}", _Layered(blocks))
            inputs = outputs
        self.bn1 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) to logits (N, K)."""
        out = self.conv1(x)
        for stage in _stages(self, "block"):
            out = stage(out)
        logits: Tensor = self.fc(self.bn1(out).relu().mean(dim=(2, 3)))
        return logits


class Bottleneck(nn.Module):
    """A layer of DenseNet-BC: 1 x 1, then 3 x 3, and its input beside the result."""

    def __init__(self, inputs: int, growth: int) -> None:
        """Four times `growth` channels between the convolutions."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + growth, H, W)."""
        return torch.cat([x, self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())], dim=1)


class Transition(nn.Module):
    """Half the channels, half the image."""

    def __init__(self, inputs: int) -> None:
        """A 1 x 1 convolution and a mean over 2 x 2 pixels."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C / 2, H / 2, W / 2)."""
        return F.avg_pool2d(self.conv1(self.bn1(x).relu()), 2)


class DenseNet(nn.Module):
    """DenseNet-BC with three blocks of (depth - 4) / 6 layers and half the channels between."""

    def __init__(self, depth: int, growth: int, num_classes: int) -> None:
        """It starts with 2 x `growth` channels."""
        super().__init__()
        channels = 2 * growth
        self.conv1 = _conv(3, channels)
        for number in (1, 2, 3):
            layers = []
            for _ in range((depth - 4) // 6):
                layers.append(Bottleneck(channels, growth))
                channels += growth
            self.add_module(f"block{number}", _Layered(layers))
            if number < 3:
                self.add_module(f"trans{number}", Transition(channels))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised pixels (N, 3, H, W) to logits (N, K)."""
        out = self.conv1(x)
        for stage in _stages(self, "block", "trans"):
            out = stage(out)
        logits: Tensor = self.fc(self.bn1(out).relu().mean(dim=(2, 3)))
        return logits


class _Layered(nn.Module):
    """Blocks in a row under the name `layer`."""

    def __init__(self, blocks: list[nn.Module] | list[WideBlock] | list[Bottleneck]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def _stages(network: nn.Module, *prefixes: str) -> Iterator[nn.Module]:
    """The stages of a network in the order in which they were added."""
    return (stage for name, stage in network.named_children() if name.startswith(prefixes))


def _resnet(depth: int) -> Callable[[int], nn.Module]:
    return lambda num_classes: ResNet(((depth - 2) // 6,) * 3, 16, num_classes)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": _resnet(depth) for depth in (8, 20, 32, 44, 56, 110)},
    "resnet18": lambda num_classes: ResNet((2, 2, 2, 2), 64, num_classes),
    "resnet34": lambda num_classes: ResNet((3, 4, 6, 3), 64, num_classes),
    "wrn40_2": lambda num_classes: WideResNet(40, 2, num_classes),
    "densenet100": lambda num_classes: DenseNet(100, 12, num_classes),
}


def build(config: BackboneConfig, num_classes: int) -> nn.Module:
    """The network of that name, with weights still to come.

    Raises:
        UserError: where there is none of that name.
    """
    if config.model not in NETWORKS:
        raise UserError(
            f"backbone {config.name}: kind=cifar has no network {config.model!r}; allowed: "
            f"{', '.join(NETWORKS)}"
        )
    network = NETWORKS[config.model](num_classes)
    # A network on the device "meta" has no weights, and to draw them there torch would import its
    # compiler, which takes two seconds.
    if not next(network.parameters()).is_meta:
        _draw(network)
    return network


def _draw(network: nn.Module) -> None:
    """Draw the weights as He 2015 says; only training from scratch keeps them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


PLUGIN = classifier_kind(build)
