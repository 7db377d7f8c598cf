//! Why this plan: what it expects, what limits it, what each device adds, what was rejected.

use std::fmt;

use hgct_core::cluster::Isolation;
use hgct_core::ids::{DeviceId, Kind};
use hgct_core::plan::Plan;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::cost::Memory;
use crate::evaluate::Evaluated;
use crate::fleet::Fleet;
use crate::program::Pricing;
use crate::search::Outcome;
use crate::simulate::{Simulation, simulate_priced};
use crate::words::{self, cells, nanoseconds, span, table, times};

/// The reasons of a plan: for people by `Display`, for programs by serde.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// What a step is expected to take.
    pub step_ns: u64,
    /// The same as tokens a second.
    pub tokens_per_s: f64,
    /// No plan of these devices takes less ([`crate::bound`]).
    pub bound_ns: u64,
    /// The greatest part of what lies between bound and step: `rounding`, `bubble`, `exchange`,
    /// `memory`; `compute` where all of them together are less than a twentieth.
    pub limited_by: String,
    /// That difference in parts.
    pub losses: Losses,
    /// A row a stage instance.
    pub stages: Vec<StageRow>,
    /// A row a device, used or not.
    pub devices: Vec<DeviceRow>,
    /// Other plans with their numbers.
    pub rejected: Vec<Rejected>,
    /// How the search ended.
    pub search: SearchRow,
    /// How grants were held while measuring.
    pub isolation: Isolation,
}

/// What lies between bound and step, nanoseconds; the parts add up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Losses {
    /// Layers and micro-batches come in whole numbers; actions have a cost of their own.
    pub rounding_ns: i64,
    /// Forward again, where memory forces recompute.
    pub memory_ns: i64,
    /// Filling and draining pipelines.
    pub bubble_ns: i64,
    /// Moving and adding gradients, updating, parameters back.
    pub exchange_ns: i64,
}

/// One stage instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRow {
    /// Index of the pipeline.
    pub pipeline: u32,
    /// Its device.
    pub device: DeviceId,
    /// First layer.
    pub first_layer: u32,
    /// Layer past the last.
    pub end_layer: u32,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Micro-batches a step.
    pub num_micro_batches: u32,
    /// Whether backward computes activations again.
    pub recompute: bool,
    /// Memory that it needs.
    pub memory_bytes: u64,
    /// Memory that it has.
    pub memory_limit_bytes: u64,
    /// Thousandths of the step in forward and backward.
    pub busy_permille: i64,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceRow {
    /// The device.
    pub device: DeviceId,
    /// Its kind.
    pub kind: Kind,
    /// Whether the plan uses it.
    pub used: bool,
    /// Thousandths of the step's model flops that it computes.
    pub share_permille: i64,
    /// Thousandths that its own speed would give.
    pub fair_share_permille: i64,
    /// Thousandths by which the plan is faster than the best one found without it.
    pub gain_permille: Option<i64>,
    /// Whether there is no plan without it.
    pub needed: bool,
}

/// Another plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rejected {
    /// What it is.
    pub name: String,
    /// Its step; absent where none fits.
    pub step_ns: Option<u64>,
    /// The same as tokens a second.
    pub tokens_per_s: Option<f64>,
    /// Its pipelines in words.
    pub form: String,
}

/// How the search ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SearchRow {
    /// Whether nothing faster exists in the search space.
    pub finished: bool,
    /// No plan of the search space takes less.
    pub proven_ns: u64,
    /// Plans that were simulated.
    pub simulated: u64,
}

/// Of each class: what is possible without one of its devices.
pub(crate) type Without = Vec<WithoutOne>;

/// Where nothing was searched without a device.
pub(crate) fn none_without(fleet: &Fleet<'_>) -> Without {
    vec![WithoutOne::default(); fleet.classes.len()]
}

/// The step of the best plan that was found without a device.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WithoutOne {
    pub(crate) step_ns: Option<u64>,
    /// There is no plan without it.
    pub(crate) needed: bool,
}

/// `a / b` in thousandths, rounded.
pub(crate) fn permille(a: u64, b: u64) -> i64 {
    ((u128::from(a) * 1000 + u128::from(b) / 2) / u128::from(b.max(1))) as i64
}

fn tokens_per_s(fleet: &Fleet<'_>, step_ns: u64) -> f64 {
    let tokens = f64::from(fleet.global_batch) * f64::from(fleet.task.seq_len);
    tokens * 1e9 / step_ns.max(1) as f64
}

impl Rejected {
    pub(crate) fn new(fleet: &Fleet<'_>, name: String, outcome: &Outcome) -> Self {
        let found = outcome.best.as_ref();
        Self {
            name,
            step_ns: found.map(|found| found.step_ns),
            tokens_per_s: found.map(|found| tokens_per_s(fleet, found.step_ns)),
            form: match found {
                Some(found) => form(found),
                None if outcome.finished => "none fits".into(),
                None => "none found in its part of the budget".into(),
            },
        }
    }
}

/// A plan's pipelines in words: `13×2 over 3+7` layers a stage.
fn form(found: &Evaluated) -> String {
    let pipeline = |(choice, num): &(crate::choices::Choice, u32)| {
        let layers: Vec<String> =
            choice.stages.iter().map(|s| (s.end_layer - s.first_layer).to_string()).collect();
        format!("{num}×{} over {}", choice.micro_batch, layers.join("+"))
    };
    let mut parts: Vec<(String, usize)> = Vec::new();
    for pipeline in found.sketch.pipelines.iter().map(pipeline) {
        match parts.last_mut().filter(|(known, _)| *known == pipeline) {
            Some((_, number)) => *number += 1,
            None => parts.push((pipeline, 1)),
        }
    }
    let parts = parts.into_iter().map(|(pipeline, number)| match number {
        1 => pipeline,
        number => format!("{number} × ({pipeline})"),
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// Time of the plan's pipelines if samples could be divided at will: with their stages as they are,
/// and as they would be without recompute.
fn without_rounding(fleet: &Fleet<'_>, best: &Evaluated) -> (f64, f64) {
    let mut rates = (0.0, 0.0);
    for (choice, _) in &best.sketch.pipelines {
        let slopes = choice.stages.iter().map(|stage| {
            let (_, cost) = fleet.of_class(stage.class);
            let counts = fleet.shape.counts(&(stage.first_layer..stage.end_layer));
            let size = cost.size(choice.micro_batch);
            let forward = size.map_or(0, |s| s.forward(counts));
            let plain = 2 * cost.action_overhead_ns + forward + size.map_or(0, |s| s.backward(counts));
            (plain + if stage.recompute { forward } else { 0 }, plain)
        });
        let slowest = slopes.fold((1, 1), |most, slope| (most.0.max(slope.0), most.1.max(slope.1)));
        rates.0 += f64::from(choice.micro_batch) / slowest.0 as f64;
        rates.1 += f64::from(choice.micro_batch) / slowest.1 as f64;
    }
    let batch = f64::from(fleet.global_batch);
    (batch / rates.0, batch / rates.1)
}

/// Longest of the pipelines' bottlenecks times their micro-batches.
fn without_bubble(fleet: &Fleet<'_>, best: &Evaluated) -> u64 {
    let pipeline = |(choice, num): &(crate::choices::Choice, u32)| {
        let stage = |stage: &crate::choices::ChoiceStage| {
            let (_, cost) = fleet.of_class(stage.class);
            let counts = fleet.shape.counts(&(stage.first_layer..stage.end_layer));
            let times = if stage.recompute { 2 } else { 1 };
            cost.size(choice.micro_batch).map_or(0, |size| {
                2 * cost.action_overhead_ns + times * size.forward(counts) + size.backward(counts)
            })
        };
        u64::from(*num) * choice.stages.iter().map(stage).max().unwrap_or(0)
    };
    best.sketch.pipelines.iter().map(pipeline).max().unwrap_or(0)
}

#[expect(clippy::too_many_arguments, reason = "one caller; each argument is another document's part")]
pub(crate) fn explain(
    fleet: &Fleet<'_>,
    best: &Evaluated,
    plan: &Plan,
    simulation: &Simulation,
    memory: &[Memory],
    outcome: &Outcome,
    without: &[WithoutOne],
    mut rejected: Vec<Rejected>,
) -> Result<Explanation> {
    let step_ns = simulation.step_ns;
    let bound_ns = fleet.bound.step_ns(fleet.global_batch).min(step_ns);
    let compute = simulate_priced(plan, fleet.task.profile, Pricing::COMPUTE)?;
    let (smooth, lean) = without_rounding(fleet, best);
    let memory_ns = (smooth - lean).round() as i64;
    let flat = without_bubble(fleet, best) as i64;
    let losses = Losses {
        rounding_ns: flat - bound_ns as i64 - memory_ns,
        memory_ns,
        bubble_ns: compute.step_ns as i64 - flat,
        exchange_ns: step_ns as i64 - compute.step_ns as i64,
    };
    let own = form(best);
    // The plan itself, found in another way or by another choice of update owners, is none.
    rejected.retain(|other| {
        let same = |ns: u64| ns == step_ns || (other.form == own && permille(ns, step_ns) == 1000);
        !other.step_ns.is_some_and(same)
    });
    Ok(Explanation {
        step_ns,
        tokens_per_s: tokens_per_s(fleet, step_ns),
        bound_ns,
        limited_by: losses.limiting(step_ns, bound_ns).into(),
        losses,
        stages: stage_rows(fleet, plan, simulation, memory),
        devices: device_rows(fleet, best, step_ns, without),
        rejected,
        search: SearchRow {
            finished: outcome.finished,
            proven_ns: outcome.proven_ns.clamp(bound_ns, step_ns),
            simulated: outcome.simulated,
        },
        isolation: fleet.isolation,
    })
}

impl Losses {
    fn limiting(&self, step_ns: u64, bound_ns: u64) -> &'static str {
        if (step_ns - bound_ns) * 20 < step_ns {
            return "compute";
        }
        // On a tie the first.
        let mut most = ("rounding", self.rounding_ns);
        for next in [("memory", self.memory_ns), ("bubble", self.bubble_ns), ("exchange", self.exchange_ns)] {
            if next.1 > most.1 {
                most = next;
            }
        }
        most.0
    }
}

fn stage_rows(fleet: &Fleet<'_>, plan: &Plan, simulation: &Simulation, memory: &[Memory]) -> Vec<StageRow> {
    let mut rows = Vec::new();
    for (index, pipeline) in plan.pipelines.iter().enumerate() {
        for id in &pipeline.stages {
            let stage = plan.stage(*id);
            let rank = stage.rank().index();
            let of_plan = &plan.ranks[rank];
            let limit = fleet.devices.iter().find(|d| d.rank.device == of_plan.device).map(|d| d.limit);
            let compute = simulation.timeline.ranks[rank].compute_ns();
            rows.push(StageRow {
                pipeline: index as u32,
                device: of_plan.device.clone(),
                first_layer: stage.first_layer,
                end_layer: stage.end_layer,
                micro_batch: pipeline.micro_batch,
                num_micro_batches: pipeline.num_micro_batches,
                recompute: stage.recompute,
                memory_bytes: memory[rank].total_bytes(),
                memory_limit_bytes: limit.map_or(0, |l| l.host_bytes.saturating_add(l.device_bytes)),
                busy_permille: permille(compute, simulation.step_ns),
            });
        }
    }
    rows
}

fn device_rows(fleet: &Fleet<'_>, best: &Evaluated, step_ns: u64, without: &[WithoutOne]) -> Vec<DeviceRow> {
    let ranked = best.sketch.ranked(fleet);
    let shares = best.sketch.flops_shares(fleet, &ranked);
    let all: f64 = fleet.devices.iter().map(|d| d.speed).sum();
    let row = |(d, device): (usize, &crate::fleet::FleetDevice)| {
        let rank = ranked.devices.iter().position(|used| *used == d);
        let class = fleet.classes.iter().position(|class| class.devices.contains(&d));
        DeviceRow {
            device: device.rank.device.clone(),
            kind: device.rank.kind.clone(),
            used: rank.is_some(),
            share_permille: rank.map_or(0, |rank| (shares[rank] * 1000.0).round() as i64),
            fair_share_permille: (device.speed / all.max(f64::MIN_POSITIVE) * 1000.0).round() as i64,
            gain_permille: class.and_then(|c| without[c].step_ns).map(|ns| permille(ns, step_ns) - 1000),
            needed: fleet.devices.len() == 1 || class.is_some_and(|c| without[c].needed),
        }
    };
    fleet.devices.iter().enumerate().map(row).collect()
}

fn percent(permille: i64) -> String {
    format!("{:.1} %", permille as f64 / 10.0)
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "expected  {} a step, {:.0} tokens/s; limited by {}",
            nanoseconds(self.step_ns),
            self.tokens_per_s,
            self.limited_by
        )?;
        writeln!(
            f,
            "bound     {} a step: the plan reaches {} of what these devices could compute",
            nanoseconds(self.bound_ns),
            percent(permille(self.bound_ns, self.step_ns))
        )?;
        let part = |ns: i64| percent(((ns * 1000) as f64 / self.step_ns.max(1) as f64).round() as i64);
        writeln!(
            f,
            "the rest  rounding {}, recompute {}, bubble {}, exchange {}",
            part(self.losses.rounding_ns),
            part(self.losses.memory_ns),
            part(self.losses.bubble_ns),
            part(self.losses.exchange_ns)
        )?;
        if self.isolation == Isolation::Unisolated {
            writeln!(f, "grants    unisolated: measured side by side on shared cores")?;
        }
        writeln!(f, "\nstages")?;
        self.fmt_stages(f)?;
        writeln!(f, "\ndevices")?;
        self.fmt_devices(f)?;
        if !self.rejected.is_empty() {
            writeln!(f, "\nrejected (micro-batches × samples over layers a stage)")?;
            self.fmt_rejected(f)?;
        }
        let search = self.search;
        let end = if search.finished {
            "nothing faster exists in the search space".into()
        } else {
            let gap = permille(self.step_ns - search.proven_ns, self.step_ns);
            format!("ended by its budget; at most {} may be missing", percent(gap))
        };
        writeln!(f, "\nsearch    {} simulated; {end}", words::count(search.simulated, "plan"))
    }
}

impl Explanation {
    /// Pipelines that are alike but for their devices are one block of rows.
    fn fmt_stages(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["pipeline", "device", "layers", "micro-batches", "busy", "memory", "of", "recompute"];
        let mut rows = vec![cells(head)];
        let mut blocks: Vec<Vec<&[StageRow]>> = Vec::new();
        for pipeline in self.stages.chunk_by(|a, b| a.pipeline == b.pipeline) {
            let same = |block: &&mut Vec<&[StageRow]>| self.alike(block[0], pipeline);
            match blocks.iter_mut().find(same) {
                Some(block) => block.push(pipeline),
                None => blocks.push(vec![pipeline]),
            }
        }
        for block in blocks {
            for (at, row) in block[0].iter().enumerate() {
                let of = |value: fn(&StageRow) -> u64| {
                    let values = block.iter().map(|pipeline| value(&pipeline[at]));
                    values.fold((u64::MAX, 0), |(low, high), value| (low.min(value), high.max(value)))
                };
                let busy = of(|row| row.busy_permille.max(0).cast_unsigned());
                let tenths = |permille: u64| format!("{:.1}", permille as f64 / 10.0);
                let memory = of(|row| row.memory_bytes);
                let mib = |bytes: u64| bytes.div_ceil(1 << 20).to_string();
                rows.push(vec![
                    format!("{}{}", row.pipeline, times(block.len())),
                    format!("{}{}", row.device, times(block.len())),
                    words::layers(row.first_layer, row.end_layer),
                    format!("{} × {}", row.num_micro_batches, row.micro_batch),
                    format!("{} %", span(&tenths(busy.0), &tenths(busy.1))),
                    format!("{} MiB", span(&mib(memory.0), &mib(memory.1))),
                    format!("{} MiB", mib(row.memory_limit_bytes)),
                    if row.recompute { "yes" } else { "no" }.into(),
                ]);
            }
        }
        table(f, &rows)
    }

    /// Whether two pipelines have the same stages and samples on devices of the same kinds.
    fn alike(&self, a: &[StageRow], b: &[StageRow]) -> bool {
        let kind = |row: &StageRow| self.devices.iter().find(|of| of.device == row.device).map(|of| &of.kind);
        let same = |(a, b): (&StageRow, &StageRow)| {
            let what = |row: &StageRow| {
                let StageRow { first_layer, end_layer, micro_batch, num_micro_batches, .. } = *row;
                (
                    first_layer,
                    end_layer,
                    micro_batch,
                    num_micro_batches,
                    row.recompute,
                    row.memory_limit_bytes,
                )
            };
            what(a) == what(b) && kind(a) == kind(b)
        };
        a.len() == b.len() && a.iter().zip(b).all(same)
    }

    /// Devices of which nothing else is to be said are one row.
    fn fmt_devices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![cells(["device", "kind", "share", "by its speed", "adds"])];
        let mut said: Vec<(Vec<String>, &DeviceRow, usize)> = Vec::new();
        for row in &self.devices {
            let cells = vec![
                row.kind.to_string(),
                if row.used { percent(row.share_permille) } else { "left out".into() },
                percent(row.fair_share_permille),
                match row.gain_permille {
                    Some(gain) => format!("{:+.1} % with it", gain as f64 / 10.0),
                    None if row.needed => "needed".into(),
                    None => "not known".into(),
                },
            ];
            match said.iter_mut().find(|(known, ..)| *known == cells) {
                Some((.., number)) => *number += 1,
                None => said.push((cells, row, 1)),
            }
        }
        for (cells, row, number) in said {
            let mut all = vec![format!("{}{}", row.device, times(number))];
            all.extend(cells);
            rows.push(all);
        }
        table(f, &rows)
    }

    fn fmt_rejected(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![cells(["plan", "form", "step", "against this"])];
        for row in &self.rejected {
            let step = row.step_ns.map_or_else(String::new, nanoseconds);
            let against = row.step_ns.map_or_else(String::new, |ns| {
                format!("{:+.1} %", (permille(ns, self.step_ns) - 1000) as f64 / 10.0)
            });
            rows.push(vec![row.name.clone(), row.form.clone(), step, against]);
        }
        table(f, &rows)
    }
}
