"""The principal components of patch features as colours, in a basis that can be saved and reused.

Shapes: D embed_dim, h w patches, n patches of all images, K parts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8
from safetensors.numpy import save_file
from torch import Tensor

from dino.data.images.map_overlay import Color
from dino.files import UserError, replacing
from dino.models.backbone import Backbone
from dino.weights.files import read_safetensors
from dino.weights.load import fingerprint

COMPONENTS = 3
"""How many are shown."""
Mapping = Literal["opponent", "rgb"]
"""How components become colours, see `mapped`."""
ENDS = ("low", "high", "variance")
"""Of a basis, what has one number a component."""
METADATA = "dino-basis"
"""Entry of a file of ours that says which network its basis belongs to."""


def components(
    patches: Sequence[Float[Tensor, "D _ _"]],
    spread: float = 0.98,
    mapping: Mapping = "opponent",
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """The first three principal components of patch tokens as colours.

    One basis for all images, so that a colour means the same in each; see `Basis`.

    Args:
        patches: tokens of one or several images on their grids.
        spread: share of the values that are not clipped, in (0, 1].
        mapping: of components to colours.

    Returns:
        One array an image; a component that does not exist (constant tokens) is in the middle.
    """
    basis = Basis.fit(patches, spread)
    return [basis.colors(tokens, mapping) for tokens in patches]


def mapped(
    shares: Float[np.ndarray, "*grid 3"], mapping: Mapping = "opponent"
) -> UInt8[np.ndarray, "*grid 3"]:
    """Colours of three numbers in [0, 1].

    "rgb" takes them as red, green and blue, as most publications do; readers who confuse red with
    green then cannot tell the first component from the second. With "opponent" the first goes from
    dark to light, the second from blue to yellow, the third from green to red, so that such readers
    miss the third alone, which explains least. Different numbers have different colours in both.
    """
    rgb = shares
    if mapping == "opponent":
        light = 0.2 + 0.6 * shares[..., :1]
        yellow, red = 2 * shares[..., 1] - 1, 2 * shares[..., 2] - 1
        hue = np.stack([(yellow + red) / 2, (yellow - red) / 2, -yellow], axis=-1)
        rgb = light + np.minimum(light, 1 - light) * hue
    return (255 * rgb).round().astype(np.uint8)


def color_ends(mapping: Mapping = "opponent") -> list[tuple[Color, Color]]:
    """The colours of each component's ends while the others are in the middle, for legends.

    Of "rgb" the others are dark, so that the end is the colour that gives the component its name.
    """
    rest = 0.5 if mapping == "opponent" else 0.0
    ends = np.full((COMPONENTS, 2, COMPONENTS), rest)
    for number in range(COMPONENTS):
        ends[number, :, number] = 0, 1
    return [((*low,), (*high,)) for low, high in mapped(ends, mapping).tolist()]


@dataclass(frozen=True)
class Foreground:
    """Which patches belong to objects, by the first principal component of all patches.

    Attributes:
        mean: of all patch tokens.
        direction: of the first component, which points to the foreground.
        threshold: of the component.
    """

    mean: Float[np.ndarray, " D"]
    direction: Float[np.ndarray, " D"]
    threshold: float

    @classmethod
    def fit(cls, patches: Sequence[Float[Tensor, "D _ _"]]) -> Foreground:
        """Divide patches in two by Otsu's threshold of the first component.

        The foreground is the side of which fewer patches, as a share, lie at the border of an image
        (where both are equal, the upper one), since pictures are taken of what is within them.

        Raises:
            UserError: if all patches are alike.
        """
        rows = [_rows(tokens) for tokens in patches]
        mean, directions, _ = _principal(np.concatenate(rows))
        values = [(image - mean) @ directions[0] for image in rows]
        if not directions[0].any() or np.ptp(joined := np.concatenate(values)) == 0:
            raise UserError("all patches are alike and show no foreground: leave out --foreground")
        threshold = _otsu(joined)
        above = joined > threshold
        border = np.concatenate([_border(*tokens.shape[1:]) for tokens in patches])
        sign = 1 if border[above].mean() <= border[~above].mean() else -1
        return cls(mean, sign * directions[0], sign * threshold)

    def __call__(self, tokens: Float[Tensor, "D h w"]) -> Bool[np.ndarray, "h w"]:
        """The patches of the foreground."""
        values = (_rows(tokens) - self.mean) @ self.direction
        return (values > self.threshold).reshape(tokens.shape[1:])


@dataclass(frozen=True)
class Basis:
    """Three principal components of patch tokens, and how their values become colours.

    Neither the order of the images nor the scale or offset of the tokens changes the colours: a
    component's largest loading is positive, and the middle of its values fills the range. What a
    basis does with the tokens of an image depends on this image only, so that the same basis and
    image give the same picture, bit for bit.

    Attributes:
        mean: of the patch tokens.
        directions: of the components, of length 1; zero for one that does not exist.
        low: value of each component that is dark, and of all below.
        high: value of each component that is bright, and of all above.
        variance: share of the variance of each component, in [0, 1].
        foreground: where the components are of the foreground only.
        centers: of the parts, which are clusters of tokens of length 1, the largest first; None for
            no parts.
    """

    mean: Float[np.ndarray, " D"]
    directions: Float[np.ndarray, "3 D"]
    low: Float[np.ndarray, " 3"]
    high: Float[np.ndarray, " 3"]
    variance: Float[np.ndarray, " 3"]
    foreground: Foreground | None = None
    centers: Float[np.ndarray, "K D"] | None = None

    @classmethod
    def fit(
        cls,
        patches: Sequence[Float[Tensor, "D _ _"]],
        spread: float = 0.98,
        *,
        foreground: bool = False,
        parts: int = 0,
    ) -> Basis:
        """The basis of some images, in float64.

        Args:
            patches: tokens of one or several images on their grids.
            spread: share of each component's values between `low` and `high`, in (0, 1].
            foreground: take components and parts of the foreground only, see `Foreground`.
            parts: K, by k-means with a fixed seed; 0 for none.

        Raises:
            UserError: if there is no foreground, or it has fewer than K patches.
        """
        divide = Foreground.fit(patches) if foreground else None
        images = [_rows(tokens) for tokens in patches]
        if divide is not None:
            masks = [divide(tokens).ravel() for tokens in patches]
            images = [image[mask] for image, mask in zip(images, masks, strict=True)]
        rows = np.concatenate(images)
        mean, directions, variance = _principal(rows)
        scores = (rows - mean) @ directions.T
        low, high = np.quantile(scores, [(1 - spread) / 2, (1 + spread) / 2], axis=0)
        centers = _centers(_unit(rows), parts) if parts else None
        return cls(mean, directions, low, high, variance, divide, centers)

    def project(self, tokens: Float[Tensor, "D h w"]) -> Float[np.ndarray, "h w 3"]:
        """The values of the components."""
        scores: Float[np.ndarray, "n 3"] = (_rows(tokens) - self.mean) @ self.directions.T
        return scores.reshape(*tokens.shape[1:], COMPONENTS)

    def colors(
        self, tokens: Float[Tensor, "D h w"], mapping: Mapping = "opponent"
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The components as colours, see `mapped`."""
        return mapped(self.shares(tokens), mapping)

    def shares(self, tokens: Float[Tensor, "D h w"]) -> Float[np.ndarray, "h w 3"]:
        """The components as shares of their range; 1/2 for one that does not exist."""
        usable = self.high > self.low
        width = np.where(usable, self.high - self.low, 1)
        shares = np.where(usable, (self.project(tokens) - self.low) / width, 0.5)
        return shares.clip(0, 1)

    def parts(self, tokens: Float[Tensor, "D h w"]) -> UInt8[np.ndarray, "h w"]:
        """The number of each patch's part, from 0; only for a basis with parts."""
        assert self.centers is not None
        return _nearest(_unit(_rows(tokens)), self.centers).reshape(tokens.shape[1:])


def _rows(tokens: Float[Tensor, "D h w"]) -> Float[np.ndarray, "n D"]:
    return tokens.flatten(1).T.double().cpu().numpy()


def _principal(
    rows: Float[np.ndarray, "n D"],
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "3 D"], Float[np.ndarray, " 3"]]:
    """Mean, directions and shares of the variance; zero for components that do not exist."""
    from sklearn.decomposition import PCA

    count = min(COMPONENTS, *rows.shape)
    solver = "covariance_eigh" if len(rows) >= rows.shape[1] else "full"
    with np.errstate(invalid="ignore"):  # shares of variance of constant tokens are 0 / 0
        pca = PCA(count, svd_solver=solver).fit(rows)
    # Tokens are single precision: variation below a millionth of their length is rounding.
    found = pca.singular_values_ > 1e-6 * np.linalg.norm(rows)
    directions, variance = np.zeros((COMPONENTS, rows.shape[1])), np.zeros(COMPONENTS)
    directions[:count][found] = pca.components_[found]
    variance[:count][found] = pca.explained_variance_ratio_[found]
    return pca.mean_, directions, variance


# -------------------------------------------------------------------------- foreground and parts
def _otsu(values: Float[np.ndarray, " n"]) -> float:
    """Otsu's threshold (1979): the two sides differ most, as squares of n_0 n_1 (m_0 - m_1)^2."""
    values = np.sort(values)
    below = np.arange(1, len(values))
    sums = values.cumsum()
    between = (len(values) * sums[:-1] - below * sums[-1]) ** 2 / (below * below[::-1])
    best = int(between.argmax())
    return float(values[best : best + 2].mean())


def _border(height: int, width: int) -> Bool[np.ndarray, " n"]:
    """Whether each patch of a grid lies at its border."""
    border = np.ones((height, width), dtype=bool)
    border[1:-1, 1:-1] = False
    return border.ravel()


def _unit(rows: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def _centers(rows: Float[np.ndarray, "n D"], count: int) -> Float[np.ndarray, "K D"]:
    """The centres of k-means, those of the largest clusters first."""
    from sklearn.cluster import KMeans

    if len(rows) < count:
        raise UserError(f"{len(rows)} patches cannot be divided into {count} parts: add images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer different patches than parts: the others are empty
        found = KMeans(count, n_init=4, random_state=0).fit(rows)
    sizes = np.bincount(found.labels_, minlength=count)
    return found.cluster_centers_[np.argsort(-sizes, kind="stable")]


def _nearest(
    rows: Float[np.ndarray, "n D"], centers: Float[np.ndarray, "K D"]
) -> UInt8[np.ndarray, " n"]:
    nearness = rows @ centers.T - (centers**2).sum(axis=1) / 2
    return nearness.argmax(axis=1).astype(np.uint8)


# ------------------------------------------------------------------------------------------ files
def save(basis: Basis, path: str | Path, backbone: Backbone, about: dict[str, Any]) -> None:
    """Write a basis (safetensors), atomically.

    Args:
        basis: the basis.
        path: of the file.
        backbone: whose features it is of.
        about: how the features were made, in JSON values: at least "size" and "block".
    """
    tensors = {name: getattr(basis, name) for name in ("mean", "directions", *ENDS)}
    if (divide := basis.foreground) is not None:
        tensors["foreground.mean"], tensors["foreground.direction"] = divide.mean, divide.direction
        tensors["foreground.threshold"] = np.array([divide.threshold])
    if basis.centers is not None:
        tensors["centers"] = basis.centers
    content = {"weights": fingerprint(backbone), "loaded": backbone.loaded, **about}
    with replacing(path) as temporary:
        save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
            temporary,
            metadata={METADATA: json.dumps(content)},
        )


def load(path: str | Path, backbone: Backbone) -> tuple[Basis, dict[str, Any]]:
    """A basis that `save` wrote, and what it says about itself.

    Raises:
        UserError: if there is none, it is damaged, or of another network.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no basis {path}: write one with --save-basis {path}")
    tensors, metadata = read_safetensors(path)
    if METADATA not in metadata:
        raise UserError(f"{path} is no basis of components: write one with --save-basis")
    try:
        about = dict(json.loads(metadata[METADATA]))
        about |= {name: int(about[name]) for name in ("size", "block")}
        same = about["weights"] == fingerprint(backbone)
        basis = _basis({name: tensor.numpy() for name, tensor in tensors.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the basis {path} is damaged ({error}): write it again") from None
    if not same:
        raise UserError(
            f"the basis {path} is of other weights ({about.get('loaded')}), in whose colours these "
            "features mean nothing: write another with --save-basis"
        )
    return basis, about


def _basis(values: dict[str, np.ndarray]) -> Basis:
    """A basis from its tensors; raises KeyError, TypeError or ValueError if they are damaged."""
    width = len(values["mean"])
    shapes = {
        "mean": (width,),
        "directions": (COMPONENTS, width),
        **dict.fromkeys(ENDS, (COMPONENTS,)),
    }
    shapes |= {"foreground.mean": (width,), "foreground.direction": (width,)}
    shapes |= {"foreground.threshold": (1,), "centers": (len(values.get("centers", ())), width)}
    for name, tensor in values.items():
        if tensor.shape != shapes[name] or not np.isfinite(tensor).all():
            raise ValueError(f"{name} of shape {tensor.shape}")
    foreground = None
    if "foreground.mean" in values:
        mean, direction, (threshold,) = (
            values.pop(f"foreground.{name}") for name in ("mean", "direction", "threshold")
        )
        foreground = Foreground(mean, direction, float(threshold))
    return Basis(**values, foreground=foreground)
