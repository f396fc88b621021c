"""Where the names in a plot go: greedily, beside their dots, never over a dot, another name or the plot's edge."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

CHARACTER = 6.7
LINE = 15.0
NEAR, FAR = (10.0, 16.0, 24.0), (10.0, 16.0, 24.0, 36.0, 50.0, 70.0, 95.0)
ANGLES = (0, 180, 330, 30, 210, 150, 270, 90, 300, 60, 240, 120)


@dataclass(frozen=True, slots=True)
class Box:
    """Pixels from the left and from the top."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def distance(self, x: float, y: float) -> float:
        return math.dist(self.nearest(x, y), (x, y))


@dataclass
class Canvas:
    """What is taken within `bounds`."""

    bounds: Box
    taken: list[Box] = field(default_factory=list)

    def block(self, box: Box) -> None:
        self.taken.append(box)

    def place(self, x: float, y: float, text: str, far: bool = False) -> Box | None:
        """The box for `text` beside a dot at (x, y), now taken; None if there is no room. `far` looks further away."""
        width = CHARACTER * len(text)
        for distance in FAR if far else NEAR:
            for angle in ANGLES:
                box = _beside(x, y, width, distance, math.radians(angle))
                if box.inside(self.bounds) and not any(box.overlaps(other) for other in self.taken):
                    self.taken.append(box)
                    return box
        return None


def _beside(x: float, y: float, width: float, distance: float, angle: float) -> Box:
    """A box whose side, or corner, that faces the dot is `distance` away from it."""
    across, down = math.cos(angle), math.sin(angle)
    middle_x = x + across * distance + width / 2 * (0 if abs(across) < 0.1 else math.copysign(1, across))
    middle_y = y + down * distance + LINE / 2 * (0 if abs(down) < 0.1 else math.copysign(1, down))
    return Box(middle_x - width / 2, middle_y - LINE / 2, middle_x + width / 2, middle_y + LINE / 2)
