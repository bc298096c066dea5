"""Instructions in Alpaca's form: Alpaca, WizardLM, Code Alpaca, the arithmetic of LLM-Adapters."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from data_modules.evals.commonsense import PROMPT
from data_modules.generative import GenerativeDataModule
from data_modules.readers import published_rows, with_fields

PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
FIELDS = ("instruction", "output")
OTHER_TURNS = ("history", "system")  # of LLaMA-Factory's files
REFUSALS = ("sorry", "as an ai")


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Return Alpaca's prompt for an instruction, and for its input where it has one.

    Source: the LoRA-One repository, data.py. Differs from Stanford Alpaca as that does: with an input there
    is no sentence before the instruction.
    """
    if not context:
        return PROMPT.format(instruction=instruction)
    return PROMPT_WITH_INPUT.format(instruction=instruction, context=context)


class InstructionDataModule(GenerativeDataModule):
    """Train on instructions and their answers.

    Args:
        path: JSON list or JSON lines, plain or gzipped, with `instruction`, `output` and mostly `input`:
            Alpaca's files, Code Alpaca's, math_10k.json; null takes `hub_id` from the Hub.
        hub_id: `yahma/alpaca-cleaned` is what the LoRA-One paper trains on before MMLU;
            `silk-road/Wizard-LM-Chinese-instruct-evol` what LoRA-GA trains on, with drop_refusals: true,
            keep_below: 1024 and max_rows: 52000.
        drop_refusals: Leave out answers with "sorry" or "as an ai", as the authors do with WizardLM.
        max_length: Most tokens of a row; a longer one is dropped.
        validation_size: Rows that validate.
        **options: See `GenerativeDataModule`.

    Source: the LoRA-One repository, data.py. Differs: the authors draw a tenth of Alpaca's rows to validate
    on and train on them, too, here they are set aside; they cut the end of a row that is too long.
    """

    task_name = "instructions"

    def __init__(
        self,
        path: str | None = None,
        hub_id: str = "yahma/alpaca-cleaned",
        drop_refusals: bool = False,
        max_length: int = 1024,
        validation_size: int = 1000,
        **options: Any,
    ) -> None:
        super().__init__(path, max_length, validation_size=validation_size, **options)
        self.hub_id = hub_id
        self.drop_refusals = drop_refusals
        self.source = path or hub_id

    def examples(self) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of each row that is no refusal."""
        self.dropped_rows["refusal"] = 0
        rows = published_rows(self.path, self.hub_id, "default", "train", FIELDS, "--data.path")
        left_out = 0
        for where, row in rows:
            context = row.get("input") or ""
            with_fields({"input": context}, ["input"], where, "--data.path")
            left_out += any(row.get(field) for field in OTHER_TURNS)
            if self.drop_refusals and any(word in row["output"].lower() for word in REFUSALS):
                self.dropped_rows["refusal"] += 1
            else:
                yield instruction_prompt(row["instruction"], context), row["output"]
        if left_out:
            rank_zero_warn(
                f"{left_out} rows of {self.source} have a {' or '.join(OTHER_TURNS)}, which is left out: "
                "prompts are made of instruction and input"
            )
