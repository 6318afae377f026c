"""Animations that show how images emerge from noise."""

from collections.abc import Sequence
from pathlib import Path

from sampling.outputs import Place
from torch_utils.pictures import save_animation
from training.family import Generator, Requests

MAX_FRAMES = 60
_MAX_SHOWN = 16
_MIN_FRAME_MS, _TOTAL_MS, _END_MS = 40, 4000, 2000


def animate(generator: Generator, requests: Requests, wanted: Sequence[Place], path: Path) -> None:
    """Write an animated GIF of how up to 16 images of ``wanted`` emerge from noise.

    They are spread evenly over the parts (supports or prompts) of the request, of which up to 16
    are shown, and are generated again. A frame shows the sampler's state before a step, the last
    one the finished images.
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
