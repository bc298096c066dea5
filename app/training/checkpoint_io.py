"""Write checkpoints whole or not at all, and read them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from app.tracking.run_folder import checkpoint_files
from app.utils.class_paths import RENAMED
from app.utils.errors import InputError
from app.utils.files import PART, atomic_write

TRAINED = ("state_dict", "base", "method", "global_step")
"""What a checkpoint holds of the trained model."""
NEEDED = ("state_dict", "loops", "optimizer_states", "base", "method")
"""What it takes to go on with the training."""


class CheckpointFiles(TorchCheckpointIO):
    """Write each checkpoint under a temporary name, and rename it once it is synced to disk."""

    def __init__(self) -> None:
        self.complete: Path | None = None  # the last checkpoint that was written or read whole
        self._failed = False

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint of plain data and tensors; if that fails, warn and leave the last one as it is."""
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in checkpoint_files(path.parent, PART):
                stale.unlink(missing_ok=True)
            with atomic_write(path) as stream:
                stream.write(content.getbuffer())
        except OSError as error:
            self._failed = True
            last = self.complete
            kept = f"the last complete one is {last}" if last else "there is none yet"
            rank_zero_warn(
                f"the checkpoint of step {checkpoint.get('global_step')} could not be written to {path} "
                f"({error.strerror or error}): training goes on, and {kept}. Make room, or allow writing there"
            )
        else:
            self._failed = False
            self.complete = path

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as `read_checkpoint` does, whatever the other arguments."""
        checkpoint = read_checkpoint(Path(path), TRAINED)  # `find_resume_point` asks for more
        self.complete = Path(path)
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, unless its successor could not be written."""
        if not self._failed and Path(path) != self.complete:
            super().remove_checkpoint(path)


def read_checkpoint(path: Path, needed: Sequence[str] = NEEDED) -> dict[str, Any]:
    """Read a checkpoint, on the CPU and without running code that it may hold.

    Args:
        path: The file.
        needed: What it must hold, `NEEDED` to resume from it or `TRAINED`.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"ckpt_path is {str(path)!r}: {error.strerror or error}") from error
    try:
        with stream:
            checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # damage surfaces as anything, such as a KeyError of the unpickler
        state = "is empty" if path.stat().st_size == 0 else "cannot be read as a checkpoint"
        raise InputError(
            f"ckpt_path is {str(path)!r}, which {state}: it is damaged, or it is none of this program's. "
            "Give another file, or `last`"
        ) from error
    content = checkpoint if isinstance(checkpoint, dict) else {}
    if missing := [name for name in needed if name not in content]:
        whole = (
            " with its optimizer (not save_weights_only)" if "optimizer_states" in needed else ""
        )
        raise InputError(
            f"ckpt_path is {str(path)!r}, which lacks {', '.join(missing)}: expected a checkpoint of this "
            f"program{whole}, such as runs/NAME/version_0/checkpoints/resume-step=100.ckpt"
        )
    states = checkpoint.get("callbacks", {})
    checkpoint["callbacks"] = {RENAMED.get(key, key): state for key, state in states.items()}
    return checkpoint
