"""Define a batch of the model, and the label of positions that are not supervised."""

from torch import Tensor

Batch = dict[str, Tensor]
"""`input_ids`, `attention_mask` (B, T); `labels` (B, L), `IGNORED_LABEL` where nothing is supervised; `index`,
`target` (B,). All int64, on one device."""

IGNORED_LABEL = -100
"""torch's and transformers' label of a position that no loss is taken at."""
