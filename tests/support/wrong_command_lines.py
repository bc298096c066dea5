"""Command lines with one mistake each, and those that read a file."""

RUN = "runs/tiny/version_0"
CHECKPOINT = f"{RUN}/checkpoints/resume-step=3.ckpt"

# A command line, and what the message has one of.
WRONG_COMMAND_LINES = [
    ("fti --config config.yaml", "fti"),
    ("fit --config confg.yaml", "confg.yaml"),
    ("fit --config methods/lora_on", "methods/lora_on"),
    ("fit --confg config.yaml", "confg"),
    ("fit --config config.yaml stray", "stray"),
    ("fit --config", "--config"),
    ("fit", "--config"),
    ("fit --config config.yaml --ckpt_path nothing.ckpt", "ckpt_path"),
    ("fit --config config.yaml --ckpt_path model", "ckpt_path"),
    ("plan --config config.yaml --run", "--run"),
    ("test --run nothing", "--run"),
    ("test --run model", "--run"),
    ("test", "--run", "--config"),
    ("validate --run runs", "--run"),
    ("export", "--run"),
    ("export --run nothing", "--run"),
    ("export --run model", "--run"),
    (f"export --run {RUN} --output model", "--output"),
    (f"export --run {RUN} --megre", "megre"),
    (f"export --run {RUN} --dtype bfloat16", "--dtype"),
    (f"export --run {RUN} --merge --dtype int4", "--dtype"),
    (f"export --run {RUN} --as dora", "--as"),
    (f"export --run {RUN} --ckpt_path nothing.ckpt", "ckpt_path"),
    (f"test --run {RUN} --model.merged int4", "model.merged"),
    ("init", "--config"),
    ("init --config confg.yaml", "confg.yaml"),
    ("init --config config.yaml --output model", "--output"),
    ("init --config config.yaml --config methods/pissa", "PissaInit"),
    ("init --config config.yaml --config methods/full", "model.adapter"),
    ("report", "runs"),
    ("report nothing", "nothing"),
    ("report model", "model"),
    (f"report {RUN} --scroe accuracy", "scroe"),
    (f"report {RUN} --score acuracy", "acuracy"),
    (f"report {RUN} --reference lora_two", "lora_two"),
    ("compare", "--methods"),
    ("compare --config config.yaml --methods lor --learning_rates 1e-3", "lor"),
    ("compare --config config.yaml --methods lora --learning_rates fast", "fast"),
    ("compare --config config.yaml --methods lora --learning_rates -1", "--learning_rates"),
    (
        "compare --config config.yaml --methods lora --learning_rates 1e-3 --ranks 0",
        "--ranks",
    ),
    (
        "compare --config config.yaml --methods lora --learning_rates 1e-3 --ranks 900",
        "model.adapter.r",
    ),
    (
        "compare --config config.yaml --methods lora --learning_rates 1e-3 --seeds x",
        "--seeds",
    ),
    (
        "compare --config config.yaml --methods lora --learning_rates 1e-3 --jobs 0",
        "jobs",
    ),
    (
        "compare --config config.yaml --methods lora --learning_rates 1e-3 --score no",
        "no",
    ),
    (
        "compare --config config.yaml --methods lora --learning_rates 1e-3 --reference lora_one",
        "lora_one",
    ),
    (
        "compare --config nothing.yaml --methods lora --learning_rates 1e-3",
        "nothing.yaml",
    ),
    (
        "compare --config config.yaml --methods lora --learning_rates 1e-3 --launch x",
        "launch",
    ),
    ("dashboard", "--entity"),
    ("dashboard --entity me --task a'b --output d.json", "--task"),
    ("dashboard --entity me --output no/such/d.json", "--output"),
    ("theory --config theory/lineer.yaml", "theory/lineer.yaml"),
    ("theory --config theory/linear.yaml --problem.kapa 3", "problem.kapa"),
    ("theory --config theory/linear.yaml --problem.kappa 0.1", "problem.kappa", "kappa"),
    ("theory --config theory/linear.yaml --problem.kappa x", "problem.kappa"),
    ("theory --config config.yaml", "seed_everything", "model", "trainer"),
]

# Command lines that read a file.
COMMANDS_OF_FILES = {
    "config.yaml": ["fit --config config.yaml", "plan --config config.yaml"],
    "data/SST-2/train.tsv": ["fit --config config.yaml", "plan --config config.yaml"],
    "data/SST-2/dev.tsv": [f"test --run {RUN}"],
    "rows.jsonl": ["fit --config rows.yaml", "plan --config rows.yaml"],
    "rows.json": ["fit --config rows.yaml --data.path rows.json"],
    "rows.jsonl.gz": ["fit --config rows.yaml --data.path rows.jsonl.gz"],
    "model/config.json": ["fit --config config.yaml", "plan --config config.yaml"],
    "model/tokenizer.json": ["fit --config config.yaml", "plan --config config.yaml"],
    "model/tokenizer_config.json": ["fit --config config.yaml"],
    "model/model.safetensors": ["fit --config config.yaml"],
    CHECKPOINT: [f"fit --config config.yaml --ckpt_path {CHECKPOINT} --trainer.max_steps 4"],
    f"{RUN}/config.yaml": [
        f"test --run {RUN}",
        f"export --merge --run {RUN}",
        "report runs",
    ],
    f"{RUN}/summary.json": [f"export --merge --run {RUN}", f"report {RUN}"],
    f"{RUN}/metrics.csv": ["report runs"],
    f"{RUN}/adapter/adapter_config.json": [
        f"test --run {RUN}",
        f"export --merge --run {RUN}",
    ],
    f"{RUN}/adapter/adapter_model.safetensors": [
        f"test --run {RUN}",
        f"export --merge --run {RUN}",
    ],
    "grid/compare.json": ["report grid"],
}

# Command lines that read the fields of a JSON file.
COMMANDS_OF_FIELDS = {
    "model/config.json": ["fit --config config.yaml"],
    "model/tokenizer_config.json": ["fit --config config.yaml"],
    f"{RUN}/summary.json": [f"export --merge --run {RUN}", f"report {RUN}"],
    f"{RUN}/adapter/adapter_config.json": [f"test --run {RUN}"],
    "grid/compare.json": ["report grid"],
    "rows.json": ["fit --config rows.yaml --data.path rows.json"],
}


def setting_of(file):
    """Return the setting that a message may name instead of a file."""
    if "/adapter/" in file:
        return "model.adapter_path"
    folder = file.split("/")[0]
    return {"model": "model.name", "runs": "--run", "grid": "grid"}.get(folder, "data.path")
