"""Plan a round trip with several agents: one names ten cities, ten tell the weather, one sums up.

Run it anywhere: python ten_cities.py Europe by train in May
"""

import sys
from typing import Annotated

from pydantic import BaseModel, Field

from opencode_sync import OpenCodeServer, RunConfig, RunResult

NO_TOOLS = RunConfig(permission={"*": "deny"})


class Plan(BaseModel):
    cities: Annotated[list[str], Field(min_length=10, max_length=10)]


def plan(server: OpenCodeServer, trip: str) -> RunResult:
    return server.run(f"Name ten cities for this journey, in order: {trip}.", schema=Plan)


def look_up(server: OpenCodeServer, cities: list[str], trip: str) -> list[RunResult]:
    prompts = [f"What weather meets a traveller in {city}? ({trip})" for city in cities]
    return list(server.map(prompts, max_workers=5, timeout_s=600, progress=True))


def sum_up(server: OpenCodeServer, cities: list[str], reports: list[RunResult]) -> RunResult:
    pairs = zip(cities, reports, strict=True)
    notes = "\n".join(f"{city}: {report.answer}" for city, report in pairs)
    return server.run(f"Write a packing list for a trip with this weather.\n\n{notes}")


def main() -> None:
    trip = " ".join(sys.argv[1:]) or "Europe by train in May"
    with OpenCodeServer(run_cfg=NO_TOOLS) as server:
        planned = plan(server, trip)
        cities = planned.parsed.cities
        reports = look_up(server, cities, trip)
        summary = sum_up(server, cities, reports)
    print(" - ".join(cities), summary.answer, sep="\n\n")
    cost = sum(result.total_cost for result in (planned, *reports, summary))
    print(f"\n{len(reports) + 2} runs, ${cost:.4f}")


if __name__ == "__main__":
    main()
