"""Encode many conversations at once as ids and labels, with whole-array operations.

Conversations with one pattern of roles share one layout: constant ids around the known ids of contents. Most
records are assembled this way, with the same result as `ChatFormat.encode`, which encodes the others.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capas.chat.batch import Batch, Columns, Key
from capas.chat.format import ChatFormat
from capas.chat.labels import trained_messages
from capas.chat.layout import Constant, Layout, Slot, lay_out
from capas.chat.segments import Way
from capas.core.errors import CapasError
from capas.core.ragged import Array, Ragged, from_arrow, gather, offsets_of, ranges, to_arrow

# The whitespace of `str.strip`; Arrow's own set is a different one.
BLANKS = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
Ranges = tuple[Array, Array]  # per row: start in the pool, number of ids


class ColumnEncoder:
    """An encoder for the conversations whose scaffold depends on their pattern alone."""

    def __init__(self, chat: ChatFormat, train_on: str) -> None:
        self._chat, self._train_on = chat, train_on
        self._layouts: dict[Key, Layout | None] = {}
        self._forbidden = np.zeros(max([0, *chat.segments.forbidden_ids]) + 1, bool)
        self._forbidden[list(chat.segments.forbidden_ids)] = True

    def encode(self, batch: Batch) -> Columns:
        """Return the conversations that can be encoded as columns; the other rows must be encoded singly."""
        groups: dict[Key, list[int]] = {}
        for row in range(batch.num_rows):
            key = batch.key(row)
            if key is not None and self._layout(key, batch, row):
                groups.setdefault(key, []).append(row)
        pool = _Pool(batch.ids.values)
        parts = [
            _Group(self._chat, layout, batch, rows, pool).put_together(self._train_on)
            for key, rows in groups.items()
            if (layout := self._layouts[key])
        ]
        return self._gather([part for part in parts if len(part.rows)], pool)

    def _layout(self, key: Key, batch: Batch, row: int) -> Layout | None:
        """Return the layout of a pattern, or None if there is no usable one.

        There is none if the template refuses the pattern, or if the conversation does not begin with the
        prompt of each trained answer and of the last one.
        """
        if key not in self._layouts:
            messages = batch.messages(row)
            try:
                layout = lay_out(self._chat, messages)
                trained = trained_messages(messages, self._train_on)
            except CapasError:  # `ChatFormat.encode` raises it again for each record
                self._layouts[key] = None
            else:
                usable = layout.prompt and not trained & layout.plan.not_asked_for
                self._layouts[key] = layout if usable else None
        return self._layouts[key]

    def _gather(self, parts: list["_Part"], pool: "_Pool") -> Columns:
        if not parts:
            nothing = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64))
            none = np.zeros(0, np.int64)
            return Columns(none, nothing, nothing, nothing, none)
        ids, trained = pool.arrays()
        at = ranges(*(np.concatenate([part.ranges[i] for part in parts]) for i in (0, 1)))
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = offsets_of(lengths)
        found = Ragged(ids[at], offsets)
        prompts = gather(found.values, found.starts, np.concatenate([p.prompts for p in parts]))
        rows = np.concatenate([part.rows for part in parts])
        trimmed = np.concatenate([part.trimmed for part in parts])
        columns = Columns(rows, found, Ragged(trained[at], offsets), prompts, trimmed)
        return self._sure(columns, np.concatenate([part.num_controls for part in parts]))

    def _sure(self, columns: Columns, num_controls: Array) -> Columns:
        """Return the conversations in batch order, without those where a content became a control token."""
        known = columns.ids.values < len(self._forbidden)
        forbidden = np.zeros(len(columns.ids.values), np.int64)
        forbidden[known] = self._forbidden[columns.ids.values[known]]
        found = np.add.reduceat(forbidden, columns.ids.starts)
        order = np.argsort(columns.rows, kind="stable")
        return columns.take(order[(found <= num_controls)[order]])


class _Pool:
    """Token ids to gather from, with a trained flag each: the batch's known ids, then ids added later."""

    def __init__(self, ids: Array) -> None:
        self._ids, self._trained, self._size = [ids], [np.zeros(len(ids), bool)], len(ids)

    def add(self, ids: Array, trained: Array) -> int:
        """Add ids and return the position of the first."""
        start = self._size
        self._ids.append(ids)
        self._trained.append(trained)
        self._size += len(ids)
        return start

    def train(self, positions: Array) -> None:
        """Mark known ids of the batch as trained."""
        self._trained[0][positions] = True

    def arrays(self) -> Ranges:
        return np.concatenate(self._ids), np.concatenate(self._trained)


class _Part:
    """Conversations of one pattern as ranges of a pool, row by row."""

    def __init__(
        self,
        rows: Array,
        columns: list[Ranges],
        prompts: Array,
        trimmed: Array,
        controls: int,
    ) -> None:
        starts, lengths = (np.stack([column[i] for column in columns], axis=1) for i in (0, 1))
        self.rows, self.prompts, self.trimmed = rows, prompts, trimmed
        self.ranges = starts.ravel(), lengths.ravel()
        self.lengths = lengths.sum(axis=1)
        self.num_controls = np.full(len(rows), controls)


class _Group:
    """The conversations of one pattern in a batch."""

    def __init__(
        self, chat: ChatFormat, layout: Layout, batch: Batch, rows: list[int], pool: _Pool
    ) -> None:
        self._segments, self._layout, self._batch, self._pool = chat.segments, layout, batch, pool
        self._rows = np.array(rows)
        self._first = batch.first[self._rows]
        self._trained: set[int] = set()
        self._trimmed = np.zeros(len(rows), np.int64)

    def put_together(self, train_on: str) -> _Part:
        layout, prompt = self._layout, self._layout.prompt
        assert prompt is not None
        self._trained = self._find_trained(train_on)
        sure = np.ones(len(self._rows), bool)
        prompts = np.full(len(self._rows), prompt.num_lead)
        columns: list[Ranges] = []
        for index, column in enumerate(layout.columns):
            if isinstance(column, Constant):
                filled = [self._constant(column, np.ones(len(self._rows), bool))]
            else:
                *filled, begins = self._slot(column, self._ways(column))
                if index == prompt.num_columns and prompt.num_lead:
                    sure = begins  # if lead and answer merge, so do prompt and answer
            if index < prompt.num_columns:
                prompts += sum(lengths for _, lengths in filled)
            columns += filled
        part = _Part(self._rows, columns, prompts, self._trimmed, layout.plan.num_controls)
        return part if sure.all() else _keep(part, sure, len(columns))

    def _find_trained(self, train_on: str) -> set[int]:
        """Return the indices of the trained messages; -1 stands for tokens that belong to no answer."""
        count, first = self._layout.last_answer + 1, self._first[0]
        if train_on == "all":
            return {-1, *range(count)}
        roles, trained = (
            values[first : first + count] for values in (self._batch.roles, self._batch.trained)
        )
        answers = [i for i in range(count) if roles[i] == "assistant"]
        return {
            i for i in (answers[-1:] if train_on == "last_assistant" else answers) if trained[i]
        }

    def _is_trained(self, owners: Array) -> Array:
        return (
            np.isin(owners, list(self._trained)) if self._trained else np.zeros(len(owners), bool)
        )

    def _constant(self, column: Constant, where: Array) -> Ranges:
        start = self._pool.add(column.ids, self._is_trained(column.owners))
        return np.full(len(where), start), np.where(where, len(column.ids), 0)

    def _ways(self, slot: Slot) -> Array:
        """Return, per row, how the known ids of the content may be used."""
        message = slot.message
        if message is None:
            return np.full(len(self._rows), Way.WHOLE)
        trims = self._layout.plan.trims[message]
        left, right = (BLANKS if trim is None else trim for trim in trims)
        contents = self._batch.texts.take(to_arrow(self._first + message, pa.int64()))
        trimmed = pc.utf8_rtrim(pc.utf8_ltrim(contents, left), right)
        less, all_ = (from_arrow(pc.binary_length(texts)) for texts in (trimmed, contents))
        self._trimmed += less < all_
        ways = self._segments.ways(slot.scaffold, slot.one_owner, contents)
        return np.where(less < all_, Way.WHOLE, ways)

    def _slot(self, slot: Slot, ways: Array) -> tuple[Ranges, Ranges, Array]:
        """Return the ranges of the lead and of the content, and per row whether the lead's ids come first.

        If the content's known ids cannot be used, the second range has the whole segment.
        """
        begins = ways == Way.JOIN
        lead = self._constant(slot.lead, ways == Way.JOIN)
        starts, lengths = np.zeros(len(ways), np.int64), np.zeros(len(ways), np.int64)
        known = ways != Way.WHOLE
        if slot.message is not None:
            at = self._first[known] + slot.message
            starts[known] = self._batch.ids.starts[at]
            lengths[known] = self._batch.ids.lengths[at]
            if slot.owner in self._trained or -1 in self._trained:
                self._pool.train(ranges(starts[known], lengths[known]))
        for place in np.flatnonzero(~known).tolist():
            starts[place], lengths[place], begins[place] = self._whole(slot, place)
        return lead, (starts, lengths), begins

    def _whole(self, slot: Slot, place: int) -> tuple[int, int, bool]:
        first = int(self._first[place])
        originals = self._batch.contents[first : first + self._layout.last_answer + 1]
        contents = self._layout.plan.trim(originals)
        if slot.message is None:  # otherwise `_ways` has counted it
            inside = [p.message for p in slot.segment.pieces if p.message is not None]
            self._trimmed[place] += sum(len(contents[m]) < len(originals[m]) for m in inside)
        owned = self._segments.encode_whole(slot.segment, contents)
        owners = np.array([-1 if owner is None else owner for _, owner in owned], np.int64)
        ids = np.array([i for i, _ in owned], np.int32)
        count = len(slot.lead.ids)
        begins = np.array_equal(ids[:count], slot.lead.ids)
        begins = begins and np.array_equal(owners[:count], slot.lead.owners)
        return self._pool.add(ids, self._is_trained(owners)), len(ids), begins


def _keep(part: _Part, sure: Array, num_columns: int) -> _Part:
    starts, lengths = (values.reshape(-1, num_columns)[sure] for values in part.ranges)
    columns = [(starts[:, i], lengths[:, i]) for i in range(num_columns)]
    controls = int(part.num_controls[0])
    return _Part(part.rows[sure], columns, part.prompts[sure], part.trimmed[sure], controls)
