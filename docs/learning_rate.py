"""Draw ``learning_rate.svg`` from two real runs, one of which gets ``set learning_rate=x0.5``.

Run it as ``python docs/learning_rate.py``.

Both use torch's cosine schedule with a linear warm-up, 1,000 steps.
"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from forgather_control import TrainingJob, connect

STEPS, WARM_UP, CHANGED_AT = 1000, 100, 400
WIDTH, HEIGHT, MARGIN = 640, 260, 40


def train(job_id: str, changes: bool) -> list[float]:
    """Return the learning rate of each step."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    warm_up = LinearLR(optimizer, 0.01, total_iters=WARM_UP)
    cosine = CosineAnnealingLR(optimizer, STEPS - WARM_UP, eta_min=1e-5)
    scheduler = SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])
    rates = []
    with TrainingJob(job_id, save_on_stop=False) as job:
        job.optimizer(optimizer, scheduler)
        client = threading.Thread(target=change, args=(job_id,))
        for step in range(1, STEPS + 1):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            if changes and step == CHANGED_AT:
                client.start()
                client.join()
            job.step(step)
    return rates


def change(job_id: str) -> None:
    """Give the command, which is applied at the end of the present step."""
    with connect(job_id) as job:
        job.call("change_settings", changes={"learning_rate": "x0.5"}, reason="for the documentation")


def drawn(curves: dict[str, list[float]]) -> str:
    """Return the curves as SVG."""
    top = max(map(max, curves.values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for (name, rates), colour, row in zip(curves.items(), ("#999999", "#0060c0"), itertools.count()):
        points = " ".join(f"{_x(step):.1f},{_y(rate / top):.1f}" for step, rate in enumerate(rates, 1) if step % 5 == 0)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - 250}" y="{MARGIN + 18 * row}" fill="{colour}">{name}</text>')
    for step in range(0, STEPS + 1, 200):
        parts.append(f'<text x="{_x(step):.1f}" y="{HEIGHT - 15}" text-anchor="middle">{step}</text>')
    for share in (0.0, 0.5, 1.0):
        parts.append(f'<text x="{MARGIN - 5}" y="{_y(share) + 4:.1f}" text-anchor="end">{share * top:.1g}</text>')
        ends = f'x1="{MARGIN}" x2="{WIDTH - 10}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"'
        parts.append(f'<line {ends} stroke="#dddddd"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(step: float) -> float:
    return MARGIN + (WIDTH - MARGIN - 10) * step / STEPS


def _y(share: float) -> float:
    return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share


if __name__ == "__main__":
    found = {
        "as scheduled": train("scheduled", changes=False),
        f"set learning_rate=x0.5 at step {CHANGED_AT}": train("changed", changes=True),
    }
    Path(__file__).with_suffix(".svg").write_text(drawn(found), encoding="utf-8")
