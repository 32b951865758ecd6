"""Review every Python file below the current directory, and write the findings to review.csv.

Run it in a repository: python review_repository.py
"""

import csv
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from opencode_sync import Job, OpenCodeError, OpenCodeServer, RunConfig


class Finding(BaseModel):
    line: int
    severity: Literal["low", "medium", "high"]
    text: str


class Review(BaseModel):
    findings: list[Finding]


READ_ONLY = RunConfig(permission={"edit": "deny", "bash": "deny", "webfetch": "deny"})


def main() -> None:
    jobs = [
        Job(
            f"Review the attached file {file}: what in it is wrong, and how badly?",
            run_cfg=READ_ONLY.replace(files=(file,)),
            key=str(file),
        )
        for file in sorted(Path().rglob("*.py"))
    ]
    with OpenCodeServer() as server, open("review.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "line", "severity", "finding"])
        reviews = server.map(
            jobs, schema=Review, max_workers=4, timeout_s=600, on_error="return", progress=True
        )
        for review in reviews:
            if isinstance(review, OpenCodeError):
                table.writerow([review.key, "", "not reviewed", review])
                continue
            for finding in review.parsed.findings:
                table.writerow([review.key, finding.line, finding.severity, finding.text])
        print(reviews.report)


if __name__ == "__main__":
    main()
