"""The training loop: one function in visible stages."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data.loader import make_loader
from data.samplers import rank_passes
from dnnlib.errors import NotFiniteError
from dnnlib.progress import progress
from dnnlib.saver import remove_state
from dnnlib.text import format_kimg
from models import build_network
from torch_utils import distributed, rng
from torch_utils.misc import allow_tf32, returning_freed_memory
from torch_utils.saver import Saver
from torch_utils.stats import StatsCollector
from torch_utils.stop_signal import StopRequested, StopSignal
from training import checkpoint
from training.batches import Batches
from training.checkpoint import Snapshot, snapshot_path
from training.config import RunConfig
from training.distillation.course import course_of
from training.division import accumulation_rounds, group_size, hold_parameters, pass_sizes
from training.ema import EMA, PowerEMA, ema_beta
from training.family import Codec, Evaluator, Outputs, Part, TrainingData
from training.family import of as family_of
from training.optimizer import GuardedAdam, learning_rate
from training.report import forward_flops, save_reals
from training.resources.outlook import Outlook
from training.saving.writer import SnapshotParts, Writer
from training.stability.locate import first_not_finite
from training.stability.monitor import Monitor
from training.telemetry import Telemetry, memory_stats, scalar, tick_line, utilisation_stats
from training.validation.examples import Examples
from training.validation.validator import Validator
from training.watching.reference import ReferenceWatch
from training.watching.watch import Watch

_LONG_WAIT_SEC = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and how it is judged."""

    config: RunConfig  # The whole run, fitted to data and device.
    data: TrainingData  # Opened by every rank.
    codec: Codec  # Turns their batches into what the network denoises.
    evaluator: Evaluator  # Makes pictures and scores.
    device: torch.device  # This rank's.
    examples: Examples | None = None  # What the validation loss is measured on, if anything.


def training_loop(
    job: Job,
    run_dir: Path,
    *,
    saver: Saver,
    resume_state: dict[str, Any] | None = None,
    transfer: Snapshot | None = None,
    num_rollbacks: int = 0,
    stop_signal: StopSignal,
) -> bool:
    """Train until the end, and return True; return False after a signal asked to stop.

    Args:
        job: What to train.
        run_dir: An existing folder for all that the run writes; only states have several writers.
        saver: Writes states and snapshots.
        resume_state: A training state to continue from, bit for bit on the CPU.
        transfer: A snapshot whose weights start a new run.
        num_rollbacks: Rollbacks of the run so far.
        stop_signal: An active handler of signals, on every rank.

    Raises FloatingPointError if too many gradients in a row are not finite, or, on every rank,
    RollbackRequested if the run may go back instead.
    """
    config, codec, device = job.config, job.codec, job.device
    family = family_of(config)
    start_sec = time.time()
    training, logging = config.training, config.logging
    world_size, rank = distributed.world_size(), distributed.rank()
    batch_gpu, _ = accumulation_rounds(training, world_size)
    seed = rng.seed_after(training.seed, num_rollbacks)
    # A row of a batch is an image, or a set of them.
    passes = rank_passes(training.batch, batch_gpu, rank, world_size)
    step_nimg = config.step_nimg
    torch.backends.cudnn.benchmark = training.cudnn_benchmark
    allow_tf32(training.tf32)

    data = distributed.on_main(lambda: checkpoint.summarise(job.data))

    # Build network, loss, weight averages and optimizer.
    torch.manual_seed(rng.mix(training.seed, rng.STREAM_INIT))
    network = build_network(config.model).train().requires_grad_(True)
    transferred = None
    if transfer is not None:
        transferred = family.start_from(config, network, transfer, data)
        distributed.print0(transferred)
    objective = denoising = family.objective(config, network, codec)
    shard_size = group_size(training, world_size)
    parameters = hold_parameters(objective, config, shard_size, device)
    ema = EMA(parameters)
    profiles = PowerEMA(parameters, training.ema_stds)
    validator = Validator(job, family, ema, data.content_hash)
    optimizer = GuardedAdam(
        parameters,
        beta2=training.beta2,
        weight_decay=training.weight_decay,
        clip_grad=training.clip_grad,
        dynamic_scale=training.precision == "fp16",
    )

    # A distillation has stages, and its objective a teacher.
    course = course_of(
        config, objective, parameters, lambda other: family.objective(config, other, codec)
    )
    objective = course.objective

    # Restore a state, or start from another run's weights.
    cur_nimg = cur_tick = tick_start_nimg = 0
    elapsed_before_sec = 0.0
    stats = StatsCollector()
    if transferred is not None and rank == 0:
        transferred.save(run_dir)
    if resume_state is not None:
        parameters.load(resume_state["net"])
        ema.load_state_dict(resume_state["ema"])
        profiles.load_state_dict(resume_state.get("ema_profiles", {}))
        optimizer.load_state_dict(resume_state["optimizer"])
        made = resume_state["progress"]
        cur_nimg, cur_tick = made["cur_nimg"], made["cur_tick"]
        tick_start_nimg, elapsed_before_sec = made["tick_start_nimg"], made["elapsed_sec"]
        stats.load_state_dict(resume_state["stats"])
        validator.load_state_dict(resume_state)
        course.load_state_dict(resume_state)
    if training.compile:
        sizes = pass_sizes(training, world_size)  # Of all ranks: gathering shards is collective.
        num_graphs = objective.num_shapes * len(sizes)
        network.compile_parts(num_graphs, is_sharded=shard_size > 1)
        course.compile_parts(num_graphs)
        if logging.metrics:  # A few pictures alone would take less time than compiling.
            ema.network.compile_parts(objective.num_shapes)
    loss_function = objective if shard_size > 1 else distributed.wrap(objective, device)
    if training.compile:
        with distributed.no_sync(loss_function, skip=True):
            for size in sizes:
                objective.warm_up(loss_function, size, device)

    # Prepare data and outputs.
    steps = family.steps(
        config, job.data, cur_nimg, Part(rank, world_size, batch_gpu, num_rollbacks)
    )
    loader = make_loader(job.data, steps.sampler, num_workers=logging.workers, device=device)
    num_steps = math.ceil((config.total_nimg - cur_nimg) / step_nimg)
    is_remote = job.data.remote_bytes > 0
    batches = Batches(loader, len(passes), num_steps, is_remote, stop_signal)
    flops_per_image = forward_flops(config)  # The backward pass costs twice as much again.

    def snapshots(info: dict[str, Any]) -> Iterator[SnapshotParts]:
        """Yield the parts of the snapshot of each weight average. Collective."""
        yield snapshot_path(run_dir, cur_nimg), ema.whole_tensors(), course.sampled, info
        for std in profiles.stds:
            path = checkpoint.profile_path(run_dir, cur_nimg, std)
            yield path, profiles.compact(std), config, dict(info, ema_std=std)

    def whole_state(progress_info: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a training state, without copying weights. Collective."""
        return dict(
            net=parameters.state_dict(parameters.own),
            ema=ema.state_dict(),
            ema_profiles=profiles.state_dict(),
            optimizer=optimizer.state_dict(),
            stats=stats.state_dict(),
            progress=progress_info,
            **validator.state_dict(),
            **monitor.state_dict(),
            **course.state_dict(),
        )

    is_sharded, keep_states = shard_size > 1, logging.keep_states
    settings = dict(keep_states=keep_states, is_sharded=is_sharded)
    writer = Writer(saver, run_dir, config, data, **settings)
    weights = parameters.state_dict(parameters.own)
    # Three times the weights: Adam's two moments exist only from the first step on.
    averages = [ema.state_dict(), profiles.state_dict(), course.state_dict()]
    writer.reserve([weights] * 3 + averages, network, device)
    del weights, averages

    def is_stopping() -> bool:
        return stop_signal.received is not None

    telemetry = None
    if rank == 0:
        telemetry = Telemetry(run_dir, logging, config, cur_nimg)
        if cur_nimg == 0:
            save_reals(job.data, codec, run_dir / "reals.png")
            telemetry.pictures([run_dir / "reals.png"], cur_nimg)
    if resume_state is not None and resume_state["progress"]["snapshot"] is not None:
        # A state implies its snapshots: any that are missing or damaged are written again.
        made = resume_state["progress"]
        paths = [path for path, *_ in snapshots(made)]
        problems = distributed.on_main(lambda: checkpoint.snapshot_problems(paths))
        lacking = [part for part in snapshots(made) if part[0] in problems]
        writer.write(None, lacking, cur_nimg, is_urgent=is_stopping)
        if telemetry is not None:
            for problem in problems.values():
                telemetry.message(f"{problem} Written again from the training state.")

    def write(state: dict[str, Any] | None, info: dict[str, Any] | None, **how: Any) -> None:
        """Write a state, if any, and snapshots if there is ``info`` about them."""
        parts = snapshots(info) if info else ()
        waited = writer.write(state, parts, cur_nimg, is_urgent=is_stopping, **how)
        if telemetry is not None and waited > _LONG_WAIT_SEC:
            telemetry.message(
                f"Training paused for {waited:.0f} seconds, until the last state was written. "
                "Write states less often with --dump, or to a faster disk."
            )

    evaluator, outputs = job.evaluator, Outputs(run_dir, telemetry, stop_signal)
    trained = (parameters, ema, optimizer)
    watch = Watch(job, run_dir, denoising, trained, cur_nimg, telemetry)
    was_compiled = False
    reference_watch = ReferenceWatch(run_dir)
    since = dict(cur_nimg=cur_nimg, start_sec=start_sec - elapsed_before_sec)
    outlook = Outlook(config, run_dir, device, telemetry, **since)
    monitor = Monitor(config, parameters, num_rollbacks, resume_state)

    def attempt(what: str, make: Callable[..., None]) -> bool:
        """Run ``make``; return False if a stop cut it short. Reports non-finite samples."""
        try:
            with (
                outlook.timed(what),
                stop_signal.at_once(),
                ema.filled(),
                returning_freed_memory(),
            ):
                generator = family.generator(course.sampled, ema.network, codec, device)
                make(generator, outputs, cur_nimg)
        except StopRequested:
            return False
        except NotFiniteError as error:
            if telemetry is not None:
                telemetry.message(f"No {what} at kimg {format_kimg(cur_nimg / 1000)}. {error}")
        return True

    def save_pictures(generator: Any, outputs: Outputs, cur_nimg: int) -> None:
        watch.see(evaluator.save_pictures(generator, outputs, cur_nimg), cur_nimg)

    def score(generator: Any, outputs: Outputs, cur_nimg: int) -> None:
        evaluator.score(generator, outputs, cur_nimg)
        watch.see_scores(cur_nimg)

    def show_and_score(pictures_due: bool, metrics_due: bool) -> bool:
        """Make what is due; return False if a stop cut that short. Collective."""
        shown = not pictures_due or attempt("pictures", save_pictures)
        whole = shown and (not metrics_due or attempt("scores", score))
        if done:
            writer.finish()  # The report lists the files that exist.
        if whole and (pictures_due or metrics_due) and telemetry is not None:
            # One pattern for all ticks, because pathlib caches every pattern that it sees.
            end = f"-{checkpoint.count_name(cur_nimg)}"
            made = [path for path in run_dir.glob("*.png") if path.stem.endswith(end)]
            telemetry.pictures(made, cur_nimg)
            for finding in reference_watch.findings() if logging.watch else ():
                telemetry.tell(finding, cur_nimg)
            telemetry.write_report()
        return whole

    # Train.
    total_nimg = config.total_nimg
    done, stop = cur_nimg >= total_nimg or validator.is_over, False
    if done and telemetry is not None:
        more = "" if config.distillation.is_on else "; increase --kimg to continue"
        complete = f"Complete at kimg {format_kimg(cur_nimg / 1000)}{more}."
        telemetry.message(complete if cur_nimg >= total_nimg else validator.verdict(cur_nimg))
        # A kill may have come after the last state, but before older ones were removed.
        states = checkpoint.find_states(run_dir)
        if states and checkpoint.is_state_after(states[0], cur_nimg):
            latest = (run_dir, states[0], keep_states)
            for path in checkpoint.superfluous_states(*latest, later_ones=False):
                remove_state(path)
    stop_signal.defer()
    if resume_state is not None:
        # A stop may have come before the pictures and scores of the state's tick.
        made, pictures = resume_state["progress"], checkpoint.pictures_path(run_dir, cur_nimg)
        lacking = made["snapshot"] and distributed.on_main(
            lambda: not pictures.is_file() or watch.lacks_samples(cur_nimg)
        )
        stop = not show_and_score(lacking, made["metrics_due"])
    if not (done or stop):
        stop = not batches.await_step()
        if batches.failure is not None:
            raise batches.failure
    tick_start_sec, maintenance_sec = time.time(), time.time() - start_sec
    timed_nimg = cur_nimg
    tick_end_nimg = tick_start_nimg + config.tick_nimg
    bar = _tick_bar(cur_tick, cur_nimg, tick_start_nimg, config.tick_nimg, rank)
    while not (done or stop):
        begun = course.begin(cur_nimg, ema, optimizer)
        if begun and telemetry is not None:
            telemetry.message(begun)

        # Draw this step's randomness for the global batch, of which each pass takes its rows.
        step = rng.Step(seed, cur_nimg, training.batch, steps.shape_at(cur_nimg), device)
        draws = objective.draw(step)
        torch.manual_seed(rng.mix(seed, cur_nimg, rng.STREAM_MODEL, rank))

        # Accumulate gradients.
        optimizer.zero_grad()
        with parameters.accumulating():
            for part in passes:
                rows = draws.rows(part.start, part.stop)
                images, cond = objective.prepare(*batches.of_pass(), rows, device)
                with distributed.no_sync(loss_function, skip=part is not passes[-1]):
                    loss = loss_function(images, cond, rows)
                    # Averaged over the global batch (DDP averages over ranks).
                    total = objective.total(loss) * (training.loss_scaling * world_size / step_nimg)
                    monitor.add(total)
                    if optimizer.loss_scale is not None:
                        total = total * optimizer.loss_scale
                    total.backward()
                objective.report(stats, loss, rows)

        # At the end of a tick, look at what the step did.
        done = cur_nimg + step_nimg >= total_nimg
        stage_ends = cur_nimg + step_nimg >= course.stage.end_nimg
        tick_ends = stage_ends or cur_tick == 0 or cur_nimg + step_nimg >= tick_end_nimg
        if tick_ends:
            for name, value in objective.diagnose(images, cond, rows, optimizer.loss_scale).items():
                stats.report(name, value)
            watch.begin_step((images, cond, rows), tick_start_nimg, cur_nimg)

        # Update weights and their averages.
        stage_nimg = cur_nimg - course.stage.start_nimg
        lr = learning_rate(training, stage_nimg, step_nimg, course.stage.num_images)
        grad_norm = optimizer.step(lr)
        phase = course.stage.start_nimg, objective.phase(cur_nimg)
        monitor.end_step(optimizer.grad_norms, phase)
        beta = ema_beta(stage_nimg, step_nimg, training.ema_kimg, training.ema_rampup)
        ema.update(beta, optimizer.skipped)
        profiles.update(cur_nimg + step_nimg, step_nimg)
        stats.report("Loss/grad_norm", grad_norm)
        stats.report("Loss/learning_rate", lr)

        # Count, and go on unless a tick ends here.
        cur_nimg += step_nimg
        bar.update(step_nimg)
        outlook.step(cur_nimg)
        distributed.finish_step(f"kimg {cur_nimg / 1000:g}")
        stop = stop_signal.agreed() and not done
        if not (tick_ends or stop):
            if batches.await_step():
                continue
            stop = True

        # Read the counters; this is where the host waits for the device.
        bar.close()
        num_skipped, skipped_in_a_row = optimizer.read_counters()
        monitor.read(cur_nimg)
        tick_end_sec = time.time()
        elapsed_sec = elapsed_before_sec + tick_end_sec - start_sec

        # Measure the loss on held-out images, which may end the run.
        validated = {}
        if tick_ends:
            validated = validator.at_tick(cur_tick, tick_start_nimg, cur_nimg, done)
            done = done or validator.is_over
            stop = stop and not done
            stage_ends = stage_ends or done

        # Record statistics. Those of a tick that a signal cuts short go into the state.
        if tick_ends:
            tick_kimg = (cur_nimg - timed_nimg) / 1000
            sec_per_tick = max(tick_end_sec - tick_start_sec, 1e-9)  # A clock may be set back.
            flops = 3 * flops_per_image * tick_kimg * 1000
            watch.measure(stats, beta)
            fields = stats.collect()
            fields.update(
                {
                    "Progress/tick": scalar(cur_tick),
                    "Progress/kimg": scalar(cur_nimg / 1000),
                    "Loss/skipped_steps": scalar(num_skipped),
                    "Timing/total_sec": scalar(elapsed_sec),
                    "Timing/sec_per_tick": scalar(sec_per_tick),
                    "Timing/sec_per_kimg": scalar(sec_per_tick / tick_kimg),
                    "Timing/images_per_sec": scalar(tick_kimg * 1000 / max(sec_per_tick, 1e-9)),
                    "Timing/maintenance_sec": scalar(maintenance_sec),
                    **utilisation_stats(flops / sec_per_tick / world_size, device, training),
                    **memory_stats(device),
                    **validated,
                }
            )
            if telemetry is not None:
                telemetry.record(fields, cur_nimg)
                telemetry.message(tick_line(fields, total_nimg, num_skipped))
                if training.compile and not was_compiled:
                    telemetry.message(f"Compiled in {network.compile_seconds():.1f} seconds.")
                    was_compiled = True
                for text in validator.messages:
                    telemetry.message(text)
                watch.judge(fields, cur_nimg)
            find = functools.partial(first_not_finite, objective, network, (images, cond, rows))
            monitor.judge(cur_nimg, skipped_in_a_row, find, telemetry)
        # A run that a stop cuts short may still go back when it continues.
        is_last = tick_ends or num_rollbacks >= training.rollback
        if is_last and skipped_in_a_row >= training.skip_limit:
            raise FloatingPointError(
                f"{skipped_in_a_row} gradients in a row were not finite (at kimg "
                f"{format_kimg(cur_nimg / 1000)}). Resume from the last state with a lower --lr, "
                f"--clip-grad=1 or --precision=bf16; --skip-limit={training.skip_limit} set "
                "this limit."
            )

        # Save the snapshots, then the state, which implies them, then what a stop may cut short.
        regular = tick_ends and config.snapshot_is_due(cur_tick, tick_start_nimg, cur_nimg)
        snap_due = metrics_due = regular = regular or stage_ends
        dump_due = tick_ends and cur_tick % logging.dump == 0 if logging.dump else regular
        if logging.metrics_ticks is not None:
            metrics_due = done or (tick_ends and cur_tick % logging.metrics_ticks == 0)
        if tick_ends:
            cur_tick, tick_start_nimg = cur_tick + 1, cur_nimg
            tick_end_nimg = cur_nimg + config.tick_nimg
        progress_info = dict(
            cur_nimg=cur_nimg,
            cur_tick=cur_tick,
            tick_start_nimg=tick_start_nimg,
            elapsed_sec=elapsed_sec,
            num_skipped=num_skipped,
            metrics_due=metrics_due,
            data_hash=data.content_hash,
            snapshot=snapshot_path(run_dir, cur_nimg).name if snap_due else None,
            **(dict(rollbacks=num_rollbacks) if num_rollbacks else {}),
        )
        # A stop cuts ranks short one by one: they could not write a sharded state afterwards.
        regular_due = dump_due or done or (is_sharded and (snap_due or metrics_due))
        state_due = regular_due or stop
        # Rollbacks never go to states that were written only for a stop.
        kind = dict(of_stop=training.rollback > 0 and not regular_due)
        state = whole_state(progress_info) if state_due or snap_due or metrics_due else None
        if snap_due and telemetry is not None:
            checkpoint.remove_pictures(run_dir, cur_nimg)
        if state_due or snap_due:
            shown = progress_info if snap_due else None
            write(state if state_due else None, shown, **kind)
        if not stop and not show_and_score(snap_due, metrics_due):
            stop = True
            if not state_due:
                write(state, None, alone=True, **kind)
        if not (done or stop or batches.await_step()):
            stop = True
            if not state_due:
                write(whole_state(progress_info), None, **kind)
        writer.check()
        maintenance_sec = time.time() - tick_end_sec
        if tick_ends:
            outlook.tick(cur_nimg - timed_nimg, sec_per_tick, cur_nimg, maintenance_sec)
        tick_start_sec, timed_nimg = time.time(), cur_nimg
        bar = _tick_bar(cur_tick, cur_nimg, tick_start_nimg, config.tick_nimg, rank)
    bar.close()
    if not stop_signal.cut:
        distributed.barrier()
    if telemetry is not None:
        if stop:
            failed = batches.failure is not None
            by = "the data, as told below," if failed else stop_signal.name_received()
            telemetry.message(
                f"Stopped by {by} at kimg {format_kimg(cur_nimg / 1000)}; "
                f"continue with --resume={run_dir}"
            )
        outlook.finish(cur_nimg)
        telemetry.close()
    if batches.failure is not None:
        writer.finish()
        raise batches.failure
    return not stop


def _tick_bar(tick: int, cur_nimg: int, tick_start_nimg: int, tick_nimg: float, rank: int) -> Any:
    """Return a started progress bar over the images of one tick."""
    look = dict(label=f"tick {tick}", disable=rank != 0, transient=True)
    return progress(total=max(round(tick_nimg), 1), initial=cur_nimg - tick_start_nimg, **look)
