"""Base of the optimizers of LoRA pairs: AdamW on gradients that are replaced for the length of a step."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def check_pairs(params: Sequence[Tensor]) -> None:
    """Raise ValueError unless parameters are lora_A_0 (r, n), lora_B_0 (m, r), lora_A_1, ... in turn."""
    if len(params) % 2:
        raise ValueError(f"lora_pairs needs lora_A, lora_B in turn, got {len(params)} parameters")
    for i, (a, b) in enumerate(zip(params[::2], params[1::2], strict=True)):
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"lora_pairs, pair {i}: expected lora_A (r, n) and lora_B (m, r), "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )


def with_scaling(param_group: dict[str, Any]) -> dict[str, Any]:
    """Return a group with `scaling`, None where it is not of pairs.

    Raises:
        ValueError: The group is of pairs that do not match, or has not as many scalings.
    """
    if not param_group.get("lora_pairs"):
        return {**param_group, "scaling": None}
    params, scaling = list(param_group["params"]), param_group.get("scaling")
    check_pairs(params)
    if scaling is None or len(scaling) != len(params) // 2:
        raise ValueError(f"scaling must have a number for each pair, got {scaling}")
    return {**param_group, "params": params}


class Expert(NamedTuple):
    """Factors of one expert and their gradients; of a pair that is not stacked, the parameters themselves."""

    pair: int  # the place of its parameters in the group
    number: int  # of the expert among those stacked there
    lora_A: Tensor  # (r, n)
    lora_B: Tensor  # (m, r)
    grad_A: Tensor | None
    grad_B: Tensor | None


def split_experts(group: dict[str, Any]) -> list[Expert]:
    """View a `lora_pairs` group as pairs of one expert each.

    The group may say under `experts` how many are stacked in each of its pairs: lora_A (experts * r, n) has its
    rows expert by expert, lora_B (m, r * experts) its columns in turn, as PEFT has them.
    """
    split = []
    for i, (A, B, experts) in enumerate(_pairs(group)):
        parts: list[Sequence[Tensor | None]] = [[t] for t in (A, B, A.grad, B.grad)]
        if experts > 1:
            parts = [
                [None] * experts if t is None else view(t, experts)
                for t, view in ((A, _rows), (B, _columns), (A.grad, _rows), (B.grad, _columns))
            ]
        split += [Expert(i, e, *tensors) for e, tensors in enumerate(zip(*parts, strict=True))]  # type: ignore[arg-type]
    return split


def _rows(lora_A: Tensor, experts: int) -> Sequence[Tensor]:
    return lora_A.unflatten(0, (experts, -1)).unbind()


def _columns(lora_B: Tensor, experts: int) -> Sequence[Tensor]:
    return lora_B.unflatten(1, (-1, experts)).unbind(-1)


def alike(experts: Sequence[Expert]) -> list[list[int]]:
    """Group the places of the pairs that have both gradients by shape, dtype and device."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, pair in enumerate(experts):
        if pair.grad_A is not None and pair.grad_B is not None:
            A, B = pair.lora_A, pair.lora_B
            groups[A.shape, B.shape, A.dtype, A.device].append(i)
    return list(groups.values())


def set_gradients(
    group: dict[str, Any], grad_A: Sequence[Tensor | None], grad_B: Sequence[Tensor | None]
) -> None:
    """Set `.grad` of a `lora_pairs` group's parameters from gradients in the order of `split_experts`."""
    start = 0
    for A, B, experts in _pairs(group):
        parts = (g[start : start + experts] for g in (grad_A, grad_B))
        new_A, new_B = ([g for g in part if g is not None] for part in parts)
        if experts == 1:
            A.grad, B.grad = grad_A[start], grad_B[start]
        else:
            A.grad = torch.cat(new_A) if new_A else None
            B.grad = torch.stack(new_B, dim=-1).flatten(1) if new_B else None
        start += experts


def _pairs(group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield lora_A, lora_B and the number of experts stacked in them, of each pair of a group."""
    params = group["params"]
    experts = group.get("experts") or [1] * (len(params) // 2)
    yield from zip(params[::2], params[1::2], experts, strict=True)


class LoraPairAdamW(torch.optim.AdamW):
    """AdamW that sees other gradients than the raw ones in groups with `lora_pairs: True`.

    `.grad` holds the raw gradient before and after a step.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; raise ValueError if its pairs do not match."""
        group = {"lora_pairs": False, **param_group}
        if group["lora_pairs"]:
            group["params"] = list(group["params"])
            check_pairs(group["params"])
        super().add_param_group(group)

    def replace_gradients(self, index: int, group: dict[str, Any]) -> None:
        """Replace `.grad` of the parameters of a `lora_pairs` group; AdamW leaves those with None alone.

        `index` is the group's place in `param_groups`.
        """
        raise NotImplementedError

    def normalised(self, pair: Expert, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """Take a gradient of any shape into moments kept for the pair; return Adam's update, in its memory.

        The moments are the state of the parameter lora_B, of the gradient's shape or of stacked experts
        (experts, *shape).
        """
        param = group["params"][2 * pair.pair + 1]
        state, experts = self.state[param], param.shape[1] // pair.lora_B.shape[1]
        if "exp_avg" not in state:
            shape = gradient.shape if experts == 1 else (experts, *gradient.shape)
            state["step"] = torch.zeros(())
            state["exp_avg"] = gradient.new_zeros(shape)
            state["exp_avg_sq"] = gradient.new_zeros(shape)
        beta1, beta2 = group["betas"]
        state["step"] += pair.number == 0
        t = int(state["step"])
        exp_avg, exp_avg_sq = (
            state[name] if experts == 1 else state[name][pair.number]
            for name in ("exp_avg", "exp_avg_sq")
        )
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = torch.sqrt(exp_avg_sq, out=gradient)
        root.div_((1 - beta2**t) ** 0.5).add_(group["eps"])
        return torch.div(exp_avg, root, out=root).div_(1 - beta1**t)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate the closure once, replace the gradients it leaves, update the parameters.

        Returns what the closure returned. The raw gradients are back also after an error.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        raw = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        try:
            for index, group in enumerate(self.param_groups):
                if group["lora_pairs"]:
                    self.replace_gradients(index, group)
            _adamw_step()(self)
        finally:
            for param, grad in raw:
                param.grad = grad
        return loss


def _adamw_step() -> Callable[[torch.optim.Optimizer], Any]:
    """Return AdamW's step without step hooks, which run around the step of the subclass already.

    torch wraps `step` of each class of which an optimizer is made in a function that runs the hooks
    (`Optimizer._patch_step_function`), AdamW's too once there is a plain AdamW. That function is known by its
    private mark `hooked`; a public step without hooks would replace this.
    """
    return inspect.unwrap(torch.optim.AdamW.step, stop=lambda f: not getattr(f, "hooked", False))
