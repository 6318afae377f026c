"""Animations of the way from noise to images."""

from collections.abc import Sequence
from pathlib import Path

from sampling.outputs import Place
from torch_utils.pictures import save_animation
from training.family import Generator, Requests

MAX_FRAMES = 60
_MAX_SHOWN = 16
_MIN_FRAME_MS, _TOTAL_MS, _END_MS = 40, 4000, 2000


def animate(generator: Generator, requests: Requests, wanted: Sequence[Place], path: Path) -> None:
    """Write how up to 16 images of ``wanted`` come about, as an animated GIF.

    The images are of all parts of the request, as far as there are so many, and are made again: a
    frame shows them as they are before a step of the sampler, the last one as they become.
    """
    parts = dict.fromkeys(place.label for place in wanted) if requests.num_parts > 1 else (None,)
    parts, shown = list(parts)[:_MAX_SHOWN], []
    for part in parts:
        own = [place for place in wanted if len(parts) == 1 or place.label == part]
        shown += own[: _MAX_SHOWN // len(parts)]
    labels = [place.label for place in shown]
    known = None if None in labels else labels
    pictures, columns = [], 5 if requests.num_parts > 1 else 4
    for frame in generator.path([place.seed for place in shown], known, MAX_FRAMES):
        heading = f"noise level {frame.level:.3g}"
        pictures.append(requests.picture(frame.images, labels, columns, heading))
    frame_ms = max(_TOTAL_MS // len(pictures), _MIN_FRAME_MS)
    save_animation(pictures, path, [frame_ms] * (len(pictures) - 1) + [_END_MS])
