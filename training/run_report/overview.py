"""The head of a page about one run: its progress, main figures and warnings."""

from collections.abc import Iterator

from dnnlib.text import format_kimg, format_time
from training.run_report import notices
from training.run_report.files import Run
from training.run_report.markup import Html, join, section, show, tag
from training.run_report.scores import Score, best


def header(run: Run) -> Html:
    """Return the head of a page about one run: title, status and progress bar."""
    total, preset = run.total_kimg, run.settings.get("preset")
    bar = None
    if total is not None:
        share = min(run.kimg / total, 1.0)
        bar = tag("progress", f"{share:.0%}", max=1, value=f"{share:.4f}", aria_label="Progress")
    kicker = "Training run" if preset is None else f"Training run of preset {show(preset)}"
    return join(
        tag("p", kicker, class_="kicker"),
        tag("h1", run.name),
        tag("p", run.status, class_="status"),
        bar,
    )


def tiles(run: Run) -> Html:
    """Return tiles with the main figures of a run: kimg, loss, time, speed, memory, scores."""
    found = [_tile(name, value, small) for name, value, small in _figures(run)]
    return tag("dl", found, class_="tiles")


def _tile(name: str, value: str, small: str) -> Html:
    return tag(
        "div",
        tag("dt", name),
        tag("dd", value, tag("small", small) if small else None),
        class_="tile",
    )


def _figures(run: Run) -> Iterator[tuple[str, str, str]]:
    history, total = run.history, run.total_kimg
    goal = "" if total is None else f"of {format_kimg(total)}"
    yield "kimg", format_kimg(run.kimg), goal
    loss = history.last("Loss/loss")
    if loss is not None:
        yield "Loss", f"{loss:.4g}", "newest tick"
    elapsed, speed = history.last("Timing/total_sec"), history.last("Timing/images_per_sec")
    if elapsed is not None:
        left = ""
        if speed and total is not None and not run.is_complete:
            left = f"about {format_time((total - run.kimg) * 1000 / speed)} left"
        yield "Time", format_time(elapsed), left
    if speed is not None:
        yield "Images/s", f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}", ""
    gpu, cpu = history.last("Resources/peak_gpu_mem_gb"), history.last("Resources/cpu_mem_gb")
    if gpu is not None or cpu is not None:
        shown, kind = (cpu, "main memory") if gpu is None else (gpu, "GPU, peak")
        yield "Memory", f"{shown:.3g} GiB", kind
    skipped = history.last("Loss/skipped_steps")
    if skipped is not None:
        yield "Skipped steps", f"{skipped:,.0f}", ""
    for scores in list(run.scores.values())[:2]:
        found = best(scores)
        if found is not None:
            yield found.title, f"{found.value:.4g}", f"best, {_kimg_text(found)}"


def _kimg_text(score: Score) -> str:
    return "kimg unknown" if score.kimg is None else f"at kimg {format_kimg(score.kimg)}"


def warnings_section(run: Run) -> Html:
    """Return the section with the notices of a run, the worst first, with remedies."""
    return section("warnings", "Warnings", notice_list(run))


def notice_list(run: Run) -> Html:
    """Return the notices of a run as a list, or a paragraph that says there are none."""
    if not run.notices:
        return tag("p", "None.")
    items = []
    for notice, num in run.notices:
        place = " ".join(filter(None, (notices.where(notice), f"({num} times)" if num > 1 else "")))
        first = tag("p", tag("strong", notice.level), f" {notice.name} {place}".rstrip())
        remedy = notice.remedy and tag("p", tag("b", "What to do: "), notice.remedy)
        items.append(tag("li", first, tag("p", notice.message), remedy, class_=notice.level))
    return tag("ul", items, class_="notices")
