"""Whole matrices from ZeRO's partitions, which cut the concatenated weights at any position.

Rank r has the elements ``[r S, (r + 1) S)`` of the concatenation, S being the size of a partition.
A matrix that is cut belongs to several ranks. Each of them gets all of it, for which one all-to-all
exchanges only the pieces of cut matrices. So a rank needs memory for at most two whole matrices
beside its partition.
"""

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor


class MatrixPartition:
    """The matrices of one rank's partition.

    Args:
        sizes: number of elements of each matrix, in the order of the concatenation.
        part_size: number of elements of a partition, the same on all ranks. The last partitions may
            end with padding.
        rank: number of this rank, of ``num_ranks``.

    Attributes:
        indices: numbers of the matrices of which this rank has at least a piece.
        num_elements: elements of its partition that are not padding.
    """

    def __init__(self, sizes: list[int], part_size: int, rank: int, num_ranks: int):
        self._matrices = [range(*ends) for ends in pairwise(accumulate(sizes, initial=0))]
        self._parts = [range(r * part_size, (r + 1) * part_size) for r in range(num_ranks)]
        self._rank = rank
        held = [{i for i, matrix in enumerate(self._matrices) if _overlap(matrix, part)} for part in self._parts]
        self._is_any_cut = sum(map(len, held)) > len(sizes)  # the same on all ranks
        self._shared = [sorted(held[rank] & other) if r != rank else [] for r, other in enumerate(held)]
        self._cut = {i for shared in self._shared for i in shared}
        self.indices = sorted(held[rank])
        self.num_elements = sum(_length(self._within(i, rank)) for i in self.indices)

    def complete(self, part: Tensor) -> list[Tensor]:
        """Return the whole matrices of `indices`, flat. Every rank calls this method.

        Args:
            part: this rank's elements, ``(part_size,)``. Matrices that are not cut are views of it.
        """
        if not self._is_any_cut:
            return self.assemble(part, [])
        messages = self.messages(part)
        sizes = [sum(_length(self._within(i, r)) for i in shared) for r, shared in enumerate(self._shared)]
        received = part.new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(messages), sizes, [message.numel() for message in messages])
        return self.assemble(part, list(received.split(sizes)))

    def write_back(self, part: Tensor, wholes: list[Tensor]) -> None:
        """Copy this rank's pieces of the matrices in ``wholes``, those of `indices`, to ``part``.

        Matrices that are views of ``part`` are not copied.
        """
        for index, whole in zip(self.indices, wholes, strict=True):
            piece, source = self._piece(part, index), whole.view(-1)[self._within(index, self._rank)]
            if piece.data_ptr() != source.data_ptr():
                piece.copy_(source)

    def messages(self, part: Tensor) -> list[Tensor]:
        """Return what this rank sends to each rank: its pieces of the matrices that they share."""
        return [torch.cat([part[:0], *(self._piece(part, i) for i in shared)]) for shared in self._shared]

    def assemble(self, part: Tensor, received: list[Tensor]) -> list[Tensor]:
        """Return the whole matrices of `indices` from ``part`` and the messages of all ranks."""
        wholes = {i: self._piece(part, i) for i in self.indices}
        for index in self._cut:
            whole = part.new_empty(len(self._matrices[index]))
            whole[self._within(index, self._rank)] = wholes[index]
            wholes[index] = whole
        for source, message in enumerate(received):
            shared = self._shared[source]
            pieces = message.split([_length(self._within(i, source)) for i in shared])
            for index, piece in zip(shared, pieces, strict=True):
                wholes[index][self._within(index, source)] = piece
        return [wholes[index] for index in self.indices]

    def _piece(self, part: Tensor, index: int) -> Tensor:
        """Return a view of a matrix's elements in this rank's partition."""
        piece = self._within(index, self._rank)
        offset = self._matrices[index].start - self._parts[self._rank].start
        return part[piece.start + offset : piece.stop + offset]

    def _within(self, index: int, rank: int) -> slice:
        """Return which of a matrix's elements a rank has. It has some."""
        common, start = _overlap(self._matrices[index], self._parts[rank]), self._matrices[index].start
        return slice(common.start - start, common.stop - start)


def _overlap(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _length(piece: slice) -> int:
    return piece.stop - piece.start
