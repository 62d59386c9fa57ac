"""Convnets, and any network of timm, behind the interface of `Backbone`."""

from __future__ import annotations

from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from dino.data.images.preprocessing import Preprocessing
from dino.files import UserError
from dino.models.backbone import Backbone, Features


class ResNet50(Backbone):
    """torchvision's ResNet-50; the feature is the pooled 2048-vector (paper section 3.1)."""

    embed_dim = 2048
    first_layer = "network.conv1.weight"

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
        self.channels = channels
        self.network = resnet50()
        self.network.fc = nn.Identity()
        if channels != 3:
            self.network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.network.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self, images: Float[Tensor, "B C H W"], drop_path_scale: Tensor | None = None
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

    def timm_arguments(self, size: int) -> tuple[str, dict[str, Any]]:
        """See `Backbone.timm_arguments`."""
        return "resnet50", {"in_chans": self.channels}


class Timm(Backbone):
    """A network of timm by its name, `timm:NAME`, without its classifier.

    Most take images of any size. The remainder of an image that fills no patch is cropped, as our
    ViT does. Some are made for one size only: they refuse others (`Backbone.check_size`).

    Args:
        name: timm's name.
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
        except ImportError:
            raise UserError(f"timm:{name} needs timm: pip install dino-ssl[timm]") from None
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "none is similar"
            raise UserError(f"timm has no model {name!r}; near it: {near}")
        self.name, self.channels = name, channels
        self.preprocessing = preprocessing or Preprocessing.for_size(image_size)
        self.network, self.sizes = _create(name, image_size, channels)
        settings = cast(dict[str, Any], self.network.pretrained_cfg)
        self.first_layer = f"network.{settings['first_conv']}.weight"
        self.patch = _patch_of(self.network)
        try:
            self.embed_dim = self.feature_of_zeros(image_size).shape[1]
        except (AssertionError, RuntimeError):  # made for one other size
            self.embed_dim = self.feature_of_zeros(settings["input_size"][-1]).shape[1]

    def forward(
        self, images: Float[Tensor, "B C H W"], drop_path_scale: Tensor | None = None
    ) -> Float[Tensor, "B D"]:
        """Timm's own pooled feature, before any classifier; see `Backbone.forward`."""
        pooled: Tensor = self.network(self._crop(images))
        return pooled

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
        height, width = images.shape[-2:]
        rows, columns = self.patch
        return images[..., : height - height % rows, : width - width % columns]

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


def _create(name: str, image_size: int, channels: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network of timm that takes images of any size if it can, and the arguments for that."""
    import timm

    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    sizes: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True}
    try:
        return timm.create_model(name, **options, **sizes), sizes
    except TypeError:  # only transformers know these arguments
        return timm.create_model(name, **options), {}


def _patch_of(network: nn.Module) -> tuple[int, int]:
    """Height and width of timm's patches, which must divide the image's; (1, 1) for others."""
    from timm.layers.patch_embed import PatchEmbed

    embed = getattr(network, "patch_embed", None)
    return embed.patch_size if isinstance(embed, PatchEmbed) else (1, 1)


def _refuse(name: str, last: int, attention: bool | int) -> None:
    if attention is not False:
        raise UserError(f"{name} has no CLS attention: use a vit_tiny, vit_small or vit_base")
    if last != 1:
        raise UserError(f"{name} offers the features of its last block only, not of {last}")
