"""Ask for an explanation of each row of bugs.csv, and write the answers beside them to answers.csv.

Run it where a bugs.csv with the columns id, file and error is: python table.py
"""

import csv

from opencode_sync import OpenCodeClient, OpenCodeError, RunConfig, read_jobs

READ_ONLY = RunConfig(permission={"edit": "deny", "bash": "deny", "webfetch": "deny"})


def main() -> None:
    jobs = read_jobs("bugs.csv", template="Explain {file}: {error}", key_column="id")
    with (
        OpenCodeClient(run_cfg=READ_ONLY) as client,
        open("answers.csv", "w", encoding="utf-8", newline="") as file,
    ):
        batch = client.map(
            jobs,
            checkpoint="answers.jsonl",  # what is in it is not asked again
            on_error="return",
            max_total_cost=5.00,
            timeout_s=600,
        )
        table = csv.writer(file)
        table.writerow(["id", *jobs[0].metadata, "answer", "error"])
        for result in batch:
            is_answer = not isinstance(result, OpenCodeError)
            came = [result.answer, ""] if is_answer else ["", result]
            table.writerow([result.key, *result.metadata.values(), *came])
    print(batch.report)


if __name__ == "__main__":
    main()
