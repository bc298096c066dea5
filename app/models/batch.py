"""Define a batch of the model, and the label of positions that are not supervised."""

from torch import Tensor

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` (B, T); `labels` (B, L), `IGNORED_LABEL` where nothing is supervised; `index`,
`target` (B,). All int64, on one device. Where rows are packed, `position_ids` (B, T), 0 at the start of each of
the E examples, stand for `attention_mask`, and `index` and `target` are (E,)."""

IGNORED_LABEL = -100
"""torch's and transformers' label of a position that no loss is taken at."""
