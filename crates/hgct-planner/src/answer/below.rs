//! Which physical limit keeps an answer below the sum of what its kinds do alone.

use std::collections::BTreeSet;

use serde::Serialize;

use super::Answer;
use crate::instance::PricedTemplate;
use crate::words;

/// The part of the sum of the one-kind answers below which a limit is named.
const ENOUGH: f64 = 0.95;
/// Size of a message by which links are compared, bytes.
const LARGE: f64 = 1e9;

/// Why an answer is below the sum of the one-kind answers. Alone, each kind has the whole global batch
/// and no other kind to wait for; together they divide it, and pay for every step what does not shrink
/// with the samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BelowSum {
    /// The largest of the parts: `fill`, `transfer`, `exchange`, `update`, `memory` (activations that
    /// are computed again), or `rounding` (samples, layers and devices are whole numbers).
    pub limit: String,
    /// One step at the sum of their rates.
    #[serde(rename = "sum_seconds")]
    pub sum_s: f64,
    /// What the answer's step has beside that, by part; the parts add up.
    pub parts: Vec<Part>,
    /// Whether the bound proves that no plan of these devices reaches 95 % of the sum.
    pub proven: bool,
    /// The same in words.
    pub reason: String,
}

/// A part of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    /// As [`BelowSum::limit`].
    pub name: String,
    /// How long it takes.
    pub seconds: f64,
}

impl BelowSum {
    /// `part` is the answer ÷ the sum; `None` where that is enough.
    pub(super) fn new(answer: &Answer, part: f64) -> Option<Self> {
        if part >= ENOUGH {
            return None;
        }
        let priced = answer.price();
        let slowest = (0..priced.templates.len())
            .max_by(|a, b| priced.templates[*a].total_s.total_cmp(&priced.templates[*b].total_s))?;
        let of = &priced.templates[slowest];
        let sum_s = priced.iteration_s * part;
        let again_s = again(answer, slowest, of);
        let known =
            [of.bubble_s, of.transfer_s, priced.exchange_s, priced.update_s, again_s].iter().sum::<f64>();
        let parts = [
            ("fill", of.bubble_s),
            ("transfer", of.transfer_s),
            ("exchange", priced.exchange_s),
            ("update", priced.update_s),
            ("memory", again_s),
            ("rounding", priced.iteration_s - sum_s - known),
        ];
        let (limit, seconds) =
            parts.iter().fold(parts[0], |most, part| if part.1 > most.1 { *part } else { most });
        let proven = answer.prediction.bound_s.is_some_and(|bound| bound > sum_s / ENOUGH);
        let proof = if proven { ", and the bound proves that no plan of these devices does" } else { "" };
        Some(Self {
            reason: format!(
                "they do not reach 95 % of it{proof}: {} of a step of {} go to {}",
                words::seconds(seconds),
                words::seconds(priced.iteration_s),
                in_words(answer, limit)
            ),
            limit: limit.to_owned(),
            sum_s,
            parts: parts.map(|(name, seconds)| Part { name: name.to_owned(), seconds }).to_vec(),
            proven,
        })
    }
}

/// Seconds of forwards that the slowest stage of a template computes again.
fn again(answer: &Answer, template: usize, priced: &PricedTemplate) -> f64 {
    let of = &answer.layout.templates[template];
    let compute = |at: &usize| priced.stages[*at].forward_s + priced.stages[*at].backward_s;
    let slowest = (0..of.stages.len()).max_by(|a, b| compute(a).total_cmp(&compute(b)));
    let again = slowest.filter(|at| of.stages[*at].recompute);
    again.map_or(0.0, |at| f64::from(of.num_micro_batches) * priced.stages[at].forward_s)
}

fn in_words(answer: &Answer, limit: &str) -> String {
    match limit {
        "fill" => "filling and draining pipelines, however few samples are left for each".into(),
        "exchange" => format!("exchanging gradients{}", slowest_link(answer).unwrap_or_default()),
        "transfer" => format!("handing activations on{}", slowest_link(answer).unwrap_or_default()),
        "update" => "the optimizer's update".into(),
        "memory" => "computing activations again, because memory does not hold them".into(),
        _ => "samples, layers and devices being whole numbers, and layers that suit one kind better than \
              another"
            .into(),
    }
}

/// The slowest link between any two of the kinds that are used.
fn slowest_link(answer: &Answer) -> Option<String> {
    let instance = &answer.instance;
    let stages = answer.layout.templates.iter().flat_map(|template| &template.stages);
    let used: BTreeSet<usize> = stages.map(|stage| stage.pool).collect();
    let rate = |(p, q): &(usize, usize)| {
        let devices = |pool: usize| instance.pools[pool].devices_per_node;
        LARGE / instance.inter[*p][*q].seconds(devices(*p), devices(*q), LARGE)
    };
    let pairs = used.iter().flat_map(|p| used.iter().map(move |q| (*p, *q)));
    let (p, q) = pairs.min_by(|a, b| rate(a).total_cmp(&rate(b)))?;
    let (from, to, rate) = (&instance.pools[p].kind, &instance.pools[q].kind, rate(&(p, q)) / 1e9);
    Some(format!("; the slowest link, from {from} to {to}, carries {rate:.1} GB/s from a node"))
}
