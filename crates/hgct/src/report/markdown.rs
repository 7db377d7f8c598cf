//! `report.md`: what a person reads after a run.

use std::fmt::Write as _;

use hgct_core::cluster::{Grant, Isolation};

use super::Inputs;
use super::facts::{Device, Report};
use super::shares::Shares;
use super::summary::{Ended, resume_command};
use super::text::{bytes, count, or_dash, percent, rate, seconds, short_count};
use crate::plain_loops::allowance_bytes;

/// Which files lie beside the report.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pictures {
    pub(super) loss: bool,
    pub(super) timeline: bool,
    pub(super) trace: bool,
}

/// The whole text.
pub(super) fn write(report: &Report, inputs: &Inputs, pictures: Pictures) -> String {
    let mut out = String::new();
    let summary = &inputs.summary;
    let _ = writeln!(out, "# Run {}\n", summary.run);
    verdict(&mut out, report, inputs);
    losses(&mut out, report, pictures);
    devices(&mut out, report, inputs);
    step_time(&mut out, report);
    time_by_device(&mut out, report);
    memory(&mut out, report, inputs);
    if pictures.timeline {
        out.push_str("## One steady step\n\n![Timeline of one step: predicted above, measured below](timeline.svg)\n\n");
    }
    samples(&mut out, inputs);
    run_facts(&mut out, inputs);
    next(&mut out, inputs, pictures);
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// Three sentences: what was learnt, how fast, and where the rest of the time went.
fn verdict(out: &mut String, report: &Report, inputs: &Inputs) {
    let summary = &inputs.summary;
    let devices = report.devices.len();
    let mut kinds: Vec<_> = report.devices.iter().map(|device| &device.kind).collect();
    kinds.sort();
    kinds.dedup();
    let did = match &summary.ended {
        Ended::Trained => "trained",
        Ended::Stopped => "was stopped after training",
        Ended::Failed { .. } => "failed after training",
        Ended::Unknown => "has trained",
    };
    let _ = write!(
        out,
        "This run {did} {} ({} parameters) for {} on {} of {}",
        inline(&summary.model.name),
        short_count(summary.model.parameters),
        plural(report.steps.trained, "step"),
        plural(devices as u64, "device"),
        plural(kinds.len() as u64, "kind")
    );
    if let Some(train) = summary.times.train {
        let _ = write!(out, " in {}", seconds(train));
    }
    match (report.losses.held_out, report.losses.bigram, report.losses.below_bigram) {
        (Some(loss), Some(bigram), Some(below)) => {
            let word = if below { "below" } else { "**not** below" };
            let _ = write!(
                out,
                ", and its held-out loss ended at {loss:.3} nats a token, {word} the {bigram:.3} of a bigram model of the same tokens"
            );
        }
        (Some(loss), ..) => {
            let _ = write!(out, ", and its held-out loss ended at {loss:.3} nats a token");
        }
        _ => out.push_str("; no held-out loss was measured"),
    }
    out.push_str(". ");
    let steps = &report.steps;
    match steps.measured_seconds {
        None => out.push_str("No step was measured. "),
        Some(measured) => {
            let _ = write!(out, "A step took {} at the median", seconds(measured));
            if let Some(rate_together) = steps.tokens_per_second {
                let _ = write!(out, ", {} tokens/s", rate(rate_together));
            }
            if let Some(efficiency) = steps.efficiency {
                let _ = write!(out, " or {} of what the devices reach alone in sum", percent(efficiency));
            }
            if let Some(mfu) = steps.mfu {
                let _ = write!(out, " (MFU {:.1} %)", 100.0 * mfu);
            }
            match (steps.predicted_seconds, steps.prediction_error) {
                (Some(predicted), Some(error)) => {
                    let _ =
                        write!(out, "; the plan had predicted {}, {}. ", seconds(predicted), aside(error));
                }
                _ => out.push_str("; the plan carries no prediction. "),
            }
        }
    }
    out.push_str(&rest_of_time(report));
    if report.isolation == Isolation::Unisolated {
        out.push_str(" (Unisolated: nothing held the devices to their grants, so figures of single devices disturb each other.)");
    }
    out.push_str("\n\n");
    if let Ended::Failed { cause } = &summary.ended {
        let _ = writeln!(out, "It failed: {}\n", inline(cause));
    }
}

fn rest_of_time(report: &Report) -> String {
    let busy = |device: &&Device| device.busy_share.is_some();
    let by_share =
        |a: &&Device, b: &&Device| a.busy_share.unwrap_or(0.0).total_cmp(&b.busy_share.unwrap_or(0.0));
    let most = report.devices.iter().filter(busy).max_by(by_share);
    let least = report.devices.iter().filter(busy).min_by(by_share);
    let mut total = Shares::default();
    for shares in report.devices.iter().filter_map(|device| device.shares) {
        total.exchange_ns += shares.exchange_ns;
        total.exposed_ns += shares.exposed_ns;
        total.waiting_ns += shares.waiting_ns;
        total.unexplained_ns += shares.unexplained_ns;
    }
    let parts = [
        ("the exchange of gradients and parameters", total.exchange_ns),
        ("exposed communication", total.exposed_ns),
        ("waiting for others", total.waiting_ns),
        ("gaps without an explanation", total.unexplained_ns),
    ];
    let largest = parts.iter().max_by_key(|(_, ns)| *ns).filter(|(_, ns)| *ns > 0);
    let busy = match (most, least) {
        (Some(most), Some(least)) if report.devices.len() > 1 => format!(
            "Devices computed from {} ({}) to {} ({}) of the time",
            percent(least.busy_share.unwrap_or(0.0)),
            least.device,
            percent(most.busy_share.unwrap_or(0.0)),
            most.device
        ),
        (Some(only), _) => {
            format!("The device computed {} of the time", percent(only.busy_share.unwrap_or(0.0)))
        }
        _ => return "Where the time went was not measured.".into(),
    };
    match largest {
        Some((name, ns)) => format!(
            "{busy}; most of the rest went to {name} ({} of a step).",
            percent(
                *ns as f64
                    / (report
                        .devices
                        .iter()
                        .filter_map(|d| d.shares)
                        .map(|s| s.total_ns())
                        .sum::<u64>()
                        .max(1)) as f64
            )
        ),
        None => format!("{busy}."),
    }
}

fn losses(out: &mut String, report: &Report, pictures: Pictures) {
    let losses = &report.losses;
    let nats = |loss: Option<f64>| or_dash(loss, |loss| format!("{loss:.4}"));
    out.push_str("## Losses\n\n| | nats a token |\n| --- | ---: |\n");
    let _ = writeln!(out, "| training, mean of the last steps | {} |", nats(losses.train));
    let after =
        losses.held_out_step.map_or_else(String::new, |step| format!(" after {}", plural(step, "step")));
    let _ = writeln!(out, "| **held-out**{after} | **{}** |", nats(losses.held_out));
    let _ = writeln!(out, "| bigram model on the held-out tokens | {} |", nats(losses.bigram));
    let _ = writeln!(out, "| unigram model on the held-out tokens | {} |\n", nats(losses.unigram));
    out.push_str(match losses.below_bigram {
        Some(true) => "The held-out loss ended **below** the bigram model.\n\n",
        Some(false) => "The held-out loss did **not** end below the bigram model.\n\n",
        None => "Whether it ended below a bigram model is not known.\n\n",
    });
    if report.steps.skipped > 0 {
        let _ = writeln!(
            out,
            "{} skipped by all ranks because loss or gradient norm was not finite.\n",
            if report.steps.skipped == 1 {
                "One step was".into()
            } else {
                format!("{} steps were", report.steps.skipped)
            }
        );
    }
    if pictures.loss {
        out.push_str("![Loss over steps](loss.svg)\n\n");
    }
}

fn devices(out: &mut String, report: &Report, inputs: &Inputs) {
    out.push_str("## Devices\n\n");
    out.push_str("| device | kind | framework | grant | layers | micro-batches | busy | tokens/s alone | tokens/s together | of its own | adds (predicted) |\n");
    out.push_str("| --- | --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n");
    for device in &report.devices {
        let own = device
            .tokens_per_second_together
            .zip(device.tokens_per_second_alone.filter(|alone| *alone > 0.0))
            .map(|(together, alone)| together / alone);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            device.device,
            device.kind,
            if device.framework.is_empty() { "–".into() } else { inline(&device.framework) },
            grant(&device.grant),
            device.layers,
            device.micro_batches,
            or_dash(device.busy_share, percent),
            or_dash(device.tokens_per_second_alone, rate),
            or_dash(device.tokens_per_second_together, rate),
            or_dash(own, percent),
            or_dash(device.gain_permille, |gain| signed_percent(gain as f64 / 1e3)),
        );
    }
    let steps = &report.steps;
    if report.devices.len() > 1 {
        let _ = writeln!(
            out,
            "| **together** | | | | | | | {} | {} | {} | |",
            or_dash(steps.alone_tokens_per_second, rate),
            or_dash(steps.tokens_per_second, rate),
            or_dash(steps.efficiency, percent)
        );
    }
    out.push_str(
        "\nMicro-batches: how many a step × samples of each. Together: tokens of the step × the share of model flops that \
         the device computed ÷ step time.",
    );
    if inputs.profile.is_some() {
        out.push_str(" Alone: from the profile's layers and update at the device's best micro-batch size.");
    }
    let how = match report.isolation {
        Isolation::Cgroup => " Grants were held by cgroups.",
        Isolation::Affinity => " Grants were held by affinity and thread counts alone.",
        Isolation::Unisolated => " Grants were **unisolated**: devices shared the cores unrestrained.",
    };
    out.push_str(how);
    if let Some(note) = &inputs.summary.isolation_note {
        let _ = write!(out, " ({})", inline(note));
    }
    out.push_str("\n\n");
    if !inputs.summary.set_aside.is_empty() {
        out.push_str("Not used:\n\n");
        for other in &inputs.summary.set_aside {
            let _ = writeln!(out, "- {}: {}", inline(&other.device), inline(&other.reason));
        }
        out.push('\n');
    }
}

fn step_time(out: &mut String, report: &Report) {
    let steps = &report.steps;
    let time = |value: Option<f64>| or_dash(value, seconds);
    out.push_str("## Predicted against measured\n\n| | one step |\n| --- | ---: |\n");
    let _ = writeln!(out, "| predicted, as the plan says | {} |", time(steps.predicted_seconds));
    let _ = writeln!(
        out,
        "| measured, median of {} | **{}** |",
        plural(steps.steady, "steady step"),
        time(steps.measured_seconds)
    );
    let _ = writeln!(
        out,
        "| measured, tenth to ninetieth percentile | {} to {} |",
        time(steps.measured_low_seconds),
        time(steps.measured_high_seconds)
    );
    let _ =
        writeln!(out, "| error of the prediction | {} |", or_dash(steps.prediction_error, signed_percent));
    let _ = writeln!(out, "| no plan of these devices takes less than | {} |\n", time(steps.bound_seconds));
    if let Some(limit) = &steps.limited_by {
        let _ =
            writeln!(out, "The planner expected the step to be limited by `{}`.\n", limit.replace('`', "'"));
    }
}

fn time_by_device(out: &mut String, report: &Report) {
    out.push_str("## Where the time went\n\n");
    let Some(step) = report.shares_step else {
        out.push_str("No timeline was kept.\n\n");
        return;
    };
    let _ = writeln!(out, "Step {step}, from its first action on any rank to its last.\n");
    out.push_str("| device | compute | exchange | exposed communication | waiting | unexplained | step |\n");
    out.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for device in &report.devices {
        let Some(shares) = device.shares else { continue };
        let total = shares.total_ns().max(1) as f64;
        let _ = write!(out, "| {}", device.device);
        for part in [
            shares.compute_ns,
            shares.exchange_ns,
            shares.exposed_ns,
            shares.waiting_ns,
            shares.unexplained_ns,
        ] {
            let _ = write!(out, " | {}", percent(part as f64 / total));
        }
        let _ = writeln!(out, " | {} |", seconds(total / 1e9));
    }
    out.push_str(
        "\nExchange: reduce, update and gather. Exposed: other communication that no compute hides, a send, or a wait with \
         a transfer pending. Waiting: for others, with nothing under way, in the exchange too. Unexplained: gaps with none \
         of these.\n\n",
    );
}

fn memory(out: &mut String, report: &Report, inputs: &Inputs) {
    out.push_str("## Memory\n\n| process | resident, peak | predicted | granted | plain loop | more than it | allowed |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    let memory = &inputs.summary.memory;
    let _ = writeln!(
        out,
        "| coordinator | {} | | | | | 64 MiB in all |",
        or_dash(memory.coordinator_bytes, bytes)
    );
    for (node, size) in &memory.agents {
        let _ = writeln!(out, "| agent of {node} | {} | | | | | 64 MiB in all |", bytes(*size));
    }
    for device in &report.devices {
        let more = device
            .memory_bytes
            .zip(device.plain_loop_bytes)
            .map(|(worker, plain)| worker as i64 - plain as i64);
        let _ = writeln!(
            out,
            "| worker of {} | {} | {} | {} | {} | {} | {} |",
            device.device,
            or_dash(device.memory_bytes, bytes),
            or_dash(device.predicted_memory_bytes, bytes),
            bytes(device.grant.memory_bytes),
            or_dash(device.plain_loop_bytes, bytes),
            or_dash(more, |more: i64| format!(
                "{}{}",
                if more < 0 { "−" } else { "" },
                bytes(more.unsigned_abs())
            )),
            or_dash(device.plain_loop_bytes.map(allowance_bytes), bytes)
        );
    }
    if !memory.plain_loops.is_empty() {
        out.push_str(
            "\nPlain loop: the same framework without hgct, same layers, micro-batches in flight and environment, stock \
             AdamW. A worker is allowed 15 % or 64 MiB more, whichever is more.\n",
        );
    }
    out.push('\n');
}

fn samples(out: &mut String, inputs: &Inputs) {
    if inputs.summary.samples.is_empty() {
        return;
    }
    out.push_str("## What the model writes\n\nThe given text up to `▸`, what the model adds after it.\n\n");
    for sample in &inputs.summary.samples {
        let text = format!("{}▸{}", sample.prompt, sample.text).replace('\r', "");
        // A fence must be longer than any run of backticks inside.
        let runs = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
        let fence = "`".repeat((runs + 1).max(3));
        let _ = writeln!(out, "{fence}text\n{text}\n{fence}\n");
    }
}

fn run_facts(out: &mut String, inputs: &Inputs) {
    let summary = &inputs.summary;
    out.push_str("## The run\n\n");
    if let Some(at) = &summary.started_at {
        let _ = writeln!(out, "- Begun {}", inline(at));
    }
    let plan = &inputs.plan;
    let _ = writeln!(
        out,
        "- Plan `{}`: {} of {} tokens a step, {} × {} layers",
        plan.hash().short(),
        plural(u64::from(plan.global_batch), "sample"),
        count(u64::from(plan.seq_len)),
        plural(plan.pipelines.len() as u64, "pipeline"),
        plan.model.num_placeable_layers()
    );
    let data = &summary.data;
    if let (Some(tokens), Some(held_out)) = (data.tokens, data.held_out_tokens) {
        let name = data.name.as_ref().map_or_else(String::new, |name| format!(" of {}", inline(name)));
        let _ =
            writeln!(out, "- Data: {} tokens{name} to train on, {} held out", count(tokens), count(held_out));
    }
    let times = &summary.times;
    let parts = [
        ("set-up", times.set_up),
        ("data", times.data),
        ("check", times.check),
        ("profile", times.profile),
        ("plan", times.plan),
        ("train", times.train),
        ("in all", times.total),
    ];
    let told: Vec<String> =
        parts.iter().filter_map(|(name, time)| Some(format!("{name} {}", seconds((*time)?)))).collect();
    if !told.is_empty() {
        let _ = writeln!(out, "- Times: {}", told.join(", "));
    }
    for row in &inputs.metrics.checkpoints {
        let took = seconds(row.seconds);
        let _ =
            writeln!(out, "- Checkpoint after {}: {} in {took}", plural(row.step, "step"), bytes(row.bytes));
    }
    let events = if summary.events.is_empty() { &inputs.metrics.events } else { &summary.events };
    for event in events {
        let _ = writeln!(out, "- {}", inline(event));
    }
    out.push('\n');
}

fn next(out: &mut String, inputs: &Inputs, pictures: Pictures) {
    let run = &inputs.summary.run;
    out.push_str("## Where to look next\n\n");
    if pictures.trace {
        out.push_str(
            "- [`trace.json`](trace.json): open it in <https://ui.perfetto.dev>, each rank's actions and transfers, measured \
             and predicted\n",
        );
    }
    out.push_str("- `metrics.jsonl`: every step; `plan.json`: the plan; `logs/`: what each worker said\n");
    let _ = writeln!(out, "- `hgct report {run} --json`: the figures of this page");
    if inputs.summary.checkpoint.is_some() || !inputs.metrics.checkpoints.is_empty() {
        let _ = writeln!(out, "- `hgct ckpt inspect {run}`: what is in the newest checkpoint");
        if let Some(checkpoint) = &inputs.summary.checkpoint {
            let _ = writeln!(
                out,
                "  (after {}, in `{}`)",
                plural(checkpoint.step, "step"),
                checkpoint.path.replace('`', "'")
            );
        }
        let _ = writeln!(
            out,
            "- `hgct ckpt export {run} --to hf --output model`: a folder that `transformers` loads"
        );
        if inputs.summary.ended != Ended::Trained {
            let job = inputs.summary.job.as_deref().unwrap_or("job.toml");
            let command = resume_command(job, &inputs.summary.data.given, run.as_str()).replace('`', "'");
            let _ = writeln!(out, "- `{command}`: go on from it");
        }
    }
    out.push_str("- `hgct bench training`: each kind alone and together, under quotas\n");
}

fn grant(grant: &Grant) -> String {
    let cpus = f64::from(grant.cpu_millicores) / 1e3;
    let threads = plural(u64::from(grant.threads), "thread");
    let cores = match grant.cores.as_slice() {
        [] => String::new(),
        cores => format!(" on {}", cores.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")),
    };
    format!("{cpus:.2} CPU{cores}, {threads}, {}", bytes(grant.memory_bytes))
}

/// `1 step`, `12,000 steps`.
fn plural(number: u64, word: &str) -> String {
    if number == 1 { format!("1 {word}") } else { format!("{} {word}s", count(number)) }
}

/// `4.1 % below`, of what was measured.
fn aside(error: f64) -> String {
    if error.abs() < 0.0005 {
        return "as measured".into();
    }
    format!("{} {}", percent(error.abs()), if error < 0.0 { "below" } else { "above" })
}

fn signed_percent(share: f64) -> String {
    if share > 0.0 { format!("+{}", percent(share)) } else { percent(share) }
}

/// Text of others on one line, its Markdown without effect.
fn inline(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.trim().chars() {
        match c {
            '\\' | '`' | '*' | '_' | '[' | ']' | '<' | '>' | '|' | '#' => {
                safe.push('\\');
                safe.push(c);
            }
            c if c.is_control() => safe.push(' '),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_is_one_line_without_effect() {
        assert_eq!(inline("a|b\nc_d <x>"), "a\\|b c\\_d \\<x\\>");
        assert_eq!([aside(-0.041), aside(0.2), aside(0.0)], ["4.1 % below", "20 % above", "as measured"]);
    }
}
