"""`eo reprocess`: a range of a topic through its handler again."""

from __future__ import annotations

import re
import threading
from datetime import datetime, timedelta
from typing import Annotated

import typer

from eoframework import bootstrap, lifecycle
from eoframework.cli import options
from eoframework.consume.rerun import Tally
from eoframework.ops import BadInput
from eoframework.reprocess import Bound, Plan, Reprocess, tally_document

_SPAN = re.compile(r"(\d+)([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_START_AGAIN = 75
_BOUND = "An offset (with --partition), 2026-11-21T14:00Z, 2h (ago), earliest or latest"


def command(
    reference: options.Reference,
    handler: Annotated[str, typer.Argument(metavar="HANDLER", help="One of the app's handlers.")],
    start: Annotated[str, typer.Option("--from", help=f"{_BOUND}.")],
    end: Annotated[
        str | None, typer.Option("--to", help=f"{_BOUND}; not included. Default: where the consumer stands.")
    ] = None,
    partition: Annotated[list[int] | None, typer.Option("--partition", min=0, help="May be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    forget: Annotated[
        bool, typer.Option("--forget", help="Repeat effects that were made already; asks for their number.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; not enough for --forget.")] = False,
    yes_repeat: Annotated[
        int | None, typer.Option("--yes-repeat", metavar="N", help="How many messages' effects are repeated.")
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Messages a second, at most.")] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Send a range of a topic through a handler again, beside the live group; effects already made are not repeated."""
    options.start(assignments)
    if rate is not None and rate <= 0:
        raise BadInput(f"--rate {rate:g}.", remedy="Give messages a second, above 0.")
    first, last = _bound(start), _bound(end) if end is not None else None
    stop = threading.Event()
    with lifecycle.signals(stop):
        job = _job(reference, handler, stop, wait=not no_wait)
    if job is None:
        return
    # No flag while it counts and asks: Ctrl-C just ends it, nothing has been done.
    plan = job.plan(first, last, partitions=partition or ())
    if dry_run:
        raise typer.Exit(_show_plan(plan, forget=forget, as_json=as_json))
    refusal = plan.refusal()
    if refusal is not None and not forget:
        raise refusal
    if not plan.counts.would_run(forget=forget):
        options.show({"plan": plan.document(forget=forget), "result": None}, _text(plan), as_json=as_json)
        return
    confirmed = _confirm(plan, forget=forget, yes=yes, yes_repeat=yes_repeat)
    with lifecycle.signals(stop):
        tally = job.run(plan, forget=forget, confirmed=confirmed, rate=rate, stop=stop)
    document = {"plan": plan.document(forget=forget), "result": tally_document(tally), "finished": not stop.is_set()}
    options.show(document, _result(tally, finished=not stop.is_set()), as_json=as_json)
    raise typer.Exit(_code(tally, finished=not stop.is_set()))


def _job(reference: str, handler: str, stop: threading.Event, *, wait: bool) -> Reprocess | None:
    app = bootstrap.load_app(reference)
    chosen = bootstrap.choose_handler(app, handler)
    ready = bootstrap.prepare(app, stop=stop, wait=wait)
    if ready is None:
        return None
    bootstrap.check_topics(ready, [chosen], reference)
    return Reprocess(app, chosen, ready.admin)


def _bound(text: str) -> Bound:
    if text.isdecimal():
        return int(text)
    if text == "earliest":
        return "earliest"
    if text == "latest":
        return "latest"
    if span := _SPAN.fullmatch(text):
        return timedelta(**{_UNITS[span[2]]: int(span[1])})
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadInput(f"{text!r} is no place in a topic.", remedy=f"{_BOUND}.") from error
    if time.tzinfo is None:
        raise BadInput(f"{text!r}: in which time zone?", remedy=f"Write {text}Z, or an offset such as +02:00.")
    return time


def _confirm(plan: Plan, *, forget: bool, yes: bool, yes_repeat: int | None) -> int | None:
    """The number of repetitions confirmed; None without `forget`. Raises BadInput when it was not confirmed."""
    count = plan.counts.repeated
    if not forget:
        if not yes and _ask(f"{_text(plan)}\nRun {plan.counts.would_run(forget=False)} messages? [y/N]") != "y":
            raise BadInput("not confirmed.", remedy="Nothing was done. To do it without being asked: --yes")
        return None
    if yes_repeat is None:
        answer = _ask(f"{_text(plan)}\nThe effects of {count} messages will be made A SECOND TIME. Type {count}:")
        yes_repeat = int(answer) if answer.isdecimal() else None
    if yes_repeat != count:
        raise BadInput(
            f"the effects of {count} messages would be repeated, and {yes_repeat} was confirmed.",
            remedy=f"Nothing was done. If they are to be repeated: --yes-repeat {count}",
        )
    return count


def _ask(question: str) -> str:
    typer.echo(f"{question} ", nl=False, err=True)
    # readline and not input(): an end of standard input is an answer too, and it is no.
    return typer.get_text_stream("stdin").readline().strip().lower()


def _show_plan(plan: Plan, *, forget: bool, as_json: bool) -> int:
    refusal = None if forget else plan.refusal()
    text = f"{_text(plan)}\n" + (
        f"refused: {refusal}" if refusal else f"would run: {plan.counts.would_run(forget=forget)}"
    )
    document = {"plan": plan.document(forget=forget), "refused": str(refusal) if refusal else None}
    options.show(document, text, as_json=as_json)
    return options.FINDINGS if refusal else 0


def _text(plan: Plan) -> str:
    ranges = ", ".join(f"[{r.partition}] {r.start} to {r.end}" for r in plan.ranges)
    counts = plan.counts
    return (
        f"{plan.consumer} <- {plan.topic} {ranges}\n"
        f"new {counts.new}, duplicates {counts.duplicates}, ids forgotten {counts.uncovered}, without id "
        f"{counts.without_id}, parked {counts.parked}, dead {counts.dead}, undecodable {counts.undecodable}"
    )


def _result(tally: Tally, *, finished: bool) -> str:
    lines = [
        f"ran {tally.ran}, duplicates {tally.duplicates}, parked {tally.parked}, dead {tally.dead}, "
        f"failed {len(tally.failed)}, left out behind a failure {tally.behind}"
    ]
    lines += [f"failed: [{f.partition}]@{f.offset} {f.cause}" for f in tally.failed[:20]]
    if len(tally.failed) > 20:
        lines.append(f"... and {len(tally.failed) - 20} more; --json lists a hundred")
    if not finished:
        reached = ", ".join(f"[{p}] up to {o}" for p, o in sorted(tally.reached.items())) or "nowhere"
        lines.append(f"stopped, reached {reached}; run it again for the rest")
    return "\n".join(lines)


def _code(tally: Tally, *, finished: bool) -> int:
    if not finished:
        return _START_AGAIN
    return options.FINDINGS if tally.failed or tally.behind else 0
