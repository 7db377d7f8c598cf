//! An answer for people.

use std::fmt;

use hgct_core::accelerator::Confidence;

use super::{Answer, Basis, StageRow, Why};
use crate::explain::{cells, table};

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
            (Some(slow), Some(fast)) => format!(" (between {fast:.3} and {slow:.3})"),
            _ => String::new(),
        };
        let mfu = self.answer.mfu().map_or_else(String::new, |mfu| format!(", MFU {}", percent(mfu)));
        writeln!(
            f,
            "{:.3} s a step{span}: {:.5} iterations a second, {} tokens a second{mfu}",
            prediction.iteration_s,
            self.answer.iterations_per_s(),
            short(self.answer.tokens_per_s())
        )?;
        match (prediction.bound_s, prediction.gap()) {
            (Some(bound), Some(gap)) => writeln!(
                f,
                "no plan of these devices takes less than {bound:.3} s: the gap is {}, limited by {}{}",
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
        let mut last: Option<StageRow> = None;
        for row in self.answer.rows() {
            let first = last.as_ref().is_none_or(|last| last.template != row.template);
            let each = if row.replicas > 1 {
                format!("{} × {}", row.replicas, row.tensor_parallel)
            } else {
                row.tensor_parallel.to_string()
            };
            rows.push(vec![
                if first { format!("{} ×", row.pipelines) } else { String::new() },
                row.kind.clone(),
                row.stage.to_string(),
                format!("{}–{}", row.layers[0], row.layers[1] - 1),
                row.devices.to_string(),
                each,
                if first { order(&row) } else { String::new() },
                if row.recompute { "yes".into() } else { "no".into() },
                format!("{} of {}", gib(row.memory_bytes as f64), gib(row.memory_limit_bytes as f64)),
                percent(row.busy),
            ]);
            last = Some(row);
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
                Some(rate) => (format!("{rate:.5}"), format!("{:+.1} %", 100.0 * (rate / own - 1.0))),
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
                        " `hgct train --plan` runs it: {:.3} s a step by the simulation of what its workers do.",
                        prediction.step_ns as f64 / 1e9
                    ),
                    None => writeln!(f),
                }
            }
            Basis::Tables => writeln!(f, "\nFrom tables of measured layers."),
        }
    }
}
