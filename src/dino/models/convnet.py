"""Convnets, and any network of timm, behind the interface of `Backbone`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone, Features, no_attention

RESNETS = {"resnet10t": 512, "resnet18": 512, "resnet50": 2048}
"""The feature's length of each."""

CONVNEXTS: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)},
    "convnext_small": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)},
    "convnext_base": {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
    "convnext_large": {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)},
}
"""arXiv 2201.03545, section 3; the ones that DINOv3 was distilled into."""


class ResNet(Backbone):
    """A ResNet of torchvision or timm; the feature is the pooled vector (paper section 3.1).

    Args:
        name: of `RESNETS`.
        image_size: pixels a side of the images of its default transform.
        channels: C.
        preprocessing: the transform of the weights; by default the paper's for `image_size`.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int = 224,
        channels: int = 3,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        from torchvision import models

        self.name, self.embed_dim = name, RESNETS[name]
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.channels = channels
        self.first_layer = "network.conv1.weight"
        if name == "resnet10t":
            self.network: Any = resnet10t(channels)
            self.first_layer = "network.conv1.0.weight"
        else:
            self.network = getattr(models, name)()
        self.network.fc = nn.Identity()
        if channels != 3 and name != "resnet10t":
            self.network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.network.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        drop_path_scale: Tensor | None = None,
    ) -> Float[Tensor, "B D"]:
        """The pooled feature; see `Backbone.forward`."""
        self.check_images(images)
        return self.network(laid_out(images))

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """The pooled feature and the last stage's map; see `Backbone.features`."""
        _refuse(self.name, last, attention)
        self.check_images(images)
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(laid_out(images)))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return Features(x.mean(dim=(2, 3))[None], x[None])

    def timm_arguments(self, size: int) -> tuple[str, dict[str, Any]]:
        """See `Backbone.timm_arguments`."""
        return self.name, {"in_chans": self.channels}


class ConvNeXt(Backbone):
    """A ConvNeXt of torchvision (arXiv 2201.03545); the feature is the pooled vector, normed.

    Patches are the last stage's places through the same norm, as in DINOv3.

    Args:
        depths: number of blocks of each of the four stages.
        dims: channels of each; the last is the feature's length.
        image_size: pixels a side of the images of its default transform.
        channels: C.
        preprocessing: the transform of the weights; by default the paper's for `image_size`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        image_size: int = 224,
        channels: int = 3,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        from torchvision.models.convnext import CNBlockConfig
        from torchvision.models.convnext import ConvNeXt as Network

        if not len(depths) == len(dims) == 4:
            raise UserError("a ConvNeXt has four stages: give four depths and four dims")
        self.depths, self.dims, self.embed_dim = tuple(depths), tuple(dims), dims[-1]
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.channels = channels
        self.first_layer = "network.features.0.0.weight"
        following = (*dims[1:], None)
        stages = [CNBlockConfig(*stage) for stage in zip(dims, following, depths, strict=True)]
        self.network: Any = Network(stages, num_classes=1)
        self.network.classifier = self.network.classifier[:2]  # the norm, and flattening
        if channels != 3:
            first = self.network.features[0]
            first[0] = nn.Conv2d(channels, dims[0], 4, stride=4)
            nn.init.trunc_normal_(first[0].weight, std=0.02)
            nn.init.zeros_(first[0].bias)

    def forward(
        self, images: Float[Tensor, "B C H W"], drop_path_scale: Tensor | None = None
    ) -> Float[Tensor, "B D"]:
        """The pooled feature after the norm; see `Backbone.forward`."""
        return self.network(self._checked(images))

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """The pooled feature and the last stage's map, normed; see `Backbone.features`."""
        _refuse(self.spec["arch"], last, attention)
        x = self.network.features(self._checked(images))
        pooled = self.network.classifier(self.network.avgpool(x))
        return Features(pooled[None], self.network.classifier[0](x)[None])

    def _checked(self, images: Tensor) -> Tensor:
        self.check_images(images)
        if min(images.shape[-2:]) < 32:
            height, width = images.shape[-2:]
            raise UserError(f"images of {height}x{width} px are smaller than ConvNeXt's 32 px")
        return laid_out(images)

    def describe(self) -> dict[str, str]:
        """See `Backbone.describe`."""
        blocks = ", ".join(str(depth) for depth in self.depths)
        return {**super().describe(), "blocks": f"{blocks} in four stages"}

    def timm_arguments(self, size: int) -> tuple[str, dict[str, Any]]:
        """See `Backbone.timm_arguments`."""
        sizes = {"depths": list(self.depths), "dims": list(self.dims)}
        return self.spec["arch"], {"in_chans": self.channels, **sizes}

    def transformers_config(self, size: int) -> dict[str, Any]:
        """See `Backbone.transformers_config`."""
        return {
            "architectures": ["DINOv3ConvNextModel"],
            "model_type": "dinov3_convnext",
            "hidden_sizes": list(self.dims),
            "depths": list(self.depths),
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "image_size": size,
            "num_channels": self.channels,
            "torch_dtype": "float32",
        }


class Timm(Backbone):
    """A network of timm by its name, `timm:NAME`, without its classifier.

    Most take images of any size; pixels that fill no patch are cropped, as `ViT` does. Some take
    one size only (`Backbone.check_size`).

    Args:
        name: of timm.
        image_size: pixels a side of the images that a ViT's position embedding is learned for.
        channels: C.
        preprocessing: the transform of the weights; by default the paper's for `image_size`.

    Raises:
        UserError: if timm is not installed, or has no such network.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int = 224,
        channels: int = 3,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        try:
            import timm
            from timm.layers.patch_embed import PatchEmbed
        except ImportError:
            raise UserError(f"timm:{name} needs timm: pip install dino-ssl[timm]") from None
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "none is similar"
            raise UserError(f"timm has no model {name!r}; near it: {near}")
        self.name, self.channels = name, channels
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
        self.sizes: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True}
        try:
            self.network: nn.Module = timm.create_model(name, **options, **self.sizes)
        except TypeError:  # only transformers know these arguments
            self.sizes = {}
            self.network = timm.create_model(name, **options)
        settings = cast(dict[str, Any], self.network.pretrained_cfg)
        self.first_layer = f"network.{settings['first_conv']}.weight"
        embed = getattr(self.network, "patch_embed", None)
        self.patch = embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)
        try:
            self.embed_dim = self.feature_of_zeros(image_size).shape[1]
        except (AssertionError, RuntimeError):  # made for one other size
            self.embed_dim = self.feature_of_zeros(settings["input_size"][-1]).shape[1]

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        drop_path_scale: Tensor | None = None,
    ) -> Float[Tensor, "B D"]:
        """The pooled feature of timm, before any classifier; see `Backbone.forward`."""
        return self.network(self._crop(images))

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """The pooled feature and the last map or patch tokens; see `Backbone.features`."""
        _refuse(f"timm:{self.name}", last, attention)
        images = self._crop(images)
        x: Tensor = self.network.forward_features(images)  # type: ignore[operator]
        pooled: Tensor = self.network.forward_head(x)  # type: ignore[operator]
        return Features(pooled[None], self._map(x, images)[None])

    def timm_arguments(self, size: int) -> tuple[str, dict[str, Any]]:
        """See `Backbone.timm_arguments`."""
        return self.name, {"in_chans": self.channels, **self.sizes}

    def _crop(self, images: Tensor) -> Tensor:
        self.check_images(images)
        height, width = images.shape[-2:]
        rows, columns = self.patch
        return laid_out(images[..., : height - height % rows, : width - width % columns])

    def _map(self, x: Tensor, images: Tensor) -> Float[Tensor, "B D h w"]:
        if not isinstance(x, Tensor):
            raise UserError(f"timm:{self.name} has no map of patches: use its pooled feature")
        if x.ndim == 4:
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            return x.permute(0, 3, 1, 2) if channels_last else x
        prefix = cast(int, getattr(self.network, "num_prefix_tokens", 1))
        height, width = images.shape[-2:]
        count = x.shape[1] - prefix
        columns = round((count * width / height) ** 0.5)
        return x[:, prefix:].transpose(1, 2).unflatten(2, (count // columns, columns))


def resnet10t(channels: int) -> nn.Module:
    """One basic block a stage, and the changes of ResNet-D (arXiv 1812.01187, section 4).

    Three 3x3 convolutions take the place of the 7x7 one, shortcuts are pooled rather than
    subsampled, and blocks begin as the identity. On small images its untrained features are better
    than ResNet-18's, and so are trained ones (docs/results.md). timm's network of this name has the
    same keys and outputs.
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    network = ResNet(BasicBlock, [1, 1, 1, 1], zero_init_residual=True)
    sizes = [(channels, 24, 2), (24, 32, 1), (32, 64, 1)]
    stem: list[nn.Module] = []
    for inputs, outputs, stride in sizes:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        stem += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    network.conv1 = nn.Sequential(*stem[:-2])
    for stage in (network.layer2, network.layer3, network.layer4):
        conv, norm = stage[0].downsample
        conv.stride = (1, 1)
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        stage[0].downsample = nn.Sequential(pool, conv, norm)
    return network


def laid_out(images: Tensor) -> Tensor:
    """Channels last under autocast: the kernels of bf16 are made for it (1.09 times as fast)."""
    if images.is_meta or not torch.is_autocast_enabled(images.device.type):
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _refuse(name: str, last: int, attention: bool | int) -> None:
    if attention is not False:
        raise no_attention(name)
    if last != 1:
        raise UserError(f"{name} offers the features of its last block only, not of {last}")
