"""What of a trainer's settings cannot work here, told before anything is loaded."""

from lightning.pytorch import Trainer

from app.errors import InputError
from app.processes import check_number_of_processes
from app.sharding import Fsdp2Strategy

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


def check_precision(trainer: Trainer) -> None:
    """Raise InputError if the precision would convert the LoRA factors, which are float32 always."""
    precision = getattr(trainer.precision_plugin, "precision", PRECISIONS[0])
    if precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision is {precision}, which would convert the LoRA factors, too; they are float32 "
            "always. Set model.dtype for the base model's weights (bfloat16, float16), and "
            "trainer.precision bf16-mixed to compute in 16 bits"
        )


def check_device(trainer: Trainer) -> None:
    """Raise InputError on Apple's GPU: scores and decompositions are in float64, which it has not."""
    if trainer.strategy.root_device.type == "mps":
        raise InputError(
            "trainer.accelerator is mps (Apple's GPU), which has no float64: set trainer.accelerator cpu"
        )


def check_offload(trainer: Trainer) -> None:
    """Raise InputError if what stays in host memory would be sent by NCCL."""
    strategy = trainer.strategy
    if not isinstance(strategy, Fsdp2Strategy) or not strategy.cpu_offload:
        return
    if strategy.process_group_backend == "nccl":
        raise InputError(
            "trainer.strategy.process_group_backend is nccl, which sends nothing that cpu_offload keeps in "
            "host memory: leave process_group_backend null, or set it to cpu:gloo,cuda:nccl"
        )


def check_trainer(trainer: Trainer) -> None:
    """Raise InputError for settings that cannot work.

    Raises:
        ValueError: What Lightning says of the launcher's environment, which it would look at too late.
    """
    check_precision(trainer)
    check_number_of_processes(trainer.num_nodes, trainer.num_devices)
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:  # Slurm's tasks
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)
    check_device(trainer)
    check_offload(trainer)
