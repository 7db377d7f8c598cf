//! An answer for people.

use std::fmt;

use hgct_core::accelerator::Confidence;

use super::alike::{alike, layers_of};
use super::{Answer, Basis, StageRow, Why};
use crate::words::{self, cells, rate, seconds, span, table, times};

/// An answer with its reasons, as text.
#[derive(Debug, Clone, Copy)]
pub struct Told<'a> {
    answer: &'a Answer,
    why: &'a Why,
}

impl Answer {
    /// The answer with its reasons, to be printed.
    pub fn tell<'a>(&'a self, why: &'a Why) -> Told<'a> {
        Told { answer: self, why }
    }
}

/// A part of one as percent.
pub(super) fn percent(part: f64) -> String {
    format!("{:.1} %", 100.0 * part)
}

/// Bytes as GiB.
pub(super) fn gib(bytes: f64) -> String {
    format!("{:.1}", bytes / 1_073_741_824.0)
}

/// Micro-batches of a pipeline, and their order where it is not the usual one.
fn order(row: &StageRow) -> String {
    let schedule = if row.schedule == "1f1b" { String::new() } else { format!(", {}", row.schedule) };
    format!("{} of {}{schedule}", row.micro_batches, row.micro_batch)
}

/// One row of the table for neighbouring stages that are alike.
fn row_of(run: &[StageRow], layers: String) -> Vec<String> {
    let Some(row) = run.first() else { return Vec::new() };
    let first = row.stage == 0;
    let experts = if row.expert_parallel > row.tensor_parallel {
        format!(", experts {}", row.expert_parallel)
    } else {
        String::new()
    };
    let each = match row.replicas {
        1 => format!("{}{experts}", row.tensor_parallel),
        replicas => format!("{replicas} × {}{experts}", row.tensor_parallel),
    };
    let ends = |of: fn(&StageRow) -> f64| {
        run.iter().map(of).fold((f64::INFINITY, 0.0f64), |(low, high), of| (low.min(of), high.max(of)))
    };
    let memory = ends(|row| row.memory_bytes as f64);
    let busy = ends(|row| 100.0 * row.busy);
    vec![
        if first { format!("{} ×", row.pipelines) } else { String::new() },
        row.kind.clone(),
        format!("{}{}", words::layers(row.stage as u32, (row.stage + run.len()) as u32), times(run.len())),
        layers,
        run.iter().map(|row| row.devices).sum::<u64>().to_string(),
        each,
        if first { order(row) } else { String::new() },
        if row.recompute { "yes".into() } else { "no".into() },
        format!("{} of {}", span(&gib(memory.0), &gib(memory.1)), gib(row.memory_limit_bytes as f64)),
        format!("{} %", span(&format!("{:.1}", busy.0), &format!("{:.1}", busy.1))),
    ]
}

/// A large count in words that are short.
fn short(count: f64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(size, _)| count >= *size) {
        Some((size, unit)) => format!("{:.1}{unit}", count / size),
        None => format!("{count:.0}"),
    }
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.headline(f)?;
        writeln!(f, "\nStages")?;
        self.stages(f)?;
        writeln!(f, "\nDevices")?;
        self.devices(f)?;
        if !self.why.reasons.is_empty() {
            writeln!(f, "\nReasons")?;
            for reason in &self.why.reasons {
                writeln!(f, "  - {reason}")?;
            }
        }
        if !self.why.rejected.is_empty() {
            writeln!(f, "\nRejected")?;
            self.rejected(f)?;
        }
        if !self.why.shadow_prices.is_empty() {
            writeln!(f, "\nWhat more would bring")?;
            let mut rows = vec![cells(["", "", "iterations a second", "of this plan"])];
            for row in &self.why.shadow_prices {
                rows.push(vec![
                    row.name.clone(),
                    String::new(),
                    format!("+{:.6}", row.gain),
                    format!("+{:.2} %", 100.0 * row.gain_part),
                ]);
            }
            table(f, &rows)?;
        }
        if !self.why.left_out.is_empty() {
            writeln!(f, "\nNot searched for, because the time was over")?;
            for name in &self.why.left_out {
                writeln!(f, "  - {name}")?;
            }
        }
        self.basis(f)
    }
}

impl Told<'_> {
    fn headline(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Answer { instance, model, prediction, layout, .. } = self.answer;
        let active = if model.active_parameters == model.parameters {
            String::new()
        } else {
            format!(" ({} a token)", short(model.active_parameters as f64))
        };
        writeln!(
            f,
            "{} of {} parameters{active}, {} samples of {} tokens a step, on {} of {} devices",
            model.family,
            short(model.parameters as f64),
            instance.global_batch,
            instance.seq_len,
            layout.devices_used(instance.pools.len()).iter().sum::<u64>(),
            instance.num_devices()
        )?;
        let span = match (prediction.slow_s, prediction.fast_s) {
            (Some(slow), Some(fast)) => format!(" (between {} and {})", seconds(fast), seconds(slow)),
            _ => String::new(),
        };
        let mfu = self.answer.mfu().map_or_else(String::new, |mfu| format!(", MFU {}", percent(mfu)));
        writeln!(
            f,
            "{} a step{span}: {} iterations a second, {} tokens a second{mfu}",
            seconds(prediction.iteration_s),
            rate(self.answer.iterations_per_s()),
            short(self.answer.tokens_per_s())
        )?;
        match (prediction.bound_s, prediction.gap()) {
            (Some(bound), Some(gap)) => writeln!(
                f,
                "no plan of these devices takes less than {}: the gap is {}, limited by {}{}",
                seconds(bound),
                percent(gap),
                prediction.limited_by,
                if prediction.finished { "" } else { " (the search was ended early)" }
            ),
            _ => writeln!(f, "limited by {}", prediction.limited_by),
        }
    }

    fn stages(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![cells([
            "pipelines",
            "kind",
            "stage",
            "layers",
            "devices",
            "TP",
            "micro-batches",
            "recompute",
            "memory GiB",
            "busy",
        ])];
        let all = self.answer.rows();
        let mut first_of_template = 0;
        for template in &self.answer.layout.templates {
            for run in alike(&self.answer.instance, &template.stages) {
                let place = first_of_template + run.start..first_of_template + run.end;
                rows.push(row_of(&all[place], layers_of(&template.stages[run])));
            }
            first_of_template += template.stages.len();
        }
        table(f, &rows)
    }

    fn devices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let instance = &self.answer.instance;
        let used = self.answer.layout.devices_used(instance.pools.len());
        let mut rows = vec![cells(["kind", "", "used", "of", "figures"])];
        let pools = instance.pools.iter().zip(used).enumerate();
        for (index, (pool, used)) in pools.filter(|(_, (pool, _))| pool.nodes > 0) {
            let figures = match self.answer.confidence.get(index) {
                Some(Confidence::Vendor) => "the vendor's",
                Some(Confidence::Reported) => "reported",
                Some(Confidence::Estimate) => "estimated",
                Some(Confidence::Measured) | None => "measured",
            };
            let total = pool.num_devices().to_string();
            rows.push(vec![pool.kind.clone(), String::new(), used.to_string(), total, figures.into()]);
        }
        table(f, &rows)
    }

    fn rejected(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = self.answer.iterations_per_s();
        let mut rows = vec![cells(["plan", "", "iterations a second", "against this"])];
        for row in &self.why.rejected {
            let (rate, against) = match row.iterations_per_second {
                Some(of) => (rate(of), format!("{:+.1} %", 100.0 * (of / own - 1.0))),
                None => ("no plan found".into(), String::new()),
            };
            rows.push(vec![row.name.clone(), String::new(), rate, against]);
        }
        table(f, &rows)
    }

    fn basis(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.answer.basis {
            Basis::Estimate => writeln!(
                f,
                "\nEstimated from public figures. Measure one device of each kind with `hgct profile` before \
                 you rely on it."
            ),
            Basis::Profile => {
                write!(f, "\nFrom a measured profile.")?;
                match self.answer.plan.as_ref().and_then(|plan| plan.prediction.as_ref()) {
                    Some(prediction) => writeln!(
                        f,
                        " `hgct train --plan` runs it: {} a step by the simulation of what its workers do.",
                        words::nanoseconds(prediction.step_ns)
                    ),
                    None => writeln!(f),
                }
            }
            Basis::Tables => writeln!(f, "\nFrom tables of measured layers."),
        }
    }
}
