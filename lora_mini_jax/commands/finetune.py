"""The fine-tuning command: the run, and what is said at its end."""

from lora_mini_jax.options import Finetune
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.settings_page import kept_text
from lora_mini_jax.runs.tables import COLUMNS, table_row


def run_finetune(options: Finetune) -> None:
    """Train, then print what was found, a line each, and where things are.

    Raises:
        UserError: as `finetune`.
    """
    summary = finetune(options)
    row = table_row(summary["method"], [summary])
    for column, title in COLUMNS.items():
        if column in row:
            print(f"{title:22}{row[column]}")
    if kept := kept_text(summary):
        print(kept.strip())
    print(f"adapter: {options.output_dir}/adapter\nreport:  {options.output_dir}/report.html")
