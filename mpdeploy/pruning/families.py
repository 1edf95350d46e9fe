"""Channels that must move together: families of coupled channels, refined and merged as operations are met.

Every place where a channel is stored (row 5 of one weight, column 5 of another) is an element. A family is a table of
elements [places, channels]: permuting its columns moves each channel at all places at once, and that is the only thing
that a family may do. A new weight axis is a family of one place. An operation that adds two tensors merges two families
(places are stacked); one that sees only some of the channels splits a family; one that is not known to treat channels
alike freezes it. Families only ever get smaller groups of permutations, so what was shown for an operation before
remains true.

A track says how the entries of one tensor follow the elements: entry p holds element[p], and permuting channels moves p
to the entry that holds the new element at the same spot. Spots tell apart entries with the same element, such as the
pixels of a channel after flattening. Axes along which nothing moves have size 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FROZEN = 0  # the family, and the element, of what never moves


@dataclass(frozen=True)
class Track:
    """How a tensor's entries follow elements.

    Args:
        element: element of each entry, one axis per axis of the tensor; of size 1 where nothing moves.
        spot: of the same shape; element and spot together are different at any two entries.
    """

    element: Ints
    spot: Ints

    @classmethod
    def of(cls, element: Ints) -> "Track":
        """A track in which every element appears once."""
        return cls(element, np.zeros_like(element))

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which channels move."""
        return tuple(axis for axis, size in enumerate(self.element.shape) if size > 1)

    def padded(self, ndim: int) -> "Track":
        """The same with leading axes of size 1, as broadcasting adds them."""
        shape = (1,) * (ndim - self.element.ndim) + self.element.shape
        return Track(self.element.reshape(shape), self.spot.reshape(shape))

    def coordinates(self, axes: Iterable[int]) -> Ints:
        """A number per entry that differs wherever the index along one of `axes` does."""
        label = np.zeros(self.element.shape, dtype=np.int64)
        for axis in axes:
            size = self.element.shape[axis]
            along = np.arange(size).reshape([size if a == axis else 1 for a in range(label.ndim)])
            label = label * size + along
        return label


class Families:
    """All elements and the families they belong to."""

    def __init__(self) -> None:
        self.tables: dict[int, Ints] = {}
        self.reasons: list[str] = [""]
        self.count = 1
        # Of each element: its family, its place and channel in the family's table, and why it is frozen. The arrays
        # are longer than `count`, so that elements can be added.
        self.family, self.place, self.channel, self.reason = (np.zeros(1 << 12, dtype=np.int64) for _ in range(4))
        self._next = 1

    def new(self, size: int) -> Ints:
        """Make `size` elements that form a family of one place."""
        elements = np.arange(self.count, self.count + size)
        self.count += size
        if self.count > len(self.family):
            self.family, self.place, self.channel, self.reason = (
                np.concatenate([array, np.zeros(self.count, dtype=np.int64)])
                for array in (self.family, self.place, self.channel, self.reason)
            )
        self._store(elements[None])
        return elements

    def _store(self, table: Ints) -> None:
        self.tables[self._next] = table
        self.family[table] = self._next
        self.place[table] = np.arange(len(table))[:, None]
        self.channel[table] = np.arange(table.shape[1])
        self._next += 1

    def freeze(self, elements: Ints, reason: str) -> None:
        """Fix the order of every family that one of the elements belongs to."""
        for family in np.unique(self.family[elements]):
            if family != FROZEN:
                self._freeze_table(self.tables.pop(int(family)), reason)

    def _freeze_table(self, table: Ints, reason: str) -> None:
        self.family[table] = FROZEN
        self.reason[table] = len(self.reasons)
        self.reasons.append(reason)

    def why(self, element: int) -> str:
        """Why the element is frozen, "" if it is not."""
        return self.reasons[int(self.reason[element])]

    def refine(self, track: Track, label: Ints, reason: str) -> None:
        """Let channels move only among entries of one label; what is left alone is frozen for `reason`.

        Args:
            track: the entries.
            label: an integer per entry, broadcast to the track's shape.
            reason: why a channel that can no longer move is frozen.
        """
        element = track.element.ravel()
        labels = np.broadcast_to(label, track.element.shape).ravel()
        spots = np.unique(track.spot.ravel(), return_inverse=True)[1]
        families = self.family[element]
        for family in np.unique(families):
            if family == FROZEN:
                continue
            table = self.tables[int(family)]
            here = np.flatnonzero(families == family)
            orbits = np.unique(self.place[element[here]] * (spots.max() + 1) + spots[here], return_inverse=True)[1]
            # One row per orbit, one column per channel: a channel that an orbit lacks differs from those it has.
            signature = np.full((orbits.max() + 1, table.shape[1]), -1, dtype=np.int64)
            signature[orbits, self.channel[element[here]]] = labels[here]
            if bool((signature == signature[:, :1]).all()):
                continue
            part_of = np.unique(signature, axis=1, return_inverse=True)[1].ravel()
            del self.tables[int(family)]
            counts = np.bincount(part_of)
            alone = counts[part_of] == 1
            if alone.any():
                self._freeze_table(table[:, alone], reason)
            for part in np.flatnonzero(counts > 1):
                self._store(table[:, part_of == part])

    def close(self, track: Track, reason: str) -> None:
        """After entries were cut away: channels that remain no longer mix with those that went."""
        self.refine(track, np.zeros((), dtype=np.int64), reason)

    def _orbits(self, element: Ints, spot: Ints) -> Ints:
        """A number per entry, equal where a permutation may bring one to the other; frozen entries stand alone."""
        family, place = self.family[element], self.place[element]
        key = (family * (place.max() + 1) + place) * (spot.max() + 1) + spot
        key = np.where(family == FROZEN, -1 - np.arange(len(element)), key)
        return np.unique(key, return_inverse=True)[1]

    def align(self, one: Track, other: Track, reason: str) -> None:
        """Make two tracks of the same tensor move alike, merging the families that meet.

        Args:
            one: a track.
            other: a track with as many axes, of the same sizes or 1.
            reason: why channels are frozen that can't be made to move alike.
        """
        for track, against in ((one, other), (other, one)):
            alone = set(track.axes) - set(against.axes)
            if alone:
                # Along these axes the other tensor stands still.
                self.refine(track, track.coordinates(sorted(alone)), reason)
        shape = np.broadcast_shapes(one.element.shape, other.element.shape)
        flat = [
            Track(np.broadcast_to(t.element, shape).ravel(), np.broadcast_to(t.spot, shape).ravel())
            for t in (one, other)
        ]
        # A track that stands still along an axis does so for every index there: each is an orbit of its own.
        still = [
            sum((np.indices(shape)[a] * int(np.prod(shape[:a])) for a in set(range(len(shape))) - set(t.axes)), 0)
            for t in (one, other)
        ]
        spots = [flat[i].spot * (int(np.prod(shape)) + 1) + np.broadcast_to(still[i], shape).ravel() for i in (0, 1)]
        spots = [np.unique(spot, return_inverse=True)[1] for spot in spots]
        self._refine_each_other(flat, spots, reason)
        orbits = self._orbits(flat[0].element, spots[0])
        order = np.argsort(orbits, kind="stable")
        for entries in np.split(order, np.flatnonzero(np.diff(orbits[order])) + 1):
            self._merge(flat[0].element[entries], flat[1].element[entries], reason)

    def _refine_each_other(self, flat: list[Track], spots: list[Ints], reason: str) -> None:
        while True:
            before = self._next
            orbits = [self._orbits(track.element, spot) for track, spot in zip(flat, spots, strict=True)]
            for i in (0, 1):
                self.refine(Track(flat[i].element, spots[i]), orbits[1 - i], self._inherited(flat[1 - i], reason))
            frozen = [self.family[track.element] == FROZEN for track in flat]
            if self._next == before and bool((frozen[0] == frozen[1]).all()):
                return
            for i in (0, 1):
                self.freeze(flat[i].element[frozen[1 - i]], self._inherited(flat[1 - i], reason))

    def _inherited(self, track: Track, reason: str) -> str:
        """The reason for which the track's first frozen element can't move, or the given one."""
        frozen = track.element[self.family[track.element] == FROZEN]
        return next((why for why in map(self.why, frozen[:1].tolist()) if why), reason)

    def _merge(self, left: Ints, right: Ints, reason: str) -> None:
        """Identify channels that meet entry by entry; the entries are one orbit on both sides."""
        family, other = int(self.family[left[0]]), int(self.family[right[0]])
        same = family == other
        if same and bool((self.channel[left] == self.channel[right]).all()):
            return
        if same or FROZEN in (family, other) or {self.tables[f].shape[1] for f in (family, other)} != {len(left)}:
            self.freeze(left, reason)
            self.freeze(right, reason)
            return
        if len(self.tables[family]) < len(self.tables[other]):
            family, other, left, right = other, family, right, left
        table, added = self.tables[family], self.tables.pop(other)
        partner = np.empty(table.shape[1], dtype=np.int64)
        partner[self.channel[left]] = self.channel[right]
        added = added[:, partner]
        self.tables[family] = np.concatenate([table, added])
        self.family[added] = family
        self.place[added] = len(table) + np.arange(len(added))[:, None]
        self.channel[added] = np.arange(table.shape[1])
