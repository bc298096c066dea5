"""Measure what the passes of a model keep in memory, with tensors that have a shape and no content.

The model is built on the meta device and every operation of its forward and backward pass is run by
torch's FakeTensorMode, which allocates nothing. So any architecture, attention, precision and activation
checkpointing is measured as it is, and not by a formula for one kind of model.

The one file of this room with private parts of torch and transformers: `FakeTensorMode` and its converter have
no public names, nor has the switch `_should_skip_dynamo`.
`LiveBytes` could be torch.distributed's MemTracker, once that is public and can be told the number of rows that
a boolean mask selects.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.integrations import moe

from app.initialization.observation import observed
from app.models.batch import IGNORED_LABEL, Batch
from app.models.lora import LoraPair
from app.models.loss import summed_loss, supervised_logits, supervised_loss
from app.models.quantization import scales
from app.models.quantized_shapes import fake_codes
from app.utils.errors import InputError


class PassMemory(NamedTuple):
    """Bytes of one pass over one batch beside parameters and their gradients."""

    kept: int
    """Alive between the forward and the backward pass; 0 for a pass without one."""
    peak: int
    """Most alive at once."""


class FakeModel:
    """A model without content whose passes can be measured; takes over a model on the meta device.

    Args:
        model: On the meta device: the model itself or a PEFT model. Its parameters are replaced.
        base: The transformers model inside.
        forward_context: The trainer's precision context.
        compute_dtype: Type that frozen weights have during a pass, where it is not their own.
    """

    def __init__(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.base = base
        self.forward_context = forward_context
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        if compute_dtype is not None:
            for p in model.parameters():
                if not p.requires_grad:
                    p.data = p.data.to(compute_dtype)
        fake = partial(self._mode.fake_tensor_converter.from_meta_and_device, self._mode)
        model._apply(lambda tensor: fake(tensor, torch.device("cpu")))
        with self._mode:
            fake_codes(model)
        for p in model.parameters():
            if p.requires_grad:
                # A gradient is no part of a pass's own memory.
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def training(self, batch: Batch) -> PassMemory:
        """Measure a training step's forward and backward pass."""
        self.model.train()
        return self._measure(batch, lambda fake: supervised_loss(self.model, self.base, fake)[0])

    def evaluation(self, batch: Batch) -> PassMemory:
        """Measure a forward pass without gradients."""
        self.model.eval()
        with torch.no_grad():
            return self._measure(batch, self._whole_loss)

    def observation(
        self, batch: Batch, pairs: Sequence[LoraPair], train_mode: bool = False
    ) -> PassMemory:
        """Measure the pass of the one-step gradient, without what is kept of the gradient."""
        with observed(self.model, pairs, None, train_mode):
            return self._measure(batch, self._whole_loss)

    def _whole_loss(self, batch: Batch) -> Tensor:
        return summed_loss(supervised_logits(self.model, self.base, batch))

    def _measure(self, batch: Batch, compute_loss: Callable[[Batch], Tensor]) -> PassMemory:
        causal = not self.base.config.is_encoder_decoder
        labels = batch["labels"][:, 1:] if causal else batch["labels"]
        supervised = int((labels != IGNORED_LABEL).sum())
        with self._mode, _shapes_of_experts():
            fake = {k: torch.empty(v.shape, dtype=v.dtype, device="cpu") for k, v in batch.items()}
            held = [*self.model.parameters(), *self.model.buffers(), *fake.values()]
            held += scales(self.model)
            with _without_numbers(), LiveBytes(held, supervised) as live:
                with self.forward_context():
                    loss = compute_loss(fake)
                kept = live.now if loss.requires_grad else 0
                if loss.requires_grad:
                    loss.backward()
        return PassMemory(kept, live.peak)


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Turn the error of a model whose operations look at numbers into an InputError."""
    try:
        yield
    except (
        AttributeError,
        RuntimeError,
    ) as error:  # a fake weight has no attributes of quantised ones
        reason = str(error).partition("\n")[0]
        raise InputError(
            "plan cannot measure this model, whose forward or backward pass depends on the numbers in it "
            f"({type(error).__name__}: {reason}): run `fit` with --trainer.max_steps 1 and look at its memory"
        ) from error


@contextmanager
def _shapes_of_experts() -> Iterator[None]:
    """Let fused experts be multiplied by transformers' own operation, which knows shapes in every type.

    torch's `grouped_mm` takes float32 on every device, but without content bfloat16 alone.
    """
    known = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = known


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operations have made and that are still referred to.

    Args:
        known: Tensors whose storages are not counted.
        supervised: Number of supervised positions. A selection by a boolean mask is given this many
            rows: how many there are cannot be seen in a mask without content.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do without the wrapper that hides every call from torch.compile, which nothing here uses."""
        return False

    def __init__(self, known: Sequence[Tensor], supervised: int) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._supervised = supervised
        self._known = {id(t.untyped_storage()) for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if (
            func is torch.ops.prim.device.default
        ):  # two of three calls, of which none makes a tensor
            return args[0].device
        if func is torch.ops.aten._unsafe_view.default:  # FakeTensorMode caches the safe one only
            func = torch.ops.aten.view.default
        if func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool:
            source, (mask, *_) = args
            result = source.new_empty((self._supervised, *source.shape[mask.ndim :]))
        else:
            result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(made, Tensor):
                self._see(made)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # the same object as long as any tensor has the storage
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
