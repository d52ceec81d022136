"""Which crops of an image pretokenisation stores."""

from dataclasses import dataclass
from typing import Self

from tessera.errors import ConfigError

# number of views, where it isn't chosen
COUNTS = {"none": 1, "flip": 2, "ten_crop": 10, "random": None}


@dataclass(frozen=True)
class Views:
    """A set of crops of each image.

    Attributes:
        kind: none (the fixed crop), flip (and its mirror image), ten_crop (RAR's ten), or random (seeded crops and
            flips, drawn as in training).
        count: V.
        seed: of the random ones; view v of image i is a function of (seed, i, v).
    """

    kind: str = "none"
    count: int = 1
    seed: int = 0

    @classmethod
    def of(cls, views: Self | str, num_views: int | None = None, seed: int = 0, key: str = "tokens") -> Self:
        """The set of that kind.

        Args:
            views: a set as it is, or a kind.
            num_views: V, of random views only.
            seed: of random views; others have none.
            key: config node that chose them, for messages.

        Raises:
            ConfigError: an unknown kind; random views without a number, or the others with another than theirs.
        """
        if isinstance(views, cls):
            return views
        if views not in COUNTS:
            raise ConfigError(f"{key}.views={views!r} is unknown; choose one of {', '.join(COUNTS)}")
        if views == "random":
            if num_views is None or num_views < 1:
                raise ConfigError(
                    f"{key}.num_views={num_views} must be at least 1 with {key}.views=random; set it to the number of "
                    "crops per image"
                )
            return cls(views, num_views, seed)
        if num_views not in (None, COUNTS[views]):
            raise ConfigError(
                f"{key}.views={views} has {COUNTS[views]} views per image, not {key}.num_views={num_views}; leave "
                "num_views out, or choose views=random"
            )
        return cls(views, COUNTS[views])
