//! Two answers side by side.

use std::fmt;

use serde::Serialize;

use super::Answer;
use super::text::percent;
use crate::explain::{cells, table};

/// What differs between two answers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Iterations a second of both, and of the second ÷ the first.
    pub iterations_per_second: [f64; 2],
    /// Second ÷ first.
    pub speedup: f64,
    /// Gap to the bound of both, where known.
    pub gap: [Option<f64>; 2],
    /// Whether both answer the same problem.
    pub same_problem: bool,
    /// Devices used of each kind by both.
    pub devices: Vec<(String, [u64; 2])>,
    /// Pipelines of both.
    pub pipelines: [u64; 2],
    /// Most stages of a pipeline of both.
    pub stages: [usize; 2],
    /// Fullest device of both, as a part of its memory.
    pub fullest: [f64; 2],
    /// Seconds of a step in the slowest pipeline, update and visible exchange of both.
    pub parts_s: [[f64; 3]; 2],
    /// Templates that only one of them has, in words.
    pub only: [Vec<String>; 2],
}

/// Compares two answers.
pub fn compare(a: &Answer, b: &Answer) -> Comparison {
    let both = [a, b];
    let priced = both.map(Answer::price);
    let rows = both.map(Answer::rows);
    let used = both.map(|of| of.layout.devices_used(of.instance.pools.len()));
    let mut kinds: Vec<&str> =
        both.iter().flat_map(|of| &of.instance.pools).map(|p| p.kind.as_str()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let of_kind = |of: usize, kind: &str| {
        let pools = both[of].instance.pools.iter().zip(&used[of]);
        pools.filter(|(pool, _)| pool.kind == kind).map(|(_, used)| used).sum()
    };
    let words = both.map(template_words);
    let missing = |of: usize, other: usize| {
        words[of].iter().filter(|words_of| !words[other].contains(words_of)).cloned().collect()
    };
    let fullest = |of: usize| {
        rows[of].iter().map(|row| row.memory_bytes as f64 / row.memory_limit_bytes as f64).fold(0.0, f64::max)
    };
    Comparison {
        iterations_per_second: both.map(Answer::iterations_per_s),
        speedup: b.iterations_per_s() / a.iterations_per_s(),
        gap: both.map(|of| of.prediction.gap()),
        same_problem: a.instance == b.instance,
        devices: kinds
            .iter()
            .map(|kind| ((*kind).to_owned(), [of_kind(0, kind), of_kind(1, kind)]))
            .collect(),
        pipelines: both.map(|of| of.layout.num_pipelines()),
        stages: both.map(|of| of.layout.templates.iter().map(|t| t.stages.len()).max().unwrap_or(0)),
        fullest: [fullest(0), fullest(1)],
        parts_s: [0, 1].map(|of| [priced[of].pipeline_s, priced[of].update_s, priced[of].exchange_s]),
        only: [missing(0, 1), missing(1, 0)],
    }
}

fn template_words(answer: &Answer) -> Vec<String> {
    let pools = &answer.instance.pools;
    let stage = |stage: &crate::instance::Stage| {
        let again = if stage.recompute { " recompute" } else { "" };
        let num = stage.num_devices();
        format!("{}–{} on {num} {}{again}", stage.first_layer, stage.end_layer - 1, pools[stage.pool].kind)
    };
    let template = |t: &crate::instance::Template| {
        let stages: Vec<String> = t.stages.iter().map(stage).collect();
        format!(
            "{} × [{}], {} micro-batches of {}",
            t.count,
            stages.join(" | "),
            t.num_micro_batches,
            t.micro_batch
        )
    };
    answer.layout.templates.iter().map(template).collect()
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.same_problem {
            writeln!(f, "The two answer different problems: model, devices, batch or costs differ.\n")?;
        }
        let gap = |x: Option<f64>| x.map_or_else(|| "not known".into(), percent);
        let pair = |name: &str, of: [String; 2]| {
            let [a, b] = of;
            vec![name.to_owned(), String::new(), a, b]
        };
        let mut rows = vec![cells(["", "", "first", "second"])];
        rows.push(pair("iterations a second", self.iterations_per_second.map(|x| format!("{x:.4}"))));
        rows.push(pair("gap to the bound", self.gap.map(gap)));
        for (name, at) in [("slowest pipeline", 0), ("update", 1), ("exchange that shows", 2)] {
            rows.push(pair(name, [0, 1].map(|of| format!("{:.3} s", self.parts_s[of][at]))));
        }
        for (kind, used) in &self.devices {
            rows.push(pair(&format!("devices of {kind}"), used.map(|n| n.to_string())));
        }
        rows.push(pair("pipelines", self.pipelines.map(|n| n.to_string())));
        rows.push(pair("stages at most", self.stages.map(|n| n.to_string())));
        rows.push(pair("fullest device", self.fullest.map(percent)));
        table(f, &rows)?;
        for (name, only) in ["first", "second"].iter().zip(&self.only) {
            for words in only {
                writeln!(f, "\nonly in the {name}: {words}")?;
            }
        }
        let (word, by) =
            if self.speedup >= 1.0 { ("faster", self.speedup - 1.0) } else { ("slower", 1.0 - self.speedup) };
        writeln!(f, "\nThe second is {} {word}.", percent(by))
    }
}
