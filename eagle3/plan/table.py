"""A plan in the terminal, in 80 columns."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eagle3.plan.estimate import PREFILL_UTILISATION, TRAINING_UTILISATION
from eagle3.plan.results import MODES, Disk, Hours, Plan
from eagle3.runs.disk import size_text


def show(plan: Plan, console: Console) -> None:
    """Print the tables, their assumptions and the recommendation."""
    for table in (tokens_table(plan), disk_table(plan.disk), memory_table(plan), hours_table(plan)):
        console.print(table)
    console.print(Text(assumptions(plan), style="dim"))
    console.print(Text(f"Recommended: {plan.recommendation}", style="bold"))


def table_of(title: str, *columns: str) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold"
    )
    table.add_column(overflow="fold")
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    return table


def tokens_table(plan: Plan) -> Table:
    tokens, about = plan.tokens, "" if plan.tokens.exact else "about "
    error = "" if tokens.exact else f" ± {tokens.standard_error / tokens.tokens:.1%}"
    table = table_of(
        "Data", "prepared" if tokens.exact else f"from {tokens.sampled_documents:,} conversations"
    )
    table.add_row("tokens an epoch", f"{about}{rounded(tokens.tokens, tokens.exact)}{error}")
    table.add_row("conversations an epoch", f"{about}{rounded(tokens.documents, tokens.exact)}")
    table.add_row("supervised", f"{tokens.supervised_share:.1%}")
    table.add_row("rows with a teacher", f"{tokens.teacher_share:.1%}")
    table.add_row("updates an epoch", f"{about}{rounded(tokens.updates_per_epoch, tokens.exact)}")
    table.add_row("epochs", f"{tokens.passes:.3g}")
    table.add_row("updates in all", f"{about}{rounded(tokens.updates, tokens.exact)}")
    table.add_row(
        "GPUs, of which each replica has", f"{tokens.gpus}, {tokens.gpus // tokens.replicas}"
    )
    return table


def rounded(value: float, exact: bool) -> str:
    """All digits of what was counted, three of what was estimated."""
    return f"{value:,.0f}" if exact else f"{float(f'{value:.3g}'):,.0f}"


def disk_table(disk: Disk) -> Table:
    table = table_of("Disk", "bytes", "free there")
    for dtype, size in disk.hidden_states.items():
        chosen = " (chosen)" if dtype == disk.dtype else ""
        table.add_row(
            f"hidden states, {dtype}{chosen}",
            size_text(size),
            size_text(disk.free["hidden states"]),
        )
    table.add_row("prepared data", size_text(disk.prepared), size_text(disk.free["prepared"]))
    table.add_row(
        f"checkpoints, {disk.checkpoints // disk.checkpoint} of {size_text(disk.checkpoint)}",
        size_text(disk.checkpoints),
        size_text(disk.free["run"]),
    )
    table.add_section()
    for mode in MODES:
        table.add_row(f"mode={mode}", *verdict(mode, disk))
    return table


def verdict(mode: str, disk: Disk) -> tuple[str, str]:
    """(bytes of the mode, whether they fit)."""
    others = disk.prepared + disk.checkpoints
    if others > min(disk.free.values()):
        return size_text(others), "does not fit"
    if mode == "online":
        return size_text(others), "fits"
    if mode == "offline":
        return size_text(
            others + disk.needed
        ), "fits" if disk.needed <= disk.allowed else "does not fit"
    kept = round(disk.needed * disk.kept_share)
    return size_text(
        others + kept
    ), "fits" if disk.kept_share == 1 else f"keeps {disk.kept_share:.0%}"


def memory_table(plan: Plan) -> Table:
    memory = plan.memory
    table = table_of("Memory of each GPU", *(name.replace(" ", "\n", 1) for name in memory.parts))
    for part in next(iter(memory.parts.values())):
        table.add_row(
            part,
            *(size_text(parts[part]) if parts[part] else "–" for parts in memory.parts.values()),
        )
    table.add_section()
    table.add_row("at once", *map(size_text, memory.total.values()))
    if memory.gpu:
        fits = (
            "fits" if total <= memory.gpu else "does not fit" for total in memory.total.values()
        )
        table.add_row(f"of {size_text(memory.gpu)}", *fits)
    return table


def hours_table(plan: Plan) -> Table:
    names = [
        f"{hours.devices} x {hours.device}" if hours.devices > 1 else hours.device
        for hours in plan.hours
    ]
    table = table_of(
        "Time", *(f"{name}\n{rate_text(hours.flops)}" for name, hours in zip(names, plan.hours))
    )
    rows = {
        "target's prefill": lambda h: rate(h, plan.cost.prefill_flops, PREFILL_UTILISATION),
        "draft's training": lambda h: rate(h, plan.cost.training_flops, TRAINING_UTILISATION),
        "capture": lambda h: time_text(h.capture),
        "an epoch online": lambda h: time_text(h.epoch_online),
        "an epoch offline": lambda h: time_text(h.epoch_offline),
    }
    chosen = {plan.mode: " (chosen)"}
    rows |= {
        f"all of mode={m}{chosen.get(m, '')}": lambda h, m=m: time_text(h.total[m]) for m in MODES
    }
    rows |= {
        "storage for offline at full speed": lambda h: (
            f"{size_text(h.full_speed_bandwidth)}/s per GPU"
        ),
        "recomputing beats reading below": lambda h: (
            f"{size_text(h.break_even_bandwidth)}/s per GPU"
        ),
    }
    for name, value in rows.items():
        table.add_row(name, *(value(hours) for hours in plan.hours))
    return table


def rate(hours: Hours, flops: float, utilisation: float) -> str:
    """Tokens a second of one GPU."""
    return f"{float(f'{hours.flops * utilisation / flops:.2g}'):,.0f} tokens/s"


def rate_text(flops: float) -> str:
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.0f} GFLOP/s"


def time_text(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours" if hours < 100 else f"{hours:,.0f} hours"
    seconds = hours * 3600
    return (
        f"{seconds / 60:.1f} minutes"
        if seconds >= 60
        else f"{seconds:.0f} s"
        if seconds >= 1
        else "under a second"
    )


def assumptions(plan: Plan) -> str:
    cost = plan.cost
    target = f"{cost.target.parameters / 1e9:.3g} B parameters"
    if cost.target.active < cost.target.parameters:
        target += f", {cost.target.active / 1e9:.3g} B active"
    return (
        f"Target {target}, {cost.prefill_flops / 1e9:.3g} GFLOP a token. Draft {cost.draft_parameters / 1e9:.3g} B "
        f"trained, {cost.training_flops / 1e9:.3g} GFLOP a token. Assumed: {PREFILL_UTILISATION:.0%} of the FLOP/s "
        f"named in prefill, {TRAINING_UTILISATION:.0%} in training. Not counted: preparing, answering the held-out "
        "prompts, evaluating, benchmarking; the speed of the network."
    )
