//! Two answers side by side.

use std::fmt;

use serde::Serialize;

use super::alike::{alike, layers_of};
use super::text::percent;
use super::{Answer, StageRow};
use crate::instance::{Stage, Template};
use crate::words::{cells, count, rate, seconds, table, times};

/// What differs between two answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Both, the first first.
    pub rows: [Compared; 2],
    /// Iterations a second of the second ÷ those of the first.
    pub speedup: f64,
    /// Whether both answer the same problem.
    pub same_problem: bool,
}

/// One of two answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// `first` or `second`.
    pub plan: &'static str,
    /// Steps a second.
    pub iterations_per_second: f64,
    /// Gap to the bound, where it is known.
    pub gap: Option<f64>,
    /// The slowest pipeline's part of a step.
    pub pipeline_seconds: f64,
    /// The update's.
    pub update_seconds: f64,
    /// What shows of the exchange.
    pub exchange_seconds: f64,
    /// Of each kind that either has.
    pub devices: Vec<UsedDevices>,
    /// Pipelines.
    pub pipelines: u64,
    /// Most stages of a pipeline.
    pub stages_at_most: usize,
    /// Fullest device, as a part of its memory.
    pub fullest_memory_part: f64,
    /// Pipelines that the other has not, in words.
    pub only_here: Vec<String>,
}

/// Devices of one kind that an answer uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UsedDevices {
    /// The kind.
    pub kind: String,
    /// How many.
    pub devices: u64,
}

/// Compares two answers.
pub fn compare(a: &Answer, b: &Answer) -> Comparison {
    let mut kinds: Vec<&str> =
        [a, b].iter().flat_map(|of| &of.instance.pools).map(|pool| pool.kind.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let words = [a, b].map(template_words);
    let missing =
        |of: usize, other: usize| words[of].iter().filter(|of| !words[other].contains(of)).cloned().collect();
    Comparison {
        rows: [row("first", a, &kinds, missing(0, 1)), row("second", b, &kinds, missing(1, 0))],
        speedup: b.iterations_per_s() / a.iterations_per_s(),
        same_problem: a.instance == b.instance,
    }
}

fn row(plan: &'static str, of: &Answer, kinds: &[&str], only_here: Vec<String>) -> Compared {
    let priced = of.price();
    let used = of.layout.devices_used(of.instance.pools.len());
    let of_kind = |kind: &&str| {
        let pools = of.instance.pools.iter().zip(&used).filter(|(pool, _)| pool.kind == *kind);
        UsedDevices { kind: (*kind).to_owned(), devices: pools.map(|(_, used)| used).sum() }
    };
    let full = |row: &StageRow| row.memory_bytes as f64 / row.memory_limit_bytes as f64;
    Compared {
        plan,
        iterations_per_second: of.iterations_per_s(),
        gap: of.prediction.gap(),
        pipeline_seconds: priced.pipeline_s,
        update_seconds: priced.update_s,
        exchange_seconds: priced.exchange_s,
        devices: kinds.iter().map(of_kind).collect(),
        pipelines: of.layout.num_pipelines(),
        stages_at_most: of.layout.templates.iter().map(|t| t.stages.len()).max().unwrap_or(0),
        fullest_memory_part: of.rows().iter().map(full).fold(0.0, f64::max),
        only_here,
    }
}

/// Each template in words; neighbouring stages that are alike are one part, `×12`.
fn template_words(answer: &Answer) -> Vec<String> {
    let pools = &answer.instance.pools;
    let part = |stages: &[Stage]| {
        let Some(stage) = stages.first() else { return String::new() };
        let again = if stage.recompute { " recompute" } else { "" };
        let (num, kind) = (stage.num_devices(), &pools[stage.pool].kind);
        let split = match (stage.tensor_parallel, stage.expert_parallel) {
            (_, 1) => String::new(),
            (tensor, experts) => format!(" (TP {tensor}, experts {experts})"),
        };
        format!("{} on {num} {kind}{split}{again}{}", layers_of(stages), times(stages.len()))
    };
    let template = |of: &Template| {
        let parts: Vec<String> =
            alike(&answer.instance, &of.stages).into_iter().map(|run| part(&of.stages[run])).collect();
        format!(
            "{} × [{}], {} of {}",
            of.count,
            parts.join(" | "),
            count(u64::from(of.num_micro_batches), "micro-batch"),
            of.micro_batch
        )
    };
    answer.layout.templates.iter().map(template).collect()
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.same_problem {
            writeln!(f, "The two answer different problems: model, devices, batch or costs differ.\n")?;
        }
        let pair = |name: &str, of: &dyn Fn(&Compared) -> String| {
            vec![name.to_owned(), String::new(), of(&self.rows[0]), of(&self.rows[1])]
        };
        let mut rows = vec![cells(["", "", "first", "second"])];
        rows.push(pair("iterations a second", &|of| rate(of.iterations_per_second)));
        rows.push(pair("gap to the bound", &|of| of.gap.map_or_else(|| "not known".into(), percent)));
        rows.push(pair("slowest pipeline", &|of| seconds(of.pipeline_seconds)));
        rows.push(pair("update", &|of| seconds(of.update_seconds)));
        rows.push(pair("exchange that shows", &|of| seconds(of.exchange_seconds)));
        for (at, used) in self.rows[0].devices.iter().enumerate() {
            let name = format!("devices of {}", used.kind);
            rows.push(pair(&name, &|of| of.devices[at].devices.to_string()));
        }
        rows.push(pair("pipelines", &|of| of.pipelines.to_string()));
        rows.push(pair("stages at most", &|of| of.stages_at_most.to_string()));
        rows.push(pair("fullest device", &|of| percent(of.fullest_memory_part)));
        table(f, &rows)?;
        for of in &self.rows {
            for words in &of.only_here {
                writeln!(f, "\nonly in the {}: {words}", of.plan)?;
            }
        }
        let (word, by) =
            if self.speedup >= 1.0 { ("faster", self.speedup - 1.0) } else { ("slower", 1.0 - self.speedup) };
        writeln!(f, "\nThe second is {} {word}.", percent(by))
    }
}
