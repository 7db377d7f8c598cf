//! Why a layout is the answer: what was rejected, which devices slow it down, what more would bring.

use serde::Serialize;

use super::text::percent;
use super::{Answer, BelowSum};
use crate::instance::{Curve, Instance, Link};
use crate::words::{count, rate};

/// The part by which memory and links are made larger to see what they are worth.
const MORE: f64 = 0.1;

/// A layout, or a restriction of the problem, that was looked at and is slower.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rejected {
    /// What it is.
    pub name: String,
    /// Its iterations a second; absent where none fits.
    pub iterations_per_second: Option<f64>,
}

/// Devices that are left idle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Idle {
    /// Their kind.
    pub kind: String,
    /// How many.
    pub devices: u64,
}

/// What one more of something brings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shadow {
    /// Of what.
    pub name: String,
    /// Iterations a second that are gained.
    #[serde(rename = "iterations_per_second_gained")]
    pub gain: f64,
    /// The same as a part of the answer's.
    #[serde(rename = "part_gained")]
    pub gain_part: f64,
}

/// The reasons of an answer.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Why {
    /// In words, most important first.
    pub reasons: Vec<String>,
    /// One-kind answers and answers without a kind, other than the answer itself.
    pub rejected: Vec<Rejected>,
    /// The answer ÷ the sum of the one-kind answers at the same global batch.
    pub of_sum_of_kinds: Option<f64>,
    /// Which physical limit forbids more, where that is below 0.95.
    pub below_sum: Option<BelowSum>,
    /// Kinds of which devices are left idle, and how many.
    pub idle: Vec<Idle>,
    /// What more would bring.
    pub shadow_prices: Vec<Shadow>,
    /// What was not searched for, because the time was over.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

/// The time of a search was over before it had an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimeOver;

/// Answers a changed problem with iterations a second, or `None` where nothing fits.
pub type Search<'a> = &'a mut dyn FnMut(&Instance) -> Result<Option<f64>, TimeOver>;

/// Finds the reasons. `alone` are the iterations a second of each pool alone, empty where they are not
/// known; without `search` only these and what can be read off the answer and its bound is said.
pub fn why(answer: &Answer, alone: &[Option<f64>], search: Option<Search<'_>>) -> Why {
    let instance = &answer.instance;
    let used = answer.layout.devices_used(instance.pools.len());
    let idle = instance.pools.iter().zip(&used).filter(|(pool, used)| pool.num_devices() > **used);
    let mut why = Why {
        idle: idle
            .map(|(pool, used)| Idle { kind: pool.kind.clone(), devices: pool.num_devices() - used })
            .collect(),
        ..Why::default()
    };
    let own = answer.iterations_per_s();
    one_kind(answer, own, &mut why, alone);
    if let Some(search) = search {
        without_one(answer, &mut why, search);
        shadow_prices(answer, own, &mut why, search);
    } else {
        let pools = answer.instance.pools.iter().zip(&answer.prediction.prices);
        let there = pools.filter(|(pool, _)| pool.nodes > 0);
        why.shadow_prices = there
            .map(|(pool, part)| Shadow {
                name: format!("one more device of {} (of the bound)", pool.kind),
                gain: part * own,
                gain_part: *part,
            })
            .collect();
    }
    why.reasons = reasons(answer, &why);
    // What is as fast is the answer itself, which needs no more than those devices.
    let same = |rate: f64| (rate / own - 1.0).abs() < 1e-9;
    why.rejected.retain(|row| !row.iterations_per_second.is_some_and(same));
    why
}

/// Each kind alone, and their sum.
fn one_kind(answer: &Answer, own: f64, why: &mut Why, alone: &[Option<f64>]) {
    if answer.instance.pools.len() < 2 || alone.len() != answer.instance.pools.len() {
        return;
    }
    for (pool, alone) in answer.instance.pools.iter().zip(alone) {
        why.rejected.push(Rejected { name: format!("{} alone", pool.kind), iterations_per_second: *alone });
    }
    // A kind for which no plan was found says nothing of what it could do.
    let sum: Option<f64> = alone.iter().copied().sum();
    why.of_sum_of_kinds = sum.filter(|sum| *sum > 0.0).map(|sum| own / sum);
    why.below_sum = why.of_sum_of_kinds.and_then(|part| BelowSum::new(answer, part));
}

/// The cluster without each kind.
fn without_one(answer: &Answer, why: &mut Why, search: Search<'_>) {
    let num = answer.instance.pools.len();
    if num < 3 {
        return;
    }
    for pool in 0..num {
        let others: Vec<usize> = (0..num).filter(|other| *other != pool).collect();
        let name = format!("without {}", answer.instance.pools[pool].kind);
        match search(&only(&answer.instance, &others)) {
            Ok(without) => why.rejected.push(Rejected { name, iterations_per_second: without }),
            Err(TimeOver) => why.left_out.push(name),
        }
    }
}

fn shadow_prices(answer: &Answer, own: f64, why: &mut Why, search: Search<'_>) {
    let mut add = |name: String, changed: &Instance, share: f64| match search(changed) {
        Ok(found) => {
            // The answer itself is still possible, so nothing that is more can be worth less than nothing.
            let gain = found.map_or(0.0, |found| (found - own).max(0.0)) * share;
            why.shadow_prices.push(Shadow { name, gain, gain_part: gain / own });
        }
        Err(TimeOver) => why.left_out.push(name),
    };
    for (index, pool) in answer.instance.pools.iter().enumerate() {
        let mut changed = answer.instance.clone();
        changed.pools[index].nodes += 1;
        let name = format!("one more device of {} (a node's gain, divided)", pool.kind);
        add(name, &changed, 1.0 / f64::from(pool.devices_per_node));
    }
    let mut changed = answer.instance.clone();
    for pool in &mut changed.pools {
        pool.memory_bytes *= 1.0 + MORE;
    }
    add(format!("{:.0} % more memory on every device", 100.0 * MORE), &changed, 1.0);
    let mut changed = answer.instance.clone();
    changed.inter.iter_mut().flatten().for_each(faster);
    add(format!("{:.0} % more bandwidth between nodes", 100.0 * MORE), &changed, 1.0);
}

fn faster(link: &mut Link) {
    for row in &mut link.rows {
        match &mut row.curve {
            Curve::AlphaBeta { bytes_per_s, .. } => *bytes_per_s *= 1.0 + MORE,
            Curve::Polynomial { a, b, c, cap_bytes_per_s, .. } => {
                for factor in [a, b, c, cap_bytes_per_s] {
                    *factor *= 1.0 + MORE;
                }
            }
        }
    }
}

/// The problem with some of its pools only.
fn only(instance: &Instance, pools: &[usize]) -> Instance {
    Instance {
        pools: pools.iter().map(|pool| instance.pools[*pool].clone()).collect(),
        inter: pools.iter().map(|a| pools.iter().map(|b| instance.inter[*a][*b].clone()).collect()).collect(),
        ..instance.clone()
    }
}

fn reasons(answer: &Answer, why: &Why) -> Vec<String> {
    let own = answer.iterations_per_s();
    let priced = answer.price();
    let mut reasons = Vec::new();
    for Idle { kind, devices } in &why.idle {
        let (devices, are) = (count(*devices, "device"), if *devices == 1 { "is" } else { "are" });
        reasons.push(format!(
            "{devices} of {kind} {are} left idle: no place was found where a step would be shorter"
        ));
    }
    for row in &why.rejected {
        let Some(kind) = row.name.strip_prefix("without ") else { continue };
        match row.iterations_per_second {
            Some(without) if without > own => reasons.push(format!(
                "{kind} slows the run down: without it the search found {} iterations a second ({} more)",
                rate(without),
                percent(without / own - 1.0)
            )),
            Some(without) => {
                reasons.push(format!(
                    "{kind} adds {} to what is possible without it",
                    percent(own / without - 1.0)
                ));
            }
            None => reasons.push(format!("{kind} is needed: without it no plan was found")),
        }
    }
    if let Some(part) = why.of_sum_of_kinds {
        reasons.push(format!(
            "together they reach {} of the sum of what each kind reaches alone at this global batch",
            percent(part)
        ));
        reasons.extend(why.below_sum.iter().map(|below| below.reason.clone()));
    }
    let slowest = priced.templates.iter().fold(0.0f64, |most, t| most.max(t.total_s));
    let fill: f64 = priced.templates.iter().map(|t| t.bubble_s).fold(0.0, f64::max);
    if fill > 0.05 * slowest {
        reasons.push(format!(
            "filling and draining pipelines takes up to {} of a step: more samples a step would make it less",
            percent(fill / answer.prediction.iteration_s)
        ));
    }
    if priced.exchange_s > 0.01 * answer.prediction.iteration_s {
        reasons.push(format!(
            "{} of a step is gradient exchange that nothing hides",
            percent(priced.exchange_s / answer.prediction.iteration_s)
        ));
    }
    if answer.layout.templates.iter().flat_map(|t| &t.stages).any(|stage| stage.recompute) {
        reasons.push("some stages compute activations again, because memory does not hold them".to_owned());
    }
    reasons
}
