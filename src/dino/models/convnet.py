"""Convnets, and any network of timm, behind the interface of `Backbone`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone, Features


class ResNet50(Backbone):
    """torchvision's ResNet-50; the feature is the pooled 2048-vector (paper section 3.1)."""

    width = 2048

    def __init__(
        self,
        *,
        image_size: int = 224,
        channels: int = 3,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        from torchvision.models import resnet50

        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.network = resnet50()
        self.network.fc = nn.Identity()
        if channels != 3:
            self.network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.network.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, images: Float[Tensor, "B C H W"], keep: Tensor | None = None
    ) -> Float[Tensor, "B D"]:
        """The pooled feature; see `Backbone.forward`."""
        pooled: Tensor = self.network(images)
        return pooled

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """The pooled feature and the last stage's map; see `Backbone.features`."""
        _refuse("resnet50", last, attention)
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return Features(x.mean(dim=(2, 3))[None], x[None])


class Timm(Backbone):
    """A network of timm by its name, `timm:NAME`, without classifier and at any input size."""

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
        except ImportError:
            raise UserError(f"timm:{name} needs timm: pip install dino-ssl[timm]") from None
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "none is similar"
            raise UserError(f"timm has no model {name!r}; near it: {near}")
        self.name = name
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.network = _any_size(timm.create_model, name, image_size, channels)
        self.width = cast(int, self.network.num_features)

    def forward(
        self, images: Float[Tensor, "B C H W"], keep: Tensor | None = None
    ) -> Float[Tensor, "B D"]:
        """Timm's own pooled feature, before any classifier; see `Backbone.forward`."""
        pooled: Tensor = self.network(images)
        return pooled

    def features(
        self, images: Float[Tensor, "B C H W"], last: int = 1, attention: bool | int = False
    ) -> Features:
        """The pooled feature and the last map or patch tokens; see `Backbone.features`."""
        _refuse(f"timm:{self.name}", last, attention)
        x: Tensor = self.network.forward_features(images)  # type: ignore[operator]
        pooled: Tensor = self.network.forward_head(x, pre_logits=True)  # type: ignore[operator]
        return Features(pooled[None], self._map(x, images)[None])

    def _map(self, x: Tensor, images: Tensor) -> Float[Tensor, "B D h w"]:
        if x.ndim == 4:
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            return x.permute(0, 3, 1, 2) if channels_last else x
        prefix = cast(int, getattr(self.network, "num_prefix_tokens", 1))
        height, width = images.shape[-2:]
        count = x.shape[1] - prefix
        columns = round((count * width / height) ** 0.5)
        return x[:, prefix:].transpose(1, 2).unflatten(2, (count // columns, columns))


def _any_size(
    create: Callable[..., nn.Module], name: str, image_size: int, channels: int
) -> nn.Module:
    """Build a timm network that takes crops of any size; ViTs there must be told so."""
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    try:
        return create(name, **options, img_size=image_size, dynamic_img_size=True)
    except TypeError:  # only timm's ViTs know these arguments
        return create(name, **options)


def _refuse(name: str, last: int, attention: bool | int) -> None:
    if attention is not False:
        raise UserError(f"{name} has no CLS attention: use a vit_tiny, vit_small or vit_base")
    if last != 1:
        raise UserError(f"{name} offers the features of its last block only, not of {last}")
