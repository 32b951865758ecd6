"""Work off the prompts in tasks.txt, for at most five dollars in all; what is done stays done.

Run it by cron or by hand, as often as you like: python nightly_batch.py
"""

import sys
from pathlib import Path

from opencode_sync import Job, OpenCodeBudgetError, OpenCodeClient, OpenCodeError, RunConfig

CAREFUL = RunConfig(permission={"bash": {"*": "deny", "git log*": "allow"}, "webfetch": "deny"})


def main() -> int:
    tasks = dict.fromkeys(Path("tasks.txt").read_text(encoding="utf-8").splitlines())
    with OpenCodeClient(run_cfg=CAREFUL) as client:
        batch = client.map(
            [Job(task, key=task) for task in tasks if task.strip()],
            checkpoint="nightly.jsonl",  # failed tasks are tried again the next night
            max_total_cost=5.00,  # all nights together: what the checkpoint has spent counts
            max_workers=2,
            timeout_s=1800,
            idle_timeout_s=300,
            on_error="return",
        )
        with batch:
            for result in batch:
                if isinstance(result, OpenCodeBudgetError):
                    print("left for a larger budget:", result.key)
                elif isinstance(result, OpenCodeError):
                    print("failed:", result.key, "-", result)
                else:
                    print("done:", result.key, "-", result.answer)
        print(batch.report)
    return 1 if batch.report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
